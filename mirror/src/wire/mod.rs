//! Bytes between the two sides of a move. Every connection starts with a [`hello`]; after it, [`frame`]s.
//!
//! ```text
//! source                                   target
//!   hello(role, versions, ticket, epoch)  ----->            one connection a role:
//!                                         <-----  answer    control, page stream i, disk i
//!   frame frame frame ...                 <---->  frame ...
//! ```
//! When any of these connections is lost before the pause, the source makes all of them anew under the next epoch, and the target says
//! how many page frames and block operations it has: the move goes on from there ([`crate::ledger`]).
//! A frame is `header | head | data`: the head is small, checksummed and decoded here; data is bulk (pages, blocks) that drivers
//! move straight between guest memory or disk buffers and the socket. A new kind of frame, message or role is a new number under
//! the next version; a receiver refuses numbers it does not know.
//! Lives here: layouts, caps, checks. Never enters: sockets.

pub mod blocks;
pub mod control;
pub mod frame;
pub mod hello;
pub mod pages;

/// Why bytes from the other side were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not one of our peers, or out of step.
    #[error("the peer does not speak the vmove protocol (bad magic)")]
    BadMagic,
    /// No common version.
    #[error(
        "no common protocol version: this side speaks {ours_min} to {ours_max}, the peer {theirs_min} to {theirs_max}"
    )]
    NoCommonVersion {
        /// Oldest version here.
        ours_min: u16,
        /// Newest version here.
        ours_max: u16,
        /// Oldest version there.
        theirs_min: u16,
        /// Newest version there.
        theirs_max: u16,
    },
    /// The peer refused the hello.
    #[error("the peer refused the connection: {0}")]
    Refused(&'static str),
    /// A number that this version does not define.
    #[error("unknown {what} {value}")]
    Unknown {
        /// Kind of number.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Longer than the cap.
    #[error("{what} of {bytes} bytes is over the limit of {limit}")]
    TooLong {
        /// Which part.
        what: &'static str,
        /// Its length.
        bytes: u64,
        /// The cap.
        limit: u64,
    },
    /// Contradicts itself or what was agreed.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// Damaged on the way.
    #[error("checksum of {0} does not match: damaged on the way")]
    Checksum(&'static str),
}

/// Cursor over a head that fails instead of panicking.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(WireError::Malformed("frame head: cut short"))?;
        self.0 = rest;
        Ok(head)
    }

    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().unwrap_or_default()))
    }

    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().unwrap_or_default()))
    }

    pub fn end(self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Malformed("frame head: bytes left over")) }
    }
}
