//! Pre-copy: after each round, send another, switch over, or say that it does not converge.
//!
//! Lives here: the decision and its arithmetic. Never enters: which pages, how they travel.

use crate::{Micros, PAGE_BYTES};

/// What to do after a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Send what turned dirty, the guest running.
    Again,
    /// What is left fits into the allowed downtime.
    Switch,
    /// It will not fit; the numbers say why.
    Stalled {
        /// RAM turning dirty, bytes per second.
        dirty_rate: u64,
        /// Bytes per second the link takes.
        link_rate: u64,
        /// Downtime that a switch now would need, ms.
        needed_ms: u64,
    },
}

/// Rounds after which no further hope is taken.
pub const MAX_ROUNDS: u32 = 30;
/// Below this many dirty pages another round costs more than it saves.
const FEW_PAGES: u64 = 64;
/// Rates are trusted from this many bytes on.
const TRUSTED_BYTES: u64 = 1 << 20;
/// A round is progress if it leaves less than this share (of 100) of what the one before left.
const PROGRESS_PERCENT: u64 = 90;

/// Course of the rounds.
#[derive(Debug, Clone)]
pub struct Precopy {
    max_downtime: Micros,
    fixed_cost: Micros,
    round: u32,
    link_rate: u64,
    dirty_rate: u64,
    left_before: u64,
    idle_rounds: u32,
}

impl Precopy {
    /// `max_downtime` is the aim for the whole pause; `fixed_cost` what a pause costs without any page (state, commit, resume).
    pub fn new(max_downtime: Micros, fixed_cost: Micros) -> Self {
        Self {
            max_downtime,
            fixed_cost,
            round: 0,
            link_rate: 0,
            dirty_rate: 0,
            left_before: u64::MAX,
            idle_rounds: 0,
        }
    }

    /// Number of the current round, from 1 (0 before the first).
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Bytes per second of RAM turning dirty, as last seen.
    pub fn dirty_rate(&self) -> u64 {
        self.dirty_rate
    }

    /// Bytes per second the link took, as last seen (0 = unknown).
    pub fn link_rate(&self) -> u64 {
        self.link_rate
    }

    /// A round begins.
    pub fn begin_round(&mut self) {
        self.round += 1;
    }

    /// A round of `bytes` took `elapsed`, and `dirty_pages` are dirty now.
    pub fn after_round(&mut self, bytes: u64, elapsed: Micros, dirty_pages: u64) -> Decision {
        let per_second = |bytes: u64| (u128::from(bytes) * 1_000_000 / u128::from(elapsed.max(1))) as u64;
        if bytes >= TRUSTED_BYTES || self.link_rate == 0 {
            self.link_rate = per_second(bytes).max(1);
        }
        let left = dirty_pages * PAGE_BYTES;
        self.dirty_rate = per_second(left);
        let needed = self.fixed_cost
            + (u128::from(left) * 1_000_000 / u128::from(self.link_rate)).min(u64::MAX.into()) as u64;
        if dirty_pages <= FEW_PAGES || needed <= self.max_downtime {
            return Decision::Switch;
        }
        let progress = u128::from(left) * 100 < u128::from(self.left_before) * u128::from(PROGRESS_PERCENT);
        self.idle_rounds = if progress { 0 } else { self.idle_rounds + 1 };
        self.left_before = left.min(self.left_before);
        if self.round >= MAX_ROUNDS || self.idle_rounds >= MAX_ROUNDS / 3 {
            return Decision::Stalled {
                dirty_rate: self.dirty_rate,
                link_rate: self.link_rate,
                needed_ms: needed / 1000,
            };
        }
        Decision::Again
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs rounds for a guest dirtying `dirty` bytes/s on a link of `link` bytes/s; gives the rounds and how it ended.
    fn simulate(ram: u64, dirty: u64, link: u64, max_downtime: Micros) -> (u32, Decision) {
        let mut precopy = Precopy::new(max_downtime, 5_000);
        let mut bytes = ram;
        loop {
            precopy.begin_round();
            let elapsed = (u128::from(bytes) * 1_000_000 / u128::from(link)) as u64 + 100;
            let next = ((u128::from(dirty) * u128::from(elapsed) / 1_000_000) as u64).min(ram);
            match precopy.after_round(bytes, elapsed, next / PAGE_BYTES) {
                Decision::Again => bytes = next,
                end => return (precopy.round(), end),
            }
        }
    }

    #[test]
    fn an_idle_guest_switches_after_one_round() {
        assert_eq!(simulate(1 << 30, 0, 1 << 30, 50_000), (1, Decision::Switch));
    }

    #[test]
    fn a_guest_as_fast_as_the_link_stalls_with_numbers() {
        let (_, end) = simulate(1 << 30, 2 << 30, 1 << 30, 50_000);
        let Decision::Stalled { dirty_rate, link_rate, needed_ms } = end else { panic!("{end:?}") };
        assert!(dirty_rate >= link_rate / 2 && needed_ms > 50);
    }

    proptest! {
        /// It always ends, and a guest at half the link's speed always converges.
        #[test]
        fn ends(ram in 20u64..36, dirty in 0u64..34, link in 22u64..34, downtime in 10_000u64..1_000_000) {
            let (rounds, end) = simulate(1 << ram, 1 << dirty, 1 << link, downtime);
            prop_assert!(rounds <= MAX_ROUNDS);
            if dirty < link {
                prop_assert_eq!(end, Decision::Switch);
            }
        }
    }
}
