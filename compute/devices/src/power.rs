//! The fixed power registers of ACPI (ACPI 6.5, 4.8.3.1 and 4.8.3.2): power button, switching off.
//!
//! What lives here: the PM1 event and control blocks, the level of the interrupt they raise, saved state. What never
//! enters: the tables that tell a guest of them, the end of a machine.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::DeviceError;
use crate::state::{Section, Sections};

const SECTION: &str = "power";
const VERSION: u16 = 1;

/// PM1 status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 enable bits that a guest may set and that mean nothing here but for the button's: timer, global lock, sleep button, clock.
const ENABLES: u16 = 1 << 0 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
/// PM1 control: ACPI is on, which a guest cannot change here.
const ACPI_ON: u16 = 1;
/// PM1 control: bits 10 to 12 say which sleep; bit 13 starts it and reads as zero.
const SLEEP_TYPE: u16 = 7 << 10;
const SLEEP: u16 = 1 << 13;
/// PM1 control bits that are kept: bus master reload, sleep type.
const CONTROLS: u16 = 1 << 1 | SLEEP_TYPE;

/// An interrupt line whose level is set: `KVM_IRQ_LINE` in the VMM.
pub trait InterruptLine: Send + Sync {
    /// Raises or lowers the line. Called from any thread.
    fn set(&self, high: bool) -> io::Result<()>;
}

/// The power registers of a machine. All methods may be called from any thread.
pub struct Power {
    registers: Mutex<PowerState>,
    line: Arc<dyn InterruptLine>,
}

/// The PM1 registers. Plain and public: untrusted until [`Power::restore`] took it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    /// What has happened and was not acknowledged.
    pub status: u16,
    /// What of it raises the interrupt.
    pub enable: u16,
    /// Sleep type as last written.
    pub control: u16,
}

/// What a write to the registers asks for beyond them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum PowerWish {
    /// Nothing.
    None,
    /// Switch the machine off.
    Off,
}

impl Power {
    /// First I/O port: status and enable, 2 bytes each.
    pub const EVENT_PORT: u16 = 0x600;
    /// Bytes of the event block.
    pub const EVENT_BYTES: u8 = 4;
    /// Port of the control block, the one of QEMU's PC, so that guests without ACPI know where to switch off.
    pub const CONTROL_PORT: u16 = 0x604;
    /// Bytes of the control block.
    pub const CONTROL_BYTES: u8 = 2;
    /// Sleep type of "off" (S5), as on QEMU's PC.
    pub const OFF: u8 = 0;
    /// Interrupt line, level-triggered and active high, to which the VMM connects the line given to [`new`](Self::new).
    pub const IRQ: u32 = 9;

