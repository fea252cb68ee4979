//! `vmove stop`: the power button, or the end without asking.
//!
//! Lives here: how long a guest is waited for, and what is said of one that does not react.

use std::time::Duration;

use tokio::time::Instant;

use super::CommandError;
use crate::api::types::VmState;
use crate::client::{Client, ClientError};
use crate::render::units;

/// How often is looked whether the guest has switched itself off.
const INTERVAL: Duration = Duration::from_millis(50);

/// Arguments of `vmove stop`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct StopArgs {
    /// The VM
    #[arg(value_name = "VM")]
    pub vm: String,
    /// How long to wait for the guest to switch itself off
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_duration, conflicts_with = "now")]
    pub timeout: Duration,
    /// Do not ask the guest: flush its disks and end it
    #[arg(long)]
    pub now: bool,
}

impl StopArgs {
    /// Stops the VM. One that moves to another host meanwhile is asked and waited for there.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        if self.now {
            return Ok(client.stop(&self.vm).await?);
        }
        let end = Instant::now() + self.timeout;
        self.press(client, end).await?;
        loop {
            match client.vm(&self.vm).await {
                Ok(vm) if vm.summary.state == VmState::Stopped => return Ok(()),
                Ok(vm) if vm.summary.state == VmState::Failed => {
                    let why = vm.summary.error.as_deref().unwrap_or("for no known reason");
                    return Err(CommandError::failed(format!("VM {:?} has failed: {why}", self.vm)));
                }
                Ok(_) if Instant::now() >= end => return Err(self.ignored()),
                Ok(_) => {}
                Err(error) if passing(&error) && Instant::now() < end => {}
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Presses the button. A guest that stands still for a moment is asked again, wherever it goes on.
    async fn press(&self, client: &Client, end: Instant) -> Result<(), CommandError> {
        let mut stood_still = false;
        loop {
            let error = match client.press_power_button(&self.vm).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            stood_still |= error.code() == Some("busy");
            if !stood_still || !passing(&error) || Instant::now() >= end {
                return Err(error.into());
            }
            if client.vm(&self.vm).await.is_ok_and(|vm| vm.summary.state == VmState::Stopped) {
                return Ok(());
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    fn ignored(&self) -> CommandError {
        let vm = &self.vm;
        CommandError::failed(format!(
            "VM {vm:?} runs on: its power button was pressed, and its guest has not switched itself off within {}. \
             'vmove stop {vm} --now' ends it without asking",
            units::millis(self.timeout.as_secs_f64() * 1000.0),
        ))
    }
}

/// Whether a refusal may be one of a VM that changes hosts: for a moment neither has it, or can say so.
fn passing(error: &ClientError) -> bool {
    matches!(error.code(), Some("busy" | "conflict" | "not_found" | "undecided" | "peer_unreachable"))
}
