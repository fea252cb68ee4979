//! Making a VM: its directory, its disks, and last the journal record that makes it this host's.
//!
//! A crash before that record leaves only what settle recognises and removes. Never enters: starting it.

use std::path::Path;
use std::sync::Arc;

use vmove_compute::boot;
use vmove_compute::process::protocol::VmDefinition;
use vmove_mirror::journal::Record;
use vmove_storage::datastore::check_name;
use vmove_storage::{ImageSpec, OwnerState, Stamp};

use super::error::{ApiError, blocking};
use super::registry::Reservation;
use super::vmdir::{VmDir, disks_at};
use super::{Agent, images, networks, seed};
use crate::api::types::{CreateVm, DiskPlacement, VmSummary};
use crate::commands::is_reserved;

/// Largest kernel, bytes.
pub const MAX_KERNEL: u64 = 1 << 30;
/// Largest initial RAM disk, bytes.
pub const MAX_INITRD: u64 = 4 << 30;
/// Most disks of a VM.
const MAX_DISKS: usize = 16;
/// Most groups a VM is kept apart in.
const MAX_GROUPS: usize = 16;
/// Most RAM of a VM, MiB (16 TiB).
const MAX_MEMORY_MIB: u64 = 16 << 20;
/// Longest kernel command line, bytes (COMMAND_LINE_SIZE on x86, arch/x86/include/asm/setup.h).
const MAX_CMDLINE: usize = 2047;

/// Checks a definition, from a user or another host: names, counts and sizes.
pub fn check_definition(vm: &VmDefinition) -> Result<(), ApiError> {
    let invalid = |what: String| Err(ApiError::invalid(format!("VM {:?}: {what}", vm.name)));
    check_name("VM", &vm.name)?;
    if !(1..=64).contains(&vm.vcpus) {
        return invalid(format!("{} vCPUs; it must be 1 to 64", vm.vcpus));
    }
    if !(1..=MAX_MEMORY_MIB).contains(&vm.memory_mib) {
        return invalid(format!("{} MiB of memory; it must be 1 to {MAX_MEMORY_MIB}", vm.memory_mib));
    }
    if vm.cmdline.len() > MAX_CMDLINE || vm.cmdline.contains('\0') {
        return invalid(format!("the kernel command line must be at most {MAX_CMDLINE} bytes without NUL"));
    }
    if vm.disks.len() > MAX_DISKS {
        return invalid(format!("{} disks; at most {MAX_DISKS} are possible", vm.disks.len()));
    }
    networks::check(&vm.networks).or_else(invalid)?;
    if vm.apart.len() > MAX_GROUPS {
        return invalid(format!("{} groups in `apart`; at most {MAX_GROUPS} are possible", vm.apart.len()));
    }
    for group in &vm.apart {
        check_name("group", group)?;
    }
    let mut names = std::collections::BTreeSet::new();
    for disk in &vm.disks {
        check_name("disk", &disk.name)?;
        if !names.insert(&disk.name) {
            return invalid(format!("disk {:?} is there twice", disk.name));
        }
        if disk.size_bytes == 0 || disk.size_bytes % 512 != 0 {
            return invalid(format!(
                "disk {:?} has {} bytes; it must be a multiple of 512",
                disk.name, disk.size_bytes
            ));
        }
    }
    Ok(())
}

impl Agent {
    /// Makes a VM; it is stopped.
    pub async fn create(self: &Arc<Self>, request: CreateVm) -> Result<VmSummary, ApiError> {
        let name = request.definition.name.clone();
        let vm = self.registry.vm(&name)?;
        self.refuse_in_maintenance()?;
        let _reservation = self.reserve_new(&name).await?;
        let agent = self.clone();
        blocking(move || agent.build(&vm, request)).await?;
        Ok(self.summary(&self.must_view(&name).await?))
    }

    /// Reserves a name that no VM has, here or on a host that can be reached.
    pub(super) async fn reserve_new(self: &Arc<Self>, name: &str) -> Result<Reservation, ApiError> {
        let vm = self.registry.vm(name)?;
        if is_reserved(name) {
            return Err(ApiError::invalid(format!(
                "{name:?} is a command of vmove: `vmove {name} ...` would not reach a VM of this name; choose another"
            )));
        }
        let reservation = self.registry.reserve(name, "being created")?;
        if vm.path().exists() {
            return Err(ApiError::name_taken(format!("host {} has a VM {name:?} already", self.config.name)));
        }
        if let Some(host) = self.find_owner(name).await {
            return Err(ApiError::name_taken(format!("host {host} has a VM {name:?} already")));
        }
        Ok(reservation)
    }

    fn build(&self, vm: &VmDir, mut request: CreateVm) -> Result<(), ApiError> {
        vm.sockets_fit().map_err(ApiError::invalid)?;
        self.fill_macs(&mut request.definition)?;
        if let Some(seed) = &request.cloud_init {
            seed::check(seed)?;
            request.definition.disks.push(seed::disk());
        }
        let specs = self.resolve(&mut request)?;
        check_definition(&request.definition)?;
        check_kernel(&request.kernel)?;
        let definition = &request.definition;
        let disks = definition
            .disks
            .iter()
            .map(|disk| {
                let store = self.store(&disk.datastore)?;
                let path = store.image_path(&definition.name, &disk.name, images::format_of(disk.format))?;
                if path.exists() || Stamp::path_of(&path).exists() {
                    return Err(ApiError::conflict(format!(
                        "there is a file at {} already; move it away or choose another name",
                        path.display()
                    )));
                }
                Ok(DiskPlacement { name: disk.name.clone(), datastore: disk.datastore.clone(), path })
            })
            .collect::<Result<Vec<_>, ApiError>>()?;
        let built = self.write_all(vm, &request, &specs, &disks);
        if built.is_err() {
            self.take_back(vm, &definition.name, &disks);
        }
        built
    }

