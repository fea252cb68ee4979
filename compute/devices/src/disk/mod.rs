//! The data path of a disk: one thread a disk, with its `io_uring`, its image and its guest's requests.
//!
//! What lives here: the thread and its commands (`worker`, [`DiskHandle`]), the execution of requests (`request`),
//! and the one place where guest I/O meets an image ([`DiskPath`]), where a mirror taps in. What never enters:
//! networks, the mirror itself, PCI.

mod handle;
mod path;
mod request;
mod worker;

pub use handle::{DiskHandle, DiskTask};
pub use path::{DiskPath, SizeMismatch, WriteTap, ZeroKind};
pub use worker::{DiskContext, Quiet};

pub use crate::virtio::GuestSlice;

pub(crate) use handle::Started;
pub(crate) use request::{DiskFacts, MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, SECTOR};
