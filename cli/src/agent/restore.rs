//! Going on from a checkpoint: on this host, with its files copied to new images, or with those of another host's checkpoint.
//!
//! A restore is an epoch of the VM like a move: the next generation, with a `Moving` record before and an `Owner` record after all is
//! loaded, which the VM process appends. A crash before it leaves the VM as it was (settle removes the new images), one after it the
//! restored one. Never enters: RAM and state, which the process loads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::{StreamExt, stream};
use hyper::Method;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use vmove_compute::checkpoint::manifest::{INITRD, KERNEL, MANIFEST};
use vmove_compute::checkpoint::sums::{Arriving, CHUNK};
use vmove_compute::checkpoint::{Manifest, read_manifest};
use vmove_compute::process::protocol::{LaunchSpec, RestoreSpec, RunState, Start};
use vmove_mirror::journal::{MoveId, Record, Standing};
use vmove_storage::{Datastore, OwnerState, Stamp};

use super::checkpoints::{data_bytes, remove_empty_dirs, remove_tree};
use super::create::check_definition;
use super::error::{ApiError, blocking};
use super::moves::REQUEST_FILE;
use super::preflight::occupied;
use super::registry::RESTORING;
use super::vmdir::{VmDir, placements};
use super::vms::word;
use super::{Agent, control, images, leftovers, peers};
use crate::api::checkpoint::{CheckpointList, RestoreCheckpoint};
use crate::api::types::{DiskPlacement, MoveRequest, VmDefinition, VmDetail, VmState, VmSummary};
use crate::identity::files::write_private;

/// How long a restore that another host makes may take.
const RESTORE_LIMIT: Duration = Duration::from_hours(12);
/// How often the process is looked at while it loads.
const LOAD_INTERVAL: Duration = Duration::from_millis(20);
/// Largest first file of a checkpoint that is fetched, bytes.
const MAX_MANIFEST: u64 = 1 << 30;

impl Agent {
    /// Restores a VM where it is asked to go on: on the named host, else on the one that has the VM, else on the one that has the
    /// checkpoint.
    pub async fn restore(
        self: &Arc<Self>,
        vm: &str,
        name: &str,
        request: RestoreCheckpoint,
    ) -> Result<VmSummary, ApiError> {
        let here = self.registry.vm(vm)?;
        let holder = match self.find_checkpoint(vm, name)? {
            Some(_) => Some(self.config.name.clone()),
            None => self.find_holder(vm, name).await,
        };
        let holder = holder.ok_or_else(|| {
            ApiError::not_found(format!(
                "there is no checkpoint {name:?} of VM {vm:?} on a host that answers"
            ))
        })?;
        let owner = self.owner_for_restore(vm).await?;
        let target = request.host.clone().or_else(|| owner.clone()).unwrap_or_else(|| holder.clone());
        if let Some(owner) = owner.filter(|owner| *owner != target) {
            return Err(ApiError::conflict(format!(
                "host {owner} has VM {vm:?}: restore it there, and move it to host {target} then"
            )));
        }
        if target != self.config.name {
            let path = format!("/v1/checkpoints/{vm}/{name}/restore");
            let request = RestoreCheckpoint { host: Some(target.clone()) };
            return self.peers.call(&target, Method::POST, &path, Some(&request), RESTORE_LIMIT).await;
        }
        self.refuse_in_maintenance()?;
        let reservation = self.reserve_soon(vm, RESTORING).await?;
        // Once more, now that others are told of this restore ([`Agent::must_view`]): of two hosts that are asked at once at most one
        // finds nobody else at it.
        if let Some(owner) = self.owner_for_restore(vm).await?.filter(|owner| *owner != target) {
            return Err(ApiError::conflict(format!("host {owner} has VM {vm:?} now: restore it there")));
        }
        let fetched =
            if holder == self.config.name { None } else { Some(self.fetch(&holder, vm, name).await?) };
        let from = match (&fetched, self.find_checkpoint(vm, name)?) {
            (Some(dir), _) => dir.clone(),
            (None, Some(found)) => found.dir,
            (None, None) => return Err(ApiError::not_found(format!("checkpoint {name:?} has just gone"))),
        };
        let restored = self.restore_here(vm, &here, &from).await;
        drop(reservation);
        if let Some(dir) = fetched {
            self.forget(vm, dir).await?;
        }
        match restored {
            Ok(()) => {
                tracing::info!(vm, checkpoint = name, "VM restored");
                Ok(self.summary(&self.must_view(vm).await?))
            }
            Err(error) => {
                self.settle_soon(vm).await;
                self.registry.set_ended(vm, None);
                Err(error)
            }
        }
    }

