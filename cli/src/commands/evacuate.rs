//! `vmove evacuate`: plan, show, save, carry out; and the parts of that which maintenance uses too.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::CommandError;
use crate::api::placement::ClusterInventory;
use crate::api::types::{MoveAnswer, MoveRequest, VmState};
use crate::client::Client;
use crate::evacuation::drive::drive;
use crate::evacuation::observed::{Located, arriving_at, cluster, locate, on_host};
use crate::evacuation::plan_file::{Limits, MAX_PARALLEL, MAX_VCPUS_PER_CPU, PlanFile};
use crate::evacuation::report::{EvacuationReport, VmReport};
use crate::placement;
use crate::placement::cluster::Cluster;
use crate::placement::plan::{Blocked, PlacementError, Plan, PlannedMove};
use crate::render::{self, units};

/// How long a host that a plan needs may be away before anything is begun.
const HOST_PATIENCE: Duration = Duration::from_secs(30);
/// How often it is asked for.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// How long a VM that has moved may still be seen at its source.
const AFTERMATH: Duration = Duration::from_secs(10);
/// Times that a plan is made anew because agents refuse parts of it.
const PREFLIGHTS: usize = 8;
/// Plans made for one evacuation: what did not work out may do so elsewhere, and VMs may come while others go.
const ROUNDS: usize = 4;

/// Arguments of `vmove evacuate`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct EvacuateArgs {
    /// The host to empty
    #[arg(value_name = "HOST", required_unless_present = "plan", conflicts_with = "plan")]
    pub host: Option<String>,
    /// Carry out a saved plan, as it stands; again after a crash: it goes on where it was
    #[arg(long, value_name = "FILE", conflicts_with_all = ["to", "parallel", "bandwidth", "link", "vcpus_per_cpu"])]
    pub plan: Option<PathBuf>,
    /// Only these hosts take VMs (separated by commas) [default: all others]
    #[arg(long, value_name = "HOST,...", value_delimiter = ',')]
    pub to: Vec<String>,
    /// Limits of the plan.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Only say what would be done, and what cannot move and why
    #[arg(long)]
    pub dry_run: bool,
    /// Save the plan before anything of it is done
    #[arg(long, value_name = "FILE", conflicts_with = "plan")]
    pub save: Option<PathBuf>,
    /// Print the plan or the report as JSON
    #[arg(long)]
    pub json: bool,
}

/// Limits of a plan.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct LimitArgs {
    /// Most moves at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parallel)]
    pub parallel: usize,
    /// Cap on the data rate of all moves together, as in 1GiB/s [default: none]
    #[arg(long, value_name = "RATE", value_parser = super::destination::rate)]
    pub bandwidth: Option<u64>,
    /// What the link of a host is taken to carry, for the predictions
    #[arg(long, value_name = "RATE", default_value = "1GB/s", value_parser = super::destination::rate)]
    pub link: u64,
    /// vCPUs a host may carry for each of its CPUs
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = vcpus_per_cpu)]
    pub vcpus_per_cpu: u32,
}

fn parallel(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MAX_PARALLEL).contains(number));
    number.ok_or_else(|| format!("a number from 1 to {MAX_PARALLEL}"))
}

fn vcpus_per_cpu(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| (1..=MAX_VCPUS_PER_CPU).contains(number));
    number.ok_or_else(|| format!("a number from 1 to {MAX_VCPUS_PER_CPU}"))
}

impl LimitArgs {
    pub(super) fn limits(&self) -> Limits {
        Limits {
            parallel: self.parallel,
            bandwidth: self.bandwidth,
            link: self.link,
            vcpus_per_cpu: self.vcpus_per_cpu,
        }
    }
}

