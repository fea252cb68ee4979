//! Receiving a VM, as the agent of the host it comes to: judging the offer, taking the files, starting the process that awaits the
//! source, and taking all of it back.
//!
//! Everything here is asked by another agent and is not believed: names, sizes and digests are checked and capped. Never enters: RAM
//! and disks, which go from process to process.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt;
use vmove_compute::process::protocol::{
    IncomingSpec, LaunchSpec, ProcessStatus, Reply, Request, RunState, Start,
};
use vmove_mirror::journal::{MoveId, Standing};

use super::control;
use super::create::{MAX_INITRD, MAX_KERNEL, check_definition};
use super::error::{ApiError, blocking};
use super::plan::{self, There};
use super::registry::Reservation;
use super::vmdir::VmDir;
use super::vms::VmView;
use super::{Agent, hostinfo, images, preflight, process, vms};
use crate::api::types::{DiskPlacement, FileDigest, Listening, Offer, OfferAccepted};

/// An accepted offer that is not started within this time is forgotten.
const PATIENCE: Duration = Duration::from_mins(5);
/// How long what a VM left here may take to go when the VM comes back.
const REMAINS_DEADLINE: Duration = Duration::from_secs(5);
/// How often that is looked at.
const REMAINS_INTERVAL: Duration = Duration::from_millis(10);
/// How long an awaiting process may take to end when its move is off.
const CANCEL_DEADLINE: Duration = Duration::from_secs(5);

/// Accepted offers that are not started yet, by move.
#[derive(Debug, Default)]
pub struct Arrivals {
    accepted: HashMap<String, Arrival>,
}

/// One accepted offer.
#[derive(Debug)]
struct Arrival {
    offer: Offer,
    disks: Vec<DiskPlacement>,
    /// A file is being received.
    receiving: bool,
    _reservation: Reservation,
}

/// Which of a VM's files is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmFile {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

impl VmFile {
    /// By its name in a path.
    pub fn parse(name: &str) -> Result<Self, ApiError> {
        match name {
            "kernel" => Ok(Self::Kernel),
            "initrd" => Ok(Self::Initrd),
            _ => Err(ApiError::not_found(format!("a VM has a kernel and an initrd, no {name:?}"))),
        }
    }
}

/// Whether the last process of a VM was started to receive it by this move.
pub(super) fn arrives_by(vm: &VmDir, move_id: &str) -> bool {
    source_of(vm, move_id).is_some()
}

/// The host a VM's last process was started to receive it from, if it was by this move.
fn source_of(vm: &VmDir, move_id: &str) -> Option<String> {
    match vm.launch()?.start {
        Start::Incoming(spec) if spec.move_id == move_id => Some(spec.from_host),
        Start::Incoming(_) | Start::Boot | Start::Restore(_) => None,
    }
}

/// Refuses to end the process of a VM that is this host's, or whose owner only the source's word decides.
fn check_ours_to_end(vm: &VmDir, move_id: &str) -> Result<(), ApiError> {
    match vm.journal()?.standing() {
        Standing::Nothing | Standing::Incoming { prepared: false, .. } => Ok(()),
        _ => Err(ApiError::undecided(format!(
            "move {move_id} is prepared here or further: only its source's word ends it"
        ))),
    }
}

