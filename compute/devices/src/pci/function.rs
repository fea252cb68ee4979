//! A virtio device as a PCI function: its capabilities, its memory window, its doorbells.
//!
//! What lives here: virtio 1.2 section 4.1.4, that is where each register structure is found, and what follows when
//! the guest moves the window. What never enters: the meaning of the registers (`virtio::transport`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::config::{ConfigSpace, ConfigState, Identity};
use super::msix::{CONTROL_WRITABLE, ENTRY_BYTES, Msix, MsixState};
use crate::virtio::{COMMON_BYTES, Interrupt, Pausing, Transport, TransportState, VirtioDevice};
use crate::{DeviceError, Doorbells, MsiSender};

/// Bytes of a function's window; see the layout below.
pub const WINDOW_BYTES: u32 = 0x8000;
/// The addresses that windows may have: below the I/O APIC, above RAM (the VMM leaves them out of its RAM).
pub const MMIO_START: u64 = 0xe000_0000;
/// End of the addresses that windows may have.
pub const MMIO_END: u64 = 0xfec0_0000;

// Layout of the window.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;

const VIRTIO_VENDOR: u16 = 0x1af4;
/// PCI device ids of modern virtio devices start here (virtio 1.2 section 4.1.2).
const VIRTIO_DEVICE_BASE: u16 = 0x1040;
const CAPABILITY_MSIX: u8 = 0x11;
const CAPABILITY_VENDOR: u8 = 0x09;

/// The window is not decoded.
const NOWHERE: u64 = u64::MAX;

/// One function of the bus. All methods may be called from any thread.
pub struct VirtioFunction {
    name: String,
    msix: Arc<Msix>,
    interrupt: Arc<Interrupt>,
    kicks: Arc<[EventFd]>,
    doorbells: Arc<dyn Doorbells>,
    /// Where the window is decoded, so that an access finds its function without a lock.
    window: AtomicU64,
    registers: Mutex<Registers>,
}

struct Registers {
    config: ConfigSpace,
    /// Offset of the MSI-X capability and of the configuration access capability.
    msix_capability: usize,
    access_capability: usize,
    transport: Transport,
    /// The address each doorbell is connected to.
    connected: Vec<Option<u64>>,
}

/// The saved state of a function. Plain and public: untrusted until restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// Configuration space.
    pub config: ConfigState,
    /// Interrupt messages.
    pub msix: MsixState,
    /// The virtio registers and the device.
    pub transport: TransportState,
}

