//! The mirror of one disk at the source: `vmove_mirror::block` between the guest's requests and its image, and the block stream.
//!
//! Lives here: carrying out what it decides. Never enters: which range when.

use std::collections::BTreeMap;

use vmove_mirror::{
    block::{Action, BlockMirror, Content, Event, OpId, Piece},
    ledger::BlocksLedger,
    source,
    wire::blocks::{BlockAck, BlockHead, BlockOp},
};

use super::{
    super::{
        Pid,
        mutations::Mutation,
        net::{ConnId, Packet},
        storage::{HOLE, SECTOR_BYTES, ZERO},
        world::{Happening, World},
    },
    Process,
    machine::Gate,
    sum_of,
};

/// The mirror on a disk.
pub struct BlocksOut {
    /// Index among the copied disks.
    pub index: usize,
    /// The engine.
    pub mirror: BlockMirror,
    /// The block stream; none while the target is away.
    pub conn: Option<ConnId>,
    /// What was told to it before it was attached.
    pub early: Vec<Event>,
    /// Contents read for copies: first sector and stamps.
    copies: BTreeMap<u64, (usize, Vec<u64>)>,
    /// What was sent.
    pub ledger: BlocksLedger,
    /// Highest operation sent, and highest answered.
    pub sent: u64,
    /// See there.
    pub answered: u64,
    /// When the target was last heard of, or began to owe an answer.
    pub heard: u64,
}

impl BlocksOut {
    /// A mirror for a disk of `sectors`, to be attached.
    pub fn new(index: usize, sectors: usize, conn: ConnId) -> Self {
        Self {
            index,
            mirror: BlockMirror::new(sectors as u64 * SECTOR_BYTES),
            conn: Some(conn),
            early: Vec::new(),
            copies: BTreeMap::new(),
            ledger: BlocksLedger::default(),
            sent: 0,
            answered: 0,
            heard: 0,
        }
    }

    /// Whether the target owes an answer.
    pub fn owed(&self) -> bool {
        self.sent > self.answered
    }
}

impl World {
    /// A mirror has been put on a disk: it is told where the image holds data.
    pub fn mirror_attached(&mut self, pid: Pid, disk: usize) {
        let Some(contents) = self.disk_contents(pid, disk) else { return };
        for (sector, value) in contents.iter().enumerate() {
            if *value != HOLE && *value != ZERO {
                let (offset, len) = super::bytes(sector, 1);
                self.mirror_step(pid, disk, Event::Allocated { offset, len });
            }
        }
        self.mirror_step(pid, disk, Event::Mapped);
        let early = self.tap(pid, disk).map(|tap| std::mem::take(&mut tap.early)).unwrap_or_default();
        for event in early {
            self.mirror_step(pid, disk, event);
        }
    }

    /// Tells the mirror of a disk something, also while it waits to be attached.
    pub fn mirror_told(&mut self, pid: Pid, disk: usize, event: Event) {
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        let disk_of = &mut machine.disks[disk];
        let waiting = disk_of.gates.iter_mut().find_map(|gate| match gate {
            Gate::Attach(mirror) => Some(mirror),
            _ => None,
        });
        match waiting {
            Some(mirror) => mirror.early.push(event),
            None => self.mirror_step(pid, disk, event),
        }
    }

    /// The mirror of a disk, also while it waits to be attached.
    pub fn mirror_of(&mut self, pid: Pid, disk: usize) -> Option<&mut BlocksOut> {
        let disk = self.process(pid)?.machine.as_mut()?.disks.get_mut(disk)?;
        let waiting = disk.gates.iter_mut().find_map(|gate| match gate {
            Gate::Attach(mirror) => Some(mirror.as_mut()),
            _ => None,
        });
        waiting.or(disk.tap.as_deref_mut())
    }

    /// Steps the mirror of a disk, if there is one.
    pub fn mirror_step(&mut self, pid: Pid, disk: usize, event: Event) {
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        let Some(tap) = machine.disks[disk].tap.as_mut() else { return };
        let actions = tap.mirror.step(event);
        let index = tap.index;
        for action in actions {
            match action {
                Action::Local { id } => self.local_part(pid, id),
                Action::Finish { id, ok } => self.complete(pid, id, ok),
                Action::Send { seq, of, op, offset, len } => {
                    self.send_block(pid, disk, of, BlockHead { seq, op, offset, len });
                }
                Action::Copy { id, offset, len } => {
                    let delay = 1 + self.dice.disk.range(0..self.shape.disk_delay);
                    self.ranges_to_copy(pid, disk, id, offset, len);
                    self.after(delay, Happening::CopyRead { pid, disk, id });
                }
                Action::CopyDone { id } => {
                    if let Some(tap) = self.tap(pid, disk) {
                        tap.copies.remove(&id);
                    }
                }
                Action::Report(state) => {
                    self.note(|| format!("process {pid}: the mirror of disk {disk} is {state:?}"));
                    self.post_source(pid, source::Event::Disk { index, state });
                }
            }
        }
    }

