//! The simulated world: hosts, links, one VM, a clock that jumps from one happening to the next.
//!
//! Lives here: the queue of happenings and who takes each. Never enters: what they do.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    fmt::Write,
};

use vmove_mirror::{Micros, source, target, wire::hello::Role};

use super::{
    HostId, Pid,
    agent::{Task, rpc::Letter},
    checkers::Checkers,
    dice::Dice,
    faults::{Fault, Kind},
    host::Host,
    marks::Marks,
    mutations::Mutation,
    net::{ConnId, Net},
    process::{Process, blocks_in::Applied},
    user::User,
};

/// Something that is due.
#[derive(Debug)]
pub enum Happening {
    /// The move's thread of a process goes on with its source side.
    SourceTurn(Pid),
    /// The same with its target side.
    TargetTurn(Pid),
    /// A source's driver looks at its clock.
    Glance(Pid),
    /// The guest does something.
    Guest {
        /// Whose.
        pid: Pid,
        /// Since which start of its vCPUs.
        beat: u32,
    },
    /// The local part of a guest's request is done.
    Request {
        /// Whose.
        pid: Pid,
        /// Which.
        id: u64,
    },
    /// A range was read for a background copy.
    CopyRead {
        /// Whose.
        pid: Pid,
        /// Index of the copied disk.
        disk: usize,
        /// Which copy.
        id: u64,
    },
    /// A page frame's contents are taken and sent.
    PageFrame(Pid),
    /// An arriving image did something.
    Applied {
        /// Whose.
        pid: Pid,
        /// Index of the copied disk.
        disk: usize,
        /// What.
        what: Applied,
    },
    /// The head of a flow arrives.
    Deliver {
        /// Connection.
        conn: ConnId,
        /// Sending end.
        from: usize,
    },
    /// An end learns that its connection is gone.
    Lost {
        /// Connection.
        conn: ConnId,
        /// Which end.
        end: usize,
    },
    /// An end has heard nothing for too long, if the cut is still there.
    Silent {
        /// Connection.
        conn: ConnId,
        /// Which end.
        end: usize,
        /// The cut.
        cut: (HostId, HostId),
    },
    /// The wait for a connection to be answered is over.
    ConnectTimeout {
        /// Whose.
        pid: Pid,
        /// The connection.
        conn: ConnId,
    },
    /// The next attempt to make connections anew is due.
    Redial(Pid),
    /// The source must have called a target by now.
    Deadline(Pid),
    /// The last words of a lost control connection have had their time.
    LastWord(Pid),
    /// A letter between agents arrives.
    Letter(Box<Letter>),
    /// The answer to a letter did not come in time.
    LetterLost {
        /// Who waits.
        host: HostId,
        /// Number of the letter.
        id: u64,
    },
    /// An agent's task is due.
    Agent {
        /// Where.
        host: HostId,
        /// The agent that planned it.
        epoch: u32,
        /// What.
        task: Task,
    },
    /// A fault strikes.
    Fault(usize),
    /// A host loses its power, for a while.
    PowerCut(HostId),
    /// A host or its agent is back.
    Back(HostId),
    /// The user looks.
    User,
}

struct Due {
    at: Micros,
    order: u64,
    what: Happening,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// Sizes and habits of one world.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Hosts.
    pub hosts: usize,
    /// Pages of RAM.
    pub pages: u64,
    /// Sectors of each disk.
    pub disks: Vec<usize>,
    /// Microseconds between two things the guest does while it is moved.
    pub guest_pace: Micros,
    /// Most pages it writes at once.
    pub guest_pages: u64,
    /// Longest a disk takes for anything, microseconds.
    pub disk_delay: Micros,
}

/// Streams of chance, one for each purpose.
#[derive(Debug)]
pub struct Streams {
    /// What the guest does.
    pub guest: Dice,
    /// Delays of links.
    pub net: Dice,
    /// Delays of disks, what crashes leave.
    pub disk: Dice,
    /// Turns of threads.
    pub turns: Dice,
    /// What the user wants.
    pub user: Dice,
}

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The checker that found it.
    pub checker: &'static str,
    /// What it found.
    pub what: String,
    /// When, microseconds.
    pub at: Micros,
}

