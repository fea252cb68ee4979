//! What a machine is made of.
//!
//! What never enters: names of VMs, hosts, datastores.

use std::path::PathBuf;

use vmove_devices::DiskHandle;
use vmove_devices::net::{Attachment, MacAddress};
use vmove_storage::OpenOptions;

use super::Error;
use crate::kvm::Hypervisor;

/// Most vCPUs of a machine: APIC ids and the ACPI tables have room for more, nobody has tried.
const MAX_VCPUS: u8 = 64;

/// What a machine is made of.
#[derive(Clone)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u8,
    /// RAM in bytes, a multiple of 1 MiB from 8 MiB on.
    pub memory_bytes: u64,
    /// ELF file or bzImage; only a machine restored from a state does without.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Disks, in the order the guest sees them.
    pub disks: Vec<DiskConfig>,
    /// Network interfaces, in the order the guest sees them.
    pub networks: Vec<NetConfig>,
}

/// One disk of a machine.
#[derive(Clone)]
pub struct DiskConfig {
    /// Unique in the machine; the first 20 bytes are what the guest reads as the disk's serial number.
    pub name: String,
    /// Where its bytes are.
    pub source: DiskSource,
}

/// Where a disk's bytes are.
#[derive(Clone)]
pub enum DiskSource {
    /// An image to be opened.
    Image {
        /// The file.
        path: PathBuf,
        /// How to open it.
        options: OpenOptions,
    },
    /// A disk whose thread runs already, such as the target of a mirror.
    Open(DiskHandle),
}

/// One network interface of a machine.
#[derive(Clone)]
pub struct NetConfig {
    /// Unique in the machine.
    pub name: String,
    /// The guest's address.
    pub mac: MacAddress,
    /// What of the host it is attached to.
    pub attachment: Attachment,
    /// Goes into the name of a tap that is made for it, for people to recognise.
    pub owner: String,
}

impl MachineConfig {
    /// Checks what no later step would give a clear answer to.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(super) fn check(&self, hypervisor: &Hypervisor) -> Result<(), Error> {
        let most = hypervisor.max_vcpus().min(usize::from(MAX_VCPUS));
        if self.vcpus == 0 || usize::from(self.vcpus) > most {
            return Err(Error::Config(format!("{} vCPUs; 1 to {most} are possible here", self.vcpus)));
        }
        Ok(())
    }
}
