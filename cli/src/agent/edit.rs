//! Stopped VMs changed, renamed, cloned.
//!
//! A copy or a new name is a new VM whose journal record makes it this host's, like one that is created; of a rename, the old one goes
//! after it. [`RENAMED_FROM`] in the new one's directory lets the next agent finish that after a crash. Never enters: running VMs.

use std::path::Path;
use std::sync::Arc;

use vmove_mirror::journal::Record;
use vmove_storage::{ImageLock, LockMode, OwnerState, Stamp};

use super::create::{MAX_INITRD, MAX_KERNEL, check_definition, check_kernel, copy_whole};
use super::error::{ApiError, blocking};
use super::registry::Reservation;
use super::vmdir::{VmDir, disks_at};
use super::vms::{VmView, word};
use super::{Agent, images, seed};
use crate::api::definitions::EditVm;
use crate::api::types::{DiskPlacement, VmDefinition, VmState, VmSummary};

/// File in the directory of a VM that gets another's name and disks: the other's name.
const RENAMED_FROM: &str = "renamed-from";

/// What becomes of the images of the VM a new one comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Take {
    /// They are the new VM's, too, until the old one goes.
    Over,
    /// The new one gets copies.
    Copies,
}

impl Agent {
    /// Changes a VM that does not run.
    pub async fn edit(self: &Arc<Self>, name: &str, edit: EditVm) -> Result<VmSummary, ApiError> {
        let (reservation, view) = self.reserve_stopped(name, "being edited").await?;
        let (agent, vm) = (self.clone(), self.registry.vm(name)?);
        blocking(move || agent.apply(&vm, &view.definition, edit)).await?;
        drop(reservation);
        Ok(self.summary(&self.must_view(name).await?))
    }

    fn apply(&self, vm: &VmDir, old: &VmDefinition, edit: EditVm) -> Result<(), ApiError> {
        let mut new = edit.definition;
        self.fill_macs(&mut new)?;
        check_definition(&new)?;
        let mut blockers = fixed(old, &new);
        blockers.extend(self.taken_macs(&new)?);
        if !blockers.is_empty() {
            return Err(ApiError::blocked(format!("VM {:?} cannot be changed so", old.name), blockers));
        }
        if let Some(kernel) = &edit.kernel {
            check_kernel(kernel)?;
        }
        // Beside the old ones first: nothing is half done when a file turns out to be too large, or the disk full.
        for (from, to, cap) in
            [(&edit.kernel, vm.kernel(), MAX_KERNEL), (&edit.initrd, vm.initrd(), MAX_INITRD)]
        {
            if let Some(from) = from {
                let part = to.with_extension("part");
                let copied = copy_whole(vm, from, &part, cap)
                    .and_then(|()| std::fs::rename(&part, &to).map_err(|e| ApiError::io("replace", &to, &e)));
                if copied.is_err() {
                    // Best effort: the next edit makes it anew.
                    let _ = std::fs::remove_file(&part);
                }
                copied?;
            }
        }
        vm.save_definition(&new)
    }

    /// Gives a VM that does not run another name.
    pub async fn rename(self: &Arc<Self>, name: &str, new: &str) -> Result<VmSummary, ApiError> {
        let (reservation, view) = self.reserve_stopped(name, "being renamed").await?;
        // A move that was aborted here may have been taken over there: a new name must not hide that.
        self.settle_before_start(name).await?;
        let renamed = self.reserve_new(new).await?;
        let agent = self.clone();
        let (old, to) = (self.registry.vm(name)?, self.registry.vm(new)?);
        blocking(move || {
            agent.derive(&view, &old, &to, Take::Over)?;
            agent.finish_rename(&to)
        })
        .await?;
        self.registry.set_ended(name, None);
        drop((reservation, renamed));
        tracing::info!(vm = name, new, "VM renamed");
        Ok(self.summary(&self.must_view(new).await?))
    }

