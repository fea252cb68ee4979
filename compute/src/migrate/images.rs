//! Images of arriving disks: made with the source's structure, stamped, removed when the move does not commit.
//!
//! Lives here: files and stamps on this host. Never enters: their contents.

use std::{fs, io::ErrorKind, path::Path};

use vmove_storage::{BlockError, ImageFormat, ImageSpec, OpenOptions, OwnerState, Stamp};

use super::MoveError;
use crate::process::protocol::{DiskFormat, ImageShape};

/// The storage's name for a format.
pub fn format(format: DiskFormat) -> ImageFormat {
    match format {
        DiskFormat::Qcow2 => ImageFormat::Qcow2,
        DiskFormat::Raw => ImageFormat::Raw,
    }
}

/// How an image that is being filled is opened: nobody owns it yet.
pub fn filling(shape: &ImageShape) -> OpenOptions {
    OpenOptions { format: Some(format(shape.format)), ..OpenOptions::default() }
}

/// Makes an empty image of this shape, stamped as incoming for `vm` at `generation`. A file that is there already is not touched.
pub fn make(path: &Path, shape: &ImageShape, vm: &str, generation: u64) -> Result<(), MoveError> {
    let disk = |e: BlockError| MoveError::disk(&shape.name)(e);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(MoveError::io(format!("make directory {}", dir.display())))?;
    }
    // What an earlier attempt of this VM left behind after a crash is rubbish; anything else is somebody's.
    if let Ok(Some(stamp)) = Stamp::read(path)
        && stamp.vm == vm
        && matches!(stamp.state, OwnerState::Incoming | OwnerState::Stale)
        && stamp.generation <= generation
    {
        remove(path);
    }
    if path.exists() {
        let exists = std::io::Error::from_raw_os_error(libc::EEXIST);
        return Err(MoveError::io(format!("make image {}", path.display()))(exists));
    }
    let spec = ImageSpec {
        format: format(shape.format),
        virtual_bytes: shape.virtual_bytes,
        cluster_bytes: if shape.cluster_bytes == 0 { 64 << 10 } else { shape.cluster_bytes },
        backing: None,
    };
    // The stamp first: whatever is found without one is not ours to remove.
    stamp(path, vm, generation, OwnerState::Incoming).map_err(disk)?;
    vmove_storage::create(path, &spec).map_err(|error| {
        if let Err(left) = Stamp::remove(path) {
            tracing::warn!(error = %left, "a stamp cannot be removed");
        }
        disk(error)
    })
}

/// Removes what [`make`] made for an arrival that does not come. An image that anybody else stamped, or nobody, is not touched.
pub fn discard(path: &Path, vm: &str, generation: u64) {
    let ours = |s: Stamp| s.vm == vm && s.generation == generation && s.state == OwnerState::Incoming;
    if Stamp::read(path).is_ok_and(|stamp| stamp.is_some_and(ours)) {
        remove(path);
    }
}

/// Stamps an image.
pub fn stamp(path: &Path, vm: &str, generation: u64, state: OwnerState) -> Result<(), BlockError> {
    Stamp { vm: vm.to_owned(), generation, state }.write(path)
}

/// Removes an image and its stamp, and its directory if that is empty then. What cannot be removed is logged: it is stamped as
/// nobody's and the next attempt removes it.
pub fn remove(path: &Path) {
    let gone = |result: std::io::Result<()>| match result {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), error = %e, "an image cannot be removed");
        }
        _ => {}
    };
    gone(fs::remove_file(path));
    if let Err(error) = Stamp::remove(path) {
        tracing::warn!(%error, "a stamp cannot be removed");
    }
    if let Some(dir) = path.parent() {
        // Not empty: other disks of the VM are there.
        let _ = fs::remove_dir(dir);
    }
}
