//! `vmove <VM>`: order a move, show it, report it.

use std::time::Duration;

use tokio::signal;

use super::CommandError;
use super::destination::Destination;
use crate::api::types::{MoveAccepted, MoveAnswer, MoveProgress, MoveReport, MoveRequest};
use crate::client::{Client, ClientError};
use crate::render::progress::MoveBars;
use crate::render::{self, units};

/// How often a move is asked about.
const POLL: Duration = Duration::from_millis(200);

/// Arguments of a move.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct MoveArgs {
    /// Where to.
    #[command(flatten)]
    pub to: Destination,
    /// Only say what would be done and what stands in the way
    #[arg(long)]
    pub dry_run: bool,
    /// Print the plan or the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Keep the images at the source, stamped stale
    #[arg(long)]
    pub keep_source: bool,
    /// Compare the whole paused guest on both sides before the commit (a longer pause)
    #[arg(long)]
    pub audit: bool,
    /// Send guest memory and disks unencrypted; only for measurements on a trusted link
    #[arg(long)]
    pub insecure_plain: bool,
    /// Begin the move and return; follow it with 'vmove status'
    #[arg(long, conflicts_with = "dry_run")]
    pub detach: bool,
}

impl MoveArgs {
    /// The request to the agent.
    fn request(&self) -> Result<MoveRequest, CommandError> {
        Ok(MoveRequest {
            dry_run: self.dry_run,
            keep_source: self.keep_source,
            audit: self.audit,
            insecure_plain: self.insecure_plain,
            ..self.to.request()?
        })
    }

    /// Moves the VM and reports.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let request = self.request()?;
        match client.move_vm(&self.to.vm, &request).await? {
            MoveAnswer::Plan(plan) => {
                if self.json {
                    render::print_json(&plan)?;
                } else {
                    render::print(&render::report::plan(&plan))?;
                }
                if plan.blockers.is_empty() {
                    return Ok(());
                }
                Err(CommandError::Failed {
                    message: format!("{} cannot be moved so", self.to.vm),
                    blockers: plan.blockers,
                })
            }
            MoveAnswer::Accepted(accepted) if self.detach => {
                if self.json {
                    render::print_json(&accepted)?;
                } else {
                    render::print(&format!("{}\n", accepted.move_id))?;
                }
                Ok(())
            }
            MoveAnswer::Accepted(accepted) => {
                let title = format!("{} -> {}", self.to.vm, render::report::place(&accepted.plan.to));
                let bars = MoveBars::new(&title, true);
                let ended = follow_cancellable(client, &accepted, bars).await?;
                finish(&self.to.vm, ended, self.json)
            }
        }
    }
}

/// Follows a move; the first Ctrl-C asks the agent to give it up, a second one leaves it to itself.
async fn follow_cancellable(
    client: &Client,
    accepted: &MoveAccepted,
    mut bars: MoveBars,
) -> Result<MoveProgress, CommandError> {
    let mut asked = false;
    let ended = {
        let follow = client.follow(&accepted.move_id, POLL, |progress| bars.update(progress));
        tokio::pin!(follow);
        loop {
            tokio::select! {
                ended = &mut follow => break ended,
                pressed = signal::ctrl_c() => {
                    pressed?;
                    if asked {
                        return Err(CommandError::Cancelled(format!(
                            "left move {} to itself; see 'vmove status {}'", accepted.move_id, accepted.move_id
                        )));
                    }
                    asked = true;
                    match client.cancel(&accepted.move_id).await {
                        Ok(()) => eprintln!("vmove: giving the move up (Ctrl-C again: leave it to itself)"),
                        // Too late to cancel is no failure of the move: go on to its end.
                        Err(error) => eprintln!("vmove: cannot give the move up: {error}"),
                    }
                }
            }
        }
    };
    bars.finish();
    Ok(ended?)
}

/// Prints how a move ended; anything but completion is an error with its exit code.
pub(super) fn finish(vm: &str, ended: MoveProgress, json: bool) -> Result<(), CommandError> {
    if let (Some(report), true) = (&ended.report, json) {
        render::print_json(report)?;
    }
    let outcome = outcome(vm, &ended);
    if let (Ok(report), false) = (&outcome, json) {
        render::print(&render::report::report(report))?;
    }
    outcome.map(|_| ())
}

