//! Block requests as a guest's driver makes them.

use vm_memory::{Bytes, GuestAddress};

use super::{BUFFERS, Driver, Machine, Piece};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// Where request `slot` has its header, its data and its status.
pub fn places(slot: u64) -> (u64, u64, u64) {
    let base = BUFFERS + slot * 0x2_0000;
    (base, base + 0x1000, base + 0x800)
}

pub fn header(machine: &Machine, slot: u64, kind: u32, sector: u64) {
    let (header, _, status) = places(slot);
    machine.memory.write_obj(kind, GuestAddress(header)).unwrap();
    machine.memory.write_obj(0u32, GuestAddress(header + 4)).unwrap();
    machine.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
    machine.memory.write_obj(0xeeu8, GuestAddress(status)).unwrap();
}

/// The chain of a request with `len` bytes of data, which the device writes if `reads`.
pub fn chain(slot: u64, len: u32, reads: bool) -> Vec<Piece> {
    let (header, data, status) = places(slot);
    let mut pieces = vec![(header, 16, false), (status, 1, true)];
    if len > 0 {
        pieces.insert(1, (data, len, reads));
    }
    pieces
}

pub fn put(machine: &Machine, slot: u64, bytes: &[u8]) {
    machine.memory.write_slice(bytes, GuestAddress(places(slot).1)).unwrap();
}

pub fn get(machine: &Machine, slot: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    machine.memory.read_slice(&mut bytes, GuestAddress(places(slot).1)).unwrap();
    bytes
}

pub fn status(machine: &Machine, slot: u64) -> u8 {
    machine.memory.read_obj(GuestAddress(places(slot).2)).unwrap()
}

/// One request from offer to status.
pub fn request(driver: &mut Driver, machine: &Machine, kind: u32, sector: u64, len: u32) -> (u8, u32) {
    header(machine, 0, kind, sector);
    driver.offer(machine, &chain(0, len, matches!(kind, IN | GET_ID)));
    driver.kick(machine);
    let written = driver.collect(machine, 1)[0].1;
    (status(machine, 0), written)
}

pub fn write(driver: &mut Driver, machine: &Machine, sector: u64, bytes: &[u8]) {
    put(machine, 0, bytes);
    assert_eq!(request(driver, machine, OUT, sector, bytes.len() as u32), (OK, 1));
}

pub fn read(driver: &mut Driver, machine: &Machine, sector: u64, len: usize) -> Vec<u8> {
    put(machine, 0, &vec![0x55; len]);
    assert_eq!(request(driver, machine, IN, sector, len as u32), (OK, len as u32 + 1));
    get(machine, 0, len)
}

pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}
