//! The block stream at the target: operations checked and applied to an image, many at once, in any order; a flush waits for all.
//!
//! Lives here: an arriving image. Never enters: decisions.

use std::collections::VecDeque;

use vmove_mirror::{
    ledger::BlocksTally,
    source, target,
    wire::blocks::{BlockAck, BlockHead, BlockOp, Failure},
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
    machine::apply,
    source::Blocked,
    sum_of,
};

/// One operation on its way to the image.
#[derive(Debug, Clone)]
pub struct Op {
    head: BlockHead,
    data: Vec<u64>,
}

/// What an arriving image did.
#[derive(Debug, Clone)]
pub enum Applied {
    /// An operation.
    Op(Op),
    /// The flush that was asked for on the stream.
    Flush(u64),
    /// The flush at the end.
    Finished,
}

enum Command {
    Op(Op),
    Finish,
}

/// An arriving image.
pub struct BlocksIn {
    /// Its path.
    pub path: String,
    /// Its size, sectors.
    pub sectors: usize,
    /// The block stream; none while there is no connection.
    pub conn: Option<ConnId>,
    commands: VecDeque<Command>,
    in_flight: u32,
    flushing: bool,
    /// Everything that arrived is on stable storage.
    pub finished: bool,
    /// What has arrived.
    pub tally: BlocksTally,
}

impl BlocksIn {
    /// An image that is to be filled from a connection.
    pub fn new(path: String, sectors: usize, conn: Option<ConnId>) -> Self {
        Self {
            path,
            sectors,
            conn,
            commands: VecDeque::new(),
            in_flight: 0,
            flushing: false,
            finished: false,
            tally: BlocksTally::default(),
        }
    }

    /// Whether nothing of what arrived is still being applied.
    pub fn idle(&self) -> bool {
        self.in_flight == 0 && !self.flushing && self.commands.is_empty()
    }
}

impl World {
    fn arrival(&mut self, pid: Pid, disk: usize) -> Option<&mut BlocksIn> {
        let Process { source, target, .. } = self.process(pid)?;
        match (target, source) {
            (Some(target), _) => target.arrivals.get_mut(disk),
            (None, Some(source)) => source.local.get_mut(disk),
            (None, None) => None,
        }
    }

    /// A frame has arrived on a block stream.
    pub fn block_arrives(&mut self, pid: Pid, disk: usize, head: &[u8], data_len: u32, data: Vec<u64>) {
        let Some(arrival) = self.arrival(pid, disk) else { return };
        let size = arrival.sectors as u64 * SECTOR_BYTES;
        let head = match BlockHead::decode(head, data_len, size) {
            Ok(head) => head,
            Err(error) => return self.arrival_fails(pid, error.to_string()),
        };
        if let BlockOp::Write { sum } = head.op
            && sum_of(&data) != sum
        {
            return self.arrival_fails(pid, "a block was damaged on the way".into());
        }
        let Ok(frame) = head.encode() else { return };
        let Some(arrival) = self.arrival(pid, disk) else { return };
        if head.seq != arrival.tally.ops() + 1 {
            return self.arrival_fails(pid, "a block operation that is not the next one".into());
        }
        arrival.tally.add(&frame, head.data_bytes());
        arrival.commands.push_back(Command::Op(Op { head, data }));
        self.serve_arrival(pid, disk);
    }

    /// Has everything that arrived made durable; the target's driver goes on once that is done.
    pub fn finish_arrivals(&mut self, pid: Pid) {
        let mut disk = 0;
        while let Some(arrival) = self.arrival(pid, disk) {
            arrival.commands.push_back(Command::Finish);
            self.serve_arrival(pid, disk);
            disk += 1;
        }
    }

    fn arrival_fails(&mut self, pid: Pid, why: String) {
        match self.process(pid) {
            Some(Process { target: Some(_), .. }) => self.post_target(pid, target::Event::Failed(why)),
            _ => self.post_source(pid, source::Event::LinkLost(why)),
        }
    }

