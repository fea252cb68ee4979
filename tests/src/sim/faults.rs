//! What may fail where, and what is promised then: the one list of it.
//!
//! | zone | faults | promised then |
//! |---|---|---|
//! | process | killed before any action of either engine; a thread or a call of its driver fails | before the commit the VM can be started from its disks where it was, or never stopped; after it, it runs at the target |
//! | peer | says, before the commit, what it was not asked, or gives up or refuses for no reason | the guest goes on at the source |
//! | agent | killed, restarted | moves go on or are settled; nothing is forgotten |
//! | host | power cut with a return, or none until the end | all that was flushed is there; nobody runs rather than two |
//! | operator | takes the VM over where it is prepared, while its source is gone | one host runs it, the other never again; what the source wrote after it gave the move up is lost, nothing else |
//! | link | cut for a while, cut for longer than sockets bear, cut one way; connections reset at both ends or first at one | before the commit the guest goes on; after it the target runs the VM once it can ask |
//! | wire | a bit flipped in pages, in blocks, in heads | found before the commit |
//! | journal | full, a sync that fails once or always, death between write and sync, a power cut there or a while later | never both endings of one move |
//! | image | an operation that fails, a datastore that is full | the guest goes on at the source |
//! | user | cancels | the guest goes on at the source, or the move was quicker |
//!
//! Lives here: the plan of faults, and striking. Never enters: what is done about them.

use serde::{Deserialize, Serialize};
use vmove_mirror::{
    source, target,
    wire::{
        control::{Arrived, Counters, Proof, SourceMsg, TargetMsg},
        hello::Role,
    },
};

use super::{
    HostId, Pid,
    dice::Dice,
    process::source::Engine,
    storage::JournalFault,
    world::{Happening, World},
};

/// Which engine acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The source's.
    Source,
    /// The target's.
    Target,
}

/// What fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Kind {
    KillProcess,
    KillAgent,
    PowerCut,
    PowerGone,
    Cut,
    LongCut,
    OneWayCut,
    Reset,
    HalfReset,
    DamagedPage,
    DamagedBlock,
    DamagedHead,
    JournalFull,
    JournalSyncFails,
    JournalBroken,
    DiesUnsynced,
    DiesThenPowerCut,
    PowerCutUnsynced,
    ImageFails,
    DiskFull,
    Cancel,
    DriverFails,
    Nonsense,
    TakeOver,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 24] = [
        Self::KillProcess,
        Self::KillAgent,
        Self::PowerCut,
        Self::PowerGone,
        Self::Cut,
        Self::LongCut,
        Self::OneWayCut,
        Self::Reset,
        Self::HalfReset,
        Self::DamagedPage,
        Self::DamagedBlock,
        Self::DamagedHead,
        Self::JournalFull,
        Self::JournalSyncFails,
        Self::JournalBroken,
        Self::DiesUnsynced,
        Self::DiesThenPowerCut,
        Self::PowerCutUnsynced,
        Self::ImageFails,
        Self::DiskFull,
        Self::Cancel,
        Self::DriverFails,
        Self::Nonsense,
        Self::TakeOver,
    ];
}

/// When it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// At a time, microseconds.
    At(u64),
    /// Before an engine's action with this number, counted over the whole world.
    Before(Side, u32),
}

/// Where it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// The host whose engine acts; without one, that of the VM's process.
    Acting,
    /// The other one.
    Other,
}

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What.
    pub kind: Kind,
    /// When.
    pub when: When,
    /// Where.
    pub place: Place,
    /// Which of several things, or how long: by kind.
    pub size: u64,
}

/// The faults of a world with some moves.
pub fn plan(dice: &mut Dice, moves: u64) -> Vec<Fault> {
    let count = [0, 1, 1, 1, 1, 2, 2, 2, 3, 4][dice.index(10)];
    (0..count)
        .map(|_| Fault {
            kind: dice.pick(&Kind::ALL),
            when: match dice.index(10) {
                0..=2 => When::At(dice.range(0..moves * 400_000)),
                3..=6 => When::Before(Side::Source, dice.range(0..moves * 30) as u32),
                _ => When::Before(Side::Target, dice.range(0..moves * 10) as u32),
            },
            place: dice.pick(&[Place::Acting, Place::Other]),
            size: dice.range(0..1 << 20),
        })
        .collect()
}