    /// The host that has a VM, stopped. One that runs or is on its way is an error, and so is a host that cannot be asked when none
    /// that answers has it: it may run there.
    async fn owner_for_restore(self: &Arc<Self>, vm: &str) -> Result<Option<String>, ApiError> {
        let mut owner = None;
        let own = self.view(vm).await?.map(|view| (self.config.name.clone(), view.state));
        let path = format!("/v1/vms/{vm}");
        let asked = self.peers.ask_all::<VmDetail>(&path, peers::SHORT).join_all().await;
        let (mut silent, mut restored) = (Vec::new(), None);
        let others = asked.into_iter().filter_map(|(host, answer)| match answer {
            Ok(there) => Some((host, there.summary.state)),
            Err(error) if peers::is_not_found(&error) => None,
            Err(error) if error.code == "busy" => {
                restored.get_or_insert(error);
                None
            }
            Err(_) => {
                silent.push(host);
                None
            }
        });
        let others: Vec<_> = others.collect();
        if let Some(elsewhere) = restored {
            return Err(elsewhere);
        }
        for (host, state) in own.into_iter().chain(others) {
            match state {
                VmState::Stopped | VmState::Failed => owner = Some(host),
                VmState::Undecided | VmState::Lost => {
                    return Err(ApiError::undecided(format!(
                        "VM {vm:?} is {} on host {host}; see `vmove recover {vm}`",
                        word(state)
                    )));
                }
                state => {
                    return Err(ApiError::conflict(format!(
                        "VM {vm:?} is {} on host {host}; stop it first",
                        word(state)
                    )));
                }
            }
        }
        if owner.is_none() && !silent.is_empty() {
            return Err(ApiError::undecided(format!(
                "VM {vm:?} may be on a host that does not answer ({}): it is restored only where it surely runs nowhere",
                silent.join(", ")
            )));
        }
        Ok(owner)
    }

    /// Another host that has a checkpoint.
    pub(super) async fn find_holder(self: &Arc<Self>, vm: &str, name: &str) -> Option<String> {
        let has = |list: &CheckpointList| list.checkpoints.iter().any(|c| c.vm == vm && c.name == name);
        self.peers.find(&format!("/v1/checkpoints?vm={vm}"), has).await
    }