impl EvacuateArgs {
    /// Plans, and carries the plan out.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        match (&self.plan, &self.host) {
            (Some(file), _) => self.run_saved(client, file).await,
            (None, Some(host)) => self.run_new(client, host).await,
            (None, None) => Err(CommandError::Usage("name a host, or --plan FILE".to_owned())),
        }
    }

    async fn run_new(&self, client: &Client, host: &str) -> Result<(), CommandError> {
        let limits = self.limits.limits();
        if self.dry_run || self.save.is_some() {
            let inventory = answering(client, &[host]).await?;
            let planned = plan_for(client, &inventory, host, &self.to, &limits).await?;
            if let Some(path) = &self.save {
                PlanFile::new(host, &limits, &planned).save(path).map_err(CommandError::failed)?;
            }
            if self.dry_run {
                return show(host, &planned, self.json);
            }
        }
        let report = empty(client, host, &self.to, &limits).await?;
        finish(&report, self.json)
    }

    async fn run_saved(&self, client: &Client, path: &std::path::Path) -> Result<(), CommandError> {
        let file = PlanFile::load(path).map_err(CommandError::failed)?;
        let mut needed = vec![file.host.as_str()];
        needed.extend(file.plan.moves.iter().map(|step| step.to.as_str()));
        let inventory = answering(client, &needed).await?;
        let predicted = check(&file, &inventory)?;
        if self.dry_run {
            return show(&file.host, &predicted, self.json);
        }
        let began = Instant::now();
        let vms = drive(client, &file.plan, &file.limits, say).await;
        let after = afterwards(client, &file.host, &vms).await;
        let stays = staying(&file.host, &after, &vms, &file.plan.blocked);
        let seconds = began.elapsed().as_secs_f64();
        let report = EvacuationReport::new(&file.host, vms, stays, file.plan.seconds, seconds);
        finish(&report, self.json)
    }
}

/// What is said of what happens, beside the report.
pub(super) fn say(event: String) {
    eprintln!("vmove: {event}");
}

/// What all hosts say, once those that are needed are among them.
pub(super) async fn answering(client: &Client, hosts: &[&str]) -> Result<ClusterInventory, CommandError> {
    let end = Instant::now() + HOST_PATIENCE;
    loop {
        let late = Instant::now() >= end;
        match client.inventory().await {
            Err(error) if error.is_connection() && !late => {}
            Err(error) => return Err(error.into()),
            Ok(inventory) => {
                let away = hosts.iter().find_map(|host| inventory.unreachable.get_key_value(*host));
                match away {
                    None => return Ok(inventory),
                    Some((host, why)) if late => {
                        return Err(CommandError::failed(format!("host {host} does not answer: {why}")));
                    }
                    Some(_) => {}
                }
            }
        }
        tokio::time::sleep(ASK_INTERVAL).await;
    }
}

/// The plan that empties a host as things are now. Every move of it has been put to the agents, which know more than a planner: what they
/// refuse is planned anew.
async fn plan_for(
    client: &Client,
    inventory: &ClusterInventory,
    host: &str,
    to: &[String],
    limits: &Limits,
) -> Result<Plan, CommandError> {
    let (mut cluster, request) = (cluster(inventory, limits), limits.evacuate(host, to));
    let mut plan = placement::plan(&cluster, &request).map_err(|error| refused(&error))?;
    for _ in 0..PREFLIGHTS {
        let mut all_well = true;
        for step in &plan.moves {
            let reasons = preflight(client, step).await?;
            let vm = cluster.vms.iter_mut().find(|vm| vm.name == step.vm);
            if let (Some(vm), false) = (vm, reasons.is_empty()) {
                vm.refused_by.insert(step.to.clone(), reasons);
                all_well = false;
            }
        }
        if all_well {
            break;
        }
        plan = placement::plan(&cluster, &request).map_err(|error| refused(&error))?;
    }
    for (host, why) in &inventory.unreachable {
        for blocked in &mut plan.blocked {
            blocked.reasons.push(format!("host {host} does not answer: {why}"));
        }
    }
    Ok(plan)
}

