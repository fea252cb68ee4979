//! What came of a plan, for people and for scripts. Plain data.
//!
//! Never enters: how it came about.

use serde::{Deserialize, Serialize};

use crate::api::types::MoveReport;
use crate::placement::plan::{Blocked, PlannedMove};

/// The report of an evacuation, or of a return.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvacuationReport {
    /// The host that was to be emptied, or that VMs were to return to.
    pub host: String,
    /// Everything that was to move has moved.
    pub complete: bool,
    /// What came of each VM.
    pub vms: Vec<VmReport>,
    /// VMs that stay where they should not, and why.
    pub stays: Vec<Blocked>,
    /// Sums.
    pub totals: Totals,
}

/// What came of one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM.
    pub vm: String,
    /// Where it was.
    pub from: String,
    /// Where it was to go.
    pub to: String,
    /// What came of it.
    pub outcome: Outcome,
    /// Times that its move was begun by this run.
    pub attempts: u32,
    /// Its last move.
    pub move_id: Option<String>,
    /// What was predicted.
    pub predicted: Figures,
    /// What it was; none if it has not moved, or no report of it is left.
    pub real: Option<Figures>,
    /// Why it has not moved, or what delayed it last.
    pub reasons: Vec<String>,
}

/// What came of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It has moved.
    Moved,
    /// It was where it should go when this run began.
    AlreadyThere,
    /// Somebody else moved it to another host.
    Elsewhere,
    /// It does not fit any more; nothing was begun.
    NoRoom,
    /// It cannot be moved, or the agents refused it.
    Refused,
    /// Its move failed, however often it was tried.
    Failed,
    /// Somebody gave its move up.
    Cancelled,
    /// Who should have answered did not, until patience was at its end.
    Unreachable,
}

impl Outcome {
    /// It is not where it was.
    pub fn has_left(self) -> bool {
        matches!(self, Self::Moved | Self::AlreadyThere | Self::Elsewhere)
    }
}

/// A move in figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Seconds from its order to its end.
    pub seconds: f64,
    /// Downtime, ms.
    pub downtime_ms: f64,
    /// Bytes of RAM and disks on the wire.
    pub bytes: u64,
}

impl From<&PlannedMove> for Figures {
    fn from(step: &PlannedMove) -> Self {
        Self {
            seconds: step.seconds,
            downtime_ms: step.downtime_ms as f64,
            bytes: step.disk_bytes.saturating_add(step.memory_bytes),
        }
    }
}

impl From<&MoveReport> for Figures {
    fn from(report: &MoveReport) -> Self {
        let disks = report.disks.iter().map(|disk| disk.copied_bytes.saturating_add(disk.mirrored_bytes));
        Self {
            seconds: report.total_ms / 1000.0,
            downtime_ms: report.downtime_ms,
            bytes: disks.fold(report.memory.sent_bytes, u64::saturating_add),
        }
    }
}

/// Sums over all VMs of a report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// VMs in the report.
    pub vms: usize,
    /// Those that this run has moved.
    pub moved: usize,
    /// Those that stay where they should not.
    pub stays: usize,
    /// Moves that were begun.
    pub attempts: u32,
    /// Seconds that were predicted for all of it.
    pub predicted_seconds: f64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Bytes of all moves with a report.
    pub bytes: u64,
    /// The longest downtime of those, ms.
    pub longest_downtime_ms: f64,
}

impl EvacuationReport {
    /// Adds up.
    pub fn new(
        host: &str,
        vms: Vec<VmReport>,
        stays: Vec<Blocked>,
        predicted_seconds: f64,
        seconds: f64,
    ) -> Self {
        let real = || vms.iter().filter_map(|vm| vm.real);
        let totals = Totals {
            vms: vms.len(),
            moved: vms.iter().filter(|vm| vm.outcome == Outcome::Moved).count(),
            stays: stays.len(),
            attempts: vms.iter().map(|vm| vm.attempts).sum(),
            predicted_seconds,
            seconds,
            bytes: real().map(|figures| figures.bytes).fold(0, u64::saturating_add),
            longest_downtime_ms: real().map(|figures| figures.downtime_ms).fold(0.0, f64::max),
        };
        Self { host: host.to_owned(), complete: stays.is_empty(), vms, stays, totals }
    }
}
