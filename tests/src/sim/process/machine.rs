//! A simulated machine: RAM with a dirty log, disks behind queues, requests in flight, and the gates a mirror is put in and out by.
//!
//! As `compute` does it: what changes the way to a disk (a mirror, another image) waits until no request is in flight there.
//! Lives here: requests from their issue to their end. Never enters: what the guest wants, what a mirror decides.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use vmove_mirror::{
    block::{self, GuestOp},
    journal::DiskAt,
    pages::{PageRange, PageSet},
    source,
};

use super::{
    super::{
        Pid,
        mutations::Mutation,
        storage::{HOLE, Image, ZERO, read_as},
        world::{Happening, World},
    },
    Process,
    blocks_out::BlocksOut,
};

/// What a guest asks of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Change sectors.
    Change(GuestOp),
    /// Read a sector into a page.
    Read {
        /// The page.
        page: u64,
    },
    /// Make everything that is complete durable.
    Flush,
}

/// One request of the guest.
#[derive(Debug, Clone)]
pub struct Request {
    /// Index of the disk.
    pub disk: usize,
    /// What.
    pub ask: Ask,
    /// First sector.
    pub sector: usize,
    /// Contents, one a sector (zeroes and holes by their marks).
    pub values: Vec<u64>,
    /// When it was issued, microseconds.
    pub since: u64,
    /// It goes through a mirror.
    pub tapped: bool,
    /// Its local part is under way.
    pub local: bool,
}

/// What is done to the way to a disk once nothing is in flight there.
pub enum Gate {
    /// A mirror is put in.
    Attach(Box<BlocksOut>),
    /// It is taken out.
    Detach,
    /// The guest gets another image.
    Pivot(DiskAt),
}

/// One disk.
pub struct Disk {
    /// Where its image lies.
    pub at: DiskAt,
    /// The mirror on it.
    pub tap: Option<Box<BlocksOut>>,
    /// Requests in flight.
    pub in_flight: BTreeSet<u64>,
    /// Requests that wait at a gate.
    pub held: VecDeque<u64>,
    /// Gates that wait for silence.
    pub gates: VecDeque<Gate>,
}

/// A machine.
pub struct Machine {
    /// The vCPUs run.
    pub running: bool,
    /// One stamp a page.
    pub ram: Vec<u64>,
    /// Pages ever touched.
    pub touched: PageSet,
    /// Pages that turned dirty, while that is logged.
    pub log: Option<PageSet>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Requests that are not complete.
    pub requests: BTreeMap<u64, Request>,
    /// Number of the next one.
    pub next_request: u64,
    /// Counts the starts of the vCPUs: the guest's doings belong to one.
    pub beat: u32,
    /// Somebody waits for all queues to be empty, to tell a source's engine.
    pub draining: bool,
}

impl Machine {
    /// A machine with empty memory.
    pub fn new(pages: u64, disks: &[DiskAt]) -> Self {
        let disk = |at: &DiskAt| Disk {
            at: at.clone(),
            tap: None,
            in_flight: BTreeSet::new(),
            held: VecDeque::new(),
            gates: VecDeque::new(),
        };
        Self {
            running: false,
            ram: vec![0; pages as usize],
            touched: PageSet::empty(pages),
            log: None,
            disks: disks.iter().map(disk).collect(),
            requests: BTreeMap::new(),
            next_request: 1,
            beat: 0,
            draining: false,
        }
    }

    /// Writes a page, as a vCPU or a device does.
    pub fn write_page(&mut self, page: u64, value: u64) {
        let range = PageRange { first: page, count: 1 };
        self.ram[page as usize] = value;
        self.touched.insert(range);
        if let Some(log) = &mut self.log {
            log.insert(range);
        }
    }

    /// Whether no request is anywhere between the guest and its disks.
    pub fn quiet(&self) -> bool {
        self.requests.is_empty()
    }
}

impl World {
    /// The guest issues a request.
    pub fn issue(&mut self, pid: Pid, request: Request) {
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        let id = machine.next_request;
        machine.next_request += 1;
        let disk = &mut machine.disks[request.disk];
        let gated = !disk.gates.is_empty();
        if gated {
            disk.held.push_back(id);
        }
        self.checkers.flushed.issued(pid, id, &request);
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        machine.requests.insert(id, request);
        if !gated {
            self.begin_request(pid, id);
        }
    }

    fn begin_request(&mut self, pid: Pid, id: u64) {
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        let Some(request) = machine.requests.get_mut(&id) else { return };
        let index = request.disk;
        machine.disks[index].in_flight.insert(id);
        let Ask::Change(op) = request.ask else { return self.local_part(pid, id) };
        if machine.disks[index].tap.is_none()
            || self.mutation == Some(Mutation::WritePastMirror) && id.is_multiple_of(5)
        {
            return self.local_part(pid, id);
        }
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        let Some(request) = machine.requests.get_mut(&id) else { return };
        request.tapped = true;
        let (offset, len) = super::bytes(request.sector, request.values.len());
        self.mirror_step(pid, index, block::Event::Guest { id, op, offset, len });
    }

