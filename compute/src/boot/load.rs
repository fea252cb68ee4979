//! Reading kernel, command line and initial RAM disk into guest RAM, through `linux-loader`.
//!
//! What never enters: boot structures, registers.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::{Error, Placed, place, put};
use crate::memory::{GuestRam, PAGE_SIZE};

/// Largest kernel or initial RAM disk file.
const MAX_FILE: u64 = 2 << 30;
/// Longest command line, its closing zero included. Linux takes 2048.
const MAX_CMDLINE: usize = 4096;
/// A bzImage's 64-bit entry lies this far behind its load address (boot.rst, "64-bit boot protocol").
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// Where a bzImage says "HdrS" (boot.rst, "The real-mode kernel header").
const HEADER_AT: usize = 0x202;
/// xloadflags: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;

/// A kernel in RAM.
pub(super) struct Kernel {
    pub kind: Kind,
    /// First address behind it, its uninitialized data included.
    pub end: u64,
}

pub(super) enum Kind {
    Pvh { rip: u64 },
    Linux64 { rip: u64, header: Option<Box<setup_header>> },
}

impl Kernel {
    /// First address that its initial RAM disk must stay below.
    pub(super) fn initrd_limit(&self) -> u64 {
        match &self.kind {
            Kind::Linux64 { header: Some(header), .. } => u64::from(header.initrd_addr_max) + 1,
            _ => u64::MAX,
        }
    }
}

/// What a file of a kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Elf,
    BzImage,
}

/// The format that the first bytes of a file say.
fn format(head: &[u8]) -> Result<Format, &'static str> {
    if head.starts_with(b"\x7fELF") {
        // ELF-64, little-endian; e_machine is EM_X86_64 (System V ABI, AMD64 supplement, 4.1).
        return match (head.get(4..6), head.get(18..20)) {
            (Some([2, 1]), Some([62, 0])) => Ok(Format::Elf),
            _ => Err("it is an ELF file, but not for x86-64"),
        };
    }
    match head.get(HEADER_AT..HEADER_AT + 4) {
        Some(b"HdrS") => Ok(Format::BzImage),
        _ => Err("it is neither an ELF file nor a bzImage"),
    }
}

/// Opens a kernel and sees what it is.
fn open_kernel(path: &Path) -> Result<(File, Format), Error> {
    let file = open("kernel", path)?;
    let mut head = Vec::new();
    let unreadable = |source| Error::Read { what: "kernel", path: path.to_owned(), source };
    (&file).take(HEADER_AT as u64 + 4).read_to_end(&mut head).map_err(unreadable)?;
    let format = format(&head).map_err(|why| Error::Kernel { path: path.to_owned(), why: why.to_owned() })?;
    Ok((file, format))
}

/// Whether a file looks like a kernel: it can be read and its first bytes are those of one. What only loading it shows is found at the
/// start of the machine.
///
/// # Errors
/// [`Error::Read`] or [`Error::Kernel`] naming the file.
pub fn check_kernel(path: &Path) -> Result<(), Error> {
    open_kernel(path).map(drop)
}

/// Loads a kernel, whatever format it has.
///
/// # Errors
/// [`Error::Read`] or [`Error::Kernel`] naming the file.
pub(super) fn kernel(ram: &GuestRam, path: &Path) -> Result<Kernel, Error> {
    let refuse = |why: String| Error::Kernel { path: path.to_owned(), why };
    let (mut file, format) = open_kernel(path)?;
    let high = Some(GuestAddress(place::HIGH));
    let (kind, end) = match format {
        Format::Elf => {
            let loaded = Elf::load(&**ram.memory(), None, &mut file, high)
                .map_err(|error| refuse(explain(&error.to_string())))?;
            (elf_kind(&loaded), loaded.kernel_end)
        }
        Format::BzImage => {
            let loaded = BzImage::load(&**ram.memory(), None, &mut file, high)
                .map_err(|error| refuse(explain(&error.to_string())))?;
            bzimage_kind(&loaded).map_err(refuse)?
        }
    };
    let low_end = ram.layout().ranges()[0].len;
    if end > low_end {
        return Err(refuse(format!("it needs RAM up to {end:#x}, the guest has it up to {low_end:#x}")));
    }
    Ok(Kernel { kind, end })
}

fn elf_kind(loaded: &KernelLoaderResult) -> Kind {
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Kind::Pvh { rip: address.0 },
        _ => Kind::Linux64 { rip: loaded.kernel_load.0, header: None },
    }
}

