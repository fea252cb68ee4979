//! Everything about a VM, its images and its files that would keep it from moving, found before anything is touched, all at once.
//!
//! Lives here: looking at this host's own files. What speaks against a place for the VM is in `plan`. Never enters: other hosts.

use std::io::Read;
use std::path::Path;

use vmove_compute::process::protocol::{ProcessStatus, RunState};
use vmove_storage::{ImageInfo, ImageLock, LockMode, OwnerState, Stamp};

use super::create::check_kernel;
use super::error::ApiError;
use super::vmdir::VmDir;
use super::vms::{VmView, word};
use crate::api::types::{DiskFormat, DiskPlacement, FileDigest, ImageShape, VmState};

/// Bytes of a file read at once.
const CHUNK: usize = 256 << 10;

/// The files that travel with a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The kernel.
    pub kernel: FileDigest,
    /// The initial RAM disk, if it has one.
    pub initrd: Option<FileDigest>,
}

/// What a move has to know of a VM, and what is wrong with it.
#[derive(Debug)]
pub struct Ready {
    /// Structure of its images, in the order of its disks.
    pub shapes: Vec<ImageShape>,
    /// Its files; nothing but zeros where one cannot be read, or where the VM stays on this host.
    pub files: Files,
    /// Everything that stands in the way.
    pub blockers: Vec<String>,
}

/// Looks at a VM's images and, if it is to leave this host, at its files.
pub fn of_vm(status: &ProcessStatus, vm: &VmDir, leaves: bool) -> Result<Ready, ApiError> {
    let mut blockers = Vec::new();
    let shapes = shapes(status, &mut blockers)?;
    let none = || FileDigest { bytes: 0, blake3: "0".repeat(64) };
    let mut files = Files { kernel: none(), initrd: None };
    if leaves {
        let mut seen = |digest: Result<FileDigest, ApiError>| {
            digest.unwrap_or_else(|error| {
                blockers.push(error.message);
                none()
            })
        };
        // The guest at the target has no use for it before it is started again: the time to find out is now.
        let kernel = vm.kernel();
        files.kernel = seen(check_kernel(&kernel).and_then(|()| digest(&kernel)));
        let initrd = vm.initrd();
        files.initrd = initrd.exists().then(|| seen(digest(&initrd)));
    }
    Ok(Ready { shapes, files, blockers })
}

fn shapes(status: &ProcessStatus, blockers: &mut Vec<String>) -> Result<Vec<ImageShape>, ApiError> {
    let mut shapes = Vec::with_capacity(status.disks.len());
    for disk in &status.disks {
        let definition = status.vm.disks.iter().find(|known| known.name == disk.name).ok_or_else(|| {
            ApiError::internal(format!("VM {:?} has no disk {:?}", status.vm.name, disk.name))
        })?;
        let mut shape = ImageShape {
            name: disk.name.clone(),
            format: definition.format,
            virtual_bytes: definition.size_bytes,
            cluster_bytes: if definition.format == DiskFormat::Qcow2 { 65536 } else { 0 },
            allocated_bytes: 0,
        };
        match vmove_storage::info(&disk.path) {
            Ok(info) => {
                shape.virtual_bytes = info.virtual_bytes;
                shape.cluster_bytes = info.cluster_bytes.unwrap_or(0);
                shape.allocated_bytes = info.allocated_bytes;
                let name = &disk.name;
                blockers.extend(image_faults(&info).into_iter().map(|fault| format!("disk {name}: {fault}")));
            }
            Err(error) => blockers.push(format!("disk {}: {error}", disk.name)),
        }
        shapes.push(shape);
    }
    Ok(shapes)
}

/// What of an image a mirror would not carry over.
fn image_faults(info: &ImageInfo) -> Vec<String> {
    let mut faults = Vec::new();
    if let Some(backing) = &info.backing {
        faults.push(format!("its image rests on {backing:?}, which would not come along"));
    }
    if info.internal_snapshots > 0 {
        faults.push(format!(
            "its image holds {} internal snapshots, which would not come along; remove them first (qemu-img snapshot -d)",
            info.internal_snapshots
        ));
    }
    if info.corrupt {
        faults.push("its image is marked as corrupt; see `vmove image check`".to_owned());
    }
    faults
}

/// Files in the way of images to come: anything but the VM's own stale image of an earlier generation, if nobody uses that.
pub fn occupied(places: &[DiskPlacement], vm: &str, generation: u64) -> Result<Vec<String>, ApiError> {
    let mut blockers = Vec::new();
    for place in places {
        let stamp = Stamp::read(&place.path)?;
        if !place.path.exists() && stamp.is_none() {
            continue;
        }
        let stale = |stamp: &Stamp| {
            stamp.vm == vm && stamp.state == OwnerState::Stale && stamp.generation < generation
        };
        if !stamp.as_ref().is_some_and(stale) {
            blockers.push(format!(
                "disk {}: there is a file at {} already; remove it or name another datastore",
                place.name,
                place.path.display()
            ));
        } else if place.path.exists()
            && let Err(error) = ImageLock::take(&place.path, LockMode::Write)
        {
            blockers.push(format!("disk {}: the old image in its place is in use: {error}", place.name));
        }
    }
    Ok(blockers)
}

