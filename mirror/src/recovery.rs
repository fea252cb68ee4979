//! What an agent does with a VM whose process has ended, from its journal and the other side's answer: one total function.
//!
//! Lives here: the failure table, and whom to ask for the other half of it. Never enters: asking, starting, deleting.

use crate::journal::{Journal, MoveId, OpenEnd, Standing, Verdict};

/// Whose word the journal's owner has to fetch before it can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question<'a> {
    /// As a prepared target: how did this move go?
    Verdict {
        /// The source.
        host: &'a str,
        /// The move.
        move_id: &'a MoveId,
    },
    /// As a source: what do you hold of the VM? After the commit, to be let go; after an abort, since a target that was prepared
    /// may have been taken over.
    Holding {
        /// The target.
        host: &'a str,
        /// The move.
        move_id: &'a MoveId,
    },
}

/// What a target says it holds of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// Nothing of it, or what is left of a move that it has ended.
    Nothing,
    /// It is arriving, and not prepared.
    Arriving,
    /// It is prepared, and waits for its source's word.
    Prepared,
    /// It has the VM at this generation.
    Owner {
        /// Ownership generation.
        generation: u64,
    },
}

/// What the other side said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerAnswer {
    /// There was nothing to ask ([`question`] gives none).
    NotAsked,
    /// It could not be asked.
    Unreachable,
    /// Its word on the move, to [`Question::Verdict`].
    Said(Verdict),
    /// What it holds, to [`Question::Holding`].
    Holds(Holding),
}

/// What is to be done here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settlement {
    /// The VM is stopped here and may be started from its disks.
    Startable,
    /// Append `Aborted` for the move; then look again.
    Abort,
    /// Append `Cleared` for the move; then look again.
    Clear,
    /// Append `Lost`: the VM was taken over, so never start it here; keep the images.
    Lose,
    /// Append `Owner` at the move's generation, then boot from the disks: they hold all that was flushed.
    OwnThenBoot,
    /// Append `Aborted`, then remove the images and all that is known of the VM here.
    AbortThenDiscard,
    /// Append `Released`, then remove the images (or keep them as stale, by the order) and all that is known of the VM here.
    ReleaseThenDiscard,
    /// Remove the images and all that is known of the VM here.
    Discard,
    /// The VM is elsewhere: never start it, answer "committed", ask on.
    Fenced,
    /// Never start it; there is nobody to ask.
    Keep,
    /// Ask the other side (again); run nothing meanwhile.
    Ask,
}

/// Whom to ask before [`settle`].
///
/// A source that may still abort never asks: its own journal decides. A target asks once `Prepared` is on its disk; before that it
/// cannot have been committed, since the source commits only after it was told of `Prepared`.
pub fn question(journal: &Journal) -> Option<Question<'_>> {
    match journal.standing() {
        Standing::Incoming { prepared: true, from_host: host, move_id, .. } => {
            Some(Question::Verdict { host, move_id })
        }
        Standing::Committed { to_host: host, move_id, .. } => Some(Question::Holding { host, move_id }),
        Standing::Owner { .. } => {
            journal.open_ends().first().map(|OpenEnd { host, move_id }| Question::Holding { host, move_id })
        }
        Standing::Nothing
        | Standing::Moving { .. }
        | Standing::Incoming { .. }
        | Standing::Discarded { .. }
        | Standing::Released { .. }
        | Standing::Lost { .. } => None,
    }
}

/// What a host with this standing answers to [`Question::Holding`].
pub fn holding(standing: &Standing) -> Holding {
    match standing {
        Standing::Owner { generation, .. }
        | Standing::Moving { generation, .. }
        // It had the VM, and gave it on.
        | Standing::Committed { generation, .. } => Holding::Owner { generation: *generation },
        Standing::Incoming { prepared: true, .. } => Holding::Prepared,
        Standing::Incoming { prepared: false, .. } => Holding::Arriving,
        Standing::Nothing
        | Standing::Discarded { .. }
        | Standing::Released { .. }
        | Standing::Lost { .. } => Holding::Nothing,
    }
}

