//! The data path of a network interface: one thread a NIC, with its tap and its guest's rings.
//!
//! What lives here: the thread and its commands (`worker`, [`NetHandle`]), packets in and out (`receive`, `transmit`),
//! the control queue (`control`), the announcement of the MAC address (`announce`), and the host's side: taps and the
//! bridges they join (`attach`, `tap`, `sys`). What never enters: what packets mean, routes, addresses, migration, PCI.

mod announce;
mod attach;
mod control;
mod handle;
mod mac;
mod offloads;
mod receive;
mod sys;
mod tap;
mod transmit;
mod worker;

pub use attach::{AttachError, Attachment};
pub use handle::NetHandle;
pub use mac::{BadMac, MacAddress};
pub use offloads::Offloads;
pub use tap::Tap;

pub(crate) use handle::Started;
pub(crate) use receive::check_pending;
pub(crate) use worker::Link;

use std::fs::File;
use std::io;

/// Bytes of `struct virtio_net_hdr_v1`, which precedes every packet (virtio 1.2 section 5.1.6).
const HEADER_BYTES: usize = 12;
/// Bytes of an Ethernet header; what is shorter is no packet.
const ETHERNET_BYTES: usize = 14;
/// Most bytes of a packet with its header: 64 KiB of a segmented packet and room for what precedes it.
const MAX_PACKET: usize = HEADER_BYTES + (64 << 10) + 64;

/// The host's end of a guest's wire: a [`Tap`], in tests a socket.
///
/// Its file is non-blocking; each read takes one packet and each write sends one, header included. The header is that of
/// virtio 1.x, little-endian.
pub trait Backend: Send {
    /// Where packets are read and written.
    fn file(&self) -> &File;
    /// The offloads it can do.
    fn offloads(&self) -> Offloads;
    /// From now on packets read may need what `offloads` has of the guest's side, and no more.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
}
