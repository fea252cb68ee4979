//! Small files that must be there, whole, after a power cut: written beside, synced, renamed, directory synced.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{BlockError, Result};

/// Cap on the size of a companion file, in bytes. They are a few hundred; more is not one of ours.
const MAX_COMPANION: u64 = 64 * 1024;

/// Replaces `path` with `bytes`, durably and at once: a crash leaves the old contents or the new.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = beside(path);
    let write = || -> Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&beside)
            .map_err(|e| BlockError::io("create", &beside, e))?;
        file.write_all(bytes).map_err(|e| BlockError::io("write", &beside, e))?;
        file.sync_all().map_err(|e| BlockError::io("sync", &beside, e))?;
        fs::rename(&beside, path).map_err(|e| BlockError::io("replace", path, e))
    };
    write().inspect_err(|_| {
        // Best effort: the name is unique, a left-over hurts nobody.
        let _ = fs::remove_file(&beside);
    })?;
    sync_parent(path)
}

/// Reads a companion file; `None` if there is none.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(BlockError::io("open", path, e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_COMPANION + 1).read_to_end(&mut bytes).map_err(|e| BlockError::io("read", path, e))?;
    if bytes.len() as u64 > MAX_COMPANION {
        let reason = format!("larger than {MAX_COMPANION} bytes");
        return Err(BlockError::Damaged { path: path.to_path_buf(), reason });
    }
    Ok(Some(bytes))
}

/// Makes the creation, renaming or removal of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(parent).map_err(|e| BlockError::io("open", parent, e))?;
    directory.sync_all().map_err(|e| BlockError::io("sync", parent, e))
}

/// `path` with `suffix` after its whole name, extension included.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    PathBuf::from(name)
}

fn beside(path: &Path) -> PathBuf {
    with_suffix(path, &format!(".{}.tmp", uuid::Uuid::new_v4()))
}
