//! The boot structures of the PVH ABI (Xen, `docs/misc/pvh.pandoc` and `arch-x86/hvm/start_info.h`).
//!
//! What never enters: Linux' zero page.

use super::{Error, Placed, memmap, place, put};
use crate::memory::GuestRam;

/// `hvm_start_info.magic`.
const MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const VERSION: u32 = 1;

/// Writes `hvm_start_info`, its module list and memory map.
///
/// # Errors
/// [`Error::Room`].
pub(super) fn write(
    ram: &GuestRam,
    cmdline: Placed,
    initrd: Option<Placed>,
    memmap: &[memmap::Entry],
) -> Result<(), Error> {
    let mut map = Vec::new();
    for entry in memmap {
        map.extend(entry.address.to_le_bytes());
        map.extend(entry.bytes.to_le_bytes());
        map.extend((entry.kind as u32).to_le_bytes());
        map.extend([0; 4]);
    }
    put(ram, "the memory map", place::MEMMAP, &map)?;
    let mut modules = Vec::new();
    if let Some(initrd) = initrd {
        for field in [initrd.address, initrd.bytes, 0, 0] {
            modules.extend(field.to_le_bytes());
        }
        put(ram, "the module list", place::MODULES, &modules)?;
    }
    let mut info = Vec::new();
    for field in [MAGIC, VERSION, 0, u32::from(initrd.is_some())] {
        info.extend(field.to_le_bytes());
    }
    let module_list = if initrd.is_some() { place::MODULES } else { 0 };
    for field in [module_list, cmdline.address, place::RSDP, place::MEMMAP] {
        info.extend(field.to_le_bytes());
    }
    info.extend((memmap.len() as u32).to_le_bytes());
    info.extend([0; 4]);
    put(ram, "the PVH start info", place::START_INFO, &info)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn fields_are_where_the_abi_has_them() {
        let ram = GuestRam::new(64 << 20).unwrap();
        let map = memmap::memmap(ram.layout());
        write(&ram, Placed { address: 0x2_0000, bytes: 9 }, None, &map).unwrap();
        let read = |at: u64| ram.memory().read_obj::<u64>(GuestAddress(place::START_INFO + at)).unwrap();
        assert_eq!(read(0), u64::from(VERSION) << 32 | u64::from(MAGIC));
        assert_eq!(read(16), 0, "no modules");
        assert_eq!(read(24), 0x2_0000);
        assert_eq!(read(32), 0xe_0000, "ACPI's root pointer");
        assert_eq!(read(40), place::MEMMAP);
        assert_eq!(read(48), 3);
        let last: u64 = ram.memory().read_obj(GuestAddress(place::MEMMAP + 2 * 24)).unwrap();
        assert_eq!(last, 1 << 20);
    }
}