impl World {
    /// Plans the faults that strike at a time.
    pub fn plan_faults(&mut self) {
        for index in 0..self.faults.len() {
            if let When::At(at) = self.faults[index].when {
                self.at(at, Happening::Fault(index));
            }
        }
    }

    /// An engine is about to act: the faults for that strike.
    pub fn before_action(&mut self, side: Side, pid: Pid) {
        let count = &mut self.actions[side as usize];
        let now = When::Before(side, *count);
        *count += 1;
        for index in 0..self.faults.len() {
            if self.faults[index].when == now {
                self.strike_at(index, self.host_of(pid));
            }
        }
    }

    /// A fault strikes at a time.
    pub fn strike(&mut self, index: usize) {
        let acting = self.hosts.iter().position(|host| host.process.is_some());
        self.strike_at(index, acting);
    }

    /// The other end of a host's move, if there is one.
    fn other_end(&self, host: HostId) -> Option<HostId> {
        let process = self.hosts[host].process.as_deref()?;
        match (&process.source, &process.target) {
            (Some(mv), _) => mv.order.to.map(|(to, ..)| to),
            (None, Some(mv)) => Some(mv.from),
            (None, None) => None,
        }
    }

    fn strike_at(&mut self, index: usize, acting: Option<HostId>) {
        if std::mem::replace(&mut self.struck[index], true) || self.healed {
            return;
        }
        let Fault { kind, place, size, .. } = self.faults[index];
        let acting = acting.unwrap_or(0);
        let other = self.other_end(acting).unwrap_or((acting + 1) % self.hosts.len());
        let (here, there) = if place == Place::Acting { (acting, other) } else { (other, acting) };
        self.note(|| format!("FAULT {kind:?} at host {here} (other end {there})"));
        let before = self.struck_kinds.entry(kind).or_default();
        *before += 1;
        match kind {
            Kind::KillProcess => self.process_ends(here, "SIGKILL"),
            Kind::KillAgent => {
                if self.hosts[here].agent.up {
                    self.agent_dies(here);
                    self.after(1_000 + size, Happening::Back(here));
                }
            }
            Kind::PowerCut => self.power_cut(here, Some(100_000 + size * 20)),
            Kind::PowerGone => self.power_cut(here, None),
            Kind::Cut => {
                let lasting = 1 + size % 300_000;
                self.cut(here, there, lasting);
                self.cut(there, here, lasting);
            }
            Kind::LongCut => {
                let lasting = 15_000_000 + size * 40;
                self.cut(here, there, lasting);
                self.cut(there, here, lasting);
            }
            Kind::OneWayCut => self.cut(here, there, 1 + size * 40),
            Kind::Reset | Kind::HalfReset => {
                let conns = self.net.between_hosts();
                if let Some(conn) = conns.get(size as usize % conns.len().max(1)) {
                    if kind == Kind::Reset {
                        self.lose(*conn, 0);
                        self.lose(*conn, 1);
                    } else {
                        self.reset(*conn, (size >> 8) as usize % 2);
                    }
                }
            }
            Kind::DamagedPage | Kind::DamagedBlock | Kind::DamagedHead => self.flip = Some((kind, size)),
            Kind::JournalFull => self.plant(here, JournalFault::Full),
            Kind::JournalSyncFails => self.plant(here, JournalFault::SyncFails),
            Kind::JournalBroken => self.plant(here, JournalFault::Broken),
            Kind::DiesUnsynced => self.plant(here, JournalFault::DiesUnsynced),
            Kind::DiesThenPowerCut => self.plant(here, JournalFault::DiesThenPowerCut),
            Kind::PowerCutUnsynced => self.plant(here, JournalFault::PowerCut),
            Kind::ImageFails => self.hosts[here].disk_trouble = Some(size as u32 % 40),
            Kind::DiskFull => self.hosts[here].disk_full = true,
            Kind::Cancel => {
                if let Some(pid) = self.hosts[acting].process.as_ref().map(|process| process.pid) {
                    self.cancel_process(pid);
                }
            }
            Kind::DriverFails => self.driver_fails(here, size),
            Kind::Nonsense => self.peer_talks_nonsense(here, size),
            Kind::TakeOver => self.user.takes_over = true,
        }
    }

