//! The registers of a virtio 1.x device over PCI: common configuration, status machine, queue set-up, reset.
//!
//! What lives here: virtio 1.2 sections 2.1, 3.1 and 4.1.4.3, and their saved state. What never enters: where the
//! registers are mapped (`pci::function`), what a device does with its queues. Modern interface only.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, ActiveQueue, DeviceState, Interrupt, InterruptState, RingPosition, VirtioDevice};
use crate::DeviceError;

/// Bytes of the common configuration structure, through `queue_reset`, rounded up.
pub const COMMON_BYTES: usize = 64;
/// Features the transport and the ring code give to every device.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// A queue as the driver sets it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// The driver enabled it.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Where the device stands; zero until it is active.
    pub position: RingPosition,
}

/// The transport's registers. Plain and public: untrusted until restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// The device status byte without `DEVICE_NEEDS_RESET`.
    pub status: u8,
    /// The features the driver accepted.
    pub driver_features: u64,
    /// `device_feature_select`.
    pub device_feature_select: u32,
    /// `driver_feature_select`.
    pub driver_feature_select: u32,
    /// `queue_select`.
    pub queue_select: u16,
    /// All queues.
    pub queues: Vec<QueueRegisters>,
    /// Vectors, ISR, needs-reset.
    pub interrupt: InterruptState,
    /// What the device adds.
    pub device: DeviceState,
}

/// The registers of one device and the device behind them.
pub struct Transport {
    name: String,
    device: Box<dyn VirtioDevice>,
    interrupt: Arc<Interrupt>,
    kicks: Arc<[EventFd]>,
    offered: u64,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    status: u8,
    queues: Vec<QueueRegisters>,
    /// The device has the queues.
    active: bool,
}