    /// Removes what was begun of a VM: nothing of it was there before.
    pub(super) fn take_back(&self, vm: &VmDir, name: &str, disks: &[DiskPlacement]) {
        for disk in disks {
            if let Err(error) = images::remove(&disk.path) {
                tracing::warn!(%error, "cannot remove the image of a VM that was not made");
            }
        }
        images::remove_empty_dirs(&self.stores(), name);
        if vm.path().exists()
            && let Err(error) = self.remove_dir(vm)
        {
            tracing::warn!(%error, "cannot remove the directory of a VM that was not made");
        }
    }

    /// Fills in default datastores and the sizes of given images; gives the structure of every image.
    fn resolve(&self, request: &mut CreateVm) -> Result<Vec<ImageSpec>, ApiError> {
        for name in request.images.keys() {
            if !request.definition.disks.iter().any(|disk| disk.name == *name) {
                return Err(ApiError::invalid(format!(
                    "an image is given for disk {name:?}, which there is not"
                )));
            }
        }
        let stores = self.stores();
        let mut specs = Vec::new();
        let mut blockers = self.taken_macs(&request.definition)?;
        let mut needs: std::collections::BTreeMap<String, u64> = Default::default();
        for disk in &mut request.definition.disks {
            if disk.datastore.is_empty() {
                let Some(default) = stores.first() else {
                    blockers.push(format!("disk {}: host {} has no datastore", disk.name, self.config.name));
                    continue;
                };
                default.name().clone_into(&mut disk.datastore);
            }
            if let Err(error) = self.store(&disk.datastore) {
                blockers.push(format!("disk {}: {}", disk.name, error.message));
                continue;
            }
            let mut spec = ImageSpec::new(images::format_of(disk.format), disk.size_bytes);
            if let Some(path) = request.images.get(&disk.name) {
                let info = images::inspect_source(path)?;
                if disk.size_bytes == 0 {
                    // Images of bytes may end anywhere, disks end with a sector.
                    disk.size_bytes = info.virtual_bytes.next_multiple_of(512);
                } else if disk.size_bytes < info.virtual_bytes {
                    return Err(ApiError::invalid(format!(
                        "disk {}: its size is {} bytes, that of image {} is {}; leave the size out, or make it larger",
                        disk.name,
                        disk.size_bytes,
                        path.display(),
                        info.virtual_bytes
                    )));
                }
                spec.virtual_bytes = disk.size_bytes;
                *needs.entry(disk.datastore.clone()).or_default() += info.allocated_bytes;
            }
            specs.push(spec);
        }
        for (name, need) in needs {
            let free = self.store(&name)?.free_bytes()?;
            if need > free {
                blockers.push(format!("datastore {name} has {free} bytes free, the images need {need}"));
            }
        }
        if blockers.is_empty() {
            Ok(specs)
        } else {
            Err(ApiError::blocked(format!("cannot create VM {:?}", request.definition.name), blockers))
        }
    }

    fn write_all(
        &self,
        vm: &VmDir,
        request: &CreateVm,
        specs: &[ImageSpec],
        disks: &[DiskPlacement],
    ) -> Result<(), ApiError> {
        let definition = &request.definition;
        vm.make()?;
        vm.save_definition(definition)?;
        copy_whole(vm, &request.kernel, &vm.kernel(), MAX_KERNEL)?;
        if let Some(initrd) = &request.initrd {
            copy_whole(vm, initrd, &vm.initrd(), MAX_INITRD)?;
        }
        for (disk, spec) in disks.iter().zip(specs) {
            self.store(&disk.datastore)?.create_vm_dir(&definition.name)?;
            let from = request.images.get(&disk.name).map(std::path::PathBuf::as_path);
            images::make(&disk.path, &definition.name, spec, from)?;
            if let Some(seed) = request.cloud_init.as_ref().filter(|_| disk.name == seed::DISK) {
                images::fill(&disk.path, &seed::image(seed, &definition.name)?)?;
            }
        }
        vm.append(&Record::Owner { generation: 1, disks: disks_at(disks)? })?;
        images::own(disks, &definition.name, 1)
    }
}

/// Checks that a file can be a VM's kernel.
pub(super) fn check_kernel(path: &Path) -> Result<(), ApiError> {
    boot::check_kernel(path).map_err(|error| match error {
        boot::Error::Read { .. } => ApiError::storage(error.to_string()),
        _ => ApiError::invalid(error.to_string()),
    })
}

/// Copies a kernel or RAM disk of at most `cap` bytes.
pub(super) fn copy_whole(vm: &VmDir, from: &Path, to: &Path, cap: u64) -> Result<(), ApiError> {
    let metadata = std::fs::metadata(from).map_err(|e| ApiError::io("read", from, &e))?;
    if !metadata.is_file() || metadata.len() > cap {
        return Err(ApiError::invalid(format!("{} is not a file of at most {cap} bytes", from.display())));
    }
    let bytes = std::fs::read(from).map_err(|e| ApiError::io("read", from, &e))?;
    vm.write_file(to, &bytes)
}

/// What a crash in the middle of [`Agent::create`], or of a restore of a VM that was nowhere, left of images: stamped as unfinished.
pub(super) fn is_unfinished(stamp: &Stamp, vm: &str) -> bool {
    stamp.vm == vm && stamp.state == OwnerState::Incoming
}