/// The failure table, for a VM whose process is not there. Printed in `docs/recovery.md`.
///
/// An answer to a question that this side did not ask, or that contradicts its own journal, settles nothing that could not be taken
/// back: nothing is started and nothing removed for it.
pub fn settle(standing: &Standing, answer: PeerAnswer) -> Settlement {
    use PeerAnswer::{Holds, NotAsked, Said, Unreachable};
    match (standing, answer) {
        (Standing::Owner { .. }, NotAsked) => Settlement::Startable,
        (Standing::Owner { .. }, Holds(Holding::Nothing)) => Settlement::Clear,
        (Standing::Owner { generation: here, .. }, Holds(Holding::Owner { generation: there })) => {
            // At or below ours it is another VM of the same name: what came of a move from here is always ahead.
            if there > *here { Settlement::Lose } else { Settlement::Clear }
        }
        // A prepared target can be taken over at any time until it has heard that the move is aborted.
        (Standing::Owner { .. }, Unreachable | Said(_) | Holds(Holding::Arriving | Holding::Prepared)) => {
            Settlement::Ask
        }

        (Standing::Moving { .. }, _) => Settlement::Abort,

        // Committed before we were prepared: a synced record of ours was lost. This may be the only copy.
        (Standing::Incoming { prepared: false, .. }, Said(Verdict::Committed)) => Settlement::Ask,
        (Standing::Incoming { prepared: false, .. }, _) => Settlement::AbortThenDiscard,
        (Standing::Incoming { prepared: true, .. }, Said(Verdict::Committed)) => Settlement::OwnThenBoot,
        (Standing::Incoming { prepared: true, .. }, Said(Verdict::Aborted)) => Settlement::AbortThenDiscard,
        // A source that never heard of it has lost its journal: then this may be the only copy.
        (
            Standing::Incoming { prepared: true, .. },
            NotAsked | Unreachable | Said(Verdict::Moving | Verdict::Unknown) | Holds(_),
        ) => Settlement::Ask,

        (Standing::Committed { generation: left, .. }, Holds(Holding::Owner { generation: there })) => {
            if there >= *left {
                Settlement::ReleaseThenDiscard
            } else {
                Settlement::Fenced
            }
        }
        (
            Standing::Committed { .. },
            NotAsked
            | Unreachable
            | Said(_)
            | Holds(Holding::Nothing | Holding::Arriving | Holding::Prepared),
        ) => Settlement::Fenced,

        (Standing::Lost { .. }, _) => Settlement::Keep,
        (Standing::Nothing | Standing::Discarded { .. } | Standing::Released { .. }, _) => {
            Settlement::Discard
        }
    }
}

/// What stands here, as far as the table tells it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Here {
    /// Nothing is known.
    Nothing,
    /// The VM is this host's.
    Owner,
    /// The same, and the target of an aborted move may still hold what came of it.
    OwnerInDoubt,
    /// It is on the move.
    Moving,
    /// It arrives.
    Arriving,
    /// It has arrived; the source decides.
    Prepared,
    /// It has left.
    Committed,
    /// It did not come.
    Discarded,
    /// It has left and runs elsewhere.
    Released,
    /// It was taken over.
    Lost,
}

/// What was heard, as far as the table tells it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Heard {
    /// Nothing was asked.
    NotAsked,
    /// No answer.
    Silence,
    /// The move is committed.
    Committed,
    /// It is aborted.
    Aborted,
    /// It is not decided.
    Moving,
    /// It is unknown.
    Unknown,
    /// Nothing is held there.
    Nothing,
    /// An arrival.
    Arriving,
    /// What is prepared.
    Prepared,
    /// The VM, at an older generation than one that has come from here has.
    OwnerBehind,
    /// The VM, as it has come from here or was taken over.
    Owner,
}

/// A row of the failure table that can come up: what stands, and an answer to what is asked then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// What stands here.
    pub here: Here,
    /// What was heard.
    pub heard: Heard,
}

impl Row {
    /// The row that an agent with this journal uses on this answer.
    pub fn of(journal: &Journal, answer: PeerAnswer) -> Self {
        let (here, asked) = match journal.standing() {
            Standing::Nothing => (Here::Nothing, 0),
            Standing::Owner { generation, .. } if journal.open_ends().is_empty() => {
                (Here::Owner, generation.saturating_add(1))
            }
            Standing::Owner { generation, .. } => (Here::OwnerInDoubt, generation.saturating_add(1)),
            Standing::Moving { .. } => (Here::Moving, 0),
            Standing::Incoming { prepared: false, .. } => (Here::Arriving, 0),
            Standing::Incoming { prepared: true, .. } => (Here::Prepared, 0),
            Standing::Committed { generation, .. } => (Here::Committed, *generation),
            Standing::Discarded { .. } => (Here::Discarded, 0),
            Standing::Released { .. } => (Here::Released, 0),
            Standing::Lost { .. } => (Here::Lost, 0),
        };
        let heard = match answer {
            PeerAnswer::NotAsked => Heard::NotAsked,
            PeerAnswer::Unreachable => Heard::Silence,
            PeerAnswer::Said(Verdict::Committed) => Heard::Committed,
            PeerAnswer::Said(Verdict::Aborted) => Heard::Aborted,
            PeerAnswer::Said(Verdict::Moving) => Heard::Moving,
            PeerAnswer::Said(Verdict::Unknown) => Heard::Unknown,
            PeerAnswer::Holds(Holding::Nothing) => Heard::Nothing,
            PeerAnswer::Holds(Holding::Arriving) => Heard::Arriving,
            PeerAnswer::Holds(Holding::Prepared) => Heard::Prepared,
            PeerAnswer::Holds(Holding::Owner { generation }) if generation < asked => Heard::OwnerBehind,
            PeerAnswer::Holds(Holding::Owner { .. }) => Heard::Owner,
        };
        Self { here, heard }
    }
}

