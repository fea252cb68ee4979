//! An append-only log whose records are on disk when `append` returns: the ground under commit decisions.
//!
//! A record is magic, length, CRC-32C of length and payload, payload; numbers little-endian. Each append is synced
//! before the next, so a crash can tear the last record only: a torn tail is cut, damage before it is an error and
//! never silently drops a record. What never enters: what the records mean.
//!
//! The bytes lie on a [`Medium`] at a [`Place`]: a locked file at a path, or whatever a simulation crashes in their stead.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{BlockError, Result};

/// First bytes of each record.
const MAGIC: [u8; 4] = *b"vmJ1";
/// Bytes before a payload: magic, length, checksum.
const FRAME: usize = 12;
/// Largest payload, in bytes.
pub const MAX_RECORD: usize = 64 * 1024;
/// Most records in a journal.
pub const MAX_RECORDS: usize = 65536;
/// Larger files are not read: more than any sequence of small decisions needs.
const MAX_FILE: u64 = 256 << 20;

/// What a journal's bytes are written to, by one holder at a time.
pub trait Medium {
    /// All bytes.
    fn read(&self) -> io::Result<Vec<u8>>;
    /// Drops everything from byte `len` on.
    fn cut(&self, len: u64) -> io::Result<()>;
    /// Writes all of `bytes` at byte `at`.
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// Makes all that was written durable.
    fn sync(&self) -> io::Result<()>;
}

/// Where a journal lies.
pub trait Place {
    /// What is found there.
    type Medium: Medium;
    /// Opens or creates it for one holder; its name is durable then.
    ///
    /// # Errors
    /// [`BlockError::Locked`] while somebody else holds it.
    fn open(&self) -> Result<Self::Medium>;
    /// Its bytes, without holding it; none if there is nothing.
    fn read(&self) -> Result<Vec<u8>>;
    /// Its name, for messages.
    fn path(&self) -> &Path;
}

/// A file that is locked as long as it is open here.
#[derive(Debug)]
pub struct LockedFile(File);

impl Drop for LockedFile {
    fn drop(&mut self) {
        // Closing releases too, unless a child that is just being started still has a copy of the descriptor.
        let _ = self.0.unlock();
    }
}

fn read_all(mut file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Medium for LockedFile {
    fn read(&self) -> io::Result<Vec<u8>> {
        read_all(&self.0)
    }

    fn cut(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

impl Place for PathBuf {
    type Medium = LockedFile;

    fn open(&self) -> Result<LockedFile> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self)
            .map_err(|e| BlockError::io("open journal", self, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let conflict = "another process has the journal open";
                return Err(BlockError::Locked { path: self.clone(), conflict });
            }
            Err(TryLockError::Error(e)) => return Err(BlockError::io("lock journal", self, e)),
        }
        let file = LockedFile(file);
        durable::sync_parent(self)?;
        Ok(file)
    }

    fn read(&self) -> Result<Vec<u8>> {
        let file = match File::open(self) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(BlockError::io("open journal", self, e)),
        };
        read_all(&file).map_err(|e| BlockError::io("read journal", self, e))
    }

    fn path(&self) -> &Path {
        self
    }
}

/// A journal open for appending, by this process only.
#[derive(Debug)]
pub struct JournalFile<M = LockedFile> {
    file: M,
    path: PathBuf,
    end: u64,
    records: usize,
    /// An append failed half-way; what is on disk is only known after reopening.
    failed: bool,
}

impl JournalFile {
    /// Opens or creates the journal at `path`, takes its lock, and cuts a torn tail.
    ///
    /// # Errors
    /// [`BlockError::Locked`] while another process appends; [`BlockError::Journal`] for damage before the tail.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_at(&path.to_path_buf())
    }

    /// All records, oldest first, without taking the lock; none if there is no such file. A torn tail is left out.
    pub fn read_all(path: &Path) -> Result<Vec<Vec<u8>>> {
        records(&path.to_path_buf())
    }
}

