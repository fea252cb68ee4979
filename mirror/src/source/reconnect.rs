//! What a source does about lost connections before the pause.
//!
//! Lives here: losing them, going on over new ones. Never enters: who makes them.

use super::{Action, Course, MAX_RECONNECTS, Phase, Source, Why};
use crate::{
    Micros,
    pages::PageSet,
    wire::control::{Arrived, SourceMsg},
};

impl Source {
    pub(super) fn link_lost(&mut self, now: Micros, why: String, out: &mut Vec<Action>) {
        self.connected = false;
        let before = self.phase();
        self.go(Why::LinkLost, Phase::Reconnecting);
        if self.reconnects >= MAX_RECONNECTS {
            let reason = format!(
                "the connection to the target was lost once more after {} times: {why}",
                self.reconnects
            );
            return self.abort(Why::LinkTooBad, reason, out);
        }
        if before != Phase::Resuming {
            self.lost = (before, now, why);
        }
        self.restoring = false;
        self.batches = 0;
        self.batch_pages.clear();
        if self.course == Course::Ending {
            // The acknowledgement may be lost as well: the round's end is sent, and answered, again.
            self.course = Course::Sending;
        }
        out.push(Action::Reconnect);
    }

    pub(super) fn connected_again(&mut self, out: &mut Vec<Action>) {
        self.connected = true;
        self.reconnects += 1;
        if self.lost.0 == Phase::Setup {
            // The target has not said, or not been heard to say, that it is ready: nothing was sent yet.
            self.go(Why::Connected, Phase::Setup);
            out.push(Action::Restore(Arrived::default()));
            self.tell_setup(out);
        } else {
            self.go(Why::Connected, Phase::Resuming);
            out.push(Action::Tell(SourceMsg::Resume));
        }
    }

    pub(super) fn take_back(&mut self, lost: &PageSet, bytes: u64) {
        self.stats.sent_bytes += bytes;
        self.round_bytes += bytes;
        if self.plan.ram_pages.is_some() {
            self.to_send.merge(lost);
        }
    }

    /// Goes on in the phase in which the connections were lost.
    pub(super) fn go_on(&mut self, now: Micros, out: &mut Vec<Action>) {
        let (phase, since, _) = self.lost;
        self.go(Why::Restored, phase);
        if phase == Phase::Mirror {
            // Mirrors that had nothing to do may have said so already.
            if self.in_sync() {
                self.synced(now, out);
            }
            return;
        }
        match self.course {
            Course::Sending => {
                // The time without a connection says nothing about the speed of the stream.
                self.round_began += now.saturating_sub(since);
                self.stats.round_done = self.stats.round_pages.saturating_sub(self.to_send.len());
                self.send(out);
            }
            Course::Held if self.in_sync() => self.begin_round(now, out),
            Course::Held | Course::Logging | Course::Ending | Course::Collecting => {}
        }
    }
}
