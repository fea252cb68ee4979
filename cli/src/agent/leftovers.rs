//! What a move that was cut short, or is over, leaves on a host: images, directories.
//!
//! Lives here: finding it, removing it or stamping it stale; only what a stamp says is the VM's, and no image that may be the only copy.
//! Never enters: whether that may be done (settle).

use std::sync::Arc;

use vmove_compute::process::protocol::Start;
use vmove_mirror::journal::{Record, Standing};
use vmove_storage::{OwnerState, Stamp};

use super::error::{ApiError, blocking};
use super::vmdir::{VmDir, placements};
use super::{Agent, create, images};
use crate::api::types::{DiskPlacement, MoveRequest, VmDefinition};

impl Agent {
    /// Ends what moves of a VM of this host left in its datastores, when their process, or the agent that settled them, died before it
    /// could: images that were to be the VM's, and those it had before. Once the VM runs, nobody else would.
    pub(super) async fn clear_left_behind(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let (agent, vm, name) = (self.clone(), self.registry.vm(name)?, name.to_owned());
        blocking(move || {
            let journal = vm.durable_journal()?;
            if let Standing::Owner { disks, .. } = journal.standing() {
                retire_left(&name, &vm, journal.standing())?;
                agent.remove_unfinished(&name, &placements(disks))?;
                images::remove_empty_dirs(&agent.stores(), &name);
            }
            Ok(())
        })
        .await
    }

    /// Removes images of a VM that a broken-off move left unfinished in this host's datastores.
    pub(super) fn remove_unfinished(&self, name: &str, keep: &[DiskPlacement]) -> Result<(), ApiError> {
        for store in self.stores().iter() {
            for (_, _, path) in store.list_images(name)? {
                let unfinished = Stamp::read(&path)?
                    .is_some_and(|stamp| stamp.vm == name && stamp.state == OwnerState::Incoming);
                if unfinished && !keep.iter().any(|disk| disk.path == path) {
                    images::remove(&path)?;
                }
            }
        }
        Ok(())
    }

    /// Removes what is here of a VM that is not this host's: images, directory. Reports of moves are kept.
    pub(super) async fn discard(self: &Arc<Self>, name: &str, vm: &VmDir) -> Result<(), ApiError> {
        let (agent, owner, dir) = (self.clone(), name.to_owned(), vm.clone());
        blocking(move || {
            agent.discard_images(&owner, &dir)?;
            images::remove_empty_dirs(&agent.stores(), &owner);
            agent.archive_moves(&dir)?;
            agent.remove_dir(&dir)
        })
        .await?;
        self.registry.set_ended(name, None);
        tracing::info!(vm = name, "nothing of the VM is left here");
        Ok(())
    }

    fn discard_images(&self, name: &str, vm: &VmDir) -> Result<(), ApiError> {
        match vm.journal()?.standing() {
            Standing::Released { .. } => retire(name, vm),
            Standing::Incoming { disks, .. } | Standing::Discarded { disks, .. } => {
                let arrived = vm.records()?.into_iter().rev().find_map(|record| match record {
                    Record::Incoming { generation, .. } => Some(generation),
                    _ => None,
                });
                remove_arrived(name, arrived.unwrap_or(0), &placements(disks))
            }
            Standing::Nothing => {
                // Either an arrival that did not come as far as its first record, or a creation.
                if let Some(launch) = vm.launch()
                    && matches!(launch.start, Start::Incoming(_))
                {
                    return remove_arrived(name, launch.generation, &launch.disks);
                }
                match vm.definition() {
                    Ok(definition) => self.remove_half_made(&definition),
                    Err(_) => Ok(()),
                }
            }
            Standing::Owner { .. }
            | Standing::Moving { .. }
            | Standing::Committed { .. }
            | Standing::Lost { .. } => {
                Err(ApiError::internal(format!("VM {name:?} is not to be discarded: it has an owner")))
            }
        }
    }

