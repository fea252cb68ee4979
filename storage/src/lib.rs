//! Block devices of vmove: qcow2 and raw images on `io_uring`, datastores, image locks, ownership stamps.
//!
//! What lives here: everything that knows how bytes of a virtual disk lie in files of this host.
//! What never enters: networks, guests, migration decisions.
//!
//! Map of the crate:
//! - [`ring`]: one `io_uring` and one single-threaded executor per disk thread
//! - [`device`]: [`BlockDevice`], the one way guest data is read or written ([`file`] is its bottom half)
//! - [`header`], [`image`], [`check`], [`repair`]: what an image file claims, making one like it, walking its tables,
//!   putting its refcounts right
//! - [`lock`], [`stamp`]: who may open an image now, and at which generation
//! - [`datastore`], [`journal_file`]: directories of images, and the synced log they are handed over with

pub mod buffer;
pub mod check;
pub mod datastore;
pub mod device;
mod durable;
pub mod error;
mod faults;
pub mod file;
mod gate;
pub mod header;
pub mod image;
mod import;
pub mod journal_file;
pub mod lock;
mod open;
pub mod repair;
pub mod ring;
pub mod stamp;
mod thread_bound;

pub use buffer::AlignedBuf;
pub use check::{CheckReport, check};
pub use datastore::Datastore;
pub use device::{BlockDevice, BlockStatus, LayerStatus};
pub use error::{BlockError, Result};
pub use image::{BackingSpec, ImageFormat, ImageInfo, ImageSpec, create, info};
pub use imago::io_buffers::{IoVector, IoVectorMut};
pub use import::import;
pub use journal_file::{JournalFile, LockedFile, Medium, Place};
pub use lock::{ImageLock, LockMode};
pub use open::{BackingPolicy, OpenOptions, Owner};
pub use repair::repair;
pub use ring::Ring;
pub use stamp::{OwnerState, Stamp};