impl Agent {
    fn arrivals(&self) -> MutexGuard<'_, Arrivals> {
        // Plain map operations under the lock: nothing is left half done by a panic.
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Judges an offer. A real one that is accepted makes the VM's directory and reserves its name; a refusal lists everything. To be
    /// run to its end: dropped half way it leaves the directory.
    pub async fn receive_offer(
        self: &Arc<Self>,
        from: &str,
        offer: Offer,
    ) -> Result<OfferAccepted, ApiError> {
        // At once: what is done first may take a while.
        let skewed = offer.clock_ms.and_then(|theirs| {
            let limit = self.config.max_clock_skew_ms;
            plan::clock_blocker((from, theirs), (&self.config.name, hostinfo::clock_ms()), limit)
        });
        check_offer(from, &offer)?;
        let name = offer.definition.name.clone();
        let vm = self.registry.vm(&name)?;
        if self.arrivals().accepted.contains_key(&offer.move_id) {
            return Err(offered_twice(&offer.move_id));
        }
        let earlier = self.earlier_arrival(from, &offer, &vm).await;
        if let (Some(earlier), false) = (&earlier, offer.dry_run) {
            tracing::info!(
                vm = name,
                earlier,
                move_id = offer.move_id,
                "offered anew: the earlier move is off"
            );
            // One that cannot be ended is in the way, which is said below.
            let _ = self.discard_incoming(from, earlier).await;
        }
        let (reservation, view) = self.reserve_arrival(&name, &vm).await?;
        let taken = match (&reservation, view) {
            _ if earlier.is_some() && offer.dry_run => None,
            (_, Some(view)) => Some(vms::word(view.state)),
            (Err(_), None) => Some(self.registry.busy(&name).unwrap_or("busy")),
            (Ok(_), None) => vm.path().exists().then_some("what is left of it is being cleaned up"),
        };
        let (agent, judged) = (self.clone(), offer.clone());
        let (disks, mut blockers) = blocking(move || agent.judge(&judged, taken)).await?;
        blockers.extend(skewed);
        if offer.dry_run {
            return Ok(OfferAccepted { disks, blockers });
        }
        if !blockers.is_empty() {
            return Err(ApiError::blocked(
                format!("host {} cannot take VM {name:?}", self.config.name),
                blockers,
            ));
        }
        let accepted = self.accept(from, &vm, offer, &disks, reservation?).await;
        if accepted.is_err() {
            // Not waited for: the source is to hear why.
            let agent = self.clone();
            tokio::spawn(async move { agent.settle(&name).await });
        }
        accepted.map(|()| OfferAccepted { disks, blockers: Vec::new() })
    }

    /// Makes the VM's directory and keeps the offer for its time. The reservation ends with an error.
    async fn accept(
        self: &Arc<Self>,
        from: &str,
        vm: &VmDir,
        offer: Offer,
        disks: &[DiskPlacement],
        reservation: Reservation,
    ) -> Result<(), ApiError> {
        let name = offer.definition.name.clone();
        let mut definition = offer.definition.clone();
        for (disk, placed) in definition.disks.iter_mut().zip(disks) {
            disk.datastore.clone_from(&placed.datastore);
        }
        let made = vm.clone();
        blocking(move || {
            made.make()?;
            made.save_definition(&definition)
        })
        .await?;
        let move_id = offer.move_id.clone();
        let arrival = Arrival { offer, disks: disks.to_vec(), receiving: false, _reservation: reservation };
        match self.arrivals().accepted.entry(move_id.clone()) {
            Entry::Vacant(free) => drop(free.insert(arrival)),
            Entry::Occupied(_) => return Err(offered_twice(&move_id)),
        }
        tracing::info!(vm = name, move_id, from, "VM is to arrive");
        let agent = self.clone();
        tokio::spawn(async move {
            if agent.pause(PATIENCE).await && agent.arrivals().accepted.remove(&move_id).is_some() {
                tracing::warn!(vm = name, move_id, "the source did not come back");
                agent.settle(&name).await;
            }
        });
        Ok(())
    }

    /// Reserves a VM for its arrival. One that has just left may come back at once: what is left of it here is given a moment to go.
    async fn reserve_arrival(
        self: &Arc<Self>,
        name: &str,
        vm: &VmDir,
    ) -> Result<(Result<Reservation, ApiError>, Option<VmView>), ApiError> {
        let end = tokio::time::Instant::now() + REMAINS_DEADLINE;
        loop {
            let late = tokio::time::Instant::now() >= end;
            let going = match self.view(name).await? {
                Some(view) => is_leaving(vm, view.status).await,
                None => vm.path().exists() && !self.is_arriving(name),
            };
            if !going || late {
                let reservation = self.reserve_soon(name, "arriving from another host").await;
                // Its process may have ended, and its directory be left, only since that look.
                let view = self.view(name).await?;
                let left = reservation.is_ok()
                    && match &view {
                        Some(view) => is_leaving(vm, view.status.clone()).await,
                        None => vm.path().exists(),
                    };
                if !left || late {
                    return Ok((reservation, view));
                }
            }
            tokio::time::sleep(REMAINS_INTERVAL).await;
        }
    }

