//! The demo itself: one VM under load, three moves, a full check by the guest.

use std::time::Duration;

use serde::Serialize;

use super::DemoError;
use super::guest::Check;
use super::rig::{DATASTORES, HOSTS, Rig};
use super::watch::Watch;
use crate::api::types::{
    CreateVm, DiskDefinition, DiskFormat, MoveAnswer, MoveReport, MoveRequest, VmDefinition,
};
use crate::client::Client;
use crate::commands::CommandError;
use crate::render::progress::{MoveBars, spinner};
use crate::render::table::{Align, Table};
use crate::render::{self, report, units};

/// Name of the demo's VM.
pub const VM: &str = "pinball";
/// RAM of the VM, MiB.
const MEMORY_MIB: u64 = 512;
/// The guest fills 400 MiB of it, keeps 64 MiB of that changing, and writes over the first 256 MiB of its disk for ever.
const CMDLINE: &str = "vmove.cpus=1 vmove.fill_mib=400 vmove.ram_mib=64 vmove.ram_rate=2000 vmove.disk_mib=256 \
                       vmove.disk_rate=200 vmove.heartbeat_ms=500";
/// Virtual size of its disk, bytes.
const DISK_BYTES: u64 = 2 << 30;
/// How long the guest may take to fill memory and disk.
const READY_LIMIT: Duration = Duration::from_mins(3);
/// How long one move may take.
const MOVE_LIMIT: Duration = Duration::from_mins(5);
/// How long heartbeats may be away.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(30);
/// How long a check of everything may take.
const CHECK_LIMIT: Duration = Duration::from_mins(5);
/// Heartbeats before the first move, and after each.
const HEARTBEATS: usize = 2;
/// How often a move is asked about.
const POLL: Duration = Duration::from_millis(100);

/// A move as both sides saw it.
#[derive(Debug, Clone, Serialize)]
pub struct DemoMove {
    /// What the VM processes report.
    #[serde(flatten)]
    pub report: MoveReport,
    /// Largest gap between two ticks of the guest from the order to two heartbeats after the end, ms, by the guest's clock.
    pub guest_gap_ms: f64,
}

/// All there is to say at the end.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The moves, in order.
    pub moves: Vec<DemoMove>,
    /// The guest's last look at all its memory and disk.
    pub guest: Check,
}

impl Outcome {
    /// Prints the table or the JSON object.
    pub fn print(&self, json: bool) -> Result<(), CommandError> {
        if json {
            return Ok(render::print_json(self)?);
        }
        let mut table = Table::new(&[
            ("MOVE", Align::Left),
            ("TOTAL", Align::Right),
            ("PAUSE", Align::Right),
            ("GUEST GAP", Align::Right),
            ("MEMORY", Align::Right),
            ("DISK", Align::Right),
            ("ROUNDS", Align::Right),
            ("VERIFIED", Align::Left),
        ]);
        for one in &self.moves {
            let move_report = &one.report;
            let disk: u64 =
                move_report.disks.iter().map(|disk| disk.copied_bytes + disk.mirrored_bytes).sum();
            table.row([
                format!("{} -> {}", report::place(&move_report.from), report::place(&move_report.to)),
                units::millis(move_report.total_ms),
                units::millis(move_report.downtime_ms),
                units::millis(one.guest_gap_ms),
                units::size(move_report.memory.sent_bytes),
                units::size(disk),
                move_report.memory.rounds.to_string(),
                if move_report.verified { "yes" } else { "no" }.to_owned(),
            ]);
        }
        let guest = &self.guest;
        render::print(&format!(
            "{}\nThe guest checked {} pages of RAM and {} blocks of disk: {} and {} errors.\n",
            table.render(),
            guest.checked_pages,
            guest.checked_blocks,
            guest.ram_errors,
            guest.disk_errors
        ))?;
        Ok(())
    }

    /// Errors in the guest or an unverified move make the demo a failure.
    pub fn judge(&self) -> Result<(), CommandError> {
        let mut blockers = Vec::new();
        if self.guest.ram_errors + self.guest.disk_errors > 0 {
            blockers.push(format!(
                "the guest found {} errors in RAM and {} on disk",
                self.guest.ram_errors, self.guest.disk_errors
            ));
        }
        for one in self.moves.iter().filter(|one| !one.report.verified) {
            blockers.push(format!("the move to {} was not verified", report::place(&one.report.to)));
        }
        if blockers.is_empty() {
            return Ok(());
        }
        Err(CommandError::Failed { message: "the demo found faults".to_owned(), blockers })
    }
}