/// The world.
pub struct World {
    /// Microseconds since its beginning.
    pub now: Micros,
    queue: BinaryHeap<Reverse<Due>>,
    order: u64,
    /// Happenings so far.
    pub happened: u64,
    /// Sizes and habits.
    pub shape: Shape,
    /// Chance.
    pub dice: Streams,
    /// Hosts.
    pub hosts: Vec<Host>,
    /// Connections.
    pub net: Net,
    /// The one who orders moves.
    pub user: User,
    /// What is to go wrong.
    pub faults: Vec<Fault>,
    /// Which of it has.
    pub struck: Vec<bool>,
    /// How often each kind has.
    pub struck_kinds: BTreeMap<Kind, u64>,
    /// A bit that is to be flipped in a frame of this kind.
    pub flip: Option<(Kind, u64)>,
    /// Nothing fails any more.
    pub healed: bool,
    /// Actions so far by side, for faults that strike before one.
    pub actions: [u32; 2],
    /// A rule that is broken on purpose.
    pub mutation: Option<Mutation>,
    /// What is promised.
    pub checkers: Checkers,
    /// What was seen to happen.
    pub marks: Marks,
    /// The first broken promise.
    pub violation: Option<Violation>,
    /// Number of the next process.
    pub next_pid: Pid,
    /// Next contents of a page or sector.
    pub next_stamp: u64,
    trace: Option<String>,
}

impl World {
    /// An empty world.
    pub fn new(seed: u64, shape: Shape, net: Net, user: User, faults: Vec<Fault>, traced: bool) -> Self {
        let struck = vec![false; faults.len()];
        let hosts = (0..shape.hosts).map(Host::new).collect();
        let checkers = Checkers::new(&shape);
        Self {
            now: 0,
            queue: BinaryHeap::new(),
            order: 0,
            happened: 0,
            dice: Streams {
                guest: Dice::new(seed, 11),
                net: Dice::new(seed, 12),
                disk: Dice::new(seed, 13),
                turns: Dice::new(seed, 14),
                user: Dice::new(seed, 15),
            },
            hosts,
            net,
            user,
            faults,
            struck,
            struck_kinds: BTreeMap::new(),
            flip: None,
            healed: false,
            actions: [0; 2],
            mutation: None,
            checkers,
            marks: Marks::default(),
            violation: None,
            next_pid: 1,
            next_stamp: super::storage::FIRST_STAMP,
            trace: traced.then(String::new),
            shape,
        }
    }

    /// Plans a happening.
    pub fn at(&mut self, at: Micros, what: Happening) {
        self.order += 1;
        self.queue.push(Reverse(Due { at: at.max(self.now), order: self.order, what }));
    }

    /// Plans a happening some microseconds from now.
    pub fn after(&mut self, delay: Micros, what: Happening) {
        self.at(self.now + delay, what);
    }

    /// Something nobody wrote before.
    pub fn stamp(&mut self) -> u64 {
        self.next_stamp += 1;
        self.next_stamp
    }