    fn serve_arrival(&mut self, pid: Pid, disk: usize) {
        let slowest = self.shape.disk_delay;
        loop {
            let delay = 1 + self.dice.disk.range(0..slowest);
            let Some(arrival) = self.arrival(pid, disk) else { return };
            let ordered = match arrival.commands.front() {
                None => return,
                Some(Command::Op(op)) => op.head.op == BlockOp::Flush,
                Some(Command::Finish) => true,
            };
            if arrival.flushing || ordered && arrival.in_flight > 0 {
                return;
            }
            let what = match arrival.commands.pop_front() {
                Some(Command::Op(op)) if ordered => Applied::Flush(op.head.seq),
                Some(Command::Op(op)) => {
                    arrival.in_flight += 1;
                    Applied::Op(op)
                }
                _ => Applied::Finished,
            };
            arrival.flushing = ordered;
            self.after(delay, Happening::Applied { pid, disk, what });
        }
    }

    /// An arriving image has done something.
    pub fn applied(&mut self, pid: Pid, disk: usize, what: Applied) {
        let Some(host) = self.host_of(pid) else { return };
        let unflushed = self.mutation == Some(Mutation::PrepareUnflushed);
        let fails = self.hosts[host].image_fails();
        let Some(arrival) = self.arrival(pid, disk) else { return };
        let (path, conn) = (arrival.path.clone(), arrival.conn);
        let answer = match &what {
            Applied::Op(op) => {
                arrival.in_flight -= 1;
                Some(op.head.seq)
            }
            Applied::Flush(seq) => {
                arrival.flushing = false;
                Some(*seq)
            }
            Applied::Finished => {
                arrival.flushing = false;
                arrival.finished = true;
                None
            }
        };
        let Some(image) = self.hosts[host].images.get_mut(&path) else { return };
        match what {
            // A failed operation leaves anything behind.
            Applied::Op(Op { head, .. }) if fails => {
                let (first, count) = super::sectors(head.offset, head.len);
                apply(image, first, &vec![super::super::storage::TORN; count]);
            }
            Applied::Op(Op { head, data }) => {
                let (first, count) = super::sectors(head.offset, head.len);
                match head.op {
                    BlockOp::Write { .. } => apply(image, first, &data),
                    BlockOp::Zero => apply(image, first, &vec![ZERO; count]),
                    _ => apply(image, first, &vec![HOLE; count]),
                }
            }
            _ if fails || unflushed => {}
            Applied::Flush(_) | Applied::Finished => image.flush(),
        }
        match answer {
            Some(seq) => {
                if let Some(conn) = conn
                    && let Ok(bytes) =
                        (BlockAck { seq, result: if fails { Err(Failure { error: 0 }) } else { Ok(()) } })
                            .encode()
                {
                    self.send(conn, 1, Packet::Frame { bytes, data: Vec::new() });
                }
            }
            None if fails => self.arrival_broken(pid),
            None => self.arrivals_finished(pid),
        }
        self.serve_arrival(pid, disk);
        self.target_unblocked(pid);
    }

    fn arrival_broken(&mut self, pid: Pid) {
        let why = "the arriving image cannot be flushed".to_string();
        match self.process(pid) {
            Some(Process { target: Some(target), .. }) => {
                target.blocked = None;
                self.post_target(pid, target::Event::Failed(why));
            }
            Some(Process { source: Some(mv), .. }) if mv.blocked == Some(Blocked::LocalProving) => {
                self.source_goes_on(pid);
                self.post_source(pid, source::Event::Failed(why));
            }
            // Another image has failed before.
            _ => {}
        }
    }

    fn arrivals_finished(&mut self, pid: Pid) {
        let Some(Process { source, target, .. }) = self.process(pid) else { return };
        match (target, source) {
            (Some(target), _) if target.arrivals.iter().all(|a| a.finished) => self.target_proves(pid),
            (None, Some(source)) if source.local.iter().all(|a| a.finished) => self.local_prepared(pid),
            _ => {}
        }
    }
}
