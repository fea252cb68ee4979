//! The files of an identity: `<state>/identity/{ca.pem,ca-key.pem,cert.pem,key.pem}`.
//!
//! Lives here: names, rights (0600, directory 0700), whole writes. Never enters: what is in a certificate.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmove_compute::process::protocol::IdentityPaths;

use super::IdentityError;

/// The identity under a state directory.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    dir: PathBuf,
}

impl IdentityFiles {
    /// The identity of the host whose state is in `state`; it need not be there yet.
    pub fn of(state: &Path) -> Self {
        Self { dir: state.join("identity") }
    }

    /// Whether this host has an identity already.
    pub fn exists(&self) -> bool {
        self.paths().key.exists()
    }

    /// The files a VM process needs too.
    pub fn paths(&self) -> IdentityPaths {
        IdentityPaths {
            ca: self.dir.join("ca.pem"),
            cert: self.dir.join("cert.pem"),
            key: self.dir.join("key.pem"),
        }
    }

    /// Key of the cluster's authority; only on the host that made the cluster.
    pub fn ca_key(&self) -> PathBuf {
        self.dir.join("ca-key.pem")
    }

    /// Makes the directory.
    pub fn create_dir(&self) -> Result<(), IdentityError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(|e| IdentityError::io("create", &self.dir, e))
    }

    /// Reads one file as text.
    pub fn read(path: &Path) -> Result<String, IdentityError> {
        fs::read_to_string(path).map_err(|e| IdentityError::io("read", path, e))
    }
}

/// Writes a file that only its owner may read, whole or not at all, and syncs it.
pub fn write_private(path: &Path, text: &str) -> Result<(), IdentityError> {
    let beside = path.with_extension(format!("{}.tmp", uuid::Uuid::new_v4()));
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        match path.parent() {
            Some(parent) => File::open(parent)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|e| {
        // Best effort: the name is unique, a left-over hurts nobody.
        let _ = fs::remove_file(&beside);
        IdentityError::io("write", path, e)
    })
}
