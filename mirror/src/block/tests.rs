//! The mirror against a model: two disks of sectors, completions in any order, failures, lost connections; equal at the end.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const SECTOR: u64 = 16 << 10;
const SIZE: u64 = 40 * CHUNK_BYTES / 2 + SECTOR;

#[derive(Debug, Clone)]
enum Pending {
    Local(u64),
    Read(u64, u64, u64),
    Wire { seq: u64, op: BlockOp, offset: u64, data: Vec<u32> },
}

struct World {
    mirror: BlockMirror,
    source: Vec<u32>,
    target: Vec<u32>,
    guest_data: BTreeMap<u64, (GuestOp, u64, Vec<u32>)>,
    copy_data: BTreeMap<u64, (u64, Vec<u32>)>,
    pending: Vec<Pending>,
    finished: Vec<u64>,
    issued: u64,
    /// Wire operations still to fail.
    failing: u32,
    state: State,
    /// Highest wire number ever sent on this connection or the ones before.
    sent: u64,
    /// Highest that was answered.
    answered: u64,
    /// Sectors sent with data.
    sectors_sent: u64,
}

impl World {
    fn new(source: Vec<u32>, failing: u32) -> Self {
        let mut world = Self {
            mirror: BlockMirror::new(SIZE),
            target: vec![0; source.len()],
            source,
            guest_data: BTreeMap::new(),
            copy_data: BTreeMap::new(),
            pending: vec![],
            finished: vec![],
            issued: 0,
            failing,
            state: State::Bulk,
            sent: 0,
            answered: 0,
            sectors_sent: 0,
        };
        let allocated: Vec<u64> =
            (0..world.source.len() as u64).filter(|s| world.source[*s as usize] != 0).collect();
        for sector in allocated {
            world.step(Event::Allocated { offset: sector * SECTOR, len: SECTOR });
        }
        world.step(Event::Mapped);
        world
    }

    fn step(&mut self, event: Event) {
        for action in self.mirror.step(event) {
            match action {
                Action::Local { id } => self.pending.push(Pending::Local(id)),
                Action::Send { seq, of, op, offset, len } => {
                    let data = match of {
                        OpId::Guest(id) => self.guest_data[&id].2.clone(),
                        OpId::Copy(0) => vec![],
                        OpId::Copy(id) => {
                            let (start, data) = &self.copy_data[&id];
                            let from = ((offset - start) / SECTOR) as usize;
                            data[from..from + (len / SECTOR) as usize].to_vec()
                        }
                    };
                    assert_eq!(seq, self.sent + 1, "numbers without gaps");
                    self.sent = seq;
                    if matches!(op, BlockOp::Write { .. }) {
                        self.sectors_sent += data.len() as u64;
                    }
                    self.pending.push(Pending::Wire { seq, op, offset, data });
                }
                Action::Finish { id, ok } => {
                    assert!(ok && !self.finished.contains(&id));
                    self.finished.push(id);
                }
                Action::Copy { id, offset, len } => self.pending.push(Pending::Read(id, offset, len)),
                Action::CopyDone { id } => assert!(self.copy_data.remove(&id).is_some()),
                Action::Report(state) => self.state = state,
            }
        }
    }

    fn guest(&mut self, op: GuestOp, sector: u64, count: u64) {
        self.issued += 1;
        let id = self.issued;
        let count = count.min(self.source.len() as u64 - sector);
        let value = if op == GuestOp::Write { id as u32 + 1000 } else { 0 };
        self.guest_data.insert(id, (op, sector, vec![value; count as usize]));
        self.step(Event::Guest { id, op, offset: sector * SECTOR, len: count * SECTOR });
    }

    fn complete(&mut self, index: usize) {
        match self.pending.swap_remove(index) {
            Pending::Local(id) => {
                let (_, sector, data) = self.guest_data[&id].clone();
                self.source[sector as usize..sector as usize + data.len()].copy_from_slice(&data);
                self.step(Event::LocalDone { id, ok: true });
            }
            Pending::Read(id, offset, len) => {
                let from = (offset / SECTOR) as usize;
                let data = self.source[from..from + (len / SECTOR) as usize].to_vec();
                let pieces = data.iter().enumerate().map(|(i, value)| Piece {
                    offset: offset + i as u64 * SECTOR,
                    len: SECTOR,
                    content: if *value == 0 { Content::Hole } else { Content::Data },
                });
                let pieces = pieces.collect();
                self.copy_data.insert(id, (offset, data));
                self.step(Event::CopyRead { id, pieces });
            }
            Pending::Wire { seq, op, offset, data } => {
                let done = self.apply(op, offset, &data);
                self.answered = self.answered.max(seq);
                self.step(Event::Acked { seq, done });
            }
        }
    }

    fn apply(&mut self, op: BlockOp, offset: u64, data: &[u32]) -> bool {
        let done = self.failing == 0 || op == BlockOp::Flush;
        let from = (offset / SECTOR) as usize;
        for (i, value) in data.iter().enumerate() {
            // A failed operation leaves anything behind.
            self.target[from + i] = if done { *value } else { 7 };
        }
        self.failing = self.failing.saturating_sub(u32::from(!done));
        done
    }

