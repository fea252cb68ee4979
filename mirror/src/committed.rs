//! The side a VM has left, after the commit: it can help the target, keep or retire its images, and end. It cannot run the VM.
//!
//! Lives here: what is left to do. Never enters: an action that resumes the guest from the source's state.

use crate::{
    Micros,
    journal::Record,
    source::{Marks, RamStats, SourcePlan},
    wire::control::SourceMsg,
};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommittedEvent {
    /// The target says that the VM runs.
    Running {
        /// Microseconds from the commit's arrival there to the guest's first instruction.
        resume_us: u64,
    },
    /// A datastore-only move: the guest runs on its new images.
    Pivoted,
    /// The connection is gone before the target said so.
    LinkLost,
    /// The last record is on disk, or could not be written (it only saves a later question).
    Journaled,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum CommittedAction {
    /// Send on the control connection.
    Tell(SourceMsg),
    /// Give the guest its new images, on this host, and let it go on.
    Pivot,
    /// Append and sync.
    Journal(Record),
    /// The old images are nobody's: remove them, or stamp them stale, by plan.
    Retire,
    /// The end. `confirmed`: the target has said that it runs; else everything here is kept, for the target may still ask.
    Finish {
        /// Whether the target has said that it runs.
        confirmed: bool,
    },
}

/// A source after its commit.
#[derive(Debug)]
pub struct Committed {
    /// The plan it followed.
    pub plan: SourcePlan,
    /// Moments of the pause.
    pub marks: Marks,
    /// RAM counters.
    pub stats: RamStats,
    /// Rounds of memory, the final one included.
    pub rounds: u32,
    /// Times that lost connections were made anew.
    pub reconnects: u32,
    /// Allocated bytes of the target's images.
    pub allocated: Vec<u64>,
    /// Microseconds the target spent on loading and checking the state.
    pub load_us: u64,
    /// Moment the target (or the pivoted guest) was known to run.
    pub running: Micros,
    /// Microseconds the target took to resume.
    pub resume_us: u64,
    ended: bool,
}

impl Committed {
    pub(crate) fn begin(
        plan: SourcePlan,
        marks: Marks,
        stats: RamStats,
        rounds: u32,
        reconnects: u32,
        allocated: Vec<u64>,
        load_us: u64,
    ) -> (Self, Vec<CommittedAction>) {
        let first = if plan.to_host.is_some() {
            CommittedAction::Tell(SourceMsg::Commit)
        } else {
            CommittedAction::Pivot
        };
        let this = Self {
            plan,
            marks,
            stats,
            rounds,
            reconnects,
            allocated,
            load_us,
            running: 0,
            resume_us: 0,
            ended: false,
        };
        (this, vec![first])
    }

    /// Takes an event; gives what is to be done.
    pub fn step(&mut self, now: Micros, event: CommittedEvent) -> Vec<CommittedAction> {
        if self.ended {
            return Vec::new();
        }
        match event {
            CommittedEvent::Running { resume_us } => {
                self.running = now;
                self.resume_us = resume_us;
                vec![CommittedAction::Journal(Record::Released { move_id: self.plan.move_id.clone() })]
            }
            CommittedEvent::Pivoted => {
                self.running = now;
                self.resume_us = now.saturating_sub(self.marks.committed);
                self.finish(true)
            }
            CommittedEvent::Journaled if self.running > 0 => self.finish(true),
            CommittedEvent::Journaled => Vec::new(),
            // The target may or may not have heard of it: nothing here may be removed, and nothing may run.
            CommittedEvent::LinkLost if self.running == 0 => self.finish(false),
            CommittedEvent::LinkLost => Vec::new(),
        }
    }

    fn finish(&mut self, confirmed: bool) -> Vec<CommittedAction> {
        self.ended = true;
        let mut out = Vec::new();
        if confirmed {
            out.push(CommittedAction::Retire);
        }
        out.push(CommittedAction::Finish { confirmed });
        out
    }
}
