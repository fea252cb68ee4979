//! A simulated VM process: what `compute` does with every action of the engines, without its threads, rings and sockets.
//!
//! | module | stands for |
//! |---|---|
//! | [`machine`], [`guest`] | the machine and the guest in it |
//! | [`source`], [`dial`], [`after`], [`target`] | the drivers of the engines |
//! | [`pages`], [`blocks_out`], [`blocks_in`] | the streams |
//! | [`lifecycle`] | start, boot, control requests, end |

pub mod after;
pub mod blocks_in;
pub mod blocks_out;
pub mod dial;
pub mod guest;
pub mod lifecycle;
pub mod machine;
pub mod pages;
pub mod source;
pub mod target;

use vmove_compute::migrate::VmJournal;
use vmove_mirror::{
    journal::{DiskAt, MoveId},
    wire::{frame::Header, hello::Role},
};

use super::{
    HostId, Pid,
    net::{ConnId, Packet},
    storage::{JournalPlace, SECTOR_BYTES},
    world::World,
};

/// What a process is to its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// It has the VM.
    Running,
    /// The VM arrives.
    Incoming,
    /// The VM has left.
    Leaving,
}

/// A VM process.
pub struct Process {
    /// Its number, never used again.
    pub pid: Pid,
    /// What it is to its VM.
    pub run: Run,
    /// The VM's journal, held.
    pub journal: VmJournal<JournalPlace>,
    /// The machine.
    pub machine: Option<Machine>,
    /// Ownership generation.
    pub generation: u64,
    /// Where its images are.
    pub disks: Vec<DiskAt>,
    /// A move away.
    pub source: Option<Box<source::SourceMove>>,
    /// An arrival.
    pub target: Option<Box<target::TargetMove>>,
    /// The last move from here, and once it has ended, how.
    pub board: Option<(MoveId, Option<String>)>,
}

use machine::Machine;

/// Byte range of sectors.
pub fn bytes(sector: usize, count: usize) -> (u64, u64) {
    (sector as u64 * SECTOR_BYTES, count as u64 * SECTOR_BYTES)
}

/// Sectors of a byte range.
pub fn sectors(offset: u64, len: u64) -> (usize, usize) {
    ((offset / SECTOR_BYTES) as usize, (len / SECTOR_BYTES) as usize)
}

/// Checksum of a run of stamps.
pub fn sum_of(stamps: &[u64]) -> u64 {
    stamps.iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, stamp| {
        (sum ^ stamp).wrapping_mul(0x0000_0100_0000_01b3) ^ sum >> 29
    })
}

/// BLAKE3 of a run of stamps.
pub fn digest_of(stamps: &[u64]) -> [u8; 32] {
    let mut bytes = Vec::with_capacity(stamps.len() * 8);
    for stamp in stamps {
        bytes.extend(stamp.to_le_bytes());
    }
    *blake3::hash(&bytes).as_bytes()
}

impl World {
    /// Where a process lives.
    pub fn host_of(&self, pid: Pid) -> Option<HostId> {
        self.hosts.iter().position(|host| host.process.as_ref().is_some_and(|process| process.pid == pid))
    }

    /// What a disk of a machine reads now.
    pub fn disk_contents(&mut self, pid: Pid, disk: usize) -> Option<Vec<u64>> {
        let host = self.host_of(pid)?;
        let path = self.process(pid)?.machine.as_ref()?.disks.get(disk)?.at.path.clone();
        Some(self.hosts[host].images.get(&path)?.contents())
    }

    /// A packet reaches an end of a connection.
    pub fn arrive(&mut self, conn: ConnId, end: usize, packet: Packet) {
        let Some(it) = self.net.conn(conn) else { return };
        let ((_, pid), role) = (it.ends[end], it.role);
        if self.process(pid).is_none() {
            // Nobody listens there.
            self.lose(conn, end);
            return self.lose(conn, 1 - end);
        }
        match packet {
            Packet::End => self.lose(conn, end),
            Packet::Hello(bytes) => self.target_greets(pid, conn, role, bytes),
            Packet::Answer(bytes) => self.source_answered(pid, conn, &bytes),
            packet if end == 1 && self.hold_back(pid, conn, &packet) => {}
            Packet::Frame { mut bytes, mut data } => {
                self.damage(role, &mut bytes, &mut data);
                let Some(header) = bytes.first_chunk().and_then(|fixed| Header::decode(fixed).ok()) else {
                    return self.nonsense(pid, conn, end, role);
                };
                let head = &bytes[Header::BYTES..];
                if header.check(head).is_err() {
                    return self.nonsense(pid, conn, end, role);
                }
                match (end, role) {
                    (0, Role::Disk(_)) => self.block_acked(pid, conn, head),
                    (0, _) => self.source_hears(pid, role, head),
                    (_, Role::Control) => self.target_hears(pid, head),
                    (_, Role::Pages(_)) => self.pages_arrive(pid, conn, header, head, &data),
                    (_, Role::Disk(index)) => {
                        self.block_arrives(pid, index.into(), head, header.data_len, data);
                    }
                }
            }
        }
    }

    /// Bytes that are no frame: the reader of the connection gives up.
    fn nonsense(&mut self, pid: Pid, conn: ConnId, end: usize, role: Role) {
        self.note(|| format!("process {pid} cannot read what came on its {role:?} connection"));
        let why = "a frame was damaged on the way".to_string();
        if end == 1 {
            match self.process(pid) {
                Some(Process { target: Some(_), .. }) => {
                    self.post_target(pid, vmove_mirror::target::Event::Failed(why));
                }
                _ => self.post_source(pid, vmove_mirror::source::Event::LinkLost(why)),
            }
        } else {
            self.source_lost(pid, role, conn, vmove_mirror::source::Event::Failed(why));
        }
    }
}
