//! The machine's ports and addresses: who answers which.
//!
//! What never enters: what a device does with an access.

use vmove_devices::{PciBus, Power, PowerWish, Serial};

use crate::boot::{RESET_CONTROL, RESET_CPU};
use crate::kvm::{Bus, ExitReason};

/// Keyboard controller: data and command.
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
/// Its command that pulses the CPU's reset line.
const PULSE_RESET: u8 = 0xfe;
/// All devices of a machine.
pub(super) struct MachineBus {
    pub pci: PciBus,
    pub serial: Serial,
    pub power: Power,
}

impl Bus for MachineBus {
    fn io_read(&self, port: u16, data: &mut [u8]) {
        match port {
            _ if Serial::claims(port) => self.serial.io_read(port, data),
            _ if Power::claims(port) => self.power.io_read(port, data),
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
            _ if Power::claims(port) => match self.power.io_write(port, data) {
                PowerWish::Off => return Some(ExitReason::Shutdown),
                PowerWish::None => {}
            },
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