    /// The connection is lost. What is on its way: one part had arrived and is applied, its answers lost; the rest is gone. Gives how
    /// many operations the target has.
    fn cut(&mut self, choice: usize) -> u64 {
        let arrived = self.answered + choice as u64 % (self.sent - self.answered + 1);
        let pending = std::mem::take(&mut self.pending);
        for pending in pending {
            match pending {
                Pending::Wire { seq, op, offset, data } if seq <= arrived => {
                    self.apply(op, offset, &data);
                }
                Pending::Wire { .. } => {}
                other => self.pending.push(other),
            }
        }
        self.step(Event::TargetAway);
        arrived
    }

    fn reconnect(&mut self, arrived: u64) {
        (self.sent, self.answered) = (arrived, arrived);
        self.step(Event::TargetBack { arrived });
    }

    fn run_out(&mut self, mut order: impl FnMut(usize) -> usize) {
        while !self.pending.is_empty() {
            let index = order(self.pending.len());
            self.complete(index);
        }
    }
}

fn ops() -> impl Strategy<Value = Vec<(u8, u64, u64, usize)>> {
    let sectors = SIZE / SECTOR;
    proptest::collection::vec((0u8..6, 0..sectors, 1u64..9, any::<usize>()), 0..150)
}

proptest! {
    #[test]
    fn target_equals_source_when_drained(
        source in proptest::collection::vec(0u32..3, (SIZE / SECTOR) as usize),
        ops in ops(),
        failing in 0u32..3,
    ) {
        let mut world = World::new(source, failing);
        let mut last = 0;
        for (kind, sector, count, choice) in ops {
            match kind {
                0 => world.guest(GuestOp::Write, sector, count),
                1 => world.guest(GuestOp::Discard, sector, count),
                2 => world.guest(GuestOp::Zero, sector, count),
                _ if world.pending.is_empty() => {}
                _ => world.complete(choice % world.pending.len()),
            }
            last = choice;
        }
        world.step(Event::Drain);
        world.run_out(|n| { last = last.wrapping_mul(6364136223846793005).wrapping_add(1); (last >> 33) % n });
        prop_assert_eq!(world.state, State::Drained);
        prop_assert_eq!(&world.source, &world.target);
        prop_assert_eq!(world.finished.len() as u64, world.issued);
    }

    /// The connection is lost and made again, over and over, while the guest goes on.
    #[test]
    fn lost_connections_leave_no_difference(
        source in proptest::collection::vec(0u32..3, (SIZE / SECTOR) as usize),
        ops in proptest::collection::vec((0u8..9, 0..SIZE / SECTOR, 1u64..9, any::<usize>()), 0..200),
        failing in 0u32..3,
    ) {
        let mut world = World::new(source, failing);
        let (mut last, mut away) = (0, None);
        for (kind, sector, count, choice) in ops {
            match (kind, away) {
                (0, _) => world.guest(GuestOp::Write, sector, count),
                (1, _) => world.guest(GuestOp::Discard, sector, count),
                (2, _) => world.guest(GuestOp::Zero, sector, count),
                (3, None) if choice % 3 == 0 => away = Some(world.cut(choice / 3)),
                (3, Some(arrived)) => {
                    world.reconnect(arrived);
                    away = None;
                }
                _ if world.pending.is_empty() => {}
                _ => world.complete(choice % world.pending.len()),
            }
            if away.is_some() {
                let sent = world.pending.iter().any(|p| matches!(p, Pending::Wire { .. }));
                prop_assert!(!sent, "nothing is sent to a target that is away");
            }
            last = choice;
        }
        if let Some(arrived) = away {
            // Nobody waits for a target that is away.
            let mut waiting = world.pending.iter().filter(|p| matches!(p, Pending::Local(_))).count();
            while waiting > 0 {
                let index = world.pending.iter().position(|p| matches!(p, Pending::Local(_))).unwrap();
                world.complete(index);
                waiting = world.pending.iter().filter(|p| matches!(p, Pending::Local(_))).count();
            }
            world.run_out(|_| 0);
            prop_assert_eq!(world.finished.len() as u64, world.issued);
            world.reconnect(arrived);
        }
        world.step(Event::Drain);
        world.run_out(|n| { last = last.wrapping_mul(6364136223846793005).wrapping_add(1); (last >> 33) % n });
        prop_assert_eq!(world.state, State::Drained);
        prop_assert_eq!(&world.source, &world.target);
        prop_assert_eq!(world.finished.len() as u64, world.issued);
    }

    /// When the target goes away in the middle, every guest operation still completes.
    #[test]
    fn a_lost_target_holds_nobody_up(
        source in proptest::collection::vec(0u32..3, (SIZE / SECTOR) as usize),
        ops in ops(),
        cut in 0usize..150,
    ) {
        let mut world = World::new(source, 0);
        for (i, (kind, sector, count, choice)) in ops.into_iter().enumerate() {
            if i == cut {
                world.step(Event::TargetLost);
                world.pending.retain(|p| !matches!(p, Pending::Wire { .. }));
            }
            match kind {
                0..=2 => world.guest(GuestOp::Write, sector, count),
                _ if world.pending.is_empty() => {}
                _ => world.complete(choice % world.pending.len()),
            }
        }
        world.step(Event::TargetLost);
        world.pending.retain(|p| !matches!(p, Pending::Wire { .. }));
        world.run_out(|_| 0);
        prop_assert_eq!(world.state, State::Failed);
        prop_assert_eq!(world.finished.len() as u64, world.issued);
    }
}

