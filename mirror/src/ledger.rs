//! What went over the data connections of a move, so that it can go on after they were lost.
//!
//! A source does not know how much of what it sent has arrived when a connection ends; its target does. Both sides count: a page
//! stream in frames, a block stream in operations, both from 1 for the whole move. The source keeps, for what is not acknowledged yet,
//! what it was. On new connections the target says how far it got, and the source takes back all that lies behind: its counters and
//! chains go on from exactly there, its pages and blocks are sent again. A target that names a point that cannot be is refused.
//! Lives here: that bookkeeping. Never enters: sending, which page or block comes next.

use std::collections::VecDeque;

use crate::{
    digest::BlockChain,
    pages::{PageRange, PageSet},
    wire::pages::PagesHead,
};

/// The target named a point that its source never reached or has left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the target says that {named} {what} have arrived, of {least} it acknowledged and {most} that were sent"
)]
pub struct Impossible {
    /// Frames or operations.
    pub what: &'static str,
    /// What it named.
    pub named: u64,
    /// The least it can have.
    pub least: u64,
    /// The most it can have.
    pub most: u64,
}

/// Pages sent or arrived.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages with data.
    pub data: u64,
    /// Pages as flags.
    pub zero: u64,
}

impl PageCounts {
    /// Adds what a frame holds.
    pub fn add(&mut self, head: &PagesHead) {
        self.data += head.sums.len() as u64;
        self.zero += head.runs.iter().filter(|run| run.zero).map(|run| run.range.count).sum::<u64>();
    }
}

/// A frame that has been sent and not been acknowledged.
#[derive(Debug)]
struct Frame {
    pages: Vec<PageRange>,
    /// Counters up to and with it.
    counts: PageCounts,
}

/// The source's side of a page stream.
#[derive(Debug)]
pub struct PagesLedger {
    /// Pages that were asked for and are in no frame yet.
    queued: PageSet,
    pending: VecDeque<Frame>,
    acked: u64,
    /// Counters up to the last acknowledged frame.
    settled: PageCounts,
}

impl PagesLedger {
    /// For a RAM of `pages` pages of which none has been sent.
    pub fn new(pages: u64) -> Self {
        Self {
            queued: PageSet::empty(pages),
            pending: VecDeque::new(),
            acked: 0,
            settled: PageCounts::default(),
        }
    }

    /// These pages are going to be sent.
    pub fn queue(&mut self, ranges: &[PageRange]) {
        for range in ranges {
            self.queued.insert(*range);
        }
    }

    /// A frame is about to be sent: from here on it may arrive.
    pub fn sent(&mut self, head: &PagesHead) {
        let pages: Vec<PageRange> = head.runs.iter().map(|run| run.range).collect();
        for range in &pages {
            self.queued.remove(*range);
        }
        let mut counts = self.counts();
        counts.add(head);
        self.pending.push_back(Frame { pages, counts });
    }

    /// The target has this many frames.
    pub fn acked(&mut self, frames: u64) -> Result<(), Impossible> {
        self.check(frames)?;
        for _ in self.acked..frames {
            if let Some(frame) = self.pending.pop_front() {
                self.settled = frame.counts;
            }
        }
        self.acked = frames;
        Ok(())
    }

    /// Frames that are not acknowledged.
    pub fn unacked(&self) -> usize {
        self.pending.len()
    }

    /// Pages in all frames sent.
    pub fn counts(&self) -> PageCounts {
        self.pending.back().map_or(self.settled, |frame| frame.counts)
    }

    /// The connection is gone and the target has `frames` frames: gives all pages that are not in them. They are no longer queued.
    pub fn roll_back(&mut self, frames: u64) -> Result<PageSet, Impossible> {
        self.acked(frames)?;
        let empty = PageSet::empty(self.queued.pages());
        let mut lost = std::mem::replace(&mut self.queued, empty);
        for range in self.pending.drain(..).flat_map(|frame| frame.pages) {
            lost.insert(range);
        }
        Ok(lost)
    }

    fn check(&self, named: u64) -> Result<(), Impossible> {
        let (least, most) = (self.acked, self.acked + self.pending.len() as u64);
        if (least..=most).contains(&named) {
            Ok(())
        } else {
            Err(Impossible { what: "page frames", named, least, most })
        }
    }
}

/// What went over a block stream, as one side saw it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlocksProof {
    /// BLAKE3 chain over all operations.
    pub digest: [u8; 32],
    /// Operations.
    pub ops: u64,
    /// Bytes of data.
    pub bytes: u64,
}

/// The chain and the counters behind a [`BlocksProof`].
#[derive(Debug, Clone, Default)]
pub struct BlocksTally {
    chain: BlockChain,
    ops: u64,
    bytes: u64,
}

impl BlocksTally {
    /// Counts an operation; `frame` is its encoded head, `bytes` its data.
    pub fn add(&mut self, frame: &[u8], bytes: u64) {
        self.chain.add(frame);
        self.ops += 1;
        self.bytes += bytes;
    }

    /// Operations so far: also the number of the last one.
    pub fn ops(&self) -> u64 {
        self.ops
    }

    /// The proof so far.
    pub fn proof(&self) -> BlocksProof {
        BlocksProof { digest: self.chain.digest(), ops: self.ops, bytes: self.bytes }
    }
}

/// The source's side of a block stream.
///
/// Operations are acknowledged in any order but arrive in that of their numbers: with an acknowledged one all before it have arrived.
#[derive(Debug, Default)]
pub struct BlocksLedger {
    /// Everything up to the highest operation that was acknowledged.
    settled: BlocksTally,
    /// Head and data bytes of those behind it.
    pending: VecDeque<(Vec<u8>, u64)>,
}

