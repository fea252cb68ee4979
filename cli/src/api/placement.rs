//! What the agents say for the placement of VMs: everything a host has and carries, and whether it is in maintenance.
//!
//! Lives here: plain data. Never enters: where VMs go (`crate::placement`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::types::{HostInfo, VmDetail};

/// What is known of all hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterInventory {
    /// Hosts that answered, by name.
    pub hosts: Vec<HostInventory>,
    /// Hosts that did not, and why.
    pub unreachable: BTreeMap<String, String>,
}

/// A host and its VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostInventory {
    /// The host.
    pub host: HostInfo,
    /// Its network interfaces: bridges and taps that a VM may name.
    pub interfaces: Vec<String>,
    /// Its VMs, those that arrive included.
    pub vms: Vec<InventoryVm>,
    /// Maintenance, on or over.
    pub maintenance: Maintenance,
}

/// A VM of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InventoryVm {
    /// The VM.
    #[serde(flatten)]
    pub vm: VmDetail,
    /// Bytes that its images take, by the disk's name.
    pub disk_bytes: BTreeMap<String, u64>,
    /// Memory that its process has touched, bytes: the guest's RAM in use and a little more; none without a process.
    pub touched_bytes: Option<u64>,
}

/// Maintenance of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Maintenance {
    /// Nothing new comes to the host.
    pub on: bool,
    /// VMs it had when maintenance was switched on: what may be brought back.
    pub had: Vec<HadVm>,
}

/// A VM that a host had when its maintenance began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HadVm {
    /// Its name.
    pub name: String,
    /// Datastore of each disk then, by the disk's name.
    pub disks: BTreeMap<String, String>,
}

/// Switch maintenance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MaintenanceRequest {
    /// On or off.
    pub on: bool,
    /// Forget which VMs the host had: they are back, or need not come back.
    #[serde(default)]
    pub forget: bool,
}
