//! The side a VM leaves, up to the commit.
//!
//! ```text
//! Setup -> Mirror -> PreCopy -> Switchover: Pausing -> Draining -> Saving -> FinalPages -> Proving -> Preparing -> Committing
//!   any of them -> Aborting -> Aborted                                                          Committing -> committed::Committed
//!   Setup, Mirror, PreCopy: connection lost -> Reconnecting -> Resuming -> back to where it was
//! ```
//! A datastore-only move has no memory: Mirror -> Switchover, and its target is a second image on this host.
//!
//! **A lost connection** before the pause is no failure. All connections of a move are one: when one is lost the driver ends the others
//! and makes all of them anew, under the next epoch. The target then says how much has arrived ([`crate::ledger`]); what has not is sent
//! again, and no more than that. Meanwhile the guest runs on and its mirrors keep note of what it writes. The driver answers
//! [`Action::Reconnect`] only when nothing of the old connections can post an event any more, so every event that comes after
//! [`Event::Connected`] speaks of the new ones, and those before it, in `Reconnecting`, are late and harmless. In the pause a lost
//! connection ends the move: the guest must not wait.
//! Lives here: phases, rounds, what must be true before the next step. Never enters: bytes, threads, sockets, time of day.

mod phase;
mod reconnect;
mod rounds;

use crate::{
    Micros, PAGE_BYTES,
    block::State as DiskState,
    committed::{Committed, CommittedAction},
    journal::{DiskAt, MoveId, Record},
    pages::{PageRange, PageSet},
    precopy::Precopy,
    transition,
    wire::control::{Arrived, DiskSetup, Proof, SourceMsg, TargetMsg},
};

pub use phase::{Phase, Transition, Why, transitions};

/// Pages handed to the page streams at once (8 MiB).
pub const BATCH_PAGES: u64 = 2048;
/// Batches under way at once, so that the stream never waits for a decision.
const BATCHES: u32 = 2;
/// What a pause is taken to cost without any page, before one was measured.
pub(crate) const FIXED_COST: Micros = 10_000;
/// Times that damaged pages are sent again in the pause.
const MAX_REPAIRS: u32 = 3;
/// Times that a move's connections are made anew. A link that bad is no link.
const MAX_RECONNECTS: u32 = 100;

/// What is moved, decided before the engine starts.
#[derive(Debug, Clone)]
pub struct SourcePlan {
    /// The move.
    pub move_id: MoveId,
    /// Target host; none = only the disks change their datastore.
    pub to_host: Option<String>,
    /// Generation after the commit.
    pub generation: u64,
    /// Pages of RAM that move; none = memory stays.
    pub ram_pages: Option<u64>,
    /// Disks that are copied.
    pub disks: Vec<DiskSetup>,
    /// Images of all disks after a datastore-only move.
    pub disks_after: Vec<DiskAt>,
    /// Largest pause aimed at.
    pub max_downtime: Micros,
    /// Compare the whole contents in the pause.
    pub audit: bool,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The record asked for is on disk. For `Committed` (and `Owner`) call [`Source::committed`] instead.
    Journaled,
    /// It could not be written, and is certainly not there.
    JournalFailed(String),
    /// All connections are up, for the first time or again; no event of earlier ones comes after this.
    Connected,
    /// They could not be made again in time.
    GaveUp(String),
    /// What had not arrived is taken back, and the streams go on over the new connections.
    Restored {
        /// Pages asked for and not arrived.
        lost: PageSet,
        /// Bytes put on the lost connections for batches that were never reported as sent.
        bytes: u64,
    },
    /// The target spoke, on the control connection or (acknowledging rounds) on a page stream.
    Target(TargetMsg),
    /// The mirror of copied disk `index` reached a state.
    Disk {
        /// Index in the plan.
        index: usize,
        /// Its state.
        state: DiskState,
    },
    /// Dirty pages are logged from now on; these pages were ever touched by the guest.
    LoggingStarted {
        /// Pages that may hold anything.
        resident: PageSet,
    },
    /// A batch has been sent.
    BatchSent {
        /// Bytes on the wire for it.
        bytes: u64,
        /// Pages of it that were zero.
        zero_pages: u64,
    },
    /// Pages that turned dirty since the last collection.
    Dirty(PageSet),
    /// The vCPUs stand still.
    Paused,
    /// No request of the guest is in flight on any device.
    QueuesEmpty,
    /// The devices' and vCPUs' state, encoded.
    StateSaved(Vec<u8>),
    /// This side's proof.
    Proved(Proof),
    /// A connection is gone.
    LinkLost(String),
    /// Something failed here.
    Failed(String),
    /// The user gives up the move.
    Cancel,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Append and sync; answer [`Event::Journaled`] (or [`Source::committed`]).
    Journal(Record),
    /// Connect to the target in all roles.
    Connect,
    /// The mirrors let the guest go on alone, the connections are ended, and all are made anew, for some time, under the next epoch;
    /// answer [`Event::Connected`] or [`Event::GaveUp`].
    Reconnect,
    /// Take back what has not arrived and go on with the streams from there; answer [`Event::Restored`].
    Restore(Arrived),
    /// Send on the control connection.
    Tell(SourceMsg),
    /// Put the mirrors between the guest and its disks and start copying.
    StartMirrors,
    /// Start logging dirty pages, then find out which pages were ever touched (in this order).
    StartLogging,
    /// Send these pages as they are now.
    SendPages(Vec<PageRange>),
    /// Send the round's end on all page streams.
    EndRound(u32),
    /// Collect what turned dirty.
    CollectDirty,
    /// Stop the vCPUs.
    Pause,
    /// Run queues and mirrors empty; answer [`Event::QueuesEmpty`] and, for each copied disk, its `Drained`.
    DrainDisks,
    /// Save devices, then vCPUs.
    SaveState,
    /// Make this side's proof.
    Prove,
    /// Take the mirrors out of the guest's way.
    DropMirrors,
    /// Stop logging dirty pages.
    StopLogging,
    /// Let the guest go on here.
    Resume,
    /// The move has ended without a commit; the VM is here.
    Finish {
        /// Why.
        reason: String,
        /// By the user's wish.
        cancelled: bool,
    },
}