    /// Notes a line of the trace, if one is wanted.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let _ = writeln!(trace, "{:>12.3} ms  {}", self.now as f64 / 1000.0, line());
        }
    }

    /// The trace.
    pub fn take_trace(&mut self) -> String {
        self.trace.take().unwrap_or_default()
    }

    /// A promise is broken; only the first counts.
    pub fn violate(&mut self, checker: &'static str, what: impl Into<String>) {
        if self.violation.is_none() {
            let violation = Violation { checker, what: what.into(), at: self.now };
            self.note(|| format!("VIOLATION {checker}: {}", violation.what));
            self.violation = Some(violation);
        }
    }

    /// What a checker found, if it did.
    pub fn found(&mut self, violation: Option<Violation>) {
        if let Some(Violation { checker, what, .. }) = violation {
            self.violate(checker, what);
        }
    }

    /// The process with this number, if it lives.
    pub fn process(&mut self, pid: Pid) -> Option<&mut Process> {
        self.hosts
            .iter_mut()
            .filter_map(|host| host.process.as_deref_mut())
            .find(|process| process.pid == pid)
    }

    /// Runs until `end`, a broken promise, or `done` says so after a happening.
    pub fn run(&mut self, end: Micros, done: impl Fn(&mut Self) -> bool) -> bool {
        while self.violation.is_none() {
            if done(self) {
                return true;
            }
            match self.queue.peek() {
                Some(Reverse(due)) if due.at <= end => {}
                _ => {
                    self.now = self.now.max(end);
                    return false;
                }
            }
            let Some(Reverse(due)) = self.queue.pop() else { return false };
            self.now = due.at;
            self.happened += 1;
            self.happen(due.what);
        }
        false
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::SourceTurn(pid) => self.source_turn(pid),
            Happening::TargetTurn(pid) => self.target_turn(pid),
            Happening::Glance(pid) => self.source_glance(pid),
            Happening::Guest { pid, beat } => self.guest_acts(pid, beat),
            Happening::Request { pid, id } => self.request_local(pid, id),
            Happening::CopyRead { pid, disk, id } => self.copy_read(pid, disk, id),
            Happening::PageFrame(pid) => self.page_frame(pid),
            Happening::Applied { pid, disk, what } => self.applied(pid, disk, what),
            Happening::Deliver { conn, from } => self.deliver(conn, from),
            Happening::Lost { conn, end } => self.lose(conn, end),
            Happening::Silent { conn, end, cut } => self.silent(conn, end, cut),
            Happening::ConnectTimeout { pid, conn } => self.connect_timeout(pid, conn),
            Happening::Redial(pid) => self.redial(pid),
            Happening::Deadline(pid) => self.target_deadline(pid),
            Happening::LastWord(pid) => self.last_word_over(pid),
            Happening::Letter(letter) => self.letter(*letter),
            Happening::LetterLost { host, id } => self.letter_lost(host, id),
            Happening::Agent { host, epoch, task } => self.agent_task(host, epoch, task),
            Happening::Fault(index) => self.strike(index),
            Happening::PowerCut(host) if self.healed => self.note(|| format!("host {host} keeps its power")),
            Happening::PowerCut(host) => self.power_cut(host, Some(3_000_000)),
            Happening::Back(host) => self.host_back(host),
            Happening::User => self.user_acts(),
        }
    }

    /// A connection of a process is gone.
    pub fn connection_lost(&mut self, pid: Pid, role: Role, conn: ConnId, end: usize) {
        self.note(|| format!("process {pid} loses its {role:?} connection"));
        if end == 0 {
            let why = source::Event::LinkLost(format!("the {role:?} connection"));
            self.source_lost(pid, role, conn, why);
        } else {
            self.target_lost(pid, role, conn);
        }
    }

    /// Posts an event to a process's source engine.
    pub fn post_source(&mut self, pid: Pid, event: source::Event) {
        let delay = self.dice.turns.range(1..20);
        let Some(mv) = self.process(pid).and_then(|process| process.source.as_deref_mut()) else { return };
        mv.inbox.push_back(event);
        if !std::mem::replace(&mut mv.turning, true) {
            self.after(delay, Happening::SourceTurn(pid));
        }
    }

    /// Posts an event to a process's target engine.
    pub fn post_target(&mut self, pid: Pid, event: target::Event) {
        let delay = self.dice.turns.range(1..20);
        let Some(mv) = self.process(pid).and_then(|process| process.target.as_deref_mut()) else { return };
        mv.inbox.push_back(event);
        if !std::mem::replace(&mut mv.turning, true) {
            self.after(delay, Happening::TargetTurn(pid));
        }
    }
}
