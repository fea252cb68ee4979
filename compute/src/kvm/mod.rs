//! KVM: opening it, VMs, vCPU threads, CPUID, and the saved state of everything that lives in the kernel.
//!
//! What never enters: device models (they are behind [`Bus`]), boot protocols, migration.

mod cpuid;
mod emulation;
mod features;
mod hypervisor;
mod new_vcpus;
mod state;
mod vcpu;
mod vcpu_state;
mod vm;
mod xsave;

use std::io;

use vmove_devices::state::StateError;

pub use features::{host_features, missing_features};
pub use hypervisor::Hypervisor;
pub(crate) use new_vcpus::NewVcpus;
pub use state::VmState;
pub use vcpu::{RunState, Vcpu};
pub use vcpu_state::VcpuState;
pub use vm::{IoEvents, IrqLine, Msi, Vm};

/// What can go wrong with KVM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` could not be opened.
    #[error("cannot open /dev/kvm: {source} ({hint})")]
    Open {
        /// What the host said.
        source: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// This KVM lacks something that a VM needs.
    #[error("this host's KVM has no {0}")]
    Missing(String),
    /// A call to KVM failed.
    #[error("KVM: cannot {what}: {source}")]
    Call {
        /// What was tried, and on what.
        what: String,
        /// What KVM said.
        source: io::Error,
    },
    /// A saved state that this code did not write, or that this host cannot take.
    #[error("saved state refused: {0}")]
    BadState(String),
    /// A section of a saved state could not be read or written.
    #[error(transparent)]
    Section(#[from] StateError),
    /// The guest was started with CPU features that this host lacks.
    #[error("this host's CPU or KVM lacks features that the guest uses: {0}")]
    Features(String),
    /// A vCPU is not in a state that allows this.
    #[error("vCPU {id}: {what}")]
    Vcpu {
        /// Number of the vCPU.
        id: u8,
        /// What was tried and why not.
        what: String,
    },
}

impl Error {
    /// Wraps what KVM said with what was tried.
    fn call(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let what = what.into();
        move |source| Self::Call { what, source: source.into() }
    }
}

/// Why a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// It powered itself off.
    Shutdown,
    /// It asked for a reset, or a triple fault reset it.
    Reset,
    /// It cannot go on: an instruction KVM cannot run, a failed entry.
    Error(String),
}

/// The guest's view of everything outside its RAM. Called from all vCPU threads.
pub trait Bus: Send + Sync {
    /// One access of 1, 2 or 4 bytes to an I/O port.
    fn io_read(&self, port: u16, data: &mut [u8]);
    /// One access of 1, 2 or 4 bytes; says so if the guest ends itself by it.
    fn io_write(&self, port: u16, data: &[u8]) -> Option<ExitReason>;
    /// One access of 1 to 8 bytes outside RAM.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// One access of 1 to 8 bytes outside RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Told once for each vCPU that ends by itself. Called from the vCPU's thread.
pub trait ExitListener: Send + Sync {
    /// vCPU `id` has ended and runs no more.
    fn ended(&self, id: u8, reason: ExitReason);
}
