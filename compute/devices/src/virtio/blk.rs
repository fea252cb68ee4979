//! The block device (virtio 1.2 section 5.2) as its transport sees it.
//!
//! What lives here: features and configuration. What never enters: requests; the disk's thread has them
//! ([`crate::disk`]).

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Activation, DeviceQueue, DeviceState, Pausing, RingPosition, VirtioDevice};
use crate::disk::{DiskFacts, MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, SECTOR, Started};
use crate::{DeviceError, DiskHandle, SharedMemory};

const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: all of a queue's descriptors but header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of `struct virtio_blk_config` through `write_zeroes_may_unmap` and its padding.
const CONFIG_BYTES: usize = 60;
/// Sectors in a physical block of 4 KiB, below which writes cost the host a read.
const SECTORS_PER_BLOCK: u32 = 8;

/// A virtio block device on a disk.
pub struct Block {
    memory: SharedMemory,
    disk: DiskHandle,
    facts: Arc<DiskFacts>,
}

impl Block {
    /// A device for `disk` that answers GET_ID with `serial` (20 bytes count; Linux shows it in
    /// `/sys/block/vda/serial`). Sizes that are no multiple of 512 bytes lose the rest.
    pub fn new(memory: SharedMemory, disk: DiskHandle, serial: &str) -> Self {
        let serial: String =
            serial.chars().filter(char::is_ascii).take(VIRTIO_BLK_ID_BYTES as usize).collect();
        let facts = DiskFacts { sectors: disk.size() / SECTOR, read_only: disk.read_only(), serial };
        Self { memory, disk, facts: Arc::new(facts) }
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class(&self) -> u32 {
        0x01_8000 // Mass storage, other.
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        if self.facts.read_only {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config` (section 5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.facts.sectors.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[SECTORS_PER_BLOCK.ilog2() as u8]);
        put(26, &(SECTORS_PER_BLOCK as u16).to_le_bytes()); // min_io_size, in logical blocks
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(44, &SECTORS_PER_BLOCK.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_DISCARD_SECTORS.to_le_bytes()); // write zeroes
        put(52, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(56, &[1]); // write_zeroes_may_unmap
        config
    }

    fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { queues, interrupt, .. } = activation;
        for active in queues {
            let (kick, queue) = DeviceQueue::new(active, Arc::clone(&self.memory), Arc::clone(&interrupt));
            self.disk.start(Started { queue, kick, facts: Arc::clone(&self.facts) })?;
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Result<(), DeviceError> {
        self.disk.finish()
    }

    fn positions(&self) -> Result<Vec<(u16, RingPosition)>, DeviceError> {
        Ok(self.disk.position()?.into_iter().collect())
    }

    fn pause(&self) -> Result<Pausing, DeviceError> {
        self.disk.start_pause()
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.disk.resume()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let DiskFacts { sectors, read_only, serial } = &*self.facts;
        Ok(DeviceState::Block { sectors: *sectors, read_only: *read_only, serial: serial.clone() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let here = self.save()?;
        if *state == here {
            return Ok(());
        }
        let there = match state {
            DeviceState::Block { .. } => format!("{state:?}"),
            other => other.kind().to_owned(),
        };
        Err(DeviceError::bad_state(self.disk.name(), format!("it is {there} there and {here:?} here")))
    }
}
