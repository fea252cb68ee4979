//! Moves as they are watched: the list of those that go on, and the events of the stream.
//!
//! Lives here: plain data. Never enters: where it comes from (the agents' `watched`), how it is shown.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::types::MoveProgress;

/// A move as its leader, the agent of the host that the VM leaves, sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WatchedMove {
    /// The VM.
    pub vm: String,
    /// The host it leaves, whose agent leads the move.
    pub from_host: String,
    /// The host it goes to (the same, if only its disks move).
    pub to_host: String,
    /// How far it is, or how it ended.
    pub progress: MoveProgress,
}

/// Moves that go on, and those that ended moments ago.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoveList {
    /// Moves, by VM.
    pub moves: Vec<WatchedMove>,
    /// With `all=true`: hosts that did not answer, so moves led by them are missing.
    pub unreachable: Vec<String>,
}
