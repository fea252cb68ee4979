//! The thing measured: a VM with filled, idle memory that goes there and back between two hosts.

use std::time::Duration;

use super::{blocking, warm};
use crate::api::types::{MoveProgress, MoveReport, MoveRequest, VmDefinition};
use crate::client::Client;
use crate::demo::DemoError;
use crate::demo::rig::{HOSTS, Rig};
use crate::demo::script::{Steps, create, order};
use crate::demo::watch::Watch;

/// Name of the VM.
const VM: &str = "bench";
/// RAM of the VM beside what the guest fills, MiB.
const MORE_MIB: u64 = 512;
/// How long the guest may take to fill its memory.
const READY_LIMIT: Duration = Duration::from_mins(5);
/// How often a move is asked about: often enough to see when a phase begins, seldom enough to cost nothing.
const POLL: Duration = Duration::from_millis(20);

/// The VM and where it is.
pub struct Subject {
    agents: Vec<Client>,
    at: usize,
    memory_mib: u64,
    // Held so that the guest's console is drained.
    _watch: Watch,
}

impl Subject {
    /// Starts the hosts and a VM that has filled `fill_mib` of its memory with incompressible pages and then idles.
    pub async fn start(rig: &mut Rig, fill_mib: u64) -> Result<Self, DemoError> {
        let steps = Steps::default();
        steps.say("starting two hosts");
        rig.start().await?;
        let agents = HOSTS.iter().map(|host| rig.client(host)).collect::<Result<Vec<_>, _>>()?;
        let memory_mib = fill_mib + MORE_MIB;
        let definition = VmDefinition {
            name: VM.to_owned(),
            vcpus: 1,
            memory_mib,
            cmdline: format!("vmove.cpus=1 vmove.fill_mib={fill_mib} vmove.heartbeat_ms=2000"),
            cpu_features: Vec::new(),
            disks: Vec::new(),
        };
        create(rig, &agents[0], definition).await?;
        let watch = Watch::new(agents.clone(), VM);
        steps.say(&format!("the guest fills {fill_mib} MiB of its memory"));
        watch.until("the guest being ready", READY_LIMIT, |log| log.ready).await?;
        Ok(Self { agents, at: 0, memory_mib, _watch: watch })
    }

    /// Moves the VM to the other host; bytes per second of its memory from the beginning of pre-copy to the switchover.
    pub async fn stream(&mut self, plain: bool) -> Result<f64, DemoError> {
        let bytes = self.memory_mib << 20;
        blocking(move || warm::host_memory(bytes)).await?;
        let to = 1 - self.at;
        let request =
            MoveRequest { host: Some(HOSTS[to].to_owned()), insecure_plain: plain, ..MoveRequest::default() };
        let mut clock = PhaseClock::default();
        let report = order(&self.agents[self.at], VM, &request, POLL, |progress| clock.see(progress)).await?;
        self.at = to;
        Ok(report.memory.sent_bytes as f64 / (clock.stream_ms(&report) / 1000.0).max(1e-9))
    }
}

/// When the phases of a move began, from looking at it again and again.
#[derive(Debug, Default, Clone, Copy)]
struct PhaseClock {
    last_ms: Option<u64>,
    begin_ms: Option<f64>,
    end_ms: Option<f64>,
}

impl PhaseClock {
    /// Takes an observation in. A phase began between the last look and this one: the middle is taken.
    fn see(&mut self, progress: &MoveProgress) {
        let now = progress.elapsed_ms;
        let between = f64::midpoint(self.last_ms.unwrap_or(now) as f64, now as f64);
        match progress.phase.as_str() {
            "pre-copy" => self.begin_ms = self.begin_ms.or(Some(between)),
            "switchover" => self.end_ms = self.end_ms.or(Some(between)),
            _ => {}
        }
        self.last_ms = Some(now);
    }

    /// Length of the pre-copy, ms. A switchover too short to be seen ended its pause before the end of the move; a pre-copy that was
    /// never seen is taken to begin with the move.
    fn stream_ms(&self, report: &MoveReport) -> f64 {
        let end = self.end_ms.unwrap_or(report.total_ms - report.downtime_ms);
        end - self.begin_ms.unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(phase: &str, elapsed_ms: u64) -> MoveProgress {
        MoveProgress {
            move_id: "m".into(),
            phase: phase.into(),
            elapsed_ms,
            disk_total_bytes: 0,
            disk_done_bytes: 0,
            ram_total_bytes: 0,
            ram_done_bytes: 0,
            round: 1,
            rate: 0,
            dirty_rate: 0,
            left_ms: None,
            report: None,
            error: None,
        }
    }

    #[test]
    fn the_stream_lasts_from_precopy_to_switchover() {
        let mut clock = PhaseClock::default();
        for (phase, ms) in
            [("setup", 10), ("pre-copy", 30), ("pre-copy", 500), ("switchover", 1020), ("completed", 1040)]
        {
            clock.see(&at(phase, ms));
        }
        assert_eq!((clock.begin_ms, clock.end_ms), (Some(20.0), Some(760.0)));
    }
}
