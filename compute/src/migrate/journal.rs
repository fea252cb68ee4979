//! The VM's journal as the process keeps it: the file and its fold, always in step.
//!
//! Lives here: append and what a failed append means. Never enters: which records (the engines and the process decide).

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use vmove_mirror::journal::{Journal, JournalError, Record, Standing};
use vmove_storage::{BlockError, JournalFile, LockedFile, Place, journal_file};

/// How long a process waits for an agent that holds its journal for a moment, to answer from it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a record is not in the journal.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// It may not follow what stands; the file was not touched.
    #[error(transparent)]
    Refused(#[from] JournalError),
    /// Writing failed and the record is certainly not there.
    #[error("{0}")]
    NotWritten(BlockError),
    /// Writing failed and whether it is there cannot be found out.
    #[error("{0} (and the journal cannot be read again: {1})")]
    Unknown(BlockError, String),
}

/// A journal's file, with patience for whoever holds it.
#[derive(Debug)]
pub struct Patient(PathBuf);

impl Place for Patient {
    type Medium = LockedFile;

    fn open(&self) -> Result<LockedFile, BlockError> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.0.open() {
                Err(BlockError::Locked { .. }) if Instant::now() < end => {
                    thread::sleep(Duration::from_millis(2));
                }
                opened => return opened,
            }
        }
    }

    fn read(&self) -> Result<Vec<u8>, BlockError> {
        self.0.read()
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

/// A VM's journal on this host, held by this process alone.
#[derive(Debug)]
pub struct VmJournal<P: Place = Patient> {
    place: P,
    file: Option<JournalFile<P::Medium>>,
    fold: Journal,
}

impl VmJournal {
    /// Opens (or makes) it and replays it.
    pub fn open(path: &Path) -> Result<Self, BlockError> {
        Self::open_at(Patient(path.to_owned()))
    }
}

impl<P: Place> VmJournal<P> {
    /// As [`VmJournal::open`], wherever the journal lies.
    pub fn open_at(place: P) -> Result<Self, BlockError> {
        let (file, fold) = open(&place)?;
        Ok(Self { place, file: Some(file), fold })
    }

    /// What stands.
    pub fn standing(&self) -> &Standing {
        self.fold.standing()
    }

    /// The fold of all records.
    pub fn fold(&self) -> &Journal {
        &self.fold
    }

    /// Appends a record and syncs it.
    pub fn append(&mut self, record: &Record) -> Result<(), AppendError> {
        self.fold.admit(record)?;
        let bytes = record.encode()?;
        if self.file.is_none() {
            self.reopen().map_err(AppendError::NotWritten)?;
            self.fold.admit(record)?;
        }
        let Some(file) = self.file.as_mut() else {
            return Err(AppendError::Refused(JournalError::BadRecord));
        };
        let Err(error) = file.append(&bytes) else {
            self.fold.append(record)?;
            return Ok(());
        };
        // The bytes may be there or not: only reading the file again tells. It was locked by the old handle.
        self.file = None;
        let before = self.fold.clone();
        match self.reopen() {
            Ok(()) if self.fold != before => Ok(()),
            Ok(()) => Err(AppendError::NotWritten(error)),
            Err(again) => Err(AppendError::Unknown(error, again.to_string())),
        }
    }

    fn reopen(&mut self) -> Result<(), BlockError> {
        let (file, fold) = open(&self.place)?;
        self.file = Some(file);
        self.fold = fold;
        Ok(())
    }
}

fn open<P: Place>(place: &P) -> Result<(JournalFile<P::Medium>, Journal), BlockError> {
    let file = JournalFile::open_at(place)?;
    let records = journal_file::records(place)?;
    let fold = Journal::replay(records.iter().map(Vec::as_slice)).map_err(|e| BlockError::Journal {
        path: place.path().to_owned(),
        offset: 0,
        reason: e.to_string(),
    })?;
    Ok((file, fold))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_reopening_and_has_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = VmJournal::open(&path).unwrap();
        journal.append(&Record::Owner { generation: 3, disks: vec![] }).unwrap();
        assert!(VmJournal::open(&path).is_err());
        assert!(matches!(
            journal.append(&Record::Owner { generation: 3, disks: vec![] }),
            Err(AppendError::Refused(_))
        ));
        drop(journal);
        let again = VmJournal::open(&path).unwrap();
        assert_eq!(again.standing(), &Standing::Owner { generation: 3, disks: vec![] });
    }
}
