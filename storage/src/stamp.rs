//! The ownership stamp beside an image: which VM it belongs to, at which generation, and in what state.
//!
//! Locks keep two processes on one host apart; the stamp keeps an image that was moved away from being started
//! again, and a half-copied one from being started at all. It is written whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable;
use crate::error::{BlockError, Result};

/// What an image is to its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnerState {
    /// Being copied here; not usable before the commit.
    Incoming,
    /// The VM's disk.
    Owned,
    /// Was the VM's disk; the VM went on elsewhere.
    Stale,
}

/// Contents of a stamp.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    /// Name of the VM.
    pub vm: String,
    /// Generation of ownership; each committed move adds one.
    pub generation: u64,
    /// What the image is.
    pub state: OwnerState,
}

impl Stamp {
    /// Where the stamp of `image` is: `<image>.owner`.
    pub fn path_of(image: &Path) -> PathBuf {
        durable::with_suffix(image, ".owner")
    }

    /// Reads the stamp of `image`; `None` if it has none.
    pub fn read(image: &Path) -> Result<Option<Self>> {
        let path = Self::path_of(image);
        let Some(bytes) = durable::read(&path)? else { return Ok(None) };
        let stamp = serde_json::from_slice(&bytes)
            .map_err(|e| BlockError::Damaged { path, reason: e.to_string() })?;
        Ok(Some(stamp))
    }

    /// Writes the stamp of `image`, durably and at once.
    pub fn write(&self, image: &Path) -> Result<()> {
        let path = Self::path_of(image);
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| BlockError::Damaged { path: path.clone(), reason: e.to_string() })?;
        durable::replace(&path, &bytes)
    }

    /// Removes the stamp of `image`; none to remove is no error.
    pub fn remove(image: &Path) -> Result<()> {
        let path = Self::path_of(image);
        match fs::remove_file(&path) {
            Ok(()) => durable::sync_parent(&path),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(BlockError::io("remove", &path, e)),
        }
    }

    /// Refuses `image` for `vm` at `generation` when its stamp is another VM's, newer, incoming or stale. An image
    /// without a stamp was never part of a move and is nobody's in particular.
    pub fn permits(image: &Path, vm: &str, generation: u64) -> Result<()> {
        let Some(stamp) = Self::read(image)? else { return Ok(()) };
        let reason = if stamp.vm != vm {
            format!("it belongs to VM {:?}, not to {vm:?}", stamp.vm)
        } else if stamp.generation > generation {
            format!(
                "it is at generation {}, this host knows only {generation}: the VM has moved since",
                stamp.generation
            )
        } else {
            match stamp.state {
                OwnerState::Owned => return Ok(()),
                OwnerState::Incoming => "it is the unfinished target of a move".to_owned(),
                OwnerState::Stale => {
                    format!("it is stale: VM {vm:?} moved away from it at generation {}", stamp.generation)
                }
            }
        };
        Err(BlockError::NotOwner { path: image.to_path_buf(), reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owner_at_a_current_generation_may_open() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.qcow2");
        let stamp = |vm: &str, generation, state| Stamp { vm: vm.to_owned(), generation, state };
        Stamp::permits(&image, "web", 1).unwrap();
        stamp("web", 3, OwnerState::Owned).write(&image).unwrap();
        Stamp::permits(&image, "web", 3).unwrap();
        Stamp::permits(&image, "web", 4).unwrap();
        let refusal = |vm, generation| Stamp::permits(&image, vm, generation).unwrap_err().to_string();
        assert!(refusal("web", 2).contains("generation 3"));
        assert!(refusal("db", 3).contains("belongs to VM \"web\""));
        stamp("web", 3, OwnerState::Stale).write(&image).unwrap();
        assert!(refusal("web", 3).contains("stale"));
        stamp("web", 4, OwnerState::Incoming).write(&image).unwrap();
        assert!(refusal("web", 4).contains("unfinished"));
        assert_eq!(Stamp::read(&image).unwrap(), Some(stamp("web", 4, OwnerState::Incoming)));
        Stamp::remove(&image).unwrap();
        Stamp::remove(&image).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "no temporary file stays behind");
    }

    #[test]
    fn a_damaged_stamp_is_an_error_not_a_missing_one() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.qcow2");
        fs::write(Stamp::path_of(&image), b"{\"vm\":").unwrap();
        assert!(matches!(Stamp::permits(&image, "web", 1), Err(BlockError::Damaged { .. })));
    }
}
