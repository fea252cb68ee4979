//! `vmove estimate`: what a move would take.

use std::time::Duration;

use super::CommandError;
use super::move_vm::{disk_target, rate, targets};
use crate::api::estimate::{Converges, EstimateRequest};
use crate::client::Client;
use crate::render::{self, units};

/// Arguments of `vmove estimate`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct EstimateArgs {
    /// The VM, which must run
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Host it would run on
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// Datastore its disks would lie in
    #[arg(long, value_name = "DATASTORE")]
    pub datastore: Option<String>,
    /// Datastore of one disk (repeat for more)
    #[arg(long, value_name = "NAME=DATASTORE", value_parser = disk_target)]
    pub disk: Vec<(String, String)>,
    /// Longest pause to aim at
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = units::parse_duration)]
    pub max_downtime: Duration,
    /// Cap on the data rate, as in 1GiB/s [default: none]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// How long to watch the VM
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = units::parse_duration)]
    pub watch: Duration,
    /// Print the estimate as JSON
    #[arg(long)]
    pub json: bool,
}

impl EstimateArgs {
    /// Estimates and prints. A move that would not converge is an answer, not a failure.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        if self.host.is_none() && self.datastore.is_none() && self.disk.is_empty() {
            return Err(CommandError::Usage(format!(
                "where to? Name --host, --datastore or --disk to estimate a move of the VM '{}'",
                self.vm
            )));
        }
        let request = EstimateRequest {
            host: self.host.clone(),
            datastore: self.datastore.clone(),
            disks: targets(&self.disk)?,
            max_downtime_ms: self.max_downtime.as_millis() as u64,
            bandwidth: self.bandwidth,
            watch_ms: self.watch.as_millis() as u64,
        };
        let estimate = client.estimate(&self.vm, &request).await?;
        if self.json {
            render::print_json(&estimate)?;
        } else {
            render::print(&render::report::estimate(&estimate))?;
        }
        if estimate.converges == Converges::No {
            eprintln!("vmove: {} would not move so", self.vm);
        }
        Ok(())
    }
}