    /// Registers after reset.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { registers: Mutex::default(), line }
    }

    /// Whether `port` is one of ours.
    pub fn claims(port: u16) -> bool {
        (Self::EVENT_PORT..Self::CONTROL_PORT + u16::from(Self::CONTROL_BYTES)).contains(&port)
    }

    /// A guest's read. Bytes past the registers read as ones.
    pub fn io_read(&self, port: u16, data: &mut [u8]) {
        let bytes = self.lock().bytes();
        for (at, byte) in (usize::from(port - Self::EVENT_PORT)..).zip(data) {
            *byte = bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// A guest's write; one of a single byte leaves the other byte of its register as it is.
    pub fn io_write(&self, port: u16, data: &[u8]) -> PowerWish {
        let mut registers = self.lock();
        let mut written = [0; 6];
        let mut mask = [0; 6];
        for (at, byte) in (usize::from(port - Self::EVENT_PORT)..6).zip(data) {
            (written[at], mask[at]) = (*byte, 0xff);
        }
        let word = |bytes: [u8; 6], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        // Status bits go by writing ones; those not written to are zeros here.
        registers.status &= !word(written, 0);
        let keep = |old: u16, at: usize| old & !word(mask, at) | word(written, at);
        registers.enable = keep(registers.enable, 2) & ENABLES;
        let control = keep(registers.control, 4);
        registers.control = control & CONTROLS;
        self.drive(&registers);
        let off = control & SLEEP != 0 && control & SLEEP_TYPE == u16::from(Self::OFF) << 10;
        if off { PowerWish::Off } else { PowerWish::None }
    }

    /// Presses the power button, once; a press that the guest has not seen yet stays one press.
    pub fn press_button(&self) {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.drive(&registers);
    }

    /// The registers now.
    pub fn state(&self) -> PowerState {
        *self.lock()
    }

    /// The state as a section.
    pub fn save(&self) -> Result<Section, DeviceError> {
        Ok(Section::encode(SECTION, VERSION, &self.state())?)
    }

    /// Replaces the state by the section of [`save`](Self::save). A pending interrupt is raised again.
    pub fn restore(&self, sections: &mut Sections) -> Result<(), DeviceError> {
        let state: PowerState = sections.take(SECTION, VERSION)?;
        if state.status & !POWER_BUTTON != 0 || state.enable & !ENABLES != 0 || state.control & !CONTROLS != 0
        {
            return Err(DeviceError::bad_state(
                SECTION,
                format!("{state:x?} has bits that no guest can set"),
            ));
        }
        let mut registers = self.lock();
        *registers = state;
        self.drive(&registers);
        Ok(())
    }

    /// Sets the line as the registers say, under their lock, so that it is never left at an older level.
    fn drive(&self, registers: &PowerState) {
        if let Err(error) = self.line.set(registers.status & registers.enable != 0) {
            tracing::error!(%error, "cannot set the power registers' interrupt line");
        }
    }

    fn lock(&self) -> MutexGuard<'_, PowerState> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PowerState {
    /// What a guest reads, by port.
    fn bytes(&self) -> [u8; 6] {
        let [status, enable, control] =
            [self.status, self.enable, self.control | ACPI_ON].map(u16::to_le_bytes);
        [status[0], status[1], enable[0], enable[1], control[0], control[1]]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Level(AtomicBool);

    impl InterruptLine for Level {
        fn set(&self, high: bool) -> io::Result<()> {
            self.0.store(high, Ordering::SeqCst);
            Ok(())
        }
    }

    fn power() -> (Power, Arc<Level>) {
        let level = Arc::new(Level::default());
        (Power::new(Arc::clone(&level) as _), level)
    }

    fn read16(power: &Power, port: u16) -> u16 {
        let mut data = [0; 2];
        power.io_read(port, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_button_raises_the_line_until_it_is_acknowledged() {
        let (power, level) = power();
        power.press_button();
        assert!(!level.0.load(Ordering::SeqCst), "not enabled");
        assert_eq!(power.io_write(0x602, &[0, 1]), PowerWish::None);
        assert!(level.0.load(Ordering::SeqCst));
        assert_eq!(read16(&power, 0x600), 0x100);
        assert_eq!(power.io_write(0x600, &[0xff, 0]), PowerWish::None);
        assert!(level.0.load(Ordering::SeqCst), "another bit was acknowledged");
        assert_eq!(power.io_write(0x600, &[0, 1]), PowerWish::None);
        assert!(!level.0.load(Ordering::SeqCst));
        assert_eq!(read16(&power, 0x600), 0);
    }

    #[test]
    fn only_the_sleep_called_off_switches_off() {
        let (power, _) = power();
        assert_eq!(read16(&power, 0x604), 1, "ACPI is on");
        assert_eq!(power.io_write(0x604, &[0, 0x34]), PowerWish::None, "type 5");
        assert_eq!(read16(&power, 0x604), 0x1401, "the start bit reads as zero");
        assert_eq!(power.io_write(0x604, &[0, 0]), PowerWish::None);
        assert_eq!(power.io_write(0x604, &[0, 0x20]), PowerWish::Off);
        assert_eq!(power.io_write(0x605, &[0x20]), PowerWish::Off);
    }

    #[test]
    fn the_state_survives_and_raises_a_pending_interrupt() {
        let (from, _) = power();
        assert_eq!(from.io_write(0x602, &[0x21, 1]), PowerWish::None);
        from.press_button();
        let mut sections = Sections::new(vec![from.save().unwrap()]).unwrap();
        let (to, level) = power();
        to.restore(&mut sections).unwrap();
        assert_eq!(to.state(), from.state());
        assert!(level.0.load(Ordering::SeqCst));
    }

    #[test]
    fn bad_states_are_refused() {
        let bad = [
            PowerState { status: 1, ..Default::default() },
            PowerState { enable: 2, ..Default::default() },
            PowerState { control: SLEEP, ..Default::default() },
        ];
        for state in bad {
            let section = Section::encode(SECTION, VERSION, &state).unwrap();
            let refused = power().0.restore(&mut Sections::new(vec![section]).unwrap());
            assert!(matches!(refused, Err(DeviceError::BadState { .. })), "{state:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_a_guest_does_its_state_can_be_restored(
            accesses in prop::collection::vec((0x600_u16..0x606, prop::collection::vec(any::<u8>(), 1..5)), 0..50),
        ) {
            let (power, level) = power();
            for (port, data) in accesses {
                let _ = power.io_write(port, &data);
                power.io_read(port, &mut [0; 4]);
                power.press_button();
            }
            let high = level.0.load(Ordering::SeqCst);
            let (to, there) = self::power();
            to.restore(&mut Sections::new(vec![power.save().unwrap()]).unwrap()).unwrap();
            prop_assert_eq!(there.0.load(Ordering::SeqCst), high);
        }
    }
}