    /// An earlier move by which the same host offered this VM, and which nothing has come of. Its agent offers only a VM that is not on
    /// the move, so it has given that one up, or has died over it and knows nothing of it.
    async fn earlier_arrival(&self, from: &str, offer: &Offer, vm: &VmDir) -> Option<String> {
        let same = |known: &Offer| known.definition.name == offer.definition.name && known.from_host == from;
        let waiting = {
            let arrivals = self.arrivals();
            arrivals
                .accepted
                .values()
                .find(|arrival| same(&arrival.offer))
                .map(|arrival| arrival.offer.move_id.clone())
        };
        if waiting.is_some() {
            return waiting;
        }
        let vm = vm.clone();
        let launched = blocking(move || {
            let Some(Start::Incoming(spec)) = vm.launch().map(|launch| launch.start) else { return Ok(None) };
            // Prepared, or this host's already: not the source's to take back by a word.
            let ours = process::find(vm.path()).is_some() && check_ours_to_end(&vm, &spec.move_id).is_ok();
            Ok(ours.then_some(spec))
        });
        let spec = launched.await.ok().flatten().filter(|spec| spec.from_host == from)?;
        (spec.move_id != offer.move_id).then_some(spec.move_id)
    }

    /// Whether an accepted offer of a VM waits to be started.
    fn is_arriving(&self, name: &str) -> bool {
        self.arrivals().accepted.values().any(|arrival| arrival.offer.definition.name == name)
    }

    /// Where the disks would go, and everything that stands in the way.
    fn judge(
        &self,
        offer: &Offer,
        taken: Option<&str>,
    ) -> Result<(Vec<DiskPlacement>, Vec<String>), ApiError> {
        let stores = self.datastore_infos()?;
        let features = hostinfo::cpu_features(&self.config.cpu_mask)?;
        let there = There {
            host: &self.config.name,
            stores: &stores,
            features: &features,
            free_memory: hostinfo::memory()?.available,
            taken,
        };
        let (places, mut blockers) = plan::receive(offer, &there);
        blockers.extend(self.maintenance_blocker());
        blockers.extend(self.registry.vm(&offer.definition.name)?.sockets_fit().err());
        blockers.extend(self.network_blockers(&offer.definition)?);
        let mut disks = Vec::new();
        for (disk, place) in offer.disks.iter().zip(places) {
            let Some(datastore) = place else { continue };
            let format = images::format_of(disk.image.format);
            let path =
                self.store(&datastore)?.image_path(&offer.definition.name, &disk.image.name, format)?;
            disks.push(DiskPlacement { name: disk.image.name.clone(), datastore, path });
        }
        blockers.extend(preflight::occupied(&disks, &offer.definition.name, offer.generation)?);
        Ok((disks, blockers))
    }

    /// Takes one of the VM's files; it must be what was offered, to the byte.
    pub async fn receive_file(
        &self,
        from: &str,
        move_id: &str,
        file: VmFile,
        body: Body,
    ) -> Result<(), ApiError> {
        let (name, expected) = {
            let mut arrivals = self.arrivals();
            let arrival = accepted(&mut arrivals, from, move_id)?;
            let expected = match file {
                VmFile::Kernel => Some(arrival.offer.kernel.clone()),
                VmFile::Initrd => arrival.offer.initrd.clone(),
            };
            let expected = expected
                .ok_or_else(|| ApiError::invalid(format!("move {move_id} was offered without this file")))?;
            if arrival.receiving {
                return Err(ApiError::busy(format!("a file of move {move_id} is being received")));
            }
            arrival.receiving = true;
            (arrival.offer.definition.name.clone(), expected)
        };
        let vm = self.registry.vm(&name)?;
        let to = match file {
            VmFile::Kernel => vm.kernel(),
            VmFile::Initrd => vm.initrd(),
        };
        let received = receive_to(&to, &expected, body).await;
        if let Some(arrival) = self.arrivals().accepted.get_mut(move_id) {
            arrival.receiving = false;
        }
        received
    }

