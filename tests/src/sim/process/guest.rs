//! The guest: dirties pages, and reads, writes, zeroes, discards and flushes its disks with contents nobody wrote before.
//!
//! Lives here: what it does when. Never enters: what becomes of it.

use vmove_mirror::block::GuestOp;

use super::{
    super::{
        Pid,
        world::{Happening, World},
    },
    Process,
    machine::{Ask, Request, mark_of},
};

/// Requests it keeps in flight at most.
const DEPTH: usize = 12;
/// How long it is busy once it is moved: a move that waits for a dead link needs no guest to be looked at.
const TIRING: u64 = 5_000_000;
/// How much slower it is while nobody moves it: nothing of it is looked at then.
const IDLE: u64 = 400;

impl World {
    /// Starts the guest's vCPUs.
    pub fn resume_guest(&mut self, pid: Pid) {
        if let Some(Process { machine: Some(machine), .. }) = self.process(pid) {
            machine.running = true;
        }
        self.check_one_runner();
        self.wake_guest(pid);
    }

    /// The guest does something soon.
    pub fn wake_guest(&mut self, pid: Pid) {
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        machine.beat += 1;
        let beat = machine.beat;
        self.after(1, Happening::Guest { pid, beat });
    }

    /// The guest does one thing.
    pub fn guest_acts(&mut self, pid: Pid, beat: u32) {
        let pace = self.shape.guest_pace;
        let delay = 1 + self.dice.guest.range(0..2 * pace);
        let (pages, most) = (self.shape.pages, self.shape.guest_pages);
        let now = self.now;
        let Some(process) = self.process(pid) else { return };
        let busy = process.source.as_ref().is_some_and(|mv| now < mv.began + TIRING);
        let Some(machine) =
            process.machine.as_mut().filter(|machine| machine.running && machine.beat == beat)
        else {
            return;
        };
        let room = machine.requests.len() < DEPTH;
        if room && self.dice.guest.one_in(2) {
            self.guest_asks(pid);
        } else {
            let count = 1 + self.dice.guest.range(0..most);
            let first = self.dice.guest.range(1..pages);
            for page in (first..first + count).map(|page| 1 + (page - 1) % (pages - 1)) {
                let value = if self.dice.guest.one_in(8) { 0 } else { self.stamp() };
                if let Some(Process { machine: Some(machine), .. }) = self.process(pid) {
                    machine.write_page(page, value);
                }
            }
        }
        self.after(if busy { delay } else { delay * IDLE }, Happening::Guest { pid, beat });
    }

    fn guest_asks(&mut self, pid: Pid) {
        let dice = &mut self.dice.guest;
        let disk = dice.index(self.shape.disks.len());
        let size = self.shape.disks[disk];
        let sector = dice.index(size);
        let count = 1 + dice.index((size - sector).min(8));
        let ask = match dice.index(10) {
            0..=4 => Ask::Change(GuestOp::Write),
            5 => Ask::Change(GuestOp::Zero),
            6 => Ask::Change(GuestOp::Discard),
            7 => Ask::Flush,
            _ => Ask::Read { page: dice.range(1..self.shape.pages) },
        };
        let values = match ask {
            Ask::Change(op) => (0..count).map(|_| mark_of(op, self.stamp())).collect(),
            _ => Vec::new(),
        };
        let since = self.now;
        self.issue(pid, Request { disk, ask, sector, values, since, tapped: false, local: false });
    }
}
