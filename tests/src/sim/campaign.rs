//! Many worlds, on all cores, added up.
//!
//! Lives here: what they found, and the marks that they must hit. Never enters: what a world does.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    Outcome, Run, directed,
    faults::{Fault, Kind},
    marks::Marks,
    mutations::Mutation,
    run,
    world::Violation,
};

/// A world in which a promise was broken.
#[derive(Debug)]
pub struct Found {
    /// Its seed.
    pub seed: u64,
    /// Its faults, if they are not those that the seed plans.
    pub faults: Option<Vec<Fault>>,
    /// The broken promise.
    pub violation: Violation,
}

/// What many worlds came to.
#[derive(Debug, Default)]
pub struct Tally {
    /// Worlds that were run.
    pub worlds: u64,
    /// Those that broke a promise.
    pub violations: Vec<Found>,
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
    fn add(&mut self, seed: u64, faults: Option<Vec<Fault>>, outcome: Outcome) {
        self.worlds += 1;
        self.happened += outcome.happened;
        self.committed += u64::from(outcome.committed);
        for (kind, count) in outcome.struck {
            *self.faults.entry(kind).or_default() += count;
        }
        self.marks.merge(&outcome.marks);
        self.violations.extend(outcome.violation.map(|violation| Found { seed, faults, violation }));
    }

    fn merge(&mut self, other: Self) {
        self.worlds += other.worlds;
        self.violations.extend(other.violations);
        for (kind, count) in other.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        self.marks.merge(&other.marks);
        self.happened += other.happened;
        self.committed += other.committed;
    }
}

/// Runs `count` seeds from `first` on, or fewer: `enough` looks at what there is so far, again and again.
pub fn campaign(
    first: u64,
    count: u64,
    mutation: Option<Mutation>,
    enough: impl Fn(&Tally) -> bool + Sync,
) -> Tally {
    all_of(count, |at| (first.wrapping_add(at), None), mutation, enough)
}

/// Hits the marks that the seeds of `tally` did not, in worlds directed at them, as far as that goes, and adds those.
pub fn direct(tally: &mut Tally) {
    let began = Instant::now();
    for (marks, violation) in directed::strangers() {
        tally.marks.merge(&marks);
        tally.violations.extend(violation.map(|violation| Found { seed: 0, faults: None, violation }));
    }
    let seeds = tally.marks.clone();
    let world = directed::worlds();
    let directed = all_of(
        directed::count(),
        |at| {
            let (seed, faults) = world(at);
            (seed, Some(faults))
        },
        None,
        |directed| {
            let missed = seeds.missed();
            !directed.violations.is_empty() || missed.iter().all(|mark| directed.marks.hits(*mark) > 0)
        },
    );
    let (worlds, time) = (tally.worlds, tally.time);
    tally.merge(directed);
    (tally.worlds, tally.time) = (worlds, time + began.elapsed());
}

fn all_of(
    count: u64,
    world: impl Fn(u64) -> (u64, Option<Vec<Fault>>) + Sync,
    mutation: Option<Mutation>,
    enough: impl Fn(&Tally) -> bool + Sync,
) -> Tally {
    /// Worlds that a thread runs before it adds them to the others'.
    const TOGETHER: u64 = 32;
    let began = Instant::now();
    let (next, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let total = Mutex::new(Tally::default());
    let work = || {
        while !over.load(Ordering::Relaxed) {
            let from = next.fetch_add(TOGETHER, Ordering::Relaxed);
            if from >= count {
                break;
            }
            let mut mine = Tally::default();
            for at in from..count.min(from + TOGETHER) {
                let (seed, faults) = world(at);
                let outcome = run(seed, Run { faults: faults.clone(), mutation, ..Run::default() });
                mine.add(seed, faults, outcome);
            }
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            total.merge(mine);
            over.fetch_or(enough(&total), Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let mut tally = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.violations.sort_by_key(|found| found.seed);
    tally.time = began.elapsed();
    tally
}
