//! The one error type of this crate: what was tried, on which file, and why it did not work.

use std::io;
use std::path::{Path, PathBuf};

use crate::header::HeaderError;

/// Result of every fallible operation of this crate.
pub type Result<T> = std::result::Result<T, BlockError>;

/// What can go wrong with images, datastores and their companion files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The operating system refused an operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "open", "read from", ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A request reaches past the end of the virtual disk.
    #[error("request at byte {offset}, {len} bytes long, is outside of {} ({size} bytes)", path.display())]
    OutOfRange {
        /// The image.
        path: PathBuf,
        /// First byte of the request.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Virtual size in bytes.
        size: u64,
    },
    /// A write to an image opened for reading.
    #[error("{} is open for reading only", path.display())]
    ReadOnly {
        /// The image.
        path: PathBuf,
    },
    /// The qcow2 header is not one that can be trusted or served.
    #[error("{} is not a usable qcow2 image: {reason}", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        reason: HeaderError,
    },
    /// The format of an image is not known from its name and was not given.
    #[error("the format of {} is neither given nor known from its extension (.qcow2, .raw, .img)", path.display())]
    UnknownFormat {
        /// The image.
        path: PathBuf,
    },
    /// A backing file that must not, or cannot, be used.
    #[error("backing file {backing:?} of {}: {reason}", path.display())]
    Backing {
        /// The image that names the backing file.
        path: PathBuf,
        /// The name as the image has it.
        backing: String,
        /// Why not.
        reason: String,
    },
    /// Someone else has the image open in a way that excludes this use.
    #[error("{} is in use: {conflict}; stop the process that has it open first", path.display())]
    Locked {
        /// The image.
        path: PathBuf,
        /// What the other side holds.
        conflict: &'static str,
    },
    /// The ownership stamp beside the image forbids this use.
    #[error("{} may not be opened: {reason}", path.display())]
    NotOwner {
        /// The image.
        path: PathBuf,
        /// What the stamp says against what was asked.
        reason: String,
    },
    /// A companion file (stamp, datastore identity) does not parse.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The companion file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A VM or disk name that cannot be part of a path.
    #[error("{name:?} is no valid {what} name: {reason}")]
    BadName {
        /// "VM", "disk" or "datastore".
        what: &'static str,
        /// The name.
        name: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// A specification that no image can have.
    #[error("cannot create {}: {reason}", path.display())]
    BadSpec {
        /// The image to be.
        path: PathBuf,
        /// What is wrong with the specification.
        reason: String,
    },
    /// A journal that has a bad record before its last one, or a record over the caps.
    #[error("journal {} at byte {offset}: {reason}", path.display())]
    Journal {
        /// The journal.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// An earlier sync failed, so the kernel may have dropped written data; nothing later can be promised.
    #[error("an earlier sync of {} failed; its contents can only be trusted after reopening and checking it", path.display())]
    SyncLost {
        /// The image.
        path: PathBuf,
    },
}

impl BlockError {
    /// Wraps a system error for `action` on `path`.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    /// The kind of the system error inside, if there is one.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    /// The system's error number, if there is one.
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the disk or quota below is full, which an operator can mend while the guest waits.
    pub fn is_no_space(&self) -> bool {
        matches!(self.io_kind(), Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}
