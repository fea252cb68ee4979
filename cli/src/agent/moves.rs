//! Leading a move, as the agent of the host that has the VM: plan, offer, files, start of the target, order; then following it.
//!
//! Whatever fails before the order is taken back at the target. After the order the VM process decides, and its journal. Never
//! enters: RAM and disks (the processes carry them), what to do after a crash (settle).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::stream;
use hyper::Method;
use tokio::io::AsyncReadExt;
use vmove_compute::process::protocol::{MoveOrder, ProcessStatus, Reply, Request};
use vmove_mirror::journal::{MoveId, Standing};
use vmove_storage::{OwnerState, Stamp};

use super::control::{self, ControlError};
use super::error::{ApiError, blocking};
use super::plan::{self, Here};
use super::preflight::{self, Files};
use super::registry::{MOVING, Reservation};
use super::vmdir::{VmDir, read_progress};
use super::{Agent, hostinfo, images, peers};
use crate::api::types::{
    DiskAction, DiskPlacement, ImageShape, Listening, MoveAccepted, MoveAnswer, MovePlan, MoveProgress,
    MoveRequest, Offer, OfferAccepted, OfferedDisk, PEER_VERSION, VmState,
};
use crate::api::watch::WatchedMove;
use crate::identity::files::write_private;

/// The request a VM's last move was begun with, in its directory.
pub const REQUEST_FILE: &str = "request.json";
/// Longest pause that may be asked for, ms: an hour.
const MAX_DOWNTIME_MS: u64 = 3_600_000;
/// How often a move is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);
/// Bytes of a file sent at once.
const CHUNK: usize = 256 << 10;

impl Agent {
    /// Begins a move of a VM of this host, or plans it.
    pub async fn move_vm(self: &Arc<Self>, name: &str, request: MoveRequest) -> Result<MoveAnswer, ApiError> {
        if request.max_downtime_ms > MAX_DOWNTIME_MS {
            return Err(ApiError::invalid(format!(
                "max_downtime_ms is {}; it must be at most {MAX_DOWNTIME_MS} (one hour)",
                request.max_downtime_ms
            )));
        }
        let reservation = if request.dry_run {
            None
        } else {
            let busy = |e: ApiError| match e.code.as_str() {
                "busy" => ApiError::busy(format!("cannot move: {e}")),
                _ => e,
            };
            Some(self.reserve_soon(name, MOVING).await.map_err(busy)?)
        };
        let view = self.must_view(name).await?;
        let vm = self.registry.vm(name)?;
        let mut found = Vec::new();
        let status = match view.status.clone() {
            Some(status) if view.state == VmState::Running => status,
            // A dry run has more to say than that.
            status if request.dry_run && preflight::is_this_hosts(&view) => {
                found.push(preflight::not_running(name, &view).message);
                status.unwrap_or_else(|| preflight::as_if_running(&view))
            }
            _ => return Err(preflight::not_running(name, &view)),
        };
        let (look, dir, leaves) = (status.clone(), vm.clone(), plan::leaves(&request, &self.config.name));
        let ready = blocking(move || preflight::of_vm(&look, &dir, leaves)).await?;
        found.extend(ready.blockers);
        let (shapes, files) = (ready.shapes, ready.files);
        let stores = self.datastore_infos()?;
        let here = Here {
            host: &self.config.name,
            definition: &status.vm,
            disks: &status.disks,
            shapes: &shapes,
            stores: &stores,
        };
        let mut plan = plan::local_plan(&request, &here);
        plan.blockers.splice(0..0, found);
        let draft = Draft { request, status, shapes, files, plan, move_id: uuid::Uuid::new_v4().to_string() };
        match reservation {
            None => Ok(MoveAnswer::Plan(self.dry_run(draft).await?)),
            Some(reservation) => Ok(MoveAnswer::Accepted(self.begin(name, &vm, draft, reservation).await?)),
        }
    }

    async fn dry_run(&self, mut draft: Draft) -> Result<MovePlan, ApiError> {
        if let Some(host) = draft.target(&self.config.name) {
            self.ask_target(&mut draft, &host, true).await?;
        } else {
            let places = self.local_copies(&draft, &mut Vec::new());
            draft.plan.blockers.extend(preflight::occupied(
                &places,
                &draft.plan.vm,
                draft.status.generation + 1,
            )?);
        }
        Ok(draft.plan)
    }

