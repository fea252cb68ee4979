//! What hosts hold of a VM after a failure: requests and answers of `vmove recover`.
//!
//! Lives here: plain data. Never enters: what is done about it (the agent's `recover` and `settle`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What stands in a host's journal of a VM; see `docs/recovery.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StandingKind {
    /// Nothing is known of it there.
    Nothing,
    /// It is that host's.
    Owner,
    /// It is that host's, and on the move.
    Moving,
    /// It arrives there.
    Arriving,
    /// It has arrived there whole; the source's word is awaited.
    Prepared,
    /// It has left; its new owner has not said yet that it has it.
    Left,
    /// An arrival that was given up; its images are about to go.
    Discarded,
    /// It has left and its new owner has it; its images are about to go.
    Released,
    /// It was taken over by another host and is never started there; its images are kept.
    Lost,
}

/// One image of a VM on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeldImage {
    /// The disk.
    pub disk: String,
    /// The datastore it lies in.
    pub datastore: String,
    /// The file.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Bytes it takes in its file system; none if it is not there.
    pub allocated_bytes: Option<u64>,
    /// Its stamp in words: whose it is, at which generation.
    pub stamp: String,
}

/// What one host holds of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostStanding {
    /// The host.
    pub host: String,
    /// What stands in its journal.
    pub standing: StandingKind,
    /// Ownership generation of what it holds.
    pub generation: Option<u64>,
    /// The move that this comes from.
    pub move_id: Option<String>,
    /// The host at the other end of it.
    pub other_host: Option<String>,
    /// The host whose word is awaited before the VM can be run or let go here.
    pub waits_for: Option<String>,
    /// Its process there: its id and what it does.
    pub process: Option<HeldProcess>,
    /// Its images there.
    pub images: Vec<HeldImage>,
    /// What that host's agent does next, and why.
    pub next: String,
}

/// The process of a VM on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeldProcess {
    /// Its id.
    pub pid: u32,
    /// What it does: `running`, `moving`, `incoming`, `undecided`, `leaving`, `silent`.
    pub state: String,
}

/// A host that could not be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SilentHost {
    /// The host.
    pub host: String,
    /// Why.
    pub error: String,
}

/// An explicit act that would decide who owns a VM, and what it risks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TakeOver {
    /// The host that would own the VM.
    pub host: String,
    /// The host that is taken to be gone for ever.
    pub instead_of: String,
    /// What happens.
    pub effect: String,
    /// What may be lost or go wrong, and when.
    pub risks: Vec<String>,
}

/// Who holds what of a VM, after everything was settled that could be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecoveryReport {
    /// The VM.
    pub vm: String,
    /// Hosts that answered and hold something of it, by name.
    pub hosts: Vec<HostStanding>,
    /// Hosts that did not answer.
    pub unreachable: Vec<SilentHost>,
    /// It is decided who owns it, and no host waits for another.
    pub settled: bool,
    /// The host that owns it, if it is decided.
    pub owner: Option<String>,
    /// How it stands, in a sentence; when not settled: what is waited for, or what is in conflict.
    pub summary: String,
    /// What a person could do about it, at the price of these risks.
    pub take_over: Option<TakeOver>,
}