    fn remove_half_made(&self, definition: &VmDefinition) -> Result<(), ApiError> {
        for disk in &definition.disks {
            let Ok(store) = self.store(&disk.datastore) else { continue };
            let path = store.image_path(&definition.name, &disk.name, images::format_of(disk.format))?;
            if Stamp::read(&path)?.is_some_and(|stamp| create::is_unfinished(&stamp, &definition.name)) {
                images::remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Images of a VM that runs elsewhere: removed, or kept as stale if that was asked for. The VM process does this itself; here
/// it is made up for after a crash.
fn retire(name: &str, vm: &VmDir) -> Result<(), ApiError> {
    let records = vm.records()?;
    let Some((generation, disks)) = records.iter().rev().find_map(Record::owned) else { return Ok(()) };
    retire_disks(name, vm, generation, &placements(disks))
}

/// Images that a VM of this host left behind in another datastore, when its process died between that commit and their end.
pub(super) fn retire_left(name: &str, vm: &VmDir, standing: &Standing) -> Result<(), ApiError> {
    let Standing::Owner { generation: current, disks } = standing else { return Ok(()) };
    for (generation, had) in vm.records()?.iter().filter_map(Record::owned) {
        if generation >= *current {
            continue;
        }
        let mut left = placements(had);
        left.retain(|old| disks.iter().all(|disk| old.path.as_os_str() != disk.path.as_str()));
        retire_disks(name, vm, generation, &left)?;
    }
    Ok(())
}

/// Removes images of a VM that were its own up to `generation`, or stamps them stale if the last move was asked to keep them.
fn retire_disks(name: &str, vm: &VmDir, generation: u64, disks: &[DiskPlacement]) -> Result<(), ApiError> {
    let keep = saved_request(vm).is_some_and(|request| request.keep_source);
    for disk in disks {
        let Some(stamp) = Stamp::read(&disk.path)? else { continue };
        if stamp.vm != name || stamp.generation > generation || stamp.state != OwnerState::Owned {
            continue;
        }
        if keep {
            Stamp { state: OwnerState::Stale, ..stamp }.write(&disk.path)?;
        } else {
            images::remove(&disk.path)?;
        }
    }
    Ok(())
}

/// Removes images made for an arrival that will not be. They are stamped before they are made: one without a stamp is somebody's.
fn remove_arrived(name: &str, generation: u64, disks: &[DiskPlacement]) -> Result<(), ApiError> {
    for disk in disks {
        let ours = Stamp::read(&disk.path)?.is_some_and(|stamp| {
            stamp.vm == name && stamp.state == OwnerState::Incoming && stamp.generation <= generation
        });
        if ours {
            images::remove(&disk.path)?;
        }
    }
    Ok(())
}

/// The request that a VM's last move was begun with.
fn saved_request(vm: &VmDir) -> Option<MoveRequest> {
    serde_json::from_slice(&std::fs::read(vm.path().join(super::moves::REQUEST_FILE)).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::vmdir::disks_at;
    use vmove_mirror::journal::{MoveId, TAKE_OVER_STEP};

    #[test]
    fn a_broken_off_arrival_leaves_no_image_but_spares_others() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str| DiskPlacement {
            name: name.into(),
            datastore: "x".into(),
            path: dir.path().join(name),
        };
        let stamp = |vm: &str, state| Stamp { vm: vm.into(), generation: 2, state };
        let newer = Stamp { generation: 3, ..stamp("web", OwnerState::Incoming) };
        for (name, found) in [
            ("bare", None),
            ("arriving", Some(stamp("web", OwnerState::Incoming))),
            ("owned", Some(stamp("web", OwnerState::Owned))),
            ("newer", Some(newer)),
            ("stale", Some(stamp("web", OwnerState::Stale))),
            ("other", Some(stamp("db", OwnerState::Owned))),
        ] {
            let disk = disk(name);
            std::fs::write(&disk.path, b"x").unwrap();
            if let Some(stamp) = found {
                stamp.write(&disk.path).unwrap();
            }
        }
        // Stamped, and the crash came before the image was made.
        stamp("web", OwnerState::Incoming).write(&dir.path().join("missing")).unwrap();
        let all = ["bare", "arriving", "owned", "newer", "stale", "other", "missing"].map(disk);
        remove_arrived("web", 2, &all).unwrap();
        let left: Vec<bool> = all.iter().map(|disk| disk.path.exists()).collect();
        assert_eq!(left, [true, false, true, true, true, true, false]);
        assert_eq!(Stamp::read(&all[6].path).unwrap(), None);
    }

    #[test]
    fn images_of_a_vm_that_was_taken_over_and_has_left_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let disk =
            DiskPlacement { name: "vda".into(), datastore: "x".into(), path: dir.path().join("vda.qcow2") };
        let disks = disks_at(std::slice::from_ref(&disk)).unwrap();
        let vm = VmDir::new(dir.path().to_path_buf());
        let id = MoveId::new("m").unwrap();
        let generation = 1 + TAKE_OVER_STEP;
        for record in [
            Record::Owner { generation: 1, disks: disks.clone() },
            Record::Moving { move_id: id.clone(), to_host: Some("gone".into()), generation: 2 },
            Record::Aborted { move_id: id.clone() },
            Record::TakenOver { move_id: id, generation, disks },
        ] {
            vm.append(&record).unwrap();
        }
        std::fs::write(&disk.path, b"x").unwrap();
        Stamp { vm: "web".into(), generation, state: OwnerState::Owned }.write(&disk.path).unwrap();
        retire("web", &vm).unwrap();
        assert!(!disk.path.exists());
    }

    #[test]
    fn images_left_in_another_datastore_are_retired_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str| DiskPlacement {
            name: name.into(),
            datastore: "x".into(),
            path: dir.path().join(name),
        };
        let stamp = |vm: &str, generation, state| Stamp { vm: vm.into(), generation, state };
        let all = ["old", "stays", "stale", "other", "newer", "bare", "now"].map(disk);
        for (name, found) in [
            ("old", Some(stamp("web", 1, OwnerState::Owned))),
            ("stays", Some(stamp("web", 1, OwnerState::Owned))),
            ("stale", Some(stamp("web", 1, OwnerState::Stale))),
            ("other", Some(stamp("db", 1, OwnerState::Owned))),
            ("newer", Some(stamp("web", 2, OwnerState::Owned))),
            ("bare", None),
            ("now", Some(stamp("web", 2, OwnerState::Incoming))),
        ] {
            let path = disk(name).path;
            std::fs::write(&path, b"x").unwrap();
            if let Some(stamp) = found {
                stamp.write(&path).unwrap();
            }
        }
        let id = MoveId::new("m").unwrap();
        let home = tempfile::tempdir().unwrap();
        let vm = VmDir::new(home.path().to_path_buf());
        for record in [
            Record::Owner { generation: 1, disks: disks_at(&all[..6]).unwrap() },
            Record::Moving { move_id: id, to_host: None, generation: 2 },
            Record::Owner { generation: 2, disks: disks_at(&[disk("stays"), disk("now")]).unwrap() },
        ] {
            vm.append(&record).unwrap();
        }
        let standing = vm.journal().unwrap().standing().clone();
        let request = vm.path().join(crate::agent::moves::REQUEST_FILE);
        std::fs::write(&request, r#"{"keep_source":true}"#).unwrap();
        retire_left("web", &vm, &standing).unwrap();
        assert!(all.iter().all(|disk| disk.path.exists()), "asked to keep them");
        assert_eq!(Stamp::read(&all[0].path).unwrap().unwrap().state, OwnerState::Stale);
        stamp("web", 1, OwnerState::Owned).write(&all[0].path).unwrap();
        std::fs::remove_file(&request).unwrap();
        retire_left("web", &vm, &standing).unwrap();
        let left: Vec<bool> = all.iter().map(|disk| disk.path.exists()).collect();
        assert_eq!(left, [false, true, true, true, true, true, true]);
    }
}
