//! What an agent and a VM process say to each other.
//!
//! The agent starts the process with a [`LaunchSpec`] in a file (never on the command line) and talks to it over a unix socket in
//! the VM's directory: one JSON line in, one JSON line out, one exchange a connection, so either side may restart at any time.
//! Lives here: plain data. Never enters: sockets, policy, guest bytes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmove_devices::net::{Attachment, MacAddress};

use super::measure::Measurement;

/// File in the VM's directory that holds the [`LaunchSpec`] (JSON).
pub const LAUNCH_FILE: &str = "launch.json";
/// Control socket in the VM's directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Serial console in the VM's directory, by the messages of [`wire`](super::console::wire).
pub const CONSOLE_SOCKET: &str = "console.sock";
/// The VM's ownership journal in its directory (`vmove_mirror::journal` records in a `vmove_storage::JournalFile`).
pub const JOURNAL_FILE: &str = "journal";
/// Longest accepted control line, bytes.
pub const MAX_LINE: usize = 1 << 20;

/// What a VM is: the TOML file its host keeps of it, and what travels with a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDefinition {
    /// Unique in the cluster: letters, digits, `.`, `_`, `-`; at most 64.
    pub name: String,
    /// Number of vCPUs, 1 to 64.
    #[serde(default = "one")]
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// CPU features (names as in `/proc/cpuinfo`) a host must offer; filled in at the first start with what the guest was given.
    #[serde(default)]
    pub cpu_features: Vec<String>,
    /// Disks, in the order the guest sees them.
    #[serde(default)]
    pub disks: Vec<DiskDefinition>,
    /// Network interfaces, in the order the guest sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkDefinition>,
    /// Groups of which no host should run two VMs: `vmove evacuate` and `vmove balance` keep them apart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub apart: Vec<String>,
}

fn one() -> u8 {
    1
}

/// One disk of a [`VmDefinition`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskDefinition {
    /// Unique in the VM, as [`VmDefinition::name`].
    pub name: String,
    /// `qcow2` or `raw`.
    pub format: DiskFormat,
    /// Virtual size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Datastore on the host that owns the VM.
    pub datastore: String,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
}

/// One network interface of a [`VmDefinition`]. It has a bridge or a tap, not both; hosts it moves to have one of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkDefinition {
    /// Unique in the VM, as [`VmDefinition::name`].
    pub name: String,
    /// Bridge of the host; a tap of its own is made and put into it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Tap of the host, made and connected by somebody else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// The guest's address, as `52:54:00:12:34:56`; made when the VM is, if none is given, and kept for its life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub mac: Option<MacAddress>,
}

impl NetworkDefinition {
    /// What of the host it is attached to; none if that is not said, or said twice.
    pub fn attachment(&self) -> Option<Attachment> {
        match (&self.bridge, &self.tap) {
            (Some(bridge), None) => Some(Attachment::Bridge(bridge.clone())),
            (None, Some(tap)) => Some(Attachment::Tap(tap.clone())),
            _ => None,
        }
    }
}

/// Image format of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// qcow2 version 3.
    Qcow2,
    /// Plain bytes.
    Raw,
}

/// Where a disk's image lies on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskPlacement {
    /// The disk's name in the definition.
    pub name: String,
    /// The datastore's name on this host.
    pub datastore: String,
    /// The image file.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

/// Structure an arriving image must have: that of the source's image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageShape {
    /// The disk's name in the definition.
    pub name: String,
    /// Image format.
    pub format: DiskFormat,
    /// Virtual size, bytes.
    pub virtual_bytes: u64,
    /// qcow2 cluster size, bytes; 0 for raw.
    pub cluster_bytes: u64,
    /// Bytes the source's image takes on its disk.
    pub allocated_bytes: u64,
}

/// PEM files of this host's identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityPaths {
    /// Certificate of the cluster's authority.
    pub ca: PathBuf,
    /// This host's certificate chain.
    pub cert: PathBuf,
    /// This host's private key.
    pub key: PathBuf,
}

/// Everything a VM process needs to know at its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// The VM.
    pub vm: VmDefinition,
    /// Kernel image in the VM's directory.
    pub kernel: PathBuf,
    /// Initial RAM disk in the VM's directory.
    pub initrd: Option<PathBuf>,
    /// This host's name, for reports.
    pub host: String,
    /// Ownership generation under which the disks are opened.
    pub generation: u64,
    /// Images of the VM's disks on this host (for [`Start::Incoming`]: those to be made).
    pub disks: Vec<DiskPlacement>,
    /// TLS identity of this host.
    pub identity: Option<IdentityPaths>,
    /// How to begin.
    pub start: Start,
}

/// How a VM process begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// Boot the kernel from the disks of an owned VM.
    Boot,
    /// Wait for a VM to arrive.
    Incoming(IncomingSpec),
    /// Go on from a checkpoint whose disks have been copied to the VM's places; the VM is owned once all of it is loaded.
    Restore(RestoreSpec),
}