/// Whether a VM is here and nobody else's, running or not.
pub fn is_this_hosts(view: &VmView) -> bool {
    matches!(view.state, VmState::Running | VmState::Moving | VmState::Stopped | VmState::Failed)
}

/// A VM without a process, as its process would describe it.
pub fn as_if_running(view: &VmView) -> ProcessStatus {
    ProcessStatus {
        state: RunState::Leaving,
        pid: 0,
        generation: view.generation,
        disks: view.disks.clone(),
        vm: view.definition.clone(),
        listening: None,
        incoming: None,
        moving: None,
    }
}

/// Why a VM that does not run, or is on the move, cannot be moved.
pub fn not_running(name: &str, view: &VmView) -> ApiError {
    match view.state {
        VmState::Moving => ApiError::busy(format!(
            "VM {name:?} is on the move already ({})",
            view.moving.as_deref().unwrap_or("its report comes")
        )),
        VmState::Undecided | VmState::Lost => ApiError::undecided(format!(
            "VM {name:?}: {}",
            view.error.as_deref().unwrap_or("its owner is not decided")
        )),
        state => ApiError::conflict(format!(
            "VM {name:?} is {}; only a running VM can be moved{}",
            word(state),
            view.error.as_ref().map_or_else(String::new, |error| format!(" ({error})"))
        )),
    }
}

/// Length and BLAKE3 of a file.
fn digest(path: &Path) -> Result<FileDigest, ApiError> {
    let read = |e: std::io::Error| ApiError::io("read", path, &e);
    let mut file = std::fs::File::open(path).map_err(read)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer).map_err(read)?;
        if n == 0 {
            return Ok(FileDigest { bytes, blake3: hasher.finalize().to_hex().to_string() });
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_old_stale_image_of_the_same_vm_may_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let place =
            DiskPlacement { name: "vda".into(), datastore: "x".into(), path: dir.path().join("vda.qcow2") };
        let places = [place.clone()];
        assert!(occupied(&places, "web", 3).unwrap().is_empty());
        std::fs::write(&place.path, b"x").unwrap();
        assert_eq!(occupied(&places, "web", 3).unwrap().len(), 1);
        for (vm, generation, state, free) in [
            ("web", 2, OwnerState::Stale, true),
            ("web", 3, OwnerState::Stale, false),
            ("db", 2, OwnerState::Stale, false),
            ("web", 2, OwnerState::Owned, false),
            ("web", 2, OwnerState::Incoming, false),
        ] {
            Stamp { vm: vm.into(), generation, state }.write(&place.path).unwrap();
            assert_eq!(occupied(&places, "web", 3).unwrap().is_empty(), free, "{vm} {generation} {state:?}");
        }
    }

    #[test]
    fn an_old_image_that_somebody_uses_is_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.qcow2");
        let places = [DiskPlacement { name: "vda".into(), datastore: "x".into(), path: path.clone() }];
        std::fs::write(&path, b"x").unwrap();
        Stamp { vm: "web".into(), generation: 2, state: OwnerState::Stale }.write(&path).unwrap();
        let lock = ImageLock::take(&path, LockMode::Read).unwrap();
        assert!(occupied(&places, "web", 3).unwrap()[0].contains("in use"));
        drop(lock);
        assert!(occupied(&places, "web", 3).unwrap().is_empty());
    }

    #[test]
    fn faults_of_images_are_named_all_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top.qcow2");
        let backing =
            vmove_storage::BackingSpec { name: "base.raw".into(), format: vmove_storage::ImageFormat::Raw };
        let spec = vmove_storage::ImageSpec {
            backing: Some(backing),
            ..vmove_storage::ImageSpec::new(vmove_storage::ImageFormat::Qcow2, 1 << 20)
        };
        vmove_storage::create(&path, &spec).unwrap();
        let mut info = vmove_storage::info(&path).unwrap();
        (info.internal_snapshots, info.corrupt) = (2, true);
        let faults = image_faults(&info);
        for (fault, word) in faults.iter().zip(["base.raw", "2 internal snapshots", "corrupt"]) {
            assert!(fault.contains(word), "{fault}");
        }
        assert_eq!(faults.len(), 3);
    }

    #[test]
    fn a_digest_is_of_the_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        let bytes: Vec<u8> = (0..CHUNK * 2 + 17).map(|i| i as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let digest = digest(&path).unwrap();
        assert_eq!(digest.bytes, bytes.len() as u64);
        assert_eq!(digest.blake3, blake3::hash(&bytes).to_hex().to_string());
    }
}
