//! Bus 0: configuration mechanism 1 on ports 0xcf8 to 0xcff, the dispatch of memory accesses, all devices at once.
//!
//! What lives here: slots, the address latch, pausing and saving in slot order. What never enters: what is behind a
//! slot. The function list is fixed once vCPUs run; each function locks itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::config::{ConfigSpace, Identity};
use super::function::{FunctionState, MMIO_END, MMIO_START, VirtioFunction, WINDOW_BYTES};
use crate::state::{Section, Sections};
use crate::{DeviceError, Doorbells, MsiSender, VirtioDevice};

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
/// Slot 0 is the host bridge.
const MAX_FUNCTIONS: usize = 31;
const SECTION: &str = "pci";
const FUNCTION_PREFIX: &str = "pci/";
const VERSION: u16 = 1;

/// The bus of a machine. Built by one owner; every other method may be called from any thread.
pub struct PciBus {
    bridge: ConfigSpace,
    functions: Vec<VirtioFunction>,
    address: AtomicU32,
    doorbells: Arc<dyn Doorbells>,
    msi: Arc<dyn MsiSender>,
}

/// The saved state of the bus itself. Plain and public: untrusted until restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusState {
    /// What the guest last wrote to port 0xcf8.
    pub address: u32,
    /// The functions' names in slot order, from slot 1; must be the same on both sides.
    pub functions: Vec<String>,
}

impl PciBus {
    /// First I/O port of the configuration mechanism.
    pub const FIRST_PORT: u16 = ADDRESS_PORT;
    /// Last I/O port of the configuration mechanism.
    pub const LAST_PORT: u16 = DATA_PORT + 3;
    /// First address that device windows may have; RAM must end before.
    pub const MMIO_START: u64 = MMIO_START;
    /// End of the addresses that device windows may have.
    pub const MMIO_END: u64 = MMIO_END;

