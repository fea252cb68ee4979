//! What is done with a VM whose process has ended, by the failure table (`vmove_mirror::recovery`), and the words that decide it.
//!
//! Lives here: carrying the table out: journal first, then images and directories; asking the other host again and again. Never enters:
//! the table itself, the questions (`other_end`).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use vmove_compute::process::protocol::{Request, RunState, Start};
use vmove_mirror::journal::{self, Journal, MoveId, Record, Standing};
use vmove_mirror::recovery::{Holding, PeerAnswer, Question, Settlement, question, settle};
use vmove_storage::{OwnerState, Stamp};

use super::control::{self, ControlError};
use super::error::{ApiError, blocking};
use super::vmdir::{AppendError, VmDir, placements, read_progress};
use super::{Agent, create, images, process, registry};
use crate::api::types::{DiskPlacement, MoveProgress, MoveRequest, Verdict, VmDefinition};
use crate::identity::files::write_private;

/// First gap between two questions; it doubles.
pub(super) const FIRST_GAP: Duration = Duration::from_millis(250);
/// Largest gap between two questions.
pub(super) const LAST_GAP: Duration = Duration::from_secs(15);
/// How often an arriving VM is looked at.
const ARRIVAL_INTERVAL: Duration = Duration::from_millis(300);
/// How often a VM that somebody else works on is tried again.
const BUSY_INTERVAL: Duration = Duration::from_millis(100);

/// What became of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    /// Nothing is left to be settled.
    Done,
    /// Somebody else works on it.
    Busy,
    /// A step was made; the next can be tried at once.
    Again,
    /// Another host's word is awaited.
    Waiting,
}