    fn tap(&mut self, pid: Pid, disk: usize) -> Option<&mut BlocksOut> {
        self.process(pid)?.machine.as_mut()?.disks.get_mut(disk)?.tap.as_deref_mut()
    }

    fn ranges_to_copy(&mut self, pid: Pid, disk: usize, id: u64, offset: u64, len: u64) {
        let (first, count) = super::sectors(offset, len);
        if let Some(tap) = self.tap(pid, disk) {
            tap.copies.insert(id, (first, vec![HOLE; count]));
        }
    }

    /// The range of a copy has been read.
    pub fn copy_read(&mut self, pid: Pid, disk: usize, id: u64) {
        let Some((first, count)) =
            self.tap(pid, disk).and_then(|tap| tap.copies.get(&id)).map(|(first, data)| (*first, data.len()))
        else {
            return;
        };
        let fails = self.host_of(pid).is_some_and(|host| self.hosts[host].image_fails());
        if fails {
            return self.mirror_step(pid, disk, Event::CopyFailed { id });
        }
        let Some(contents) = self.disk_contents(pid, disk) else { return };
        let found = contents[first..first + count].to_vec();
        let mut pieces: Vec<Piece> = Vec::new();
        for (at, value) in found.iter().enumerate() {
            let content = match *value {
                HOLE => Content::Hole,
                ZERO => Content::Zero,
                _ => Content::Data,
            };
            let (offset, len) = super::bytes(first + at, 1);
            match pieces.last_mut() {
                Some(last) if last.content == content => last.len += len,
                _ => pieces.push(Piece { offset, len, content }),
            }
        }
        if let Some(tap) = self.tap(pid, disk) {
            tap.copies.insert(id, (first, found));
        }
        self.mirror_step(pid, disk, Event::CopyRead { id, pieces });
    }

    fn send_block(&mut self, pid: Pid, disk: usize, of: OpId, mut head: BlockHead) {
        let now = self.now;
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        let Some(tap) = machine.disks[disk].tap.as_deref_mut() else { return };
        let mut data = Vec::new();
        if let BlockOp::Write { sum } = &mut head.op {
            let (first, count) = super::sectors(head.offset, head.len);
            data = match of {
                OpId::Guest(id) => machine.requests.get(&id).map(|r| r.values.clone()).unwrap_or_default(),
                OpId::Copy(id) => tap
                    .copies
                    .get(&id)
                    .map(|(start, stamps)| stamps[first - start..first - start + count].to_vec())
                    .unwrap_or_default(),
            };
            *sum = sum_of(&data);
        }
        let Ok(bytes) = head.encode() else {
            return self.violate("equal_at_switch", format!("a block frame that cannot be sent: {head:?}"));
        };
        let Some(conn) = tap.conn else { return };
        if !tap.owed() {
            tap.heard = now;
        }
        tap.sent = head.seq;
        tap.ledger.sent(&bytes, head.data_bytes());
        if !self.send(conn, 0, Packet::Frame { bytes, data }) {
            self.disk_away(pid, disk, source::Event::LinkLost("a block stream".into()));
        }
    }

    /// An acknowledgement has arrived.
    pub fn block_acked(&mut self, pid: Pid, conn: ConnId, head: &[u8]) {
        let Some(disk) = self.disk_of(pid, conn) else { return };
        let now = self.now;
        let acked = BlockAck::decode(head).map_err(|e| e.to_string()).and_then(|ack| {
            let tap = self.mirror_of(pid, disk).ok_or("no mirror")?;
            tap.heard = now;
            tap.answered = tap.answered.max(ack.seq);
            tap.ledger.acked(ack.seq).map_err(|e| e.to_string())?;
            Ok(ack)
        });
        match acked {
            Ok(ack) => {
                let done = ack.result.is_ok() || self.mutation == Some(Mutation::TrustFailedBlocks);
                self.mirror_told(pid, disk, Event::Acked { seq: ack.seq, done });
            }
            Err(why) => self.disk_away(pid, disk, source::Event::Failed(why)),
        }
    }

    /// The block stream of a disk is gone: the guest goes on alone meanwhile, the engine hears why.
    pub fn disk_away(&mut self, pid: Pid, disk: usize, why: source::Event) {
        self.mirror_told(pid, disk, Event::TargetAway);
        self.post_source(pid, why);
    }

    /// The disk whose mirror uses a connection.
    pub fn disk_of(&mut self, pid: Pid, conn: ConnId) -> Option<usize> {
        (0..self.shape.disks.len())
            .find(|disk| self.mirror_of(pid, *disk).is_some_and(|tap| tap.conn == Some(conn)))
    }
}