    async fn begin(
        self: &Arc<Self>,
        name: &str,
        vm: &VmDir,
        mut draft: Draft,
        reservation: Reservation,
    ) -> Result<MoveAccepted, ApiError> {
        let target = draft.target(&self.config.name);
        let generation = draft.status.generation + 1;
        let copies = match &target {
            Some(host) => {
                // With something in the way here the other host is only asked what it would say, for one complete list.
                let dry = !draft.plan.blockers.is_empty();
                self.ask_target(&mut draft, host, dry).await?
            }
            None => {
                let mut blockers = Vec::new();
                let places = self.local_copies(&draft, &mut blockers);
                blockers.extend(preflight::occupied(&places, name, generation)?);
                draft.plan.blockers.extend(blockers);
                places
            }
        };
        if !draft.plan.blockers.is_empty() {
            return Err(ApiError::blocked(
                format!("VM {name:?} cannot be moved to {}", aim(&draft.request)),
                draft.plan.blockers,
            ));
        }
        let begun = match &target {
            Some(host) => match self.prepare_target(vm, &draft, host).await {
                Ok(listening) => self.order(vm, &draft, Some(listening), copies).await,
                Err(error) if error.message.contains(&format!("host {host}")) => Err(error),
                Err(error) => {
                    let message = format!("host {host}: {}", error.message);
                    Err(ApiError { message, ..error })
                }
            },
            None => {
                let (agent, owner, places) = (self.clone(), name.to_owned(), copies.clone());
                blocking(move || agent.make_room(&owner, &places)).await?;
                self.order(vm, &draft, None, copies).await
            }
        };
        if let Err(error) = begun {
            match &target {
                Some(host) => self.discard_at(host, &draft.move_id).await,
                None => images::remove_empty_dirs(&self.stores(), name),
            }
            return Err(error);
        }
        tracing::info!(vm = name, move_id = draft.move_id, to = ?draft.plan.to, "move begun");
        let (agent, owned, move_id) = (self.clone(), name.to_owned(), draft.move_id.clone());
        tokio::spawn(async move { agent.follow_move(&owned, &move_id, target, reservation).await });
        Ok(MoveAccepted { move_id: draft.move_id, host: self.config.name.clone(), plan: draft.plan })
    }

    /// Offers the VM to another host; gives where its disks would lie there, and adds all that stands in the way to the plan. A
    /// real offer that is refused, and a host that cannot be asked, are blockers like any other.
    async fn ask_target(
        &self,
        draft: &mut Draft,
        host: &str,
        dry_run: bool,
    ) -> Result<Vec<DiskPlacement>, ApiError> {
        let offer = self.offer(draft, dry_run)?;
        let answer: Result<OfferAccepted, ApiError> =
            self.peers.call(host, Method::POST, "/v1/incoming", Some(&offer), peers::LONG).await;
        match answer {
            Ok(accepted) => {
                plan::complete(&mut draft.plan, &accepted.disks, accepted.blockers);
                Ok(accepted.disks)
            }
            Err(error) if error.blockers.is_empty() => {
                draft.plan.blockers.push(error.message);
                Ok(Vec::new())
            }
            Err(error) => {
                draft.plan.blockers.extend(error.blockers);
                Ok(Vec::new())
            }
        }
    }

    fn offer(&self, draft: &Draft, dry_run: bool) -> Result<Offer, ApiError> {
        let mut disks = Vec::new();
        for (disk, shape) in draft.status.disks.iter().zip(&draft.shapes) {
            let store = self.store(&disk.datastore)?;
            let request = &draft.request;
            disks.push(OfferedDisk {
                image: shape.clone(),
                source_datastore_id: store.id().to_string(),
                datastore: request.disks.get(&disk.name).or(request.datastore.as_ref()).cloned(),
            });
        }
        Ok(Offer {
            version: PEER_VERSION,
            move_id: draft.move_id.clone(),
            from_host: self.config.name.clone(),
            definition: draft.status.vm.clone(),
            generation: draft.status.generation + 1,
            disks,
            plain: draft.request.insecure_plain,
            cpu_features: draft.status.vm.cpu_features.clone(),
            kernel: draft.files.kernel.clone(),
            initrd: draft.files.initrd.clone(),
            clock_ms: Some(hostinfo::clock_ms()),
            dry_run,
        })
    }

