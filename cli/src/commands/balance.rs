//! `vmove balance --dry-run`: moves that would even out RAM and CPUs.

use super::CommandError;
use super::evacuate::{LimitArgs, answering, refused};
use crate::client::Client;
use crate::evacuation::observed::cluster;
use crate::placement;
use crate::placement::cluster::Goal;
use crate::render;

/// Arguments of `vmove balance`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct BalanceArgs {
    /// Only suggest (the only way there is: the moves themselves are begun with 'vmove <VM> --host HOST')
    #[arg(long, required = true)]
    pub dry_run: bool,
    /// Most moves to suggest
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub max_moves: usize,
    /// Limits of the plan.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl BalanceArgs {
    /// Prints the suggestion.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let limits = self.limits.limits();
        let inventory = answering(client, &[]).await?;
        let goal = Goal::Balance { max_moves: self.max_moves };
        let plan = placement::plan(&cluster(&inventory, &limits), &limits.request(goal))
            .map_err(|error| refused(&error))?;
        if self.json {
            render::print_json(&plan)?;
        } else if plan.moves.is_empty() {
            render::print("The hosts are even: there is nothing to gain.\n")?;
        } else {
            render::print(&render::evacuation::plan("Even out the hosts", &plan))?;
        }
        for (host, why) in &inventory.unreachable {
            eprintln!("vmove: host {host} did not answer and is left out: {why}");
        }
        Ok(())
    }
}
