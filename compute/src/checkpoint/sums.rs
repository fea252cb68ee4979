//! Sparse files with a checksum for each chunk that is not zero: how checkpoints are measured, copied and sent.
//!
//! The sums do not depend on where a file system has holes: a chunk of zeroes has no sum, wherever it is stored. Lives here: files in
//! and out. Never enters: what is in them.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use serde::{Deserialize, Serialize};

use super::CheckpointError;
use crate::memory::is_zero;

/// Bytes under one sum.
pub const CHUNK: u64 = 1 << 20;
/// Zeroes of this length and alignment are not written.
const HOLE: usize = 4096;
/// Longest file, bytes: 1 PiB.
const MAX_BYTES: u64 = 1 << 50;

/// BLAKE3 of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkSum {
    /// Number of the chunk.
    pub index: u64,
    /// BLAKE3 of its bytes.
    pub sum: [u8; 32],
}

/// Length of a file and the sums of all its chunks that are not zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSums {
    /// Length of the file.
    pub bytes: u64,
    /// Chunks with data, by rising number.
    pub chunks: Vec<ChunkSum>,
    /// BLAKE3 over length, numbers and sums.
    pub whole: [u8; 32],
}

impl FileSums {
    /// Measures a file; holes are not read.
    pub fn of(path: &Path) -> Result<Self, CheckpointError> {
        let failed = |e: io::Error| CheckpointError::io("read", path, e);
        let file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let mut chunks = Vec::new();
        let mut buffer = vec![0; CHUNK as usize];
        let mut index = 0;
        while let Some(next) = next_data(&file, index * CHUNK, bytes).map_err(failed)? {
            index = next / CHUNK;
            let chunk = &mut buffer[..length_of(index, bytes)];
            file.read_exact_at(chunk, index * CHUNK).map_err(failed)?;
            if !is_zero(chunk) {
                chunks.push(ChunkSum { index, sum: *blake3::hash(chunk).as_bytes() });
            }
            index += 1;
        }
        let mut sums = Self { bytes, chunks, whole: [0; 32] };
        sums.whole = sums.digest();
        Ok(sums)
    }

    /// Bytes in chunks with data.
    pub fn data_bytes(&self) -> u64 {
        self.chunks.iter().map(|chunk| length_of(chunk.index, self.bytes) as u64).sum()
    }

    /// Refuses sums that no file has, or that do not agree with each other.
    pub fn check(&self, what: &str) -> Result<(), CheckpointError> {
        let rising = self.chunks.windows(2).all(|pair| pair[0].index < pair[1].index);
        let inside = self.chunks.last().is_none_or(|last| last.index < self.bytes.div_ceil(CHUNK));
        if self.bytes > MAX_BYTES || !rising || !inside || self.whole != self.digest() {
            return Err(CheckpointError::Damaged(format!("the sums of {what} contradict themselves")));
        }
        Ok(())
    }

    fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.bytes.to_le_bytes());
        for chunk in &self.chunks {
            hasher.update(&chunk.index.to_le_bytes());
            hasher.update(&chunk.sum);
        }
        *hasher.finalize().as_bytes()
    }

    /// Reads all chunks with data from `path` and gives each, checked, to `take` with its offset. That all else is zero is checked
    /// too, and that the length is right.
    pub fn read(
        &self,
        path: &Path,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let failed = |e: io::Error| CheckpointError::io("read", path, e);
        let file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        if bytes != self.bytes {
            return Err(CheckpointError::Damaged(format!(
                "{} has {bytes} bytes, {} were written",
                path.display(),
                self.bytes
            )));
        }
        let mut buffer = vec![0; CHUNK as usize];
        let mut known = self.chunks.iter().peekable();
        let mut index = 0;
        loop {
            let found = next_data(&file, index * CHUNK, bytes).map_err(failed)?.map(|at| at / CHUNK);
            // A chunk with a sum must be there; one with data and no sum must be zero.
            let expected = known.peek().map(|chunk| chunk.index);
            let Some(next) = [found, expected].into_iter().flatten().min() else { return Ok(()) };
            let chunk = &mut buffer[..length_of(next, bytes)];
            file.read_exact_at(chunk, next * CHUNK).map_err(failed)?;
            let good = if expected == Some(next) {
                known.next().is_some_and(|known| known.sum == *blake3::hash(chunk).as_bytes())
            } else {
                is_zero(chunk)
            };
            if !good {
                return Err(damaged(path, next));
            }
            if expected == Some(next) {
                take(next * CHUNK, chunk)?;
            }
            index = next + 1;
        }
    }

    /// Copies a file into a new one, every byte checked, zeroes as holes; synced.
    pub fn copy(&self, from: &Path, to: &Path) -> Result<(), CheckpointError> {
        let mut copy = SparseFile::create(to, self.bytes)?;
        self.read(from, |at, chunk| copy.write(at, chunk))?;
        copy.finish()
    }
}

