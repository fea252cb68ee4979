//! Putting a kernel into guest RAM, and the registers it starts with.
//!
//! What never enters: KVM calls, devices. An ELF file with a PVH note starts in 32-bit protected mode with
//! `hvm_start_info` (Xen's PVH boot ABI); an ELF file without one, and a bzImage, start in 64-bit mode with the zero page
//! in RSI (Linux' boot protocol, Documentation/arch/x86/boot.rst).

mod acpi;
mod linux;
mod load;
mod memmap;
mod pvh;
mod registers;

use std::io;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_sregs};

pub use load::check_kernel;

use crate::memory::GuestRam;
pub(crate) use acpi::{RESET_CONTROL, RESET_CPU};

/// What can go wrong before the guest's first instruction.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file is no kernel that can be started here.
    #[error("{} is not a kernel that can be booted: {why}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Something does not fit into the guest's RAM.
    #[error("no room for {what} ({bytes} bytes) in guest memory")]
    Room {
        /// What was to be put there.
        what: String,
        /// Its size.
        bytes: u64,
    },
    /// The command line cannot be passed on.
    #[error("kernel command line {0}")]
    Cmdline(&'static str),
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// ELF file or bzImage.
    pub kernel: &'a Path,
    /// Initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// Number of vCPUs, for the tables that tell the kernel of them.
    pub vcpus: u8,
}

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging; RBX = address of `hvm_start_info`.
    Pvh {
        /// Physical address of the first instruction.
        rip: u64,
    },
    /// 64-bit mode with the first 4 GiB mapped one to one; RSI = address of the zero page.
    Linux64 {
        /// Physical address of the first instruction.
        rip: u64,
    },
}

impl Entry {
    /// Sets the registers of the first vCPU. `regs` and `sregs` are those of a vCPU after reset.
    pub fn set_registers(self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        match self {
            Self::Pvh { rip } => registers::protected_mode(rip, regs, sregs),
            Self::Linux64 { rip } => registers::long_mode(rip, regs, sregs),
        }
    }
}

/// Loads kernel, initial RAM disk and all boot structures into zeroed RAM.
///
/// # Errors
/// Names the file that is bad, or what has no room.
pub fn load(ram: &GuestRam, source: BootSource<'_>) -> Result<Entry, Error> {
    let kernel = load::kernel(ram, source.kernel)?;
    let cmdline = load::cmdline(ram, source.cmdline)?;
    let initrd =
        source.initrd.map(|path| load::initrd(ram, path, kernel.end, kernel.initrd_limit())).transpose()?;
    let memmap = memmap::memmap(ram.layout());
    acpi::write(ram, source.vcpus)?;
    registers::write_tables(ram)?;
    match kernel.kind {
        load::Kind::Pvh { rip } => {
            pvh::write(ram, cmdline, initrd, &memmap)?;
            Ok(Entry::Pvh { rip })
        }
        load::Kind::Linux64 { rip, header } => {
            linux::write(ram, header.map(|header| *header), cmdline, initrd, &memmap)?;
            Ok(Entry::Linux64 { rip })
        }
    }
}

/// A run of guest RAM in use, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    address: u64,
    bytes: u64,
}

/// Where things lie below 1 MiB. Kernels are loaded at 1 MiB or above.
mod place {
    pub const GDT: u64 = 0x500;
    pub const START_INFO: u64 = 0x6000;
    pub const MODULES: u64 = 0x6100;
    pub const MEMMAP: u64 = 0x6200;
    pub const ZERO_PAGE: u64 = 0x7000;
    pub const STACK: u64 = 0x8ff0;
    pub const PML4: u64 = 0x9000;
    pub const PDPT: u64 = 0xa000;
    pub const PAGE_DIRECTORIES: u64 = 0xb000;
    pub const CMDLINE: u64 = 0x2_0000;
    /// End of conventional memory; from here to 1 MiB a PC has its firmware.
    pub const CONVENTIONAL_END: u64 = 0x9_fc00;
    /// Start of the firmware's segments, where kernels look for ACPI unless they are told.
    pub const RSDP: u64 = 0xe_0000;
    pub const ACPI_TABLES: u64 = 0xe_0040;
    pub const HIGH: u64 = 0x10_0000;
}

/// Writes bytes into guest RAM.
fn put(ram: &GuestRam, what: &str, address: u64, bytes: &[u8]) -> Result<(), Error> {
    use vm_memory::{Bytes, GuestAddress};
    ram.memory()
        .write_slice(bytes, GuestAddress(address))
        .map_err(|_| Error::Room { what: what.to_owned(), bytes: bytes.len() as u64 })
}
