//! A machine made from a checkpoint: every byte of RAM checked as it is loaded.
//!
//! Lives here: RAM and state into a machine. Never enters: who may run it (the process's journal).

use std::path::Path;

use vm_memory::Bytes;
use vmove_mirror::PAGE_BYTES;

use super::{CheckpointError, manifest::RAM, read_manifest};
use crate::{
    machine::{DiskConfig, Machine, MachineConfig},
    memory::{GuestRam, is_zero},
    migrate::{MoveError, state},
    process::{
        console::{Console, wire::RunId},
        networks,
        protocol::VmDefinition,
    },
};

/// Loads the checkpoint in `dir` into a paused machine with these disks, which hold what the checkpoint's do. Its console begins a new
/// run: what clients saw of the guest's other life is not this one's.
pub fn load(
    dir: &Path,
    vm: &VmDefinition,
    disks: Vec<DiskConfig>,
    console: &Console,
    run: RunId,
) -> Result<Machine, CheckpointError> {
    let manifest = read_manifest(dir)?;
    let failed = |e: &dyn std::fmt::Display| MoveError::Machine(e.to_string());
    let ram = GuestRam::new(vm.memory_mib << 20).map_err(|e| failed(&e))?;
    if manifest.ram.bytes != ram.layout().bytes() {
        return Err(CheckpointError::Damaged(format!(
            "it has {} bytes of RAM, the VM {}",
            manifest.ram.bytes,
            ram.layout().bytes()
        )));
    }
    let config = MachineConfig {
        vcpus: vm.vcpus,
        memory_bytes: vm.memory_mib << 20,
        kernel: None,
        initrd: None,
        cmdline: String::new(),
        disks,
        networks: networks::configs(vm).map_err(|e| failed(&e))?,
    };
    let prepared = Machine::prepare(config, ram.clone(), console.sink()).map_err(|e| failed(&e))?;
    manifest.ram.read(&dir.join(RAM), |at, chunk| fill(&ram, at / PAGE_BYTES, chunk))?;
    let machine = state::load(prepared, console, &manifest.state)?;
    console.begin_run(run);
    Ok(machine)
}

/// Writes pages into fresh RAM; those of zeroes are not touched.
fn fill(ram: &GuestRam, first: u64, chunk: &[u8]) -> Result<(), CheckpointError> {
    let failed = |e: &dyn std::fmt::Display| MoveError::Machine(format!("fill the guest's RAM: {e}"));
    for (page, content) in (first..).zip(chunk.chunks(PAGE_BYTES as usize)) {
        if !is_zero(content) {
            let slice = ram.slice_of(page, 1).map_err(|e| failed(&e))?;
            slice.write_slice(content, 0).map_err(|e| failed(&e))?;
        }
    }
    Ok(())
}
