//! Many seeds, on all cores, added up.
//!
//! Lives here: what a run of seeds found, and the marks it must have hit. Never enters: what a seed does.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{Run, faults::Kind, marks::Marks, mutations::Mutation, run, world::Violation};

/// What many seeds came to.
#[derive(Debug, Default)]
pub struct Tally {
    /// Seeds that were run.
    pub seeds: u64,
    /// Those that broke a promise.
    pub violations: Vec<(u64, Violation)>,
    /// How long it took.
    pub time: Duration,
    /// Faults that struck, by kind.
    pub faults: BTreeMap<Kind, u64>,
    /// What was hit.
    pub marks: Marks,
    /// Happenings in all worlds.
    pub happened: u64,
    /// Moves that were committed.
    pub committed: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.violations.extend(other.violations);
        for (kind, count) in other.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        self.marks.merge(&other.marks);
        self.happened += other.happened;
        self.committed += other.committed;
    }
}

/// Runs `count` seeds from `first` on, on all cores; stops early once `enough` of them have broken a promise.
pub fn campaign(first: u64, count: u64, mutation: Option<Mutation>, enough: usize) -> Tally {
    let began = Instant::now();
    let (next, found) = (AtomicU64::new(0), AtomicU64::new(0));
    let total = Mutex::new(Tally::default());
    let work = || {
        let mut mine = Tally::default();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count || found.load(Ordering::Relaxed) >= enough as u64 {
                break;
            }
            let seed = first.wrapping_add(at);
            let outcome = run(seed, Run { mutation, ..Run::default() });
            mine.seeds += 1;
            mine.happened += outcome.happened;
            mine.committed += u64::from(outcome.committed);
            for (kind, count) in outcome.struck {
                *mine.faults.entry(kind).or_default() += count;
            }
            mine.marks.merge(&outcome.marks);
            if let Some(violation) = outcome.violation {
                found.fetch_add(1, Ordering::Relaxed);
                mine.violations.push((seed, violation));
            }
        }
        total.lock().unwrap_or_else(PoisonError::into_inner).add(mine);
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let mut tally = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.violations.sort_by_key(|(seed, _)| *seed);
    tally.time = began.elapsed();
    tally
}
