//! No flushed write is lost, and no read sees anything but what may be there.
//!
//! Of each sector all writes are remembered that may still show: a write ends those that were complete before it was issued, once it
//! is complete itself; for what a crash may leave, once a flush issued after that is complete too.

use std::collections::BTreeMap;

use vmove_mirror::{Micros, journal::DiskAt};

use super::super::{
    HostId, Pid,
    process::machine::{Ask, Request},
    storage::{HOLE, TORN, read_as},
    world::{Violation, World},
};

#[derive(Debug, Clone)]
struct Write {
    by: (Pid, u64),
    value: u64,
    issued: u64,
    /// When it was complete; none = in flight.
    done: Option<u64>,
    /// It certainly happened.
    sure: bool,
}

impl Write {
    fn ends(&self, older: &Self, by: u64) -> bool {
        self.sure
            && self.done.is_some_and(|done| done <= by)
            && older.done.is_some_and(|done| done <= self.issued)
    }
}

/// All that may be on the VM's disks.
#[derive(Debug)]
pub struct Flushed {
    disks: Vec<Vec<Vec<Write>>>,
    /// When reads and flushes in flight were issued.
    asked: BTreeMap<(Pid, u64), u64>,
    /// Counts what is told here: the order of events.
    order: u64,
}

impl Flushed {
    /// Empty disks of these sizes, sectors.
    pub fn new(disks: &[usize]) -> Self {
        let blank = Write { by: (0, 0), value: HOLE, issued: 0, done: Some(1), sure: true };
        Self {
            disks: disks.iter().map(|size| vec![vec![blank.clone()]; *size]).collect(),
            asked: BTreeMap::new(),
            order: 1,
        }
    }

    /// Something is on the disk before the guest's first write.
    pub fn found(&mut self, disk: usize, sector: usize, value: u64) {
        self.disks[disk][sector][0].value = read_as(value);
    }

    fn next(&mut self) -> u64 {
        self.order += 1;
        self.order
    }

    /// The guest has issued a request.
    pub fn issued(&mut self, pid: Pid, id: u64, request: &Request) {
        let now = self.next();
        match request.ask {
            Ask::Change(_) => {
                for (at, value) in request.values.iter().enumerate() {
                    let write =
                        Write { by: (pid, id), value: read_as(*value), issued: now, done: None, sure: false };
                    self.disks[request.disk][request.sector + at].push(write);
                }
            }
            Ask::Read { .. } | Ask::Flush => drop(self.asked.insert((pid, id), now)),
        }
    }

    /// A request is complete.
    pub fn completed(&mut self, pid: Pid, id: u64, request: &Request, ok: bool) {
        let now = self.next();
        match request.ask {
            Ask::Change(_) => self.end(pid, id, request, now, ok),
            Ask::Read { .. } => drop(self.asked.remove(&(pid, id))),
            Ask::Flush => {
                let Some(asked) = self.asked.remove(&(pid, id)).filter(|_| ok) else { return };
                for writes in &mut self.disks[request.disk] {
                    if writes.len() > 1 {
                        let all = writes.clone();
                        writes.retain(|old| !all.iter().any(|new| new.ends(old, asked)));
                    }
                }
            }
        }
    }

    /// Its process died: it may have happened.
    pub fn died(&mut self, pid: Pid, id: u64, request: &Request) {
        let now = self.next();
        if matches!(request.ask, Ask::Change(_)) {
            self.end(pid, id, request, now, false);
        }
        self.asked.remove(&(pid, id));
    }

    fn end(&mut self, pid: Pid, id: u64, request: &Request, now: u64, sure: bool) {
        for at in 0..request.values.len() {
            for write in &mut self.disks[request.disk][request.sector + at] {
                if write.by == (pid, id) {
                    write.done = Some(now);
                    write.sure = sure;
                }
            }
        }
    }

    /// A read has found something.
    pub fn read(&self, pid: Pid, id: u64, request: &Request, found: u64, now: Micros) -> Option<Violation> {
        let asked = self.asked.get(&(pid, id)).copied().unwrap_or(self.order);
        let all = &self.disks[request.disk][request.sector];
        let may = |write: &&Write| !all.iter().any(|new| new.ends(write, asked));
        let ok = all.iter().filter(may).any(|write| write.value == found);
        (!ok).then(|| Violation {
            checker: "flushed",
            what: format!(
                "a read of disk {} sector {} finds {found}, not what was written",
                request.disk, request.sector
            ),
            at: now,
        })
    }

    /// A guest boots and finds this: for it, nothing else was ever there. A power cut may still bring back what was not flushed.
    fn booted(&mut self, disk: usize, contents: &[u64]) {
        let now = self.next();
        for (found, writes) in contents.iter().zip(&mut self.disks[disk]) {
            if writes.len() > 1 {
                let value = read_as(*found);
                writes.push(Write { by: (0, 0), value, issued: now, done: Some(now + 1), sure: true });
            }
        }
        self.order += 1;
    }

    /// The VM is taken over with these contents: what was written elsewhere since they were made is lost by the operator's word.
    pub fn taken_over(&mut self, disk: usize, contents: &[u64]) {
        let now = self.next();
        for (found, writes) in contents.iter().zip(&mut self.disks[disk]) {
            let value = read_as(*found);
            *writes = vec![Write { by: (0, 0), value, issued: now, done: Some(now + 1), sure: true }];
        }
        self.order += 1;
    }

    /// Sectors whose contents can be no state that a crash may leave.
    fn impossible(&self, disk: usize, contents: &[u64]) -> Option<usize> {
        contents.iter().zip(&self.disks[disk]).position(|(found, writes)| {
            let found = read_as(*found);
            let torn = found == TORN && writes.len() > 1;
            !torn && !writes.iter().any(|write| write.value == found)
        })
    }
}

impl World {
    /// The VM boots from its disks.
    pub fn check_boot(&mut self, host: HostId, disks: &[DiskAt]) {
        for (index, at) in disks.iter().enumerate() {
            let Some(image) = self.hosts[host].images.get(&at.path) else { continue };
            let contents = image.contents();
            if let Some(sector) = self.checkers.flushed.impossible(index, &contents) {
                let what = format!(
                    "host {host} boots with disk {index} sector {sector} = {}, a flushed write is lost (may be {:?})",
                    contents[sector], self.checkers.flushed.disks[index][sector]
                );
                self.violate("flushed", what);
            }
            self.checkers.flushed.booted(index, &contents);
        }
    }
}