/// A new file that gets only what is not zero.
#[derive(Debug)]
pub struct SparseFile<'a> {
    file: File,
    path: &'a Path,
}

impl<'a> SparseFile<'a> {
    /// Makes a file of this length; one that is there is an error.
    pub fn create(path: &'a Path, bytes: u64) -> Result<Self, CheckpointError> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|e| CheckpointError::io("create", path, e))?;
        file.set_len(bytes).map_err(|e| CheckpointError::io("create", path, e))?;
        Ok(Self { file, path })
    }

    /// Writes bytes at an offset; stretches of zeroes stay holes.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let mut from = 0;
        while from < bytes.len() {
            let rest = bytes[from..].chunks(HOLE);
            let zero: usize = rest.clone().take_while(|part| is_zero(part)).map(<[u8]>::len).sum();
            from += zero;
            let data: usize =
                bytes[from..].chunks(HOLE).take_while(|part| !is_zero(part)).map(<[u8]>::len).sum();
            self.file
                .write_all_at(&bytes[from..from + data], at + from as u64)
                .map_err(|e| CheckpointError::io("write", self.path, e))?;
            from += data;
        }
        Ok(())
    }

    /// Everything is on stable storage when this returns.
    pub fn finish(self) -> Result<(), CheckpointError> {
        self.file.sync_all().map_err(|e| CheckpointError::io("sync", self.path, e))
    }
}

/// Takes a file in as it is sent: the chunks of `sums`, one after the other, each checked before it is written.
#[derive(Debug)]
pub struct Arriving<'a> {
    sums: &'a FileSums,
    next: usize,
    pending: Vec<u8>,
    file: SparseFile<'a>,
}

impl<'a> Arriving<'a> {
    /// A new file at `path`.
    pub fn create(path: &'a Path, sums: &'a FileSums) -> Result<Self, CheckpointError> {
        Ok(Self { sums, next: 0, pending: Vec::new(), file: SparseFile::create(path, sums.bytes)? })
    }

    /// The next bytes of the stream.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), CheckpointError> {
        while !bytes.is_empty() {
            let Some(chunk) = self.sums.chunks.get(self.next) else {
                return Err(CheckpointError::Damaged(format!(
                    "too much was sent for {}",
                    self.file.path.display()
                )));
            };
            let length = length_of(chunk.index, self.sums.bytes);
            let part = bytes.len().min(length - self.pending.len());
            self.pending.extend_from_slice(&bytes[..part]);
            bytes = &bytes[part..];
            if self.pending.len() == length {
                if chunk.sum != *blake3::hash(&self.pending).as_bytes() {
                    return Err(damaged(self.file.path, chunk.index));
                }
                self.file.write(chunk.index * CHUNK, &self.pending)?;
                self.pending.clear();
                self.next += 1;
            }
        }
        Ok(())
    }

    /// The end of the stream: all must have come.
    pub fn finish(self) -> Result<(), CheckpointError> {
        if self.next < self.sums.chunks.len() {
            return Err(CheckpointError::Damaged(format!("{} broke off", self.file.path.display())));
        }
        self.file.finish()
    }
}

fn damaged(path: &Path, index: u64) -> CheckpointError {
    CheckpointError::Damaged(format!("{} is damaged behind byte {}", path.display(), index * CHUNK))
}

fn length_of(index: u64, bytes: u64) -> usize {
    CHUNK.min(bytes.saturating_sub(index * CHUNK)) as usize
}