    /// Makes a copy of a VM that does not run: own disks, own MAC addresses, same everything else.
    pub async fn clone_vm(self: &Arc<Self>, name: &str, new: &str) -> Result<VmSummary, ApiError> {
        self.refuse_in_maintenance()?;
        let (reservation, view) = self.reserve_stopped(name, "being cloned").await?;
        let cloned = self.reserve_new(new).await?;
        let agent = self.clone();
        let (old, to) = (self.registry.vm(name)?, self.registry.vm(new)?);
        blocking(move || agent.derive(&view, &old, &to, Take::Copies)).await?;
        drop((reservation, cloned));
        tracing::info!(vm = name, new, "VM cloned");
        Ok(self.summary(&self.must_view(new).await?))
    }

    async fn reserve_stopped(
        self: &Arc<Self>,
        name: &str,
        doing: &'static str,
    ) -> Result<(Reservation, VmView), ApiError> {
        let reservation = self.reserve_soon(name, doing).await?;
        let view = self.must_view(name).await?;
        match view.state {
            VmState::Stopped | VmState::Failed => Ok((reservation, view)),
            VmState::Undecided | VmState::Lost => Err(ApiError::undecided(format!(
                "VM {name:?}: {}",
                view.error.as_deref().unwrap_or("its owner is not decided")
            ))),
            state => Err(ApiError::conflict(format!(
                "VM {name:?} is {}; this needs a stopped one: `vmove stop {name}` first",
                word(state)
            ))),
        }
    }

    /// Builds a VM out of another one. A failure, or a crash before the journal's record, leaves nothing of it.
    fn derive(&self, view: &VmView, old: &VmDir, vm: &VmDir, take: Take) -> Result<(), ApiError> {
        vm.sockets_fit().map_err(ApiError::invalid)?;
        let mut definition = view.definition.clone();
        definition.name = vm.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        if take == Take::Copies {
            for network in &mut definition.networks {
                network.mac = None;
            }
            self.fill_macs(&mut definition)?;
        }
        let mut disks = Vec::new();
        for (disk, placed) in definition.disks.iter().zip(&view.disks) {
            let store = self.store(&placed.datastore)?;
            let path = store.image_path(&definition.name, &disk.name, images::format_of(disk.format))?;
            if path.exists() || Stamp::path_of(&path).exists() {
                return Err(ApiError::conflict(format!(
                    "there is a file at {} already; move it away or choose another name",
                    path.display()
                )));
            }
            disks.push(DiskPlacement { name: disk.name.clone(), datastore: placed.datastore.clone(), path });
        }
        let built = self.write_derived(view, old, vm, &definition, &disks, take);
        if built.is_err() {
            self.take_back(vm, &definition.name, &disks);
        }
        built
    }

    fn write_derived(
        &self,
        view: &VmView,
        old: &VmDir,
        vm: &VmDir,
        definition: &VmDefinition,
        disks: &[DiskPlacement],
        take: Take,
    ) -> Result<(), ApiError> {
        let name = &definition.name;
        vm.make()?;
        vm.save_definition(definition)?;
        if take == Take::Over {
            vm.write_file(&vm.path().join(RENAMED_FROM), view.definition.name.as_bytes())?;
        }
        copy_whole(vm, &old.kernel(), &vm.kernel(), MAX_KERNEL)?;
        if old.initrd().exists() {
            copy_whole(vm, &old.initrd(), &vm.initrd(), MAX_INITRD)?;
        }
        for (disk, from) in disks.iter().zip(&view.disks) {
            self.store(&disk.datastore)?.create_vm_dir(name)?;
            // Nobody has it open meanwhile.
            let _lock = ImageLock::take(&from.path, LockMode::Write)?;
            Stamp { vm: name.clone(), generation: 1, state: OwnerState::Incoming }.write(&disk.path)?;
            match take {
                Take::Over => std::fs::hard_link(&from.path, &disk.path)
                    .map_err(|e| ApiError::io("give a second name to", &from.path, &e))?,
                Take::Copies => {
                    images::copy_sparse(&from.path, &disk.path)?;
                    if disk.name == seed::DISK {
                        seed::give_new_identity(&disk.path, name)?;
                    }
                }
            }
        }
        vm.append(&Record::Owner { generation: 1, disks: disks_at(disks)? })?;
        images::own(disks, name, 1)
    }

