//! The ACPI tables (ACPI 6.5, chapter 5): tell a kernel of its CPUs, interrupt wiring, PCI windows, console, and how to
//! switch off and reset.
//!
//! What never enters: the devices themselves. A machine has full ACPI, not the hardware-reduced kind: it has the PC's
//! timer and interrupt controllers, which kernels then use as on any PC, and the power button is a fixed feature. What
//! Linux needs for it: `CONFIG_ACPI` to switch off and reset; `CONFIG_INPUT` and `CONFIG_ACPI_BUTTON` for the button, and
//! `CONFIG_INPUT_EVDEV` for a program that waits for the key.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate,
    Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vmove_devices::{PciBus, Power, Serial};

use super::{Error, place, put};
use crate::memory::GuestRam;

/// Reset control register of PC chipsets, and the bit in it that resets the CPU.
pub(crate) const RESET_CONTROL: u16 = 0xcf9;
pub(crate) const RESET_CPU: u8 = 1 << 2;
/// The value that the tables name: reset the CPU, and the system with it.
const RESET_VALUE: u8 = RESET_CPU | 1 << 1;

const OEM: [u8; 6] = *b"VMOVE ";
const OEM_TABLE: [u8; 8] = *b"VMOVE   ";
const OEM_REVISION: u32 = 1;
/// Bytes of the header that all tables but RSDP and FACS have.
const HEADER: u32 = 36;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// MADT flags: there are two 8259 PICs as well.
const PCAT_COMPAT: u32 = 1;
/// MPS INTI flags: active high; and edge- or level-triggered.
const LEVEL_HIGH: u16 = 0b1101;
/// FADT boot flags (5.2.9.3): ISA devices; no VGA; no PCIe ASPM; no CMOS clock. Bit 1 stays clear: no keyboard.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5;
/// Latencies that say "no C2" and "no C3".
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// Writes all tables, the root pointer first.
///
/// # Errors
/// [`Error::Room`].
pub(super) fn write(ram: &GuestRam, vcpus: u8) -> Result<(), Error> {
    let mut tables = Tables { bytes: Vec::new() };
    // Linux wants the FACS at a multiple of 64; so all are.
    let facs = tables.add(&FACS::new());
    let dsdt = tables.add(&dsdt());
    let fadt = tables.add(&fadt(facs, dsdt));
    let madt = tables.add(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&xsdt);
    put(ram, "the ACPI root pointer", place::RSDP, &aml(&Rsdp::new(OEM, xsdt)))?;
    // Under 4 KiB with the most vCPUs; there is room for 127.
    put(ram, "the ACPI tables", place::ACPI_TABLES, &tables.bytes)
}

/// The tables one after the other, each at a multiple of 64 bytes.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let at = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(at, 0);
        table.to_aml_bytes(&mut self.bytes);
        place::ACPI_TABLES + at as u64
    }
}