/// Moments of the pause, for the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Marks {
    /// The pause began.
    pub pause: Micros,
    /// Queues and mirrors were empty.
    pub drained: Micros,
    /// State saved.
    pub saved: Micros,
    /// The last page was acknowledged.
    pub pages: Micros,
    /// The target was prepared.
    pub prepared: Micros,
    /// The commit record was on disk.
    pub committed: Micros,
}

/// Counters for progress and the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RamStats {
    /// Bytes on the wire for RAM.
    pub sent_bytes: u64,
    /// Pages sent as flags.
    pub zero_pages: u64,
    /// Pages of RAM the guest never touched.
    pub skipped_pages: u64,
    /// Pages of this round.
    pub round_pages: u64,
    /// Pages of this round sent.
    pub round_done: u64,
    /// Bytes and time of the first round: the stream's speed.
    pub first_round: (u64, Micros),
}

/// Where a round of memory stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    /// It is being found out which pages were ever touched.
    Logging,
    /// Batches are under way.
    Sending,
    /// The end of the round is on its way, its acknowledgement is due.
    Ending,
    /// What turned dirty is being collected.
    Collecting,
    /// The next round has to wait for connections, or for disks that have fallen behind: RAM is not sent over and over meanwhile.
    Held,
}

/// The engine of a move at its source.
#[derive(Debug)]
pub struct Source {
    plan: SourcePlan,
    phase: transition::Phased<Phase, Why>,
    precopy: Precopy,
    to_send: PageSet,
    damaged: PageSet,
    cursor: u64,
    batches: u32,
    batch_pages: std::collections::VecDeque<u64>,
    round_began: Micros,
    round_bytes: u64,
    repairs: u32,
    course: Course,
    /// The phase in which the connections were lost, when, and why.
    lost: (Phase, Micros, String),
    restoring: bool,
    reconnects: u32,
    disks: Vec<DiskState>,
    state: Vec<u8>,
    proof: Option<Proof>,
    allocated: Vec<u64>,
    load_us: u64,
    connected: bool,
    mirroring: bool,
    logging: bool,
    /// A pause was ordered, and perhaps not yet reported.
    paused: bool,
    queues_empty: bool,
    end: Option<(String, bool)>,
    marks: Marks,
    stats: RamStats,
}