impl Agent {
    /// Brings a VM without a process to what the failure table says; tries until that is done, or the agent ends.
    ///
    /// Boxed: settling may boot a VM, whose end is settled in turn.
    pub(super) fn settle(self: &Arc<Self>, name: &str) -> BoxFuture<'static, ()> {
        let (agent, name) = (self.clone(), name.to_owned());
        Box::pin(async move { agent.settle_until_done(&name).await })
    }

    async fn settle_until_done(self: &Arc<Self>, name: &str) {
        let mut gap = FIRST_GAP;
        loop {
            let wait = match self.settle_once(name).await {
                Ok(Settled::Done) => return,
                Ok(Settled::Again) => continue,
                Ok(Settled::Busy) => BUSY_INTERVAL,
                Ok(Settled::Waiting) => gap,
                Err(error) => {
                    tracing::error!(vm = name, %error, "cannot settle the VM");
                    gap
                }
            };
            if wait == gap {
                gap = (gap * 2).min(LAST_GAP);
            }
            if !self.pause(wait).await {
                return;
            }
        }
    }

    /// As [`Self::settle`], but does not wait for another host's word: what needs that goes on by itself.
    pub(super) async fn settle_soon(self: &Arc<Self>, name: &str) {
        loop {
            match self.settle_once(name).await {
                Ok(Settled::Done) => return,
                Ok(Settled::Again) => {}
                Ok(Settled::Busy) => {
                    if !self.pause(BUSY_INTERVAL).await {
                        return;
                    }
                }
                Ok(Settled::Waiting) | Err(_) => {
                    tokio::spawn(self.settle(name));
                    return;
                }
            }
        }
    }

    pub(super) async fn settle_once(self: &Arc<Self>, name: &str) -> Result<Settled, ApiError> {
        let Ok(_reservation) = self.registry.reserve(name, registry::SETTLING) else {
            return Ok(Settled::Busy);
        };
        self.settle_reserved(name).await
    }

    /// One step of the failure table; the caller has reserved the VM.
    pub(super) async fn settle_reserved(self: &Arc<Self>, name: &str) -> Result<Settled, ApiError> {
        let vm = self.registry.vm(name)?;
        let (agent, look, owned) = (self.clone(), vm.clone(), name.to_owned());
        let found = blocking(move || {
            if process::find(look.path()).is_none() {
                agent.sweep_checkpoints(&owned)?;
            }
            if !look.path().exists() || process::find(look.path()).is_some() {
                return Ok(None);
            }
            Ok(Some(look.durable_journal()?))
        })
        .await?;
        let Some(journal) = found else { return Ok(Settled::Done) };
        let answer = self.ask_other(name, &journal).await;
        let standing = journal.standing().clone();
        let settlement = settle(&standing, answer);
        tracing::info!(vm = name, ?settlement, "VM without a process");
        match settlement {
            Settlement::Startable => {
                self.clear_left_behind(name).await?;
                let look = vm.clone();
                if blocking(move || never_ran(&look, &standing)).await? {
                    self.boot(name).await?;
                }
                Ok(Settled::Done)
            }
            Settlement::Abort => {
                self.abort_source(&vm, &standing).await?;
                Ok(Settled::Again)
            }
            Settlement::Clear | Settlement::Lose => {
                let record = closing(&journal, answer)?;
                tracing::info!(vm = name, ?record, "the other end of an aborted move");
                append(&vm, record).await?;
                Ok(Settled::Again)
            }
            Settlement::OwnThenBoot => {
                if let Standing::Incoming { generation, disks, .. } = standing {
                    append(&vm, Record::Owner { generation, disks }).await?;
                }
                self.boot(name).await?;
                Ok(Settled::Done)
            }
            Settlement::AbortThenDiscard => {
                if let Standing::Incoming { move_id, .. } = &standing {
                    append(&vm, Record::Aborted { move_id: move_id.clone() }).await?;
                }
                self.discard(name, &vm).await?;
                Ok(Settled::Done)
            }
            Settlement::ReleaseThenDiscard => {
                if let Standing::Committed { move_id, .. } = &standing {
                    append(&vm, Record::Released { move_id: move_id.clone() }).await?;
                }
                self.discard(name, &vm).await?;
                Ok(Settled::Done)
            }
            Settlement::Discard => {
                self.discard(name, &vm).await?;
                Ok(Settled::Done)
            }
            Settlement::Keep => Ok(Settled::Done),
            Settlement::Fenced | Settlement::Ask => Ok(Settled::Waiting),
        }
    }

    /// Ends what moves of a VM of this host left in its datastores, when their process, or the agent that settled them, died before it
    /// could: images that were to be the VM's, and those it had before. Once the VM runs, nobody else would.
    async fn clear_left_behind(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
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

    /// A source whose process died before the commit: the move is off, the VM can be started again.
    async fn abort_source(self: &Arc<Self>, vm: &VmDir, standing: &Standing) -> Result<(), ApiError> {
        let Standing::Moving { move_id, to_host, .. } = standing else { return Ok(()) };
        let (agent, look, id) = (self.clone(), vm.clone(), move_id.to_string());
        blocking(move || {
            // Nobody else tells how the move ended, nor answers for it once the VM is removed. Before the record: after it, this would
            // not be tried again.
            if look.saved_move(&id).is_none() {
                agent.keep_progress(&given_up(&id))?;
            }
            Ok(())
        })
        .await?;
        append(vm, Record::Aborted { move_id: move_id.clone() }).await?;
        if let Some(host) = to_host {
            self.discard_at(host, move_id.as_str()).await;
        }
        Ok(())
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
    async fn discard(self: &Arc<Self>, name: &str, vm: &VmDir) -> Result<(), ApiError> {
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

    /// Moves the reports of a VM's moves to where they outlive its directory, and notes there by which moves it was taken over here: a
    /// source that comes back must learn of that for ever.
    pub(super) fn archive_moves(&self, vm: &VmDir) -> Result<(), ApiError> {
        for record in vm.records()? {
            if let Record::TakenOver { move_id, generation, .. } = record {
                write_private(&self.taken_file(&move_id)?, &generation.to_string())?;
            }
        }
        let Ok(entries) = std::fs::read_dir(vm.moves()) else { return Ok(()) };
        let archive = self.archive_dir()?;
        for entry in entries.filter_map(Result::ok) {
            let from = entry.path();
            if from.extension().is_some_and(|extension| extension == "json") {
                let to = archive.join(entry.file_name());
                std::fs::rename(&from, &to).map_err(|e| ApiError::io("keep", &from, &e))?;
            }
        }
        Ok(())
    }

    /// The generation at which a VM that is not here any more was taken over here by this move.
    pub(super) fn taken_at(&self, vm: &VmDir, move_id: &MoveId) -> Result<Option<u64>, ApiError> {
        let by_journal = vm.records()?.into_iter().find_map(|record| match record {
            Record::TakenOver { move_id: taken, generation, .. } if taken == *move_id => Some(generation),
            _ => None,
        });
        if by_journal.is_some() {
            return Ok(by_journal);
        }
        let path = self.taken_file(move_id)?;
        match std::fs::read_to_string(&path) {
            Ok(text) => match text.trim().parse() {
                Ok(generation) => Ok(Some(generation)),
                Err(_) => Err(ApiError::storage(format!("{} holds no generation", path.display()))),
            },
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(ApiError::io("read", &path, &e)),
        }
    }

    fn taken_file(&self, move_id: &MoveId) -> Result<std::path::PathBuf, ApiError> {
        Ok(self.archive_dir()?.join(format!("{move_id}.taken")))
    }

    /// Where reports of moves are kept: `<state>/moves`.
    pub(super) fn archive_dir(&self) -> Result<std::path::PathBuf, ApiError> {
        let dir = self.state.join("moves");
        std::fs::create_dir_all(&dir).map_err(|e| ApiError::io("create", &dir, &e))?;
        Ok(dir)
    }

    /// Removes all but the newest `keep` of the kept reports.
    pub(super) fn prune_reports(&self, keep: usize) -> Result<(), ApiError> {
        let dir = self.archive_dir()?;
        let entries = std::fs::read_dir(&dir).map_err(|e| ApiError::io("list", &dir, &e))?;
        let mut reports: Vec<_> = entries
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let report = path.extension().is_some_and(|extension| extension == "json");
                report.then(|| Some((path.metadata().ok()?.modified().ok()?, path)))?
            })
            .collect();
        reports.sort_unstable_by(|a, b| b.cmp(a));
        for (_, path) in reports.into_iter().skip(keep) {
            std::fs::remove_file(&path).map_err(|e| ApiError::io("remove", &path, &e))?;
        }
        Ok(())
    }

    /// How a move from here went, for host `from`. With a dead process that had not committed, `Aborted` is journaled before it is
    /// said; so while a move is under way only its target may ask, whose question means that it cannot go on without the answer.
    pub async fn verdict(
        self: &Arc<Self>,
        from: &str,
        name: &str,
        move_id: &str,
    ) -> Result<Verdict, ApiError> {
        let id = MoveId::new(move_id).map_err(|e| ApiError::invalid(e.to_string()))?;
        let vm = self.registry.vm(name)?;
        let look = vm.clone();
        let standing = blocking(move || Ok(look.journal()?.standing().clone())).await?;
        if let Standing::Moving { move_id, to_host, .. } = &standing
            && *move_id == id
            && to_host.as_deref() != Some(from)
        {
            return Err(ApiError::forbidden(format!("move {move_id} does not go to host {from}")));
        }
        let file = self.archive_dir()?.join(format!("{move_id}.json"));
        match control::ask(vm.path(), &Request::Verdict { move_id: move_id.to_owned() }).await {
            // The VM has been away and is back since, with a journal that begins then.
            Ok(vmove_compute::process::protocol::Reply::Verdict(Verdict::Unknown)) => {
                return blocking(move || Ok(archived_verdict(&file))).await;
            }
            Ok(vmove_compute::process::protocol::Reply::Verdict(verdict)) => return Ok(verdict),
            Err(ControlError::Gone(_)) => {}
            // It lives and decides itself: until it says so, nothing is decided.
            Ok(_) | Err(_) => return Ok(Verdict::Moving),
        }
        let dir = vm.clone();
        let verdict = blocking(move || verdict_of_dead(&dir, &id, &file)).await?;
        if verdict == Verdict::Aborted && vm.path().exists() {
            let (agent, owned) = (self.clone(), name.to_owned());
            tokio::spawn(async move { agent.settle(&owned).await });
        }
        Ok(verdict)
    }

    /// Follows a VM that arrives until it runs here or is gone, and fetches the source's word when the process cannot hear it.
    pub(super) fn follow_arrival(self: &Arc<Self>, name: &str) {
        let (agent, name) = (self.clone(), name.to_owned());
        tokio::spawn(async move {
            let Ok(vm) = agent.registry.vm(&name) else { return };
            let mut gap = FIRST_GAP;
            loop {
                let wait = match control::status(vm.path()).await {
                    Ok(status) if status.state == RunState::Incoming => ARRIVAL_INTERVAL,
                    Ok(status) if status.state == RunState::Undecided => {
                        if let Some((move_id, host)) = status.incoming {
                            agent.fetch_word(&vm, &name, &move_id, &host).await;
                        }
                        gap = (gap * 2).min(LAST_GAP);
                        gap
                    }
                    Ok(_) => {
                        // Keeps the definition the guest came with.
                        if let Err(error) = agent.view(&name).await {
                            tracing::warn!(vm = name, %error, "cannot note the arrival");
                        }
                        tracing::info!(vm = name, "VM has arrived");
                        return;
                    }
                    Err(ControlError::Gone(_)) => return,
                    Err(_) => ARRIVAL_INTERVAL,
                };
                if !agent.pause(wait).await {
                    return;
                }
            }
        });
    }

    /// Gives an undecided arrival the source's word; false if that is still not to be had.
    pub(super) async fn fetch_word(&self, vm: &VmDir, name: &str, move_id: &str, host: &str) -> bool {
        match self.ask_verdict(host, name, move_id).await {
            Ok(Verdict::Moving) => false,
            Ok(Verdict::Unknown) => {
                tracing::warn!(
                    vm = name,
                    move_id,
                    host,
                    "the source knows nothing of the move; nobody runs the VM"
                );
                false
            }
            Ok(verdict) => {
                let request = Request::Resolve { move_id: move_id.to_owned(), verdict };
                if let Err(error) = control::ask(vm.path(), &request).await {
                    tracing::warn!(vm = name, %error, "the source's word was not taken");
                }
                true
            }
            Err(error) => {
                tracing::warn!(vm = name, %error, "the source's word is awaited");
                false
            }
        }
    }
}

