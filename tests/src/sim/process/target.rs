//! The driver of the target engine, as `compute::migrate::target` is: one action after the other, and events in between.
//!
//! Lives here: what is done for each action. Never enters: decisions.

use std::collections::{BTreeMap, VecDeque};

use vmove_mirror::{
    digest,
    journal::{DiskAt, MoveId, Standing},
    target::{Action, Event, Phase, Target, TargetPlan},
    wire::{
        control::{self, Arrived, Counters, DiskSetup, Proof, SourceMsg, TargetMsg},
        hello::{Hello, HelloAnswer, MIN_VERSION, Role, VERSION},
    },
};
use vmove_storage::OwnerState;

use super::{
    super::{
        HostId, Pid,
        faults::Side,
        marks::Mark,
        mutations::Mutation,
        net::{ConnId, Packet},
        world::{Happening, World},
    },
    Process, Run,
    blocks_in::BlocksIn,
    digest_of,
    machine::Machine,
    pages::PagesIn,
};

/// How long the source may take to connect (`CONNECT` of the driver).
const CONNECT: u64 = 60_000_000;

/// How long it may take to call again (`COME_BACK`).
const COME_BACK: u64 = 120_000_000;
/// How long the source's last word may lag behind (`LAST_WORD`).
const LAST_WORD: u64 = 500_000;

/// What the driver's thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// Old connections to end, and what came over them to be applied.
    Ending,
    /// The images to be flushed.
    Proving {
        /// Whether everything is read again.
        audit: bool,
    },
}

/// Where callers are met.
#[derive(Debug, Default)]
struct Door {
    /// Somebody listens.
    open: bool,
    /// Nobody need call any more.
    closed: bool,
    /// The newest set of connections, and what is there of it by role: control, pages, disks.
    epoch: u32,
    set: BTreeMap<u8, ConnId>,
    /// Complete and not taken yet.
    made: Option<BTreeMap<u8, ConnId>>,
    /// Hellos that came before anybody listened.
    early: Vec<(ConnId, Role, [u8; 32])>,
}

/// An arrival.
pub struct TargetMove {
    /// The move.
    pub move_id: MoveId,
    /// Where from.
    pub from: HostId,
    /// The engine.
    pub engine: Target,
    /// Events not yet taken.
    pub inbox: VecDeque<Event>,
    /// Actions not yet done.
    pub todo: VecDeque<Action>,
    /// A turn is planned.
    pub turning: bool,
    /// The thread waits.
    pub blocked: Option<Blocked>,
    /// The one-time ticket.
    pub ticket: [u8; 16],
    door: Door,
    /// Connections in use by role.
    conns: BTreeMap<u8, ConnId>,
    /// What came over connections that are not in use yet.
    held: Vec<(ConnId, Packet)>,
    /// When the source must have called.
    deadline: Option<u64>,
    /// Whether the arrival waits for the source's word, and cannot hear it.
    pub undecided: bool,
    /// The source's proof will be another than it made.
    pub wrong_proof: bool,
    /// Guest memory.
    pub ram: Vec<u64>,
    /// The page stream.
    pub pages: PagesIn,
    /// The images.
    pub arrivals: Vec<BlocksIn>,
    /// The state that was loaded.
    pub state: Option<Vec<u8>>,
}

impl TargetMove {
    /// Whether the source is heard.
    pub fn is_connected(&self) -> bool {
        !self.conns.is_empty()
    }
}

fn slot(role: Role) -> u8 {
    match role {
        Role::Control => 0,
        Role::Pages(_) => 1,
        Role::Disk(index) => 2 + index,
    }
}

