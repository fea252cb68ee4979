//! The machine's ports and addresses: who answers which.
//!
//! What never enters: what a device does with an access.

use vmove_devices::{PciBus, Serial};

use crate::kvm::{Bus, ExitReason};

/// Keyboard controller: data and command.
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
/// Its command that pulses the CPU's reset line.
const PULSE_RESET: u8 = 0xfe;
/// Reset control register of PC chipsets; bit 2 resets the CPU.
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CPU: u8 = 1 << 2;
/// Power management control of the QEMU and Bochs chipset, where guests without ACPI tables know to switch off; bit 13
/// is "sleep enable".
const POWER_CONTROL: u16 = 0x604;
const SLEEP_ENABLE: u16 = 1 << 13;

/// All devices of a machine.
pub(super) struct MachineBus {
    pub pci: PciBus,
    pub serial: Serial,
}

impl Bus for MachineBus {
    fn io_read(&self, port: u16, data: &mut [u8]) {
        match port {
            _ if Serial::claims(port) => self.serial.io_read(port, data),
            PciBus::FIRST_PORT..=PciBus::LAST_PORT => self.pci.io_read(port, data),
            // A keyboard controller with nothing to say, so that no guest waits for one to get ready.
            KEYBOARD_DATA | KEYBOARD_COMMAND => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    fn io_write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        match (port, data) {
            _ if Serial::claims(port) => self.serial.io_write(port, data),
            (KEYBOARD_COMMAND, [PULSE_RESET]) => return Some(ExitReason::Reset),
            (RESET_CONTROL, [value]) if value & RESET_CPU != 0 => return Some(ExitReason::Reset),
            (POWER_CONTROL, [low, high, ..]) if u16::from_le_bytes([*low, *high]) & SLEEP_ENABLE != 0 => {
                return Some(ExitReason::Shutdown);
            }
            (PciBus::FIRST_PORT..=PciBus::LAST_PORT, _) => self.pci.io_write(port, data),
            // Nobody there, as on a PC: POST codes (0x80), DMA, and the like.
            _ => {}
        }
        None
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if !self.pci.mmio_read(address, data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if !self.pci.mmio_write(address, data) {
            tracing::trace!(address, "a write to nowhere");
        }
    }
}
