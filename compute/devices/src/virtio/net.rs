//! The network device (virtio 1.2 section 5.1) as its transport sees it.
//!
//! What lives here: features, configuration, saved state. What never enters: packets; the NIC's thread has them
//! ([`crate::net`]).

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::{Activation, DeviceQueue, DeviceState, Pausing, RingPosition, VirtioDevice};
use crate::net::{MacAddress, NetHandle, Started, check_pending};
use crate::{DeviceError, SharedMemory};

/// Receive, transmit, control.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// A virtio network device on a NIC.
pub struct Net {
    memory: SharedMemory,
    nic: NetHandle,
    /// Out of a restored state, for the next activation.
    pending: Option<Vec<u8>>,
}

impl Net {
    /// A device for `nic`.
    pub fn new(memory: SharedMemory, nic: NetHandle) -> Self {
        Self { memory, nic, pending: None }
    }

    fn refuse(&self, reason: String) -> DeviceError {
        DeviceError::bad_state(self.nic.name(), reason)
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn class(&self) -> u32 {
        0x02_0000 // Network, Ethernet.
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ];
        always.into_iter().fold(self.nic.offloads().features(), |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_net_config` through `status` (section 5.1.4): what follows belongs to features not offered.
    fn config(&self) -> Vec<u8> {
        let announce = if self.nic.link().wants_announcement() { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let status = (VIRTIO_NET_S_LINK_UP | announce) as u16;
        [&self.nic.mac().octets()[..], &status.to_le_bytes()].concat()
    }

    fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { features, queues, interrupt } = activation;
        let queues = queues
            .into_iter()
            .map(|active| DeviceQueue::new(active, Arc::clone(&self.memory), Arc::clone(&interrupt)))
            .collect();
        self.nic.start(Started { features, queues, interrupt, pending: self.pending.take() })
    }

    fn deactivate(&mut self) -> Result<(), DeviceError> {
        self.nic.finish()
    }

    fn positions(&self) -> Result<Vec<(u16, RingPosition)>, DeviceError> {
        Ok(self.nic.standing()?.positions)
    }

    fn pause(&self) -> Result<Pausing, DeviceError> {
        self.nic.start_pause()
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.nic.resume()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let pending = self.nic.standing()?.pending;
        Ok(DeviceState::Net { mac: self.nic.mac().octets(), pending })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let DeviceState::Net { mac, pending } = state else {
            return Err(self.refuse(format!("it is {} there", state.kind())));
        };
        let there = MacAddress::new(*mac).map_err(|error| self.refuse(error.to_string()))?;
        if there != self.nic.mac() {
            return Err(self.refuse(format!("its address is {there} there and {} here", self.nic.mac())));
        }
        if let Some(packet) = pending {
            check_pending(packet).map_err(|reason| self.refuse(reason))?;
        }
        self.pending.clone_from(pending);
        Ok(())
    }
}
