//! Virtio 1.2 devices, apart from the bus they sit on.
//!
//! What lives here: the contract between transport and device ([`VirtioDevice`]), the registers of the PCI transport
//! (`transport`), rings and chains, the block, network and entropy devices. What never enters: PCI configuration space,
//! image formats.

use std::sync::{Arc, mpsc};

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::{DeviceError, SharedMemory};

pub mod blk;
mod chain;
mod interrupt;
pub mod net;
mod queue;
pub mod rng;
mod transport;

pub use interrupt::{Interrupt, InterruptState};
pub use transport::{QueueRegisters, TransportState};

pub use chain::GuestSlice;
pub(crate) use chain::{BadChain, Buffers, Chain};
pub(crate) use queue::{DeviceQueue, RingError};
pub(crate) use transport::{COMMON_BYTES, Transport};

/// A device as the transport drives it. One owner calls it at a time; the device's own thread serves the queues.
pub trait VirtioDevice: Send {
    /// The virtio device id (virtio 1.2 section 5): 1 for network, 2 for block, 4 for entropy.
    fn id(&self) -> u16;
    /// The PCI class code, 24 bits.
    fn class(&self) -> u32;
    /// The device's own feature bits (0 to 23). The transport adds what it does for all.
    fn features(&self) -> u64;
    /// The largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// The device-specific configuration as it is now, read-only for the guest. Its length never changes.
    fn config(&self) -> Vec<u8>;
    /// The memory the rings lie in.
    fn memory(&self) -> &SharedMemory;
    /// The driver is ready: serve these queues, at once or after [`resume`](Self::resume) if paused.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// Stops serving, returns when every request in flight has ended and the queues are let go (device reset).
    fn deactivate(&mut self) -> Result<(), DeviceError>;
    /// Where each active queue stands. Meaningful while paused.
    fn positions(&self) -> Result<Vec<(u16, RingPosition)>, DeviceError>;
    /// Starts to stop taking requests; the pause holds once [`Pausing::wait`] returned.
    fn pause(&self) -> Result<Pausing, DeviceError>;
    /// Goes on, looking at the queues again even without a notification.
    fn resume(&self) -> Result<(), DeviceError>;
    /// What the device knows beyond its transport. Meaningful while paused.
    fn save(&self) -> Result<DeviceState, DeviceError>;
    /// Compares or takes what [`save`](Self::save) said on the other side.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError>;
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// All features the driver accepted.
    pub features: u64,
    /// The queues the driver enabled.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the guest.
    pub interrupt: Arc<Interrupt>,
}

/// A queue whose rings were found inside guest memory.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// The rings.
    pub queue: Queue,
    /// Counts the guest's notifications.
    pub kick: EventFd,
}

/// Where a device stands in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPosition {
    /// Index of the next chain to take from the available ring.
    pub next_avail: u16,
    /// Index of the next element to put into the used ring.
    pub next_used: u16,
}

/// What a device saves beyond its transport. Plain and public: untrusted until restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A block device.
    Block {
        /// Its size in sectors of 512 bytes; must be the same on both sides.
        sectors: u64,
        /// Whether writes are refused; must be the same on both sides.
        read_only: bool,
        /// What GET_ID answers; must be the same on both sides.
        serial: String,
    },
    /// An entropy device, which remembers nothing.
    Entropy,
    /// A network device.
    Net {
        /// Its MAC address; must be the same on both sides.
        mac: [u8; 6],
        /// A packet with its header that was taken from the wire and found no room in the guest's ring yet.
        pending: Option<Vec<u8>>,
    },
}

impl DeviceState {
    /// The kind of device, in a sentence about a state that does not fit.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Block { .. } => "a block device",
            Self::Entropy => "an entropy device",
            Self::Net { .. } => "a network device",
        }
    }
}

/// A pause under way.
#[must_use = "the pause holds only after wait()"]
pub struct Pausing {
    device: String,
    done: Option<mpsc::Receiver<()>>,
}

impl Pausing {
    /// A pause that holds when `done` gets its message.
    pub(crate) fn new(device: &str, done: mpsc::Receiver<()>) -> Self {
        Self { device: device.to_owned(), done: Some(done) }
    }

    /// Returns once no request is in flight and every one taken is in the used ring.
    pub fn wait(mut self) -> Result<(), DeviceError> {
        match self.done.take() {
            Some(done) => done.recv().map_err(|_| DeviceError::Gone { device: self.device.clone() }),
            None => Ok(()),
        }
    }
}
