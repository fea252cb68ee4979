//! The mirror of one disk: makes the target's image equal to the source's while the guest goes on writing.
//!
//! ```text
//! Bulk -> Synced -> Draining -> Drained          Degraded: back to Bulk
//!   the connection is lost -> Degraded (away) -> another connection -> Bulk
//! ```
//! A target image starts empty. Chunks that hold data at the source are dirty and are copied in the background; a guest write to a
//! clean chunk goes to both images at once, one to a dirty chunk stays local, since the copy will carry it. Two operations on
//! overlapping ranges never are in flight together, so both images see them in one order. The copy goes on while guest writes are
//! in flight, else it would never end under load.
//! While the target is away the guest goes on alone: what it writes turns dirty, as does everything whose answer has not come, since it
//! may or may not have been done. Nothing of that is sent twice but what was in flight. The driver says that the target is back only
//! once nothing of the old connection can be applied any more, else an old operation could overtake a new one.
//! Lives here: which range is copied, mirrored, waited for. Never enters: data, images, sockets.

mod claims;

use std::collections::BTreeMap;

use claims::Claims;

use crate::{
    pages::{PageRange, PageSet},
    wire::blocks::BlockOp,
};

/// Bytes of a chunk, the unit of the dirty map: the default cluster of qcow2.
pub const CHUNK_BYTES: u64 = 64 << 10;
/// Bytes of one background copy at most.
pub const COPY_BYTES: u64 = 512 << 10;
/// Background copies in flight at most.
pub const COPIES: usize = 8;
/// Failed operations after which the target's disk is given up.
const MAX_FAILURES: u32 = 3;

/// Number of an operation, given by the driver (guest operations) or by the mirror (copies, flush), unique among those in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OpId {
    /// A guest's operation.
    Guest(u64),
    /// A background copy.
    Copy(u64),
}

/// What a guest does to its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestOp {
    /// New data.
    Write,
    /// Zeroes that stay allocated.
    Zero,
    /// A hole.
    Discard,
}

/// Part of a range read for a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What was found there.
    pub content: Content,
}

