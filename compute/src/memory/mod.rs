//! Guest RAM: where it lies, its one dense page numbering, which pages were ever touched and which are dirty.
//!
//! What never enters: sockets, page streams, decisions on what to send, device models.

mod dirty;
mod layout;
mod ram;
mod resident;

use std::io;

pub use dirty::DirtyLog;
pub use layout::{Layout, PAGE_SIZE, PCI_HOLE_END, PCI_HOLE_START, Range};
pub use ram::{GuestRam, is_zero};

/// What can go wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size asked for is not one that a guest can have.
    #[error("guest memory of {bytes} bytes is not possible: {why}")]
    Size {
        /// The size asked for, in bytes.
        bytes: u64,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The host gave no memory.
    #[error("cannot reserve {bytes} bytes of guest memory: {source}")]
    Map {
        /// The size asked for, in bytes.
        bytes: u64,
        /// What the mapping call said.
        source: vm_memory::mmap::FromRangesError,
    },
    /// Pages outside RAM, or a run that crosses the PCI hole.
    #[error("pages {page}..{page}+{count} are not one run of guest RAM")]
    Pages {
        /// First page index of the run.
        page: u64,
        /// Number of pages.
        count: u64,
    },
    /// `/proc/self/pagemap` could not be used.
    #[error("cannot read the page map of guest memory ({what}): {source}")]
    PageMap {
        /// The step that failed.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// KVM refused a change or a read of a dirty log.
    #[error("dirty log of guest memory at {gpa:#x}: {what}: {source}")]
    DirtyLog {
        /// First guest physical address of the range.
        gpa: u64,
        /// The step that failed.
        what: &'static str,
        /// What KVM said.
        source: io::Error,
    },
    /// The dirty log was started twice or read while it was off.
    #[error("the dirty log is {0}")]
    DirtyLogState(&'static str),
}