fn bzimage_kind(loaded: &KernelLoaderResult) -> Result<(Kind, u64), String> {
    let header = loaded.setup_header.ok_or("it has no setup header")?;
    // Fields by value: the struct is packed.
    let (version, flags, init_size) = (header.version, header.xloadflags, header.init_size);
    if version < 0x020c || flags & XLF_KERNEL_64 == 0 {
        return Err("it has no 64-bit entry point (boot protocol 2.12 or later is needed)".to_owned());
    }
    // Where the kernel unpacks itself to (boot.rst, "init_size"): one that can be anywhere goes no lower than it likes to be.
    let (relocatable, alignment, preferred) =
        (header.relocatable_kernel, header.kernel_alignment, header.pref_address);
    let start = if relocatable == 0 {
        preferred
    } else {
        let lowest = loaded.kernel_load.0.max(preferred);
        lowest.checked_next_multiple_of(u64::from(alignment).max(1)).ok_or("its alignment makes no sense")?
    };
    let end = loaded.kernel_end.max(start.saturating_add(u64::from(init_size)));
    Ok((Kind::Linux64 { rip: loaded.kernel_load.0 + BZIMAGE_ENTRY_64, header: Some(Box::new(header)) }, end))
}

/// The loader's most likely complaint does not say that the guest is too small.
fn explain(error: &str) -> String {
    if error.contains("read kernel image") || error.contains("read compressed image") {
        format!("{error}; the file is cut short or the guest has too little RAM for it")
    } else {
        error.to_owned()
    }
}

/// Puts the command line, zero-terminated, where the kernel is told to find it.
///
/// # Errors
/// [`Error::Cmdline`] if it is too long or holds a zero byte.
pub(super) fn cmdline(ram: &GuestRam, cmdline: &str) -> Result<Placed, Error> {
    if cmdline.len() >= MAX_CMDLINE {
        return Err(Error::Cmdline("is longer than 4095 bytes"));
    }
    if cmdline.contains('\0') {
        return Err(Error::Cmdline("holds a zero byte"));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    put(ram, "the kernel command line", place::CMDLINE, &bytes)?;
    Ok(Placed { address: place::CMDLINE, bytes: bytes.len() as u64 })
}

/// Puts an initial RAM disk at the top of the RAM below 3 GiB, or below `limit`, and above `floor`.
///
/// # Errors
/// [`Error::Read`], or [`Error::Room`].
pub(super) fn initrd(ram: &GuestRam, path: &Path, floor: u64, limit: u64) -> Result<Placed, Error> {
    let unreadable = |source| Error::Read { what: "initial RAM disk", path: path.to_owned(), source };
    let mut file = open("initial RAM disk", path)?;
    let bytes =
        file.seek(SeekFrom::End(0)).and_then(|bytes| file.rewind().map(|()| bytes)).map_err(unreadable)?;
    let refuse = || Error::Room { what: format!("the initial RAM disk {}", path.display()), bytes };
    let end = ram.layout().ranges()[0].len.min(limit);
    let address = end.checked_sub(bytes).ok_or_else(refuse)? / PAGE_SIZE * PAGE_SIZE;
    if bytes > MAX_FILE || address < floor {
        return Err(refuse());
    }
    let mut slice = ram.memory().get_slice(GuestAddress(address), bytes as usize).map_err(|_| refuse())?;
    file.read_exact_volatile(&mut slice).map_err(|error| unreadable(io::Error::other(error)))?;
    Ok(Placed { address, bytes })
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    let unreadable = |source| Error::Read { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(unreadable(io::Error::other("it is not a regular file")));
    }
    if metadata.len() > MAX_FILE {
        return Err(unreadable(io::Error::other("it is larger than 2 GiB")));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_by_their_first_bytes() {
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(18, 0);
        elf.extend([62, 0]);
        assert_eq!(format(&elf), Ok(Format::Elf));
        // Cut short; for 32 bits; for another processor (EM_AARCH64).
        for bad in [&elf[..19], &[b"\x7fELF\x01", &elf[5..]].concat(), &[&elf[..18], &[183, 0]].concat()] {
            assert!(format(bad).is_err_and(|why| why.contains("x86-64")), "{bad:?}");
        }
        let mut bzimage = vec![0; HEADER_AT];
        bzimage.extend(b"HdrS");
        assert_eq!(format(&bzimage), Ok(Format::BzImage));
        for bad in [&bzimage[..HEADER_AT + 3], b"hello", b""] {
            assert!(format(bad).is_err_and(|why| why.contains("bzImage")), "{bad:?}");
        }
    }
}