impl Transport {
    /// Registers after reset. `kicks` has one event for each queue.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        interrupt: Arc<Interrupt>,
        kicks: Arc<[EventFd]>,
    ) -> Self {
        let offered = COMMON_FEATURES | device.features();
        let queues = device.queue_sizes().iter().map(|size| QueueRegisters::reset(*size)).collect();
        Self {
            name: name.to_owned(),
            device,
            interrupt,
            kicks,
            offered,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            status: 0,
            queues,
            active: false,
        }
    }

    /// The device behind the registers.
    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// Bytes of device-specific configuration.
    pub fn config_bytes(&self) -> usize {
        self.device.config().len()
    }

    /// A guest's read of the device-specific configuration; zero behind its end.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.device.config();
        for (at, byte) in (offset..).zip(data) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    /// A guest's read of the common configuration.
    pub fn read_common(&self, offset: usize, data: &mut [u8]) {
        let image = self.common();
        for (at, byte) in (offset..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// The registers in the layout of virtio 1.2 section 4.1.4.3.
    fn common(&self) -> [u8; COMMON_BYTES] {
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &self.interrupt.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status(), self.interrupt.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &self.interrupt.queue_vector(self.queue_select).to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        image
    }

    fn status(&self) -> u8 {
        if self.interrupt.is_broken() { self.status | NEEDS_RESET } else { self.status }
    }

    /// A guest's write to the common configuration. Accesses must have the width of the field (section 4.1.3.1);
    /// 64-bit fields may be written in halves. Everything else is ignored.
    pub fn write_common(&mut self, offset: usize, data: &[u8]) {
        let select = self.queue_select;
        match (offset, data) {
            (0x00, &[a, b, c, d]) => self.device_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => self.driver_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) if self.status & FEATURES_OK == 0 => {
                let value = u64::from(u32::from_le_bytes([a, b, c, d]));
                match self.driver_feature_select {
                    0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
                    1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
            (0x10, &[a, b]) => self.interrupt.set_config_vector(u16::from_le_bytes([a, b])),
            (0x14, &[value]) => self.set_status(value),
            (0x16, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (0x1a, &[a, b]) => self.interrupt.set_queue_vector(select, u16::from_le_bytes([a, b])),
            (0x18 | 0x1c | 0x20..0x38, _) => self.write_queue(offset, data),
            _ => tracing::trace!(
                device = self.name,
                offset,
                ?data,
                "ignored write to the common configuration"
            ),
        }
    }

    fn write_queue(&mut self, offset: usize, data: &[u8]) {
        let Some(max) = self.device.queue_sizes().get(usize::from(self.queue_select)).copied() else {
            return;
        };
        let queue = &mut self.queues[usize::from(self.queue_select)];
        if queue.enabled {
            return; // Section 4.1.4.3.2: an enabled queue is not changed.
        }
        match (offset, data) {
            (0x18, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                if size.is_power_of_two() && size <= max {
                    queue.size = size;
                }
            }
            (0x1c, &[1, 0]) => queue.enabled = true,
            (0x20..0x28, _) => patch(&mut queue.descriptors, offset - 0x20, data),
            (0x28..0x30, _) => patch(&mut queue.available, offset - 0x28, data),
            (0x30..0x38, _) => patch(&mut queue.used, offset - 0x30, data),
            _ => {}
        }
    }

    /// The status machine of section 3.1.1: bits are added one after the other, zero resets.
    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let added = value & !self.status & !NEEDS_RESET;
        self.status |= added & !(FEATURES_OK | DRIVER_OK);
        if added & FEATURES_OK != 0 {
            let wanted = self.driver_features;
            if wanted & !self.offered == 0 && wanted & 1 << VIRTIO_F_VERSION_1 != 0 {
                self.status |= FEATURES_OK;
            } else {
                tracing::warn!(device = self.name, wanted, "the driver's features are refused");
            }
        }
        if added & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
            self.status |= DRIVER_OK;
            if let Err(error) = self.activate() {
                tracing::warn!(device = self.name, %error, "the driver's queues are refused");
                self.interrupt.needs_reset();
            }
        }
    }

    /// Gives the enabled queues to the device after checking that their rings lie in guest memory.
    fn activate(&mut self) -> Result<(), DeviceError> {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (index, registers) in (0..).zip(&self.queues).filter(|(_, registers)| registers.enabled) {
            let max_size = self.device.queue_sizes()[usize::from(index)];
            let refuse = |reason: String| DeviceError::BadQueue { device: self.name.clone(), index, reason };
            let queue = registers.live(max_size, event_idx).map_err(|error| refuse(error.to_string()))?;
            if !queue.is_valid(&**self.device.memory()) {
                return Err(refuse("its rings are not in guest memory".to_owned()));
            }
            let kick = self.kicks[usize::from(index)]
                .try_clone()
                .map_err(DeviceError::io(&self.name, "duplicate a queue's event"))?;
            queues.push(ActiveQueue { index, queue, kick });
        }
        let features = self.driver_features;
        self.device.activate(Activation { features, queues, interrupt: Arc::clone(&self.interrupt) })?;
        self.active = true;
        Ok(())
    }

    /// Back to the state after power-on. Returns once the device has no request in flight.
    fn reset(&mut self) {
        if self.active {
            if let Err(error) = self.device.deactivate() {
                tracing::error!(device = self.name, %error, "reset");
            }
            self.active = false;
        }
        self.interrupt.reset();
        self.status = 0;
        self.driver_features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        for (registers, size) in self.queues.iter_mut().zip(self.device.queue_sizes()) {
            *registers = QueueRegisters::reset(*size);
        }
    }

    /// The state now. The device is paused.
    pub fn save(&self) -> Result<TransportState, DeviceError> {
        let mut queues = self.queues.clone();
        if self.active {
            for (index, position) in self.device.positions()? {
                queues[usize::from(index)].position = position;
            }
        }
        Ok(TransportState {
            status: self.status,
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            queues,
            interrupt: self.interrupt.state(),
            device: self.device.save()?,
        })
    }

    /// Takes a saved state after a reset. The device is paused and stays so, also when it becomes active.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), DeviceError> {
        let refuse = |reason: String| Err(DeviceError::bad_state(&self.name, reason));
        let legal = state.status & NEEDS_RESET == 0
            && (state.status & DRIVER_OK == 0 || state.status & FEATURES_OK != 0);
        if !legal {
            return refuse(format!("status {:#04x}", state.status));
        }
        if state.driver_features & !self.offered != 0 && state.status & FEATURES_OK != 0 {
            let unknown = state.driver_features & !self.offered;
            return refuse(format!("the driver uses features {unknown:#x}, which are not offered here"));
        }
        if state.queues.len() != self.queues.len() || state.interrupt.queue_vectors.len() != self.queues.len()
        {
            return refuse(format!("{} queues, {} here", state.queues.len(), self.queues.len()));
        }
        self.device.restore(&state.device)?;
        self.reset();
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        self.queues.clone_from(&state.queues);
        self.interrupt.restore(&state.interrupt);
        // A device that met nonsense serves nothing until its driver resets it, on either side.
        if state.status & DRIVER_OK != 0 && !state.interrupt.needs_reset {
            self.activate()?;
        }
        Ok(())
    }
}

impl QueueRegisters {
    fn reset(size: u16) -> Self {
        let position = RingPosition::default();
        Self { size, enabled: false, descriptors: 0, available: 0, used: 0, position }
    }

    /// The live queue; fails on sizes and addresses that virtio forbids.
    fn live(&self, max_size: u16, event_idx_enabled: bool) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size,
            next_avail: self.position.next_avail,
            next_used: self.position.next_used,
            event_idx_enabled,
            size: self.size,
            ready: self.enabled,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
    }
}

/// The 32 bits of `value` that a feature selector names.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// Writes `data` into the little-endian `value` at byte `offset`: the whole, or an aligned half.
fn patch(value: &mut u64, offset: usize, data: &[u8]) {
    if matches!((offset, data.len()), (0, 4 | 8) | (4, 4)) {
        let mut bytes = value.to_le_bytes();
        bytes[offset..offset + data.len()].copy_from_slice(data);
        *value = u64::from_le_bytes(bytes);
    }
}
