//! The ownership journal of one VM on one host: which records may follow which, and what they mean.
//!
//! A record is appended and synced before anything is done that rests on it. The rule that makes two runners impossible is in
//! [`Journal::admit`]: `Committed` is refused once `Aborted` is there, and the reverse; whoever answers "aborted" appends it first.
//! Lives here: record types, their bytes, the fold to a [`Standing`]. Never enters: files (see `vmove_storage`'s journal file).

use serde::{Deserialize, Serialize};

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
}

impl Record {
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
            | Self::Released { move_id } => Some(move_id),
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
}

/// What a source answers to "which way did this move go?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The target owns the VM.
    Committed,
    /// It is on disk here that this move never commits, or it is unknown here (then it can never commit either).
    Aborted,
    /// Not decided yet.
    Moving,
}

/// The fold of all records.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Journal {
    standing: Standing,
    committed: Option<MoveId>,
}

impl Default for Journal {
    fn default() -> Self {
        Self { standing: Standing::Nothing, committed: None }
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

    /// What this host says of a move. `Aborted` here is an answer about the past: to *make* a running move aborted, append it first.
    pub fn verdict(&self, id: &MoveId) -> Verdict {
        if self.committed.as_ref() == Some(id) {
            return Verdict::Committed;
        }
        match &self.standing {
            Standing::Moving { move_id, .. } if move_id == id => Verdict::Moving,
            _ => Verdict::Aborted,
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
        if let Record::Committed { move_id } = record {
            self.committed = Some(move_id.clone());
        }
        self.standing = next;
        Ok(())
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
        fn no_move_ends_twice(choices in proptest::collection::vec((0u8..7, 0u8..3), 0..60)) {
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
                    _ => Record::Released { move_id: move_id.clone() },
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