/// What a piece holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes that are not all zero.
    Data,
    /// Zeroes in allocated space.
    Zero,
    /// A hole, reads as zeroes.
    Hole,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The source's image holds data in this range (from its allocation map); may come while guests write.
    Allocated {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The whole allocation map has been given.
    Mapped,
    /// The guest wants to change its disk.
    Guest {
        /// The driver's number for it.
        id: u64,
        /// What.
        op: GuestOp,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The local part of a guest operation has ended.
    LocalDone {
        /// Which.
        id: u64,
        /// Whether it worked; if not, the range holds anything.
        ok: bool,
    },
    /// A range asked for by [`Action::Copy`] has been read; pieces are in order and cover it.
    CopyRead {
        /// Which copy.
        id: u64,
        /// What was found.
        pieces: Vec<Piece>,
    },
    /// The range could not be read.
    CopyFailed {
        /// Which copy.
        id: u64,
    },
    /// The target has answered.
    Acked {
        /// Number of the operation on the wire.
        seq: u64,
        /// Whether it was done.
        done: bool,
    },
    /// The connection to the target is gone, and another one is hoped for.
    TargetAway,
    /// There is another connection, and the target has this many operations, done or failed; none is in flight there.
    TargetBack {
        /// How many: also the number of the last one.
        arrived: u64,
    },
    /// The target is given up.
    TargetLost,
    /// No guest operation will come any more (the queue is paused): finish, flush the target.
    Drain,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Do the guest's operation on the local image now and report [`Event::LocalDone`].
    Local {
        /// Which.
        id: u64,
    },
    /// Send an operation, in this order; data as it is in the guest's (owned) buffer or as it was read for the copy.
    Send {
        /// Number on the wire.
        seq: u64,
        /// Whose data.
        of: OpId,
        /// The operation; for `Write` the driver fills in the checksum.
        op: BlockOp,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The guest's operation is complete.
    Finish {
        /// Which.
        id: u64,
        /// Whether it worked locally.
        ok: bool,
    },
    /// Find out and read what the local image holds in this range; answer with [`Event::CopyRead`].
    Copy {
        /// Which copy.
        id: u64,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The copy's buffers are no longer needed.
    CopyDone {
        /// Which copy.
        id: u64,
    },
    /// The mirror has reached a state.
    Report(State),
}

/// States of the mirror, as reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Copying.
    Bulk,
    /// The target's image equals the source's, and stays so.
    Synced,
    /// The target failed an operation, or cannot be reached; its chunks are dirty again.
    Degraded,
    /// No guest operation is in flight or will come; the rest is being copied and flushed.
    Draining,
    /// Equal and on stable storage on the target.
    Drained,
    /// The target fails again and again, or is gone: the guest goes on alone, nothing is mirrored any more.
    Failed,
}

/// Counters for progress and the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes known to need copying, in all.
    pub total_bytes: u64,
    /// Bytes of the range copied so far.
    pub done_bytes: u64,
    /// Bytes of data sent by copies.
    pub copied_bytes: u64,
    /// Bytes of data sent for guest writes.
    pub mirrored_bytes: u64,
    /// Operations sent.
    pub ops: u64,
}

#[derive(Debug)]
struct Guest {
    op: GuestOp,
    offset: u64,
    len: u64,
    /// Wire number still unanswered.
    unacked: Option<u64>,
    /// Local part: none = not ended.
    local: Option<bool>,
}

#[derive(Debug)]
struct Copy {
    offset: u64,
    len: u64,
    /// None until read.
    unacked: Option<u32>,
    failed: bool,
}

/// The mirror of one disk.
#[derive(Debug)]
pub struct BlockMirror {
    size: u64,
    state: State,
    dirty: PageSet,
    /// Chunks the target may hold anything for: a hole there must be sent.
    touched: PageSet,
    claims: Claims,
    guests: BTreeMap<u64, Guest>,
    copies: BTreeMap<u64, Copy>,
    sent: BTreeMap<u64, OpId>,
    flush: Option<u64>,
    next_seq: u64,
    /// Highest number the target has answered.
    answered: u64,
    next_copy: u64,
    cursor: u64,
    mapped: bool,
    draining: bool,
    /// There is no connection to the target.
    away: bool,
    failures: u32,
    stats: Stats,
}

impl BlockMirror {
    /// For a disk of `size` bytes whose target image is new and empty.
    pub fn new(size: u64) -> Self {
        let chunks = size.div_ceil(CHUNK_BYTES);
        Self {
            size,
            state: State::Bulk,
            dirty: PageSet::empty(chunks),
            touched: PageSet::empty(chunks),
            claims: Claims::default(),
            guests: BTreeMap::new(),
            copies: BTreeMap::new(),
            sent: BTreeMap::new(),
            flush: None,
            next_seq: 1,
            answered: 0,
            next_copy: 1,
            cursor: 0,
            mapped: false,
            draining: false,
            away: false,
            failures: 0,
            stats: Stats::default(),
        }
    }

    /// Its state.
    pub fn state(&self) -> State {
        self.state
    }

    /// Its counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Where an operation lies that is sent and not answered: first byte and length. None for a flush.
    pub fn place_of(&self, seq: u64) -> Option<(u64, u64)> {
        match self.sent.get(&seq)? {
            OpId::Guest(id) => self.guests.get(id).map(|guest| (guest.offset, guest.len)),
            OpId::Copy(id) => self.copies.get(id).map(|copy| (copy.offset, copy.len)),
        }
    }

    /// Takes an event, gives what is to be done, in order.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Allocated { offset, len } => self.soil(offset, len),
            Event::Mapped => self.mapped = true,
            Event::Guest { id, op, offset, len } => {
                self.guests.insert(id, Guest { op, offset, len, unacked: None, local: None });
                if self.claims.claim(OpId::Guest(id), offset, len) {
                    self.start_guest(id, &mut out);
                }
            }
            Event::LocalDone { id, ok } => {
                if let Some(guest) = self.guests.get_mut(&id) {
                    guest.local = Some(ok);
                    let (offset, len) = (guest.offset, guest.len);
                    if !ok && self.state != State::Failed {
                        // The local range holds anything now; the target must follow it.
                        self.soil(offset, len);
                    }
                    self.finish_guest(id, &mut out);
                }
            }
            Event::CopyRead { id, pieces } => self.copy_read(id, &pieces, &mut out),
            Event::CopyFailed { id } => {
                if let Some(copy) = self.copies.get_mut(&id) {
                    copy.failed = true;
                    copy.unacked = Some(0);
                    self.note_failure(&mut out);
                    self.finish_copy(id, &mut out);
                }
            }
            // Late: what it answers has been taken back already.
            Event::Acked { .. } if self.away => {}
            Event::Acked { seq, done } => self.acked(seq, done, &mut out),
            Event::TargetAway => self.target_away(&mut out),
            Event::TargetBack { arrived } => self.target_back(arrived, &mut out),
            Event::TargetLost => self.give_up(&mut out),
            Event::Drain => {
                self.draining = true;
                if self.state != State::Failed {
                    self.report(State::Draining, &mut out);
                }
            }
        }
        self.pump(&mut out);
        out
    }

    fn start_guest(&mut self, id: u64, out: &mut Vec<Action>) {
        let Some(guest) = self.guests.get_mut(&id) else { return };
        let (op, offset, len) = (guest.op, guest.offset, guest.len);
        let chunks = chunks(offset, len);
        let all_dirty = (chunks.first..chunks.first + chunks.count).all(|c| self.dirty.contains(c));
        if self.away && self.state != State::Failed {
            self.soil(offset, len);
        } else if self.state != State::Failed && !all_dirty && len > 0 {
            let seq = self.next_seq;
            self.next_seq += 1;
            guest.unacked = Some(seq);
            self.sent.insert(seq, OpId::Guest(id));
            self.touched.insert(chunks);
            self.stats.ops += 1;
            let op = match op {
                GuestOp::Write => {
                    self.stats.mirrored_bytes += len;
                    BlockOp::Write { sum: 0 }
                }
                GuestOp::Zero => BlockOp::Zero,
                GuestOp::Discard => BlockOp::Discard,
            };
            out.push(Action::Send { seq, of: OpId::Guest(id), op, offset, len });
        }
        out.push(Action::Local { id });
    }

    fn start_copy(&mut self, id: u64, out: &mut Vec<Action>) {
        let Some(Copy { offset, len, .. }) = self.copies.get(&id) else { return };
        let (offset, len) = (*offset, *len);
        if self.state != State::Failed && !self.away {
            out.push(Action::Copy { id, offset, len });
            return;
        }
        // The target went while this waited for its range.
        self.copies.remove(&id);
        if self.state != State::Failed {
            self.dirty.insert(chunks(offset, len));
        }
        self.release(OpId::Copy(id), out);
    }

    fn finish_guest(&mut self, id: u64, out: &mut Vec<Action>) {
        let Some(Guest { unacked: None, local: Some(ok), .. }) = self.guests.get(&id) else { return };
        out.push(Action::Finish { id, ok: *ok });
        self.guests.remove(&id);
        self.release(OpId::Guest(id), out);
    }

    fn copy_read(&mut self, id: u64, pieces: &[Piece], out: &mut Vec<Action>) {
        if !self.copies.contains_key(&id) {
            return;
        }
        let mut sends = 0;
        if self.away
            && let Some(copy) = self.copies.get_mut(&id)
        {
            copy.failed = true;
        } else if self.state != State::Failed {
            for piece in pieces {
                let range = chunks(piece.offset, piece.len);
                let op = match piece.content {
                    Content::Data => {
                        self.stats.copied_bytes += piece.len;
                        BlockOp::Write { sum: 0 }
                    }
                    // The target's image began empty: what was never sent reads as zeroes there.
                    _ if !(range.first..range.first + range.count).any(|c| self.touched.contains(c)) => {
                        continue;
                    }
                    Content::Zero => BlockOp::Zero,
                    Content::Hole => BlockOp::Discard,
                };
                let seq = self.next_seq;
                self.next_seq += 1;
                sends += 1;
                self.sent.insert(seq, OpId::Copy(id));
                self.stats.ops += 1;
                out.push(Action::Send { seq, of: OpId::Copy(id), op, offset: piece.offset, len: piece.len });
            }
            for piece in pieces.iter().filter(|p| p.content == Content::Data) {
                self.touched.insert(chunks(piece.offset, piece.len));
            }
        }
        if let Some(copy) = self.copies.get_mut(&id) {
            copy.unacked = Some(sends);
        }
        self.finish_copy(id, out);
    }

    fn finish_copy(&mut self, id: u64, out: &mut Vec<Action>) {
        let Some(Copy { offset, len, unacked: Some(0), failed }) = self.copies.get(&id) else { return };
        let (offset, len, failed) = (*offset, *len, *failed);
        self.copies.remove(&id);
        if failed && self.state != State::Failed {
            self.dirty.insert(chunks(offset, len));
        } else {
            self.stats.done_bytes += len;
        }
        out.push(Action::CopyDone { id });
        self.release(OpId::Copy(id), out);
    }

    fn acked(&mut self, seq: u64, done: bool, out: &mut Vec<Action>) {
        if seq < self.next_seq {
            self.answered = self.answered.max(seq);
        }
        if self.flush == Some(seq) {
            self.flush = None;
            if done && self.quiet() && self.dirty.is_empty() {
                self.report(State::Drained, out);
            } else if !done {
                self.note_failure(out);
            }
            return;
        }
        match self.sent.remove(&seq) {
            Some(OpId::Guest(id)) => {
                if let Some(guest) = self.guests.get_mut(&id) {
                    guest.unacked = None;
                    let (offset, len) = (guest.offset, guest.len);
                    if !done {
                        self.soil(offset, len);
                        self.note_failure(out);
                    }
                    self.finish_guest(id, out);
                }
            }
            Some(OpId::Copy(id)) => {
                if let Some(copy) = self.copies.get_mut(&id) {
                    copy.unacked = copy.unacked.map(|n| n.saturating_sub(1));
                    copy.failed |= !done;
                    if !done {
                        self.note_failure(out);
                    }
                    self.finish_copy(id, out);
                }
            }
            // An answer to nothing: a lying or confused target.
            None => self.give_up(out),
        }
    }

    fn note_failure(&mut self, out: &mut Vec<Action>) {
        self.failures += 1;
        if self.failures >= MAX_FAILURES {
            self.give_up(out);
        } else if self.state != State::Failed {
            self.report(State::Degraded, out);
        }
    }

    /// The guest goes on alone: nothing waits for the target any more.
    fn give_up(&mut self, out: &mut Vec<Action>) {
        self.report(State::Failed, out);
        self.let_go(out);
    }

    /// The guest goes on alone for the time being. Whatever is unanswered may or may not have been done: its chunks are dirty.
    fn target_away(&mut self, out: &mut Vec<Action>) {
        if self.away || self.state == State::Failed {
            return;
        }
        self.away = true;
        self.report(State::Degraded, out);
        let unanswered: Vec<(u64, u64)> =
            self.guests.values().filter(|g| g.unacked.is_some()).map(|g| (g.offset, g.len)).collect();
        for (offset, len) in unanswered {
            self.soil(offset, len);
        }
        for copy in self.copies.values_mut() {
            copy.failed |= copy.unacked.is_some();
        }
        self.let_go(out);
    }

    fn target_back(&mut self, arrived: u64, out: &mut Vec<Action>) {
        if self.state == State::Failed {
            return;
        }
        if !self.away || arrived < self.answered || arrived >= self.next_seq {
            return self.give_up(out);
        }
        self.away = false;
        self.next_seq = arrived + 1;
        self.report(if self.draining { State::Draining } else { State::Bulk }, out);
    }

    /// Waits for no answer any more.
    fn let_go(&mut self, out: &mut Vec<Action>) {
        self.sent.clear();
        self.flush = None;
        let guests: Vec<u64> = self.guests.keys().copied().collect();
        for id in guests {
            if let Some(guest) = self.guests.get_mut(&id) {
                guest.unacked = None;
            }
            self.finish_guest(id, out);
        }
        let copies: Vec<u64> = self.copies.keys().copied().collect();
        for id in copies {
            if let Some(copy) = self.copies.get_mut(&id) {
                // One still being read ends when its read does.
                copy.unacked = copy.unacked.map(|_| 0);
            }
            self.finish_copy(id, out);
        }
    }

    fn release(&mut self, id: OpId, out: &mut Vec<Action>) {
        for granted in self.claims.release(id) {
            match granted {
                OpId::Guest(id) => self.start_guest(id, out),
                OpId::Copy(id) => self.start_copy(id, out),
            }
        }
    }

    /// Starts copies, reports sync, flushes at the end.
    fn pump(&mut self, out: &mut Vec<Action>) {
        if self.state == State::Failed || self.away {
            return;
        }
        while self.copies.len() < COPIES && !self.dirty.is_empty() {
            let (ranges, next) = self.dirty.take(self.cursor, COPY_BYTES / CHUNK_BYTES);
            let Some((run, rest)) = ranges.split_first() else { break };
            for range in rest {
                self.dirty.insert(*range);
            }
            self.cursor = if rest.is_empty() { next } else { run.first + run.count };
            let offset = run.first * CHUNK_BYTES;
            let len = (run.count * CHUNK_BYTES).min(self.size - offset);
            let id = self.next_copy;
            self.next_copy += 1;
            self.copies.insert(id, Copy { offset, len, unacked: None, failed: false });
            // Behind what the guest has in flight there, and before what it does next: else a guest that never rests would keep the
            // copy of its busiest chunks from ever being made.
            if self.claims.claim(OpId::Copy(id), offset, len) {
                self.start_copy(id, out);
            }
        }
        if !self.dirty.is_empty() || !self.copies.is_empty() || !self.mapped {
            return;
        }
        if self.draining {
            if self.quiet() && self.flush.is_none() && self.state != State::Drained {
                let seq = self.next_seq;
                self.next_seq += 1;
                self.flush = Some(seq);
                self.stats.ops += 1;
                out.push(Action::Send { seq, of: OpId::Copy(0), op: BlockOp::Flush, offset: 0, len: 0 });
            }
        } else if matches!(self.state, State::Bulk | State::Degraded) {
            self.report(State::Synced, out);
        }
    }

    fn quiet(&self) -> bool {
        self.guests.is_empty() && self.copies.is_empty()
    }

    fn soil(&mut self, offset: u64, len: u64) {
        if len == 0 || offset >= self.size {
            return;
        }
        let before = self.dirty.len();
        self.dirty.insert(chunks(offset, len.min(self.size - offset)));
        self.stats.total_bytes += (self.dirty.len() - before) * CHUNK_BYTES;
    }

    fn report(&mut self, state: State, out: &mut Vec<Action>) {
        if self.state != state {
            self.state = state;
            out.push(Action::Report(state));
        }
    }
}

/// The chunks a byte range touches.
fn chunks(offset: u64, len: u64) -> PageRange {
    let first = offset / CHUNK_BYTES;
    PageRange { first, count: (offset + len).div_ceil(CHUNK_BYTES).saturating_sub(first) }
}

#[cfg(test)]
mod tests;
