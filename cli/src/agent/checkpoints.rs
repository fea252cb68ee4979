//! Checkpoints of this host's datastores: where they lie, taking, listing, removing them, and what a crash leaves of one.
//!
//! `<datastore>/.checkpoints/<vm>/<name>/`, beside the VMs: a checkpoint stays when its VM moves or is removed. What is being made has
//! a name that begins with a dot and with this host's, for others may share the datastore. Never enters: going on from one (restore).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmove_compute::checkpoint::manifest::{INITRD, KERNEL};
use vmove_compute::checkpoint::{CheckpointError, Manifest, read_manifest};
use vmove_compute::process::protocol::{CheckpointOrder, Reply, Request};
use vmove_storage::Datastore;
use vmove_storage::datastore::check_name;

use super::error::{ApiError, blocking};
use super::registry::MOVING;
use super::vmdir::{VmDir, sync_dir};
use super::vms::word;
use super::{Agent, control, process};
use crate::api::checkpoint::{CheckpointBegun, CheckpointInfo, TakeCheckpoint};
use crate::api::types::{Place, VmState};

/// Checkpoints in a datastore.
const DIR: &str = ".checkpoints";

/// A checkpoint on this host.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its datastore.
    pub datastore: String,
    /// Its directory.
    pub dir: PathBuf,
}

impl From<CheckpointError> for ApiError {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Damaged(_) => Self::invalid(error.to_string()),
            _ => Self::storage(error.to_string()),
        }
    }
}

impl Agent {
    /// Begins to take a checkpoint of a running VM; it is followed and cancelled as a move.
    pub async fn take_checkpoint(
        self: &Arc<Self>,
        name: &str,
        request: TakeCheckpoint,
    ) -> Result<CheckpointBegun, ApiError> {
        check_name("checkpoint", &request.name)?;
        let reservation = self.reserve_soon(name, MOVING).await?;
        let view = self.must_view(name).await?;
        let Some(status) = view.status.clone().filter(|_| view.state == VmState::Running) else {
            return Err(ApiError::conflict(format!(
                "VM {name:?} is {}; only of a running VM can a checkpoint be taken",
                word(view.state)
            )));
        };
        let own = status.disks.first().map(|disk| disk.datastore.clone());
        let wanted = request.datastore.clone().or(own);
        let store = &match &wanted {
            Some(wanted) => self.store(wanted)?,
            None => self.default_store()?,
        };
        let id = uuid::Uuid::new_v4().to_string();
        let to = dir_of(store, name).join(&request.name);
        let order = CheckpointOrder {
            id: id.clone(),
            name: request.name.clone(),
            dir: self.unfinished(store, name, &id),
            to: to.clone(),
            stop: request.stop,
            place: Place { host: self.config.name.clone(), datastore: store.name().to_owned() },
        };
        let vm = self.registry.vm(name)?;
        let (agent, look, made, owned) = (self.clone(), vm.clone(), order.clone(), name.to_owned());
        let ready = blocking(move || {
            if let Some(there) = agent.find_checkpoint(&owned, &made.name)? {
                return Err(ApiError::name_taken(format!(
                    "there is a checkpoint {:?} of VM {owned:?} already, in datastore {}",
                    made.name, there.datastore
                )));
            }
            prepare(&look, &made.dir)
        })
        .await;
        let ordered = match ready {
            Ok(()) => match control::ask(vm.path(), &Request::Checkpoint(Box::new(order.clone()))).await {
                Ok(Reply::Ok) => Ok(()),
                Ok(other) => Err(control::unexpected(&other).to_string()),
                Err(error) => Err(error.to_string()),
            }
            .map_err(|why| ApiError::vm_process(format!("cannot take a checkpoint of VM {name:?}: {why}"))),
            Err(error) => Err(error),
        };
        if let Err(error) = ordered {
            remove_tree(&order.dir);
            return Err(error);
        }
        tracing::info!(vm = name, id, checkpoint = request.name, "checkpoint begun");
        let (agent, owned, move_id) = (self.clone(), name.to_owned(), id.clone());
        tokio::spawn(async move {
            agent.follow_move(&owned, &move_id, None, reservation).await;
            // Gone, but for a process that was killed.
            if !process::find(vm.path()).is_some_and(|_| order.dir.exists()) {
                remove_tree(&order.dir);
            }
        });
        Ok(CheckpointBegun { id, host: self.config.name.clone(), datastore: store.name().to_owned() })
    }

    /// The directory of a checkpoint in the making, or of one that is being fetched.
    pub(super) fn unfinished(&self, store: &Datastore, vm: &str, id: &str) -> PathBuf {
        dir_of(store, vm).join(format!("{}{id}", self.unfinished_prefix()))
    }

    fn unfinished_prefix(&self) -> String {
        format!(".{}-", self.config.name)
    }

    /// Where a checkpoint is on this host.
    pub fn find_checkpoint(&self, vm: &str, name: &str) -> Result<Option<Found>, ApiError> {
        check_name("VM", vm)?;
        check_name("checkpoint", name)?;
        for store in self.stores().iter() {
            let dir = dir_of(store, vm).join(name);
            if dir.is_dir() {
                return Ok(Some(Found { datastore: store.name().to_owned(), dir }));
            }
        }
        Ok(None)
    }