    /// A bus with a host bridge in slot 0.
    pub fn new(doorbells: Arc<dyn Doorbells>, msi: Arc<dyn MsiSender>) -> Self {
        // A host bridge by Intel is what Linux looks for before it trusts mechanism 1; this id has no quirks.
        let bridge = ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: 0x0d57,
            subsystem: 0,
            revision: 0,
            class: 0x06_0000,
        });
        Self { bridge, functions: Vec::new(), address: AtomicU32::new(0), doorbells, msi }
    }

    /// Puts a device into the next slot. `name` is unique on the bus and names its saved state.
    pub fn add_virtio(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), DeviceError> {
        let refuse = |reason| Err(DeviceError::BusFull { device: name.to_owned(), reason });
        if self.functions.len() >= MAX_FUNCTIONS {
            return refuse("all slots are taken");
        }
        if self.functions.iter().any(|function| function.name() == name) {
            return refuse("the name is taken");
        }
        let base = MMIO_START as u32 + self.functions.len() as u32 * WINDOW_BYTES;
        let (doorbells, msi) = (Arc::clone(&self.doorbells), Arc::clone(&self.msi));
        self.functions.push(VirtioFunction::new(name, base, device, doorbells, msi)?);
        Ok(())
    }

    /// A guest's read of a port between [`FIRST_PORT`](Self::FIRST_PORT) and [`LAST_PORT`](Self::LAST_PORT).
    pub fn io_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            ADDRESS_PORT..DATA_PORT => {
                let bytes = self.address.load(Ordering::Acquire).to_le_bytes();
                for (byte, value) in data.iter_mut().zip(&bytes[usize::from(port - ADDRESS_PORT)..]) {
                    *byte = *value;
                }
            }
            DATA_PORT..=Self::LAST_PORT => match self.target(port) {
                Some((0, offset)) => self.bridge.read(offset, data),
                Some((slot, offset)) => {
                    if let Some(function) = self.functions.get(slot - 1) {
                        function.read_config(offset, data);
                    }
                }
                None => {}
            },
            _ => {}
        }
    }

    /// A guest's write to a port between [`FIRST_PORT`](Self::FIRST_PORT) and [`LAST_PORT`](Self::LAST_PORT).
    pub fn io_write(&self, port: u16, data: &[u8]) {
        match (port, data) {
            // Narrower writes go to other devices there (PCI 3.0 section 3.2.2.3.2).
            (ADDRESS_PORT, &[a, b, c, d]) => {
                self.address.store(u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc, Ordering::Release);
            }
            (DATA_PORT..=Self::LAST_PORT, _) => {
                if let Some((slot, offset)) = self.target(port)
                    && let Some(function) = slot.checked_sub(1).and_then(|index| self.functions.get(index))
                {
                    function.write_config(offset, data);
                }
            }
            _ => {}
        }
    }

    /// A guest's read of memory. False if no window is there; `data` is then untouched.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.at(address) {
            Some((function, offset)) => function.read(offset, data),
            None => return false,
        }
        true
    }

    /// A guest's write to memory. False if no window is there.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        match self.at(address) {
            Some((function, offset)) => function.write(offset, data),
            None => return false,
        }
        true
    }

    /// Stops all devices: returns when none has a request in flight and every result is in its used ring. Works
    /// while the vCPUs are stopped. All devices drain at the same time.
    pub fn pause_all(&self) -> Result<(), DeviceError> {
        let pauses: Vec<_> = self.functions.iter().map(VirtioFunction::pause).collect::<Result<_, _>>()?;
        pauses.into_iter().try_for_each(|pausing| pausing.wait())
    }

    /// Lets all devices go on; they look at their queues even without a notification.
    pub fn resume_all(&self) -> Result<(), DeviceError> {
        self.functions.iter().try_for_each(VirtioFunction::resume)
    }

    /// The state of the bus and all functions. They are paused.
    pub fn save(&self) -> Result<Vec<Section>, DeviceError> {
        let state = BusState {
            address: self.address.load(Ordering::Acquire),
            functions: self.functions.iter().map(|function| function.name().to_owned()).collect(),
        };
        let mut sections = vec![Section::encode(SECTION, VERSION, &state)?];
        for function in &self.functions {
            let name = format!("{FUNCTION_PREFIX}{}", function.name());
            sections.push(Section::encode(name, VERSION, &function.save()?)?);
        }
        Ok(sections)
    }

    /// Takes the sections of [`save`](Self::save) on a bus with the same devices. Guest memory is already there. All
    /// devices are left paused; those that had a driver are active again and their doorbells connected. After an
    /// error the bus is good for nothing but being dropped.
    pub fn restore(&self, sections: &mut Sections) -> Result<(), DeviceError> {
        let state: BusState = sections.take(SECTION, VERSION)?;
        let ours = self.functions.iter().map(VirtioFunction::name);
        if !ours.clone().eq(state.functions.iter().map(String::as_str)) {
            let reason = format!("devices {:?} there, {:?} here", state.functions, ours.collect::<Vec<_>>());
            return Err(DeviceError::bad_state(SECTION, reason));
        }
        self.address.store(state.address & 0x80ff_fffc, Ordering::Release);
        for function in &self.functions {
            let state: FunctionState =
                sections.take(&format!("{FUNCTION_PREFIX}{}", function.name()), VERSION)?;
            function.restore(&state)?;
        }
        Ok(())
    }

    /// Slot and register that the address latch and a data port name, on bus 0, function 0.
    fn target(&self, port: u16) -> Option<(usize, usize)> {
        let address = self.address.load(Ordering::Acquire);
        let enabled = address >> 31 == 1;
        let (bus, slot, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
        let offset = (address & 0xfc) as usize + usize::from(port - DATA_PORT);
        (enabled && bus == 0 && function == 0).then_some((slot as usize, offset))
    }

    fn at(&self, address: u64) -> Option<(&VirtioFunction, u64)> {
        self.functions.iter().find_map(|function| Some((function, function.offset_of(address)?)))
    }
}