/// What the owner of an aborted move notes of its target's answer.
fn closing(journal: &Journal, answer: PeerAnswer) -> Result<Record, ApiError> {
    let Some(Question::Holding { host, move_id }) = question(journal) else {
        return Err(ApiError::internal("an answer to what was not asked"));
    };
    let move_id = move_id.clone();
    Ok(match (settle(journal.standing(), answer), answer) {
        (Settlement::Lose, PeerAnswer::Holds(Holding::Owner { generation })) => {
            Record::Lost { move_id, host: host.to_owned(), generation }
        }
        _ => Record::Cleared { move_id },
    })
}

/// The end of a move whose process left no report.
fn given_up(move_id: &str) -> MoveProgress {
    MoveProgress {
        move_id: move_id.to_owned(),
        phase: "aborted".into(),
        elapsed_ms: 0,
        disk_total_bytes: 0,
        disk_done_bytes: 0,
        ram_total_bytes: 0,
        ram_done_bytes: 0,
        round: 0,
        rate: 0,
        dirty_rate: 0,
        left_ms: None,
        reconnects: 0,
        report: None,
        error: Some("the VM's process ended before the commit".into()),
    }
}

/// Images of a VM that runs elsewhere: removed, or kept as stale if that was asked for. The VM process does this itself; here
/// it is made up for after a crash.
fn retire(name: &str, vm: &VmDir) -> Result<(), ApiError> {
    let owned = vm.records()?.into_iter().rev().find_map(|record| match record {
        Record::Owner { generation, disks } => Some((generation, disks)),
        _ => None,
    });
    let Some((generation, disks)) = owned else { return Ok(()) };
    retire_disks(name, vm, generation, &placements(&disks))
}

