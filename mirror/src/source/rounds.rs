//! Rounds of memory: what is sent, acknowledged, collected, and what is decided then.
//!
//! Lives here: batches and rounds. Never enters: how pages are sent.

use super::{Action, BATCH_PAGES, BATCHES, Course, MAX_REPAIRS, Phase, Source, Why};
use crate::{
    Micros,
    pages::{PageRange, PageSet},
    precopy::Decision,
    wire::control::SourceMsg,
};

impl Source {
    pub(super) fn count_batch(&mut self, bytes: u64, zero_pages: u64) {
        self.stats.sent_bytes += bytes;
        self.stats.zero_pages += zero_pages;
        self.round_bytes += bytes;
    }

    pub(super) fn begin_round(&mut self, now: Micros, out: &mut Vec<Action>) {
        self.precopy.begin_round();
        self.course = Course::Sending;
        self.round_began = now;
        self.round_bytes = 0;
        self.stats.round_pages = self.to_send.len();
        self.stats.round_done = 0;
        self.send(out);
    }

    pub(super) fn send(&mut self, out: &mut Vec<Action>) {
        while self.batches < BATCHES && !self.to_send.is_empty() {
            let (ranges, next) = self.to_send.take(self.cursor, BATCH_PAGES);
            self.cursor = next;
            self.batches += 1;
            self.batch_pages.push_back(ranges.iter().map(|r| r.count).sum());
            out.push(Action::SendPages(ranges));
        }
        if self.batches == 0 && self.to_send.is_empty() {
            self.course = Course::Ending;
            out.push(Action::EndRound(self.precopy.round()));
        }
    }

    pub(super) fn round_acked(
        &mut self,
        now: Micros,
        round: u32,
        damaged: &[PageRange],
        out: &mut Vec<Action>,
    ) {
        // A second answer to one round would collect, and so forget, what turned dirty meanwhile.
        if round != self.precopy.round() || self.course != Course::Ending {
            let reason = format!("the target acknowledged round {round} out of turn");
            return self.abort(Why::Nonsense, reason, out);
        }
        if round == 1 {
            self.stats.first_round = (self.round_bytes, now.saturating_sub(self.round_began));
        }
        let pages = self.to_send.pages();
        let inside = |r: &PageRange| r.first.checked_add(r.count).is_some_and(|end| end <= pages);
        let total = damaged.iter().fold(0u64, |sum, range| sum.saturating_add(range.count));
        if total > pages || !damaged.iter().all(inside) {
            let reason = "the target names damaged pages that do not exist".into();
            return self.abort(Why::Nonsense, reason, out);
        }
        for range in damaged {
            self.damaged.insert(*range);
        }
        self.course = Course::Collecting;
        if self.phase() == Phase::PreCopy {
            out.push(Action::CollectDirty);
        } else if self.damaged.is_empty() {
            self.marks.pages = now;
            self.go(Why::Arrived, Phase::Proving);
            out.push(Action::Tell(SourceMsg::State(std::mem::take(&mut self.state))));
            out.push(Action::Prove);
        } else if self.repairs < MAX_REPAIRS {
            // The guest stands still, so this is damage on the way, not a page that changed.
            self.repairs += 1;
            self.to_send = std::mem::replace(&mut self.damaged, PageSet::empty(self.to_send.pages()));
            self.begin_round(now, out);
        } else {
            let first = damaged.first().map_or(0, |r| r.first);
            self.abort(Why::Damaged, format!("page {first} of RAM arrives damaged again and again"), out);
        }
    }

    pub(super) fn dirty(&mut self, now: Micros, mut dirty: PageSet, out: &mut Vec<Action>) {
        dirty.merge(&self.damaged);
        self.damaged = PageSet::empty(dirty.pages());
        let elapsed = now.saturating_sub(self.round_began);
        let decision = self.precopy.after_round(self.round_bytes, elapsed, dirty.len());
        self.to_send.merge(&dirty);
        match decision {
            Decision::Again | Decision::Switch if !self.in_sync() => self.course = Course::Held,
            Decision::Switch => self.pause(now, Why::FewLeft, out),
            Decision::Again => self.begin_round(now, out),
            Decision::Stalled { dirty_rate, link_rate, needed_ms } => self.abort(
                Why::Stalled,
                format!(
                    "memory does not converge: it turns dirty at {} MiB/s, the link takes {} MiB/s, and a switch would need \
                     {needed_ms} ms of downtime; raise --max-downtime or --bandwidth, or quieten the guest",
                    dirty_rate >> 20,
                    link_rate >> 20,
                ),
                out,
            ),
        }
    }
}
