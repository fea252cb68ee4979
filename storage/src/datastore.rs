//! A datastore: a directory of VM disks that an agent was given, known by an id of its own.
//!
//! Two hosts that mount the same directory see the same id, which is how a move learns that nothing needs to be
//! copied. Names that reach a path here are checked; what never enters: contents of images.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::durable;
use crate::error::{BlockError, Result};
use crate::image::ImageFormat;

/// File that carries the identity.
const IDENTITY: &str = ".vmove-datastore.json";
/// Bytes a directory must have room for to become a datastore: as many as a file system may give away at once.
const PROBE: usize = 64 << 10;
/// Longest name of a VM, disk or datastore, in bytes.
const MAX_NAME: usize = 64;

/// An open datastore.
#[derive(Clone, Debug)]
pub struct Datastore {
    name: String,
    path: PathBuf,
    id: Uuid,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    id: Uuid,
}

impl Datastore {
    /// Opens the directory at `path` as datastore `name`, giving it an id if it has none yet.
    ///
    /// # Errors
    /// When the name is not valid, the directory is not there or not writable, or its identity file is damaged.
    pub fn open(name: &str, path: &Path) -> Result<Self> {
        check_name("datastore", name)?;
        let path = fs::canonicalize(path).map_err(|e| BlockError::io("open datastore", path, e))?;
        let identity = path.join(IDENTITY);
        // Another agent may come with an id of its own at the same time: whoever links first wins, all read it.
        let bytes = match durable::read(&identity)? {
            Some(bytes) => bytes,
            None => create_identity(&identity)?,
        };
        let Identity { id } = serde_json::from_slice(&bytes)
            .map_err(|e| BlockError::Damaged { path: identity, reason: e.to_string() })?;
        let datastore = Self { name: name.to_owned(), path, id };
        datastore.probe_writable()?;
        Ok(datastore)
    }

    /// Whether the directory at `path` can become a datastore: there, writable, and with room to write. Nothing is left of the trial.
    /// Gives the path with all links resolved.
    ///
    /// # Errors
    /// When it cannot.
    pub fn probe(path: &Path) -> Result<PathBuf> {
        let path = fs::canonicalize(path).map_err(|e| BlockError::io("open datastore", path, e))?;
        let probe = path.join(format!(".vmove-probe-{}", Uuid::new_v4()));
        let error = |e| BlockError::io("write to datastore", &path, e);
        let written = fs::write(&probe, [0; PROBE]).and_then(|()| fs::File::open(&probe)?.sync_all());
        let removed = fs::remove_file(&probe);
        written.and(removed).map_err(error)?;
        Ok(path)
    }

    /// Name the agent knows it by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Identity, the same on every host that mounts it.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Space an unprivileged process may still use, in bytes.
    pub fn free_bytes(&self) -> Result<u64> {
        let stat = statvfs(&self.path).map_err(|e| self.stat_error(e))?;
        Ok(stat.blocks_available() * stat.fragment_size())
    }

    /// Size of the file system, in bytes.
    pub fn total_bytes(&self) -> Result<u64> {
        let stat = statvfs(&self.path).map_err(|e| self.stat_error(e))?;
        Ok(stat.blocks() * stat.fragment_size())
    }

    /// Directory of a VM's disks.
    pub fn vm_path(&self, vm: &str) -> Result<PathBuf> {
        check_name("VM", vm)?;
        Ok(self.path.join(vm))
    }

    /// Where a disk's image is: `<datastore>/<vm>/<disk>.<format>`.
    pub fn image_path(&self, vm: &str, disk: &str, format: ImageFormat) -> Result<PathBuf> {
        check_name("disk", disk)?;
        Ok(self.vm_path(vm)?.join(format!("{disk}.{}", format.name())))
    }

    /// Makes the directory of a VM; one that is there already is no error.
    pub fn create_vm_dir(&self, vm: &str) -> Result<PathBuf> {
        let path = self.vm_path(vm)?;
        match fs::create_dir(&path) {
            Ok(()) => durable::sync_parent(&path)?,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(e) => return Err(BlockError::io("create", &path, e)),
        }
        Ok(path)
    }

    /// Removes the directory of a VM if it is empty; `false` if it is not, or not there.
    pub fn remove_vm_dir_if_empty(&self, vm: &str) -> Result<bool> {
        let path = self.vm_path(vm)?;
        match fs::remove_dir(&path) {
            Ok(()) => durable::sync_parent(&path).map(|()| true),
            Err(e) => match e.kind() {
                std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::NotFound => Ok(false),
                _ => Err(BlockError::io("remove", &path, e)),
            },
        }
    }

    /// Names of the VMs that have a directory here, sorted. Directories with other names are not ours.
    pub fn list_vms(&self) -> Result<Vec<String>> {
        let mut vms = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(|e| BlockError::io("list", &self.path, e))? {
            let entry = entry.map_err(|e| BlockError::io("list", &self.path, e))?;
            let is_dir = entry.file_type().map_err(|e| BlockError::io("list", &self.path, e))?.is_dir();
            if let (true, Some(name)) = (is_dir, entry.file_name().to_str())
                && check_name("VM", name).is_ok()
            {
                vms.push(name.to_owned());
            }
        }
        vms.sort_unstable();
        Ok(vms)
    }