/// Images that a VM of this host left behind in another datastore, when its process died between that commit and their end.
pub(super) fn retire_left(name: &str, vm: &VmDir, standing: &Standing) -> Result<(), ApiError> {
    let Standing::Owner { generation: current, disks } = standing else { return Ok(()) };
    for record in vm.records()? {
        let Record::Owner { generation, disks: mut left } = record else { continue };
        if generation >= *current {
            continue;
        }
        left.retain(|old| disks.iter().all(|disk| disk.path != old.path));
        retire_disks(name, vm, generation, &placements(&left))?;
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

/// Whether a VM came here by a committed move and its process died before the guest went on: only then are its images still stamped
/// as arriving. The source has let it go, so it is booted from its disks, as after `Prepared`.
fn never_ran(vm: &VmDir, standing: &Standing) -> Result<bool, ApiError> {
    let Standing::Owner { generation, disks } = standing else { return Ok(false) };
    if !vm.launch().is_some_and(|launch| matches!(launch.start, Start::Incoming(_))) {
        return Ok(false);
    }
    for disk in placements(disks) {
        // A take-over has raised the generation meanwhile.
        let arriving = |stamp: Stamp| stamp.generation <= *generation && stamp.state == OwnerState::Incoming;
        if Stamp::read(&disk.path)?.is_some_and(arriving) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Appends a record with nobody else at the journal.
async fn append(vm: &VmDir, record: Record) -> Result<(), ApiError> {
    let vm = vm.clone();
    blocking(move || Ok(vm.append(&record)?)).await
}

/// The word of a source without a process. `archived` is where the report of a move that has ended would be.
fn verdict_of_dead(vm: &VmDir, id: &MoveId, archived: &Path) -> Result<Verdict, ApiError> {
    if process::find(vm.path()).is_some() {
        return Ok(Verdict::Moving);
    }
    match vm.journal()?.verdict(id) {
        // This is never taken back: it must rest on what is on disk, which a process that died in its commit may not have seen to.
        journal::Verdict::Committed => match vm.durable_journal() {
            Ok(_) => Ok(Verdict::Committed),
            Err(AppendError::InUse) => Ok(Verdict::Moving),
            Err(AppendError::Failed(error)) => Err(error),
        },
        journal::Verdict::Moving => match vm.append(&Record::Aborted { move_id: id.clone() }) {
            Ok(()) => Ok(Verdict::Aborted),
            Err(AppendError::InUse) => Ok(Verdict::Moving),
            Err(AppendError::Failed(error)) => Err(error),
        },
        journal::Verdict::Aborted => Ok(Verdict::Aborted),
        journal::Verdict::Unknown => Ok(archived_verdict(archived)),
    }
}

/// The word on a move that the journal knows nothing of: the VM's directory has gone since, its reports were kept.
fn archived_verdict(archived: &Path) -> Verdict {
    match read_progress(archived) {
        Some(MoveProgress { report: Some(report), .. }) if report.outcome == "completed" => {
            if report.from.host == report.to.host { Verdict::Unknown } else { Verdict::Committed }
        }
        Some(progress) if ["aborted", "cancelled"].contains(&progress.phase.as_str()) => Verdict::Aborted,
        _ => Verdict::Unknown,
    }
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
    use vmove_storage::JournalFile;

    fn source(records: &[Record]) -> (tempfile::TempDir, VmDir) {
        let dir = tempfile::tempdir().unwrap();
        let vm = VmDir::new(dir.path().to_path_buf());
        for record in records {
            vm.append(record).unwrap();
        }
        (dir, vm)
    }

    #[test]
    fn a_dead_source_journals_aborted_before_it_says_so() {
        let id = MoveId::new("m").unwrap();
        let owner = Record::Owner { generation: 1, disks: disks_at(&[]).unwrap() };
        let moving = Record::Moving { move_id: id.clone(), to_host: Some("b".into()), generation: 2 };
        let none = Path::new("/nonexistent");

        let (dir, vm) = source(&[owner.clone(), moving.clone()]);
        let held = JournalFile::open(&dir.path().join("journal")).unwrap();
        assert_eq!(verdict_of_dead(&vm, &id, none).unwrap(), Verdict::Moving, "somebody has the journal");
        drop(held);
        assert_eq!(verdict_of_dead(&vm, &id, none).unwrap(), Verdict::Aborted);
        assert_eq!(vm.records().unwrap().last(), Some(&Record::Aborted { move_id: id.clone() }));
        assert!(vm.append(&Record::Committed { move_id: id.clone() }).is_err());

        let (_dir, vm) = source(&[owner, moving, Record::Committed { move_id: id.clone() }]);
        assert_eq!(verdict_of_dead(&vm, &id, none).unwrap(), Verdict::Committed);
        let (_dir, vm) = source(&[]);
        assert_eq!(
            verdict_of_dead(&vm, &id, none).unwrap(),
            Verdict::Unknown,
            "not the word that removes a copy"
        );
        let kept = vm.path().join("m.json");
        std::fs::write(&kept, serde_json::to_string(&given_up("m")).unwrap()).unwrap();
        assert_eq!(verdict_of_dead(&vm, &id, &kept).unwrap(), Verdict::Aborted, "its report outlives the VM");
    }

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
        let (_dir, vm) = source(&[
            Record::Owner { generation: 1, disks: disks_at(&all[..6]).unwrap() },
            Record::Moving { move_id: id, to_host: None, generation: 2 },
            Record::Owner { generation: 2, disks: disks_at(&[disk("stays"), disk("now")]).unwrap() },
        ]);
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
