//! What each VM of this host is doing, from its process if there is one, else from its journal; starting, stopping, removing.
//!
//! Never enters: moves, making VMs, what to do after a crash.

use std::sync::Arc;
use std::time::Duration;

use vmove_compute::process::protocol::{LaunchSpec, ProcessStatus, Request, RunState, Start};
use vmove_mirror::journal::Standing;

use super::control::{self, ControlError};
use super::error::{ApiError, blocking};
use super::registry::{self, Reservation};
use super::settle::Settled;
use super::vmdir::{VmDir, placements};
use super::{Agent, hostinfo, images, process};
use crate::api::types::{DiskPlacement, VmDefinition, VmDetail, VmState, VmSummary};

/// How long a VM process may take to flush its disks and end.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// How long the work after the end of a process or a move is waited for.
const AFTERMATH: Duration = Duration::from_secs(10);
/// How often is looked whether it has ended.
const AFTERMATH_INTERVAL: Duration = Duration::from_millis(20);

/// One VM as it is now.
#[derive(Debug, Clone)]
pub struct VmView {
    /// Its definition, with the datastores as they are.
    pub definition: VmDefinition,
    /// What it is doing.
    pub state: VmState,
    /// Ownership generation.
    pub generation: u64,
    /// Where its disks are.
    pub disks: Vec<DiskPlacement>,
    /// Its process.
    pub pid: Option<u32>,
    /// Move in progress from here.
    pub moving: Option<String>,
    /// Why it failed or cannot be used.
    pub error: Option<String>,
    /// What its process says, if it answers.
    pub status: Option<ProcessStatus>,
}

impl Agent {
    /// One VM; none if it is not here, or only its remains are.
    pub async fn view(&self, name: &str) -> Result<Option<VmView>, ApiError> {
        let vm = self.registry.vm(name)?;
        if !vm.exists() {
            return Ok(None);
        }
        match self.look_at(name, &vm).await {
            // Its directory was removed while it was looked at.
            Err(_) if !vm.exists() => Ok(None),
            seen => seen,
        }
    }

    async fn look_at(&self, name: &str, vm: &VmDir) -> Result<Option<VmView>, ApiError> {
        match control::status(vm.path()).await {
            Ok(status) => {
                let mut view = view_of_process(vm, status)?;
                view.error = self.registry.conflict(name);
                Ok(Some(view))
            }
            Err(ControlError::Gone(_)) => {
                let dir = vm.path().to_path_buf();
                let pid = blocking(move || Ok(process::find(&dir))).await?;
                match pid {
                    Some(pid) => Ok(Some(view_of_starting(vm, pid)?)),
                    None => self.view_of_journal(name, vm),
                }
            }
            Err(error) => {
                let mut view = view_of_starting(vm, 0)?;
                view.pid = None;
                view.error = Some(error.to_string());
                Ok(Some(view))
            }
        }
    }

    pub(super) fn view_of_journal(&self, name: &str, vm: &VmDir) -> Result<Option<VmView>, ApiError> {
        let mut definition = vm.definition()?;
        let error_text = vm.error_text();
        let ended = error_text.clone().or_else(|| self.registry.ended(name));
        let journal = vm.journal()?;
        let (state, generation, disks, error) = match journal.standing() {
            Standing::Owner { generation, disks } | Standing::Moving { generation, disks, .. } => {
                let state = if error_text.is_some() { VmState::Failed } else { VmState::Stopped };
                (state, *generation, placements(disks), ended)
            }
            Standing::Lost { host, disks, .. } => {
                let error = format!(
                    "host {host} has taken it over; it is never started here, `vmove recover {name}` tells more"
                );
                // What is here is older than what the owner has, whatever its number.
                (VmState::Lost, 0, placements(disks), Some(error))
            }
            Standing::Incoming { generation, disks, prepared, from_host, .. } => {
                let state = if *prepared { VmState::Undecided } else { VmState::Incoming };
                let error = prepared.then(|| {
                    format!(
                        "it arrived from host {from_host}, whose word on the move is awaited; nobody runs it"
                    )
                });
                (state, *generation, placements(disks), error)
            }
            Standing::Committed { to_host, generation, disks, .. } => {
                let error = format!("it has moved to host {to_host}, which has not confirmed that yet");
                (VmState::Undecided, *generation, placements(disks), Some(error))
            }
            Standing::Nothing | Standing::Discarded { .. } | Standing::Released { .. } => return Ok(None),
        };
        for disk in &mut definition.disks {
            if let Some(placed) = disks.iter().find(|placed| placed.name == disk.name) {
                disk.datastore.clone_from(&placed.datastore);
            }
        }
        Ok(Some(VmView {
            definition,
            state,
            generation,
            disks,
            pid: None,
            moving: None,
            error,
            status: None,
        }))
    }

