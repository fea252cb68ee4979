//! `vmove checkpoint`, `checkpoints` and `restore`: moments of a VM that are kept, and going on from one.

use std::time::Duration;

use super::CommandError;
use crate::api::checkpoint::{CheckpointInfo, RestoreCheckpoint, TakeCheckpoint};
use crate::client::Client;
use crate::render::progress::MoveBars;
use crate::render::table::{Align, Table};
use crate::render::{self, units};

/// How often it is asked how far a checkpoint is.
const POLL: Duration = Duration::from_millis(100);

/// Arguments of `vmove checkpoint`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct CheckpointArgs {
    /// The VM; it must run
    #[arg(value_name = "VM")]
    pub vm: String,
    /// The checkpoint's name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Stop the VM with it, so that it can go on exactly there
    #[arg(long)]
    pub stop: bool,
    /// Where the checkpoint is to lie [default: the datastore of the VM's first disk]
    #[arg(long, value_name = "DATASTORE")]
    pub datastore: Option<String>,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

impl CheckpointArgs {
    /// Takes the checkpoint and reports.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let request =
            TakeCheckpoint { name: self.name.clone(), stop: self.stop, datastore: self.datastore.clone() };
        let begun = client.take_checkpoint(&self.vm, &request).await?;
        let mut bars = MoveBars::new(&format!("{} -> {}/{}", self.vm, begun.host, begun.datastore), true);
        let ended = client.follow(&begun.id, POLL, |progress| bars.update(progress)).await?;
        bars.finish();
        match (&ended.report, &ended.error) {
            (Some(report), None) => {
                if self.json {
                    render::print_json(report)?;
                } else {
                    render::print(&format!(
                        "{}: checkpoint {} in {}/{}, taken in {}, the guest paused for {}{}\n",
                        self.vm,
                        self.name,
                        begun.host,
                        begun.datastore,
                        units::millis(report.total_ms),
                        units::millis(report.downtime_ms),
                        if self.stop { ", now stopped" } else { "" }
                    ))?;
                }
                Ok(())
            }
            (Some(report), Some(_)) if report.outcome == "cancelled" => Err(CommandError::Cancelled(
                format!("the checkpoint of {} was cancelled; the VM runs on", self.vm),
            )),
            (_, error) => Err(CommandError::failed(format!(
                "no checkpoint of {} was taken: {}",
                self.vm,
                error.as_deref().unwrap_or("no reason given")
            ))),
        }
    }
}

/// Arguments of `vmove checkpoints`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct CheckpointsArgs {
    /// Only those of this VM
    #[arg(value_name = "VM")]
    pub vm: Option<String>,
    /// Remove this checkpoint of the VM
    #[arg(long, value_name = "NAME", requires = "vm")]
    pub remove: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl CheckpointsArgs {
    /// Prints the checkpoints of all hosts, or removes one.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        if let (Some(vm), Some(name)) = (&self.vm, &self.remove) {
            return Ok(client.remove_checkpoint(vm, name).await?);
        }
        let list = client.checkpoints(self.vm.as_deref()).await?;
        if self.json {
            render::print_json(&list)?;
        } else {
            let mut table = Table::new(&[
                ("VM", Align::Left),
                ("NAME", Align::Left),
                ("HOST", Align::Left),
                ("DATASTORE", Align::Left),
                ("TAKEN", Align::Left),
                ("SIZE", Align::Right),
                ("", Align::Left),
            ]);
            for checkpoint in &list.checkpoints {
                table.row([
                    checkpoint.vm.clone(),
                    checkpoint.name.clone(),
                    checkpoint.host.clone(),
                    checkpoint.datastore.clone(),
                    age(checkpoint),
                    units::size(checkpoint.data_bytes),
                    checkpoint.error.clone().unwrap_or_default(),
                ]);
            }
            render::print(&table.render())?;
        }
        for host in &list.unreachable {
            eprintln!("vmove: host {host} did not answer: its checkpoints are not in the list");
        }
        Ok(())
    }
}

/// How long ago it was taken, by this machine's clock.
fn age(checkpoint: &CheckpointInfo) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs()).saturating_sub(checkpoint.taken_at);
    match (checkpoint.error.is_some(), seconds) {
        (true, _) => String::new(),
        (_, 0..120) => format!("{seconds} s ago"),
        (_, 120..7200) => format!("{} min ago", seconds / 60),
        (_, 7200..172_800) => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Arguments of `vmove restore`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct RestoreArgs {
    /// The VM; it must not run anywhere
    #[arg(value_name = "VM")]
    pub vm: String,
    /// The checkpoint's name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Host it is to run on [default: the one that has the VM, else the one that has the checkpoint]
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl RestoreArgs {
    /// Has the VM go on and says where.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let request = RestoreCheckpoint { host: self.host.clone() };
        let vm = client.restore(&self.vm, &self.name, &request).await?;
        if self.json {
            render::print_json(&vm)?;
        } else {
            render::print(&format!("{} runs on {} from checkpoint {}\n", vm.name, vm.host, self.name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_rounded() {
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_secs());
        let taken = |seconds: u64, error: Option<&str>| CheckpointInfo {
            vm: "web".into(),
            name: "x".into(),
            host: "a".into(),
            datastore: "fast".into(),
            taken_at: now - seconds,
            memory_mib: 1,
            data_bytes: 1,
            pause_us: 1,
            error: error.map(str::to_owned),
        };
        assert_eq!(age(&taken(3700, None)), "61 min ago");
        assert_eq!(age(&taken(200_000, None)), "2 days ago");
        assert_eq!(age(&taken(0, Some("torn"))), "");
        assert_eq!(age(&CheckpointInfo { taken_at: now + 1000, ..taken(0, None) }), "0 s ago");
    }
}