impl World {
    /// Begins an arrival in a process that was started for it.
    pub fn begin_target(&mut self, pid: Pid, move_id: MoveId, from: HostId, ticket: [u8; 16]) {
        let pages = self.shape.pages;
        let sizes = self.shape.disks.clone();
        let Some(process) = self.process(pid) else { return };
        let setup = |(at, size): (&DiskAt, &usize)| DiskSetup {
            name: at.name.clone(),
            virtual_bytes: super::bytes(0, *size).1,
        };
        let plan = TargetPlan {
            move_id: move_id.clone(),
            from_host: format!("h{from}"),
            generation: process.generation,
            ram_pages: pages,
            disks: process.disks.iter().zip(&sizes).map(setup).collect(),
            images: process.disks.clone(),
        };
        let (engine, actions) = Target::start(plan);
        process.target = Some(Box::new(TargetMove {
            move_id,
            from,
            engine,
            inbox: VecDeque::new(),
            todo: actions.into(),
            turning: true,
            blocked: None,
            ticket,
            door: Door::default(),
            conns: BTreeMap::new(),
            held: Vec::new(),
            deadline: None,
            undecided: false,
            wrong_proof: false,
            ram: vec![0; pages as usize],
            pages: PagesIn::new(pages),
            arrivals: Vec::new(),
            state: None,
        }));
        self.after(10, Happening::TargetTurn(pid));
    }

    fn target_move(&mut self, pid: Pid) -> Option<&mut TargetMove> {
        self.process(pid)?.target.as_deref_mut()
    }

    /// One turn of the driver's thread: one action, or one event.
    pub fn target_turn(&mut self, pid: Pid) {
        let Some(mv) = self.target_move(pid) else { return };
        if mv.blocked.is_some() {
            mv.turning = false;
            return;
        }
        if let Some(action) = mv.todo.pop_front() {
            self.before_action(Side::Target, pid);
            self.target_act(pid, action);
        } else if let Some(mut event) = mv.inbox.pop_front() {
            if matches!(event, Event::LinkLost(_)) && self.mutation == Some(Mutation::OwnOnLinkLost) {
                event = Event::Resolved(vmove_mirror::journal::Verdict::Committed);
            }
            if matches!(event, Event::Linked(_)) {
                match self.linked(pid) {
                    Some(linked) => event = linked,
                    None => return self.after(1, Happening::TargetTurn(pid)),
                }
            }
            let Some(mv) = self.target_move(pid) else { return };
            mv.todo.extend(mv.engine.step(event));
            let went = mv.engine.went().to_vec();
            self.held_again(pid);
            for (from, why, to) in went {
                self.note(|| format!("process {pid}: target {from:?} -{why:?}-> {to:?}"));
                self.marks.hit(Mark::Target((from, why, to)));
            }
        } else {
            mv.turning = false;
            return;
        }
        let delay = self.dice.turns.range(1..40);
        self.after(delay, Happening::TargetTurn(pid));
    }

    fn target_goes_on(&mut self, pid: Pid, event: Event) {
        let Some(mv) = self.target_move(pid) else { return };
        mv.blocked = None;
        self.post_target(pid, event);
    }