impl VirtioFunction {
    /// A function after reset, its window decoded at `base`.
    pub fn new(
        name: &str,
        base: u32,
        device: Box<dyn VirtioDevice>,
        doorbells: Arc<dyn Doorbells>,
        msi: Arc<dyn MsiSender>,
    ) -> Result<Self, DeviceError> {
        let queues = device.queue_sizes().len();
        let kicks: Arc<[EventFd]> = (0..queues)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()
            .map_err(DeviceError::io(name, "create an event for a queue"))?;
        // One vector for each queue and one for configuration changes.
        let vectors = queues as u16 + 1;
        let msix = Arc::new(Msix::new(vectors, msi));
        let interrupt = Arc::new(Interrupt::new(Arc::clone(&msix), queues));
        let mut config = ConfigSpace::new(&Identity {
            vendor: VIRTIO_VENDOR,
            device: VIRTIO_DEVICE_BASE + device.id(),
            // Section 4.1.2.2: a modern-only device says 0x40 or more.
            subsystem: VIRTIO_DEVICE_BASE,
            revision: 1,
            class: device.class(),
        });
        config.set_bar(base, WINDOW_BYTES);
        let transport = Transport::new(name, device, Arc::clone(&interrupt), Arc::clone(&kicks));
        let msix_capability = add_msix(&mut config, vectors);
        let access_capability = add_virtio(&mut config, queues as u32, transport.config_bytes() as u32);
        let registers = Registers {
            config,
            msix_capability,
            access_capability,
            transport,
            connected: vec![None; queues],
        };
        let function = Self {
            name: name.to_owned(),
            msix,
            interrupt,
            kicks,
            doorbells,
            window: AtomicU64::new(NOWHERE),
            registers: Mutex::new(registers),
        };
        function.remap(&mut function.lock());
        Ok(function)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The offset of `address` in the window, if the window is there.
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        let base = self.window.load(Ordering::Acquire);
        address.checked_sub(base).filter(|offset| *offset < u64::from(WINDOW_BYTES))
    }

    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        let registers = &mut *self.lock();
        if registers.touches_access_data(offset, data.len())
            && let Some((at, len)) = registers.access_target()
        {
            let mut value = [0; 4];
            self.read_window(registers, at, &mut value[..len]);
            registers.config.put(registers.access_capability + 16, &value);
        }
        registers.config.read(offset, data);
    }

    pub fn write_config(&self, offset: usize, data: &[u8]) {
        let registers = &mut *self.lock();
        registers.config.write(offset, data);
        self.msix.set_control(registers.config.u16(registers.msix_capability + 2));
        if registers.touches_access_data(offset, data.len())
            && let Some((at, len)) = registers.access_target()
        {
            let value = registers.config.u32(registers.access_capability + 16).to_le_bytes();
            self.write_window(registers, at, &value[..len]);
        }
        self.remap(registers);
    }

    /// A guest's read at `offset` in the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.read_window(&self.lock(), offset, data);
    }

    /// A guest's write at `offset` in the window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset & !(PAGE - 1) == NOTIFY {
            self.notify(offset); // The data path: no lock.
        } else {
            self.write_window(&mut self.lock(), offset, data);
        }
    }

    pub fn pause(&self) -> Result<Pausing, DeviceError> {
        self.lock().transport.device().pause()
    }

    pub fn resume(&self) -> Result<(), DeviceError> {
        self.lock().transport.device().resume()
    }

    /// The state now. The function is paused.
    pub fn save(&self) -> Result<FunctionState, DeviceError> {
        let registers = self.lock();
        Ok(FunctionState {
            config: registers.config.state(),
            transport: registers.transport.save()?,
            msix: self.msix.state(),
        })
    }

    /// Pauses the device and takes a saved state. The device stays paused.
    pub fn restore(&self, state: &FunctionState) -> Result<(), DeviceError> {
        self.pause()?.wait()?;
        let registers = &mut *self.lock();
        registers.config.restore(&self.name, &state.config)?;
        let control = registers.config.u16(registers.msix_capability + 2);
        self.msix.restore(&self.name, &state.msix, control)?;
        registers.transport.restore(&state.transport)?;
        self.remap(registers);
        Ok(())
    }

    fn read_window(&self, registers: &Registers, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = offset & (PAGE - 1);
        match offset & !(PAGE - 1) {
            COMMON => registers.transport.read_common(at as usize, data),
            ISR if at == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.interrupt.take_isr();
                }
            }
            DEVICE => registers.transport.read_config(at as usize, data),
            TABLE => self.msix.read_table(at, data),
            PENDING => self.msix.read_pending(at, data),
            _ => {}
        }
    }

    fn write_window(&self, registers: &mut Registers, offset: u64, data: &[u8]) {
        let at = offset & (PAGE - 1);
        match offset & !(PAGE - 1) {
            COMMON => registers.transport.write_common(at as usize, data),
            NOTIFY => self.notify(offset),
            TABLE => self.msix.write_table(at, data),
            // The ISR, the pending bits and the devices' configurations are read-only.
            _ => {}
        }
    }

    fn notify(&self, offset: u64) {
        let index = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
        if let Some(kick) = self.kicks.get(index as usize)
            && let Err(error) = kick.write(1)
        {
            // The counter is full: the device is notified anyhow.
            tracing::debug!(device = self.name, %error, "notify");
        }
    }

    /// Follows base address and command register with the window and the doorbells.
    fn remap(&self, registers: &mut Registers) {
        let inside = |base: &u64| *base >= MMIO_START && base + u64::from(WINDOW_BYTES) <= MMIO_END;
        let base = registers.config.bar().map(u64::from).filter(inside).unwrap_or(NOWHERE);
        if self.window.swap(base, Ordering::AcqRel) == base {
            return;
        }
        for (index, (connected, kick)) in registers.connected.iter_mut().zip(self.kicks.iter()).enumerate() {
            if let Some(address) = connected.take()
                && let Err(error) = self.doorbells.disconnect(address, kick)
            {
                tracing::warn!(device = self.name, address, %error, "cannot disconnect a doorbell");
            }
            if base == NOWHERE {
                continue;
            }
            let address = base + NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER);
            match self.doorbells.connect(address, kick) {
                Ok(()) => *connected = Some(address),
                // Notifications then come through `write`.
                Err(error) => {
                    tracing::warn!(device = self.name, address, %error, "cannot connect a doorbell");
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    /// Whether an access to configuration space meets `pci_cfg_data` (section 4.1.4.9).
    fn touches_access_data(&self, offset: usize, len: usize) -> bool {
        let data = self.access_capability + 16;
        offset < data + 4 && data < offset + len
    }

    /// Offset and width the guest wrote into the configuration access capability, if they make sense.
    fn access_target(&self) -> Option<(u64, usize)> {
        let bar = self.config.u16(self.access_capability + 4) as u8;
        let offset = self.config.u32(self.access_capability + 8);
        let len = self.config.u32(self.access_capability + 12);
        let fits =
            bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len) && offset < WINDOW_BYTES;
        fits.then_some((u64::from(offset), len as usize))
    }
}

/// PCI 3.0 section 6.8.2: control, table and pending bits, both in base address 0.
fn add_msix(config: &mut ConfigSpace, vectors: u16) -> usize {
    debug_assert!(u64::from(vectors) * ENTRY_BYTES <= PAGE);
    let mut body = [0; 10];
    body[0..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    body[2..6].copy_from_slice(&(TABLE as u32).to_le_bytes());
    body[6..10].copy_from_slice(&(PENDING as u32).to_le_bytes());
    let mut writable = [0; 10];
    writable[0..2].copy_from_slice(&CONTROL_WRITABLE.to_le_bytes());
    config.add_capability(CAPABILITY_MSIX, &body, &writable)
}

/// Section 4.1.4: one vendor capability a register structure. Returns the offset of the configuration access
/// capability.
fn add_virtio(config: &mut ConfigSpace, queues: u32, device_bytes: u32) -> usize {
    let mut add = |kind: u8, offset: u64, length: u32, tail: Option<u32>, writable: bool| {
        let mut body = vec![0; 14];
        body[0] = if tail.is_some() { 20 } else { 16 };
        body[1] = kind;
        body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
        body[10..14].copy_from_slice(&length.to_le_bytes());
        body.extend(tail.unwrap_or(0).to_le_bytes().iter().take(if tail.is_some() { 4 } else { 0 }));
        let mut mask = vec![0; body.len()];
        if writable {
            mask[2] = 0xff; // bar
            mask[6..].fill(0xff); // offset, length, data
        }
        config.add_capability(CAPABILITY_VENDOR, &body, &mask)
    };
    add(1, COMMON, COMMON_BYTES as u32, None, false);
    add(2, NOTIFY, queues * NOTIFY_MULTIPLIER, Some(NOTIFY_MULTIPLIER), false);
    add(3, ISR, 1, None, false);
    if device_bytes > 0 {
        add(4, DEVICE, device_bytes, None, false);
    }
    add(5, 0, 0, Some(0), true)
}