    /// Starts the process that awaits the source; gives where it listens.
    pub async fn start_incoming(self: &Arc<Self>, from: &str, move_id: &str) -> Result<Listening, ApiError> {
        let arrival = {
            let mut arrivals = self.arrivals();
            if accepted(&mut arrivals, from, move_id)?.receiving {
                return Err(ApiError::busy(format!("a file of move {move_id} is being received")));
            }
            arrivals.accepted.remove(move_id)
        }
        .ok_or_else(|| unknown(move_id))?;
        let name = arrival.offer.definition.name.clone();
        let vm = self.registry.vm(&name)?;
        let started = self.start_process(&vm, &arrival).await;
        // Before settle, which needs the VM for itself.
        drop(arrival);
        if started.is_err() {
            let agent = self.clone();
            tokio::spawn(async move { agent.settle(&name).await });
        }
        started
    }

    async fn start_process(self: &Arc<Self>, vm: &VmDir, arrival: &Arrival) -> Result<Listening, ApiError> {
        let offer = &arrival.offer;
        let name = &offer.definition.name;
        let initrd = vm.initrd();
        for (path, needed) in [(vm.kernel(), true), (initrd.clone(), offer.initrd.is_some())] {
            if needed && !path.exists() {
                return Err(ApiError::conflict(format!(
                    "move {}: {} has not been sent",
                    offer.move_id,
                    path.file_name().unwrap_or_default().display()
                )));
            }
        }
        let (agent, look, disks, owner) = (self.clone(), vm.clone(), arrival.disks.clone(), name.clone());
        let definition = blocking(move || {
            agent.make_room(&owner, &disks)?;
            look.definition()
        })
        .await?;
        let spec = LaunchSpec {
            vm: definition,
            kernel: vm.kernel(),
            initrd: offer.initrd.is_some().then_some(initrd),
            host: self.config.name.clone(),
            generation: offer.generation,
            disks: arrival.disks.clone(),
            identity: self.tls.is_some().then(|| self.identity.paths()),
            start: Start::Incoming(IncomingSpec {
                move_id: offer.move_id.clone(),
                from_host: offer.from_host.clone(),
                listen_ip: self.config.listen.ip().to_string(),
                images: offer.disks.iter().map(|disk| disk.image.clone()).collect(),
                plain: offer.plain,
            }),
        };
        let status = self.launch(name, vm, &spec).await?;
        status.listening.ok_or_else(|| ApiError::vm_process(format!("VM {name:?} does not listen")))
    }

    /// Takes back what a move made here, unless the source alone may decide on it.
    pub async fn discard_incoming(self: &Arc<Self>, from: &str, move_id: &str) -> Result<(), ApiError> {
        let waiting = {
            let mut arrivals = self.arrivals();
            match accepted(&mut arrivals, from, move_id) {
                Ok(_) => arrivals.accepted.remove(move_id),
                Err(_) => None,
            }
        };
        if let Some(arrival) = waiting {
            let name = arrival.offer.definition.name.clone();
            drop(arrival);
            self.settle(&name).await;
            return Ok(());
        }
        for name in self.registry.names()? {
            let vm = self.registry.vm(&name)?;
            let Some(source) = source_of(&vm, move_id) else { continue };
            if source != from {
                return Err(not_from(move_id, from));
            }
            return self.end_arrival(&name, &vm, move_id).await;
        }
        Err(unknown(move_id))
    }

