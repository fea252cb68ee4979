//! Locks on image files that QEMU and its tools respect, and that two processes of this project respect.
//!
//! QEMU (`block/file-posix.c`) keeps shared OFD locks on single bytes of the file: byte 100 + p while it uses
//! permission p, byte 200 + p while it does not let others use p, and looks for the opposite byte of everybody
//! else. The permissions are those of `include/block/block-common.h`. The lock lives on a descriptor of its own, so
//! that it ends when dropped, whatever a ring still keeps of the file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::error::{BlockError, Result};

/// Byte for permission 0 in use (QEMU's `RAW_LOCK_PERM_BASE`).
const USED_BASE: i64 = 100;
/// Byte for permission 0 withheld (QEMU's `RAW_LOCK_SHARED_BASE`).
const WITHHELD_BASE: i64 = 200;

/// Bit numbers of QEMU's permissions.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;

/// What the holder does with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Reads, together with other readers; nobody writes.
    Read,
    /// Reads and writes; nobody else writes, or reads without saying that it does not mind (`qemu-img -U`).
    Write,
}

impl LockMode {
    fn used(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }

    fn withheld(self) -> &'static [i64] {
        match self {
            Self::Read => &[WRITE, RESIZE],
            // Not CONSISTENT_READ, like a guest of QEMU: a reader that asks for no lock (`qemu-img -U`) may look.
            Self::Write => &[WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }
}

/// A held lock; dropping it releases it.
#[derive(Debug)]
pub struct ImageLock {
    file: File,
    mode: LockMode,
}

impl ImageLock {
    /// Locks the image at `path`, at once or not at all.
    ///
    /// # Errors
    /// [`BlockError::Locked`] when someone else's use conflicts; an I/O error when the file system has no locks.
    pub fn take(path: &Path, mode: LockMode) -> Result<Self> {
        let file = File::open(path).map_err(|e| BlockError::io("open", path, e))?;
        let io_error = |e| BlockError::io("lock", path, e);
        // As QEMU does: first claim, then look. Of two that race, one at least sees the other.
        for &bit in mode.used() {
            control(&file, libc::F_OFD_SETLK, libc::F_RDLCK, USED_BASE + bit).map_err(io_error)?;
        }
        for &bit in mode.withheld() {
            control(&file, libc::F_OFD_SETLK, libc::F_RDLCK, WITHHELD_BASE + bit).map_err(io_error)?;
        }
        let locked = |conflict| BlockError::Locked { path: path.to_path_buf(), conflict };
        for &bit in mode.used() {
            if held_by_others(&file, WITHHELD_BASE + bit).map_err(io_error)? {
                return Err(locked("another process has it open and does not share it"));
            }
        }
        for &bit in mode.withheld() {
            if held_by_others(&file, USED_BASE + bit).map_err(io_error)? {
                return Err(locked("another process is writing to it"));
            }
        }
        Ok(Self { file, mode })
    }

    /// What was locked.
    pub fn mode(&self) -> LockMode {
        self.mode
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // Closing releases too, unless a child process still has a copy of the descriptor.
        for base in [USED_BASE, WITHHELD_BASE] {
            for bit in [CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE] {
                let _ = control(&self.file, libc::F_OFD_SETLK, libc::F_UNLCK, base + bit);
            }
        }
    }
}

/// Whether someone else holds any lock on `byte`.
fn held_by_others(file: &File, byte: i64) -> io::Result<bool> {
    // Asking for an exclusive lock reports shared holders; locks of this very description are not reported.
    Ok(control(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)? != libc::F_UNLCK)
}

/// One OFD lock command on one byte; returns the lock type the kernel left in the structure.
fn control(file: &File, command: i32, kind: i32, byte: i64) -> io::Result<i32> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0, // OFD commands ask for 0.
    };
    loop {
        // SAFETY: an open descriptor and a valid `flock`, which the kernel reads and for GETLK writes.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == 0 {
            return Ok(i32::from(lock.l_type));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_writers_do_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let take = |mode| ImageLock::take(file.path(), mode);
        let reader = take(LockMode::Read).unwrap();
        let other = take(LockMode::Read).unwrap();
        let error = take(LockMode::Write).unwrap_err().to_string();
        assert!(error.contains(file.path().to_str().unwrap()), "{error}");
        drop((reader, other));
        let writer = take(LockMode::Write).unwrap();
        assert!(matches!(take(LockMode::Read), Err(BlockError::Locked { .. })));
        assert!(matches!(take(LockMode::Write), Err(BlockError::Locked { .. })));
        drop(writer);
        take(LockMode::Write).unwrap();
    }
}