    /// What this host has of one VM's checkpoints, or of all.
    pub fn checkpoints(&self, vm: Option<&str>) -> Result<Vec<CheckpointInfo>, ApiError> {
        let mut found = Vec::new();
        for store in self.stores().iter() {
            for name in sub_directories(&store.path().join(DIR))? {
                if vm.is_some_and(|vm| vm != name) {
                    continue;
                }
                for checkpoint in sub_directories(&dir_of(store, &name))? {
                    found.push(self.describe(store, &name, &checkpoint));
                }
            }
        }
        found.sort_by(|a, b| (&a.vm, a.taken_at, &a.name).cmp(&(&b.vm, b.taken_at, &b.name)));
        Ok(found)
    }

    fn describe(&self, store: &Datastore, vm: &str, name: &str) -> CheckpointInfo {
        let read = read_manifest(&dir_of(store, vm).join(name));
        let mut info = CheckpointInfo {
            vm: vm.to_owned(),
            name: name.to_owned(),
            host: self.config.name.clone(),
            datastore: store.name().to_owned(),
            taken_at: 0,
            memory_mib: 0,
            data_bytes: 0,
            pause_us: 0,
            error: None,
        };
        match read {
            Ok(manifest) => {
                info.taken_at = manifest.taken_at;
                info.memory_mib = manifest.vm.memory_mib;
                info.data_bytes = data_bytes(&manifest);
                info.pause_us = manifest.pause_us;
            }
            Err(error) => info.error = Some(error.to_string()),
        }
        info
    }

    /// Removes a checkpoint of this host; false if it has none of this name.
    pub fn remove_checkpoint(&self, vm: &str, name: &str) -> Result<bool, ApiError> {
        let Some(found) = self.find_checkpoint(vm, name)? else { return Ok(false) };
        // In one step: half a checkpoint is never seen.
        let store = &self.store(&found.datastore)?;
        let gone = self.unfinished(store, vm, &uuid::Uuid::new_v4().to_string());
        std::fs::rename(&found.dir, &gone).map_err(|e| ApiError::io("remove", &found.dir, &e))?;
        std::fs::remove_dir_all(&gone).map_err(|e| ApiError::io("remove", &gone, &e))?;
        remove_empty_dirs(store, vm);
        Ok(true)
    }

    /// Removes what was left unfinished of a VM's checkpoints here. The caller has reserved the VM, and it has no process.
    pub(super) fn sweep_checkpoints(&self, vm: &str) -> Result<(), ApiError> {
        let prefix = self.unfinished_prefix();
        for store in self.stores().iter() {
            let dir = dir_of(store, vm);
            let Ok(entries) = std::fs::read_dir(&dir) else { continue };
            for entry in entries.filter_map(Result::ok) {
                if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
                    remove_tree(&entry.path());
                }
            }
            remove_empty_dirs(store, vm);
        }
        Ok(())
    }

    /// The VMs of which something may be left here.
    pub(super) fn vms_with_checkpoints(&self) -> Result<Vec<String>, ApiError> {
        let mut vms = Vec::new();
        for store in self.stores().iter() {
            vms.extend(sub_directories(&store.path().join(DIR))?);
        }
        vms.sort_unstable();
        vms.dedup();
        Ok(vms)
    }
}

/// Where the checkpoints of a VM are in a datastore. The name has been checked.
fn dir_of(store: &Datastore, vm: &str) -> PathBuf {
    store.path().join(DIR).join(vm)
}

/// Removes the directories above checkpoints, where none is left.
pub(super) fn remove_empty_dirs(store: &Datastore, vm: &str) {
    // Not empty: there are others.
    let _ = std::fs::remove_dir(dir_of(store, vm)).and_then(|()| std::fs::remove_dir(store.path().join(DIR)));
}

/// Bytes a checkpoint holds beside holes.
pub fn data_bytes(manifest: &Manifest) -> u64 {
    manifest.files().iter().map(|(_, sums)| sums.data_bytes()).sum()
}

/// Makes the directory with what the agent puts into it: the kernel and the initial RAM disk.
fn prepare(vm: &VmDir, dir: &Path) -> Result<(), ApiError> {
    super::make_private_dir(dir).map_err(|e| ApiError::storage(e.to_string()))?;
    let copy = |from: PathBuf, name: &str| {
        let to = dir.join(name);
        std::fs::copy(&from, &to).map_err(|e| ApiError::io("copy", &from, &e))?;
        std::fs::File::open(&to).and_then(|file| file.sync_all()).map_err(|e| ApiError::io("sync", &to, &e))
    };
    copy(vm.kernel(), KERNEL)?;
    if vm.initrd().exists() {
        copy(vm.initrd(), INITRD)?;
    }
    sync_dir(dir.parent().unwrap_or(dir))
}

/// Removes a directory that was left; what cannot be removed is tried again at the next occasion.
pub(super) fn remove_tree(dir: &Path) {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(dir = %dir.display(), %error, "what is left of a checkpoint cannot be removed");
        }
        _ => {}
    }
}

/// Directories in `dir` whose names can be a VM's or a checkpoint's; none if it is not there.
fn sub_directories(dir: &Path) -> Result<Vec<String>, ApiError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(ApiError::io("list", dir, &e)),
    };
    Ok(entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            (entry.file_type().ok()?.is_dir() && check_name("checkpoint", &name).is_ok()).then_some(name)
        })
        .collect())
}