    async fn end_arrival(self: &Arc<Self>, name: &str, vm: &VmDir, move_id: &str) -> Result<(), ApiError> {
        if let Ok(status) = control::status(vm.path()).await {
            match status.state {
                RunState::Incoming => {}
                RunState::Undecided => {
                    return Err(ApiError::undecided(format!(
                        "move {move_id} is prepared here: only its source's word ends it"
                    )));
                }
                RunState::Running | RunState::Leaving => {
                    return Err(ApiError::conflict(format!("move {move_id} is committed")));
                }
            }
            // A refusal, or no answer, is dealt with below.
            let _ = control::ask(vm.path(), &Request::Cancel).await;
        } else {
            // Deaf, perhaps: then its journal says whether it may be waited for and ended.
            let (look, id) = (vm.clone(), move_id.to_owned());
            blocking(move || process::find(look.path()).map_or(Ok(()), |_| check_ours_to_end(&look, &id)))
                .await?;
        }
        if !self.wait_gone(vm, CANCEL_DEADLINE).await {
            let again = control::status(vm.path()).await;
            if again.is_ok_and(|status| status.state != RunState::Incoming) {
                return Err(ApiError::conflict(format!("move {move_id} has been decided meanwhile")));
            }
            let (look, id) = (vm.clone(), move_id.to_owned());
            blocking(move || {
                check_ours_to_end(&look, &id)?;
                if let Some(pid) = process::find(look.path()) {
                    process::kill_now(pid, look.path());
                }
                Ok(())
            })
            .await?;
            self.wait_gone(vm, CANCEL_DEADLINE).await;
        }
        self.settle(name).await;
        Ok(())
    }
}

/// Whether the process here has let a VM go and is only about to end.
async fn is_leaving(vm: &VmDir, status: Option<ProcessStatus>) -> bool {
    match status {
        Some(status) if status.state == RunState::Leaving => true,
        Some(ProcessStatus { moving: Some(_), .. }) => {
            match control::ask(vm.path(), &Request::MoveStatus).await {
                Ok(Reply::MoveStatus(Some(progress))) => {
                    ["committed", "completed"].contains(&progress.phase.as_str())
                }
                Ok(_) => false,
                // It was there a moment ago: it ends.
                Err(_) => true,
            }
        }
        Some(_) => false,
        // There is none, or it does not answer: it begins, or ends. Its journal knows which.
        None => {
            let look = vm.clone();
            let let_go = move || {
                Ok(matches!(
                    look.journal()?.standing(),
                    Standing::Committed { .. } | Standing::Released { .. } | Standing::Discarded { .. }
                ))
            };
            blocking(let_go).await.unwrap_or(false)
        }
    }
}

fn unknown(move_id: &str) -> ApiError {
    ApiError::not_found(format!("no move {move_id} is arriving here"))
}

fn offered_twice(move_id: &str) -> ApiError {
    ApiError::conflict(format!("move {move_id} was offered twice"))
}

fn not_from(move_id: &str, from: &str) -> ApiError {
    ApiError::forbidden(format!("move {move_id} is not from host {from}"))
}

fn accepted<'a>(arrivals: &'a mut Arrivals, from: &str, move_id: &str) -> Result<&'a mut Arrival, ApiError> {
    let arrival = arrivals.accepted.get_mut(move_id).ok_or_else(|| unknown(move_id))?;
    if arrival.offer.from_host != from {
        return Err(not_from(move_id, from));
    }
    Ok(arrival)
}

