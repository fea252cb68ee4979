//! The ownership journal of one VM on one host: which records may follow which, and what they mean.
//!
//! A record is appended and synced before anything is done that rests on it. The rule that makes two runners impossible is in
//! [`Journal::admit`]: `Committed` is refused once `Aborted` is there, and the reverse; whoever answers "aborted" appends it first.
//! Lives here: record types, their bytes, the fold to a [`Standing`]. Never enters: files (see `vmove_storage`'s journal file).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Generations that a take-over skips. It makes a line of ownership of its own, ahead of the one it leaves however often the VM moves
/// there: two hosts that both believe to own the VM can always tell which of them has lost it.
pub const TAKE_OVER_STEP: u64 = 1 << 32;

/// A move's id: UUID text, the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MoveId(String);

impl MoveId {
    /// Longest id accepted, bytes.
    pub const MAX: usize = 64;

    /// Checks an id: 1 to 64 ASCII letters, digits or dashes.
    pub fn new(text: impl Into<String>) -> Result<Self, JournalError> {
        let text = text.into();
        let ok = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if text.is_empty() || text.len() > Self::MAX || !text.chars().all(ok) {
            return Err(JournalError::BadId);
        }
        Ok(Self(text))
    }

    /// The id's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for MoveId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where one disk's image lies on this host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DiskAt {
    /// The disk's name.
    pub name: String,
    /// The datastore's name.
    pub datastore: String,
    /// The image's path.
    pub path: String,
}

/// One entry of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// This host owns the VM at this generation, with these images. Ends a datastore-only move as well (its commit point).
    Owner {
        /// Ownership generation.
        generation: u64,
        /// The images.
        disks: Vec<DiskAt>,
    },
    /// Source: a move has begun that would end at `generation`. `to_host` none: the VM stays here, disks change datastore.
    Moving {
        /// The move.
        move_id: MoveId,
        /// Target host.
        to_host: Option<String>,
        /// Generation after the commit.
        generation: u64,
    },
    /// Target: a VM is arriving; `disks` are the images made for it.
    Incoming {
        /// The move.
        move_id: MoveId,
        /// Source host.
        from_host: String,
        /// Generation after the commit.
        generation: u64,
        /// The images.
        disks: Vec<DiskAt>,
    },
    /// Target: everything is here, checked and flushed; only the source's word is missing.
    Prepared {
        /// The move.
        move_id: MoveId,
    },
    /// Source: **the commit point**. From here on the target owns the VM.
    Committed {
        /// The move.
        move_id: MoveId,
    },
    /// Either side: this move will never commit.
    Aborted {
        /// The move.
        move_id: MoveId,
    },
    /// Source: the target has said that it runs; nothing here is needed any more.
    Released {
        /// The move.
        move_id: MoveId,
    },
    /// By an operator's word alone this host owns the VM: the host at the other end of the move is taken to be gone. Follows
    /// `Prepared` without the source's word, or at the source an aborted move whose target cannot be asked.
    TakenOver {
        /// The move.
        move_id: MoveId,
        /// Ownership generation: that of the images plus [`TAKE_OVER_STEP`].
        generation: u64,
        /// The images.
        disks: Vec<DiskAt>,
    },
    /// Source: the target of this aborted move has said that it holds nothing of it, so it can never take the VM over.
    Cleared {
        /// The move.
        move_id: MoveId,
    },
    /// Source: the target of this aborted move was made the owner by its operator. The VM is never started here again.
    Lost {
        /// The move.
        move_id: MoveId,
        /// The owner.
        host: String,
        /// Its generation there.
        generation: u64,
    },
}

impl Record {
    /// What is this host's by this record: at which generation, with which images.
    pub fn owned(&self) -> Option<(u64, &[DiskAt])> {
        match self {
            Self::Owner { generation, disks } | Self::TakenOver { generation, disks, .. } => {
                Some((*generation, disks))
            }
            _ => None,
        }
    }

    /// Largest encoded record, bytes.
    pub const MAX_BYTES: usize = 64 << 10;

    /// The record's bytes (postcard; enum order and field order are the format, new variants go to the end).
    pub fn encode(&self) -> Result<Vec<u8>, JournalError> {
        let bytes = postcard::to_stdvec(self).map_err(|_| JournalError::BadRecord)?;
        if bytes.len() > Self::MAX_BYTES { Err(JournalError::BadRecord) } else { Ok(bytes) }
    }