impl Source {
    /// An engine for `plan`, and the first things to do.
    pub fn start(plan: SourcePlan) -> (Self, Vec<Action>) {
        let pages = plan.ram_pages.unwrap_or(0);
        let moving = Record::Moving {
            move_id: plan.move_id.clone(),
            to_host: plan.to_host.clone(),
            generation: plan.generation,
        };
        let source = Self {
            phase: transition::Phased::new(Phase::Setup),
            precopy: Precopy::new(plan.max_downtime, FIXED_COST),
            to_send: PageSet::empty(pages),
            damaged: PageSet::empty(pages),
            cursor: 0,
            batches: 0,
            batch_pages: Default::default(),
            round_began: 0,
            round_bytes: 0,
            repairs: 0,
            course: Course::Logging,
            lost: (Phase::Setup, 0, String::new()),
            restoring: false,
            reconnects: 0,
            disks: vec![DiskState::Bulk; plan.disks.len()],
            state: Vec::new(),
            proof: None,
            allocated: Vec::new(),
            load_us: 0,
            connected: false,
            mirroring: false,
            logging: false,
            paused: false,
            queues_empty: false,
            end: None,
            marks: Marks::default(),
            stats: RamStats::default(),
            plan,
        };
        (source, vec![Action::Journal(moving)])
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase.now()
    }

    /// How the phase has changed in the last step.
    pub fn went(&self) -> &[Transition] {
        self.phase.went()
    }

    /// The one place where the phase changes.
    fn go(&mut self, why: Why, to: Phase) {
        self.phase.go(why, to, transitions());
    }

    /// The plan it follows.
    pub fn plan(&self) -> &SourcePlan {
        &self.plan
    }

    /// Counters so far.
    pub fn stats(&self) -> RamStats {
        self.stats
    }

    /// The course of the rounds.
    pub fn precopy(&self) -> &Precopy {
        &self.precopy
    }

    /// Times that lost connections were made anew.
    pub fn reconnects(&self) -> u32 {
        self.reconnects
    }