#[test]
fn an_empty_disk_is_synced_without_a_byte() {
    let mut world = World::new(vec![0; (SIZE / SECTOR) as usize], 0);
    assert_eq!(world.state, State::Synced);
    assert!(world.pending.is_empty());
    world.step(Event::Drain);
    world.run_out(|_| 0);
    assert_eq!((world.state, world.mirror.stats().copied_bytes), (State::Drained, 0));
}

#[test]
fn a_target_that_always_fails_is_given_up() {
    let mut world = World::new(vec![1; (SIZE / SECTOR) as usize], 1000);
    world.guest(GuestOp::Write, 0, 3);
    world.run_out(|_| 0);
    assert_eq!(world.state, State::Failed);
    assert_eq!(world.finished, [1]);
}

#[test]
fn guest_writes_to_chunks_not_yet_copied_are_not_sent_twice() {
    let mut world = World::new(vec![1; (SIZE / SECTOR) as usize], 0);
    // The last chunk is far behind the first copies.
    world.guest(GuestOp::Write, SIZE / SECTOR - 1, 1);
    assert_eq!(world.mirror.stats().mirrored_bytes, 0);
    world.run_out(|_| 0);
    world.guest(GuestOp::Write, 0, 1);
    assert_eq!(world.mirror.stats().mirrored_bytes, SECTOR);
}

#[test]
fn nothing_is_sent_twice_but_what_was_in_flight() {
    let sectors = SIZE / SECTOR;
    let mut world = World::new(vec![1; sectors as usize], 0);
    // All copies that may be in flight at once are, and of none of them an answer has come.
    while let Some(read) = world.pending.iter().position(|p| matches!(p, Pending::Read(..))) {
        world.complete(read);
    }
    let in_flight = world.sectors_sent;
    assert!(in_flight > 0);
    let arrived = world.cut(0);
    world.guest(GuestOp::Write, 0, 1);
    world.run_out(|_| 0);
    world.reconnect(arrived);
    world.run_out(|_| 0);
    assert_eq!((world.state, world.sectors_sent), (State::Synced, sectors + in_flight));
    assert_eq!(world.source, world.target);

    // In sync and idle, a lost connection costs nothing, and a write meanwhile its chunk.
    let arrived = world.cut(0);
    assert_eq!(world.state, State::Degraded);
    world.reconnect(arrived);
    assert_eq!((world.state, world.sectors_sent), (State::Synced, sectors + in_flight));
    let arrived = world.cut(0);
    world.guest(GuestOp::Write, 3, 1);
    world.run_out(|_| 0);
    assert_eq!(world.finished, [1, 2]);
    world.reconnect(arrived);
    world.run_out(|_| 0);
    let chunk = CHUNK_BYTES / SECTOR;
    assert_eq!((world.state, world.sectors_sent), (State::Synced, sectors + in_flight + chunk));
    assert_eq!(world.source, world.target);
}

#[test]
fn a_target_that_counts_wrong_is_given_up() {
    for wrong in [-1, 1] {
        let mut world = World::new(vec![1; (SIZE / SECTOR) as usize], 0);
        world.run_out(|_| 0);
        let arrived = world.cut(0);
        world.step(Event::TargetBack { arrived: arrived.checked_add_signed(wrong).unwrap() });
        assert_eq!(world.state, State::Failed);
    }
}

/// A guest that always has something in flight everywhere: found by the simulator (a move that never left its mirror phase).
#[test]
fn a_guest_that_never_rests_does_not_keep_the_copy_from_being_made() {
    let sectors = SIZE / SECTOR;
    let mut world = World::new(vec![1; sectors as usize], 0);
    let mut rounds = 0;
    while world.state != State::Synced {
        assert!(rounds < 100, "the copy starves");
        rounds += 1;
        // The next ones are issued before those before them are complete.
        let under_way = world.pending.len();
        for first in (0..sectors).step_by(4) {
            world.guest(GuestOp::Write, first, 8);
        }
        for index in (0..under_way).rev() {
            world.complete(index);
        }
    }
    world.step(Event::Drain);
    world.run_out(|_| 0);
    assert_eq!((world.state, &world.source), (State::Drained, &world.target));
}