    /// Reads a record; trailing bytes, unknown variants and bad ids are errors.
    pub fn decode(bytes: &[u8]) -> Result<Self, JournalError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(JournalError::BadRecord);
        }
        let (record, rest) = postcard::take_from_bytes::<Self>(bytes).map_err(|_| JournalError::BadRecord)?;
        if !rest.is_empty() {
            return Err(JournalError::BadRecord);
        }
        if let Some(id) = record.move_id() {
            MoveId::new(id.as_str())?;
        }
        Ok(record)
    }

    /// The move it speaks of.
    pub fn move_id(&self) -> Option<&MoveId> {
        match self {
            Self::Owner { .. } => None,
            Self::Moving { move_id, .. }
            | Self::Incoming { move_id, .. }
            | Self::Prepared { move_id }
            | Self::Committed { move_id }
            | Self::Aborted { move_id }
            | Self::Released { move_id }
            | Self::TakenOver { move_id, .. }
            | Self::Cleared { move_id }
            | Self::Lost { move_id, .. } => Some(move_id),
        }
    }
}

/// Why a journal or a record was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Not the text of a move id.
    #[error("a move id is 1 to 64 letters, digits or dashes")]
    BadId,
    /// Bytes that are no record.
    #[error("not a journal record of this version")]
    BadRecord,
    /// The record may not follow what stands.
    #[error("journal refuses {record} while the VM here is {standing}")]
    Refused {
        /// What was to be appended.
        record: String,
        /// What stands.
        standing: String,
    },
}

/// What the records so far say of this host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Nothing is known of the VM here.
    Nothing,
    /// The VM is this host's.
    Owner {
        /// Ownership generation.
        generation: u64,
        /// Its images.
        disks: Vec<DiskAt>,
    },
    /// The VM is this host's and on the move.
    Moving {
        /// The move.
        move_id: MoveId,
        /// Target host; none for a datastore-only move.
        to_host: Option<String>,
        /// Generation owned now.
        generation: u64,
        /// Images owned now.
        disks: Vec<DiskAt>,
    },
    /// The VM is another host's and arriving here.
    Incoming {
        /// The move.
        move_id: MoveId,
        /// Source host.
        from_host: String,
        /// Generation after the commit.
        generation: u64,
        /// Images made for it.
        disks: Vec<DiskAt>,
        /// `Prepared` is on disk: the source decides alone.
        prepared: bool,
    },
    /// The VM has left: it must never be started here.
    Committed {
        /// The move.
        move_id: MoveId,
        /// Where it went.
        to_host: String,
        /// Its generation there.
        generation: u64,
        /// Images left behind.
        disks: Vec<DiskAt>,
    },
    /// An arrival ended without a commit; its images are rubbish.
    Discarded {
        /// The move.
        move_id: MoveId,
        /// Images left behind.
        disks: Vec<DiskAt>,
    },
    /// The VM has left and its new owner runs it.
    Released {
        /// The move.
        move_id: MoveId,
    },
    /// The VM was taken over by the target of a move that was aborted here: it must never be started here. The images are kept:
    /// what the guest wrote here after that move is nowhere else.
    Lost {
        /// The owner.
        host: String,
        /// Its generation there.
        generation: u64,
        /// Images left behind.
        disks: Vec<DiskAt>,
    },
}

/// A move that was aborted here, whose target has not said yet that it holds nothing of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OpenEnd {
    /// The move.
    pub move_id: MoveId,
    /// Its target.
    pub host: String,
}

/// What a source answers to "which way did this move go?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The target owns the VM.
    Committed,
    /// It is on disk here that this move never commits.
    Aborted,
    /// Not decided yet.
    Moving,
    /// There is no record of it here: a move that came as far as its target was in this journal once, so it says nothing.
    Unknown,
}

/// The fold of all records.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Journal {
    standing: Standing,
    /// Moves that have ended here, and whether they were committed.
    ended: BTreeMap<MoveId, bool>,
    open: Vec<OpenEnd>,
}

impl Default for Journal {
    fn default() -> Self {
        Self { standing: Standing::Nothing, ended: BTreeMap::new(), open: Vec::new() }
    }
}