    /// Everything from the checkpoint's files to the running process. The VM is reserved.
    async fn restore_here(self: &Arc<Self>, name: &str, vm: &VmDir, from: &Path) -> Result<(), ApiError> {
        let dir = from.to_path_buf();
        let manifest = blocking(move || Ok(read_manifest(&dir)?)).await?;
        check_definition(&manifest.vm)?;
        if manifest.vm.name != name {
            return Err(ApiError::invalid(format!("it is a checkpoint of VM {:?}", manifest.vm.name)));
        }
        let here = self.view(name).await?.is_some();
        if here {
            // As before a start: the target of an aborted move may have taken it over.
            self.settle_before_start(name).await?;
            let state = self.must_view(name).await?.state;
            if !matches!(state, VmState::Stopped | VmState::Failed) {
                return Err(ApiError::conflict(format!("VM {name:?} is {}; stop it first", word(state))));
            }
        } else if vm.path().exists() {
            return Err(ApiError::busy(format!("what is left of VM {name:?} is being cleaned up")));
        }
        let (agent, look, dir) = (self.clone(), vm.clone(), from.to_path_buf());
        let spec = blocking(move || {
            let standing = if here { Some(look.journal()?.standing().clone()) } else { None };
            agent.lay_out(&look, &dir, &manifest, standing.as_ref())
        })
        .await?;
        if let Err(error) = self.run_restored(name, vm, &spec).await {
            // What the process has died of is the checkpoint's trouble, not the VM's.
            match tokio::fs::remove_file(vm.error_file()).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, "the VM is shown as failed");
                }
                _ => {}
            }
            return Err(error);
        }
        let (agent, look, owned) = (self.clone(), vm.clone(), name.to_owned());
        blocking(move || {
            let standing = look.journal()?.standing().clone();
            leftovers::retire_left(&owned, &look, &standing)?;
            images::remove_empty_dirs(&agent.stores(), &owned);
            Ok(())
        })
        .await
    }

    /// Starts the process and waits until the guest goes on.
    async fn run_restored(
        self: &Arc<Self>,
        name: &str,
        vm: &VmDir,
        spec: &LaunchSpec,
    ) -> Result<(), ApiError> {
        self.launch(name, vm, spec).await?;
        loop {
            match control::status(vm.path()).await {
                Ok(status) if status.state == RunState::Running => return Ok(()),
                Ok(_) | Err(control::ControlError::Failed(_)) => {}
                Err(_) => {
                    if self.wait_gone(vm, LOAD_INTERVAL).await {
                        let why = vm.error_text().unwrap_or_else(|| "its process ended".to_owned());
                        return Err(ApiError::vm_process(format!(
                            "VM {name:?} cannot go on from there: {why}"
                        )));
                    }
                }
            }
            tokio::time::sleep(LOAD_INTERVAL).await;
        }
    }

    /// New images with the checkpoint's content, and what the process is to be started with.
    fn lay_out(
        &self,
        vm: &VmDir,
        from: &Path,
        manifest: &Manifest,
        standing: Option<&Standing>,
    ) -> Result<LaunchSpec, ApiError> {
        let name = &manifest.vm.name;
        let now = match standing {
            None => None,
            Some(Standing::Owner { generation, disks }) => Some((*generation, placements(disks))),
            Some(_) => {
                return Err(ApiError::undecided(format!("the last move of VM {name:?} is not settled")));
            }
        };
        let (generation, places) = self.places(vm, manifest, now.as_ref())?;
        let mut definition = manifest.vm.clone();
        for (disk, place) in definition.disks.iter_mut().zip(&places) {
            disk.datastore.clone_from(&place.datastore);
        }
        let mut blockers = self.boot_blockers(&definition)?;
        blockers.extend(self.space_blockers(&places, manifest)?);
        blockers.extend(occupied(&places, name, generation)?);
        blockers.extend(vm.sockets_fit().err());
        if now.is_some() {
            blockers.extend(differences(vm, manifest, from)?);
        }
        if !blockers.is_empty() {
            return Err(ApiError::blocked(format!("VM {name:?} cannot be restored"), blockers));
        }
        if now.is_some() {
            // Of its own wish to keep images, not an older move's.
            let request = serde_json::to_string(&MoveRequest::default())
                .map_err(|e| ApiError::internal(format!("cannot write a request: {e}")))?;
            write_private(&vm.path().join(REQUEST_FILE), &request)?;
            let move_id = MoveId::new(uuid::Uuid::new_v4().to_string())?;
            vm.append(&Record::Moving { move_id, to_host: None, generation })?;
        } else {
            vm.make()?;
            vm.save_definition(&definition)?;
            manifest.kernel.copy(&from.join(KERNEL), &vm.kernel())?;
            if let Some(initrd) = &manifest.initrd {
                initrd.copy(&from.join(INITRD), &vm.initrd())?;
            }
        }
        for (index, (place, sums)) in places.iter().zip(&manifest.disks).enumerate() {
            self.store(&place.datastore)?.create_vm_dir(name)?;
            if Stamp::read(&place.path)?.is_some() {
                // Stale, as was seen above.
                images::remove(&place.path)?;
            }
            Stamp { vm: name.clone(), generation, state: OwnerState::Incoming }.write(&place.path)?;
            sums.copy(&from.join(Manifest::disk_file(index)), &place.path)?;
        }
        let initrd = vm.initrd();
        Ok(LaunchSpec {
            vm: definition,
            kernel: vm.kernel(),
            initrd: initrd.exists().then_some(initrd),
            host: self.config.name.clone(),
            generation,
            disks: places,
            identity: self.tls.is_some().then(|| self.identity.paths()),
            start: Start::Restore(RestoreSpec { dir: from.to_path_buf() }),
        })
    }

    /// The generation after the restore, and where its images are to lie: in the datastores the VM's disks are in now, else in those
    /// they were in, else in the default one. An owned image is never overwritten: the new ones have the generation in their names.
    fn places(
        &self,
        vm: &VmDir,
        manifest: &Manifest,
        now: Option<&(u64, Vec<DiskPlacement>)>,
    ) -> Result<(u64, Vec<DiskPlacement>), ApiError> {
        let generation = now.map_or(manifest.generation, |(generation, _)| *generation) + 1;
        let mut places = Vec::new();
        for disk in &manifest.vm.disks {
            let current = now.and_then(|(_, disks)| disks.iter().find(|place| place.name == disk.name));
            let wanted = current.map_or(&disk.datastore, |place| &place.datastore);
            let store = self.store(wanted).or_else(|_| self.default_store())?;
            let file = if now.is_some() { format!("{}.{generation}", disk.name) } else { disk.name.clone() };
            let path = store.image_path(&manifest.vm.name, &file, images::format_of(disk.format))?;
            places.push(DiskPlacement { name: disk.name.clone(), datastore: store.name().to_owned(), path });
        }
        tracing::debug!(dir = %vm.path().display(), generation, "a restore is laid out");
        Ok((generation, places))
    }

    fn space_blockers(&self, places: &[DiskPlacement], manifest: &Manifest) -> Result<Vec<String>, ApiError> {
        let mut blockers = Vec::new();
        for store in self.stores().iter() {
            let here =
                places.iter().zip(&manifest.disks).filter(|(place, _)| place.datastore == store.name());
            let need: u64 = here.map(|(_, sums)| sums.data_bytes()).sum();
            let free = store.free_bytes()?;
            if need > free {
                blockers
                    .push(format!("datastore {} has {free} bytes free, the disks need {need}", store.name()));
            }
        }
        Ok(blockers)
    }

    /// Fetches a checkpoint of another host into a directory of this one, every chunk checked.
    async fn fetch(self: &Arc<Self>, host: &str, vm: &str, name: &str) -> Result<PathBuf, ApiError> {
        let store = &self.default_store()?;
        let dir = self.unfinished(store, vm, &uuid::Uuid::new_v4().to_string());
        let fetched = self.fetch_into(store, &dir, host, vm, name).await;
        if fetched.is_err() {
            self.forget(vm, dir.clone()).await?;
        }
        fetched.map(|()| dir)
    }

    /// Removes what was fetched.
    async fn forget(self: &Arc<Self>, vm: &str, dir: PathBuf) -> Result<(), ApiError> {
        let (agent, vm) = (self.clone(), vm.to_owned());
        blocking(move || {
            remove_tree(&dir);
            agent.stores().iter().for_each(|store| remove_empty_dirs(store, &vm));
            Ok(())
        })
        .await
    }

    async fn fetch_into(
        &self,
        store: &Datastore,
        dir: &Path,
        host: &str,
        vm: &str,
        name: &str,
    ) -> Result<(), ApiError> {
        super::make_private_dir(dir).map_err(|e| ApiError::storage(e.to_string()))?;
        let base = format!("/v1/checkpoints/{vm}/{name}/files");
        let mut bytes = Vec::new();
        let mut body = self.peers.fetch(host, &format!("{base}/{MANIFEST}")).await?;
        while let Some(part) = body.next().await {
            bytes.extend_from_slice(&part?);
            if bytes.len() as u64 > MAX_MANIFEST {
                return Err(ApiError::too_large("the checkpoint's first file is larger than any"));
            }
        }
        let manifest = Manifest::decode(&bytes[..])?;
        let (need, free) = (data_bytes(&manifest), store.free_bytes()?);
        if need > free {
            return Err(ApiError::blocked(
                format!("checkpoint {name:?} cannot be fetched from host {host}"),
                vec![format!("datastore {} has {free} bytes free, it needs {need}", store.name())],
            ));
        }
        for (file, sums) in manifest.files() {
            let path = dir.join(&file);
            let mut arriving = Arriving::create(&path, sums)?;
            let mut body = self.peers.fetch(host, &format!("{base}/{file}")).await?;
            while let Some(part) = body.next().await {
                let part = part?;
                // Bytes that came already; the writes are to the page cache.
                tokio::task::block_in_place(|| arriving.push(&part))?;
            }
            tokio::task::block_in_place(|| arriving.finish())?;
        }
        let path = dir.join(MANIFEST);
        tokio::fs::write(&path, &bytes).await.map_err(|e| ApiError::io("write", &path, &e))
    }

    /// One file of a checkpoint for another host: the first one whole, of the others the chunks that hold data.
    pub async fn checkpoint_file(&self, vm: &str, name: &str, file: &str) -> Result<Body, ApiError> {
        let found = self
            .find_checkpoint(vm, name)?
            .ok_or_else(|| ApiError::not_found(format!("there is no checkpoint {name:?} of VM {vm:?}")))?;
        let path = found.dir.join(MANIFEST);
        if file == MANIFEST {
            let bytes = tokio::fs::read(&path).await.map_err(|e| ApiError::io("read", &path, &e))?;
            return Ok(Body::from(bytes));
        }
        let dir = found.dir.clone();
        let manifest = blocking(move || Ok(read_manifest(&dir)?)).await?;
        // Only names of the checkpoint's own: what is asked for becomes part of a path.
        let sums =
            manifest.files().into_iter().find(|(known, _)| known == file).map(|(_, sums)| sums.clone());
        let sums = sums.ok_or_else(|| ApiError::not_found(format!("a checkpoint has no file {file:?}")))?;
        let path = found.dir.join(file);
        let opened = tokio::fs::File::open(&path).await.map_err(|e| ApiError::io("open", &path, &e))?;
        let chunks = sums.chunks.into_iter().map(|chunk| chunk.index);
        let length = sums.bytes;
        Ok(Body::from_stream(stream::try_unfold(
            (opened, chunks),
            move |(mut file, mut chunks)| async move {
                let Some(index) = chunks.next() else { return Ok::<_, std::io::Error>(None) };
                let mut buffer = vec![0; CHUNK.min(length - index * CHUNK) as usize];
                file.seek(std::io::SeekFrom::Start(index * CHUNK)).await?;
                file.read_exact(&mut buffer).await?;
                Ok(Some((Bytes::from(buffer), (file, chunks))))
            },
        )))
    }
}

/// What keeps a checkpoint from being this VM's: the VM was made anew since, and differently.
fn differences(vm: &VmDir, manifest: &Manifest, from: &Path) -> Result<Vec<String>, ApiError> {
    let mut blockers = Vec::new();
    let plain = |definition: &VmDefinition| {
        let mut plain = definition.clone();
        plain.disks.iter_mut().for_each(|disk| disk.datastore.clear());
        plain
    };
    if plain(&vm.definition()?) != plain(&manifest.vm) {
        blockers.push("the VM is defined otherwise now than in the checkpoint; remove it first".to_owned());
    }
    for (path, sums) in [(vm.kernel(), Some(&manifest.kernel)), (vm.initrd(), manifest.initrd.as_ref())] {
        let same = match sums {
            Some(sums) => path.exists() && sums.read(&path, |_, _| Ok(())).is_ok(),
            None => !path.exists(),
        };
        if !same {
            let file = path.file_name().unwrap_or_default().display().to_string();
            blockers.push(format!("the VM has another {file} now than in the checkpoint; remove it first"));
        }
    }
    tracing::debug!(checkpoint = %from.display(), ?blockers, "compared with the VM");
    Ok(blockers)
}