    /// The last step of a rename: the VM of the old name goes, its images are the new one's alone.
    fn finish_rename(&self, vm: &VmDir) -> Result<(), ApiError> {
        let marker = vm.path().join(RENAMED_FROM);
        let Ok(name) = std::fs::read_to_string(&marker) else { return Ok(()) };
        let old = self.registry.vm(&name)?;
        if old.exists() {
            self.archive_moves(&old)?;
            let view = self.view_of_journal(&name, &old)?;
            for disk in view.map(|view| view.disks).unwrap_or_default() {
                images::remove(&disk.path)?;
            }
            images::remove_empty_dirs(&self.stores(), &name);
            self.remove_dir(&old)?;
        }
        std::fs::remove_file(&marker).map_err(|e| ApiError::io("remove", &marker, &e))
    }

    /// Finishes renames that a crash broke off after the new VM was there. Before anything else is done with VMs.
    pub(super) fn finish_renames(&self) -> Result<(), ApiError> {
        for name in self.registry.names()? {
            let vm = self.registry.vm(&name)?;
            let whole = |path: &Path| path.join(RENAMED_FROM).exists();
            if whole(vm.path()) && self.view_of_journal(&name, &vm)?.is_some() {
                self.finish_rename(&vm)?;
            }
        }
        Ok(())
    }
}

/// What of a VM cannot be changed by editing its definition.
fn fixed(old: &VmDefinition, new: &VmDefinition) -> Vec<String> {
    let mut blockers = Vec::new();
    if new.name != old.name {
        blockers.push(format!("its name: use `vmove rename {} {}`", old.name, new.name));
    }
    let names = |vm: &VmDefinition| vm.disks.iter().map(|disk| disk.name.clone()).collect::<Vec<_>>();
    if names(old) != names(new) {
        blockers.push(format!("its disks: they are {}, in this order", names(old).join(", ")));
    }
    for disk in &new.disks {
        let Some(was) = old.disks.iter().find(|was| was.name == disk.name) else { continue };
        if (disk.size_bytes, disk.format) != (was.size_bytes, was.format) {
            blockers.push(format!("size and format of disk {}", disk.name));
        }
        if disk.datastore != was.datastore {
            blockers.push(format!(
                "the datastore of disk {0}: start it and use `vmove {1} --disk {0}={2}`",
                disk.name, old.name, disk.datastore
            ));
        }
    }
    blockers
}

#[cfg(test)]
mod tests {
    use super::super::test_hosts::Host;
    use super::*;
    use crate::api::definitions::NewName;
    use crate::api::types::NetworkDefinition;
    use crate::client::Client;
    use crate::definition;

    async fn names(client: &Client) -> Vec<String> {
        client.vms(false).await.unwrap().vms.into_iter().map(|vm| vm.name).collect()
    }

