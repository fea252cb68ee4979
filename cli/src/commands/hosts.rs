//! `vmove host ls|rm|maintenance` and `vmove datastore ls|add|rm`.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::CommandError;
use super::confirm::confirm;
use super::maintenance::MaintenanceCommand;
use crate::api::datastores::AddDatastore;
use crate::api::removal::HostRemoval;
use crate::api::types::HostInfo;
use crate::client::Client;
use crate::render::table::{Align, Table};
use crate::render::{self, units};

/// What to do with hosts.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum HostCommand {
    /// List the hosts of the cluster
    Ls(JsonArgs),
    /// Take a host that is gone for ever out of the cluster (says what that gives up, and asks)
    Rm(RemoveArgs),
    /// Keep VMs away from a host, or let them come again
    #[command(subcommand)]
    Maintenance(MaintenanceCommand),
}

/// What to do with datastores.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum DatastoreCommand {
    /// List the datastores of all hosts
    Ls(JsonArgs),
    /// Make a directory of the agent's host one of its datastores
    Add(AddArgs),
    /// Forget a datastore of the agent's host that no VM uses; what lies in its directory stays
    Rm(RmArgs),
}

/// Arguments of `vmove datastore add`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct AddArgs {
    /// Its name: letters, digits, '.', '_', '-'. A VM that changes host looks for the datastore of the same name there
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The directory, on the agent's host; it must be there (mounted, if it is a disk of its own)
    #[arg(value_name = "DIR")]
    pub path: PathBuf,
    /// Disks that name no datastore go there from now on
    #[arg(long)]
    pub default: bool,
}

/// Arguments of `vmove datastore rm`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct RmArgs {
    /// The datastore
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Arguments of a list.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `vmove host rm`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct RemoveArgs {
    /// The host
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl RemoveArgs {
    async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let removal = client.removal_of(&self.name).await?;
        if removal.blockers.is_empty() {
            eprint!("{}", warning(&removal));
            confirm(&self.name, &format!("host {} is taken out of the cluster", self.name), self.yes)?;
        }
        // With something in the way the agent says so.
        let removal = client.remove_host(&self.name).await?;
        if self.json {
            render::print_json(&removal)?;
        } else {
            render::print(&format!("host {} is out of the cluster\n", self.name))?;
        }
        Ok(())
    }
}

/// What is given up with a host.
fn warning(removal: &HostRemoval) -> String {
    let host = &removal.host;
    let mut text = format!(
        "Host {host} is given up for ever: no host asks it or answers it any more, and no other host can take its name. If it \
         still runs VMs, it goes on running them.\n"
    );
    // Writing to a String cannot fail, here and below.
    if removal.given_up.is_empty() {
        text += "No VM is known to be on it.\n";
    } else {
        let _ = writeln!(text, "Given up with it: {}", removal.given_up.join(", "));
    }
    for tied in &removal.waiting {
        let _ = writeln!(text, "VM {} on host {}: {}", tied.vm, tied.host, tied.what);
    }
    if !removal.unreachable.is_empty() {
        let _ = writeln!(
            text,
            "Not asked, because they do not answer: {}. They hear of it when they are back; if one of them still reaches host \
             {host}, this is a mistake.",
            removal.unreachable.join(", ")
        );
    }
    if removal.authority_lost {
        text += "No host that answers holds the cluster's authority: without it no new host can join.\n";
    }
    text
}

impl HostCommand {
    /// Prints the hosts, those that did not answer with the reason; or takes one out; or switches maintenance.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let args = match self {
            Self::Ls(args) => args,
            Self::Rm(args) => return args.run(client).await,
            Self::Maintenance(command) => return command.run(client).await,
        };
        let hosts = client.hosts().await?;
        if args.json {
            render::print_json(&hosts)?;
            return Ok(());
        }
        let mut table = Table::new(&[
            ("NAME", Align::Left),
            ("ADDRESS", Align::Left),
            ("CPUS", Align::Right),
            ("MEMORY", Align::Right),
            ("FREE", Align::Right),
            ("DISK", Align::Right),
            ("FREE", Align::Right),
            ("VERSION", Align::Left),
            ("STATE", Align::Left),
        ]);
        for host in &hosts {
            let state = match (host.this, host.reachable) {
                (true, _) => "this host".to_owned(),
                (false, true) => "reachable".to_owned(),
                (false, false) => format!("unreachable: {}", host.error.as_deref().unwrap_or("no answer")),
            };
            let maintained = host.info.as_ref().is_some_and(|info| info.maintenance);
            let state = if maintained { state + ", in maintenance" } else { state };
            let info = |get: &dyn Fn(&HostInfo) -> String| host.info.as_ref().map(get).unwrap_or_default();
            table.row([
                host.name.clone(),
                host.address.clone(),
                info(&|i| i.cpus.to_string()),
                info(&|i| units::size(i.memory_bytes)),
                info(&|i| units::size(i.memory_free_bytes)),
                info(&|i| units::size(i.datastores.iter().map(|store| store.total_bytes).sum())),
                info(&|i| units::size(i.datastores.iter().map(|store| store.free_bytes).sum())),
                info(&|i| i.version.clone()),
                state,
            ]);
        }
        render::print(&table.render())?;
        Ok(())
    }
}

impl DatastoreCommand {
    /// Runs the command.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        match self {
            Self::Ls(args) => Self::list(client, args).await,
            Self::Add(args) => {
                let path = std::path::absolute(&args.path)?;
                let add = AddDatastore { name: args.name.clone(), path, default: args.default };
                let added = client.add_datastore(&add).await?;
                let free = units::size(added.free_bytes);
                Ok(render::print(&format!("datastore {} added, {free} free\n", added.name))?)
            }
            Self::Rm(args) => Ok(client.remove_datastore(&args.name).await?),
        }
    }

    /// Prints the datastores of the hosts that answer; two lines with one id are one datastore, shared.
    async fn list(client: &Client, args: &JsonArgs) -> Result<(), CommandError> {
        let hosts = client.hosts().await?;
        if args.json {
            let all: Vec<_> = hosts
                .iter()
                .filter_map(|host| host.info.as_ref())
                .map(|info| serde_json::json!({ "host": info.name, "datastores": info.datastores }))
                .collect();
            render::print_json(&all)?;
            return Ok(());
        }
        let mut table = Table::new(&[
            ("HOST", Align::Left),
            ("DATASTORE", Align::Left),
            ("SIZE", Align::Right),
            ("FREE", Align::Right),
            ("DEFAULT", Align::Left),
            ("ID", Align::Left),
            ("PATH", Align::Left),
        ]);
        for info in hosts.iter().filter_map(|host| host.info.as_ref()) {
            for store in &info.datastores {
                table.row([
                    info.name.clone(),
                    store.name.clone(),
                    units::size(store.total_bytes),
                    units::size(store.free_bytes),
                    if store.default { "yes" } else { "" }.to_owned(),
                    store.id.clone(),
                    store.path.display().to_string(),
                ]);
            }
        }
        render::print(&table.render())?;
        for host in hosts.iter().filter(|host| host.info.is_none()) {
            eprintln!("vmove: host {} did not answer: its datastores are not in the list", host.name);
        }
        Ok(())
    }
}
