//! `vmove start|rm|ls|show`: the life of VMs other than moving and stopping.

use std::fmt::Write as _;

use super::CommandError;
use crate::api::types::{VmState, VmSummary};
use crate::client::Client;
use crate::render::table::{Align, Table};
use crate::render::{self, units};

/// A command on one VM.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct VmArgs {
    /// The VM
    #[arg(value_name = "VM")]
    pub vm: String,
}

impl VmArgs {
    /// `vmove start`.
    pub async fn start(&self, client: &Client) -> Result<(), CommandError> {
        Ok(client.start(&self.vm).await?)
    }

    /// `vmove rm`.
    pub async fn remove(&self, client: &Client) -> Result<(), CommandError> {
        Ok(client.remove(&self.vm).await?)
    }
}

/// Arguments of `vmove ls`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct ListArgs {
    /// Only VMs of the agent's own host
    #[arg(long)]
    pub local: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl ListArgs {
    /// Prints the VMs; hosts that did not answer are named on standard error.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let list = client.vms(!self.local).await?;
        if self.json {
            render::print_json(&list)?;
        } else {
            let mut table = Table::new(&[
                ("NAME", Align::Left),
                ("STATE", Align::Left),
                ("HOST", Align::Left),
                ("VCPUS", Align::Right),
                ("MEMORY", Align::Right),
                ("DISKS", Align::Left),
            ]);
            for vm in &list.vms {
                table.row([
                    vm.name.clone(),
                    state(vm.state).to_owned(),
                    vm.host.clone(),
                    vm.vcpus.to_string(),
                    units::size(vm.memory_mib << 20),
                    disks(vm),
                ]);
            }
            render::print(&table.render())?;
        }
        for host in &list.unreachable {
            eprintln!("vmove: host {host} did not answer: its VMs are not in the list");
        }
        Ok(())
    }
}

/// Arguments of `vmove show`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct ShowArgs {
    /// The VM
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print the definition in TOML, as 'vmove create -f' reads it
    #[arg(long, conflicts_with = "json")]
    pub toml: bool,
}

impl ShowArgs {
    /// Prints everything about one VM.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let vm = client.vm(&self.vm).await?;
        if self.toml {
            render::print(&crate::definition::render(&vm.definition))?;
            return Ok(());
        }
        if self.json {
            render::print_json(&vm)?;
            return Ok(());
        }
        let summary = &vm.summary;
        let mut text = format!("{} is {} on {}\n", summary.name, state(summary.state), summary.host);
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "  vcpus      {}", summary.vcpus);
        let _ = writeln!(text, "  memory     {}", units::size(summary.memory_mib << 20));
        let _ = writeln!(text, "  cmdline    {}", vm.definition.cmdline);
        let _ = writeln!(text, "  generation {}", summary.generation);
        if let Some(pid) = vm.pid {
            let _ = writeln!(text, "  process    {pid}");
        }
        for disk in &vm.definition.disks {
            let path = summary.disks.iter().find(|placed| placed.name == disk.name);
            let path = path.map(|placed| placed.path.display().to_string()).unwrap_or_default();
            let _ = writeln!(
                text,
                "  disk {}: {} in {} {path}",
                disk.name,
                units::size(disk.size_bytes),
                disk.datastore
            );
        }
        for network in &vm.definition.networks {
            let mac = network.mac.map_or_else(String::new, |mac| mac.to_string());
            let on = network.attachment().map_or_else(String::new, |attachment| attachment.to_string());
            let _ = writeln!(text, "  network {}: {mac} on {on}", network.name);
        }
        if let Some(id) = &summary.move_id {
            let _ = writeln!(text, "  move       {id}");
        }
        if let Some(error) = &summary.error {
            let _ = writeln!(text, "  error      {error}");
        }
        render::print(&text)?;
        Ok(())
    }
}

fn state(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Stopped => "stopped",
        VmState::Incoming => "incoming",
        VmState::Undecided => "undecided",
        VmState::Moving => "moving",
        VmState::Failed => "failed",
        VmState::Lost => "lost",
    }
}

fn disks(vm: &VmSummary) -> String {
    vm.disks.iter().map(|disk| format!("{}@{}", disk.name, disk.datastore)).collect::<Vec<_>>().join(" ")
}
