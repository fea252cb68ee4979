//! `vmove recover`: who holds what of a VM, everything settled at once that can be, and the explicit acts that only a person may
//! decide on.
//!
//! Lives here: a host's own account, the accounts of all hosts put together, taking over, removing what was lost. Never enters: the
//! failure table and carrying it out (`vmove_mirror::recovery`, settle).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use tokio::task::JoinSet;
use vmove_compute::process::protocol::{ProcessStatus, Reply, Request, RunState};
use vmove_mirror::journal::{Journal, MoveId, Record, Standing, TAKE_OVER_STEP};
use vmove_mirror::recovery::{PeerAnswer, Question, question};
use vmove_storage::{OwnerState, Stamp};

use super::control::{self, ControlError};
use super::error::{ApiError, blocking};
use super::settle::Settled;
use super::vmdir::{VmDir, placements};
use super::{Agent, images, process};
use crate::api::recovery::{
    HeldImage, HeldProcess, HostStanding, RecoveryReport, SilentHost, StandingKind, TakeOver,
};
use crate::api::types::DiskPlacement;

/// How long a host may take to settle what it holds before its account is given as it is.
const SETTLE_DEADLINE: Duration = Duration::from_secs(20);
/// Time for another host to settle and answer: it may itself wait for a third that is down.
const ASK_DEADLINE: Duration = Duration::from_secs(40);
/// How often is looked whether a process has taken in what it was told.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Each host's settling may be what another one waits for: the target lets go, then the source clears.
const ROUNDS: usize = 2;

impl Agent {
    /// What this host holds of a VM, or held when it took it over by `asked`.
    pub async fn standing(
        self: &Arc<Self>,
        name: &str,
        asked: Option<MoveId>,
    ) -> Result<HostStanding, ApiError> {
        let vm = self.registry.vm(name)?;
        let process = held_process(&vm).await;
        let busy = self.registry.busy(name);
        let conflict = self.registry.conflict(name);
        let (agent, owned) = (self.clone(), name.to_owned());
        blocking(move || {
            let journal = vm.synced_journal()?;
            let mut account = account(&agent.config.name, &owned, &journal, process.as_ref())?;
            // Not only once its directory is gone: from the word that the VM runs elsewhere on it would count as nothing held here.
            let ended = matches!(
                account.standing,
                StandingKind::Nothing | StandingKind::Discarded | StandingKind::Released | StandingKind::Lost
            );
            if ended
                && let Some(move_id) = asked
                && let Some(generation) = agent.taken_at(&vm, &move_id)?
            {
                account.standing = StandingKind::Released;
                account.generation = Some(generation);
                account.move_id = Some(move_id.to_string());
                account.next = "nothing: it was taken over here, and has gone on since".into();
            }
            if let Some(conflict) = conflict {
                account.next = conflict;
            } else if let (None, Some(busy)) = (&account.waits_for, busy) {
                account.next = format!("{} (it is {busy})", account.next);
            }
            Ok(account)
        })
        .await
    }

    /// Settles what can be settled of a VM here, now; gives what stands then.
    pub async fn settle_now(self: &Arc<Self>, name: &str) -> Result<HostStanding, ApiError> {
        let vm = self.registry.vm(name)?;
        let end = tokio::time::Instant::now() + SETTLE_DEADLINE;
        while tokio::time::Instant::now() < end {
            match control::status(vm.path()).await {
                Ok(status) if status.state == RunState::Undecided => {
                    let Some((move_id, host)) = status.incoming else { break };
                    if !self.fetch_word(&vm, name, &move_id, &host).await {
                        break;
                    }
                    self.wait_decided(&vm, end).await;
                }
                Ok(status) if status.state == RunState::Running => {
                    if self.close_end(name).await? != Settled::Again {
                        break;
                    }
                }
                Ok(_) => break,
                Err(ControlError::Gone(_)) => match self.settle_once(name).await? {
                    Settled::Busy => tokio::time::sleep(LOOK_INTERVAL).await,
                    Settled::Done | Settled::Waiting => break,
                    Settled::Again => {}
                },
                Err(_) => break,
            }
        }
        self.standing(name, None).await
    }

