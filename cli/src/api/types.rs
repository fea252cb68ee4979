//! Requests and responses of the agent's HTTP API, shared by the agent, the command line and the OpenAPI document.
//!
//! Lives here: plain data. Never enters: sockets, files, decisions. What a VM process and its agent say to each other is in
//! `vmove_compute::process::protocol`; its public types are re-exported here, so users of the API need only this module.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::definitions::CloudInit;
pub use vmove_compute::process::protocol::{
    DiskDefinition, DiskFormat, DiskPlacement, DiskReport, DowntimeParts, ImageShape, Listening,
    MemoryReport, MoveProgress, MoveReport, NetworkDefinition, Place, Verdict, VmDefinition,
};

/// Version of the agreement between two agents; both sides of a move must have the same.
pub const PEER_VERSION: u32 = 1;
/// Pause aimed at when a request names none, ms.
pub const DEFAULT_MAX_DOWNTIME_MS: u64 = 100;
/// Header of a request that one agent passed to another; such a request is never passed on again.
pub const FORWARDED_HEADER: &str = "x-vmove-forwarded";
/// The `Upgrade` token of a console connection.
pub const CONSOLE_PROTOCOL: &str = "vmove-console";

/// Body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong, for programs and for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Stable snake_case word: `not_found`, `name_taken`, `busy`, `blocked`, `invalid`, `conflict`, `undecided`, `peer_unreachable`,
    /// `peer_refused`, `forbidden`, `vm_process`, `storage`, `too_large`, `internal`.
    pub code: String,
    /// What was tried, on what, what to do.
    pub message: String,
    /// Everything that stands in the way, when there may be more than one thing.
    #[serde(default)]
    pub blockers: Vec<String>,
}

/// A host, as its agent describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostInfo {
    /// Unique in the cluster.
    pub name: String,
    /// Version of the agent.
    pub version: String,
    /// Version of the agreement between agents.
    pub peer_version: u32,
    /// Address other agents reach it at (`IP:PORT`).
    pub address: String,
    /// Processors that are online.
    pub cpus: u32,
    /// RAM, bytes.
    pub memory_bytes: u64,
    /// RAM that can be had without swapping, bytes.
    pub memory_free_bytes: u64,
    /// CPU features it offers to guests (names as in `/proc/cpuinfo`).
    pub cpu_features: Vec<String>,
    /// Its datastores; the first is the default.
    pub datastores: Vec<DatastoreInfo>,
    /// It is in maintenance: nothing new comes to it.
    #[serde(default)]
    pub maintenance: bool,
}

/// A datastore of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DatastoreInfo {
    /// Its name on the host.
    pub name: String,
    /// Its identity: two hosts that show the same id share it.
    pub id: String,
    /// Its directory.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Size of the file system, bytes.
    pub total_bytes: u64,
    /// Free for this agent, bytes.
    pub free_bytes: u64,
    /// It takes disks for which no datastore is named.
    pub default: bool,
}

/// A host this agent knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KnownHost {
    /// Its name.
    pub name: String,
    /// Its address (`IP:PORT`).
    pub address: String,
    /// It answered within the deadline.
    pub reachable: bool,
    /// This is the host that was asked.
    pub this: bool,
    /// What it says about itself; none if it did not answer.
    pub info: Option<HostInfo>,
    /// Why it did not answer.
    pub error: Option<String>,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// The guest runs here.
    Running,
    /// Defined here, not running.
    Stopped,
    /// Arriving from another host; the guest runs there.
    Incoming,
    /// Everything arrived, the source's word is awaited; nobody runs it.
    Undecided,
    /// The guest runs here and is on the move.
    Moving,
    /// Its process ended with an error; it can be started again.
    Failed,
    /// Another host has taken it over; it is never started here, its images are kept.
    Lost,
}

/// A VM in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: VmState,
    /// vCPUs.
    pub vcpus: u8,
    /// RAM, MiB.
    pub memory_mib: u64,
    /// Host that has it.
    pub host: String,
    /// Its disks and where they lie.
    pub disks: Vec<DiskPlacement>,
    /// Ownership generation: grows with each move to another host.
    pub generation: u64,
    /// Move in progress.
    pub move_id: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Everything about one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDetail {
    /// As in a list.
    #[serde(flatten)]
    pub summary: VmSummary,
    /// Its definition, with the datastores as they are now.
    pub definition: VmDefinition,
    /// Its process, when there is one.
    pub pid: Option<u32>,
}

/// The list of VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmList {
    /// VMs, by name.
    pub vms: Vec<VmSummary>,
    /// With `all=true`: hosts that did not answer, so their VMs are missing from the list.
    pub unreachable: Vec<String>,
}

/// Make a VM. Paths are on the agent's host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// The VM. A disk with an empty `datastore` goes to the default one; with an image, `size_bytes` 0 means the image's size.
    pub definition: VmDefinition,
    /// Kernel image, copied into the VM's directory.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// Initial RAM disk, copied too.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Disks that begin with the contents of an image, qcow2 or raw, not larger than they are; the others begin empty.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    pub images: BTreeMap<String, PathBuf>,
    /// What cloud-init in the guest shall find, on a disk of its own (`cidata`) behind the others.
    #[serde(default)]
    pub cloud_init: Option<CloudInit>,
}