    /// Sends the VM's files and has the target's process started.
    async fn prepare_target(&self, vm: &VmDir, draft: &Draft, host: &str) -> Result<Listening, ApiError> {
        let base = format!("/v1/incoming/{}", draft.move_id);
        for (name, path) in [("kernel", vm.kernel()), ("initrd", vm.initrd())] {
            if path.exists() {
                let body = file_body(&path).await?;
                let to = format!("{base}/files/{name}");
                let () = self.peers.send(host, Method::PUT, &to, body, peers::LONG).await?;
            }
        }
        self.peers.call(host, Method::POST, &format!("{base}/start"), None::<&()>, peers::LONG).await
    }

    /// New places of the disks that change their datastore on this host.
    fn local_copies(&self, draft: &Draft, blockers: &mut Vec<String>) -> Vec<DiskPlacement> {
        let mut places = Vec::new();
        for disk in draft.plan.disks.iter().filter(|disk| disk.action == DiskAction::Copy) {
            let Some(known) = draft.status.vm.disks.iter().find(|known| known.name == disk.name) else {
                continue;
            };
            // An unknown datastore is a blocker of the plan already.
            let Ok(store) = self.store(&disk.to.datastore) else { continue };
            match store.image_path(&draft.plan.vm, &disk.name, images::format_of(known.format)) {
                Ok(path) => places.push(DiskPlacement {
                    name: disk.name.clone(),
                    datastore: disk.to.datastore.clone(),
                    path,
                }),
                Err(error) => blockers.push(error.to_string()),
            }
        }
        places
    }

    /// Directories for images to come, and the end of stale ones in their place.
    pub(super) fn make_room(&self, vm: &str, places: &[DiskPlacement]) -> Result<(), ApiError> {
        for place in places {
            self.store(&place.datastore)?.create_vm_dir(vm)?;
            if Stamp::read(&place.path)?
                .is_some_and(|stamp| stamp.vm == vm && stamp.state == OwnerState::Stale)
            {
                images::remove(&place.path)?;
            }
        }
        Ok(())
    }

    /// Gives the VM process its order. From here on it decides.
    async fn order(
        &self,
        vm: &VmDir,
        draft: &Draft,
        target: Option<Listening>,
        copies: Vec<DiskPlacement>,
    ) -> Result<(), ApiError> {
        let order = MoveOrder {
            move_id: draft.move_id.clone(),
            from: draft.plan.from.clone(),
            to: draft.plan.to.clone(),
            target,
            copies,
            max_downtime_ms: draft.request.max_downtime_ms,
            bandwidth: draft.request.bandwidth,
            keep_source: draft.request.keep_source,
            audit: draft.request.audit,
            plain: draft.request.insecure_plain,
            predicted: super::estimate::remembered(vm, &draft.plan, &draft.request),
        };
        let text = serde_json::to_string(&draft.request)
            .map_err(|e| ApiError::internal(format!("cannot write the request: {e}")))?;
        let path = vm.path().join(REQUEST_FILE);
        blocking(move || Ok(write_private(&path, &text)?)).await?;
        let vm_name = &draft.plan.vm;
        match control::ask(vm.path(), &Request::Move(Box::new(order))).await {
            Ok(Reply::Ok) => Ok(()),
            Ok(other) => Err(ApiError::vm_process(format!(
                "cannot move VM {vm_name:?}: {}",
                control::unexpected(&other)
            ))),
            Err(error) => Err(ApiError::vm_process(format!("cannot move VM {vm_name:?}: {error}"))),
        }
    }

