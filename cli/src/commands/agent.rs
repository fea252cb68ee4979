//! `vmove agent`: the per-host daemon, in the foreground, until SIGTERM or SIGINT.
//!
//! Lives here: its options and its beginning and end. Never enters: what it does.

use std::net::SocketAddr;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::CommandError;
use super::host_args::StateArgs;
use crate::agent::config::{Config, ConfigError, DatastoreConfig};
use crate::agent::{Agent, http, process};

/// Options of `vmove agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Where the host's state is.
    #[command(flatten)]
    pub state: StateArgs,
    /// Name of this host [default: as in agent.toml]
    #[arg(long)]
    pub name: Option<String>,
    /// Address that other agents reach this one at [default: as in agent.toml]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// Datastores, in place of those in agent.toml; the first is the default one
    #[arg(long = "datastore", value_name = "NAME=PATH")]
    pub datastores: Vec<DatastoreConfig>,
    /// Print the OpenAPI document of the API and end
    #[arg(long)]
    pub openapi: bool,
}

impl AgentArgs {
    /// Runs the agent. VM processes go on when it ends.
    pub async fn run(self) -> Result<(), CommandError> {
        if self.openapi {
            print!("{}", http::openapi().map_err(CommandError::failed)?);
            return Ok(());
        }
        let config = self.config()?;
        let program = process::own_program().map_err(CommandError::failed)?;
        let agent = Agent::open(&self.state.state, config, program).map_err(CommandError::failed)?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let ending = agent.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("agent ends; VMs go on");
            ending.end();
        });
        let socket = agent.socket().to_path_buf();
        agent
            .serve(|| {
                tracing::info!(socket = %socket.display(), "agent is ready");
                // Without systemd there is nobody to tell.
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
            })
            .await
            .map_err(CommandError::failed)
    }

    /// `agent.toml` with what the command line says in its place; without the file, the command line alone.
    fn config(&self) -> Result<Config, CommandError> {
        let missing = |e: &ConfigError| matches!(e, ConfigError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
        match Config::load(&self.state.state) {
            Ok(mut config) => {
                if let Some(name) = &self.name {
                    config.name.clone_from(name);
                }
                if let Some(listen) = self.listen {
                    config.listen = listen;
                }
                if !self.datastores.is_empty() {
                    config.datastores.clone_from(&self.datastores);
                    config.default_datastore = None;
                }
                Ok(config)
            }
            Err(error) if missing(&error) => match (&self.name, self.listen) {
                (Some(name), Some(listen)) => {
                    Ok(Config { datastores: self.datastores.clone(), ..Config::new(name, listen) })
                }
                _ => Err(CommandError::Usage(format!(
                    "{error}; run `vmove init` or `vmove join` first, or give --name and --listen"
                ))),
            },
            Err(error) => Err(CommandError::failed(error)),
        }
    }
}