    #[tokio::test]
    async fn stopped_vms_are_edited_renamed_and_cloned() {
        let mut host = Host::new("left");
        let client = host.serve().await;
        let mut request = host.definition("web");
        let network =
            NetworkDefinition { name: "eth0".into(), bridge: Some("br0".into()), tap: None, mac: None };
        request.definition.networks.push(network);
        client.create(&request).await.unwrap();
        let mut web = client.vm("web").await.unwrap().definition;
        web.memory_mib += 64;
        let edit = EditVm { definition: web.clone(), kernel: None, initrd: None };
        assert_eq!(client.edit("web", &edit).await.unwrap().memory_mib, web.memory_mib);
        web.disks[0].size_bytes *= 2;
        let refused =
            client.edit("web", &EditVm { definition: web.clone(), ..edit.clone() }).await.unwrap_err();
        assert_eq!(refused.code(), Some("blocked"));
        let refused =
            client.edit("web", &EditVm { kernel: Some("/nonexistent".into()), ..edit }).await.unwrap_err();
        assert!(refused.to_string().contains("/nonexistent"), "{refused}");

        client.rename("web", &NewName { name: "shop".into() }).await.unwrap();
        client.clone_vm("shop", &NewName { name: "store".into() }).await.unwrap();
        assert_eq!(names(&client).await, ["shop", "store"]);
        let (shop, store) = (client.vm("shop").await.unwrap(), client.vm("store").await.unwrap());
        assert_eq!(shop.definition.networks, web.networks, "its address stays");
        assert_ne!(store.definition.networks[0].mac, web.networks[0].mac, "another's address is another");
        assert!(!host.image("fast", "web").exists() && !host.vm("web").path().exists());
        for name in ["shop", "store"] {
            let stamp = Stamp::read(&host.image("fast", name)).unwrap().unwrap();
            assert_eq!((stamp.vm.as_str(), stamp.state), (name, OwnerState::Owned));
        }
        for (new, word) in [("store", "already"), ("ls", "command of vmove"), ("../x", "begin")] {
            let refused = client.rename("shop", &NewName { name: new.into() }).await.unwrap_err();
            assert!(refused.to_string().contains(word), "{refused}");
        }
        client.remove("shop").await.unwrap();
        assert!(host.image("fast", "store").exists());
        host.end().await;
    }

    #[tokio::test]
    async fn a_rename_that_a_crash_broke_off_is_finished_or_has_not_been() {
        let mut host = Host::new("left");
        let client = host.serve().await;
        client.create(&host.definition("web")).await.unwrap();
        let half = async |host: &Host| {
            let agent = host.agent().clone();
            let view = agent.must_view("web").await.unwrap();
            let (old, new) = (host.vm("web"), host.vm("shop"));
            blocking(move || agent.derive(&view, &old, &new, Take::Over)).await.unwrap();
        };
        // Before the record that makes the new one.
        half(&host).await;
        std::fs::remove_file(host.vm("shop").path().join("journal")).unwrap();
        let image = host.image("fast", "shop");
        Stamp { vm: "shop".into(), generation: 1, state: OwnerState::Incoming }.write(&image).unwrap();
        host.end().await;
        let client = host.serve().await;
        for _ in 0..500 {
            if !host.vm("shop").path().exists() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(names(&client).await, ["web"]);
        assert!(!image.exists() && host.image("fast", "web").exists());
        // And after it.
        half(&host).await;
        assert_eq!(names(&client).await, ["shop", "web"]);
        host.end().await;
        let client = host.serve().await;
        assert_eq!(names(&client).await, ["shop"]);
        assert!(image.exists() && !host.image("fast", "web").exists());
        host.end().await;
    }

    #[test]
    fn what_stays_is_said_all_at_once() {
        let text = "name = \"a\"\nmemory = \"64MiB\"\n[[disks]]\nname = \"vda\"\nsize = \"1GiB\"\ndatastore = \"fast\"\n";
        let old = definition::parse(text).unwrap().definition;
        let changed = text.replace("64MiB", "2GiB").replace("memory", "vcpus = 4\nmemory");
        assert!(fixed(&old, &definition::parse(&changed).unwrap().definition).is_empty());
        let changed = text.replace("\"a\"", "\"b\"").replace("1GiB", "2GiB").replace("fast", "bulk");
        let blockers = fixed(&old, &definition::parse(&changed).unwrap().definition);
        for (blocker, word) in blockers.iter().zip(["vmove rename a b", "size and format", "--disk vda=bulk"])
        {
            assert!(blocker.contains(word), "{blocker}");
        }
        assert_eq!(blockers.len(), 3);
        let other = definition::parse(&text.replace("vda", "vdb")).unwrap().definition;
        assert_eq!(fixed(&old, &other).len(), 1);
    }
}
