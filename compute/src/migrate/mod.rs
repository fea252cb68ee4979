//! A move with real threads, rings and sockets: the driver of the engine in `vmove-mirror`.
//!
//! ```text
//! source: engine thread -- page stream thread ----TCP/TLS---- page stream thread -- engine thread :target
//!              |---------- disk thread + sender ----"-------- receiver + disk thread ----|
//!              |---------- control reader ----------"-------- control reader ------------|
//! ```
//! The engine decides on ranges, the workers here move the bytes. Threads live as long as their connection; what they know of the move
//! goes on with the next one, when connections were lost before the pause. A datastore-only move runs the same source engine against
//! a target thread in this process, over a socket pair.
//! Lives here: threads and sockets of one move. Never enters: decisions (they are the engine's), many VMs, policy.

mod audit;
mod blocks_in;
mod blocks_out;
mod detour;
mod disk_trouble;
mod images;
mod inbox;
mod journal;
mod link;
mod listen;
mod local;
mod pace;
mod pages_in;
mod pages_out;
mod report;
mod signal;
mod source;
pub(crate) mod state;
pub mod stop_points;
mod target;
mod tls;

use vmove_mirror::{source as source_engine, target as target_engine};

pub(crate) use blocks_out::BlocksOut;
pub use images::format as image_format;
pub use journal::{AppendError, VmJournal};
pub use listen::Ticket;
pub(crate) use local::LocalTarget;
pub(crate) use pace::Pace;
pub use report::ProgressBoard;
pub use source::{SourceEnd, SourceMove, at as placement};
pub use target::{TargetEnd, TargetMove};

/// Control messages a peer may send in one move; a whole move takes five. A mailbox is not for a peer to fill.
const MAX_MESSAGES: usize = 16;

/// Why a part of a move failed, in words that name what was tried.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// A socket.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Bytes that are no message of ours, or a refused hello.
    #[error("{what}: {source}")]
    Wire {
        /// Which connection.
        what: String,
        /// What is wrong.
        source: vmove_mirror::wire::WireError,
    },
    /// TLS: certificates, keys, handshake.
    #[error("TLS: {0}")]
    Tls(String),
    /// A disk.
    #[error("disk {disk}: {source}")]
    Disk {
        /// Its name.
        disk: String,
        /// What happened.
        source: vmove_storage::BlockError,
    },
    /// Devices or KVM.
    #[error("{0}")]
    Machine(String),
}

impl From<std::io::Error> for MoveError {
    fn from(source: std::io::Error) -> Self {
        Self::Io { what: "a connection of the move".into(), source }
    }
}

impl MoveError {
    /// What it means to a source: a connection that is gone may be made anew, anything else is no use repeating.
    pub(crate) fn into_source_event(self) -> source_engine::Event {
        match self {
            Self::Io { .. } => source_engine::Event::LinkLost(self.to_string()),
            error => source_engine::Event::Failed(error.to_string()),
        }
    }

    /// What it means to a target, the same way.
    pub(crate) fn into_target_event(self) -> target_engine::Event {
        match self {
            Self::Io { .. } => target_engine::Event::LinkLost(self.to_string()),
            // Nonsense from the peer, or something here that cannot be written.
            error => target_engine::Event::Failed(error.to_string()),
        }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn wire(what: &str) -> impl FnOnce(vmove_mirror::wire::WireError) -> Self {
        let what = what.to_string();
        move |source| Self::Wire { what, source }
    }

    pub(crate) fn disk(disk: &str) -> impl FnOnce(vmove_storage::BlockError) -> Self {
        let disk = disk.to_string();
        move |source| Self::Disk { disk, source }
    }
}