    /// Waits until an arrival that was told how its move went is no longer undecided.
    async fn wait_decided(&self, vm: &VmDir, end: tokio::time::Instant) {
        while tokio::time::Instant::now() < end {
            match control::status(vm.path()).await {
                Ok(status) if status.state == RunState::Undecided => {
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
                _ => return,
            }
        }
    }

    /// Who holds what of a VM. Every host that answers has settled before what it can.
    pub async fn recover(self: &Arc<Self>, name: &str) -> Result<RecoveryReport, ApiError> {
        // Refuses names that are none before anybody is asked.
        self.registry.vm(name)?;
        let mut accounts = Vec::new();
        for _ in 0..ROUNDS {
            accounts = self.settle_everywhere(name).await;
        }
        let (mut hosts, mut unreachable) = (Vec::new(), Vec::new());
        for (host, account) in accounts {
            match account {
                Ok(account) if account.standing == StandingKind::Nothing => {}
                Ok(account) => hosts.push(account),
                Err(error) => unreachable.push(SilentHost { host, error: error.message }),
            }
        }
        for host in hosts.iter().filter_map(|held| held.waits_for.as_deref()) {
            if host != self.config.name && unreachable.iter().all(|silent| silent.host != host) {
                // Not one of those that were asked: it was removed, or never known here.
                unreachable.extend(
                    self.peers
                        .address(host)
                        .err()
                        .map(|e| SilentHost { host: host.to_owned(), error: e.message }),
                );
            }
        }
        if hosts.is_empty() && unreachable.is_empty() {
            return Err(ApiError::not_found(format!("no host of the cluster has a VM {name:?}")));
        }
        Ok(judge(name, hosts, unreachable))
    }

    async fn settle_everywhere(
        self: &Arc<Self>,
        name: &str,
    ) -> Vec<(String, Result<HostStanding, ApiError>)> {
        let mut asked = JoinSet::new();
        let (agent, owned) = (self.clone(), name.to_owned());
        asked.spawn(async move { (agent.config.name.clone(), agent.settle_now(&owned).await) });
        for host in self.peers.all().into_keys() {
            let (agent, path) = (self.clone(), format!("/v1/vms/{name}/settle"));
            asked.spawn(async move {
                let answer = agent.peers.call(&host, Method::POST, &path, None::<&()>, ASK_DEADLINE).await;
                (host, answer)
            });
        }
        let mut answers = asked.join_all().await;
        answers.sort_by(|(one, _), (other, _)| one.cmp(other));
        answers
    }

    /// Makes `host` the owner of a VM whose other host is gone for ever, by the operator's word alone.
    pub async fn take_over(self: &Arc<Self>, name: &str, host: &str) -> Result<HostStanding, ApiError> {
        if host != self.config.name {
            let path = format!("/v1/vms/{name}/take-over?host={host}");
            return self.peers.call(host, Method::POST, &path, None::<&()>, ASK_DEADLINE).await;
        }
        let vm = self.registry.vm(name)?;
        let reservation = self.reserve_soon(name, "being taken over").await?;
        let look = vm.clone();
        let journal = blocking(move || look.journal()).await?;
        let answer = self.ask_other(name, &journal).await;
        let (record, gone) = taking_over(name, host, &journal, answer)?;
        self.refuse_if_held_elsewhere(name, &gone).await?;
        let Some(move_id) = record.move_id().map(MoveId::to_string) else {
            return Err(ApiError::internal("a take-over without a move"));
        };
        tracing::warn!(vm = name, move_id, "the VM is taken over by the operator's word");
        let arrived = matches!(journal.standing(), Standing::Incoming { .. });
        match control::ask(vm.path(), &Request::TakeOver { move_id }).await {
            Ok(Reply::Ok) => self.wait_decided(&vm, tokio::time::Instant::now() + SETTLE_DEADLINE).await,
            Ok(other) => return Err(ApiError::vm_process(control::unexpected(&other).to_string())),
            Err(ControlError::Gone(_)) => {
                let appending = vm.clone();
                blocking(move || Ok(appending.append(&record)?)).await?;
                if arrived {
                    self.boot(name).await?;
                }
            }
            Err(error) => {
                return Err(ApiError::vm_process(format!("VM {name:?} cannot be taken over: {error}")));
            }
        }
        drop(reservation);
        self.standing(name, None).await
    }

    /// The host that is gone may have gone on with the VM, and moved it to a third one, after it aborted the move to here.
    async fn refuse_if_held_elsewhere(&self, name: &str, gone: &str) -> Result<(), ApiError> {
        let asked =
            self.peers.ask_all::<HostStanding>(&format!("/v1/vms/{name}/standing"), super::peers::SHORT);
        for (other, account) in asked.join_all().await {
            let why = match account {
                Ok(account) if account.standing == StandingKind::Nothing => continue,
                Ok(_) => format!("host {other} holds something of it too"),
                Err(_) if other == gone => continue,
                Err(error) => format!(
                    "host {other} may have it, and cannot be asked ({error}); bring it back, or, if it is gone for ever, take it out of the cluster \
                     (`vmove host rm {other}`)"
                ),
            };
            return Err(ApiError::conflict(format!("VM {name:?} is not to be taken over: {why}")));
        }
        Ok(())
    }

    /// Removes what `host` kept of a VM that another one took over.
    pub async fn discard_lost(self: &Arc<Self>, name: &str, host: &str) -> Result<HostStanding, ApiError> {
        if host != self.config.name {
            let path = format!("/v1/vms/{name}/discard-lost?host={host}");
            return self.peers.call(host, Method::POST, &path, None::<&()>, ASK_DEADLINE).await;
        }
        let vm = self.registry.vm(name)?;
        let reservation = self.reserve_soon(name, "being removed").await?;
        let (agent, owner) = (self.clone(), name.to_owned());
        blocking(move || {
            let Standing::Lost { disks, .. } = vm.journal()?.standing().clone() else {
                return Err(ApiError::conflict(format!(
                    "host {} has lost no VM {owner:?}: there is nothing to discard",
                    agent.config.name
                )));
            };
            for disk in placements(&disks) {
                if Stamp::read(&disk.path)?.is_some_and(|stamp| stamp.vm == owner) {
                    images::remove(&disk.path)?;
                }
            }
            images::remove_empty_dirs(&agent.stores(), &owner);
            agent.archive_moves(&vm)?;
            agent.remove_dir(&vm)
        })
        .await?;
        self.registry.set_ended(name, None);
        drop(reservation);
        self.standing(name, None).await
    }
}

/// The record by which this host takes a VM over, if it may, and the host that is taken to be gone.
fn taking_over(
    vm: &str,
    own: &str,
    journal: &Journal,
    answer: PeerAnswer,
) -> Result<(Record, String), ApiError> {
    use vmove_mirror::journal::Verdict;
    let refuse = |why: String| {
        Err(ApiError::conflict(format!("VM {vm:?} is not to be taken over on host {own}: {why}")))
    };
    let (generation, disks) = match journal.standing() {
        Standing::Incoming { generation, disks, prepared: true, .. }
        | Standing::Owner { generation, disks } => (*generation, disks.clone()),
        Standing::Incoming { prepared: false, from_host, .. } => {
            return refuse(format!("it has not arrived whole; it is still host {from_host}'s"));
        }
        Standing::Moving { .. } => return refuse("it is this host's, and on the move".into()),
        Standing::Committed { to_host, .. } => {
            return refuse(format!(
                "it was given to host {to_host}, which may have run it since; its images here are complete as of the move, and \
                 a new VM can be made from copies of them"
            ));
        }
        Standing::Lost { host, .. } => return refuse(format!("host {host} has taken it over")),
        Standing::Nothing | Standing::Discarded { .. } | Standing::Released { .. } => {
            return refuse("nothing of it is here".into());
        }
    };
    if let Some(missing) = disks.iter().find(|disk| allocated(Path::new(&disk.path)).is_none()) {
        return refuse(format!(
            "it would own a disk that is not there: the image of {}, {}",
            missing.name, missing.path
        ));
    }
    let Some(asked) = question(journal) else {
        return refuse("it is this host's already".into());
    };
    let (Question::Verdict { host, move_id } | Question::Holding { host, move_id }) = asked;
    match answer {
        PeerAnswer::Unreachable | PeerAnswer::Said(Verdict::Unknown) => {}
        PeerAnswer::NotAsked | PeerAnswer::Said(_) | PeerAnswer::Holds(_) => {
            return refuse(format!(
                "host {host} answers, so its word decides; `vmove recover {vm}` fetches it"
            ));
        }
    }
    let Some(generation) = generation.checked_add(TAKE_OVER_STEP) else {
        return refuse(format!("its generation {generation} leaves no room"));
    };
    Ok((Record::TakenOver { move_id: move_id.clone(), generation, disks }, host.to_owned()))
}

/// The process of a VM, by its own word.
async fn held_process(vm: &VmDir) -> Option<(HeldProcess, Option<ProcessStatus>)> {
    if let Ok(status) = control::status(vm.path()).await {
        let state = match (status.state, &status.moving) {
            (RunState::Running, Some(_)) => "moving",
            (RunState::Running, None) => "running",
            (RunState::Incoming, _) => "incoming",
            (RunState::Undecided, _) => "undecided",
            (RunState::Leaving, _) => "leaving",
        };
        return Some((HeldProcess { pid: status.pid, state: state.into() }, Some(status)));
    }
    let dir = vm.path().to_path_buf();
    let pid = blocking(move || Ok(process::find(&dir))).await.ok()??;
    Some((HeldProcess { pid, state: "silent".into() }, None))
}

/// A host's account of a VM, from its journal, its images, and its process if there is one.
fn account(
    own: &str,
    vm: &str,
    journal: &Journal,
    process: Option<&(HeldProcess, Option<ProcessStatus>)>,
) -> Result<HostStanding, ApiError> {
    let standing = journal.standing();
    let kind = kind(standing);
    let (generation, disks) = match standing {
        Standing::Owner { generation, disks }
        | Standing::Moving { generation, disks, .. }
        | Standing::Incoming { generation, disks, .. }
        | Standing::Committed { generation, disks, .. } => (Some(*generation), disks.as_slice()),
        Standing::Lost { disks, .. } | Standing::Discarded { disks, .. } => (None, disks.as_slice()),
        Standing::Nothing | Standing::Released { .. } => (None, [].as_slice()),
    };
    let (move_id, other_host) = match standing {
        Standing::Moving { move_id, to_host, .. } => (Some(move_id), to_host.clone()),
        Standing::Incoming { move_id, from_host, .. } => (Some(move_id), Some(from_host.clone())),
        Standing::Committed { move_id, to_host, .. } => (Some(move_id), Some(to_host.clone())),
        Standing::Discarded { move_id, .. } | Standing::Released { move_id } => (Some(move_id), None),
        Standing::Lost { host, .. } => (None, Some(host.clone())),
        Standing::Owner { .. } => {
            let open = journal.open_ends().first();
            (open.map(|end| &end.move_id), open.map(|end| end.host.clone()))
        }
        Standing::Nothing => (None, None),
    };
    let waits_for = match question(journal) {
        // A guest that runs needs nobody's word.
        Some(Question::Holding { .. }) if kind == StandingKind::Owner && process.is_some() => None,
        // The word comes on the connection between the two processes.
        Some(Question::Verdict { .. }) if process.is_some_and(|(held, _)| held.state == "incoming") => None,
        Some(Question::Holding { host, .. } | Question::Verdict { host, .. }) => Some(host.to_owned()),
        None => None,
    };
    Ok(HostStanding {
        host: own.to_owned(),
        standing: kind,
        generation,
        move_id: move_id.map(MoveId::to_string),
        next: next(vm, kind, other_host.as_deref(), waits_for.as_deref(), process.map(|(held, _)| held)),
        other_host,
        waits_for,
        process: process.map(|(held, _)| held.clone()),
        images: placements(disks).iter().map(held_image).collect::<Result<_, _>>()?,
    })
}

fn kind(standing: &Standing) -> StandingKind {
    match standing {
        Standing::Nothing => StandingKind::Nothing,
        Standing::Owner { .. } => StandingKind::Owner,
        Standing::Moving { .. } => StandingKind::Moving,
        Standing::Incoming { prepared: false, .. } => StandingKind::Arriving,
        Standing::Incoming { prepared: true, .. } => StandingKind::Prepared,
        Standing::Committed { .. } => StandingKind::Left,
        Standing::Discarded { .. } => StandingKind::Discarded,
        Standing::Released { .. } => StandingKind::Released,
        Standing::Lost { .. } => StandingKind::Lost,
    }
}

fn held_image(disk: &DiskPlacement) -> Result<HeldImage, ApiError> {
    let stamp = Stamp::read(&disk.path)?.map_or_else(
        || "not stamped".to_owned(),
        |stamp| {
            let state = match stamp.state {
                OwnerState::Incoming => "arriving",
                OwnerState::Owned => "owned",
                OwnerState::Stale => "stale",
            };
            format!("{state} by {} at generation {}", stamp.vm, stamp.generation)
        },
    );
    Ok(HeldImage {
        disk: disk.name.clone(),
        datastore: disk.datastore.clone(),
        path: disk.path.clone(),
        allocated_bytes: allocated(&disk.path),
        stamp,
    })
}

fn allocated(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    // stat(2): st_blocks counts 512 bytes.
    std::fs::metadata(path).ok().map(|metadata| metadata.blocks() * 512)
}

/// What an agent does next with what it holds, and why.
fn next(
    vm: &str,
    kind: StandingKind,
    other: Option<&str>,
    waits_for: Option<&str>,
    process: Option<&HeldProcess>,
) -> String {
    let other = other.unwrap_or("another one");
    match (kind, process.is_some(), waits_for) {
        (StandingKind::Owner, true, _) => "nothing: it runs here".into(),
        (StandingKind::Owner, false, None) => format!("nothing: it is stopped, `vmove start {vm}` starts it"),
        (StandingKind::Owner, false, Some(host)) => format!(
            "asks host {host} what is left there of a move that was aborted; until that answers the VM is not started, since it \
             may have been taken over there"
        ),
        (StandingKind::Moving, true, _) => format!("follows the move to host {other}"),
        (StandingKind::Moving, false, _) => "aborts the move, for its process has ended".into(),
        (StandingKind::Arriving, true, _) => format!("waits for the move from host {other}"),
        (StandingKind::Arriving, false, _) => {
            "removes what has arrived: it can not have been committed".into()
        }
        (StandingKind::Prepared, _, None) => {
            format!("waits for the last word of host {other} on the move's connection")
        }
        (StandingKind::Prepared, _, Some(host)) => {
            format!(
                "asks host {host} how the move went: only that host knows whether it has gone on; until then nobody runs it here"
            )
        }
        (StandingKind::Left, _, _) => format!(
            "asks host {other}, to which it was given, and all others, whether they have it; it is never started here again"
        ),
        (StandingKind::Discarded | StandingKind::Released, _, _) => "removes what is left of it here".into(),
        (StandingKind::Lost, _, _) => format!(
            "nothing: host {other} has taken it over, so it is never started here; `vmove recover {vm} --discard HOST` removes \
             what is kept"
        ),
        (StandingKind::Nothing, _, _) => "nothing".into(),
    }
}

/// Puts the accounts together.
fn judge(vm: &str, hosts: Vec<HostStanding>, unreachable: Vec<SilentHost>) -> RecoveryReport {
    let of = |kinds: &[StandingKind]| -> Vec<&HostStanding> {
        hosts.iter().filter(|host| kinds.contains(&host.standing)).collect()
    };
    let owners = of(&[StandingKind::Owner, StandingKind::Moving]);
    let runs = |host: &&HostStanding| {
        host.process.as_ref().is_some_and(|held| ["running", "moving"].contains(&held.state.as_str()))
    };
    let runners: Vec<&HostStanding> = hosts.iter().filter(runs).collect();
    let waiting: Vec<&HostStanding> = hosts.iter().filter(|host| host.waits_for.is_some()).collect();
    let names = |hosts: &[&HostStanding]| {
        hosts.iter().map(|host| host.host.as_str()).collect::<Vec<_>>().join(" and ")
    };
    let silent = unreachable.iter().map(|silent| silent.host.as_str()).collect::<Vec<_>>().join(", ");
    let (settled, summary) = if runners.len() > 1 || owners.len() > 1 {
        let newest = owners.iter().max_by_key(|host| host.generation);
        let winner = newest.map_or_else(String::new, |host| {
            format!("; host {} has it at the highest generation, so stop it on the others", host.host)
        });
        let both = if runners.len() > 1 { &runners } else { &owners };
        (false, format!("CONFLICT: hosts {} both have {vm}{winner}", names(both)))
    } else if let Some(first) = waiting.first() {
        (false, format!("{vm} is not settled: host {} {}", first.host, first.next))
    } else if let [owner] = owners[..] {
        let doing = match &owner.process {
            Some(process) => process.state.clone(),
            None => "stopped".into(),
        };
        (true, format!("{vm} is host {}'s and {doing}; there is nothing to recover", owner.host))
    } else if hosts.is_empty() {
        (
            false,
            format!(
                "no host that answers has anything of {vm}; if its disks are on a host that is gone ({silent}), there is nothing \
                 to recover elsewhere"
            ),
        )
    } else {
        (false, format!("{vm} has no owner among the hosts that answer (not asked: {silent})"))
    };
    let owner = (owners.len() == 1 && settled).then(|| owners[0].host.clone());
    let take_over = possible_take_over(vm, hosts.len(), &waiting, &unreachable);
    RecoveryReport {
        vm: vm.to_owned(),
        hosts: hosts.clone(),
        unreachable,
        settled,
        owner,
        summary,
        take_over,
    }
}

/// The one host that could be made the owner by an operator's word.
fn possible_take_over(
    vm: &str,
    hosts: usize,
    waiting: &[&HostStanding],
    unreachable: &[SilentHost],
) -> Option<TakeOver> {
    let [candidate] = waiting[..] else { return None };
    let instead_of = candidate.waits_for.clone()?;
    if candidate.images.iter().any(|image| image.allocated_bytes.is_none()) {
        return None;
    }
    // A third host may have the VM, or get it.
    if hosts != 1 || unreachable.iter().any(|silent| silent.host != instead_of) {
        return None;
    }
    let gone = unreachable.iter().any(|silent| silent.host == instead_of);
    let (effect, mut risks) = match candidate.standing {
        StandingKind::Prepared => (
            match &candidate.process {
                Some(_) => {
                    format!("{vm} goes on running on host {} from where it was paused", candidate.host)
                }
                None => format!(
                    "{vm} is booted on host {} from its disks as they were flushed in the pause",
                    candidate.host
                ),
            },
            vec![
                format!(
                    "if host {instead_of} still runs {vm}, two hosts run it from then on, each with disks of its own"
                ),
                format!(
                    "if host {instead_of} went on with {vm} after the move, all that its guest wrote since is not here"
                ),
            ],
        ),
        StandingKind::Owner => (
            format!("{vm} can be started on host {} from its disks", candidate.host),
            vec![format!(
                "if {vm} was taken over on host {instead_of} while this host could not be asked, two hosts run it from then on"
            )],
        ),
        _ => return None,
    };
    if !gone {
        risks.push(format!(
            "host {instead_of} answers, but knows nothing of this move: its journal was lost or replaced"
        ));
    }
    risks.push(format!(
        "when host {instead_of} comes back it learns that it has lost {vm}, and never starts it again"
    ));
    Some(TakeOver { host: candidate.host.clone(), instead_of, effect, risks })
}
