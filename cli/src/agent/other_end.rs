//! The host at the other end of a move: asking it for its word, and closing what is open between the two.
//!
//! Lives here: the questions of the failure table over the network, and a running VM's aborted moves. Never enters: the table, and
//! what is done with a VM that has no process (settle).

use std::sync::Arc;

use hyper::Method;
use vmove_compute::process::protocol::Request;
use vmove_mirror::journal::{self, Journal, MoveId, Standing};
use vmove_mirror::recovery::{Holding, PeerAnswer, Question, Settlement, question, settle};

use super::error::{ApiError, blocking};
use super::settle::{FIRST_GAP, LAST_GAP, Settled};
use super::{Agent, control, peers, process};
use crate::api::recovery::{HostStanding, StandingKind};
use crate::api::types::{Verdict, VerdictAnswer};

impl Agent {
    /// The answer to what a journal has to ask.
    pub(super) async fn ask_other(&self, name: &str, journal: &Journal) -> PeerAnswer {
        let answered = match question(journal) {
            None => return PeerAnswer::NotAsked,
            Some(Question::Verdict { host, move_id }) => self
                .ask_verdict(host, name, move_id.as_str())
                .await
                .map(|verdict| PeerAnswer::Said(journal_verdict(verdict))),
            Some(Question::Holding { host, move_id }) => {
                self.ask_holding(name, journal.standing(), host, move_id).await.map(PeerAnswer::Holds)
            }
        };
        answered.unwrap_or_else(|error| {
            tracing::warn!(vm = name, %error, "the other host's word is awaited");
            PeerAnswer::Unreachable
        })
    }

    /// Asks the agent of a move's source how it went.
    pub(super) async fn ask_verdict(&self, host: &str, vm: &str, move_id: &str) -> Result<Verdict, ApiError> {
        let path = format!("/v1/vms/{vm}/moves/{move_id}/verdict");
        let answer: VerdictAnswer =
            self.peers.call(host, Method::GET, &path, None::<&()>, peers::SHORT).await?;
        Ok(answer.verdict)
    }

    /// Asks the agent of a move's target what it holds of the VM.
    async fn ask_holding(
        &self,
        name: &str,
        here: &Standing,
        host: &str,
        move_id: &MoveId,
    ) -> Result<Holding, ApiError> {
        let path = format!("/v1/vms/{name}/standing?move_id={move_id}");
        let ask = async || {
            let there: HostStanding =
                self.peers.call(host, Method::GET, &path, None::<&()>, peers::SHORT).await?;
            Ok(holding(&there))
        };
        let there = ask().await;
        match (here, &there) {
            // It still awaits the word that is on our disk: it fetches it now, or at least says so.
            (Standing::Owner { .. }, Ok(Holding::Arriving | Holding::Prepared)) => {
                let settle = format!("/v1/vms/{name}/settle");
                let _: HostStanding =
                    self.peers.call(host, Method::POST, &settle, None::<&()>, peers::LONG).await?;
                ask().await
            }
            (_, Ok(Holding::Owner { .. })) => there,
            // The VM may have gone on from there: then it is further.
            (Standing::Committed { generation, .. }, _) => {
                let further = |there: &HostStanding| matches!(holding(there), Holding::Owner { generation: owned } if owned > *generation);
                match self.peers.find(&path, further).await {
                    Some(_) => Ok(Holding::Owner { generation: *generation }),
                    None => there,
                }
            }
            _ => there,
        }
    }

    /// Looks after a running VM's aborted moves until their targets are known to hold nothing.
    pub(super) fn close_ends(self: &Arc<Self>, name: &str) {
        let (agent, name) = (self.clone(), name.to_owned());
        tokio::spawn(async move {
            let mut gap = FIRST_GAP;
            loop {
                match agent.close_end(&name).await {
                    Ok(Settled::Done) => return,
                    Ok(Settled::Again) => continue,
                    Ok(Settled::Busy | Settled::Waiting) => {}
                    Err(error) => tracing::warn!(vm = name, %error, "an aborted move is not cleared"),
                }
                if !agent.pause(gap).await {
                    return;
                }
                gap = (gap * 2).min(LAST_GAP);
            }
        });
    }

    /// One step of that. A VM without a process is settle's.
    pub(super) async fn close_end(&self, name: &str) -> Result<Settled, ApiError> {
        let vm = self.registry.vm(name)?;
        let look = vm.clone();
        let found = blocking(move || {
            if !look.path().exists() || process::find(look.path()).is_none() {
                return Ok(None);
            }
            Ok(Some(look.journal()?))
        })
        .await?;
        let Some(journal) = found else { return Ok(Settled::Done) };
        match journal.standing() {
            Standing::Owner { .. } if !journal.open_ends().is_empty() => {}
            Standing::Moving { .. } if !journal.open_ends().is_empty() => return Ok(Settled::Waiting),
            _ => return Ok(Settled::Done),
        }
        let answer = self.ask_other(name, &journal).await;
        match (settle(journal.standing(), answer), question(&journal)) {
            (Settlement::Clear, Some(Question::Holding { move_id, .. })) => {
                let cleared = Request::Cleared { move_id: move_id.to_string() };
                match control::ask(vm.path(), &cleared).await {
                    Ok(_) => Ok(Settled::Again),
                    Err(error) => {
                        tracing::debug!(vm = name, %error, "the process has not taken it in");
                        Ok(Settled::Waiting)
                    }
                }
            }
            (Settlement::Lose, Some(Question::Holding { host, .. })) => {
                tracing::error!(
                    vm = name,
                    host,
                    ?answer,
                    "two hosts run the VM: it was taken over while it ran here"
                );
                self.registry.set_conflict(
                    name,
                    format!(
                        "CONFLICT: host {host} has taken {name} over while it ran here, so two hosts run it. Stop it here if what \
                         it did here is not needed; it cannot be started here again"
                    ),
                );
                Ok(Settled::Waiting)
            }
            _ => Ok(Settled::Waiting),
        }
    }
}

fn journal_verdict(verdict: Verdict) -> journal::Verdict {
    match verdict {
        Verdict::Committed => journal::Verdict::Committed,
        Verdict::Aborted => journal::Verdict::Aborted,
        Verdict::Moving => journal::Verdict::Moving,
        Verdict::Unknown => journal::Verdict::Unknown,
    }
}

/// A host's account as the failure table takes it.
fn holding(there: &HostStanding) -> Holding {
    match (there.standing, there.generation) {
        // Released with a generation: it was taken over there, and has gone on.
        (
            StandingKind::Owner | StandingKind::Moving | StandingKind::Left | StandingKind::Released,
            Some(generation),
        ) => Holding::Owner { generation },
        (StandingKind::Prepared, _) => Holding::Prepared,
        (StandingKind::Arriving, _) => Holding::Arriving,
        _ => Holding::Nothing,
    }
}
