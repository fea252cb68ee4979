//! `vmove estimate`: what a move would take.

use std::time::Duration;

use super::CommandError;
use super::destination::Destination;
use crate::api::estimate::{Converges, EstimateRequest};
use crate::client::Client;
use crate::render::{self, units};

/// Arguments of `vmove estimate`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct EstimateArgs {
    /// Where to.
    #[command(flatten)]
    pub to: Destination,
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
        let request = EstimateRequest { order: self.to.request()?, watch_ms: self.watch.as_millis() as u64 };
        let estimate = client.estimate(&self.to.vm, &request).await?;
        if self.json {
            render::print_json(&estimate)?;
        } else {
            render::print(&render::report::estimate(&estimate))?;
        }
        if estimate.converges == Converges::No {
            eprintln!("vmove: {} would not move so", self.to.vm);
        }
        Ok(())
    }
}
