//! `vmove init` and `vmove token`: a new cluster, and the way into it.
//!
//! Lives here: options, what is printed. Never enters: certificates, tokens' rules.

use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::CommandError;
use super::host_args::{HostArgs, StateArgs};
use crate::agent::cluster;
use crate::agent::config::Config;
use crate::identity::token::{DEFAULT_LIFETIME, Token};

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
        let state = &self.host.state.state;
        let (config, made) = self.host.config(None)?;
        let token = cluster::init(state, &config, DEFAULT_LIFETIME).map_err(CommandError::failed)?;
        made.keep();
        if !self.json {
            println!("Host {} is the first of a new cluster. Start its agent:", config.name);
            println!("  {}", self.host.state.start_agent());
            println!("Then, on the next host:");
        }
        print_token(&token, &config, DEFAULT_LIFETIME, self.json);
        Ok(())
    }
}

/// Options of `vmove token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Where the host's state is.
    #[command(flatten)]
    pub state: StateArgs,
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
        let config = Config::load(&self.state.state).map_err(CommandError::failed)?;
        let lifetime = Duration::from_secs(self.minutes * 60);
        let token = cluster::issue_token(&self.state.state, lifetime).map_err(CommandError::failed)?;
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
    println!("  vmove join {address} --token {token}");
    println!(
        "The token works once, within {} minutes; 'vmove token' makes another.",
        lifetime.as_secs() / 60
    );
}
