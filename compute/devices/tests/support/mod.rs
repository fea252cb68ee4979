//! A machine without a hypervisor: guest memory, a bus, recorders for interrupts and doorbells, and a small virtio
//! driver that speaks to the bus as a guest does.

#![allow(dead_code, missing_docs, reason = "each test binary uses its part")]

pub mod requests;

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmove_devices::{Doorbells, GuestMemory, MsiSender, PciBus, SharedMemory};

/// Long enough for any machine; only reached by a failing test.
const PATIENCE: Duration = Duration::from_mins(1);

pub const RAM: usize = 32 << 20;
/// Where the second region starts; the first ends there as well, so that buffers can cross.
pub const REGION_EDGE: u64 = 16 << 20;

pub fn memory() -> SharedMemory {
    let half = RAM / 2;
    Arc::new(
        GuestMemory::from_ranges(&[(GuestAddress(0), half), (GuestAddress(REGION_EDGE), RAM - half)])
            .unwrap(),
    )
}

/// Copies all of guest memory, as a migration does.
pub fn copy_memory(from: &GuestMemory, to: &GuestMemory) {
    for region in from.iter() {
        let mut bytes = vec![0; region.len() as usize];
        from.read_slice(&mut bytes, region.start_addr()).unwrap();
        to.write_slice(&bytes, region.start_addr()).unwrap();
    }
}

#[derive(Default)]
pub struct Messages {
    sent: Mutex<Vec<(u64, u32)>>,
    arrived: Condvar,
}

impl MsiSender for Messages {
    fn send(&self, address: u64, data: u32) -> io::Result<()> {
        self.sent.lock().unwrap().push((address, data));
        self.arrived.notify_all();
        Ok(())
    }
}

impl Messages {
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    pub fn count(&self) -> usize {
        self.sent.lock().unwrap().len()
    }

    /// Waits for messages until `done` says so; it is asked again after each.
    pub fn wait_until(&self, mut done: impl FnMut() -> bool) {
        let sent = self.sent.lock().unwrap();
        let (_sent, timeout) = self
            .arrived
            .wait_timeout_while(sent, PATIENCE, |_| !done())
            .expect("no test panics with the lock");
        assert!(!timeout.timed_out(), "no interrupt came");
    }
}

#[derive(Default)]
pub struct Bells(Mutex<Vec<u64>>);

impl Bells {
    pub fn connected(&self) -> Vec<u64> {
        self.0.lock().unwrap().clone()
    }
}

impl Doorbells for Bells {
    fn connect(&self, address: u64, _: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().push(address);
        Ok(())
    }

    fn disconnect(&self, address: u64, _: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().retain(|connected| *connected != address);
        Ok(())
    }
}

pub struct Machine {
    pub memory: SharedMemory,
    pub bus: PciBus,
    pub messages: Arc<Messages>,
    pub bells: Arc<Bells>,
}

impl Machine {
    pub fn new(memory: SharedMemory) -> Self {
        let (messages, bells) = (Arc::new(Messages::default()), Arc::new(Bells::default()));
        let bus = PciBus::new(bells.clone(), messages.clone());
        Self { memory, bus, messages, bells }
    }