/// All records at a place, oldest first, without holding it. A torn tail is left out.
pub fn records<P: Place>(place: &P) -> Result<Vec<Vec<u8>>> {
    let bytes = capped(place.path(), place.read()?)?;
    Ok(parse(place.path(), &bytes)?.0.into_iter().map(<[u8]>::to_vec).collect())
}

impl<M: Medium> JournalFile<M> {
    /// As [`JournalFile::open`], wherever the journal lies.
    pub fn open_at<P: Place<Medium = M>>(place: &P) -> Result<Self> {
        let (file, path) = (place.open()?, place.path());
        let bytes = file.read().map_err(|e| BlockError::io("read journal", path, e))?;
        let bytes = capped(path, bytes)?;
        let (records, end) = parse(path, &bytes)?;
        if end < bytes.len() {
            file.cut(end as u64).map_err(|e| BlockError::io("cut journal", path, e))?;
        }
        // Each append was synced before the next, so only the last record can be in doubt: a sync that failed may have left it in
        // the page cache, marked clean. Written again it is on disk after the sync below, or that fails too.
        if let Some(last) = records.last() {
            let framed = frame(last);
            file.write(&framed, (end - framed.len()) as u64)
                .map_err(|e| BlockError::io("rewrite the last record of journal", path, e))?;
        }
        // Also when nothing was cut: what was read must not vanish later, and neither must a new file's name.
        file.sync().map_err(|e| BlockError::io("sync journal", path, e))?;
        Ok(Self { file, path: path.to_path_buf(), end: end as u64, records: records.len(), failed: false })
    }

    /// Appends a record; it is durable when this returns `Ok`.
    ///
    /// # Errors
    /// After a failed write or sync the record may or may not be there, and every later append is refused: reopen
    /// the journal to learn what it holds.
    pub fn append(&mut self, record: &[u8]) -> Result<()> {
        let refuse = |reason: &str| BlockError::Journal {
            path: self.path.clone(),
            offset: self.end,
            reason: reason.to_owned(),
        };
        if self.failed {
            return Err(refuse("an earlier append failed; reopen the journal"));
        }
        if record.is_empty() || record.len() > MAX_RECORD {
            return Err(refuse("a record has 1 byte to 64 KiB"));
        }
        if self.records >= MAX_RECORDS {
            return Err(refuse("the journal is full"));
        }
        let framed = frame(record);
        self.failed = true;
        self.file
            .write(&framed, self.end)
            .and_then(|()| self.file.sync())
            .map_err(|e| BlockError::io("append to journal", &self.path, e))?;
        self.failed = false;
        self.end += framed.len() as u64;
        self.records += 1;
        Ok(())
    }
}

fn capped(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
    if bytes.len() as u64 > MAX_FILE {
        let reason = format!("the file is larger than {MAX_FILE} bytes");
        return Err(BlockError::Journal { path: path.to_path_buf(), offset: MAX_FILE, reason });
    }
    Ok(bytes)
}

fn frame(record: &[u8]) -> Vec<u8> {
    let length = (record.len() as u32).to_le_bytes();
    let mut framed = Vec::with_capacity(FRAME + record.len());
    framed.extend(MAGIC);
    framed.extend(length);
    framed.extend(checksum(length, record).to_le_bytes());
    framed.extend(record);
    framed
}

fn checksum(length: [u8; 4], record: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&length);
    digest.update(record);
    digest.finalize() as u32
}

/// The valid record at the beginning of `bytes`, if there is one.
fn record_at(bytes: &[u8]) -> Option<&[u8]> {
    let rest = bytes.strip_prefix(&MAGIC)?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let size = u32::from_le_bytes(*length) as usize;
    if size == 0 || size > MAX_RECORD {
        return None;
    }
    let record = rest.get(..size)?;
    (checksum(*length, record) == u32::from_le_bytes(*sum)).then_some(record)
}