/// Where a VM that is restored comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreSpec {
    /// The checkpoint's directory.
    pub dir: PathBuf,
}

/// What the target of a move is told before the source connects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IncomingSpec {
    /// The move's id (UUID text), the same on both sides.
    pub move_id: String,
    /// Name of the host the VM comes from.
    pub from_host: String,
    /// IP address to listen on for the source.
    pub listen_ip: String,
    /// Structure of every disk that is copied.
    pub images: Vec<ImageShape>,
    /// No TLS on the data connections (`--insecure-plain`).
    pub plain: bool,
}

/// A question to a VM process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// What are you doing?
    Status,
    /// End the VM: flush and close the disks, exit.
    Stop,
    /// Press the guest's power button, on the move or not. An error if the guest stands still just now: ask again.
    PowerButton,
    /// Begin to take a checkpoint; answered at once, followed and cancelled as a move.
    Checkpoint(Box<CheckpointOrder>),
    /// Begin a move; answered at once, followed with [`Request::MoveStatus`].
    Move(Box<MoveOrder>),
    /// How far is the current or last move?
    MoveStatus,
    /// Give up a move that is not committed.
    Cancel,
    /// Which way did this move go? A source that has not committed journals `Aborted` before it answers so.
    Verdict {
        /// The move asked about.
        move_id: String,
    },
    /// To a target whose source is out of reach after `Prepared`: the verdict its agent fetched.
    Resolve {
        /// The move.
        move_id: String,
        /// The source's word.
        verdict: Verdict,
    },
    /// To a prepared target whose source is gone for ever, by its operator's word alone: own the VM and run it.
    TakeOver {
        /// The move.
        move_id: String,
    },
    /// Watch the running VM, for an estimate of its move; answered at once, followed with [`Request::Measured`].
    Measure {
        /// For how long, ms.
        millis: u64,
    },
    /// What was seen?
    Measured,
    /// To the source of an aborted move: its target has said that it holds nothing of it. Journals that.
    Cleared {
        /// The move.
        move_id: String,
    },
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
// One exists at a time, on its way to a socket.
#[allow(clippy::large_enum_variant)]
pub enum Reply {
    /// Done or begun.
    Ok,
    /// To [`Request::Status`].
    Status(ProcessStatus),
    /// To [`Request::MoveStatus`]; none if this process has seen no move.
    MoveStatus(Option<Box<MoveProgress>>),
    /// To [`Request::Verdict`].
    Verdict(Verdict),
    /// To [`Request::Measured`]; none while it goes on.
    Measured(Option<Box<Measurement>>),
    /// Refused or failed; nothing was changed.
    Error(String),
}

/// How a move ended for its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The target owns the VM.
    Committed,
    /// The source owns the VM; this is on its disk.
    Aborted,
    /// Not decided yet: the source is still moving it. Ask again.
    Moving,
    /// There is no record of this move here, though one was made before its target could ask: it is lost, and says nothing.
    Unknown,
}

/// State of a VM process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// The guest runs here.
    Running,
    /// Arriving from another host; the guest runs there.
    Incoming,
    /// Everything is here, the source's commit is awaited and cannot be reached: needs [`Request::Resolve`].
    Undecided,
    /// The VM has moved away or is being ended.
    Leaving,
}

/// Answer to [`Request::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// What it does.
    pub state: RunState,
    /// Process id.
    pub pid: u32,
    /// Ownership generation.
    pub generation: u64,
    /// Images in use (they change with a datastore move).
    pub disks: Vec<DiskPlacement>,
    /// The VM's definition (datastores as they are now).
    pub vm: VmDefinition,
    /// For an incoming process: where the source shall connect, once it listens.
    pub listening: Option<Listening>,
    /// For an incoming or undecided process: the move and the host it comes from.
    pub incoming: Option<(String, String)>,
    /// Move in progress from here, if any.
    pub moving: Option<String>,
}

/// Where an incoming VM process awaits its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Listening {
    /// IP address.
    pub ip: String,
    /// TCP port.
    pub port: u16,
    /// One-time secret the source must present (hex).
    pub ticket: String,
}

/// The order to move a VM, complete and checked by the agents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveOrder {
    /// The move's id (UUID text).
    pub move_id: String,
    /// Host and default datastore it leaves and reaches, for the report.
    pub from: Place,
    /// Where it goes.
    pub to: Place,
    /// The waiting target process; none for a datastore-only move.
    pub target: Option<Listening>,
    /// Disks that are copied: their new placement (on the target host).
    pub copies: Vec<DiskPlacement>,
    /// Largest pause that is aimed at, ms.
    pub max_downtime_ms: u64,
    /// Cap on bytes per second over all connections; none = unlimited.
    pub bandwidth: Option<u64>,
    /// Keep the source's images (stamped stale) instead of removing them.
    pub keep_source: bool,
    /// Hash the paused guest's whole RAM and disks on both sides before the commit.
    pub audit: bool,
    /// No TLS on the data connections.
    pub plain: bool,
    /// What an estimate has foreseen of it, for the report.
    #[serde(default)]
    pub predicted: Option<Predicted>,
}

