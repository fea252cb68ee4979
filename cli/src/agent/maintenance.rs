//! Maintenance of this host: a flag on disk that keeps VMs from coming here, and which VMs it had when that began.
//!
//! Where those VMs are meanwhile is asked when it is needed: a list of that would be wrong after the next move. Never enters: moving
//! them away and back, which is the client's.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hyper::Method;

use super::error::{ApiError, blocking};
use super::{Agent, peers};
use crate::api::placement::{HadVm, Maintenance, MaintenanceRequest};
use crate::api::types::{VmState, VmSummary};
use crate::identity::files::write_private;

/// Most bytes of the file that are read.
const MAX_FILE: u64 = 16 << 20;

/// The flag and its file.
#[derive(Debug)]
pub struct MaintenanceFile {
    path: PathBuf,
    now: Mutex<Maintenance>,
}

impl MaintenanceFile {
    /// That of a state directory; none there means off.
    pub fn open(state: &Path) -> Result<Self, ApiError> {
        let path = state.join("maintenance.json");
        let now = match std::fs::metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Maintenance::default(),
            Err(error) => return Err(ApiError::io("read", &path, &error)),
            Ok(meta) if meta.len() > MAX_FILE => {
                return Err(ApiError::storage(format!("{} is longer than {MAX_FILE} bytes", path.display())));
            }
            Ok(_) => {
                let text = std::fs::read(&path).map_err(|e| ApiError::io("read", &path, &e))?;
                serde_json::from_slice(&text)
                    .map_err(|e| ApiError::storage(format!("{}: {e}", path.display())))?
            }
        };
        Ok(Self { path, now: Mutex::new(now) })
    }

    /// How it is.
    pub fn get(&self) -> Maintenance {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Maintenance> {
        // Replaced as a whole: nothing is left half done by a panic.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes it; on disk when this returns. `here` are the VMs of the host.
    fn change(&self, request: MaintenanceRequest, here: &[VmSummary]) -> Result<Maintenance, ApiError> {
        let mut now = self.lock();
        let next = changed(&now, request, here);
        let text = serde_json::to_string_pretty(&next)
            .map_err(|e| ApiError::internal(format!("cannot write maintenance: {e}")))?;
        write_private(&self.path, &text)?;
        now.clone_from(&next);
        Ok(next)
    }
}

/// What a request makes of it. Switched on again while it is on, it also remembers what has arrived since.
fn changed(now: &Maintenance, request: MaintenanceRequest, here: &[VmSummary]) -> Maintenance {
    let keep = !request.forget && (now.on || !request.on);
    let mut had = if keep { now.had.clone() } else { Vec::new() };
    if request.on {
        // Of the rest another host is the owner, or will be.
        let own = |vm: &&VmSummary| {
            !matches!(vm.state, VmState::Incoming | VmState::Undecided | VmState::Lost)
                && had.iter().all(|known| known.name != vm.name)
        };
        let disks = |vm: &VmSummary| {
            vm.disks.iter().map(|disk| (disk.name.clone(), disk.datastore.clone())).collect()
        };
        let more: Vec<_> =
            here.iter().filter(own).map(|vm| HadVm { name: vm.name.clone(), disks: disks(vm) }).collect();
        had.extend(more);
    }
    Maintenance { on: request.on, had }
}

impl Agent {
    /// Why nothing new may come to this host, if it is in maintenance.
    pub(super) fn maintenance_blocker(&self) -> Option<String> {
        let name = &self.config.name;
        self.maintenance.get().on.then(|| {
            format!(
                "host {name} is in maintenance and takes no VMs; `vmove host maintenance off {name}` ends that"
            )
        })
    }

    /// Refuses what would run one more VM on a host in maintenance.
    pub(super) fn refuse_in_maintenance(&self) -> Result<(), ApiError> {
        self.maintenance_blocker().map_or(Ok(()), |why| Err(ApiError::conflict(why)))
    }

    /// Switches maintenance of a host, this one or another.
    pub async fn set_maintenance(
        self: &Arc<Self>,
        host: &str,
        request: MaintenanceRequest,
    ) -> Result<Maintenance, ApiError> {
        if host != self.config.name {
            crate::identity::check_host_name(host)?;
            let path = format!("/v1/hosts/{host}/maintenance");
            return self.peers.call(host, Method::PUT, &path, Some(&request), peers::SHORT).await;
        }
        let here = self.list().await?;
        let agent = self.clone();
        let now = blocking(move || agent.maintenance.change(request, &here)).await?;
        tracing::info!(on = now.on, had = now.had.len(), "maintenance switched");
        Ok(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::DiskPlacement;

    fn vm(name: &str, state: VmState) -> VmSummary {
        let disk = DiskPlacement { name: "vda".into(), datastore: "fast".into(), path: "/x".into() };
        VmSummary {
            name: name.into(),
            state,
            vcpus: 1,
            memory_mib: 64,
            host: "a".into(),
            disks: vec![disk],
            generation: 1,
            move_id: None,
            error: None,
        }
    }

    #[test]
    fn it_survives_the_agent_and_remembers_what_was_here() {
        let dir = tempfile::tempdir().unwrap();
        let file = MaintenanceFile::open(dir.path()).unwrap();
        assert!(!file.get().on);
        let on = MaintenanceRequest { on: true, forget: false };
        let here = [vm("web", VmState::Running), vm("new", VmState::Incoming)];
        file.change(on, &here).unwrap();
        let again = MaintenanceFile::open(dir.path()).unwrap();
        assert_eq!(again.get(), file.get());
        let names = |now: &Maintenance| now.had.iter().map(|vm| vm.name.clone()).collect::<Vec<_>>();
        assert_eq!((again.get().on, names(&again.get())), (true, vec!["web".to_owned()]));
        assert_eq!(again.get().had[0].disks["vda"], "fast");
        // On again: what has arrived is remembered beside what is away already.
        again.change(on, &[vm("new", VmState::Running)]).unwrap();
        assert_eq!(names(&again.get()), ["web", "new"]);
        // Off keeps the list for those that are not back yet; the next time it begins anew.
        let off = again.change(MaintenanceRequest { on: false, forget: false }, &[]).unwrap();
        assert_eq!((off.on, off.had.len()), (false, 2));
        assert_eq!(names(&again.change(on, &[vm("db", VmState::Stopped)]).unwrap()), ["db"]);
        let gone = again.change(MaintenanceRequest { on: false, forget: true }, &[]).unwrap();
        assert_eq!(gone, Maintenance::default());
        std::fs::write(dir.path().join("maintenance.json"), "{").unwrap();
        assert!(MaintenanceFile::open(dir.path()).is_err(), "not taken for off");
    }
}