    /// A thread of a driver has ended, or something it has asked the kernel for was refused.
    fn driver_fails(&mut self, host: HostId, size: u64) {
        let Some(process) = self.hosts[host].process.as_ref() else { return };
        let (pid, is_source, is_target) = (process.pid, process.source.is_some(), process.target.is_some());
        let link = size % 2 == 1;
        let why = "the driver fails".to_string();
        if is_source {
            self.post_source(
                pid,
                if link { source::Event::LinkLost(why) } else { source::Event::Failed(why) },
            );
        } else if is_target {
            self.post_target(
                pid,
                if link { target::Event::LinkLost(why) } else { target::Event::Failed(why) },
            );
        }
    }

    /// The other end of a move says what it was not asked. It is connected, and does not lie about the commit: that word is its own.
    fn peer_talks_nonsense(&mut self, host: HostId, size: u64) {
        let Some(process) = self.hosts[host].process.as_ref() else { return };
        let pid = process.pid;
        let proof =
            Proof { counters: Counters { data_pages: u64::MAX, ..Counters::default() }, ..Proof::default() };
        if let Some(mv) = process.source.as_ref().filter(|mv| mv.control.is_some()) {
            let message = match size % 5 {
                0 => TargetMsg::Refused { reason: "no reason".into() },
                1 => TargetMsg::Ready,
                2 => TargetMsg::RoundAck { round: u32::MAX, damaged: Vec::new() },
                3 => TargetMsg::Prepared { proof, allocated: Vec::new(), load_us: 0 },
                _ => TargetMsg::Resumed(Arrived { frames: u64::MAX, operations: Vec::new() }),
            };
            if matches!(&mv.engine, Engine::Moving(engine) if engine.phase() < source::Phase::Committing) {
                self.post_source(pid, source::Event::Target(message));
            }
        } else if let Some(mv) = self.hosts[host].process.as_mut().and_then(|process| process.target.as_mut())
        {
            let message = match size % 6 {
                0 => SourceMsg::Abort { reason: "no reason".into() },
                1 => SourceMsg::Setup { ram_pages: 1, disks: Vec::new(), audit: false },
                2 => SourceMsg::Resume,
                3 => SourceMsg::Prepare(proof),
                4 => SourceMsg::State(Vec::new()),
                _ => {
                    mv.wrong_proof = true;
                    return;
                }
            };
            let journaled = mv.inbox.iter().any(|event| matches!(event, target::Event::Journaled));
            if mv.is_connected() && mv.engine.phase() <= target::Phase::Preparing && !journaled {
                self.post_target(pid, target::Event::Source(message));
            }
        }
    }

    fn plant(&mut self, host: HostId, fault: JournalFault) {
        if let Some(dir) = &self.hosts[host].dir {
            dir.journal.plant(fault);
        }
    }

    /// A frame passes: a bit of it may be flipped.
    pub fn damage(&mut self, role: Role, bytes: &mut [u8], data: &mut [u64]) {
        let Some((kind, size)) = self.flip else { return };
        let hit = match (kind, role) {
            (Kind::DamagedHead, _) => {
                let bit = size as usize % (bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
                true
            }
            (Kind::DamagedPage, Role::Pages(_)) | (Kind::DamagedBlock, Role::Disk(_)) if !data.is_empty() => {
                let at = size as usize % data.len();
                data[at] ^= 1 << (size % 61);
                true
            }
            _ => false,
        };
        if hit {
            self.flip = None;
        }
    }
}
