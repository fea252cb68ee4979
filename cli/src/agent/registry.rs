//! Which VMs this host has, and who is doing something with them right now.
//!
//! The directories under `<state>/vms` are the truth; kept in memory is only what ends with this agent: reservations and the way the
//! last process ended. Never enters: what is done to a VM.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error::ApiError;
use super::vmdir::{VmDir, sync_dir};

/// What the agent itself does with a VM after its process has ended; completes "the VM is ...".
pub const SETTLING: &str = "being settled after its process ended";
/// What a VM is while a move of it is led from here.
pub const MOVING: &str = "on the move";
/// What a VM is while this host makes it go on from a checkpoint.
pub const RESTORING: &str = "being restored";

/// The VMs of this host.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    slots: Mutex<BTreeMap<String, Slot>>,
}

#[derive(Debug, Default)]
struct Slot {
    /// What is being done with it.
    busy: Option<&'static str>,
    /// How its last process ended, when not well.
    ended: Option<String>,
    /// Who else runs it.
    conflict: Option<String>,
}

/// The right to change one VM; ends when dropped.
#[derive(Debug)]
pub struct Reservation {
    registry: Arc<Registry>,
    vm: String,
}

impl Registry {
    /// The VMs under `<state>/vms`, which is made if it is not there.
    pub fn open(state: &Path) -> Result<Self, ApiError> {
        let dir = state.join("vms");
        std::fs::create_dir_all(&dir).map_err(|e| ApiError::io("create", &dir, &e))?;
        sync_dir(state)?;
        Ok(Self { dir, slots: Mutex::default() })
    }

    /// The directory of a VM, there or not; the name is checked, for it becomes part of a path.
    pub fn vm(&self, name: &str) -> Result<VmDir, ApiError> {
        vmove_storage::datastore::check_name("VM", name)?;
        Ok(VmDir::new(self.dir.join(name)))
    }

    /// Names of all VMs that have a directory, sorted.
    pub fn names(&self) -> Result<Vec<String>, ApiError> {
        let entries = std::fs::read_dir(&self.dir).map_err(|e| ApiError::io("list", &self.dir, &e))?;
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| vmove_storage::datastore::check_name("VM", name).is_ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Takes the right to change a VM, which need not exist yet. `doing` completes "the VM is ...".
    pub fn reserve(self: &Arc<Self>, vm: &str, doing: &'static str) -> Result<Reservation, ApiError> {
        let mut slots = self.slots();
        let slot = slots.entry(vm.to_owned()).or_default();
        if let Some(busy) = slot.busy {
            return Err(ApiError::busy(format!("VM {vm:?} is {busy}; try again when that has ended")));
        }
        slot.busy = Some(doing);
        Ok(Reservation { registry: self.clone(), vm: vm.to_owned() })
    }

    /// What is being done with a VM, if anything.
    pub fn busy(&self, vm: &str) -> Option<&'static str> {
        self.slots().get(vm)?.busy
    }

    /// Notes how a VM's last process ended; none forgets it.
    pub fn set_ended(&self, vm: &str, ended: Option<String>) {
        let mut slots = self.slots();
        let slot = slots.entry(vm.to_owned()).or_default();
        slot.ended = ended;
        // Without a process it runs nowhere twice.
        slot.conflict = None;
    }

    /// How a VM's last process ended, when not well.
    pub fn ended(&self, vm: &str) -> Option<String> {
        self.slots().get(vm)?.ended.clone()
    }

    /// Notes that another host runs the VM too.
    pub fn set_conflict(&self, vm: &str, conflict: String) {
        self.slots().entry(vm.to_owned()).or_default().conflict = Some(conflict);
    }

    /// That another host runs the VM too, in words.
    pub fn conflict(&self, vm: &str) -> Option<String> {
        self.slots().get(vm)?.conflict.clone()
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        // Plain assignments under the lock: nothing is left half done by a panic.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut slots = self.registry.slots();
        if let Some(slot) = slots.get_mut(&self.vm) {
            slot.busy = None;
            if slot.ended.is_none() && slot.conflict.is_none() {
                slots.remove(&self.vm);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_for_each_vm() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Arc::new(Registry::open(dir.path()).unwrap());
        let first = registry.reserve("web", "being created").unwrap();
        let error = registry.reserve("web", "being started").unwrap_err();
        assert_eq!(error.code, "busy");
        assert!(error.message.contains("being created"));
        let _other = registry.reserve("db", "being created").unwrap();
        drop(first);
        registry.reserve("web", "being started").unwrap();
        assert!(registry.vm("../web").is_err());
        assert!(registry.names().unwrap().is_empty());
    }
}