    /// Takes an event; gives what is to be done.
    pub fn step(&mut self, now: Micros, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.phase.begin_step();
        if self.phase() == Phase::Aborted {
            return out;
        }
        match (self.phase(), event) {
            (Phase::Aborting, Event::Journaled) => self.aborted(Why::Journaled, &mut out),
            (Phase::Aborting, Event::JournalFailed(_)) => self.aborted(Why::NotJournaled, &mut out),
            (Phase::Aborting, _) => {}
            // The record may be on its way to the disk: only its own outcome counts now.
            (Phase::Committing, Event::JournalFailed(why)) => {
                self.abort(
                    Why::NotJournaled,
                    format!("the commit record could not be written: {why}"),
                    &mut out,
                );
            }
            (Phase::Committing, _) => {}
            (Phase::Reconnecting, Event::LinkLost(_)) => {}
            (Phase::Setup | Phase::Mirror | Phase::PreCopy | Phase::Resuming, Event::LinkLost(why))
                if self.connected && self.plan.to_host.is_some() =>
            {
                self.link_lost(now, why, &mut out);
            }
            (_, Event::LinkLost(why)) => {
                self.connected = false;
                self.abort(Why::LinkLost, format!("the connection to the target was lost: {why}"), &mut out);
            }
            (_, Event::Failed(why)) => self.abort(Why::Failed, why, &mut out),
            (Phase::Setup, Event::JournalFailed(why)) => {
                self.abort(Why::NotJournaled, format!("the journal cannot be written: {why}"), &mut out);
            }
            (_, Event::Cancel) => self.abort(Why::Cancelled, "cancelled".into(), &mut out),
            (_, Event::Target(TargetMsg::Refused { reason })) => {
                self.abort(Why::Refused, format!("the target refused: {reason}"), &mut out);
            }
            (_, Event::Disk { index, state }) => self.disk(index, state, now, &mut out),
            (Phase::Setup, Event::Journaled) => out.push(Action::Connect),
            (Phase::Setup, Event::Connected) => {
                self.connected = true;
                self.tell_setup(&mut out);
            }
            (Phase::Reconnecting, Event::GaveUp(why)) => {
                let first = std::mem::take(&mut self.lost.2);
                let reason = format!(
                    "the connection to the target was lost ({first}) and could not be made again: {why}"
                );
                self.abort(Why::GaveUp, reason, &mut out);
            }
            (Phase::Reconnecting, Event::Connected) => self.connected_again(&mut out),
            // Late words: the new connections have not been listened to yet.
            (Phase::Reconnecting, Event::Target(_)) => {}
            (Phase::Resuming, Event::Target(TargetMsg::Resumed(arrived))) if !self.restoring => {
                self.restoring = true;
                out.push(Action::Restore(arrived));
            }
            (Phase::Reconnecting | Phase::Resuming, Event::Restored { lost, bytes }) => {
                self.take_back(&lost, bytes);
                if std::mem::take(&mut self.restoring) {
                    self.go_on(now, &mut out);
                }
            }
            (Phase::Reconnecting | Phase::Resuming, Event::LoggingStarted { resident }) => {
                self.stats.skipped_pages = resident.pages() - resident.len();
                self.to_send = resident;
                self.course = Course::Held;
            }
            (Phase::Reconnecting | Phase::Resuming, Event::Dirty(dirty)) => {
                self.to_send.merge(&dirty);
                self.course = Course::Held;
            }
            // Of a batch that was under way: it counts as sent, and what of it has not arrived comes back.
            (Phase::Reconnecting | Phase::Resuming, Event::BatchSent { bytes, zero_pages }) => {
                self.count_batch(bytes, zero_pages);
            }
            (Phase::Setup, Event::Target(TargetMsg::Ready)) => {
                self.go(Why::Ready, Phase::Mirror);
                if self.plan.disks.is_empty() {
                    self.synced(now, &mut out);
                } else {
                    self.mirroring = true;
                    out.push(Action::StartMirrors);
                }
            }
            (Phase::PreCopy, Event::LoggingStarted { resident }) => {
                self.stats.skipped_pages = resident.pages() - resident.len();
                self.to_send = resident;
                self.begin_round(now, &mut out);
            }
            (Phase::PreCopy | Phase::FinalPages, Event::BatchSent { bytes, zero_pages }) => {
                self.batches = self.batches.saturating_sub(1);
                self.stats.round_done += self.batch_pages.pop_front().unwrap_or(0);
                self.count_batch(bytes, zero_pages);
                self.send(&mut out);
            }
            (Phase::PreCopy | Phase::FinalPages, Event::Target(TargetMsg::RoundAck { round, damaged })) => {
                self.round_acked(now, round, &damaged, &mut out);
            }
            (Phase::PreCopy, Event::Dirty(dirty)) => self.dirty(now, dirty, &mut out),
            (Phase::Pausing, Event::Paused) => {
                self.go(Why::Paused, Phase::Draining);
                out.push(Action::DrainDisks);
            }
            (Phase::Draining, Event::QueuesEmpty) => {
                self.queues_empty = true;
                self.drained(now, &mut out);
            }
            (Phase::Saving, Event::StateSaved(state)) => {
                self.marks.saved = now;
                self.state = state;
                self.go(Why::Saved, Phase::FinalPages);
                out.push(Action::CollectDirty);
            }
            (Phase::FinalPages, Event::Dirty(dirty)) => {
                self.to_send.merge(&dirty);
                self.begin_round(now, &mut out);
            }
            (Phase::Proving, Event::Proved(proof)) => {
                self.go(Why::Proved, Phase::Preparing);
                self.proof = Some(proof);
                out.push(Action::Tell(SourceMsg::Prepare(proof)));
            }
            (Phase::Preparing, Event::Target(TargetMsg::Prepared { proof, allocated, load_us })) => {
                self.prepared(now, proof, allocated, load_us, &mut out);
            }
            (_, Event::Target(message)) => {
                let reason = format!("the target sent {} out of turn", name_of(&message));
                self.abort(Why::Nonsense, reason, &mut out);
            }
            // Late answers of work that a later phase no longer needs.
            (
                _,
                Event::Journaled
                | Event::JournalFailed(_)
                | Event::Connected
                | Event::GaveUp(_)
                | Event::Restored { .. }
                | Event::LoggingStarted { .. }
                | Event::BatchSent { .. }
                | Event::Dirty(_)
                | Event::Paused
                | Event::QueuesEmpty
                | Event::StateSaved(_)
                | Event::Proved(_),
            ) => {}
        }
        out
    }

    /// The commit record is on disk. From here on there is no action that resumes the source.
    pub fn committed(mut self, now: Micros) -> (Committed, Vec<CommittedAction>) {
        assert_eq!(self.phase(), Phase::Committing, "only a committing source can have committed");
        self.marks.committed = now;
        Committed::begin(
            self.plan,
            self.marks,
            self.stats,
            self.precopy.round(),
            self.reconnects,
            self.allocated,
            self.load_us,
        )
    }

    fn tell_setup(&self, out: &mut Vec<Action>) {
        out.push(Action::Tell(SourceMsg::Setup {
            ram_pages: self.plan.ram_pages.unwrap_or(0),
            disks: self.plan.disks.clone(),
            audit: self.plan.audit,
        }));
    }

