//! The thing measured: a VM with filled, idle memory that goes there and back between two hosts.

use std::time::Duration;

use super::{blocking, warm};
use crate::api::types::{MoveRequest, VmDefinition};
use crate::client::Client;
use crate::demo::DemoError;
use crate::demo::rig::{HOSTS, Rig};
use crate::demo::script::{Steps, create, order};
use crate::demo::watch::Watch;

/// Name of the VM.
const VM: &str = "load";
/// RAM of the VM beside what the guest fills, MiB.
const MORE_MIB: u64 = 512;
/// How long the guest may take to fill its memory.
const READY_LIMIT: Duration = Duration::from_mins(5);
/// How often a move is asked about: seldom enough to cost nothing.
const POLL: Duration = Duration::from_millis(200);

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
            networks: Vec::new(),
            apart: Vec::new(),
        };
        create(rig, &agents[0], definition).await?;
        let watch = Watch::new(agents[0].clone(), VM).await?;
        steps.say(&format!("the guest fills {fill_mib} MiB of its memory"));
        watch.until("the guest being ready", READY_LIMIT, |log| log.ready).await?;
        Ok(Self { agents, at: 0, memory_mib, _watch: watch })
    }

    /// Moves the VM to the other host; bytes per second of its first round.
    pub async fn stream(&mut self, plain: bool) -> Result<f64, DemoError> {
        let bytes = self.memory_mib << 20;
        blocking(move || warm::host_memory(bytes)).await?;
        let to = 1 - self.at;
        let request =
            MoveRequest { host: Some(HOSTS[to].to_owned()), insecure_plain: plain, ..MoveRequest::default() };
        let report = order(&self.agents[self.at], VM, &request, POLL).await?;
        self.at = to;
        Ok(report.memory.stream_bytes_per_s as f64)
    }
}
