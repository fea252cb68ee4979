//! Moments of a VM that are kept: requests and answers of `vmove checkpoint`, `checkpoints` and `restore`.
//!
//! Lives here: plain data. Never enters: the files (`vmove_compute::checkpoint`), who may restore (the agent's `restore`).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Take a checkpoint of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeCheckpoint {
    /// Its name, unique for the VM: as a VM's.
    pub name: String,
    /// End the VM with it.
    #[serde(default)]
    pub stop: bool,
    /// Where it is to lie; none = in the datastore of the VM's first disk.
    #[serde(default)]
    pub datastore: Option<String>,
}

/// A checkpoint that is being taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointBegun {
    /// Its id (UUID text): followed with `GET /v1/moves/{id}`, cancelled with `DELETE`.
    pub id: String,
    /// The host that takes it.
    pub host: String,
    /// Where it will lie.
    pub datastore: String,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointInfo {
    /// The VM.
    pub vm: String,
    /// Its name.
    pub name: String,
    /// Host that has it.
    pub host: String,
    /// Datastore it lies in.
    pub datastore: String,
    /// When it was taken, seconds since 1970.
    pub taken_at: u64,
    /// RAM of the VM, MiB.
    pub memory_mib: u64,
    /// Bytes it holds beside holes.
    pub data_bytes: u64,
    /// How long the guest stood still for it, us.
    pub pause_us: u64,
    /// Why it cannot be used.
    pub error: Option<String>,
}

/// The list of checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointList {
    /// By VM, then by time.
    pub checkpoints: Vec<CheckpointInfo>,
    /// With `all=true`: hosts that did not answer.
    pub unreachable: Vec<String>,
}

/// Go on from a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreCheckpoint {
    /// Where the VM shall run; none = on the host that has it, else on the one that has the checkpoint.
    #[serde(default)]
    pub host: Option<String>,
}
