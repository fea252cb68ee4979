//! Checkpoints as the VM's process takes them, and the beginning from one.
//!
//! Lives here: who may, and when the VM is owned. Never enters: the files (`crate::checkpoint`).

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, mpsc},
    thread,
};

use vmove_mirror::journal::Record;
use vmove_storage::{BackingPolicy, OpenOptions, OwnerState, Stamp};

use super::{ProcessError, Shared, Wake, serve, shape, sync_definition};
use crate::{
    checkpoint::{Taking, TakingEnd, load},
    machine::{DiskConfig, DiskSource, Machine},
    migrate::{SourceEnd, image_format, placement, stop_points},
    process::protocol::{CheckpointOrder, RunState},
};

/// Begins to take a checkpoint. While it is taken it stands in the place of a move: there is one thing at a time.
pub(super) fn begin(shared: &Arc<Shared>, order: CheckpointOrder) -> Result<(), String> {
    let mut state = shared.lock();
    if let Some((id, _)) = &state.moving {
        return Err(format!("the VM is on the move already ({id})"));
    }
    let Some(machine) = state.machine.clone() else {
        return Err("the VM does not run here".into());
    };
    let mut shapes = Vec::new();
    for definition in &state.spec.vm.disks {
        let place = state.disks.iter().find(|place| place.name == definition.name);
        let place = place.ok_or_else(|| format!("disk {} has no image", definition.name))?;
        shapes.push(shape(definition, &place.path)?);
    }
    shared.measuring.give_way();
    let (sender, inbox) = mpsc::channel();
    state.moving = Some((order.id.clone(), sender.clone()));
    shared.board.begin(&order.id);
    let taking = Taking {
        machine,
        console: shared.console.clone(),
        vm: state.spec.vm.clone(),
        host: state.spec.host.clone(),
        generation: state.generation,
        shapes,
        board: Arc::clone(&shared.board),
        events: (sender, inbox),
        order,
    };
    let wake = shared.wake.clone();
    let spawned = thread::Builder::new().name("checkpoint".into()).spawn(move || {
        // As for a move.
        let ended = catch_unwind(AssertUnwindSafe(|| taking.run()));
        let stands_still = matches!(ended, Ok(TakingEnd::StandsStill));
        let _ = wake.send(Wake::MoveEnded(match ended {
            Ok(_) => SourceEnd::Stayed,
            Err(_) => SourceEnd::Fenced("the checkpoint's thread has panicked".into()),
        }));
        if stands_still {
            let _ = wake.send(Wake::Stop);
        }
    });
    spawned.map(|_| ()).map_err(|e| {
        state.moving = None;
        format!("cannot start a thread: {e}")
    })
}

/// Goes on from a checkpoint. The journal gives the VM to this machine once all of it is loaded: until then the VM, if there was one
/// here, is as it was.
pub(super) fn restore(shared: &Arc<Shared>, dir: &Path) -> Result<Arc<Machine>, ProcessError> {
    serve(shared)?;
    let (vm, generation, places) = {
        let state = shared.lock();
        (state.spec.vm.clone(), state.generation, state.disks.clone())
    };
    let opened = vm.disks.iter().filter_map(|disk| {
        let place = places.iter().find(|place| place.name == disk.name)?;
        let options = OpenOptions {
            read_only: disk.read_only,
            format: Some(image_format(disk.format)),
            backing: BackingPolicy::Deny,
            // Nobody's as yet.
            owner: None,
        };
        let source = DiskSource::Image { path: place.path.clone(), options };
        Some(DiskConfig { name: disk.name.clone(), source })
    });
    stop_points::reach("restore.load");
    let run = uuid::Uuid::new_v4().into_bytes();
    let machine = load(dir, &vm, opened.collect(), &shared.console, run)?;
    stop_points::reach("restore.journal-owner");
    let owner = Record::Owner { generation, disks: places.iter().map(placement).collect() };
    shared.journal().append(&owner).map_err(|e| ProcessError::Settle(e.to_string()))?;
    stop_points::reach("restore.run");
    for place in &places {
        Stamp { vm: vm.name.clone(), generation, state: OwnerState::Owned }.write(&place.path)?;
    }
    // As after a move: the guest's packets find their way at once.
    if let Err(error) = machine.announce() {
        tracing::warn!(%error, "the guest's networks are not told that it is here");
    }
    machine.resume()?;
    let machine = Arc::new(machine);
    let mut state = shared.lock();
    state.machine = Some(Arc::clone(&machine));
    state.run = RunState::Running;
    sync_definition(&mut state);
    Ok(machine)
}
