//! Tables of changes of phase, and a phase that changes by its table only.
//!
//! Lives here: the shape of a table. Never enters: a table (see `source::transitions`, `target::transitions`).

use std::fmt::Debug;

/// From, why, to.
pub type Transition<P, W> = (P, W, P);
/// A row of a table: from each of these, for one reason, to one phase.
pub type Row<P, W> = (&'static [P], W, P);

/// Every change that a table has.
pub(crate) fn all<P: Copy, W: Copy>(table: &'static [Row<P, W>]) -> impl Iterator<Item = Transition<P, W>> {
    table.iter().flat_map(|(from, why, to)| from.iter().map(|from| (*from, *why, *to)))
}

/// A phase, and how it changed in the last step.
#[derive(Debug)]
pub(crate) struct Phased<P, W> {
    now: P,
    went: Vec<Transition<P, W>>,
}

impl<P: Copy + PartialEq + Debug, W: Copy + PartialEq + Debug> Phased<P, W> {
    pub(crate) fn new(now: P) -> Self {
        Self { now, went: Vec::new() }
    }

    pub(crate) fn now(&self) -> P {
        self.now
    }

    /// Changes since [`Phased::begin_step`].
    pub(crate) fn went(&self) -> &[Transition<P, W>] {
        &self.went
    }

    pub(crate) fn begin_step(&mut self) {
        self.went.clear();
    }

    /// Changes the phase. One that is not in the table is a bug of the engine.
    pub(crate) fn go(&mut self, why: W, to: P, mut table: impl Iterator<Item = Transition<P, W>>) {
        let change = (self.now, why, to);
        debug_assert!(table.any(|legal| legal == change), "not in the table: {change:?}");
        self.went.push(change);
        self.now = to;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{source, target};

    #[test]
    fn no_row_is_there_twice() {
        assert_eq!(source::transitions().collect::<BTreeSet<_>>().len(), source::transitions().count());
        assert_eq!(target::transitions().collect::<BTreeSet<_>>().len(), target::transitions().count());
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "not in the table")]
    fn a_change_that_is_not_in_the_table_is_a_bug() {
        let mut phase = Phased::new(source::Phase::Committing);
        phase.go(source::Why::Cancelled, source::Phase::Aborting, source::transitions());
    }

    /// The commit has no way back but the failure of its record; what is over stays over.
    #[test]
    fn ends_are_ends() {
        let from_commit: Vec<_> =
            source::transitions().filter(|(from, ..)| *from == source::Phase::Committing).collect();
        assert_eq!(
            from_commit,
            [(source::Phase::Committing, source::Why::NotJournaled, source::Phase::Aborting)]
        );
        assert!(source::transitions().all(|(from, ..)| from != source::Phase::Aborted));
        let ends = [target::Phase::Running, target::Phase::Discarded];
        assert!(target::transitions().all(|(from, ..)| !ends.contains(&from)));
        // Nobody runs without the source's word, or the operator's, on disk.
        let to_running = target::transitions().filter(|(.., to)| *to == target::Phase::Running);
        assert!(to_running.map(|(from, ..)| from).eq([target::Phase::Owning]));
        let mut to_owning = target::transitions().filter(|(.., to)| *to == target::Phase::Owning);
        assert!(to_owning.all(|(_, why, _)| matches!(why, target::Why::Committed | target::Why::TakenOver)));
    }
}