/// A figure from its best to its worst case.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Range {
    /// The best.
    pub low: f64,
    /// The worst.
    pub high: f64,
}

/// What an estimate has foreseen of a move, in the report's units.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Predicted {
    /// From the order to the end, ms.
    pub total_ms: Range,
    /// The pause, ms.
    pub downtime_ms: Range,
    /// Bytes sent for RAM and disks.
    pub bytes: Range,
}

/// The order to take a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointOrder {
    /// Id (UUID text), as of a move.
    pub id: String,
    /// The checkpoint's name.
    pub name: String,
    /// Directory in which it is made, with the kernel and the initial RAM disk in it; removed if it is not completed.
    pub dir: PathBuf,
    /// The directory's name once it is complete.
    pub to: PathBuf,
    /// End the VM with it.
    pub stop: bool,
    /// This host and the checkpoint's datastore, for the report.
    pub place: Place,
}

/// A host and a datastore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// Host name.
    pub host: String,
    /// Datastore name (that of the first disk; empty without disks).
    pub datastore: String,
}

/// A move as it is seen while it runs, and after.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoveProgress {
    /// The move's id.
    pub move_id: String,
    /// `setup`, `mirror`, `pre-copy`, `reconnecting`, `switchover`, `committed`, `completed`, `aborted`, `cancelled`.
    pub phase: String,
    /// Milliseconds since the move began.
    pub elapsed_ms: u64,
    /// Bytes of disk that are to be copied in all, as known now.
    pub disk_total_bytes: u64,
    /// Bytes of disk copied.
    pub disk_done_bytes: u64,
    /// Bytes of RAM in this round.
    pub ram_total_bytes: u64,
    /// Bytes of RAM of this round sent.
    pub ram_done_bytes: u64,
    /// Pre-copy round, 1 = the first.
    pub round: u32,
    /// Bytes per second over the last moments.
    pub rate: u64,
    /// RAM bytes per second turning dirty, as seen in the last round.
    pub dirty_rate: u64,
    /// Times that lost connections were made anew.
    #[serde(default)]
    pub reconnects: u32,
    /// Estimate of the time left, ms; none when unknown.
    pub left_ms: Option<u64>,
    /// The end of it, once it has ended.
    pub report: Option<MoveReport>,
    /// Why it failed, in words.
    pub error: Option<String>,
}

/// The report of a move: what `--json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoveReport {
    /// The VM.
    pub vm: String,
    /// Where it was.
    pub from: Place,
    /// Where it is.
    pub to: Place,
    /// `completed`, `aborted` or `cancelled`.
    pub outcome: String,
    /// From the order to the end, ms.
    pub total_ms: f64,
    /// From the pause of the first vCPU at the source to the resume at the target, ms, both as the processes saw them.
    pub downtime_ms: f64,
    /// Its parts.
    pub downtime: DowntimeParts,
    /// What happened to RAM.
    pub memory: MemoryReport,
    /// What happened to each copied disk.
    pub disks: Vec<DiskReport>,
    /// Times that lost connections were made anew and the move went on.
    #[serde(default)]
    pub reconnects: u32,
    /// All checksums and counters of both sides agreed before the commit.
    pub verified: bool,
    /// BLAKE3 of what was compared (hex).
    pub digest: String,
    /// Why it ended so, when not completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What an estimate made shortly before had foreseen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted: Option<Predicted>,
}

/// Parts of the downtime, ms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DowntimeParts {
    /// vCPUs stopped, queues and mirrors drained.
    pub drain_ms: f64,
    /// The last dirty pages collected and sent.
    pub final_pages_ms: f64,
    /// State saved, sent, loaded and checked at the target.
    pub state_ms: f64,
    /// The commit record on the source's disk.
    pub commit_ms: f64,
    /// Commit sent, target owns and resumes.
    pub resume_ms: f64,
}

/// RAM part of a [`MoveReport`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryReport {
    /// Size of the guest's RAM.
    pub ram_bytes: u64,
    /// Bytes sent for it, with all framing.
    pub sent_bytes: u64,
    /// Pre-copy rounds, the final one included.
    pub rounds: u32,
    /// Pages that were sent as a flag only.
    pub zero_pages: u64,
    /// RAM never read because the guest never touched it.
    pub skipped_bytes: u64,
    /// Bytes per second of the first round, from its first byte to the target's acknowledgement.
    pub stream_bytes_per_s: u64,
}

/// Disk part of a [`MoveReport`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskReport {
    /// The disk's name.
    pub name: String,
    /// Virtual size.
    pub virtual_bytes: u64,
    /// Allocated bytes of the target image at the switchover.
    pub allocated_bytes: u64,
    /// Bytes sent by the background copy.
    pub copied_bytes: u64,
    /// Bytes sent because the guest wrote them meanwhile.
    pub mirrored_bytes: u64,
}
