//! The zero page of Linux' boot protocol.
//!
//! What never enters: PVH.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::{Error, Placed, memmap, place, put};
use crate::memory::GuestRam;

/// `hdr.boot_flag` and `hdr.header` ("HdrS") of a valid header, and "unknown boot loader".
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
/// A kernel without a header of its own (ELF) gets this alignment, which Linux' own default is below.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Writes the zero page, from the kernel's own setup header if it has one.
///
/// # Errors
/// [`Error::Room`].
pub(super) fn write(
    ram: &GuestRam,
    header: Option<setup_header>,
    cmdline: Placed,
    initrd: Option<Placed>,
    memmap: &[memmap::Entry],
) -> Result<(), Error> {
    let hdr = header.unwrap_or(setup_header { kernel_alignment: KERNEL_ALIGNMENT, ..Default::default() });
    let mut params = boot_params { hdr, ..Default::default() };
    params.acpi_rsdp_addr = place::RSDP;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = cmdline.address as u32;
    params.hdr.cmdline_size = cmdline.bytes as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.bytes as u32;
    }
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(memmap) {
        *slot = boot_e820_entry { addr: entry.address, size: entry.bytes, r#type: entry.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = memmap.len() as u8;
    put(ram, "the zero page", place::ZERO_PAGE, params.as_slice())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn fields_are_where_the_protocol_has_them() {
        let ram = GuestRam::new(64 << 20).unwrap();
        let map = memmap::memmap(ram.layout());
        let initrd = Placed { address: 0x300_0000, bytes: 77 };
        write(&ram, None, Placed { address: 0x2_0000, bytes: 9 }, Some(initrd), &map).unwrap();
        let read32 = |at: u64| ram.memory().read_obj::<u32>(GuestAddress(place::ZERO_PAGE + at)).unwrap();
        assert_eq!(read32(0x70), 0xe_0000, "ACPI's root pointer");
        assert_eq!(read32(0x202), HEADER_MAGIC);
        assert_eq!(read32(0x228), 0x2_0000);
        assert_eq!((read32(0x218), read32(0x21c)), (0x300_0000, 77));
        assert_eq!(read32(0x1e8) & 0xff, 3);
        assert_eq!(read32(0x2d0 + 2 * 20), 1 << 20);
    }
}