    pub fn config_read(&self, slot: u32, offset: u32, len: usize) -> u32 {
        self.bus.io_write(0xcf8, &(1 << 31 | slot << 11 | offset & 0xfc).to_le_bytes());
        let mut data = [0; 4];
        self.bus.io_read(0xcfc + (offset & 3) as u16, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    pub fn config_write(&self, slot: u32, offset: u32, value: u32, len: usize) {
        self.bus.io_write(0xcf8, &(1 << 31 | slot << 11 | offset & 0xfc).to_le_bytes());
        self.bus.io_write(0xcfc + (offset & 3) as u16, &value.to_le_bytes()[..len]);
    }

    pub fn read(&self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.bus.mmio_read(address, &mut data[..len]), "nothing at {address:#x}");
        u64::from_le_bytes(data)
    }

    pub fn write(&self, address: u64, value: u64, len: usize) {
        assert!(self.bus.mmio_write(address, &value.to_le_bytes()[..len]), "nothing at {address:#x}");
    }

    /// The index of queue 0's used ring, as the device last wrote it.
    pub fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// Offset of a capability in configuration space: id, and for vendor ones the virtio type.
    pub fn capability(&self, slot: u32, id: u32, kind: u32) -> u32 {
        let mut at = self.config_read(slot, 0x34, 1);
        while at != 0 {
            let matches = self.config_read(slot, at, 1) == id;
            if matches && (id != 9 || self.config_read(slot, at + 3, 1) == kind) {
                return at;
            }
            at = self.config_read(slot, at + 1, 1);
        }
        panic!("no capability {id:#x}/{kind}");
    }

    /// Address of a virtio register structure.
    pub fn structure(&self, slot: u32, kind: u32) -> u64 {
        let at = self.capability(slot, 9, kind);
        assert_eq!(self.config_read(slot, at + 4, 1), 0, "all structures are in base address 0");
        u64::from(self.config_read(slot, 0x10, 4) & !0xf) + u64::from(self.config_read(slot, at + 8, 4))
    }
}

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;
pub const NEEDS_RESET: u64 = 64;

/// The rings of queue 0; those of the next ones follow, each set `RINGS` bytes behind the one before.
const RINGS: u64 = 0x3000;
const DESCRIPTORS: u64 = 0x1_0000;
pub const AVAILABLE: u64 = 0x1_1000;
pub const USED: u64 = 0x1_2000;
const INDIRECT_TABLES: u64 = 0x2_0000;
/// First address free for buffers.
pub const BUFFERS: u64 = 0x10_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// A buffer of a chain: address, length, whether the device writes it.
pub type Piece = (u64, u32, bool);

/// A driver of one queue. It keeps its state in itself, as a guest keeps it in its RAM, so it goes on with a machine
/// that was restored from a save.
#[derive(Clone)]
pub struct Driver {
    pub slot: u32,
    pub size: u16,
    pub common: u64,
    /// Which queue, and how far behind those of queue 0 its rings are.
    queue: u16,
    rings: u64,
    notify: u64,
    event_idx: bool,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

impl Driver {
    /// Brings the device in `slot` up with the given features and a queue of `size` descriptors.
    pub fn start(machine: &Machine, slot: u32, features: u64, size: u16) -> Self {
        Self::start_queues(machine, slot, features, &[size]).remove(0)
    }

    /// Brings the device in `slot` up with the given features and queues of these sizes; gives a driver of each.
    pub fn start_queues(machine: &Machine, slot: u32, features: u64, sizes: &[u16]) -> Vec<Self> {
        machine.config_write(slot, 4, 6, 2);
        let common = machine.structure(slot, 1);
        let notify = machine.structure(slot, 2);
        machine.write(common + 0x14, 0, 1);
        machine.write(common + 0x14, 1, 1);
        machine.write(common + 0x14, 3, 1);
        for half in 0..2u32 {
            machine.write(common + 0x08, u64::from(half), 4);
            machine.write(common + 0x0c, features >> (32 * half) & 0xffff_ffff, 4);
        }
        machine.write(common + 0x14, 11, 1);
        assert_eq!(machine.read(common + 0x14, 1), 11, "features accepted");
        let msix = machine.capability(slot, 0x11, 0);
        let table = u64::from(machine.config_read(slot, 0x10, 4) & !0xf)
            + u64::from(machine.config_read(slot, msix + 4, 4) & !7);
        for vector in 0..=sizes.len() as u64 {
            machine.write(table + vector * 16, 0xfee0_0000, 8);
            machine.write(table + vector * 16 + 8, 0x40 + u64::from(slot) * 2 + vector, 4);
            machine.write(table + vector * 16 + 12, 0, 4);
        }
        machine.config_write(slot, msix + 2, 0x8000, 2);
        machine.write(common + 0x10, 0, 2);
        let mut drivers = Vec::new();
        for (queue, size) in (0u16..).zip(sizes) {
            let rings = u64::from(queue) * RINGS;
            machine.write(common + 0x16, u64::from(queue), 2);
            machine.write(common + 0x18, u64::from(*size), 2);
            machine.write(common + 0x1a, u64::from(queue) + 1, 2);
            assert_eq!(machine.read(common + 0x1a, 2), u64::from(queue) + 1);
            machine.memory.write_slice(&[0; RINGS as usize], GuestAddress(DESCRIPTORS + rings)).unwrap();
            machine.write(common + 0x20, DESCRIPTORS + rings, 8);
            machine.write(common + 0x28, AVAILABLE + rings, 4);
            machine.write(common + 0x2c, 0, 4);
            machine.write(common + 0x30, USED + rings, 8);
            machine.write(common + 0x1c, 1, 2);
            drivers.push(Self {
                slot,
                size: *size,
                common,
                queue,
                rings,
                notify: notify + u64::from(queue) * 4,
                event_idx: features & EVENT_IDX != 0,
                next_descriptor: 0,
                available: 0,
                used: 0,
            });
        }
        machine.write(common + 0x14, 15, 1);
        drivers
    }