/// All rows that can come up.
pub fn rows() -> impl Iterator<Item = Row> {
    use Heard as H;
    const HOLDINGS: &[Heard] = &[H::Silence, H::Nothing, H::Arriving, H::Prepared, H::OwnerBehind, H::Owner];
    const VERDICTS: &[Heard] = &[H::Silence, H::Committed, H::Aborted, H::Moving, H::Unknown];
    const NONE: &[Heard] = &[H::NotAsked];
    let all: [(Here, &[Heard]); 10] = [
        (Here::Nothing, NONE),
        (Here::Owner, NONE),
        (Here::OwnerInDoubt, HOLDINGS),
        (Here::Moving, NONE),
        (Here::Arriving, NONE),
        (Here::Prepared, VERDICTS),
        (Here::Committed, HOLDINGS),
        (Here::Discarded, NONE),
        (Here::Released, NONE),
        (Here::Lost, NONE),
    ];
    all.into_iter().flat_map(|(here, heard)| heard.iter().map(move |heard| Row { here, heard: *heard }))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fmt::Write as _};

    use super::*;
    use crate::journal::{Record, TAKE_OVER_STEP};

    const HERE: u64 = 1;
    const NEXT: u64 = 2;

    fn id() -> MoveId {
        MoveId::new("m").unwrap()
    }

    fn journal(records: &[Record]) -> Journal {
        let mut journal = Journal::default();
        for record in records {
            journal.append(record).unwrap();
        }
        journal
    }

    fn owner(generation: u64) -> Record {
        Record::Owner { generation, disks: vec![] }
    }

    fn moving() -> Record {
        Record::Moving { move_id: id(), to_host: Some("b".into()), generation: NEXT }
    }

    fn aborted() -> Record {
        Record::Aborted { move_id: id() }
    }

    fn incoming() -> Record {
        Record::Incoming { move_id: id(), from_host: "a".into(), generation: NEXT, disks: vec![] }
    }

    fn prepared() -> Record {
        Record::Prepared { move_id: id() }
    }

    fn taken_over(after: u64) -> Record {
        Record::TakenOver { move_id: id(), generation: after + TAKE_OVER_STEP, disks: vec![] }
    }

    /// Every journal that the two hosts of a move can have, by the name of its row.
    fn journals() -> Vec<(&'static str, Journal)> {
        let committed = Record::Committed { move_id: id() };
        let lost = Record::Lost { move_id: id(), host: "b".into(), generation: NEXT + TAKE_OVER_STEP };
        let local = Record::Moving { move_id: id(), to_host: None, generation: NEXT };
        vec![
            ("nothing", journal(&[])),
            ("owner", journal(&[owner(HERE)])),
            ("owner, datastore move under way", journal(&[owner(HERE), local])),
            ("source, moving", journal(&[owner(HERE), moving()])),
            ("source, aborted", journal(&[owner(HERE), moving(), aborted()])),
            (
                "source, aborted and cleared",
                journal(&[owner(HERE), moving(), aborted(), Record::Cleared { move_id: id() }]),
            ),
            ("source, committed", journal(&[owner(HERE), moving(), committed.clone()])),
            (
                "source, released",
                journal(&[owner(HERE), moving(), committed, Record::Released { move_id: id() }]),
            ),
            ("source, lost", journal(&[owner(HERE), moving(), aborted(), lost])),
            ("source, taken over", journal(&[owner(HERE), moving(), aborted(), taken_over(HERE)])),
            ("target, arriving", journal(&[incoming()])),
            ("target, prepared", journal(&[incoming(), prepared()])),
            ("target, discarded", journal(&[incoming(), prepared(), aborted()])),
            ("target, owner", journal(&[incoming(), prepared(), owner(NEXT)])),
            ("target, taken over", journal(&[incoming(), prepared(), taken_over(NEXT)])),
        ]
    }

    fn answers() -> Vec<(&'static str, PeerAnswer)> {
        use PeerAnswer::{Holds, NotAsked, Said, Unreachable};
        vec![
            ("not asked", NotAsked),
            ("unreachable", Unreachable),
            ("never heard of it", Said(Verdict::Unknown)),
            ("still moving", Said(Verdict::Moving)),
            ("aborted", Said(Verdict::Aborted)),
            ("committed", Said(Verdict::Committed)),
            ("holds nothing", Holds(Holding::Nothing)),
            ("arriving", Holds(Holding::Arriving)),
            ("prepared", Holds(Holding::Prepared)),
            ("owner, behind", Holds(Holding::Owner { generation: HERE })),
            ("owner, at the move's", Holds(Holding::Owner { generation: NEXT })),
            ("owner, taken over", Holds(Holding::Owner { generation: NEXT + TAKE_OVER_STEP })),
        ]
    }

    fn word(settlement: Settlement) -> &'static str {
        match settlement {
            Settlement::Startable => "startable",
            Settlement::Abort => "abort",
            Settlement::Clear => "clear",
            Settlement::Lose => "lose",
            Settlement::OwnThenBoot => "own, boot",
            Settlement::AbortThenDiscard => "abort, discard",
            Settlement::ReleaseThenDiscard => "release, discard",
            Settlement::Discard => "discard",
            Settlement::Fenced => "fenced, ask",
            Settlement::Keep => "keep",
            Settlement::Ask => "ask",
        }
    }

    /// Whether an answer is one to what this journal has asked.
    fn is_asked(journal: &Journal, answer: PeerAnswer) -> bool {
        matches!(
            (question(journal), answer),
            (None, PeerAnswer::NotAsked)
                | (Some(_), PeerAnswer::Unreachable)
                | (Some(Question::Verdict { .. }), PeerAnswer::Said(_))
                | (Some(Question::Holding { .. }), PeerAnswer::Holds(_))
        )
    }

    #[test]
    fn the_rows_are_those_that_can_come_up() {
        let mut used = BTreeSet::new();
        for (_, journal) in journals() {
            for (_, answer) in answers() {
                if is_asked(&journal, answer) {
                    used.insert(Row::of(&journal, answer));
                }
            }
        }
        assert_eq!(rows().collect::<BTreeSet<_>>(), used);
    }

    #[test]
    fn a_row_has_one_settlement() {
        let mut settled = std::collections::BTreeMap::new();
        for (name, journal) in journals() {
            for (said, answer) in answers() {
                let row = Row::of(&journal, answer);
                let settlement = settle(journal.standing(), answer);
                if is_asked(&journal, answer) {
                    assert_eq!(*settled.entry(row).or_insert(settlement), settlement, "{name}, {said}");
                }
            }
        }
    }

    /// The words of a host with this journal, to whom the other one asks.
    fn says(journal: &Journal, question: Question<'_>) -> PeerAnswer {
        match question {
            Question::Verdict { move_id, .. } => PeerAnswer::Said(journal.verdict(move_id)),
            Question::Holding { .. } => PeerAnswer::Holds(holding(journal.standing())),
        }
    }

    fn table() -> String {
        let mut text = String::from("| here |");
        for (answer, _) in answers() {
            let _ = write!(text, " {answer} |");
        }
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(answers().len()));
        for (name, journal) in journals() {
            let _ = write!(text, "\n| {name} |");
            for (_, answer) in answers() {
                let asks = is_asked(&journal, answer);
                let settlement = word(settle(journal.standing(), answer));
                // What cannot be answered to what is asked is shown all the same: the function is total.
                let _ =
                    if asks { write!(text, " {settlement} |") } else { write!(text, " ({settlement}) |") };
            }
        }
        text.push('\n');
        text
    }

    #[test]
    fn the_table_in_the_docs_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/recovery.md");
        let doc = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- table -->\n", "<!-- end of table -->");
        let at = doc.find(begin).unwrap() + begin.len();
        let printed = &doc[at..doc.find(end).unwrap()];
        let now = table();
        assert!(printed == now, "docs/recovery.md does not hold the table as it is now:\n{now}");
    }

    #[test]
    fn without_an_answer_nothing_is_started_that_an_answer_could_forbid() {
        for (name, journal) in journals() {
            let asks = question(&journal).is_some();
            for (said, answer) in answers() {
                let settlement = settle(journal.standing(), answer);
                if asks && answer == PeerAnswer::Unreachable {
                    assert!(matches!(settlement, Settlement::Ask | Settlement::Fenced), "{name}");
                }
                // What may be the only copy goes only by a word that another host has it, or that it never was the VM's.
                let removes = matches!(
                    settlement,
                    Settlement::AbortThenDiscard | Settlement::ReleaseThenDiscard | Settlement::Discard
                );
                if removes && name == "target, prepared" {
                    assert_eq!(said, "aborted");
                }
                if removes && name.starts_with("source") && name != "source, released" {
                    assert_eq!(name, "source, committed");
                    assert!(said.starts_with("owner, at") || said == "owner, taken over", "{said}");
                }
            }
        }
    }

    /// Settles `mine` as far as it goes; gives whether the VM may then be started there.
    fn carry_out(mine: &mut Journal, other: &Journal, heard: bool) -> bool {
        loop {
            let answer = match question(mine) {
                None => PeerAnswer::NotAsked,
                Some(question) if heard => says(other, question),
                Some(_) => PeerAnswer::Unreachable,
            };
            let record = match (settle(mine.standing(), answer), answer) {
                (Settlement::Startable, _) => return true,
                (Settlement::Abort | Settlement::AbortThenDiscard, _) => aborted(),
                (Settlement::Clear, _) => Record::Cleared { move_id: id() },
                (Settlement::Lose, PeerAnswer::Holds(Holding::Owner { generation })) => {
                    Record::Lost { move_id: id(), host: "b".into(), generation }
                }
                (Settlement::OwnThenBoot, _) => owner(NEXT),
                (Settlement::ReleaseThenDiscard, _) => Record::Released { move_id: id() },
                (Settlement::Discard | Settlement::Fenced | Settlement::Keep | Settlement::Ask, _) => {
                    return false;
                }
                (settlement @ Settlement::Lose, answer) => panic!("{settlement:?} for {answer:?}"),
            };
            mine.append(&record).unwrap();
        }
    }

    /// Whatever both sides of a move have on their disks, and whichever is settled first: as long as they cannot hear each other at
    /// most one of them may run the VM, and once they can, exactly one.
    #[test]
    fn no_pair_of_journals_gives_two_runners_and_every_pair_is_settled() {
        let (sources, targets): (Vec<_>, Vec<_>) = journals()
            .into_iter()
            .filter(|(name, _)| name.starts_with("source") || name.starts_with("target"))
            .partition(|(name, _)| name.starts_with("source"));
        let mut pairs = 0;
        for (source_name, source) in &sources {
            for (target_name, target) in &targets {
                if !can_meet(source_name, target_name) {
                    continue;
                }
                pairs += 1;
                let (mut source, mut target) = (source.clone(), target.clone());
                let case = format!("{source_name} / {target_name}");
                let deaf = [carry_out(&mut source, &target, false), carry_out(&mut target, &source, false)];
                assert!(deaf != [true, true], "{case}, out of reach: {source:?} {target:?}");
                for source_first in [true, false] {
                    let (mut source, mut target) = (source.clone(), target.clone());
                    let mut runs = [false; 2];
                    for turn in 0..4 {
                        if (turn % 2 == 0) == source_first {
                            runs[0] = carry_out(&mut source, &target, true);
                        } else {
                            runs[1] = carry_out(&mut target, &source, true);
                        }
                        assert!(runs != [true, true], "{case}: {source:?} {target:?}");
                    }
                    assert!(runs[0] != runs[1], "{case}: {source:?} {target:?}");
                }
            }
        }
        assert_eq!(pairs, 19);
    }

    /// Journals of one move that can exist side by side. `Owner` at the target needs `Committed` at the source, which needs
    /// `Prepared` at the target; the rest is up to crashes and to the operator.
    fn can_meet(source: &str, target: &str) -> bool {
        match target {
            "target, arriving" | "target, discarded" => {
                !matches!(source, "source, committed" | "source, released" | "source, lost")
            }
            "target, prepared" => {
                !matches!(source, "source, released" | "source, lost" | "source, aborted and cleared")
            }
            "target, owner" => matches!(source, "source, committed" | "source, released"),
            // Both taken over: two operators, each of whom was told what it means.
            "target, taken over" => !matches!(source, "source, aborted and cleared" | "source, taken over"),
            _ => unreachable!("{target}"),
        }
    }
}
