//! Image files at their birth and end: copied in thinly, stamped, removed with all that lies beside them.
//!
//! Lives here: file work on images that no VM has open. Never enters: who may own an image (journal, settle).

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use vmove_storage::{Datastore, ImageFormat, ImageInfo, ImageLock, ImageSpec, LockMode, OwnerState, Stamp};

use super::error::ApiError;
use crate::api::types::{DiskFormat, DiskPlacement};

/// Bytes moved by one read.
const CHUNK: usize = 1 << 20;

/// The storage crate's word for a disk's format.
pub fn format_of(format: DiskFormat) -> ImageFormat {
    match format {
        DiskFormat::Qcow2 => ImageFormat::Qcow2,
        DiskFormat::Raw => ImageFormat::Raw,
    }
}

/// Looks at an image that shall become a disk: complete in itself, whole.
pub fn inspect_source(path: &Path) -> Result<ImageInfo, ApiError> {
    let info = vmove_storage::info(path)?;
    let refuse = |why: String| Err(ApiError::invalid(format!("image {}: {why}", path.display())));
    if let Some(backing) = &info.backing {
        return refuse(format!("it rests on {backing:?}; flatten it first (qemu-img convert)"));
    }
    if info.dirty || info.corrupt {
        return refuse("it was not closed cleanly; run `vmove image check` on it first".to_owned());
    }
    Ok(info)
}

/// Makes the image of a new disk, empty or with the contents of `from`, an image of either format that is not larger. It is stamped as
/// unfinished until [`own`].
pub fn make(path: &Path, vm: &str, spec: &ImageSpec, from: Option<&Path>) -> Result<(), ApiError> {
    if path.exists() {
        return Err(ApiError::conflict(format!("there is a file at {} already", path.display())));
    }
    Stamp { vm: vm.to_owned(), generation: 1, state: OwnerState::Incoming }.write(path)?;
    match from {
        None => Ok(vmove_storage::create(path, spec)?),
        Some(from) => {
            // Nobody may change it meanwhile.
            let _lock = ImageLock::take(from, LockMode::Read)?;
            let info = inspect_source(from)?;
            // An image that is what is wanted keeps its structure, compressed clusters and all.
            if (info.format, info.virtual_bytes) == (spec.format, spec.virtual_bytes)
                && info.internal_snapshots == 0
            {
                copy_sparse(from, path)
            } else {
                Ok(vmove_storage::import(from, info.format, path, spec)?)
            }
        }
    }
}

/// Puts bytes into a raw image that nobody has open; synced.
pub fn fill(path: &Path, bytes: &[u8]) -> Result<(), ApiError> {
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| ApiError::io("write", path, &e))
}

/// Stamps images as the VM's own. The journal says so first: this only carries it to the stamps.
pub fn own(disks: &[DiskPlacement], vm: &str, generation: u64) -> Result<(), ApiError> {
    for disk in disks {
        let stamp = Stamp { vm: vm.to_owned(), generation, state: OwnerState::Owned };
        if Stamp::read(&disk.path)?.as_ref() != Some(&stamp) {
            stamp.write(&disk.path)?;
        }
    }
    Ok(())
}

/// Removes an image and its stamp; what is not there is no error.
pub fn remove(path: &Path) -> Result<(), ApiError> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(ApiError::io("remove", path, &e)),
    }
    Ok(Stamp::remove(path)?)
}

/// Removes the directories of a VM in all datastores, where nothing is in them.
pub fn remove_empty_dirs(stores: &[Datastore], vm: &str) {
    for store in stores {
        if let Err(error) = store.remove_vm_dir_if_empty(vm) {
            tracing::warn!(vm, datastore = store.name(), %error, "cannot remove the VM's directory");
        }
    }
}

/// Copies the data of a file and leaves its holes holes; synced.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<(), ApiError> {
    let mut source = File::open(from).map_err(|e| ApiError::io("open", from, &e))?;
    let mut target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(to)
        .map_err(|e| ApiError::io("create", to, &e))?;
    let read = |e: std::io::Error| ApiError::io("read", from, &e);
    let write = |e: std::io::Error| ApiError::io("write", to, &e);
    let length = source.metadata().map_err(read)?.len();
    target.set_len(length).map_err(write)?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < length {
        // lseek(2): ENXIO = no data behind `at`.
        let start = match lseek(&source, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(read(e.into())),
        };
        let end = lseek(&source, start as i64, Whence::SeekHole).map_err(|e| read(e.into()))? as u64;
        source.seek(SeekFrom::Start(start)).map_err(read)?;
        target.seek(SeekFrom::Start(start)).map_err(write)?;
        let mut left = end.min(length) - start;
        while left > 0 {
            let part = buffer.len().min(left as usize);
            source.read_exact(&mut buffer[..part]).map_err(read)?;
            target.write_all(&buffer[..part]).map_err(write)?;
            left -= part as u64;
        }
        at = end;
    }
    target.sync_all().map_err(write)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn copies_are_equal_and_thin() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        file.write_all_at(&[8; 100], (64 << 20) - 100).unwrap();
        make(&to, "web", &ImageSpec::new(ImageFormat::Raw, 64 << 20), Some(&from)).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        assert_eq!(Stamp::read(&to).unwrap().unwrap().state, OwnerState::Incoming);
        assert!(make(&to, "web", &ImageSpec::new(ImageFormat::Raw, 1), None).is_err(), "taken");
        let disk = DiskPlacement { name: "b".into(), datastore: "x".into(), path: to.clone() };
        own(&[disk], "web", 1).unwrap();
        assert_eq!(Stamp::read(&to).unwrap().unwrap().state, OwnerState::Owned);
        remove(&to).unwrap();
        remove(&to).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn images_with_a_base_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top.qcow2");
        let backing = vmove_storage::BackingSpec { name: "base.raw".into(), format: ImageFormat::Raw };
        let spec = ImageSpec { backing: Some(backing), ..ImageSpec::new(ImageFormat::Qcow2, 1 << 20) };
        vmove_storage::create(&path, &spec).unwrap();
        assert!(inspect_source(&path).unwrap_err().message.contains("flatten"));
    }

    #[test]
    fn an_image_of_another_format_or_size_is_read_and_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let file = File::create(at("a.raw")).unwrap();
        file.set_len((64 << 20) + 100).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        file.write_all_at(&[8; 100], 64 << 20).unwrap();
        let size = (64 << 20) + 512;
        make(&at("b.qcow2"), "web", &ImageSpec::new(ImageFormat::Qcow2, size), Some(&at("a.raw"))).unwrap();
        assert_eq!(vmove_storage::info(&at("b.qcow2")).unwrap().virtual_bytes, size);
        assert!(fs::metadata(at("b.qcow2")).unwrap().blocks() * 512 < 1 << 20);
        assert!(!vmove_storage::check(&at("b.qcow2")).unwrap().has_errors());
        let larger = ImageSpec::new(ImageFormat::Raw, 128 << 20);
        make(&at("c.raw"), "web", &larger, Some(&at("b.qcow2"))).unwrap();
        let (mut wanted, got) = (fs::read(at("a.raw")).unwrap(), fs::read(at("c.raw")).unwrap());
        wanted.resize(128 << 20, 0);
        assert!(wanted == got);
        assert!(fs::metadata(at("c.raw")).unwrap().blocks() * 512 < 1 << 20);
        let smaller =
            make(&at("d.raw"), "web", &ImageSpec::new(ImageFormat::Raw, 1 << 20), Some(&at("a.raw")));
        assert!(smaller.is_err() && !at("d.raw").exists());
    }
}