/// Starts the hosts and the VM, moves it, lets it check itself.
pub async fn play(rig: &mut Rig) -> Result<Outcome, DemoError> {
    let [left, right] = HOSTS;
    let [fast, bulk] = DATASTORES;
    let steps = Steps::default();
    steps.say(&format!("starting two hosts, {left} and {right}, with the datastores {fast} and {bulk} each"));
    rig.start().await?;
    let agents = HOSTS.iter().map(|host| rig.client(host)).collect::<Result<Vec<_>, _>>()?;
    create(rig, &agents[0], definition()).await?;
    let watch = Watch::new(agents[0].clone(), VM).await?;
    steps.say(&format!("VM {VM} fills its memory and disk on {left}/{fast}"));
    let ready = |log: &super::guest::GuestLog| log.ready && log.heartbeats.len() >= HEARTBEATS;
    watch.until("the guest being ready", READY_LIMIT, ready).await?;
    steps.clear();

    let to = |host: Option<&str>, datastore: Option<&str>| MoveRequest {
        host: host.map(str::to_owned),
        datastore: datastore.map(str::to_owned),
        ..MoveRequest::default()
    };
    // Host and datastore; only the datastore; only the host, where its disk goes to the datastore of the same name.
    let plan = [(0, to(Some(right), Some(bulk))), (1, to(None, Some(fast))), (1, to(Some(left), None))];
    let mut moves = Vec::new();
    for (at, request) in plan {
        moves.push(one_move(&agents[at], &watch, &request).await?);
    }

    steps.say("the guest checks every page of its memory and every block of its disk");
    watch.key(b'c').await;
    let log = watch.until("the guest's check of everything", CHECK_LIMIT, |log| log.check.is_some()).await?;
    steps.clear();
    let guest = log.check.ok_or_else(|| DemoError::Timeout {
        what: "the guest's check".to_owned(),
        seconds: CHECK_LIMIT.as_secs(),
        detail: String::new(),
    })?;
    Ok(Outcome { moves, guest })
}

/// Makes a VM with the fixture guest as its kernel and starts it.
pub async fn create(rig: &Rig, agent: &Client, definition: VmDefinition) -> Result<(), DemoError> {
    let kernel = rig.path().join("guest.elf");
    std::fs::write(&kernel, vmove_guest_image::GUEST_ELF)
        .map_err(DemoError::io("writing the guest's kernel"))?;
    let name = definition.name.clone();
    let request = CreateVm { definition, kernel, initrd: None, images: Default::default(), cloud_init: None };
    agent.create(&request).await.map_err(DemoError::client(format!("creating VM {name}")))?;
    agent.start(&name).await.map_err(DemoError::client(format!("starting VM {name}")))
}

fn definition() -> VmDefinition {
    VmDefinition {
        name: VM.to_owned(),
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        cmdline: CMDLINE.to_owned(),
        cpu_features: Vec::new(),
        disks: vec![DiskDefinition {
            name: "vda".to_owned(),
            format: DiskFormat::Qcow2,
            size_bytes: DISK_BYTES,
            datastore: DATASTORES[0].to_owned(),
            read_only: false,
        }],
        networks: Vec::new(),
        apart: Vec::new(),
    }
}

/// One move, with the guest's view of it.
async fn one_move(agent: &Client, watch: &Watch, request: &MoveRequest) -> Result<DemoMove, DemoError> {
    let before = watch.log().last_seq();
    let report = order(agent, VM, request, POLL).await?;
    let ended = watch.log().last_seq();
    let beats = move |log: &super::guest::GuestLog| log.since(ended).count() >= HEARTBEATS;
    let log = watch.until("the guest's heartbeat after the move", HEARTBEAT_LIMIT, beats).await?;
    Ok(DemoMove { report, guest_gap_ms: log.largest_gap_ms(before) })
}

/// Orders a move, shows it, and waits for its completion; anything else is an error.
pub async fn order(
    agent: &Client,
    vm: &str,
    request: &MoveRequest,
    poll: Duration,
) -> Result<MoveReport, DemoError> {
    let target = [request.host.as_deref(), request.datastore.as_deref()];
    let title = format!("{vm} -> {}", target.into_iter().flatten().collect::<Vec<_>>().join("/"));
    let answer =
        agent.move_vm(vm, request).await.map_err(DemoError::client(format!("ordering the move {title}")))?;
    let MoveAnswer::Accepted(accepted) = answer else {
        return Err(DemoError::Move { title, reason: "the agent answered with a plan".to_owned() });
    };
    let mut bars = MoveBars::new(&title, true);
    let follow = agent.follow(&accepted.move_id, poll, |progress| bars.update(progress));
    let followed = tokio::time::timeout(MOVE_LIMIT, follow).await;
    bars.finish();
    let ended = match followed {
        Ok(ended) => ended.map_err(DemoError::client(format!("following the move {title}")))?,
        Err(_) => {
            let what = format!("the end of the move {title}");
            return Err(DemoError::Timeout { what, seconds: MOVE_LIMIT.as_secs(), detail: String::new() });
        }
    };
    match ended.report {
        Some(report) if report.outcome == "completed" => Ok(report),
        report => {
            let reason = report.and_then(|report| report.reason).or(ended.error);
            Err(DemoError::Move { title, reason: reason.unwrap_or_else(|| "no reason given".to_owned()) })
        }
    }
}

/// Steps without a measure: a spinner on a terminal.
#[derive(Default)]
pub struct Steps {
    current: std::cell::RefCell<Option<indicatif::ProgressBar>>,
}

impl Steps {
    /// Shows the next step in place of the last.
    pub fn say(&self, text: &str) {
        self.clear();
        *self.current.borrow_mut() = Some(spinner(text, true));
    }

    /// Shows nothing.
    pub fn clear(&self) {
        if let Some(bar) = self.current.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.clear();
    }
}