/// What the end of a move means.
fn outcome<'a>(vm: &str, ended: &'a MoveProgress) -> Result<&'a MoveReport, CommandError> {
    let reason = |report: Option<&MoveReport>| {
        let reason = report.and_then(|report| report.reason.clone()).or_else(|| ended.error.clone());
        reason.unwrap_or_else(|| "no reason given".to_owned())
    };
    match &ended.report {
        Some(report) if report.outcome == "completed" => Ok(report),
        Some(report) if report.outcome == "cancelled" => {
            Err(CommandError::Cancelled(format!("the move of {vm} was cancelled; it runs where it was")))
        }
        report if ended.phase == "committed" => Err(CommandError::Undecided(format!(
            "{vm}: committed to the other host, but not confirmed: {}; ownership is settled between the agents, see 'vmove show {vm}'",
            reason(report.as_ref())
        ))),
        report => Err(CommandError::failed(format!("{vm} was not moved: {}", reason(report.as_ref())))),
    }
}

/// Arguments of `cancel`, and of `status` for one move.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct MoveIdArgs {
    /// A VM on the move, or the id of a move
    #[arg(value_name = "VM|MOVE")]
    pub what: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl MoveIdArgs {
    /// The move meant: the one the VM is on, or the id itself.
    async fn move_id(&self, client: &Client) -> Result<String, CommandError> {
        match client.vm(&self.what).await {
            Ok(vm) => vm
                .summary
                .move_id
                .ok_or_else(|| CommandError::failed(format!("{} is not on the move", self.what))),
            Err(ClientError::Api { status: 404, .. }) if uuid::Uuid::parse_str(&self.what).is_ok() => {
                Ok(self.what.clone())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// `vmove status`: how far a move is, or how it ended.
    pub async fn status(&self, client: &Client) -> Result<(), CommandError> {
        let progress = client.move_progress(&self.move_id(client).await?).await?;
        if self.json {
            render::print_json(&progress)?;
            return Ok(());
        }
        match &progress.report {
            Some(report) => render::print(&render::report::report(report))?,
            None => render::print(&format!(
                "{} {}, {} of {} disk, {} of {} RAM (round {}), {}\n",
                progress.phase,
                units::millis(progress.elapsed_ms as f64),
                units::size(progress.disk_done_bytes),
                units::size(progress.disk_total_bytes),
                units::size(progress.ram_done_bytes),
                units::size(progress.ram_total_bytes),
                progress.round,
                units::rate(progress.rate)
            ))?,
        }
        match progress.error {
            Some(error) => Err(CommandError::failed(error)),
            None => Ok(()),
        }
    }

    /// `vmove cancel`: asks for a move to be given up and waits for its end.
    pub async fn cancel(&self, client: &Client) -> Result<(), CommandError> {
        let id = self.move_id(client).await?;
        client.cancel(&id).await?;
        let ended = client.follow(&id, POLL, |_| {}).await?;
        if self.json {
            render::print_json(&ended)?;
        }
        match ended.report {
            Some(report) if report.outcome == "completed" => {
                Err(CommandError::failed(format!("too late: {} has moved", report.vm)))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{DowntimeParts, MemoryReport, Place};

    fn ended(phase: &str, outcome: Option<&str>) -> MoveProgress {
        let place = Place { host: "h".into(), datastore: "d".into() };
        MoveProgress {
            move_id: "m".into(),
            phase: phase.into(),
            elapsed_ms: 1,
            disk_total_bytes: 0,
            disk_done_bytes: 0,
            ram_total_bytes: 0,
            ram_done_bytes: 0,
            round: 1,
            rate: 0,
            dirty_rate: 0,
            reconnects: 0,
            left_ms: None,
            report: outcome.map(|outcome| MoveReport {
                vm: "vm1".into(),
                from: place.clone(),
                to: place,
                outcome: outcome.into(),
                total_ms: 1.0,
                downtime_ms: 1.0,
                downtime: DowntimeParts::default(),
                memory: MemoryReport::default(),
                disks: Vec::new(),
                reconnects: 0,
                verified: true,
                digest: String::new(),
                reason: None,
                predicted: None,
            }),
            error: Some("link lost".into()),
        }
    }

    #[test]
    fn ends_map_to_exit_codes() {
        let code =
            |phase: &str, word: Option<&str>| outcome("vm1", &ended(phase, word)).map_err(|e| e.code()).err();
        assert_eq!(code("completed", Some("completed")), None);
        assert_eq!(code("aborted", Some("cancelled")), Some(130));
        assert_eq!(code("aborted", Some("aborted")), Some(1));
        assert_eq!(code("setup", None), Some(1));
        assert_eq!(code("committed", None), Some(3));
    }
}