    /// One VM, or the error that says it is not here.
    pub async fn must_view(&self, name: &str) -> Result<VmView, ApiError> {
        self.view(name).await?.ok_or_else(|| {
            // Nothing of it is seen here yet, and it must not go on elsewhere as well.
            if self.registry.busy(name) == Some(registry::RESTORING) {
                return ApiError::busy(format!("VM {name:?} is being restored on host {}", self.config.name));
            }
            ApiError::not_found(format!(
                "there is no VM {name:?} on host {} nor on a host it can reach",
                self.config.name
            ))
        })
    }

    /// A VM for a list.
    pub fn summary(&self, view: &VmView) -> VmSummary {
        VmSummary {
            name: view.definition.name.clone(),
            state: view.state,
            vcpus: view.definition.vcpus,
            memory_mib: view.definition.memory_mib,
            host: self.config.name.clone(),
            disks: view.disks.clone(),
            generation: view.generation,
            move_id: view.moving.clone(),
            error: view.error.clone(),
        }
    }

    /// All that is known of a VM.
    pub fn detail(&self, view: &VmView) -> VmDetail {
        VmDetail { summary: self.summary(view), definition: view.definition.clone(), pid: view.pid }
    }

    /// The VMs of this host, by name. One whose files cannot be read is listed as failed.
    pub async fn list(&self) -> Result<Vec<VmSummary>, ApiError> {
        let mut vms = Vec::new();
        for name in self.registry.names()? {
            match self.view(&name).await {
                Ok(Some(view)) => vms.push(self.summary(&view)),
                Ok(None) => {}
                Err(error) => vms.push(self.unreadable(name, error.message)),
            }
        }
        Ok(vms)
    }

    /// A VM whose files cannot be read, for a list.
    pub(super) fn unreadable(&self, name: String, error: String) -> VmSummary {
        VmSummary {
            name,
            state: VmState::Failed,
            vcpus: 0,
            memory_mib: 0,
            host: self.config.name.clone(),
            disks: Vec::new(),
            generation: 0,
            move_id: None,
            error: Some(error),
        }
    }

    /// Reserves a VM. What this agent does with it for a moment after a process or a move has ended is waited out: who has just
    /// stopped or moved it knows nothing of that.
    pub(super) async fn reserve_soon(
        self: &Arc<Self>,
        name: &str,
        doing: &'static str,
    ) -> Result<Reservation, ApiError> {
        let dir = self.registry.vm(name)?.path().to_path_buf();
        let end = tokio::time::Instant::now() + AFTERMATH;
        loop {
            let refusal = match self.registry.reserve(name, doing) {
                Ok(reservation) => return Ok(reservation),
                Err(refusal) => refusal,
            };
            let passing = match self.registry.busy(name) {
                None | Some(registry::SETTLING) => true,
                Some(registry::MOVING) => {
                    !control::status(&dir).await.is_ok_and(|status| status.moving.is_some())
                }
                Some(_) => false,
            };
            if !passing || tokio::time::Instant::now() >= end || !self.pause(AFTERMATH_INTERVAL).await {
                return Err(refusal);
            }
        }
    }

    /// Boots a stopped VM.
    pub async fn start(self: &Arc<Self>, name: &str) -> Result<VmSummary, ApiError> {
        let reservation = self.reserve_soon(name, "being started").await?;
        let view = self.must_view(name).await?;
        self.refuse_in_maintenance()?;
        match view.state {
            VmState::Stopped | VmState::Failed => {}
            VmState::Undecided | VmState::Lost => return Err(undecided(name, &view)),
            _ => return Err(ApiError::conflict(format!("VM {name:?} is {} already", word(view.state)))),
        }
        self.settle_before_start(name).await?;
        let view = self.must_view(name).await?;
        match view.state {
            VmState::Undecided | VmState::Lost => return Err(undecided(name, &view)),
            // Settling has started it: it had come here and never run.
            _ if view.pid.is_some() => {}
            _ => self.boot(name).await?,
        }
        drop(reservation);
        Ok(self.summary(&self.must_view(name).await?))
    }

    /// Does first what is still to be done after the VM's last process: ends a move that died with it, removes images it left, and
    /// asks the target of an aborted move whether it was taken over there. Who starts a VM may be quicker than the agent.
    pub(super) async fn settle_before_start(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let end = tokio::time::Instant::now() + AFTERMATH;
        loop {
            match self.settle_reserved(name).await? {
                Settled::Done => return Ok(()),
                Settled::Again => {}
                Settled::Waiting => break,
                // Its process is ending: the kernel takes its time with much memory.
                Settled::Busy => {
                    if tokio::time::Instant::now() >= end || !self.pause(AFTERMATH_INTERVAL).await {
                        return Err(ApiError::busy(format!("the process of VM {name:?} has not ended yet")));
                    }
                }
            }
        }
        let vm = self.registry.vm(name)?;
        let journal = blocking(move || vm.journal()).await?;
        let why = match journal.open_ends().first() {
            Some(end) => format!(
                "its last move, to host {0}, was aborted here, and that host does not answer whether it was taken over there; bring \
                 host {0} back",
                end.host
            ),
            None => "its owner is not decided".to_owned(),
        };
        Err(ApiError::undecided(format!("VM {name:?} is not started: {why}, or see `vmove recover {name}`")))
    }

