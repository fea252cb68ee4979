//! What an agent does with a VM whose process has ended, from its journal and the other side's answer: one total function.
//!
//! Lives here: the failure table. Never enters: asking, starting, deleting.

use crate::journal::{Standing, Verdict};

/// What the other side said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerAnswer {
    /// Its word on the move.
    Said(Verdict),
    /// It could not be asked, or was not.
    Unreachable,
}

/// What is to be done here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settlement {
    /// The VM is stopped here and may be started from its disks.
    Startable,
    /// Append `Aborted` for the move first; then the VM is stopped here and may be started from its disks.
    AbortThenStartable,
    /// Append `Owner` at the move's generation, then boot from the disks: they hold all that was flushed.
    OwnThenBoot,
    /// Append `Aborted`, then remove the images and all that is known of the VM here.
    AbortThenDiscard,
    /// Remove the images and all that is known of the VM here.
    Discard,
    /// The VM is elsewhere: never start it, answer "committed".
    Fenced,
    /// Ask the other side (again); run nothing meanwhile.
    Ask,
}

/// The failure table, for a VM whose process is not there.
///
/// A source never asks: its own journal decides. A target asks once `Prepared` is on its disk; before that it cannot have been
/// committed, since the source commits only after it was told of `Prepared`.
pub fn settle(standing: &Standing, answer: PeerAnswer) -> Settlement {
    match (standing, answer) {
        (Standing::Owner { .. }, _) => Settlement::Startable,
        (Standing::Moving { .. }, _) => Settlement::AbortThenStartable,
        (Standing::Incoming { prepared: false, .. }, _) => Settlement::AbortThenDiscard,
        (Standing::Incoming { prepared: true, .. }, PeerAnswer::Said(Verdict::Committed)) => {
            Settlement::OwnThenBoot
        }
        (Standing::Incoming { prepared: true, .. }, PeerAnswer::Said(Verdict::Aborted)) => {
            Settlement::AbortThenDiscard
        }
        (
            Standing::Incoming { prepared: true, .. },
            PeerAnswer::Said(Verdict::Moving) | PeerAnswer::Unreachable,
        ) => Settlement::Ask,
        (Standing::Committed { .. }, _) => Settlement::Fenced,
        (Standing::Nothing | Standing::Discarded { .. } | Standing::Released { .. }, _) => {
            Settlement::Discard
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::MoveId;

    /// Whatever both sides hold and answer, at most one of them may run the VM.
    #[test]
    fn no_pair_of_records_gives_two_runners() {
        let id = MoveId::new("m").unwrap();
        let source = [
            (Standing::Owner { generation: 1, disks: vec![] }, Verdict::Aborted),
            (
                Standing::Moving {
                    move_id: id.clone(),
                    to_host: Some("b".into()),
                    generation: 1,
                    disks: vec![],
                },
                // Asking a source that is dead makes it journal `Aborted` first.
                Verdict::Aborted,
            ),
            (
                Standing::Committed {
                    move_id: id.clone(),
                    to_host: "b".into(),
                    generation: 2,
                    disks: vec![],
                },
                Verdict::Committed,
            ),
            (Standing::Released { move_id: id.clone() }, Verdict::Committed),
        ];
        let incoming = |prepared| Standing::Incoming {
            move_id: id.clone(),
            from_host: "a".into(),
            generation: 2,
            disks: vec![],
            prepared,
        };
        let runs =
            |s| matches!(s, Settlement::Startable | Settlement::AbortThenStartable | Settlement::OwnThenBoot);
        for (standing, says) in &source {
            for prepared in [false, true] {
                for answer in [PeerAnswer::Said(*says), PeerAnswer::Unreachable] {
                    let here = settle(standing, PeerAnswer::Unreachable);
                    let there = settle(&incoming(prepared), answer);
                    assert!(!(runs(here) && runs(there)), "{standing:?} {prepared} {answer:?}");
                }
            }
        }
    }
}