    /// Follows a move to its end, keeps its report, and has the target cleaned up if it was not committed.
    pub(super) async fn follow_move(
        self: &Arc<Self>,
        name: &str,
        move_id: &str,
        target: Option<String>,
        reservation: Reservation,
    ) {
        let Ok(vm) = self.registry.vm(name) else { return };
        let shown = |progress: MoveProgress| WatchedMove {
            vm: name.to_owned(),
            from_host: self.config.name.clone(),
            to_host: target.clone().unwrap_or_else(|| self.config.name.clone()),
            progress,
        };
        let last = loop {
            let answer = control::ask(vm.path(), &Request::MoveStatus).await;
            let deaf = matches!(answer, Err(ControlError::Gone(_)));
            if let Ok(Reply::MoveStatus(Some(progress))) = answer
                && progress.move_id == move_id
            {
                if has_ended(&progress) {
                    break Some(*progress);
                }
                self.watched.seen(shown(*progress));
            }
            if deaf && self.wait_gone(&vm, FOLLOW_INTERVAL).await {
                break vm.saved_move(move_id);
            }
            if !self.pause(FOLLOW_INTERVAL).await {
                return;
            }
        };
        match &last {
            Some(progress) => self.watched.ended(shown(progress.clone())),
            None => self.watched.lost(move_id),
        }
        match last.as_ref().map(|progress| (&progress.phase, &progress.report, &progress.error)) {
            Some((phase, _, error)) => tracing::info!(vm = name, move_id, phase, ?error, "move ended"),
            None => tracing::warn!(vm = name, move_id, "the VM's process ended without a report of its move"),
        }
        if let Some(progress) = last
            && let Err(error) = self.keep_progress(&progress)
        {
            tracing::warn!(vm = name, %error, "cannot keep the report of a move");
        }
        let (look, id) = (vm.clone(), move_id.to_owned());
        let committed = blocking(move || is_committed(&look, &id)).await;
        match (target, committed) {
            (Some(host), Ok(false)) => self.discard_at(&host, move_id).await,
            (Some(_), _) => {}
            (None, _) => {
                images::remove_empty_dirs(&self.stores(), name);
                // Keeps the datastores as they are now.
                if let Err(error) = self.view(name).await {
                    tracing::warn!(vm = name, %error, "cannot note the VM's datastores");
                }
            }
        }
        // Also of a move whose target was not in the journal yet when it was found under way.
        self.close_ends(name);
        drop(reservation);
    }

    /// A move that an earlier agent began.
    pub(super) fn follow_adopted_move(self: &Arc<Self>, name: &str, move_id: String) {
        let Ok(reservation) = self.registry.reserve(name, MOVING) else { return };
        let (agent, name) = (self.clone(), name.to_owned());
        tokio::spawn(async move {
            let Ok(vm) = agent.registry.vm(&name) else { return };
            let look = vm.clone();
            let target = blocking(move || {
                Ok(match look.journal()?.standing() {
                    Standing::Moving { to_host, .. } => to_host.clone(),
                    _ => None,
                })
            })
            .await
            .unwrap_or_default();
            agent.follow_move(&name, &move_id, target, reservation).await;
        });
    }

    pub(super) fn keep_progress(&self, progress: &MoveProgress) -> Result<(), ApiError> {
        let path = self.archive_dir()?.join(format!("{}.json", progress.move_id));
        let text = serde_json::to_string_pretty(progress)
            .map_err(|e| ApiError::internal(format!("cannot write a report: {e}")))?;
        Ok(write_private(&path, &text)?)
    }

    /// Has another host forget a move that was not committed. It would find that out itself, only later.
    pub(super) async fn discard_at(&self, host: &str, move_id: &str) {
        let path = format!("/v1/incoming/{move_id}");
        let gone: Result<(), ApiError> =
            self.peers.call(host, Method::DELETE, &path, None::<&()>, peers::LONG).await;
        match gone {
            Err(error) if !peers::is_not_found(&error) => {
                tracing::warn!(host, move_id, %error, "the target was not told that the move is off");
            }
            _ => {}
        }
    }

    /// How far a move is that was led from here, or how it ended.
    pub async fn progress(&self, move_id: &str) -> Result<Option<MoveProgress>, ApiError> {
        MoveId::new(move_id).map_err(|e| ApiError::invalid(e.to_string()))?;
        // Twice: the report of a process that ends changes its place.
        for _ in 0..2 {
            for name in self.registry.names()? {
                let vm = self.registry.vm(&name)?;
                if super::incoming::arrives_by(&vm, move_id) {
                    continue;
                }
                if let Ok(Reply::MoveStatus(Some(progress))) =
                    control::ask(vm.path(), &Request::MoveStatus).await
                    && progress.move_id == move_id
                {
                    return Ok(Some(*progress));
                }
                if let Some(progress) = vm.saved_move(move_id) {
                    return Ok(Some(progress));
                }
            }
            if let Some(progress) = read_progress(&self.archive_dir()?.join(format!("{move_id}.json"))) {
                return Ok(Some(progress));
            }
        }
        Ok(None)
    }

