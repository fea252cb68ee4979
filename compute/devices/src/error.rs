//! The one error type of the crate.

use std::io;

use crate::state::StateError;

/// What went wrong, and on which device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// An operating system call that a device needs failed.
    #[error("{device}: cannot {action}: {source}")]
    Io {
        /// The device's name.
        device: String,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The disk image could not be opened, flushed or closed.
    #[error("disk {disk}: cannot {action}: {source}")]
    Image {
        /// The disk's name.
        disk: String,
        /// What was tried.
        action: &'static str,
        /// The storage layer's answer.
        source: vmove_storage::BlockError,
    },
    /// The device's thread has ended; nothing can be asked of it any more.
    #[error("{device}: its thread has ended")]
    Gone {
        /// The device's name.
        device: String,
    },
    /// The bus has no slot, no address room, or a name is taken.
    #[error("cannot add {device} to the PCI bus: {reason}")]
    BusFull {
        /// The device's name.
        device: String,
        /// Why.
        reason: &'static str,
    },
    /// The driver enabled a queue that cannot be served.
    #[error("{device}: queue {index} refused: {reason}")]
    BadQueue {
        /// The device's name.
        device: String,
        /// The queue's number.
        index: u16,
        /// Which size or address is wrong.
        reason: String,
    },
    /// A saved state could not be decoded, or left something over.
    #[error(transparent)]
    State(#[from] StateError),
    /// A saved state decodes but says something that cannot be true of this device.
    #[error("saved state of {device} refused: {reason}")]
    BadState {
        /// The device's name.
        device: String,
        /// The field and its value.
        reason: String,
    },
}

impl DeviceError {
    /// An [`Io`](Self::Io) error for `map_err`.
    pub(crate) fn io(device: &str, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let device = device.to_owned();
        move |source| Self::Io { device, action, source }
    }

    /// A refused field of a saved state.
    pub(crate) fn bad_state(device: &str, reason: impl Into<String>) -> Self {
        Self::BadState { device: device.to_owned(), reason: reason.into() }
    }
}