/// Everything the agents have against a move.
async fn preflight(client: &Client, step: &PlannedMove) -> Result<Vec<String>, CommandError> {
    let request = MoveRequest {
        host: Some(step.to.clone()),
        disks: step.disks.clone(),
        dry_run: true,
        ..MoveRequest::default()
    };
    match client.move_vm(&step.vm, &request).await {
        Ok(MoveAnswer::Plan(plan)) => Ok(plan.blockers),
        Ok(MoveAnswer::Accepted(accepted)) => {
            Err(CommandError::failed(format!("a question was taken for an order: move {}", accepted.move_id)))
        }
        Err(error) if error.is_connection() => Err(error.into()),
        Err(error) => Ok(vec![error.to_string()]),
    }
}

pub(super) fn refused(error: &PlacementError) -> CommandError {
    match error {
        PlacementError::Impossible(wrong) => CommandError::Failed {
            message: "the plan cannot be carried out; nothing was begun".to_owned(),
            blockers: wrong.clone(),
        },
        error => CommandError::failed(error),
    }
}

/// Checks what is left of a saved plan against the cluster as it is now; gives the whole plan with predictions for that.
fn check(file: &PlanFile, inventory: &ClusterInventory) -> Result<Plan, CommandError> {
    let now: Cluster = cluster(inventory, &file.limits);
    let under_way = |step: &PlannedMove| {
        locate(inventory, &step.vm).is_some_and(|found| {
            let moving = found.vm.vm.summary.state == VmState::Moving;
            found.host == step.to || (found.host == step.from && moving)
        }) || arriving_at(inventory, &step.vm).is_some_and(|found| found.host == step.to)
    };
    let (done, left): (Vec<_>, Vec<_>) = file.plan.moves.iter().cloned().partition(under_way);
    let rest = Plan { moves: left, ..file.plan.clone() };
    let mut plan =
        rest.predicted(&now, &file.limits.evacuate(&file.host, &[])).map_err(|error| refused(&error))?;
    if !done.is_empty() {
        say(format!("{} of {} moves of the plan are done or under way", done.len(), file.plan.moves.len()));
    }
    plan.blocked.clone_from(&file.plan.blocked);
    Ok(plan)
}

/// Shows a plan that is not carried out.
fn show(host: &str, plan: &Plan, json: bool) -> Result<(), CommandError> {
    if json {
        render::print_json(plan)?;
    } else {
        render::print(&render::evacuation::plan(&format!("Empty host {host}"), plan))?;
    }
    if plan.blocked.is_empty() {
        return Ok(());
    }
    Err(CommandError::failed(format!("{} of the VMs of host {host} cannot be moved", plan.blocked.len())))
}

/// Empties a host. New plans are made as long as they lead somewhere.
pub(super) async fn empty(
    client: &Client,
    host: &str,
    to: &[String],
    limits: &Limits,
) -> Result<EvacuationReport, CommandError> {
    let began = Instant::now();
    let (mut all, mut predicted, mut blocked): (Vec<VmReport>, f64, Vec<Blocked>) = Default::default();
    for _ in 0..ROUNDS {
        let inventory = answering(client, &[host]).await?;
        let mut plan = plan_for(client, &inventory, host, to, limits).await?;
        let leaving = leaving(&inventory, host);
        plan.blocked.retain(|vm| leaving.iter().all(|step| step.vm != vm.vm));
        plan.moves.splice(0..0, leaving);
        plan.at_once = plan.at_once.max(1);
        blocked.clone_from(&plan.blocked);
        if plan.moves.is_empty() {
            break;
        }
        predicted += plan.seconds;
        say(format!(
            "host {host}: {} to move, {} at once, about {}",
            plan.moves.len(),
            plan.at_once,
            units::millis(plan.seconds * 1000.0)
        ));
        let ended = drive(client, &plan, limits, say).await;
        let some = ended.iter().any(|vm| vm.outcome.has_left());
        for mut vm in ended {
            if let Some(at) = all.iter().position(|known| known.vm == vm.vm) {
                vm.attempts += all.remove(at).attempts;
            }
            all.push(vm);
        }
        if !some {
            break;
        }
    }
    let after = afterwards(client, host, &all).await;
    let stays = staying(host, &after, &all, &blocked);
    Ok(EvacuationReport::new(host, all, stays, predicted, began.elapsed().as_secs_f64()))
}