    /// Starts the local part of a request.
    pub fn local_part(&mut self, pid: Pid, id: u64) {
        if let Some(Process { machine: Some(machine), .. }) = self.process(pid)
            && let Some(request) = machine.requests.get_mut(&id)
        {
            request.local = true;
        }
        let delay = 1 + self.dice.disk.range(0..self.shape.disk_delay);
        self.after(delay, Happening::Request { pid, id });
    }

    /// The local part of a request is done: the image, or the guest's memory, has it.
    pub fn request_local(&mut self, pid: Pid, id: u64) {
        let Some(host) = self.hosts.iter().position(|h| h.process.as_ref().is_some_and(|p| p.pid == pid))
        else {
            return;
        };
        let it = &mut self.hosts[host];
        let fails = it.image_fails();
        let Some(machine) = it.process.as_mut().and_then(|process| process.machine.as_mut()) else { return };
        let Some(request) = machine.requests.get_mut(&id) else { return };
        request.local = false;
        let request = request.clone();
        let path = machine.disks[request.disk].at.path.clone();
        let Some(image) = it.images.get_mut(&path) else {
            return self.violate("no_leftovers", format!("the image {path} of a running VM is gone"));
        };
        match request.ask {
            _ if fails => {}
            Ask::Change(_) => apply(image, request.sector, &request.values),
            Ask::Read { page } => {
                let found = read_as(image.read(request.sector));
                machine.write_page(page, found);
                let wrong = self.checkers.flushed.read(pid, id, &request, found, self.now);
                self.found(wrong);
            }
            Ask::Flush => image.flush(),
        }
        if fails {
            self.note(|| format!("process {pid}: an operation of the guest fails on {path}"));
        }
        if request.tapped {
            self.mirror_step(pid, request.disk, block::Event::LocalDone { id, ok: !fails });
        } else {
            self.complete(pid, id, !fails);
        }
    }

    /// A request is complete: the guest is told.
    pub fn complete(&mut self, pid: Pid, id: u64, ok: bool) {
        let now = self.now;
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        let Some(request) = machine.requests.remove(&id) else { return };
        let index = request.disk;
        machine.disks[index].in_flight.remove(&id);
        // The used ring is in page 0.
        let ring = machine.ram[0].wrapping_add(1);
        machine.write_page(0, ring);
        self.checkers.flushed.completed(pid, id, &request, ok);
        let wrong = self.checkers.runs_on.completed(&request, now);
        self.found(wrong);
        self.open_gates(pid, index);
        self.drained(pid);
    }

    /// Has something done to the way to a disk, once nothing is in flight there.
    pub fn gate(&mut self, pid: Pid, disk: usize, gate: Gate) {
        if let Some(Process { machine: Some(machine), .. }) = self.process(pid) {
            machine.disks[disk].gates.push_back(gate);
        }
        self.open_gates(pid, disk);
    }

    fn open_gates(&mut self, pid: Pid, index: usize) {
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        let disk = &mut machine.disks[index];
        if !disk.in_flight.is_empty() || disk.gates.is_empty() {
            return;
        }
        let mut attached = false;
        while let Some(gate) = disk.gates.pop_front() {
            match gate {
                Gate::Attach(mirror) => {
                    disk.tap = Some(mirror);
                    attached = true;
                }
                Gate::Detach => {
                    disk.tap = None;
                    attached = false;
                }
                Gate::Pivot(at) => {
                    disk.tap = None;
                    disk.at = at;
                }
            }
        }
        let held: Vec<u64> = disk.held.drain(..).collect();
        if attached {
            self.mirror_attached(pid, index);
        }
        for id in held {
            self.begin_request(pid, id);
        }
        self.source_unblocked(pid);
    }

    /// Tells the source's engine once the queues are empty, if it waits for that.
    pub fn drained(&mut self, pid: Pid) {
        let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
        if machine.draining && machine.quiet() {
            machine.draining = false;
            let disks = machine.disks.len();
            self.post_source(pid, source::Event::QueuesEmpty);
            for disk in 0..disks {
                self.mirror_step(pid, disk, block::Event::Drain);
            }
            self.source_unblocked(pid);
        }
    }

    /// What a killed process had handed to the kernel may still land, in parts.
    pub fn land_writes(&mut self, host: usize, process: &mut Process) {
        let Some(machine) = &process.machine else { return };
        for (id, request) in &machine.requests {
            if request.local
                && matches!(request.ask, Ask::Change(_))
                && let Some(image) = self.hosts[host].images.get_mut(&machine.disks[request.disk].at.path)
            {
                for (at, value) in request.values.iter().enumerate() {
                    if self.dice.disk.one_in(2) {
                        image.write(request.sector + at, *value);
                    }
                }
            }
            self.checkers.flushed.died(process.pid, *id, request);
        }
    }
}

/// Writes a run of sectors.
pub fn apply(image: &mut Image, sector: usize, values: &[u64]) {
    for (at, value) in values.iter().enumerate() {
        image.write(sector + at, *value);
    }
}

/// What a change leaves in each sector.
pub fn mark_of(op: GuestOp, stamp: u64) -> u64 {
    match op {
        GuestOp::Write => stamp,
        GuestOp::Zero => ZERO,
        GuestOp::Discard => HOLE,
    }
}
