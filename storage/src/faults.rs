//! A disk that fails when a test wants it to.
//!
//! `VMOVE_FAULTS` names a directory. An operation on an image's file fails while there is a file of that name in the directory: the
//! image's path with `%` for each `/`, and `.read`, `.write` or `.sync` behind it. It holds three numbers: the system's error number,
//! and the first byte of the image's file that cannot be used, and the first that can be again. Without the variable nothing happens.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

static DIR: OnceLock<Option<PathBuf>> = OnceLock::new();

/// The error that a test wants for `operation` on `len` bytes from `offset` of the file at `image`.
pub fn check(image: &Path, operation: &str, offset: u64, len: u64) -> io::Result<()> {
    let Some(dir) = DIR.get_or_init(|| std::env::var_os("VMOVE_FAULTS").map(PathBuf::from)) else {
        return Ok(());
    };
    let name = format!("{}.{operation}", image.display().to_string().replace('/', "%"));
    let Ok(text) = std::fs::read_to_string(dir.join(name)) else { return Ok(()) };
    let mut numbers = text.split_whitespace().map_while(|word| word.parse::<u64>().ok());
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(error), Some(from), Some(to)) if offset < to && offset.saturating_add(len) > from => {
            Err(io::Error::from_raw_os_error(error as i32))
        }
        _ => Ok(()),
    }
}
