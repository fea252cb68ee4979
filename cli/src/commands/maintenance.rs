//! `vmove host maintenance on|off`: keep VMs away from a host, empty it, bring them back.

use std::time::Instant;

use super::CommandError;
use super::evacuate::{self, LimitArgs, answering, empty_and_report};
use crate::api::placement::{ClusterInventory, HadVm, MaintenanceRequest};
use crate::client::Client;
use crate::evacuation::drive::{drive, of_one};
use crate::evacuation::observed::{cluster, locate};
use crate::evacuation::plan_file::Limits;
use crate::evacuation::report::EvacuationReport;
use crate::placement::cluster::Goal;
use crate::placement::plan::{Blocked, PlacementError, Plan, PlannedMove};
use crate::render;

/// On or off.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum MaintenanceCommand {
    /// Keep new VMs away from a host, and move those it has to other hosts
    On(OnArgs),
    /// Let VMs come to a host again
    Off(OffArgs),
}

/// Arguments of `on`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct OnArgs {
    /// The host
    #[arg(value_name = "HOST")]
    pub host: String,
    /// Leave its VMs there
    #[arg(long)]
    pub no_evacuate: bool,
    /// Limits of the evacuation.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `off`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct OffArgs {
    /// The host
    #[arg(value_name = "HOST")]
    pub host: String,
    /// Bring back the VMs it had when maintenance was switched on, wherever they are now; again after a failure: the rest
    #[arg(long = "return")]
    pub bring_back: bool,
    /// Limits of the return.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

impl MaintenanceCommand {
    /// Switches it.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        match self {
            Self::On(args) => {
                client.set_maintenance(&args.host, MaintenanceRequest { on: true, forget: false }).await?;
                if args.no_evacuate {
                    return Ok(());
                }
                empty_and_report(client, &args.host, &args.limits, args.json).await
            }
            Self::Off(args) => {
                let now = client
                    .set_maintenance(&args.host, MaintenanceRequest { on: false, forget: false })
                    .await?;
                if !args.bring_back {
                    return Ok(());
                }
                let report = bring_back(client, &args.host, &now.had, &args.limits.limits()).await?;
                if report.complete {
                    // Nothing is left to bring back.
                    client
                        .set_maintenance(&args.host, MaintenanceRequest { on: false, forget: true })
                        .await?;
                }
                if args.json {
                    render::print_json(&report)?;
                } else {
                    render::print(&render::evacuation::report(&report))?;
                }
                evacuate::outcome(&report, &format!("not every VM is back on host {}", args.host))
            }
        }
    }
}

/// Brings VMs back to the host and the datastores they were on.
async fn bring_back(
    client: &Client,
    host: &str,
    had: &[HadVm],
    limits: &Limits,
) -> Result<EvacuationReport, CommandError> {
    let began = Instant::now();
    let inventory = answering(client, &[host]).await?;
    let plan = plan_of_return(&inventory, host, had, limits)?;
    let vms = drive(client, &plan, limits, evacuate::say).await;
    let failed = vms.iter().filter(|vm| !vm.outcome.has_left());
    let failed = failed.map(|vm| Blocked { vm: vm.vm.clone(), reasons: vm.reasons.clone() });
    let stays = failed.chain(plan.blocked.iter().cloned()).collect();
    Ok(EvacuationReport::new(host, vms, stays, plan.seconds, began.elapsed().as_secs_f64()))
}

/// The plan of that: each VM that fits beside those before it. One that was removed meanwhile needs no return.
fn plan_of_return(
    inventory: &ClusterInventory,
    host: &str,
    had: &[HadVm],
    limits: &Limits,
) -> Result<Plan, CommandError> {
    let cluster = cluster(inventory, limits);
    let request = limits.request(Goal::Balance { max_moves: had.len() });
    let here = inventory.hosts.iter().find(|there| there.host.name == host);
    let stores: Vec<&str> =
        here.iter().flat_map(|there| &there.host.datastores).map(|store| store.name.as_str()).collect();
    let mut plan = Plan { at_once: 1, ..Plan::default() };
    for vm in had {
        let Some(found) = locate(inventory, &vm.name) else {
            if !inventory.unreachable.is_empty() {
                let away: Vec<&str> = inventory.unreachable.keys().map(String::as_str).collect();
                let why = format!("no host that answers has it; these do not answer: {}", away.join(", "));
                plan.blocked.push(Blocked { vm: vm.name.clone(), reasons: vec![why] });
            }
            continue;
        };
        if found.host == host {
            continue;
        }
        // A datastore that is gone since is replaced by the default one.
        let disks = found.vm.vm.summary.disks.iter().filter_map(|disk| {
            let old = vm.disks.get(&disk.name).map(String::as_str).filter(|old| stores.contains(old));
            Some((disk.name.clone(), old.or(stores.first().copied())?.to_owned()))
        });
        plan.moves.push(PlannedMove {
            vm: vm.name.clone(),
            from: found.host.to_owned(),
            to: host.to_owned(),
            disks: disks.collect(),
            disk_bytes: 0,
            memory_bytes: 0,
            seconds: 0.0,
            downtime_ms: 0,
        });
        // One that is on its way is followed, wherever that leads.
        if found.vm.vm.summary.move_id.is_some() {
            continue;
        }
        let fixed: Vec<_> =
            plan.moves.iter().filter(|step| !moves_already(inventory, &step.vm)).cloned().collect();
        let so_far = Plan { moves: fixed, ..plan.clone() };
        match so_far.check(&cluster, &request) {
            Ok(()) => {}
            Err(PlacementError::Impossible(reasons)) => {
                plan.moves.pop();
                plan.blocked.push(Blocked { vm: vm.name.clone(), reasons: of_one(&vm.name, &reasons) });
            }
            Err(error) => return Err(evacuate::refused(&error)),
        }
    }
    let (under_way, new): (Vec<_>, Vec<_>) =
        plan.moves.into_iter().partition(|step| moves_already(inventory, &step.vm));
    let mut planned = Plan { moves: new, at_once: 1, seconds: 0.0, blocked: plan.blocked }
        .predicted(&cluster, &request)
        .map_err(|error| evacuate::refused(&error))?;
    planned.moves.splice(0..0, under_way);
    Ok(planned)
}

fn moves_already(inventory: &ClusterInventory, vm: &str) -> bool {
    locate(inventory, vm).is_some_and(|found| found.vm.vm.summary.move_id.is_some())
}