/// What an offer must be before it is looked at any further.
/// Checks an offer by itself: names, counts, sizes, and that it is made in the caller's own name.
pub fn check_offer(from: &str, offer: &Offer) -> Result<(), ApiError> {
    MoveId::new(offer.move_id.clone()).map_err(|e| ApiError::invalid(e.to_string()))?;
    if offer.from_host != from {
        return Err(ApiError::forbidden(format!(
            "host {from} may not offer a VM in the name of host {}",
            offer.from_host
        )));
    }
    check_definition(&offer.definition)?;
    let same = offer.definition.disks.len() == offer.disks.len()
        && offer.definition.disks.iter().zip(&offer.disks).all(|(disk, offered)| {
            disk.name == offered.image.name
                && disk.format == offered.image.format
                && disk.size_bytes == offered.image.virtual_bytes
        });
    if !same {
        return Err(ApiError::invalid("the offered images are not those of the definition's disks"));
    }
    let capped = |file: &FileDigest, cap: u64| file.bytes <= cap && file.blake3.len() == 64;
    if !capped(&offer.kernel, MAX_KERNEL)
        || !offer.initrd.as_ref().is_none_or(|file| capped(file, MAX_INITRD))
    {
        return Err(ApiError::too_large(format!(
            "a kernel may have {MAX_KERNEL} bytes, an initrd {MAX_INITRD}, each with a BLAKE3 digest"
        )));
    }
    Ok(())
}

/// Streams a body into a file, which gets its name only when length and digest are right.
async fn receive_to(to: &Path, expected: &FileDigest, body: Body) -> Result<(), ApiError> {
    let part = to.with_extension("part");
    let written = write_stream(&part, expected, body).await;
    let finished = match written {
        Ok(()) => tokio::fs::rename(&part, to).await.map_err(|e| ApiError::io("rename", &part, &e)),
        Err(error) => Err(error),
    };
    if finished.is_err() {
        // Best effort: the directory goes with the move.
        let _ = tokio::fs::remove_file(&part).await;
    }
    finished
}

async fn write_stream(part: &Path, expected: &FileDigest, body: Body) -> Result<(), ApiError> {
    let io = |e: std::io::Error| ApiError::io("write", part, &e);
    let mut file = tokio::fs::File::create(part).await.map_err(io)?;
    let mut stream = body.into_data_stream();
    let mut hasher = blake3::Hasher::new();
    let mut bytes = 0;
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|e| ApiError::invalid(format!("the file broke off: {e}")))?;
        bytes += chunk.len() as u64;
        if bytes > expected.bytes {
            return Err(ApiError::too_large(format!(
                "the file is longer than the {} bytes offered",
                expected.bytes
            )));
        }
        hasher.update(&chunk);
        file.write_all(&chunk).await.map_err(io)?;
    }
    let digest = hasher.finalize().to_hex().to_string();
    if bytes != expected.bytes || digest != expected.blake3 {
        return Err(ApiError::invalid("the file is not the one that was offered (length or BLAKE3)"));
    }
    file.sync_all().await.map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(bytes: &[u8]) -> FileDigest {
        FileDigest { bytes: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() }
    }

    /// One that was killed with its agent, or ends while a new agent looks after it, looks like one that begins.
    #[tokio::test]
    async fn a_process_that_is_silent_after_it_let_its_vm_go_is_leaving() {
        use vmove_mirror::journal::Record;
        let dir = tempfile::tempdir().unwrap();
        let vm = VmDir::new(dir.path().join("web"));
        vm.make().unwrap();
        let move_id = MoveId::new("m").unwrap();
        for (record, leaving) in [
            (Record::Owner { generation: 1, disks: vec![] }, false),
            (Record::Moving { move_id: move_id.clone(), to_host: Some("b".into()), generation: 2 }, false),
            (Record::Committed { move_id: move_id.clone() }, true),
            (Record::Released { move_id }, true),
        ] {
            vm.append(&record).unwrap();
            assert_eq!(is_leaving(&vm, None).await, leaving, "{record:?}");
        }
    }

    #[tokio::test]
    async fn a_file_is_kept_only_if_it_is_the_one_offered() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("kernel");
        receive_to(&to, &digest(b"kernel"), Body::from("kernel")).await.unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"kernel");
        std::fs::remove_file(&to).unwrap();
        for (body, code) in [("kernels", "too_large"), ("kerne", "invalid"), ("kernal", "invalid")] {
            let error = receive_to(&to, &digest(b"kernel"), Body::from(body)).await.unwrap_err();
            assert_eq!(error.code, code);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
