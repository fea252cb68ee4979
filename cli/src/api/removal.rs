//! Taking a host that is gone for ever out of the cluster: requests and answers.
//!
//! Lives here: plain data. Never enters: what is done about it (the agent's `removal`).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A VM that has to do with a host that is to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TiedVm {
    /// The VM.
    pub vm: String,
    /// The host that says so.
    pub host: String,
    /// What becomes of it, in a sentence.
    pub what: String,
}

/// What it means to take a host out of the cluster, and what stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostRemoval {
    /// The host.
    pub host: String,
    /// VMs that were on it when it was last heard of: given up, unless they are found elsewhere.
    pub given_up: Vec<String>,
    /// VMs on other hosts that wait for its word.
    pub waiting: Vec<TiedVm>,
    /// Other hosts that do not answer: they learn of it when they are back.
    pub unreachable: Vec<String>,
    /// It is the only host known to hold the cluster's authority: without it no host can join any more.
    pub authority_lost: bool,
    /// Why it is not to be removed. Empty: it may be, or is.
    pub blockers: Vec<String>,
}

/// What a host says of another one that is to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostTies {
    /// The host that is to be removed answers this one.
    pub reachable: bool,
    /// This host holds the cluster's authority.
    pub authority: bool,
    /// VMs that were on it when it last answered this host.
    pub seen: Vec<String>,
    /// VMs here that wait for its word.
    pub waiting: Vec<TiedVm>,
}

/// Hosts that were taken out of the cluster. Their names are never used again, because their certificates bear them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RemovedHosts {
    /// Their names.
    pub names: std::collections::BTreeSet<String>,
}
