//! What was seen to happen: rows of the engines' tables of transitions, rows of the failure table.
//!
//! Lives here: which marks there are, which were hit. Never enters: the tables themselves (`vmove_mirror` has them).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use vmove_mirror::{
    recovery::{self, Row},
    source, target,
};

/// What may be seen to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mark {
    /// A transition of a source, up to its commit.
    Source(source::Transition),
    /// The commit.
    Committed,
    /// What a source did something about after its commit.
    After(&'static str),
    /// A transition of a target.
    Target(target::Transition),
    /// A row of the failure table was carried out by an agent.
    Settled(Row),
}

/// What a source does something about after its commit.
const AFTER: [&str; 4] = ["Running", "Pivoted", "LinkLost", "Journaled"];

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source((from, why, to)) => write!(f, "source {from:?} -{why:?}-> {to:?}"),
            Self::Committed => write!(f, "source Committing -Journaled-> committed"),
            Self::After(kind) => write!(f, "committed source -{kind}->"),
            Self::Target((from, why, to)) => write!(f, "target {from:?} -{why:?}-> {to:?}"),
            Self::Settled(Row { here, heard }) => write!(f, "settled {here:?}, heard {heard:?}"),
        }
    }
}

/// All marks there are.
pub fn all() -> BTreeSet<Mark> {
    let mut all: BTreeSet<Mark> = source::transitions().map(Mark::Source).collect();
    all.insert(Mark::Committed);
    all.extend(AFTER.map(Mark::After));
    all.extend(target::transitions().map(Mark::Target));
    all.extend(recovery::rows().map(Mark::Settled));
    all
}

/// Marks that were hit, and how often.
#[derive(Debug, Default, Clone)]
pub struct Marks(BTreeMap<Mark, u64>);

impl Marks {
    /// Something was seen to happen.
    pub fn hit(&mut self, mark: Mark) {
        *self.0.entry(mark).or_default() += 1;
    }

    /// Adds those of another world.
    pub fn merge(&mut self, others: &Self) {
        for (mark, hits) in &others.0 {
            *self.0.entry(*mark).or_default() += hits;
        }
    }

    /// How often a mark was hit.
    pub fn hits(&self, mark: Mark) -> u64 {
        self.0.get(&mark).copied().unwrap_or(0)
    }

    /// Marks that were not hit.
    pub fn missed(&self) -> Vec<Mark> {
        all().into_iter().filter(|mark| self.hits(*mark) == 0).collect()
    }

    /// What happened and is no mark: in no table, so nobody said that it may.
    pub fn unlisted(&self) -> Vec<Mark> {
        let all = all();
        self.0.keys().copied().filter(|mark| !all.contains(mark)).collect()
    }
}