/// The first byte at or behind `from` that is not in a hole.
fn next_data(file: &File, from: u64, bytes: u64) -> io::Result<Option<u64>> {
    if from >= bytes {
        return Ok(None);
    }
    match lseek(file, from as i64, Whence::SeekData) {
        Ok(at) => Ok(Some(at as u64).filter(|at| *at < bytes)),
        // lseek(2): no data behind `from`.
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use proptest::prelude::*;

    use super::*;

    /// A file as it is sent: its chunks that are not zero, in order.
    fn stream(path: &Path, sums: &FileSums) -> Vec<u8> {
        let mut out = Vec::new();
        sums.read(path, |_, chunk| {
            out.extend_from_slice(chunk);
            Ok(())
        })
        .unwrap();
        out
    }

    fn sparse(path: &Path, bytes: u64, parts: &[(u64, Vec<u8>)]) -> FileSums {
        let file = File::create(path).unwrap();
        file.set_len(bytes).unwrap();
        for (at, part) in parts {
            file.write_all_at(part, *at).unwrap();
        }
        FileSums::of(path).unwrap()
    }

    #[test]
    fn copies_are_equal_checked_and_thin() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to, sent) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        let parts = [(3 * CHUNK + 77, vec![7; 5000]), (64 * CHUNK, vec![8; 100]), (9 * CHUNK, vec![0; 9000])];
        let sums = sparse(&from, 64 * CHUNK + 100, &parts);
        assert_eq!(sums.chunks.iter().map(|c| c.index).collect::<Vec<_>>(), [3, 64], "zeroes have no sum");
        assert_eq!(sums.data_bytes(), CHUNK + 100);
        sums.check("a").unwrap();
        sums.copy(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 100_000);
        assert_eq!(FileSums::of(&to).unwrap(), sums);
        assert!(sums.copy(&from, &to).is_err(), "there is a file");
        let stream = stream(&from, &sums);
        let mut arriving = Arriving::create(&sent, &sums).unwrap();
        stream.chunks(70_000).for_each(|part| arriving.push(part).unwrap());
        arriving.finish().unwrap();
        assert_eq!(FileSums::of(&sent).unwrap(), sums);
    }

    #[test]
    fn what_is_not_the_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let sums = sparse(&path, 4 * CHUNK, &[(CHUNK, vec![7; 10])]);
        let read = || sums.read(&path, |_, _| Ok(()));
        read().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        for (at, byte) in [(CHUNK + 3, 6), (2 * CHUNK, 1)] {
            file.write_all_at(&[byte], at).unwrap();
            assert!(matches!(read(), Err(CheckpointError::Damaged(_))), "{at}");
            file.write_all_at(&[if at == CHUNK + 3 { 7 } else { 0 }], at).unwrap();
            read().unwrap();
        }
        file.set_len(4 * CHUNK - 1).unwrap();
        assert!(read().is_err(), "torn");
        file.set_len(0).unwrap();
        file.set_len(4 * CHUNK).unwrap();
        assert!(read().is_err(), "data lost");
    }

    #[test]
    fn a_stream_that_is_not_the_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let sums = sparse(&path, 2 * CHUNK, &[(0, vec![7; 10])]);
        let mut stream = stream(&path, &sums);
        let arrive = |name: &str, bytes: &[u8]| {
            let to = dir.path().join(name);
            let mut arriving = Arriving::create(&to, &sums)?;
            arriving.push(bytes).and_then(|()| arriving.finish())
        };
        arrive("good", &stream).unwrap();
        assert!(arrive("short", &stream[1..]).is_err());
        let mut bad = stream.clone();
        bad[5] ^= 1;
        assert!(arrive("bad", &bad).is_err());
        stream.push(0);
        assert!(arrive("long", &stream).is_err());
    }

    proptest! {
        #[test]
        fn any_contradiction_is_found(bytes in any::<u64>(), index in any::<u64>(), twice in any::<bool>()) {
            let chunk = ChunkSum { index, sum: [1; 32] };
            let chunks = if twice { vec![chunk, chunk] } else { vec![chunk] };
            let mut sums = FileSums { bytes, chunks, whole: [0; 32] };
            prop_assert!(sums.check("x").is_err());
            sums.whole = sums.digest();
            let possible = !twice && bytes <= MAX_BYTES && index < bytes.div_ceil(CHUNK);
            prop_assert_eq!(sums.check("x").is_ok(), possible);
        }
    }
}