    /// The images of a VM, as (disk, format, path), sorted by disk; none if the VM has no directory here.
    pub fn list_images(&self, vm: &str) -> Result<Vec<(String, ImageFormat, PathBuf)>> {
        let directory = self.vm_path(vm)?;
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(BlockError::io("list", &directory, e)),
        };
        let mut images = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| BlockError::io("list", &directory, e))?.path();
            let disk = path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned);
            if let (Some(disk), Some(format)) = (disk, path.extension().and_then(|e| e.to_str()))
                && let Some(format) = ImageFormat::from_name(format)
                && check_name("disk", &disk).is_ok()
            {
                images.push((disk, format, path));
            }
        }
        images.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(images)
    }

    fn stat_error(&self, error: nix::Error) -> BlockError {
        BlockError::io("ask for the free space of", &self.path, error.into())
    }

    fn probe_writable(&self) -> Result<()> {
        let probe = self.path.join(format!(".vmove-probe-{}", Uuid::new_v4()));
        let error = |e| BlockError::io("write to datastore", &self.path, e);
        fs::write(&probe, b"").map_err(error)?;
        fs::remove_file(&probe).map_err(error)
    }
}

/// Checks a name that becomes part of a path: letters, digits, `.`, `_`, `-`; no leading dot or dash; 1 to 64 bytes.
pub fn check_name(what: &'static str, name: &str) -> Result<()> {
    let bad = |reason| Err(BlockError::BadName { what, name: name.chars().take(80).collect(), reason });
    if name.is_empty() || name.len() > MAX_NAME {
        return bad("it must have 1 to 64 characters");
    }
    if name.starts_with(['.', '-']) {
        return bad("it must not begin with a dot or a dash");
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
        return bad("only letters, digits, '.', '_' and '-' are allowed");
    }
    Ok(())
}

/// Gives the datastore a new id unless someone was faster; returns what is in the file in the end.
fn create_identity(path: &Path) -> Result<Vec<u8>> {
    let identity = Identity { id: Uuid::new_v4() };
    let bytes = serde_json::to_vec_pretty(&identity)
        .map_err(|e| BlockError::Damaged { path: path.to_path_buf(), reason: e.to_string() })?;
    let mine = durable::with_suffix(path, &format!(".{}", identity.id));
    durable::replace(&mine, &bytes)?;
    let linked = fs::hard_link(&mine, path);
    fs::remove_file(&mine).map_err(|e| BlockError::io("remove", &mine, e))?;
    match linked {
        Ok(()) => durable::sync_parent(path)?,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(BlockError::io("create", path, e)),
    }
    let gone = || BlockError::Damaged { path: path.to_path_buf(), reason: "it vanished".to_owned() };
    durable::read(path)?.ok_or_else(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_stays_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let first = Datastore::open("fast", dir.path()).unwrap();
        let again = Datastore::open("other-name", dir.path()).unwrap();
        assert_eq!(first.id(), again.id());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(first.free_bytes().unwrap() <= first.total_bytes().unwrap());
    }

    #[test]
    fn a_trial_leaves_nothing_and_says_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Datastore::probe(dir.path()).unwrap(), dir.path().canonicalize().unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let (file, missing) = (dir.path().join("file"), dir.path().join("missing"));
        fs::write(&file, b"x").unwrap();
        assert!(Datastore::probe(&file).unwrap_err().to_string().contains("Not a directory"));
        assert!(Datastore::probe(&missing).unwrap_err().to_string().contains("No such file"));
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Datastore::open("fast", dir.path()).unwrap();
        for name in ["", ".", "..", "a/b", "-rf", ".hidden", "a b", "a\0", "ä", &"x".repeat(65)] {
            assert!(store.image_path(name, "root", ImageFormat::Raw).is_err(), "{name:?}");
            assert!(store.image_path("vm", name, ImageFormat::Raw).is_err(), "{name:?}");
        }
        let path = store.image_path("web-1", "root.0", ImageFormat::Qcow2).unwrap();
        assert_eq!(path, store.path().join("web-1/root.0.qcow2"));
    }

    #[test]
    fn vm_directories_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Datastore::open("fast", dir.path()).unwrap();
        store.create_vm_dir("web").unwrap();
        store.create_vm_dir("web").unwrap();
        assert_eq!(store.list_vms().unwrap(), ["web"]);
        let image = store.image_path("web", "root", ImageFormat::Raw).unwrap();
        fs::write(&image, b"x").unwrap();
        assert_eq!(store.list_images("web").unwrap(), [("root".to_owned(), ImageFormat::Raw, image.clone())]);
        assert!(!store.remove_vm_dir_if_empty("web").unwrap());
        fs::remove_file(image).unwrap();
        assert!(store.remove_vm_dir_if_empty("web").unwrap());
        assert!(!store.remove_vm_dir_if_empty("web").unwrap());
        assert!(store.list_images("web").unwrap().is_empty());
    }

    #[test]
    fn a_missing_or_damaged_datastore_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Datastore::open("fast", &dir.path().join("none")).is_err());
        fs::write(dir.path().join(IDENTITY), b"{}").unwrap();
        assert!(matches!(Datastore::open("fast", dir.path()), Err(BlockError::Damaged { .. })));
    }
}
