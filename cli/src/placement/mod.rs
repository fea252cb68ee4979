//! Where VMs go: a planner with no I/O, for emptying hosts and for evening them out.
//!
//! | module | what lives there |
//! |---|---|
//! | [`cluster`] | what it is told: hosts, VMs, the goal |
//! | [`plan`] | what it answers, and the check of a plan read from a file |
//! | [`room`] | what fits where, and everything that stands in the way |
//! | [`cost`] | predicted bytes, seconds and downtimes |
//! | [`evacuate`], [`balance`] | the two ways to choose |
//!
//! **Invariant.** Room that a VM leaves behind is never counted, so no host or datastore is overfilled at any moment of the execution,
//! whichever move ends first. Never enters: asking hosts, moving VMs, time.

mod balance;
pub mod cluster;
mod cost;
mod evacuate;
pub mod plan;
mod room;

use cluster::{Cluster, Goal, Request};
use plan::{PlacementError, Plan};
use room::Index;

/// The plan for a goal.
///
/// # Errors
/// Names in the cluster or the goal that are there twice or not at all.
pub fn plan(cluster: &Cluster, request: &Request) -> Result<Plan, PlacementError> {
    let index = Index::new(cluster, request)?;
    match &request.goal {
        Goal::Evacuate { hosts, to } => {
            let known = |name: &String| {
                index.host(name).ok_or_else(|| PlacementError::Unknown(format!("there is no host {name:?}")))
            };
            let leave = hosts.iter().map(known).collect::<Result<_, _>>()?;
            let to = to.iter().map(known).collect::<Result<_, _>>()?;
            Ok(evacuate::plan(&index, &leave, &to))
        }
        Goal::Balance { max_moves } => Ok(balance::plan(&index, *max_moves)),
    }
}