impl Journal {
    /// Replays encoded records, oldest first.
    pub fn replay<'a>(records: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, JournalError> {
        let mut journal = Self::default();
        for bytes in records {
            journal.append(&Record::decode(bytes)?)?;
        }
        Ok(journal)
    }

    /// What stands.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Aborted moves whose targets may still hold what came of them, oldest first.
    pub fn open_ends(&self) -> &[OpenEnd] {
        &self.open
    }

    /// What this host says of a move. `Aborted` here is an answer about the past: to *make* a running move aborted, append it first.
    pub fn verdict(&self, id: &MoveId) -> Verdict {
        match (self.ended.get(id), &self.standing) {
            (Some(true), _) => Verdict::Committed,
            (Some(false), _) => Verdict::Aborted,
            (None, Standing::Moving { move_id, .. }) if move_id == id => Verdict::Moving,
            (None, _) => Verdict::Unknown,
        }
    }

    /// Whether `record` may be appended now; the caller writes and syncs it, then calls [`Journal::append`].
    pub fn admit(&self, record: &Record) -> Result<(), JournalError> {
        self.clone().append(record)
    }

    /// Applies a record that is on disk.
    pub fn append(&mut self, record: &Record) -> Result<(), JournalError> {
        let next = self.next(record).ok_or_else(|| JournalError::Refused {
            record: format!("{record:?}"),
            standing: format!("{:?}", self.standing),
        })?;
        match record {
            Record::Committed { move_id } => {
                self.ended.insert(move_id.clone(), true);
                // It is the new owner's business now: the images that could be taken over are older than its own.
                self.open.clear();
            }
            Record::Aborted { move_id } => {
                self.ended.insert(move_id.clone(), false);
                if let Standing::Moving { to_host: Some(host), .. } = &self.standing {
                    self.open.push(OpenEnd { move_id: move_id.clone(), host: host.clone() });
                }
            }
            Record::Cleared { move_id } => self.open.retain(|end| end.move_id != *move_id),
            Record::TakenOver { .. } | Record::Lost { .. } => self.open.clear(),
            _ => {}
        }
        self.standing = next;
        Ok(())
    }

    fn is_open(&self, id: &MoveId) -> bool {
        self.open.iter().any(|end| end.move_id == *id)
    }

    fn next(&self, record: &Record) -> Option<Standing> {
        use Standing as S;
        Some(match (&self.standing, record) {
            (S::Nothing, Record::Owner { generation, disks }) => {
                S::Owner { generation: *generation, disks: disks.clone() }
            }
            // The datastore-only commit: same host, next generation, new images.
            (S::Moving { to_host: None, generation: old, .. }, Record::Owner { generation, disks })
                if *generation == *old + 1 =>
            {
                S::Owner { generation: *generation, disks: disks.clone() }
            }
            (
                S::Incoming { generation: expected, prepared: true, .. },
                Record::Owner { generation, disks },
            ) if generation == expected => S::Owner { generation: *generation, disks: disks.clone() },
            (S::Owner { generation: old, disks }, Record::Moving { move_id, to_host, generation })
                if *generation == *old + 1 =>
            {
                S::Moving {
                    move_id: move_id.clone(),
                    to_host: to_host.clone(),
                    generation: *old,
                    disks: disks.clone(),
                }
            }
            (
                S::Nothing | S::Discarded { .. } | S::Released { .. },
                Record::Incoming { move_id, from_host, generation, disks },
            ) => S::Incoming {
                move_id: move_id.clone(),
                from_host: from_host.clone(),
                generation: *generation,
                disks: disks.clone(),
                prepared: false,
            },
            (
                S::Incoming { move_id: mine, from_host, generation, disks, prepared: false },
                Record::Prepared { move_id },
            ) if mine == move_id => S::Incoming {
                move_id: mine.clone(),
                from_host: from_host.clone(),
                generation: *generation,
                disks: disks.clone(),
                prepared: true,
            },
            (
                S::Moving { move_id: mine, to_host: Some(to_host), generation, disks },
                Record::Committed { move_id },
            ) if mine == move_id => S::Committed {
                move_id: mine.clone(),
                to_host: to_host.clone(),
                generation: *generation + 1,
                disks: disks.clone(),
            },
            (S::Moving { move_id: mine, generation, disks, .. }, Record::Aborted { move_id })
                if mine == move_id =>
            {
                S::Owner { generation: *generation, disks: disks.clone() }
            }
            (S::Incoming { move_id: mine, disks, .. }, Record::Aborted { move_id }) if mine == move_id => {
                S::Discarded { move_id: mine.clone(), disks: disks.clone() }
            }
            (S::Committed { move_id: mine, .. }, Record::Released { move_id }) if mine == move_id => {
                S::Released { move_id: mine.clone() }
            }
            (
                S::Incoming { move_id: mine, generation: arrived, prepared: true, .. },
                Record::TakenOver { move_id, generation, disks },
            ) if mine == move_id && arrived.checked_add(TAKE_OVER_STEP) == Some(*generation) => {
                S::Owner { generation: *generation, disks: disks.clone() }
            }
            (S::Owner { generation: old, .. }, Record::TakenOver { move_id, generation, disks })
                if self.is_open(move_id) && old.checked_add(TAKE_OVER_STEP) == Some(*generation) =>
            {
                S::Owner { generation: *generation, disks: disks.clone() }
            }
            (standing @ (S::Owner { .. } | S::Moving { .. }), Record::Cleared { move_id })
                if self.is_open(move_id) =>
            {
                standing.clone()
            }
            (S::Owner { generation: old, disks }, Record::Lost { move_id, host, generation })
                if self.is_open(move_id) && generation > old =>
            {
                S::Lost { host: host.clone(), generation: *generation, disks: disks.clone() }
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(text: &str) -> MoveId {
        MoveId::new(text).unwrap()
    }

    fn owner(generation: u64) -> Record {
        Record::Owner { generation, disks: vec![] }
    }

    fn moving(name: &str, generation: u64) -> Record {
        Record::Moving { move_id: id(name), to_host: Some("b".into()), generation }
    }

    fn journal(records: &[Record]) -> Journal {
        let mut journal = Journal::default();
        for record in records {
            journal.append(record).unwrap();
        }
        journal
    }

    #[test]
    fn committed_is_refused_after_aborted_and_the_reverse() {
        let aborted = journal(&[owner(1), moving("m", 2), Record::Aborted { move_id: id("m") }]);
        assert!(aborted.admit(&Record::Committed { move_id: id("m") }).is_err());
        assert_eq!(aborted.verdict(&id("m")), Verdict::Aborted);
        let committed = journal(&[owner(1), moving("m", 2), Record::Committed { move_id: id("m") }]);
        assert!(committed.admit(&Record::Aborted { move_id: id("m") }).is_err());
        assert!(committed.admit(&owner(1)).is_err());
        assert!(committed.admit(&moving("n", 2)).is_err());
        assert_eq!(committed.verdict(&id("m")), Verdict::Committed);
    }

    #[test]
    fn a_target_owns_only_after_prepared() {
        let incoming =
            Record::Incoming { move_id: id("m"), from_host: "a".into(), generation: 2, disks: vec![] };
        let early = journal(std::slice::from_ref(&incoming));
        assert!(early.admit(&owner(2)).is_err());
        let ready = journal(&[incoming, Record::Prepared { move_id: id("m") }]);
        assert!(ready.admit(&owner(3)).is_err());
        assert!(ready.admit(&owner(2)).is_ok());
    }

    #[test]
    fn a_datastore_move_commits_by_owning_the_next_generation() {
        let local = Record::Moving { move_id: id("m"), to_host: None, generation: 2 };
        let journal = journal(&[owner(1), local]);
        assert!(journal.admit(&Record::Committed { move_id: id("m") }).is_err());
        assert!(journal.admit(&owner(2)).is_ok());
    }

    fn taken_over(name: &str, generation: u64) -> Record {
        Record::TakenOver { move_id: id(name), generation, disks: vec![] }
    }

    #[test]
    fn only_what_is_prepared_can_be_taken_over_and_it_skips_generations() {
        let incoming =
            Record::Incoming { move_id: id("m"), from_host: "a".into(), generation: 2, disks: vec![] };
        let early = journal(std::slice::from_ref(&incoming));
        assert!(early.admit(&taken_over("m", 2 + TAKE_OVER_STEP)).is_err());
        let mut ready = journal(&[incoming, Record::Prepared { move_id: id("m") }]);
        for wrong in [taken_over("m", 2), taken_over("m", 3), taken_over("n", 2 + TAKE_OVER_STEP)] {
            assert!(ready.admit(&wrong).is_err(), "{wrong:?}");
        }
        ready.append(&taken_over("m", 2 + TAKE_OVER_STEP)).unwrap();
        assert_eq!(*ready.standing(), Standing::Owner { generation: 2 + TAKE_OVER_STEP, disks: vec![] });
        ready.append(&moving("back", 3 + TAKE_OVER_STEP)).unwrap();
    }

    #[test]
    fn an_aborted_move_stays_open_until_its_target_is_known_to_hold_nothing() {
        let mut source = journal(&[owner(1), moving("m", 2), Record::Aborted { move_id: id("m") }]);
        let open = |host: &str, name: &str| OpenEnd { move_id: id(name), host: host.into() };
        assert_eq!(source.open_ends(), [open("b", "m")]);
        // Another move does not close it, also while it lasts.
        source.append(&moving("n", 2)).unwrap();
        let mut cleared = source.clone();
        cleared.append(&Record::Cleared { move_id: id("m") }).unwrap();
        assert_eq!(cleared.open_ends(), []);
        source.append(&Record::Aborted { move_id: id("n") }).unwrap();
        assert_eq!(source.open_ends(), [open("b", "m"), open("b", "n")]);

        let lost = |generation| Record::Lost { move_id: id("m"), host: "b".into(), generation };
        assert!(source.admit(&lost(1)).is_err(), "not ahead of what is here");
        let mut fenced = source.clone();
        fenced.append(&lost(2 + TAKE_OVER_STEP)).unwrap();
        for record in
            [owner(1), moving("o", 2), lost(2 + TAKE_OVER_STEP), taken_over("m", 1 + TAKE_OVER_STEP)]
        {
            assert!(fenced.admit(&record).is_err(), "{record:?} after Lost");
        }
        source.append(&taken_over("n", 1 + TAKE_OVER_STEP)).unwrap();
        assert_eq!(source.open_ends(), []);
        // A datastore-only move has no target that could hold anything.
        let local = Record::Moving { move_id: id("d"), to_host: None, generation: 2 };
        let local = journal(&[owner(1), local, Record::Aborted { move_id: id("d") }]);
        assert_eq!(local.open_ends(), []);
    }

    #[test]
    fn a_move_that_was_never_heard_of_is_not_called_aborted() {
        let first =
            journal(&[owner(1), moving("m", 2), Record::Aborted { move_id: id("m") }, moving("n", 2)]);
        assert_eq!(first.verdict(&id("m")), Verdict::Aborted, "also with another under way");
        assert_eq!(first.verdict(&id("n")), Verdict::Moving);
        assert_eq!(first.verdict(&id("o")), Verdict::Unknown);
        assert_eq!(Journal::default().verdict(&id("m")), Verdict::Unknown);
    }

    #[test]
    fn records_round_trip_and_reject_rubbish() {
        let record = moving("abc-1", 7);
        let bytes = record.encode().unwrap();
        assert_eq!(Record::decode(&bytes).unwrap(), record);
        let mut long = bytes.clone();
        long.push(0);
        assert_eq!(Record::decode(&long), Err(JournalError::BadRecord));
        assert!(Record::decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(MoveId::new("a/b").is_err());
    }

    proptest! {
        #[test]
        fn decode_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::decode(&bytes);
        }

        /// Whatever sequence is tried, the journal never holds both endings of one move.
        #[test]
        fn no_move_ends_twice(choices in proptest::collection::vec((0u8..10, 0u8..3), 0..60)) {
            let mut journal = Journal::default();
            let (mut aborted, mut committed) = (vec![], vec![]);
            for (kind, which) in choices {
                let move_id = id(&format!("m{which}"));
                let generation = match journal.standing() {
                    Standing::Owner { generation, .. } | Standing::Moving { generation, .. } => *generation + 1,
                    Standing::Incoming { generation, .. } => *generation,
                    _ => 1,
                };
                let record = match kind {
                    0 => owner(generation),
                    1 => Record::Moving { move_id: move_id.clone(), to_host: Some("b".into()), generation },
                    2 => Record::Incoming { move_id: move_id.clone(), from_host: "a".into(), generation, disks: vec![] },
                    3 => Record::Prepared { move_id: move_id.clone() },
                    4 => Record::Committed { move_id: move_id.clone() },
                    5 => Record::Aborted { move_id: move_id.clone() },
                    6 => Record::Released { move_id: move_id.clone() },
                    7 => Record::Cleared { move_id: move_id.clone() },
                    8 => Record::Lost { move_id: move_id.clone(), host: "b".into(), generation },
                    _ => taken_over(&format!("m{which}"), generation - 1 + TAKE_OVER_STEP),
                };
                // A move id is used once (a UUID): do not begin one that has ended.
                let begins = matches!(record, Record::Moving { .. } | Record::Incoming { .. });
                if begins && (aborted.contains(&move_id) || committed.contains(&move_id)) {
                    continue;
                }
                if journal.append(&record).is_ok() {
                    match record {
                        Record::Committed { move_id } => committed.push(move_id),
                        Record::Aborted { move_id } => aborted.push(move_id),
                        _ => {}
                    }
                }
            }
            prop_assert!(committed.iter().all(|id| !aborted.contains(id)));
        }
    }
}
