//! `vmove <VM>`: order a move, show it, report it.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::signal;

use super::CommandError;
use crate::api::types::{MoveAccepted, MoveAnswer, MoveProgress, MoveReport, MoveRequest};
use crate::client::{Client, ClientError};
use crate::render::progress::MoveBars;
use crate::render::{self, units};

/// How often a move is asked about.
const POLL: Duration = Duration::from_millis(200);

/// Arguments of a move.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct MoveArgs {
    /// The VM to move
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Host it shall run on
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// Datastore its disks shall lie in
    #[arg(long, value_name = "DATASTORE")]
    pub datastore: Option<String>,
    /// Datastore of one disk (repeat for more)
    #[arg(long, value_name = "NAME=DATASTORE", value_parser = disk_target)]
    pub disk: Vec<(String, String)>,
    /// Only say what would be done and what stands in the way
    #[arg(long)]
    pub dry_run: bool,
    /// Print the plan or the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Longest pause to aim at
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = units::parse_duration)]
    pub max_downtime: Duration,
    /// Cap on the data rate, as in 1GiB/s [default: none]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bandwidth: Option<u64>,
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

pub(super) fn disk_target(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, datastore)) if !name.is_empty() && !datastore.is_empty() => {
            Ok((name.to_owned(), datastore.to_owned()))
        }
        _ => Err("expected NAME=DATASTORE".to_owned()),
    }
}

pub(super) fn rate(text: &str) -> Result<u64, String> {
    match units::parse_rate(text) {
        Ok(0) => Err("a rate of 0 would never end".to_owned()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(error.to_string()),
    }
}

/// The targets of single disks, each named once.
pub(super) fn targets(given: &[(String, String)]) -> Result<BTreeMap<String, String>, CommandError> {
    let mut disks = BTreeMap::new();
    for (name, datastore) in given {
        if disks.insert(name.clone(), datastore.clone()).is_some() {
            return Err(CommandError::Usage(format!("--disk {name} is given twice")));
        }
    }
    Ok(disks)
}

impl MoveArgs {
    /// No target is named.
    pub fn goes_nowhere(&self) -> bool {
        self.host.is_none() && self.datastore.is_none() && self.disk.is_empty()
    }

    /// The usage error for that.
    pub fn where_to(&self) -> CommandError {
        CommandError::Usage(format!(
            "where to? Name --host, --datastore or --disk to move the VM '{}' ('vmove --help' lists the commands)",
            self.vm
        ))
    }

    /// The request to the agent.
    fn request(&self) -> Result<MoveRequest, CommandError> {
        if self.goes_nowhere() {
            return Err(self.where_to());
        }
        Ok(MoveRequest {
            host: self.host.clone(),
            datastore: self.datastore.clone(),
            disks: targets(&self.disk)?,
            dry_run: self.dry_run,
            max_downtime_ms: self.max_downtime.as_millis() as u64,
            bandwidth: self.bandwidth,
            keep_source: self.keep_source,
            audit: self.audit,
            insecure_plain: self.insecure_plain,
        })
    }

    /// Moves the VM and reports.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let request = self.request()?;
        match client.move_vm(&self.vm, &request).await? {
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
                    message: format!("{} cannot be moved so", self.vm),
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
                let title = format!("{} -> {}", self.vm, render::report::place(&accepted.plan.to));
                let bars = MoveBars::new(&title, true);
                let ended = follow_cancellable(client, &accepted, bars).await?;
                finish(&self.vm, ended, self.json)
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

    fn args() -> MoveArgs {
        MoveArgs {
            vm: "vm1".into(),
            host: None,
            datastore: None,
            disk: Vec::new(),
            dry_run: false,
            json: false,
            max_downtime: Duration::from_millis(50),
            bandwidth: None,
            keep_source: false,
            audit: false,
            insecure_plain: false,
            detach: false,
        }
    }

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
    fn a_move_to_nowhere_is_a_usage_error() {
        assert!(args().request().is_err_and(|e| e.code() == 2 && e.to_string().contains("vm1")));
        let twice = MoveArgs { disk: vec![("a".into(), "x".into()), ("a".into(), "y".into())], ..args() };
        assert!(twice.request().is_err_and(|e| e.code() == 2));
        let good = MoveArgs { host: Some("b".into()), ..args() };
        assert!(good.request().is_ok_and(|r| r.max_downtime_ms == 50 && r.host.as_deref() == Some("b")));
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

    #[test]
    fn disk_words() {
        assert_eq!(disk_target("vda=fast"), Ok(("vda".into(), "fast".into())));
        assert!(disk_target("vda").is_err() && disk_target("=x").is_err() && disk_target("x=").is_err());
        assert!(rate("0").is_err() && rate("1GiB/s").is_ok());
    }
}
