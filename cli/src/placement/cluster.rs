//! What a planner is told: hosts, VMs, and what is wanted. Plain data, in JSON as well.
//!
//! Never enters: how it was found out.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Hosts and VMs as they are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// The hosts.
    pub hosts: Vec<Host>,
    /// The VMs.
    pub vms: Vec<Vm>,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// vCPUs it may carry: its CPUs times what is allowed beyond them.
    pub vcpus: u32,
    /// RAM it may give to guests, MiB.
    pub memory_mib: u64,
    /// Its datastores.
    pub datastores: Vec<Datastore>,
    /// Nothing new may come here.
    #[serde(default)]
    pub maintenance: bool,
    /// What its link carries, bytes a second.
    pub bandwidth: u64,
    /// CPU features it offers.
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// Networks it can connect a VM to.
    #[serde(default)]
    pub networks: BTreeSet<String>,
    /// Groups of VMs that are on their way here.
    #[serde(default)]
    pub apart: BTreeSet<String>,
}

/// A datastore on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Datastore {
    /// Its name there.
    pub name: String,
    /// Its identity: the same on two hosts means the same storage, and the same free space.
    pub id: String,
    /// Free bytes.
    pub free_bytes: u64,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// The host that has it.
    pub host: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory that its host must find for it, MiB.
    pub memory_mib: u64,
    /// RAM that its guest has touched, bytes: what a move has to send at least.
    pub touched_bytes: u64,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Why it cannot be moved at all; none: it can.
    #[serde(default)]
    pub stays: Option<String>,
    /// Hosts that have said that they cannot take it, and why.
    #[serde(default)]
    pub refused_by: BTreeMap<String, Vec<String>>,
    /// Groups of which no host may carry two VMs.
    #[serde(default)]
    pub apart: BTreeSet<String>,
    /// How fast its RAM turns dirty, bytes a second.
    #[serde(default)]
    pub dirty_rate: u64,
    /// CPU features its guest was given.
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// Networks it is connected to.
    #[serde(default)]
    pub networks: BTreeSet<String>,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name in the VM.
    pub name: String,
    /// The datastore it lies in, by its name on the VM's host.
    pub datastore: String,
    /// Bytes it takes there, and that a copy carries.
    pub allocated_bytes: u64,
    /// Room that a copy must find, bytes: what its host asks for beside the image included.
    pub room_bytes: u64,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Goal {
    /// Empty these hosts.
    Evacuate {
        /// The hosts.
        hosts: BTreeSet<String>,
        /// Only to these; none named: to all others.
        #[serde(default)]
        to: BTreeSet<String>,
    },
    /// Even out RAM and CPUs.
    Balance {
        /// Most VMs that are moved.
        max_moves: usize,
    },
}

/// A goal and its limits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The goal.
    pub goal: Goal,
    /// Most moves at once.
    pub parallel: usize,
    /// Bytes a second for all moves together; none: what the links carry.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// A disk in a datastore that both hosts have is handed over in place.
    #[serde(default)]
    pub shared_in_place: bool,
}