    fn target_act(&mut self, pid: Pid, action: Action) {
        let Some(host) = self.host_of(pid) else { return };
        self.note(|| format!("process {pid}: target {}", brief(&action)));
        match action {
            Action::Journal(record) => {
                let Some(process) = self.process(pid) else { return };
                let appended = process.journal.append(&record);
                if self.journal_struck(host, pid) {
                    return;
                }
                self.post_target(
                    pid,
                    match appended {
                        Ok(()) => Event::Journaled,
                        Err(error) => Event::JournalFailed(error.to_string()),
                    },
                );
            }
            Action::MakeImages => self.target_makes(pid, host),
            Action::Await => self.end_connections(pid),
            Action::Tell(message) => {
                let Some(mv) = self.target_move(pid) else { return };
                let Some(conn) = mv.conns.get(&0).copied() else { return };
                if let Ok(bytes) = control::encode(&message)
                    && !self.send(conn, 1, Packet::Frame { bytes, data: Vec::new() })
                {
                    self.post_target(pid, Event::LinkLost("the control connection".into()));
                }
            }
            Action::LoadState(bytes) => {
                if let Some(mv) = self.target_move(pid) {
                    mv.state = Some(bytes);
                    // The guest is paused: a connection lost from here on is not made anew.
                    mv.door.closed = true;
                }
                self.post_target(pid, Event::Loaded);
            }
            Action::Prove { audit } => {
                let Some(mv) = self.target_move(pid) else { return };
                mv.blocked = Some(Blocked::Proving { audit });
                self.finish_arrivals(pid);
            }
            Action::AskVerdict => {
                if let Some(mv) = self.target_move(pid) {
                    mv.undecided = true;
                }
            }
            Action::Run => {
                self.check_switch(pid, host);
                let pages = self.shape.pages;
                let Some(Process { target: Some(mv), machine, disks, .. }) = self.process(pid) else {
                    return;
                };
                let mut here = Machine::new(pages, disks);
                here.ram.clone_from(&mv.ram);
                for (page, _) in here.ram.iter().enumerate().filter(|(_, content)| **content != 0) {
                    here.touched.insert(vmove_mirror::pages::PageRange { first: page as u64, count: 1 });
                }
                *machine = Some(here);
                self.resume_guest(pid);
                self.post_target(pid, Event::Resumed { resume_us: 1 });
            }
            Action::Discard => {
                let generation = self.generation_of(pid);
                let Some(Process { target: Some(mv), disks, .. }) = self.process(pid) else { return };
                let paths: Vec<String> = disks.iter().map(|at| at.path.clone()).collect();
                mv.arrivals.clear();
                self.discard_images(host, &paths, generation);
            }
            Action::Finish { refused: None } => {
                let Some(process) = self.process(pid) else { return };
                process.target = None;
                process.run = Run::Running;
                // A take-over has raised it.
                if let Standing::Owner { generation, .. } = process.journal.standing() {
                    process.generation = *generation;
                }
                let (generation, disks) = (process.generation, process.disks.clone());
                for at in &disks {
                    if let Some(image) = self.hosts[host].images.get_mut(&at.path) {
                        image.stamp = Some((generation, OwnerState::Owned));
                    }
                }
            }
            Action::Finish { refused: Some(why) } => {
                self.process_ends(host, &format!("the VM did not come: {why}"));
            }
        }
    }

    fn target_makes(&mut self, pid: Pid, host: HostId) {
        let (generation, sizes) = (self.generation_of(pid), self.shape.disks.clone());
        let Some(disks) = self.process(pid).map(|process| process.disks.clone()) else { return };
        for (at, size) in disks.iter().zip(&sizes) {
            if let Err(why) = self.make_image(host, &at.path, *size, generation) {
                return self.post_target(pid, Event::Failed(why));
            }
        }
        let Some(mv) = self.target_move(pid) else { return };
        mv.arrivals =
            disks.iter().zip(&sizes).map(|(at, size)| BlocksIn::new(at.path.clone(), *size, None)).collect();
        mv.door.open = true;
        let early = std::mem::take(&mut mv.door.early);
        self.set_deadline(pid, CONNECT);
        self.post_target(pid, Event::ImagesReady);
        for (conn, role, bytes) in early {
            self.target_greets(pid, conn, role, bytes);
        }
    }

    fn set_deadline(&mut self, pid: Pid, time: u64) {
        let at = self.now + time;
        if let Some(mv) = self.target_move(pid) {
            mv.deadline = Some(at);
        }
        self.at(at, Happening::Deadline(pid));
    }

    /// The source must have called by now.
    pub fn target_deadline(&mut self, pid: Pid) {
        let now = self.now;
        let Some(mv) = self.target_move(pid) else { return };
        if mv.deadline.is_some_and(|at| at <= now) {
            mv.deadline = None;
            self.post_target(pid, Event::Failed("the source has not called in time".into()));
        }
    }

    /// A caller says hello.
    pub fn target_greets(&mut self, pid: Pid, conn: ConnId, role: Role, bytes: [u8; 32]) {
        let roles = 2 + self.shape.disks.len();
        let Some(mv) = self.target_move(pid) else { return self.close(conn, 1) };
        let door = &mut mv.door;
        if door.closed {
            return self.close(conn, 1);
        }
        if !door.open {
            // The kernel holds it until somebody accepts.
            door.early.push((conn, role, bytes));
            return;
        }
        let Ok(hello) = Hello::decode(&bytes) else { return self.close(conn, 1) };
        if hello.negotiate().is_ok() && hello.ticket == mv.ticket && hello.epoch > door.epoch {
            door.epoch = hello.epoch;
            door.set.clear();
        }
        let answer = match hello.negotiate() {
            Err(_) => HelloAnswer::NoCommonVersion(MIN_VERSION, VERSION),
            Ok(_) if hello.ticket != mv.ticket => HelloAnswer::BadTicket,
            Ok(_) if hello.epoch != door.epoch || door.set.contains_key(&slot(role)) => HelloAnswer::BadRole,
            Ok(version) => HelloAnswer::Accepted(version),
        };
        let accepted = matches!(answer, HelloAnswer::Accepted(_));
        if accepted {
            door.set.insert(slot(role), conn);
        }
        let complete = accepted && door.set.len() == roles;
        if complete {
            door.made = Some(door.set.clone());
        }
        self.send(conn, 1, Packet::Answer(answer.encode()));
        if !accepted {
            self.close(conn, 1);
        } else if complete {
            // Says that they are there; what has arrived is counted when they are taken.
            self.post_target(pid, Event::Linked(Arrived::default()));
        }
    }

