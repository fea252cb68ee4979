//! The 256 bytes of configuration space of a function: identity, capabilities, what a guest may write.
//!
//! What lives here: bytes and a mask of writable bits, which also gives the base address sizing protocol of PCI 3.0
//! section 6.2.5.1. What never enters: the meaning of a write; the function looks at the bytes afterwards.

use serde::{Deserialize, Serialize};

use crate::DeviceError;

/// Bytes of conventional configuration space.
pub const CONFIG_BYTES: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
/// Where capabilities start, behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// COMMAND: memory accesses are decoded.
const COMMAND_MEMORY: u16 = 1 << 1;
/// COMMAND bits a guest may set: memory, bus master, interrupt disable. There is no I/O space to decode.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 10;
/// STATUS: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Configuration space of one function.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    /// Offset of the last capability's next pointer, and where the next capability goes.
    link: usize,
    end: usize,
}

/// The bytes a guest sees. Plain and public: untrusted until a function restored it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// All 256 bytes, read-only ones too, so that a restore can prove that it meets the same device.
    pub bytes: Vec<u8>,
}

/// Who a function says it is.
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub subsystem: u16,
    pub revision: u8,
    /// Class, subclass and programming interface, as in bits 23..0 of the class code.
    pub class: u32,
}

impl ConfigSpace {
    pub fn new(id: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            link: CAPABILITIES,
            end: FIRST_CAPABILITY,
        };
        space.put(0x00, &id.vendor.to_le_bytes());
        space.put(0x02, &id.device.to_le_bytes());
        space.put(0x08, &[id.revision]);
        space.put(0x09, &id.class.to_le_bytes()[..3]);
        space.put(0x2c, &id.vendor.to_le_bytes());
        space.put(0x2e, &id.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size and interrupt line hold whatever the guest notes there.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Makes base address 0 a 32-bit memory range of `size` bytes (a power of two) at `base`, decoded from the start
    /// as firmware would leave it.
    pub fn set_bar(&mut self, base: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && base.is_multiple_of(size));
        self.put(BAR0, &base.to_le_bytes());
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
        self.put(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    }

    /// Appends a capability and returns its offset. `body` starts behind the id and the next pointer; `writable` has
    /// its length.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        self.put(self.link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Where base address 0 is decoded now, if memory decoding is on.
    pub fn bar(&self) -> Option<u32> {
        let decoded = self.u16(COMMAND) & COMMAND_MEMORY != 0;
        decoded.then(|| self.u32(BAR0) & !0xf)
    }

    /// Reads at `offset`; bytes past the end read as ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes the writable bits at `offset`; the rest keeps its value.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..CONFIG_BYTES).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    /// Two bytes at `offset`, which lies inside the space.
    pub fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// Four bytes at `offset`, which lies inside the space.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// Sets bytes whatever their mask says.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    pub fn state(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    /// Takes the writable bits of `state`; its read-only bits must be ours.
    pub fn restore(&mut self, device: &str, state: &ConfigState) -> Result<(), DeviceError> {
        if state.bytes.len() != CONFIG_BYTES {
            let reason = format!("{} bytes of configuration space", state.bytes.len());
            return Err(DeviceError::bad_state(device, reason));
        }
        for at in 0..CONFIG_BYTES {
            let (ours, theirs, fixed) = (self.bytes[at], state.bytes[at], !self.writable[at]);
            if ours & fixed != theirs & fixed {
                let reason =
                    format!("configuration byte {at:#04x} is {theirs:#04x} there and {ours:#04x} here");
                return Err(DeviceError::bad_state(device, reason));
            }
        }
        self.bytes.copy_from_slice(&state.bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let id = Identity { vendor: 0x1af4, device: 0x1042, subsystem: 2, revision: 1, class: 0x01_8000 };
        let mut space = ConfigSpace::new(&id);
        space.set_bar(0xe000_8000, 0x8000);
        space
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0xff; 4]);
        assert_eq!(space.u32(0), 0x1042_1af4);
        assert_eq!(space.u32(8), 0x0180_0001);
    }

    #[test]
    fn bar_answers_the_sizing_protocol_and_moves() {
        let mut space = space();
        assert_eq!(space.bar(), Some(0xe000_8000));
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.u32(BAR0), 0xffff_8000);
        space.write(BAR0, &0xf000_0000u32.to_le_bytes());
        assert_eq!(space.bar(), Some(0xf000_0000));
        space.write(COMMAND, &[0, 0]);
        assert_eq!(space.bar(), None);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0; 10], &[0; 10]);
        let second = space.add_capability(0x09, &[0; 14], &[0; 14]);
        assert_eq!(usize::from(space.bytes[CAPABILITIES]), first);
        assert_eq!(usize::from(space.bytes[first + 1]), second);
        assert_eq!(space.bytes[second + 1], 0);
        assert_ne!(space.u16(STATUS) & STATUS_CAPABILITIES, 0);
    }

    #[test]
    fn restore_wants_the_same_device() {
        let mut space = space();
        let mut state = space.state();
        state.bytes[2] ^= 1;
        assert!(space.restore("d", &state).is_err());
        state.bytes.pop();
        assert!(space.restore("d", &state).is_err());
    }

    #[test]
    fn reads_past_the_end_are_ones() {
        let mut data = [0; 4];
        space().read(254, &mut data);
        assert_eq!(data[2..], [0xff, 0xff]);
        space().write(254, &[1, 2, 3, 4]);
    }
}
