//! `vmove estimate`: what a move would take, from a few seconds of watching the VM and its way.
//!
//! Lives here: plain data. Never enters: measuring (the VM's process, the agents' `estimate`), arithmetic (`vmove_mirror::predict`).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
pub use vmove_compute::process::protocol::{Predicted, Range};

use super::types::{MovePlan, MoveRequest};

/// How long a VM is watched when a request does not say, ms.
pub const DEFAULT_WATCH_MS: u64 = 3_000;

/// Estimate a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EstimateRequest {
    /// The move; it is not begun.
    #[serde(rename = "move")]
    pub order: MoveRequest,
    /// How long to watch the VM, ms.
    #[serde(default = "default_watch_ms")]
    pub watch_ms: u64,
}

fn default_watch_ms() -> u64 {
    DEFAULT_WATCH_MS
}

/// How sure it is that the VM can be moved without stopping it for longer than was allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Converges {
    /// In the worst case that the measurement allows, too.
    Yes,
    /// In the best case only.
    Unsure,
    /// It would be given up.
    No,
}

/// What a move would take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    /// What the move would do.
    pub plan: MovePlan,
    /// Whether it would end with a switchover.
    pub converges: Converges,
    /// Time, pause and bytes, each from the best to the worst case. Of a move that does not converge: until it is given up.
    pub predicted: Predicted,
    /// Pre-copy rounds, fewest and most.
    pub rounds: (u32, u32),
    /// What would help, if it is not sure to converge.
    pub advice: Vec<String>,
    /// What was measured.
    pub measured: MeasuredRates,
}

/// What an estimate rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct MeasuredRates {
    /// How long the VM was watched, ms.
    pub watched_ms: u64,
    /// RAM turning dirty, bytes per second (a page written many times in that time counts once).
    pub dirty_bytes_per_s: u64,
    /// RAM that has content, bytes.
    pub ram_bytes: u64,
    /// What the guest writes to the disks that would be copied, bytes per second.
    pub disk_write_bytes_per_s: u64,
    /// What gets through to the other host in memory, bytes per second; none for a move on one host.
    pub link_bytes_per_s: Option<u64>,
    /// What gets through to the new datastore, bytes per second; none if no disk would be copied.
    pub disk_bytes_per_s: Option<u64>,
    /// A message to the other host and its answer, µs.
    pub round_trip_us: Option<u64>,
}

/// Answer to a probe of the way between two agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProbeAnswer {
    /// Bytes that came.
    pub bytes: u64,
    /// From the first byte to the last being where it was to go, µs.
    pub elapsed_us: u64,
}
