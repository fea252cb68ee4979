//! A PCI bus with one host bridge and virtio functions on it.
//!
//! What lives here: configuration space, base addresses, MSI-X, the dispatch of port and memory accesses to
//! functions. What never enters: what a device does with its queues (`virtio`), interrupt controllers.

mod bus;
mod config;
mod function;
mod msix;

pub use bus::{BusState, PciBus};
pub use config::ConfigState;
pub use function::FunctionState;
pub use msix::{MsixEntry, MsixState};

pub(crate) use msix::Msix;