    /// Boots a VM that is this host's by its journal and has no process. The caller has reserved it.
    pub(super) async fn boot(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let vm = self.registry.vm(name)?;
        let spec = {
            let vm = vm.clone();
            let agent = self.clone();
            blocking(move || agent.boot_spec(&vm)).await?
        };
        self.launch(name, &vm, &spec).await?;
        Ok(())
    }

    fn boot_spec(&self, vm: &VmDir) -> Result<LaunchSpec, ApiError> {
        let mut definition = vm.definition()?;
        let Standing::Owner { generation, disks } = vm.journal()?.standing().clone() else {
            return Err(ApiError::undecided(format!(
                "VM {:?} is not this host's to start: its last move is not settled",
                definition.name
            )));
        };
        let disks = placements(&disks);
        let blockers = self.boot_blockers(&definition)?;
        if !blockers.is_empty() {
            return Err(ApiError::blocked(format!("cannot start VM {:?}", definition.name), blockers));
        }
        if definition.cpu_features.is_empty() {
            definition.cpu_features = self.given_features()?;
            vm.save_definition(&definition)?;
        }
        images::own(&disks, &definition.name, generation)?;
        let initrd = vm.initrd();
        Ok(LaunchSpec {
            vm: definition,
            kernel: vm.kernel(),
            initrd: initrd.exists().then_some(initrd),
            host: self.config.name.clone(),
            generation,
            disks,
            identity: self.tls.is_some().then(|| self.identity.paths()),
            start: Start::Boot,
        })
    }

    /// What a guest that starts here for the first time may build on, and every later host must offer: what KVM gives it, as far as
    /// this host says of itself that it offers it.
    fn given_features(&self) -> Result<Vec<String>, ApiError> {
        let Ok(given) = vmove_compute::kvm::host_features() else {
            // Without KVM no guest starts; the VM process says why.
            return Ok(Vec::new());
        };
        let offered = hostinfo::cpu_features(&self.config.cpu_mask)?;
        Ok(given.into_iter().filter(|feature| offered.contains(feature)).collect())
    }

    pub(super) fn boot_blockers(&self, definition: &VmDefinition) -> Result<Vec<String>, ApiError> {
        let offered = hostinfo::cpu_features(&self.config.cpu_mask)?;
        let free = hostinfo::memory()?.available;
        let mut blockers = super::plan::host_blockers(
            &self.config.name,
            definition,
            &definition.cpu_features,
            &offered,
            free,
        );
        blockers.extend(self.network_blockers(definition)?);
        Ok(blockers)
    }

    /// Ends a running VM: its disks are flushed, the guest is not asked.
    pub async fn stop(&self, name: &str) -> Result<VmSummary, ApiError> {
        let view = self.must_view(name).await?;
        match view.state {
            VmState::Running => {}
            VmState::Moving => {
                return Err(ApiError::busy(format!(
                    "VM {name:?} is on the move ({}); cancel that first",
                    view.moving.as_deref().unwrap_or_default()
                )));
            }
            VmState::Undecided => return Err(undecided(name, &view)),
            _ => return Err(ApiError::conflict(format!("VM {name:?} is {}", word(view.state)))),
        }
        let vm = self.registry.vm(name)?;
        control::ask(vm.path(), &Request::Stop)
            .await
            .map_err(|e| ApiError::vm_process(format!("cannot stop VM {name:?}: {e}")))?;
        if !self.wait_gone(&vm, STOP_DEADLINE).await {
            return Err(ApiError::vm_process(format!(
                "VM {name:?} was told to stop and has not ended within {} s; its process {} may hang, see {}",
                STOP_DEADLINE.as_secs(),
                view.pid.unwrap_or_default(),
                vm.log().display()
            )));
        }
        Ok(self.summary(&self.must_view(name).await?))
    }

    /// Presses the power button of a running VM, on the move or not. What the guest makes of it shows in the VM's state.
    pub async fn press_power_button(&self, name: &str) -> Result<(), ApiError> {
        let view = self.must_view(name).await?;
        match view.state {
            VmState::Running | VmState::Moving => {}
            VmState::Undecided => return Err(undecided(name, &view)),
            _ => return Err(ApiError::conflict(format!("VM {name:?} is {}", word(view.state)))),
        }
        let vm = self.registry.vm(name)?;
        let pressed = control::ask(vm.path(), &Request::PowerButton).await;
        pressed.map(drop).map_err(|error| {
            let text = format!("cannot press the power button of VM {name:?}: {error}");
            match error {
                ControlError::Failed(_) => ApiError::vm_process(text),
                // It stands still for a moment, or is gone: the next question finds it elsewhere, or ended.
                ControlError::Refused(_) | ControlError::Gone(_) => ApiError::busy(text),
            }
        })
    }

