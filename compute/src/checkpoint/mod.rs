//! Checkpoints: RAM, device state and disks of one moment, in files, and a machine made from them again.
//!
//! | file of a checkpoint's directory | |
//! |---|---|
//! | `checkpoint` | what it is, the saved state, sums of all others ([`manifest`]); written last |
//! | `ram` | the guest's RAM, holes where it holds zeroes |
//! | `disk-0`, `disk-1`, ... | images, in the order of the definition |
//! | `kernel`, `initrd` | for the guest's next reboot |
//!
//! The state is the move's own (`migrate::state`), and the disks are copied by the move's own mirror, live, into images that nobody
//! ever runs on. Lives here: the files, taking, loading. Never enters: which datastore, whose VM.

mod load;
pub mod manifest;
pub mod sums;
mod take;

use std::{
    io,
    path::{Path, PathBuf},
};

pub use load::load;
pub use manifest::Manifest;
pub use take::{Taking, TakingEnd};

use crate::migrate::MoveError;

/// Why a checkpoint was not taken, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The files are not what was written.
    #[error("the checkpoint cannot be used: {0}")]
    Damaged(String),
    /// The machine, its disks or their mirrors.
    #[error(transparent)]
    Machine(#[from] MoveError),
    /// Given up before it was complete.
    #[error("{0}")]
    GivenUp(String),
}

impl CheckpointError {
    fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { what, path: path.to_owned(), source }
    }
}

/// Reads what a checkpoint's directory says of itself.
pub fn read_manifest(dir: &Path) -> Result<Manifest, CheckpointError> {
    let path = dir.join(manifest::MANIFEST);
    let file = std::fs::File::open(&path).map_err(|e| CheckpointError::io("open", &path, e))?;
    Manifest::decode(io::BufReader::new(file))
}