/// VMs that are on their way from a host to another one already, whoever began that: to be followed.
fn leaving(inventory: &ClusterInventory, host: &str) -> Vec<PlannedMove> {
    let moving = on_host(inventory, host).into_iter().filter(|found| found.vm.vm.summary.move_id.is_some());
    let step = |found: Located<'_>| {
        let there = arriving_at(inventory, &found.vm.vm.summary.name).filter(|there| there.host != host)?;
        let disks = there.vm.vm.summary.disks.iter();
        Some(PlannedMove {
            vm: found.vm.vm.summary.name.clone(),
            from: host.to_owned(),
            to: there.host.to_owned(),
            disks: disks.map(|disk| (disk.name.clone(), disk.datastore.clone())).collect(),
            disk_bytes: 0,
            memory_bytes: 0,
            seconds: 0.0,
            downtime_ms: 0,
        })
    };
    moving.filter_map(step).collect()
}

/// What the hosts say when all is over. What a move leaves behind at its source is given a moment to go.
async fn afterwards(
    client: &Client,
    host: &str,
    ended: &[VmReport],
) -> Result<ClusterInventory, CommandError> {
    let end = Instant::now() + AFTERMATH;
    loop {
        let inventory = answering(client, &[host]).await?;
        let here = on_host(&inventory, host);
        let going = ended.iter().filter(|vm| vm.outcome.has_left());
        let is_here = |vm: &VmReport| here.iter().any(|found| found.vm.vm.summary.name == vm.vm);
        if !going.into_iter().any(is_here) || Instant::now() >= end {
            return Ok(inventory);
        }
        tokio::time::sleep(ASK_INTERVAL).await;
    }
}

/// VMs that are still on a host, with the reasons known.
fn staying(
    host: &str,
    after: &Result<ClusterInventory, CommandError>,
    ended: &[VmReport],
    blocked: &[Blocked],
) -> Vec<Blocked> {
    let reported = |vm: &VmReport| Blocked { vm: vm.vm.clone(), reasons: vm.reasons.clone() };
    let Ok(inventory) = after else {
        // What is not known to have left is taken to be there.
        let left = ended.iter().filter(|vm| !vm.outcome.has_left()).map(reported);
        return left.chain(blocked.iter().cloned()).collect();
    };
    let here = on_host(inventory, host).into_iter().map(|found| {
        let name = &found.vm.vm.summary.name;
        let known = ended.iter().rev().find(|vm| vm.vm == *name && !vm.reasons.is_empty()).map(reported);
        let known = known.or_else(|| blocked.iter().find(|vm| vm.vm == *name).cloned());
        known.unwrap_or_else(|| Blocked {
            vm: name.clone(),
            reasons: vec!["it was not part of the plan".to_owned()],
        })
    });
    here.collect()
}

/// Prints the report; what stays makes it a failure.
fn finish(report: &EvacuationReport, json: bool) -> Result<(), CommandError> {
    if json {
        render::print_json(report)?;
    } else {
        render::print(&render::evacuation::report(report))?;
    }
    outcome(report, &format!("host {} is not empty", report.host))
}

/// An error that names what stays, if anything does.
pub(super) fn outcome(report: &EvacuationReport, message: &str) -> Result<(), CommandError> {
    if report.complete {
        return Ok(());
    }
    let reasons = report.stays.iter().map(|vm| format!("{}: {}", vm.vm, vm.reasons.join("; ")));
    Err(CommandError::Failed { message: message.to_owned(), blockers: reasons.collect() })
}

/// Maintenance empties a host with the same words.
pub(super) async fn empty_and_report(
    client: &Client,
    host: &str,
    limits: &LimitArgs,
    json: bool,
) -> Result<(), CommandError> {
    finish(&empty(client, host, &[], &limits.limits()).await?, json)
}
