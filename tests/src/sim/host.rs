//! A simulated host: its disks, its agent, the VM process it may have.
//!
//! Lives here: power, what is on the disks, whether something is alive. Never enters: what agents and processes do.

use std::collections::BTreeMap;

use vmove_mirror::journal::{DiskAt, Journal, MoveId};
use vmove_storage::journal_file;

use super::{
    HostId, Pid,
    agent::Agent,
    process::Process,
    storage::{Image, JournalPlace},
    world::{Happening, World},
};

/// How a VM process is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// From its disks.
    Boot,
    /// To receive the VM.
    Incoming {
        /// The move.
        move_id: MoveId,
        /// From where.
        from: HostId,
    },
}

/// What a VM process is started with, kept in the VM's directory.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Ownership generation.
    pub generation: u64,
    /// Images.
    pub disks: Vec<DiskAt>,
    /// How.
    pub start: Start,
}

/// A VM's directory.
#[derive(Debug, Default)]
pub struct VmDir {
    /// Its journal.
    pub journal: JournalPlace,
    /// What its last process was started with.
    pub launch: Option<Launch>,
    /// Whether the last move from here was to keep the images.
    pub keep_source: bool,
    /// Reports of moves from here: whether the VM left.
    pub reports: BTreeMap<MoveId, bool>,
}

impl VmDir {
    /// The journal as it reads, without holding it.
    pub fn look(&self) -> Journal {
        let records = journal_file::records(&self.journal).unwrap_or_default();
        Journal::replay(records.iter().map(Vec::as_slice)).unwrap_or_default()
    }
}

/// A host.
pub struct Host {
    /// Its number.
    pub id: HostId,
    /// Whether it has power.
    pub powered: bool,
    /// It stays without power until the very end.
    pub gone: bool,
    /// Images by path, in all its datastores.
    pub images: BTreeMap<String, Image>,
    /// The VM's directory.
    pub dir: Option<VmDir>,
    /// Reports of moves from here that outlived the directory: whether the VM left.
    pub archive: BTreeMap<MoveId, bool>,
    /// Moves by which a VM that has gone on since was taken over here, and at which generation.
    pub taken: BTreeMap<MoveId, u64>,
    /// Its agent.
    pub agent: Agent,
    /// The VM process.
    pub process: Option<Box<Process>>,
    /// Operations on images until one fails, and whether on the way in.
    pub disk_trouble: Option<u32>,
    /// No image can be made.
    pub disk_full: bool,
}

impl Host {
    /// A host that runs and has nothing.
    pub fn new(id: HostId) -> Self {
        Self {
            id,
            powered: true,
            gone: false,
            images: BTreeMap::new(),
            dir: None,
            archive: BTreeMap::new(),
            taken: BTreeMap::new(),
            agent: Agent::default(),
            process: None,
            disk_trouble: None,
            disk_full: false,
        }
    }

    /// Whether an operation on an image fails now.
    pub fn image_fails(&mut self) -> bool {
        match &mut self.disk_trouble {
            Some(0) => {
                self.disk_trouble = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }
}

impl World {
    /// The host's process has ended, by itself or by a signal; the kernel closes what it had open.
    pub fn process_ends(&mut self, host: HostId, why: &str) {
        let Some(mut process) = self.hosts[host].process.take() else { return };
        let pid = process.pid;
        self.note(|| format!("host {host}: process {pid} ends: {why}"));
        self.land_writes(host, &mut process);
        drop(process);
        self.close_all(pid);
        self.agent_sees_end(host);
    }

    /// Kills a process by its number, if it still is that one.
    pub fn kill(&mut self, pid: Pid, why: &str) {
        if let Some(host) = self.hosts.iter().position(|h| h.process.as_ref().is_some_and(|p| p.pid == pid)) {
            self.process_ends(host, why);
        }
    }

    /// A host loses its power; what was not flushed is lost or torn.
    pub fn power_cut(&mut self, host: HostId, back_in: Option<u64>) {
        if !self.hosts[host].powered {
            return;
        }
        self.note(|| format!("host {host}: POWER CUT"));
        if let Some(mut process) = self.hosts[host].process.take() {
            self.land_writes(host, &mut process);
            self.silence(process.pid);
        }
        let dice = &mut self.dice.disk;
        let it = &mut self.hosts[host];
        it.powered = false;
        for image in it.images.values_mut() {
            image.lose_power(dice);
        }
        if let Some(dir) = &it.dir {
            dir.journal.lose_power(dice);
        }
        self.agent_dies(host);
        match back_in {
            Some(time) => self.after(time, Happening::Back(host)),
            None => self.hosts[host].gone = true,
        }
    }

    /// Power, or only the agent, is back.
    pub fn host_back(&mut self, host: HostId) {
        if self.hosts[host].gone || self.hosts[host].agent.up {
            return;
        }
        self.hosts[host].powered = true;
        self.note(|| format!("host {host}: the agent starts"));
        self.agent_starts(host);
    }
}