/// Splits a journal into its records; also gives where the last valid one ends.
fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<(Vec<&'a [u8]>, usize)> {
    let mut records = Vec::new();
    let mut at = 0;
    while let Some(record) = record_at(&bytes[at..]) {
        if records.len() >= MAX_RECORDS {
            return Err(damage(path, at, "more records than a journal may have"));
        }
        records.push(record);
        at += FRAME + record.len();
    }
    let tail = &bytes[at..];
    // One append was under way at most. Anything longer, or a good record further on, is damage, not a tear.
    if tail.len() > FRAME + MAX_RECORD {
        return Err(damage(path, at, "an invalid record, with too much behind it to be a torn append"));
    }
    let magic_at = |from: usize| tail[from..].windows(MAGIC.len()).position(|window| window == MAGIC);
    let mut from = 1;
    while from < tail.len() {
        let Some(found) = magic_at(from) else { break };
        if record_at(&tail[from + found..]).is_some() {
            return Err(damage(path, at, "an invalid record before a valid one"));
        }
        from += found + 1;
    }
    Ok((records, at))
}

fn damage(path: &Path, offset: usize, reason: &str) -> BlockError {
    BlockError::Journal { path: path.to_path_buf(), offset: offset as u64, reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn journal_with(records: &[&[u8]]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = JournalFile::open(&path).unwrap();
        for record in records {
            journal.append(record).unwrap();
        }
        (dir, path)
    }

    #[test]
    fn records_survive_and_one_process_appends() {
        let (_dir, path) = journal_with(&[b"prepared", b"committed"]);
        let mut journal = JournalFile::open(&path).unwrap();
        assert!(matches!(JournalFile::open(&path), Err(BlockError::Locked { .. })));
        journal.append(b"owner").unwrap();
        assert!(journal.append(b"").is_err());
        assert!(journal.append(&vec![0; MAX_RECORD + 1]).is_err());
        let all = JournalFile::read_all(&path).unwrap();
        assert_eq!(all, [b"prepared".to_vec(), b"committed".to_vec(), b"owner".to_vec()]);
        assert!(JournalFile::read_all(&path.with_extension("none")).unwrap().is_empty());
    }

    /// As a child has one of every open file between fork(2) and execve(2).
    #[test]
    fn a_copy_of_the_descriptor_does_not_keep_the_lock() {
        let (_dir, path) = journal_with(&[b"prepared"]);
        let journal = JournalFile::open(&path).unwrap();
        let _copy = journal.file.0.try_clone().unwrap();
        drop(journal);
        assert!(JournalFile::open(&path).is_ok());
    }

    #[test]
    fn damage_in_the_middle_is_an_error_even_in_a_length() {
        let (_dir, path) = journal_with(&[b"prepared", b"committed"]);
        let good = std::fs::read(&path).unwrap();
        for at in 0..FRAME + 8 {
            for flip in [0x01, 0x80] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                std::fs::write(&path, &bytes).unwrap();
                assert!(matches!(JournalFile::read_all(&path), Err(BlockError::Journal { .. })), "byte {at}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_torn_tail_is_cut_and_the_rest_is_kept(cut in 1usize..=FRAME + 9, zeroes in 0usize..5000) {
            let (_dir, path) = journal_with(&[b"prepared", b"committed"]);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes.truncate(bytes.len() - cut);
            bytes.resize(bytes.len() + zeroes, 0);
            std::fs::write(&path, &bytes).unwrap();
            prop_assert_eq!(JournalFile::read_all(&path).unwrap(), vec![b"prepared".to_vec()]);
            JournalFile::open(&path).unwrap().append(b"aborted").unwrap();
            let expected = vec![b"prepared".to_vec(), b"aborted".to_vec()];
            prop_assert_eq!(JournalFile::read_all(&path).unwrap(), expected);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(Path::new("journal"), &bytes);
            let mut framed = MAGIC.to_vec();
            framed.extend(bytes);
            let _ = parse(Path::new("journal"), &framed);
        }
    }
}
