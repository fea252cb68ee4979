//! The MP table (Intel MultiProcessor Specification 1.4): tells a kernel without ACPI of its CPUs and the I/O APIC.
//!
//! What never enters: KVM's interrupt controllers themselves, whose fixed wiring this describes.

use super::{Error, place, put};
use crate::memory::GuestRam;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Version registers of KVM's local and I/O APIC.
const APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
/// ISA lines.
const LINES: u8 = 16;
/// Most that is written; room for 190 vCPUs.
const ROOM: usize = 4096;

/// Writes the floating pointer and the table behind it.
///
/// # Errors
/// [`Error::Room`] with more vCPUs than the table has room for.
pub(super) fn write(ram: &GuestRam, vcpus: u8) -> Result<(), Error> {
    let table = table(vcpus);
    let mut bytes = Vec::new();
    // Floating pointer structure (4.1): signature, address, length / 16, revision 1.4, checksum, features.
    bytes.extend(b"_MP_");
    bytes.extend((place::MP_TABLE as u32 + 16).to_le_bytes());
    bytes.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes.extend(table);
    if bytes.len() > ROOM {
        return Err(Error::Room { what: format!("the table of {vcpus} vCPUs"), bytes: bytes.len() as u64 });
    }
    put(ram, "the MP table", place::MP_TABLE, &bytes)
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic = vcpus;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    // Processors (4.3.1): enabled, the first is the boot processor; family 6 with FPU and APIC.
    for id in 0..vcpus {
        entry(&[
            0,
            id,
            APIC_VERSION,
            1 | u8::from(id == 0) << 1,
            0,
            6,
            0,
            0,
            1,
            2,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
    }
    // Buses (4.3.2): PCI first, so that its number is 0.
    entry(b"\x01\x00PCI   ");
    entry(b"\x01\x01ISA   ");
    // I/O APIC (4.3.3).
    let address = IO_APIC.to_le_bytes();
    entry(&[2, io_apic, IO_APIC_VERSION, 1, address[0], address[1], address[2], address[3]]);
    // Interrupts of the ISA bus (4.3.4): line to pin one to one, the timer's too, as KVM wires them unless told
    // otherwise. Line 2 is the cascade of the PICs.
    for line in (0..LINES).filter(|line| *line != 2) {
        entry(&[3, 0, 0, 0, 1, line, io_apic, line]);
    }
    // Local interrupts (4.3.5): ExtINT to LINT0 and NMI to LINT1 of all.
    entry(&[4, 3, 0, 0, 1, 0, 0xff, 0]);
    entry(&[4, 1, 0, 0, 1, 0, 0xff, 1]);

    let mut table = b"PCMP".to_vec();
    table.extend((44 + entries.len() as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"VMOVE   ");
    table.extend(b"VMOVE       ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_true() {
        let ram = GuestRam::new(8 << 20).unwrap();
        write(&ram, 3).unwrap();
        let mut bytes = [0_u8; ROOM];
        ram.memory().read_slice(&mut bytes, GuestAddress(place::MP_TABLE)).unwrap();
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum(&bytes[..16]), 0);
        let length = usize::from(u16::from_le_bytes([bytes[20], bytes[21]]));
        assert_eq!(sum(&bytes[16..16 + length]), 0);
        let count = u16::from_le_bytes([bytes[16 + 34], bytes[16 + 35]]);
        assert_eq!(usize::from(count), 3 + 2 + 1 + 15 + 2);
        assert_eq!(length, 44 + 3 * 20 + 20 * 8);
    }

    #[test]
    fn too_many_vcpus_have_no_room() {
        let ram = GuestRam::new(8 << 20).unwrap();
        assert!(write(&ram, 128).is_ok());
        assert!(matches!(write(&ram, 255), Err(Error::Room { .. })));
    }
}