    /// The source has called in all roles. What is left of older connections is ended first, and whatever they still had to say is heard
    /// before the new ones are taken.
    fn linked(&mut self, pid: Pid) -> Option<Event> {
        let mv = self.target_move(pid)?;
        if mv.engine.phase() > Phase::Waiting {
            return None;
        }
        if !mv.conns.is_empty() {
            return Some(Event::LinkLost("the source calls anew".into()));
        }
        mv.conns = mv.door.made.take()?;
        mv.deadline = None;
        let arrived = Arrived {
            frames: mv.pages.frames,
            operations: mv.arrivals.iter().map(|arrival| arrival.tally.ops()).collect(),
        };
        for (index, arrival) in (0u8..).zip(&mut mv.arrivals) {
            arrival.conn = mv.conns.get(&(2 + index)).copied();
        }
        Some(Event::Linked(arrived))
    }

    /// What came before its connection was in use is heard now; connections that ended meanwhile are seen to.
    fn held_again(&mut self, pid: Pid) {
        let Some(mv) = self.target_move(pid) else { return };
        if mv.held.is_empty() && mv.conns.is_empty() {
            return;
        }
        let conns: Vec<ConnId> = mv.conns.values().copied().collect();
        let (ready, still) = mv.held.drain(..).partition(|(conn, _)| conns.contains(conn));
        mv.held = still;
        let ready: Vec<(ConnId, Packet)> = ready;
        for (conn, packet) in ready {
            self.arrive(conn, 1, packet);
        }
        if let Some(conn) = conns.into_iter().find(|conn| !self.net.is_open(*conn, 1))
            && let Some(role) = self.target_move(pid).and_then(|mv| {
                let slot = mv.conns.iter().find(|(_, c)| **c == conn).map(|(slot, _)| *slot)?;
                mv.conns.retain(|_, c| *c != conn);
                Some(slot)
            })
        {
            self.post_target(pid, Event::LinkLost(format!("connection {role}")));
        }
    }

    /// Keeps what comes over a connection that is not in use yet; whether it is not.
    pub fn hold_back(&mut self, pid: Pid, conn: ConnId, packet: &Packet) -> bool {
        let Some(mv) = self.target_move(pid) else { return false };
        let held = !mv.conns.values().any(|used| *used == conn);
        if held {
            mv.held.push((conn, packet.clone()));
        }
        held
    }

    /// Ends all connections; keeps what has arrived.
    fn end_connections(&mut self, pid: Pid) {
        let Some(mv) = self.target_move(pid) else { return };
        mv.blocked = Some(Blocked::Ending);
        for arrival in &mut mv.arrivals {
            arrival.conn = None;
        }
        let control = mv.conns.remove(&0);
        let data: Vec<ConnId> = std::mem::take(&mut mv.conns).into_values().collect();
        for conn in data {
            self.close(conn, 1);
        }
        if let Some(control) = control.filter(|conn| self.net.is_open(*conn, 1))
            && let Some(mv) = self.target_move(pid)
        {
            // A source that gives up says so before it closes all.
            mv.conns.insert(0, control);
            self.after(LAST_WORD, Happening::LastWord(pid));
        }
        self.target_unblocked(pid);
    }

    /// The control connection of old had its time.
    pub fn last_word_over(&mut self, pid: Pid) {
        let Some(mv) = self.target_move(pid) else { return };
        if mv.blocked == Some(Blocked::Ending)
            && let Some(control) = mv.conns.remove(&0)
        {
            self.close(control, 1);
            self.target_unblocked(pid);
        }
    }

