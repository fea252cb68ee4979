//! `vmove host ls` and `vmove datastore ls`.

use super::CommandError;
use crate::client::Client;
use crate::render::table::{Align, Table};
use crate::render::{self, units};

/// What to do with hosts.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum HostCommand {
    /// List the hosts of the cluster
    Ls(JsonArgs),
}

/// What to do with datastores.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum DatastoreCommand {
    /// List the datastores of all hosts
    Ls(JsonArgs),
}

/// Arguments of a list.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl HostCommand {
    /// Prints the hosts, those that did not answer with the reason.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let Self::Ls(args) = self;
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
            ("VERSION", Align::Left),
            ("STATE", Align::Left),
        ]);
        for host in &hosts {
            let state = match (host.this, host.reachable) {
                (true, _) => "this host".to_owned(),
                (false, true) => "reachable".to_owned(),
                (false, false) => format!("unreachable: {}", host.error.as_deref().unwrap_or("no answer")),
            };
            let info = |get: &dyn Fn(&crate::api::types::HostInfo) -> String| {
                host.info.as_ref().map(get).unwrap_or_default()
            };
            table.row([
                host.name.clone(),
                host.address.clone(),
                info(&|i| i.cpus.to_string()),
                info(&|i| units::size(i.memory_bytes)),
                info(&|i| units::size(i.memory_free_bytes)),
                info(&|i| i.version.clone()),
                state,
            ]);
        }
        render::print(&table.render())?;
        Ok(())
    }
}

impl DatastoreCommand {
    /// Prints the datastores of the hosts that answer; two lines with one id are one datastore, shared.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let Self::Ls(args) = self;
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