    pub fn status(&self, machine: &Machine) -> u64 {
        machine.read(self.common + 0x14, 1)
    }

    fn descriptor(machine: &Machine, table: u64, index: u16, piece: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = piece;
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        machine.memory.write_slice(&raw, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    /// Writes one raw descriptor of the queue's table.
    pub fn raw_descriptor(machine: &Machine, index: u16, piece: (u64, u32, u16, u16)) {
        Self::descriptor(machine, DESCRIPTORS, index, piece);
    }

    /// Puts a chain into the table and offers it; no notification yet.
    pub fn offer(&mut self, machine: &Machine, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (at, (address, len, write)) in pieces.iter().enumerate() {
            let index = (head + at as u16) % self.size;
            let more = at + 1 < pieces.len();
            let flags = (u16::from(more) * NEXT) | (u16::from(*write) * WRITE);
            let next = if more { (index + 1) % self.size } else { 0 };
            Self::descriptor(machine, self.rings + DESCRIPTORS, index, (*address, *len, flags, next));
        }
        self.next_descriptor = (head + pieces.len() as u16) % self.size;
        self.offer_head(machine, head);
        head
    }

    /// The same through an indirect table.
    pub fn offer_indirect(&mut self, machine: &Machine, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        let table = INDIRECT_TABLES + u64::from(head) * 0x400;
        for (at, (address, len, write)) in (0..).zip(pieces) {
            let more = usize::from(at) + 1 < pieces.len();
            let flags = (u16::from(more) * NEXT) | (u16::from(*write) * WRITE);
            Self::descriptor(machine, table, at, (*address, *len, flags, at + 1));
        }
        let indirect = (table, pieces.len() as u32 * 16, INDIRECT_FLAG, 0);
        Self::descriptor(machine, self.rings + DESCRIPTORS, head, indirect);
        self.next_descriptor = (head + 1) % self.size;
        self.offer_head(machine, head);
        head
    }

    /// Offers whatever chain starts at `head`.
    pub fn offer_head(&mut self, machine: &Machine, head: u16) {
        let slot = self.rings + AVAILABLE + 4 + u64::from(self.available % self.size) * 2;
        machine.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        machine.memory.write_obj(self.available, GuestAddress(self.rings + AVAILABLE + 2)).unwrap();
    }

    pub fn kick(&self, machine: &Machine) {
        machine.write(self.notify, u64::from(self.queue), 2);
    }

    /// With EVENT_IDX: interrupt when `count` more chains have been used.
    pub fn want_interrupt_after(&self, machine: &Machine, count: u16) {
        assert!(self.event_idx);
        let event = self.used.wrapping_add(count).wrapping_sub(1);
        let at = self.rings + AVAILABLE + 4 + u64::from(self.size) * 2;
        machine.memory.write_obj(event, GuestAddress(at)).unwrap();
    }

    /// Chains used and not collected yet.
    pub fn waiting(&self, machine: &Machine) -> u16 {
        let index: u16 = machine.memory.read_obj(GuestAddress(self.rings + USED + 2)).unwrap();
        index.wrapping_sub(self.used)
    }

    /// Waits for `count` used chains; returns their heads and lengths.
    pub fn collect(&mut self, machine: &Machine, count: u16) -> Vec<(u16, u32)> {
        if self.event_idx {
            self.want_interrupt_after(machine, count);
        }
        // A chain may have been used before the device could see the wish, hence the look at the ring first.
        machine.messages.wait_until(|| self.waiting(machine) >= count);
        (0..count)
            .map(|_| {
                let slot = self.rings + USED + 4 + u64::from(self.used % self.size) * 8;
                self.used = self.used.wrapping_add(1);
                let (head, len): (u32, u32) = (
                    machine.memory.read_obj(GuestAddress(slot)).unwrap(),
                    machine.memory.read_obj(GuestAddress(slot + 4)).unwrap(),
                );
                (head as u16, len)
            })
            .collect()
    }
}