    /// Gives a move up that is led from here.
    pub async fn cancel(&self, move_id: &str) -> Result<(), ApiError> {
        for name in self.registry.names()? {
            let vm = self.registry.vm(&name)?;
            let Ok(status) = control::status(vm.path()).await else { continue };
            if status.moving.as_deref() == Some(move_id) {
                return match control::ask(vm.path(), &Request::Cancel).await {
                    Ok(_) => Ok(()),
                    Err(ControlError::Refused(why)) => {
                        Err(ApiError::conflict(format!("move {move_id} cannot be cancelled: {why}")))
                    }
                    Err(error) => Err(ApiError::vm_process(format!("cannot cancel move {move_id}: {error}"))),
                };
            }
        }
        match self.progress(move_id).await? {
            Some(_) => Err(ApiError::conflict(format!("move {move_id} has ended already"))),
            None => Err(ApiError::not_found(format!("there is no move {move_id}"))),
        }
    }
}

/// A move in the making.
struct Draft {
    request: MoveRequest,
    status: ProcessStatus,
    shapes: Vec<ImageShape>,
    files: Files,
    plan: MovePlan,
    move_id: String,
}

impl Draft {
    /// The other host, if it leaves this one.
    fn target(&self, own: &str) -> Option<String> {
        self.request.host.clone().filter(|host| host != own)
    }
}

fn aim(request: &MoveRequest) -> String {
    match (&request.host, &request.datastore) {
        (Some(host), Some(store)) => format!("host {host}, datastore {store}"),
        (Some(host), None) => format!("host {host}"),
        (None, Some(store)) => format!("datastore {store}"),
        (None, None) => "where it shall go".to_owned(),
    }
}

fn has_ended(progress: &MoveProgress) -> bool {
    // A phase alone is not the end: an aborted move still has mirrors to take down, and its target to tell.
    progress.report.is_some() || progress.error.is_some()
}

/// Whether the move left this host for good, by the journal. A directory that is gone was released: committed.
fn is_committed(vm: &VmDir, move_id: &str) -> Result<bool, ApiError> {
    if !vm.path().exists() {
        return Ok(true);
    }
    let id = MoveId::new(move_id)?;
    Ok(match vm.journal()?.standing() {
        Standing::Committed { move_id, .. } | Standing::Released { move_id } => *move_id == id,
        // Undecided as yet: whoever settles it tells the target.
        Standing::Moving { move_id, .. } => *move_id == id,
        _ => false,
    })
}

/// A file as the body of a request, read as it is sent.
async fn file_body(path: &Path) -> Result<Body, ApiError> {
    let file = tokio::fs::File::open(path).await.map_err(|e| ApiError::io("open", path, &e))?;
    let path: PathBuf = path.to_path_buf();
    Ok(Body::from_stream(stream::try_unfold((file, path), |(mut file, path)| async move {
        let mut buffer = vec![0; CHUNK];
        let n = file.read(&mut buffer).await?;
        buffer.truncate(n);
        Ok::<_, std::io::Error>((n > 0).then_some((Bytes::from(buffer), (file, path))))
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmove_mirror::journal::Record;

    #[test]
    fn the_target_is_cleaned_up_only_when_the_journal_says_no() {
        let dir = tempfile::tempdir().unwrap();
        let vm = VmDir::new(dir.path().join("web"));
        assert!(is_committed(&vm, "m").unwrap(), "released and removed");
        std::fs::create_dir(vm.path()).unwrap();
        let id = MoveId::new("m").unwrap();
        vm.append(&Record::Owner { generation: 1, disks: vec![] }).unwrap();
        assert!(!is_committed(&vm, "m").unwrap());
        vm.append(&Record::Moving { move_id: id.clone(), to_host: Some("b".into()), generation: 2 }).unwrap();
        assert!(is_committed(&vm, "m").unwrap(), "not decided");
        vm.append(&Record::Committed { move_id: id }).unwrap();
        assert!(is_committed(&vm, "m").unwrap());
    }
}