fn aml(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// A table made piece by piece.
struct Whole(Sdt);

impl Aml for Whole {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

/// Fixed description: where the power registers are, how to reset, what a PC has and this machine has not.
fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    let port =
        |port: u16, bytes: u8, access| GAS::new(Space::SystemIo, bytes * 8, 0, access, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_32(dsdt as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Neither a sleep button nor the clock's alarm is a fixed feature; the power button is, by a flag not set.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (Power::IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(Power::EVENT_PORT).into();
    fadt.pm1_evt_len = Power::EVENT_BYTES;
    fadt.x_pm1a_evt_blk = port(Power::EVENT_PORT, Power::EVENT_BYTES, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(Power::CONTROL_PORT).into();
    fadt.pm1_cnt_len = Power::CONTROL_BYTES;
    fadt.x_pm1a_cnt_blk = port(Power::CONTROL_PORT, Power::CONTROL_BYTES, AccessSize::WordAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_CONTROL, 1, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// CPUs and interrupt controllers. ISA lines go to the I/O APIC's pins one to one, the timer's too, as KVM wires them
/// unless told otherwise; only the power registers' line is not edge-triggered.
fn madt(vcpus: u8) -> Whole {
    let mut madt = Sdt::new(*b"APIC", HEADER, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.dword(LOCAL_APIC);
    madt.dword(PCAT_COMPAT);
    for id in 0..vcpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut madt);
    }
    IoApic::new(vcpus, IO_APIC, 0).to_aml_bytes(&mut madt);
    // Interrupt source override (5.2.12.5): bus 0 is ISA.
    madt.vec(&[2, 10, 0, Power::IRQ as u8]);
    madt.dword(Power::IRQ);
    madt.word(LEVEL_HIGH);
    // Local APIC NMI (5.2.12.7): LINT1 of all CPUs.
    madt.vec(&[4, 6, 0xff, 0, 0, 1]);
    Whole(madt)
}

/// What devices there are that a kernel cannot find by itself. The functions on the PCI bus have no interrupt pins, so
/// it has no routing of them.
fn dsdt() -> Whole {
    let off = Name::new(
        "_S5_".into(),
        // PM1a and PM1b sleep type, two reserved.
        &Package::new(vec![&Power::OFF, &0_u8, &0_u8, &0_u8]),
    );
    let bridge = device(
        "PCI0",
        "PNP0A03",
        vec![
            &AddressSpace::new_bus_number(0_u16, 0),
            &IO::new(
                PciBus::FIRST_PORT,
                PciBus::FIRST_PORT,
                1,
                (PciBus::LAST_PORT - PciBus::FIRST_PORT + 1) as u8,
            ),
            &AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                PciBus::MMIO_START as u32,
                (PciBus::MMIO_END - 1) as u32,
                None,
            ),
        ],
    );
    let console = device(
        "COM1",
        "PNP0501",
        vec![
            &IO::new(Serial::PORT, Serial::PORT, 1, Serial::PORTS as u8),
            &Interrupt::new(true, true, false, false, Serial::IRQ),
        ],
    );
    let system = Scope::raw("_SB_".into(), [bridge, console].concat());
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml(&off));
    dsdt.append_slice(&system);
    Whole(dsdt)
}

/// The only device of its kind, with the resources it decodes.
fn device(name: &str, kind: &str, resources: Vec<&dyn Aml>) -> Vec<u8> {
    aml(&Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(kind)),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn read(ram: &GuestRam, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        ram.memory().read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at an address; its signature, length and checksum are right.
    fn table(ram: &GuestRam, at: u64, signature: &[u8; 4]) -> Vec<u8> {
        let length = word(&read(ram, at + 4, 4), 0) as usize;
        let table = read(ram, at, length);
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(&table), 0, "{}", String::from_utf8_lossy(signature));
        table
    }

    /// Follows the pointers as a kernel does: FADT and MADT.
    fn walk(ram: &GuestRam) -> (Vec<u8>, Vec<u8>) {
        let root = read(ram, place::RSDP, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
        let xsdt = table(ram, word(&root, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        (table(ram, word(&xsdt, 36), b"FACP"), table(ram, word(&xsdt, 44), b"APIC"))
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sums_to_zero() {
        let ram = GuestRam::new(8 << 20).unwrap();
        write(&ram, 3).unwrap();
        let (fadt, madt) = walk(&ram);
        assert_eq!(fadt.len(), 276);
        let facs = word(&fadt, 36);
        assert!(facs.is_multiple_of(64));
        assert_eq!(&read(&ram, facs, 4), b"FACS");
        assert_eq!(word(&fadt, 40), word(&fadt, 140), "both pointers to the DSDT");
        table(&ram, word(&fadt, 40), b"DSDT");
        assert_eq!((word(&fadt, 56), word(&fadt, 64)), (0x600, 0x604));
        assert_eq!(
            word(&fadt, 112) & (1 << 4 | 1 << 10 | 1 << 20),
            1 << 10,
            "fixed button, reset, not reduced"
        );
        assert_eq!(
            &fadt[116..129],
            &[1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6],
            "reset register and value"
        );
        assert_eq!(madt.len(), 44 + 3 * 8 + 12 + 10 + 6);
        assert_eq!(&madt[44 + 2 * 8..44 + 3 * 8], &[0, 8, 2, 2, 1, 0, 0, 0], "the third vCPU");
    }

    #[test]
    fn the_device_tree_names_what_the_machine_has() {
        let ram = GuestRam::new(8 << 20).unwrap();
        write(&ram, 1).unwrap();
        let dsdt = table(&ram, word(&walk(&ram).0, 40), b"DSDT");
        let has = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|window| window == bytes);
        // AML (ACPI 6.5, 20.2): name, package of four, zero each.
        assert!(has(b"\x08_S5_\x12\x0a\x04") || has(b"\x08_S5_\x12\x06\x04"), "{dsdt:x?}");
        for name in [b"PCI0", b"COM1", b"_CRS"] {
            assert!(has(name));
        }
        // The window's ends, and the console's ports.
        assert!(has(&[0, 0, 0, 0xe0, 0xff, 0xff, 0xbf, 0xfe]));
        assert!(has(&[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8]));
    }

    #[test]
    fn there_is_room_for_as_many_vcpus_as_a_machine_may_have() {
        let ram = GuestRam::new(8 << 20).unwrap();
        write(&ram, u8::MAX).unwrap();
        assert_eq!(walk(&ram).1.len(), 44 + 255 * 8 + 28);
    }
}