/// Move a VM. Host, datastore, or both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// Where it shall run; none = stay.
    #[serde(default)]
    pub host: Option<String>,
    /// Where its disks shall lie; none = for another host, its datastore of the same name or its default; else stay.
    #[serde(default)]
    pub datastore: Option<String>,
    /// The same for single disks, by name.
    #[serde(default)]
    pub disks: BTreeMap<String, String>,
    /// Only say what would be done and what stands in the way.
    #[serde(default)]
    pub dry_run: bool,
    /// Pause aimed at, ms.
    #[serde(default = "default_max_downtime_ms")]
    pub max_downtime_ms: u64,
    /// Cap on bytes per second; none = unlimited.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// Keep the images at the source, stamped stale.
    #[serde(default)]
    pub keep_source: bool,
    /// Compare the whole paused guest on both sides before the commit.
    #[serde(default)]
    pub audit: bool,
    /// No TLS on the data connections.
    #[serde(default)]
    pub insecure_plain: bool,
}

fn default_max_downtime_ms() -> u64 {
    DEFAULT_MAX_DOWNTIME_MS
}

impl Default for MoveRequest {
    fn default() -> Self {
        Self {
            host: None,
            datastore: None,
            disks: BTreeMap::new(),
            dry_run: false,
            max_downtime_ms: DEFAULT_MAX_DOWNTIME_MS,
            bandwidth: None,
            keep_source: false,
            audit: false,
            insecure_plain: false,
        }
    }
}

/// Answer to a [`MoveRequest`]: a plan for a dry run, else the move that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum MoveAnswer {
    /// It has begun; follow it with `GET /v1/moves/{id}`.
    Accepted(MoveAccepted),
    /// What would be done.
    Plan(MovePlan),
}

/// A move that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MoveAccepted {
    /// Its id (UUID text).
    pub move_id: String,
    /// The host that leads it (the source).
    pub host: String,
    /// The plan it follows.
    pub plan: MovePlan,
}

/// What a move does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MovePlan {
    /// The VM.
    pub vm: String,
    /// Where it is.
    pub from: Place,
    /// Where it goes.
    pub to: Place,
    /// Whether its memory goes to another host.
    pub memory: MemoryAction,
    /// What happens to each disk.
    pub disks: Vec<DiskPlan>,
    /// Everything that stands in the way; empty = it can be done.
    pub blockers: Vec<String>,
}

/// What a move does with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemoryAction {
    /// The VM stays in its process.
    Stay,
    /// The VM goes on in a process on another host.
    Move,
}

/// What a move does with one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskPlan {
    /// The disk's name.
    pub name: String,
    /// Copied or left.
    pub action: DiskAction,
    /// Where it is.
    pub from: Place,
    /// Where it goes (the same, when it stays).
    pub to: Place,
    /// Bytes allocated now: what a copy has to carry at least.
    pub bytes: u64,
}

/// What a move does with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskAction {
    /// Stays where it is.
    Stay,
    /// Is copied to another datastore.
    Copy,
}

/// A file that travels with a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileDigest {
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its content (hex).
    pub blake3: String,
}

/// One disk of an [`Offer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OfferedDisk {
    /// The structure its image must get.
    pub image: ImageShape,
    /// Id of the datastore it lies in at the source.
    pub source_datastore_id: String,
    /// Datastore asked for at the target; none = that of the same name, else the default.
    pub datastore: Option<String>,
}

/// From the agent that has a VM to the one that shall get it: can you take this?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Offer {
    /// Version of the agreement ([`PEER_VERSION`]).
    pub version: u32,
    /// The move's id (UUID text).
    pub move_id: String,
    /// Host the VM comes from.
    pub from_host: String,
    /// The VM, with the datastores of the source.
    pub definition: VmDefinition,
    /// Ownership generation it gets at the target.
    pub generation: u64,
    /// Its disks, in the definition's order.
    pub disks: Vec<OfferedDisk>,
    /// No TLS on the data connections.
    pub plain: bool,
    /// CPU features the running guest has been given.
    pub cpu_features: Vec<String>,
    /// The kernel.
    pub kernel: FileDigest,
    /// The initial RAM disk.
    pub initrd: Option<FileDigest>,
    /// The clock of the host it comes from, ms since 1970, when this was sent.
    #[serde(default)]
    pub clock_ms: Option<u64>,
    /// Only answer; nothing is made or kept.
    pub dry_run: bool,
}

/// Answer to an [`Offer`]. Blockers are only seen for a dry run; a real offer with blockers is refused with an error that lists them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OfferAccepted {
    /// Where each disk would lie; disks that no datastore can be found for are missing.
    pub disks: Vec<DiskPlacement>,
    /// Everything that stands in the way.
    pub blockers: Vec<String>,
}

/// How a move ended, by the word of the source's agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerdictAnswer {
    /// The word.
    pub verdict: Verdict,
}

/// A host asks to become one of the cluster. The connection is TLS, checked by the fingerprint in the token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The secret part of the token.
    pub token: String,
    /// Name the host wants.
    pub name: String,
    /// Address other agents will reach it at (`IP:PORT`).
    pub address: String,
    /// Certificate signing request (PEM). The private key stays with its host.
    pub csr_pem: String,
}

/// Answer to a [`JoinRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinAnswer {
    /// The signed certificate (PEM).
    pub cert_pem: String,
    /// The cluster authority's certificate (PEM).
    pub ca_pem: String,
    /// The hosts of the cluster, the one that answers included.
    pub hosts: Vec<HostAddress>,
}

/// Name and address of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostAddress {
    /// Its name.
    pub name: String,
    /// Its address (`IP:PORT`).
    pub address: String,
}