    /// Goes on if what the thread waited for has come.
    pub fn target_unblocked(&mut self, pid: Pid) {
        let Some(mv) = self.target_move(pid) else { return };
        let idle = mv.arrivals.iter().all(BlocksIn::idle);
        if mv.blocked != Some(Blocked::Ending) || !idle || !mv.conns.is_empty() {
            return;
        }
        mv.blocked = None;
        let called = mv.door.made.is_some();
        if !std::mem::replace(&mut mv.turning, true) {
            self.after(1, Happening::TargetTurn(pid));
        }
        self.set_deadline(pid, COME_BACK);
        if called {
            self.post_target(pid, Event::Linked(Arrived::default()));
        }
    }

    /// A connection of the target is gone.
    pub fn target_lost(&mut self, pid: Pid, role: Role, conn: ConnId) {
        let Some(Process { target, source, .. }) = self.process(pid) else { return };
        match (target, source) {
            (Some(mv), _) => {
                mv.door.early.retain(|(early, ..)| *early != conn);
                if mv.conns.get(&slot(role)) != Some(&conn) {
                    return;
                }
                if mv.blocked == Some(Blocked::Ending) {
                    mv.conns.remove(&0);
                    return self.target_unblocked(pid);
                }
                self.post_target(pid, Event::LinkLost(format!("the {role:?} connection")));
            }
            (None, Some(mv)) if mv.local.iter().any(|arrival| arrival.conn == Some(conn)) => {
                self.post_source(pid, vmove_mirror::source::Event::LinkLost("a block stream".into()));
            }
            _ => {}
        }
    }

    /// A message of the source.
    pub fn target_hears(&mut self, pid: Pid, head: &[u8]) {
        let wrong = self.target_move(pid).is_some_and(|mv| mv.wrong_proof);
        match control::decode::<SourceMsg>(head) {
            Ok(SourceMsg::Prepare(proof)) if wrong => {
                let counters = Counters { data_pages: proof.counters.data_pages + 1, ..proof.counters };
                let proof = Proof { counters, ..proof };
                self.post_target(pid, Event::Source(SourceMsg::Prepare(proof)));
            }
            Ok(message) => self.post_target(pid, Event::Source(message)),
            Err(error) => self.post_target(pid, Event::Failed(error.to_string())),
        }
    }

    /// The images are flushed: this side's proof.
    pub fn target_proves(&mut self, pid: Pid) {
        let Some(host) = self.host_of(pid) else { return };
        let Some(mv) = self.target_move(pid) else { return };
        let Some(Blocked::Proving { audit }) = mv.blocked else { return };
        let mut counters = Counters {
            data_pages: mv.pages.counts.data,
            zero_pages: mv.pages.counts.zero,
            ..Counters::default()
        };
        let (mut chains, mut paths) = (Vec::new(), Vec::new());
        for arrival in &mv.arrivals {
            let proof = arrival.tally.proof();
            counters.block_ops += proof.ops;
            counters.block_bytes += proof.bytes;
            chains.push(proof.digest);
            paths.push(arrival.path.clone());
        }
        let digest = digest::combine(Some(mv.pages.sums.digest()), &chains);
        let ram = digest_of(&mv.ram);
        let audits: Vec<[u8; 32]> = paths.iter().filter_map(|path| self.image_digest(host, path)).collect();
        let audit = audit.then(|| digest::combine(Some(ram), &audits));
        let proof = Proof { counters, digest, audit };
        self.target_goes_on(pid, Event::Proved { proof, allocated: vec![0; paths.len()], load_us: 0 });
    }
}

/// An action in few words.
fn brief(action: &Action) -> String {
    match action {
        Action::Tell(TargetMsg::Prepared { .. }) => "tells Prepared".into(),
        Action::Journal(record) => match record {
            vmove_mirror::journal::Record::Incoming { .. } => "journals Incoming".into(),
            vmove_mirror::journal::Record::Owner { generation, .. } => {
                format!("journals Owner({generation})")
            }
            other => format!("journals {other:?}"),
        },
        other => format!("{other:?}"),
    }
}
