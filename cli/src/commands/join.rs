//! `vmove join`: makes this host one of a cluster.
//!
//! Lives here: options, what is printed. Never enters: the exchange itself.

use clap::Args;
use serde_json::json;

use super::CommandError;
use super::host_args::HostArgs;
use crate::agent::cluster;
use crate::identity::token::Token;

/// Options of `vmove join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// Address of the first host's agent
    #[arg(value_name = "IP:PORT")]
    pub address: String,
    /// Token that `vmove init` or `vmove token` printed there
    #[arg(long, env = "VMOVE_TOKEN", hide_env_values = true)]
    pub token: String,
    /// The host.
    #[command(flatten)]
    pub host: HostArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl JoinArgs {
    /// Gets a certificate for this host and learns of the others.
    pub async fn run(self) -> Result<(), CommandError> {
        let token = Token::parse(&self.token).map_err(|e| CommandError::Usage(e.to_string()))?;
        let first = self
            .address
            .parse()
            .map_err(|_| CommandError::Usage(format!("{:?} is not IP:PORT", self.address)))?;
        let (config, made) = self.host.config(Some(first))?;
        let answer = cluster::join(&self.host.state.state, &config, first, &token)
            .await
            .map_err(CommandError::failed)?;
        made.keep();
        if self.json {
            println!("{}", json!({"name": config.name, "hosts": answer.hosts}));
            return Ok(());
        }
        let hosts: Vec<&str> = answer.hosts.iter().map(|host| host.name.as_str()).collect();
        println!("Host {} is one of the cluster (with {}). Start its agent:", config.name, hosts.join(", "));
        println!("  {}", self.host.state.start_agent());
        Ok(())
    }
}
