//! Device models of a virtual machine: a PCI bus, virtio devices on it, a serial port, the power registers.
//!
//! What lives here: the registers a guest sees, the rings it shares, the threads that serve them, and their saved
//! state. What never enters: KVM, sockets, migration protocols, policy. The VMM gives in three small traits,
//! [`MsiSender`], [`Doorbells`] and [`InterruptLine`], what only a hypervisor can do; the mirror gives in one, [`disk::WriteTap`].
//!
//! Everything a guest or a saved state says is untrusted: it is checked where it enters and gives an error, a
//! bad status or `DEVICE_NEEDS_RESET`, never a panic.

use std::io;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vmm_sys_util::eventfd::EventFd;

pub mod disk;
mod error;
pub mod net;
pub mod pci;
mod power;
mod serial;
pub mod state;
pub mod virtio;

pub use disk::DiskHandle;
pub use error::DeviceError;
pub use net::NetHandle;
pub use pci::PciBus;
pub use power::{InterruptLine, Power, PowerState, PowerWish};
pub use serial::{ConsoleSink, Serial, SerialState};
pub use virtio::blk::Block;
pub use virtio::net::Net;
pub use virtio::rng::Rng;
pub use virtio::{Pausing, VirtioDevice};

/// Guest RAM. Every write the devices make through it marks its 4 KiB pages dirty, which a live migration adds to
/// the hypervisor's own dirty log.
pub type GuestMemory = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// Guest RAM shared by vCPUs and device threads.
pub type SharedMemory = Arc<GuestMemory>;

/// Delivers a message-signalled interrupt to the guest: `KVM_SIGNAL_MSI` in the VMM, a recorder in tests.
pub trait MsiSender: Send + Sync {
    /// Sends the message `data` to `address`. Called from any thread, so it must not wait for a vCPU.
    fn send(&self, address: u64, data: u32) -> io::Result<()>;
}

/// Connects the addresses a guest writes to notify a queue with event counters: ioeventfd in the VMM.
///
/// A connected address costs no exit to user space. A device works without: writes that reach
/// [`PciBus::mmio_write`] notify the queue as well.
pub trait Doorbells: Send + Sync {
    /// From now on a guest's write of any width to `address` adds to `kick`.
    fn connect(&self, address: u64, kick: &EventFd) -> io::Result<()>;
    /// Undoes a successful [`connect`](Self::connect) with the same arguments.
    fn disconnect(&self, address: u64, kick: &EventFd) -> io::Result<()>;
}