    /// Waits until the VM process of a directory has ended; false if it has not in time.
    pub(super) async fn wait_gone(&self, vm: &VmDir, deadline: Duration) -> bool {
        let end = tokio::time::Instant::now() + deadline;
        loop {
            let dir = vm.path().to_path_buf();
            let found = tokio::task::spawn_blocking(move || process::find(&dir)).await;
            if matches!(found, Ok(None)) {
                return true;
            }
            if tokio::time::Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Removes a VM that does not run, with its disks.
    pub async fn remove(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let reservation = self.reserve_soon(name, "being removed").await?;
        let view = self.must_view(name).await?;
        match view.state {
            VmState::Stopped | VmState::Failed => {}
            VmState::Undecided | VmState::Lost => return Err(undecided(name, &view)),
            _ => {
                return Err(ApiError::conflict(format!(
                    "VM {name:?} is {}; stop it first",
                    word(view.state)
                )));
            }
        }
        let (agent, vm) = (self.clone(), self.registry.vm(name)?);
        let disks = view.disks;
        let owner = name.to_owned();
        blocking(move || {
            // Their targets may still ask how they ended.
            agent.archive_moves(&vm)?;
            for disk in &disks {
                // An image that was given to another VM meanwhile is not ours to remove.
                if vmove_storage::Stamp::read(&disk.path)?.is_none_or(|stamp| stamp.vm == owner) {
                    images::remove(&disk.path)?;
                }
            }
            images::remove_empty_dirs(&agent.stores(), &owner);
            agent.remove_dir(&vm)
        })
        .await?;
        self.registry.set_ended(name, None);
        drop(reservation);
        Ok(())
    }

    /// Removes a VM's directory in one step: half a directory is never seen.
    pub(super) fn remove_dir(&self, vm: &VmDir) -> Result<(), ApiError> {
        let gone = self.state.join(format!("{}{}", super::launch::GONE_PREFIX, uuid::Uuid::new_v4()));
        std::fs::rename(vm.path(), &gone).map_err(|e| ApiError::io("remove", vm.path(), &e))?;
        std::fs::remove_dir_all(&gone).map_err(|e| ApiError::io("remove", &gone, &e))
    }
}

fn view_of_process(vm: &VmDir, status: ProcessStatus) -> Result<VmView, ApiError> {
    // The process knows what the guest was given and where its disks are now; keep it for the time after.
    if matches!(status.state, RunState::Running) && vm.definition().is_ok_and(|saved| saved != status.vm) {
        vm.save_definition(&status.vm)?;
    }
    let state = match (status.state, &status.moving) {
        (RunState::Running, None) => VmState::Running,
        (RunState::Running | RunState::Leaving, Some(_)) => VmState::Moving,
        (RunState::Leaving, None) => VmState::Running,
        (RunState::Incoming, _) => VmState::Incoming,
        (RunState::Undecided, _) => VmState::Undecided,
    };
    Ok(VmView {
        definition: status.vm.clone(),
        state,
        generation: status.generation,
        disks: status.disks.clone(),
        pid: Some(status.pid),
        moving: status.moving.clone(),
        error: None,
        status: Some(status),
    })
}

/// A process that does not answer yet.
fn view_of_starting(vm: &VmDir, pid: u32) -> Result<VmView, ApiError> {
    let launch = vm.launch();
    let arriving =
        launch.as_ref().is_some_and(|spec| matches!(spec.start, Start::Incoming(_) | Start::Restore(_)));
    let definition = vm.definition()?;
    Ok(VmView {
        definition,
        state: if arriving { VmState::Incoming } else { VmState::Running },
        generation: launch.as_ref().map_or(0, |spec| spec.generation),
        disks: launch.map_or_else(Vec::new, |spec| spec.disks),
        pid: Some(pid),
        moving: None,
        error: None,
        status: None,
    })
}

fn undecided(name: &str, view: &VmView) -> ApiError {
    ApiError::undecided(format!(
        "VM {name:?}: {}",
        view.error.as_deref().unwrap_or("its owner is not decided")
    ))
}

/// The state in a sentence.
pub fn word(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Stopped => "stopped",
        VmState::Incoming => "arriving from another host",
        VmState::Undecided => "undecided",
        VmState::Moving => "on the move",
        VmState::Failed => "failed",
        VmState::Lost => "taken over by another host",
    }
}
