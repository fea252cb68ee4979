//! `vmove init` and `vmove token`: a new cluster, and the way into it.
//!
//! Lives here: options, what is printed. Never enters: certificates, tokens' rules.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::CommandError;
use super::agent::DEFAULT_STATE;
use crate::agent::config::{Config, DatastoreConfig};
use crate::agent::{cluster, make_private_dir};
use crate::identity::token::{DEFAULT_LIFETIME, Token};

/// Options of a host's configuration, for `init` and `join`.
#[derive(Debug, Args)]
pub struct HostArgs {
    /// Directory of this host's state
    #[arg(long, value_name = "DIR", env = "VMOVE_STATE", default_value = DEFAULT_STATE)]
    pub state: PathBuf,
    /// Name of this host, unique in the cluster
    #[arg(long)]
    pub name: String,
    /// Address that other agents reach this one at
    #[arg(long, value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Directories for disks; the first is the default one [default: one named "default" in the state directory]
    #[arg(long = "datastore", value_name = "NAME=PATH")]
    pub datastores: Vec<DatastoreConfig>,
}

impl HostArgs {
    /// The configuration, with the directories of its datastores made where only the last step of the path is missing.
    pub fn config(&self) -> Result<Config, CommandError> {
        make_private_dir(&self.state).map_err(CommandError::failed)?;
        let absolute = |path: &Path| std::path::absolute(path).map_err(CommandError::failed);
        let mut datastores = self.datastores.clone();
        if datastores.is_empty() {
            let path = self.state.join("datastore");
            datastores.push(DatastoreConfig { name: "default".to_owned(), path });
        }
        for store in &mut datastores {
            store.path = absolute(&store.path)?;
            match std::fs::create_dir(&store.path) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(CommandError::failed(format!(
                        "cannot create datastore {:?} at {}: {error}",
                        store.name,
                        store.path.display()
                    )));
                }
                _ => {}
            }
        }
        let config = Config {
            name: self.name.clone(),
            listen: self.listen,
            default_datastore: None,
            cpu_mask: Vec::new(),
            datastores,
            hosts: Vec::new(),
        };
        config.check().map_err(CommandError::failed)?;
        Ok(config)
    }
}

/// Options of `vmove init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// The host.
    #[command(flatten)]
    pub host: HostArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl InitArgs {
    /// Makes a cluster of this host alone and says how the next one joins.
    pub fn run(self) -> Result<(), CommandError> {
        let config = self.host.config()?;
        let token =
            cluster::init(&self.host.state, &config, DEFAULT_LIFETIME).map_err(CommandError::failed)?;
        if !self.json {
            println!("Host {} is the first of a new cluster. Start its agent:", config.name);
            println!("  vmove agent --state {}", self.host.state.display());
            println!("Then, on the next host:");
        }
        print_token(&token, &config, DEFAULT_LIFETIME, self.json);
        Ok(())
    }
}

/// Options of `vmove token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Directory of this host's state
    #[arg(long, value_name = "DIR", env = "VMOVE_STATE", default_value = DEFAULT_STATE)]
    pub state: PathBuf,
    /// How long the token works, in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=10080))]
    pub minutes: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl TokenArgs {
    /// Makes another token; only on the first host.
    pub fn run(self) -> Result<(), CommandError> {
        let config = Config::load(&self.state).map_err(CommandError::failed)?;
        let lifetime = Duration::from_secs(self.minutes * 60);
        let token = cluster::issue_token(&self.state, lifetime).map_err(CommandError::failed)?;
        print_token(&token, &config, lifetime, self.json);
        Ok(())
    }
}

fn print_token(token: &Token, config: &Config, lifetime: Duration, as_json: bool) {
    let address = config.listen.to_string();
    if as_json {
        let seconds = lifetime.as_secs();
        println!("{}", json!({"token": token.to_string(), "address": address, "expires_in_s": seconds}));
        return;
    }
    println!("  vmove join {address} --token {token} --name NAME --listen IP:PORT");
    println!("The token works once, within {} minutes.", lifetime.as_secs() / 60);
}
