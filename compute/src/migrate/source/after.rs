//! The source's driver after the commit: it helps the target, retires its images, reports and ends.
//!
//! Lives here: carrying out the actions of `vmove_mirror::committed`. Never enters: a way back.

use std::{
    sync::{Arc, PoisonError, atomic::Ordering, mpsc::Receiver},
    time::{Duration, Instant},
};

use vmove_mirror::{
    committed::{Committed, CommittedAction, CommittedEvent},
    source::Event,
    wire::control::TargetMsg,
};
use vmove_storage::OwnerState;

use super::{
    super::{MoveError, blocks_out::BlocksOut, images, report, stop_points},
    Driver, GLANCE, Parts, Peer, SourceEnd,
};
use crate::process::protocol::DiskPlacement;

/// How long the target may take to say that it runs before it is left to the agents to find out.
const RUNNING: Duration = Duration::from_secs(30);

impl Driver {
    /// After the commit.
    pub(super) fn finish(
        &mut self,
        mut committed: Committed,
        mut actions: Vec<CommittedAction>,
        inbox: &Receiver<Event>,
    ) -> SourceEnd {
        self.task.board.update(|p| p.phase = "committed".into());
        let mut retire = false;
        let patience = Instant::now() + RUNNING;
        loop {
            for action in std::mem::take(&mut actions) {
                stop_points::reach(&format!("source.{}", committed_name(&action)));
                match action {
                    CommittedAction::Tell(message) => {
                        self.tell(&message);
                        self.leave_networks();
                    }
                    CommittedAction::Pivot => {
                        self.mirrors.iter().for_each(BlocksOut::detach);
                        let Peer::Local(target) = &self.peer else { continue };
                        let pivoted = target.pivot().and_then(|()| {
                            self.task.machine.resume().map_err(|e| MoveError::Machine(e.to_string()))
                        });
                        if let Err(error) = pivoted {
                            return SourceEnd::Fenced(format!("the new images cannot be used: {error}"));
                        }
                        actions.extend(committed.step(self.now(), CommittedEvent::Pivoted));
                    }
                    CommittedAction::Journal(record) => {
                        let appended =
                            self.task.journal.lock().unwrap_or_else(PoisonError::into_inner).append(&record);
                        if let Err(error) = appended {
                            tracing::warn!(%error, "the end of the move is not journalled");
                        }
                        actions.extend(committed.step(self.now(), CommittedEvent::Journaled));
                    }
                    CommittedAction::Retire => retire = true,
                    CommittedAction::Finish { confirmed } => {
                        return self.end(&committed, confirmed, retire);
                    }
                }
            }
            if !actions.is_empty() {
                continue;
            }
            let event = match inbox.recv_timeout(GLANCE) {
                Ok(Event::Target(TargetMsg::Running { resume_us })) => CommittedEvent::Running { resume_us },
                // The data connections may end before the control connection has brought the last word.
                Ok(Event::LinkLost(_)) if self.control_lost.load(Ordering::SeqCst) => {
                    CommittedEvent::LinkLost
                }
                // It has stopped answering: the agents find out what became of it.
                _ if Instant::now() >= patience => CommittedEvent::LinkLost,
                _ => continue,
            };
            actions = committed.step(self.now(), event);
        }
    }

    /// The guest is another host's now, and so are its MAC addresses. Only once that host has been told: letting go of a tap
    /// takes the kernel a while, and the guest stands still. A move of disks alone tells nobody and keeps its networks.
    fn leave_networks(&self) {
        if let Err(error) = self.task.machine.leave_networks() {
            tracing::warn!(%error, "a network is let go only with this process");
        }
    }

    fn end(&mut self, committed: &Committed, confirmed: bool, retire: bool) -> SourceEnd {
        let report = report::committed(
            &self.task.vm,
            &self.task.order,
            self.now(),
            committed,
            &self.stats(),
            self.digest,
            confirmed,
        );
        self.mirrors = Arc::new(Vec::new());
        self.pages = None;
        let warning = report.reason.clone();
        let end = match &self.peer {
            Peer::Local(_) => {
                if retire {
                    let copied = |d: &&DiskPlacement| self.task.order.copies.iter().any(|c| c.name == d.name);
                    self.task.disks.iter().filter(copied).for_each(|old| self.task.retire(old));
                }
                SourceEnd::Pivoted { disks: self.disks_after(), generation: self.task.generation + 1 }
            }
            _ => {
                if retire {
                    self.task.disks.iter().for_each(|old| self.task.retire(old));
                }
                SourceEnd::Moved { host: self.task.order.to.host.clone(), confirmed }
            }
        };
        self.task.board.finish(report, warning);
        end
    }
}

impl Parts {
    /// An image that is no longer the VM's: removed, or kept and stamped so that nobody starts it.
    fn retire(&self, old: &DiskPlacement) {
        if !self.order.keep_source {
            images::remove(&old.path);
            return;
        }
        if let Err(error) = images::stamp(&old.path, &self.vm.name, self.generation, OwnerState::Stale) {
            tracing::warn!(%error, "an image that was left is not stamped");
        }
    }
}

fn committed_name(action: &CommittedAction) -> &'static str {
    match action {
        CommittedAction::Tell(_) => "tell-commit",
        CommittedAction::Pivot => "pivot",
        CommittedAction::Journal(_) => "journal-released",
        CommittedAction::Retire => "retire",
        CommittedAction::Finish { .. } => "finish-committed",
    }
}
