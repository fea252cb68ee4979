//! What is done with a VM whose process has ended, by the failure table (`vmove_mirror::recovery`), and the words that decide it.
//!
//! Lives here: carrying the table out: journal first, then what it leaves; asking the other host again and again. Never enters: the table
//! itself, the questions (`other_end`), removing images and directories (`leftovers`).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use vmove_compute::process::protocol::{Request, RunState, Start};
use vmove_mirror::journal::{self, Journal, MoveId, Record, Standing};
use vmove_mirror::recovery::{Holding, PeerAnswer, Question, Settlement, question, settle};
use vmove_storage::{OwnerState, Stamp};

use super::archive::{archived_verdict, given_up};
use super::control::{self, ControlError};
use super::error::{ApiError, blocking};
use super::vmdir::{AppendError, VmDir, placements};
use super::{Agent, process, registry};
use crate::api::types::Verdict;

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
            Ok(Some(look.durable_journal()))
        })
        .await?;
        let journal = match found {
            None => return Ok(Settled::Done),
            // A process that is just coming, or going.
            Some(Err(AppendError::InUse)) => return Ok(Settled::Busy),
            Some(journal) => journal?,
        };
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
}