    fn disk(&mut self, index: usize, state: DiskState, now: Micros, out: &mut Vec<Action>) {
        let Some(slot) = self.disks.get_mut(index) else { return };
        *slot = state;
        if state == DiskState::Failed {
            let name = self.plan.disks[index].name.clone();
            self.abort(Why::Failed, format!("disk {name} cannot be copied to the target"), out);
        } else if self.phase() == Phase::Mirror && self.in_sync() {
            self.synced(now, out);
        } else if self.phase() == Phase::PreCopy && self.course == Course::Held && self.in_sync() {
            self.begin_round(now, out);
        } else if self.phase() == Phase::Draining {
            self.drained(now, out);
        }
    }

    fn in_sync(&self) -> bool {
        self.disks.iter().all(|disk| *disk == DiskState::Synced)
    }

    /// All disks are in sync: memory next, or, without any to move, the switchover.
    fn synced(&mut self, now: Micros, out: &mut Vec<Action>) {
        if self.plan.ram_pages.is_some() {
            self.go(Why::Synced, Phase::PreCopy);
            self.logging = true;
            self.course = Course::Logging;
            out.push(Action::StartLogging);
        } else {
            self.pause(now, Why::Synced, out);
        }
    }

    fn pause(&mut self, now: Micros, why: Why, out: &mut Vec<Action>) {
        self.go(why, Phase::Pausing);
        self.paused = true;
        self.marks.pause = now;
        out.push(Action::Pause);
    }

    /// Goes on once nothing of the guest is in flight and every mirror has ended.
    fn drained(&mut self, now: Micros, out: &mut Vec<Action>) {
        if !self.queues_empty || self.disks.iter().any(|disk| *disk != DiskState::Drained) {
            return;
        }
        self.marks.drained = now;
        if self.plan.ram_pages.is_some() {
            self.go(Why::Drained, Phase::Saving);
            out.push(Action::SaveState);
        } else {
            self.marks.saved = now;
            self.marks.pages = now;
            self.go(Why::Drained, Phase::Proving);
            out.push(Action::Prove);
        }
    }

    fn prepared(
        &mut self,
        now: Micros,
        proof: Proof,
        allocated: Vec<u64>,
        load_us: u64,
        out: &mut Vec<Action>,
    ) {
        if Some(proof) != self.proof {
            let reason = "the target's digest or counters differ from the source's".to_string();
            return self.abort(Why::Differs, reason, out);
        }
        self.marks.prepared = now;
        self.allocated = allocated;
        self.load_us = load_us;
        self.go(Why::Prepared, Phase::Committing);
        out.push(Action::Journal(if self.plan.to_host.is_some() {
            Record::Committed { move_id: self.plan.move_id.clone() }
        } else {
            Record::Owner { generation: self.plan.generation, disks: self.plan.disks_after.clone() }
        }));
    }

    fn abort(&mut self, why: Why, reason: String, out: &mut Vec<Action>) {
        if self.connected {
            out.push(Action::Tell(SourceMsg::Abort { reason: reason.clone() }));
        }
        self.end = Some((reason, why == Why::Cancelled));
        self.go(why, Phase::Aborting);
        // Refused where `Moving` is not on disk; that ends it as well.
        out.push(Action::Journal(Record::Aborted { move_id: self.plan.move_id.clone() }));
    }

    fn aborted(&mut self, why: Why, out: &mut Vec<Action>) {
        self.go(why, Phase::Aborted);
        if self.mirroring {
            out.push(Action::DropMirrors);
        }
        if self.logging {
            out.push(Action::StopLogging);
        }
        if self.paused {
            out.push(Action::Resume);
        }
        let (reason, cancelled) = self.end.take().unwrap_or_default();
        out.push(Action::Finish { reason, cancelled });
    }

    /// Bytes of RAM of the current round that are still to be sent.
    pub fn ram_left(&self) -> u64 {
        (self.stats.round_pages - self.stats.round_done.min(self.stats.round_pages)) * PAGE_BYTES
    }

    /// Marks of the pause so far.
    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// The proof this side made, once it did.
    pub fn proof(&self) -> Option<Proof> {
        self.proof
    }
}

fn name_of(message: &TargetMsg) -> &'static str {
    match message {
        TargetMsg::Ready => "Ready",
        TargetMsg::RoundAck { .. } => "RoundAck",
        TargetMsg::Prepared { .. } => "Prepared",
        TargetMsg::Refused { .. } => "Refused",
        TargetMsg::Running { .. } => "Running",
        TargetMsg::Resumed(_) => "Resumed",
        TargetMsg::PagesAck { .. } => "PagesAck",
    }
}