impl BlocksLedger {
    /// The next operation is about to be sent: from here on it may arrive.
    pub fn sent(&mut self, frame: &[u8], bytes: u64) {
        self.pending.push_back((frame.to_vec(), bytes));
    }

    /// Operation `seq` was acknowledged.
    pub fn acked(&mut self, seq: u64) -> Result<(), Impossible> {
        if seq <= self.settled.ops {
            return Ok(());
        }
        self.check(seq)?;
        while self.settled.ops < seq {
            let Some((frame, bytes)) = self.pending.pop_front() else { break };
            self.settled.add(&frame, bytes);
        }
        Ok(())
    }

    /// Operations behind the highest one that was acknowledged.
    pub fn unacked(&self) -> usize {
        self.pending.len()
    }

    /// The connection is gone and the target has `ops` operations: those behind were never sent.
    pub fn roll_back(&mut self, ops: u64) -> Result<(), Impossible> {
        self.check(ops)?;
        self.acked(ops)?;
        self.pending.clear();
        Ok(())
    }

    /// The proof over everything sent.
    pub fn proof(&self) -> BlocksProof {
        let mut tally = self.settled.clone();
        for (frame, bytes) in &self.pending {
            tally.add(frame, *bytes);
        }
        tally.proof()
    }

    fn check(&self, named: u64) -> Result<(), Impossible> {
        let (least, most) = (self.settled.ops, self.settled.ops + self.pending.len() as u64);
        if (least..=most).contains(&named) {
            Ok(())
        } else {
            Err(Impossible { what: "block operations", named, least, most })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 300;

    fn pages_of(set: &PageSet) -> BTreeSet<u64> {
        (0..PAGES).filter(|page| set.contains(*page)).collect()
    }

    fn frame(first: u64, count: u64) -> PagesHead {
        let mut head = PagesHead::default();
        for page in first..first + count {
            head.push(page, (page % 3 > 0).then_some(page));
        }
        head
    }

    proptest! {
        /// Whatever was sent, acknowledged and lost: what arrived and what comes back are together all that was asked for, and both
        /// sides count the same.
        #[test]
        fn nothing_is_lost_or_counted_twice(cuts in proptest::collection::vec((1u64..9, 0u64..9, 0u64..9, 0u64..40), 0..8)) {
            let mut ledger = PagesLedger::new(PAGES);
            let (mut arrived, mut there, mut frames) = (BTreeSet::new(), PageCounts::default(), 0);
            let mut to_send: BTreeSet<u64> = (0..PAGES).collect();
            for (sent, got, acked, unsent) in cuts {
                let batch: Vec<u64> = to_send.iter().copied().take((sent * 10 + unsent) as usize).collect();
                for page in &batch {
                    ledger.queue(&[PageRange { first: *page, count: 1 }]);
                    to_send.remove(page);
                }
                let heads: Vec<PagesHead> =
                    batch.iter().take(sent as usize * 10).map(|page| frame(*page, 1)).collect();
                for head in &heads {
                    ledger.sent(head);
                }
                for head in heads.iter().take(got as usize) {
                    there.add(head);
                    frames += 1;
                    arrived.insert(head.runs[0].range.first);
                }
                let reached = frames - got.min(heads.len() as u64) + acked.min(got).min(heads.len() as u64);
                ledger.acked(reached).unwrap();
                let lost = pages_of(&ledger.roll_back(frames).unwrap());
                prop_assert!(lost.is_disjoint(&arrived));
                to_send.extend(&lost);
                prop_assert_eq!(ledger.counts(), there);
                prop_assert_eq!(to_send.len() + arrived.len(), PAGES as usize);
            }
        }

        #[test]
        fn chains_go_on_from_where_the_target_is(cuts in proptest::collection::vec((0u64..9, 0u64..9, 0u64..9), 0..8)) {
            let (mut ledger, mut there) = (BlocksLedger::default(), BlocksTally::default());
            let mut fresh = 0u64;
            for (sent, got, acked) in cuts {
                let (before, got) = (there.ops(), got.min(sent));
                for n in 0..sent {
                    fresh += 1;
                    let head = fresh.to_le_bytes();
                    ledger.sent(&head, n);
                    if n < got {
                        there.add(&head, n);
                    }
                }
                ledger.acked(before + acked.min(got)).unwrap();
                ledger.roll_back(there.ops()).unwrap();
                prop_assert_eq!(ledger.proof(), there.proof());
            }
        }
    }

    #[test]
    fn impossible_points_are_refused() {
        let mut pages = PagesLedger::new(PAGES);
        for n in 0..5 {
            pages.sent(&frame(n * 10, 10));
        }
        pages.acked(2).unwrap();
        for named in [0, 1, 6, u64::MAX] {
            assert_eq!(pages.roll_back(named).unwrap_err().named, named);
            assert!(pages.acked(named).is_err());
        }
        assert_eq!(pages.roll_back(3).unwrap().len(), 20);

        let mut blocks = BlocksLedger::default();
        for n in 0..5u8 {
            blocks.sent(&[n], 0);
        }
        blocks.acked(2).unwrap();
        // Acknowledged late, but in order all the same.
        blocks.acked(1).unwrap();
        assert!(blocks.acked(6).is_err());
        for named in [0, 1, 6, u64::MAX] {
            assert_eq!(blocks.roll_back(named).unwrap_err().named, named);
        }
        blocks.roll_back(4).unwrap();
        assert_eq!(blocks.proof().ops, 4);
    }
}
