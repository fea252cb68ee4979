//! The driver of the source engine, as `compute::migrate::source` is: one action after the other, and events in between.
//!
//! Lives here: what is done for each action. Never enters: decisions.

use std::collections::VecDeque;

use vmove_compute::migrate::AppendError;
use vmove_mirror::{
    block,
    committed::{Committed, CommittedAction},
    digest,
    journal::{DiskAt, MoveId, Record},
    source::{Action, Event, Phase, Source, SourcePlan},
    wire::{
        control::{self, Counters, DiskSetup, Proof, SourceMsg, TargetMsg},
        hello::Role,
    },
};

use super::{
    super::{
        HostId, Pid,
        faults::Side,
        marks::Mark,
        mutations::Mutation,
        net::{ConnId, Packet},
        world::{Happening, World},
    },
    Process,
    blocks_in::BlocksIn,
    blocks_out::BlocksOut,
    dial::Dial,
    digest_of,
    machine::{Gate, Machine},
    pages::PagesOut,
};

/// How long a write of the guest may wait for the target (`STALL` of the driver).
const STALL: u64 = 10_000_000;
/// How often the driver looks at its clock, here.
const GLANCE: u64 = 500_000;
/// How long a target may owe an answer and give none (`SILENCE` of the driver).
const SILENCE: u64 = 20_000_000;

/// What an agent orders.
#[derive(Debug, Clone)]
pub struct Order {
    /// The move.
    pub move_id: MoveId,
    /// Target host and the process that listens there with its ticket; none for a datastore-only move.
    pub to: Option<(HostId, Pid, [u8; 16])>,
    /// Indexes of the disks that are copied, and where to.
    pub copies: Vec<(usize, DiskAt)>,
    /// Keep the old images.
    pub keep_source: bool,
    /// Compare everything.
    pub audit: bool,
    /// Longest pause aimed at, microseconds.
    pub max_downtime: u64,
}

/// The engine, before and after the commit.
pub enum Engine {
    /// Before.
    Moving(Box<Source>),
    /// After.
    Committed(Box<Committed>),
    /// For a moment, in between.
    Between,
}

/// What the driver's thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// The first connections.
    Connecting,
    /// The mirrors to be out of the guest's way.
    Detaching,
    /// The thread that drains the queues, before the guest goes on.
    Joining,
    /// A local target that proves.
    LocalProving,
}

/// Something to do.
#[derive(Debug)]
pub enum Do {
    /// Before the commit.
    Move(Action),
    /// After it.
    After(CommittedAction),
}

/// A move away.
pub struct SourceMove {
    /// The order.
    pub order: Order,
    /// The engine.
    pub engine: Engine,
    /// Events not yet taken.
    pub inbox: VecDeque<Event>,
    /// Actions not yet done.
    pub todo: VecDeque<Do>,
    /// A turn is planned.
    pub turning: bool,
    /// The thread waits.
    pub blocked: Option<Blocked>,
    /// Number of the connections in use or being made, from 1.
    pub epoch: u32,
    /// Connections being made.
    pub dial: Option<Dial>,
    /// Connections made anew whose streams have not gone on yet: control, pages, disks.
    pub made: Option<Vec<ConnId>>,
    /// The control connection.
    pub control: Option<ConnId>,
    /// It is gone.
    pub control_lost: bool,
    /// Since when the target's word is awaited that it is ready, or how far it has got.
    pub awaiting_word: Option<u64>,
    /// Block streams whose mirrors are not there yet.
    pub links: Vec<ConnId>,
    /// The page stream.
    pub pages: Option<PagesOut>,
    /// The images of a datastore-only move.
    pub local: Vec<BlocksIn>,
    /// When it began.
    pub began: u64,
    /// When it was committed.
    pub committed_at: u64,
    /// Old images are to be retired.
    pub retire: bool,
}

impl World {
    /// Begins a move, as ordered by an agent.
    pub fn begin_source(&mut self, pid: Pid, order: Order) {
        let Some(host) = self.host_of(pid) else { return };
        let now = self.now;
        let (pages, sizes) = (self.shape.pages, self.shape.disks.clone());
        let Some(process) = self.process(pid) else { return };
        let mut disks_after = process.disks.clone();
        for (index, at) in &order.copies {
            disks_after[*index] = at.clone();
        }
        let setup = |(index, at): &(usize, DiskAt)| DiskSetup {
            name: at.name.clone(),
            virtual_bytes: super::bytes(0, sizes[*index]).1,
        };
        let plan = SourcePlan {
            move_id: order.move_id.clone(),
            to_host: order.to.map(|(to, ..)| format!("h{to}")),
            generation: process.generation + 1,
            ram_pages: order.to.map(|_| pages),
            disks: order.copies.iter().map(setup).collect(),
            disks_after,
            max_downtime: order.max_downtime,
            audit: order.audit,
        };
        process.board = Some((order.move_id.clone(), None));
        let (engine, actions) = Source::start(plan);
        process.source = Some(Box::new(SourceMove {
            order,
            engine: Engine::Moving(Box::new(engine)),
            inbox: VecDeque::new(),
            todo: actions.into_iter().map(Do::Move).collect(),
            turning: true,
            blocked: None,
            epoch: 1,
            dial: None,
            made: None,
            control: None,
            control_lost: false,
            awaiting_word: None,
            links: Vec::new(),
            pages: None,
            local: Vec::new(),
            began: now,
            committed_at: 0,
            retire: false,
        }));
        self.note(|| format!("host {host}: process {pid} begins to move"));
        self.after(10, Happening::SourceTurn(pid));
        self.after(GLANCE, Happening::Glance(pid));
        // It is looked at now.
        self.wake_guest(pid);
    }

    fn source_move(&mut self, pid: Pid) -> Option<&mut SourceMove> {
        self.process(pid)?.source.as_deref_mut()
    }

    /// One turn of the driver's thread: one action, or one event.
    pub fn source_turn(&mut self, pid: Pid) {
        let Some(mv) = self.source_move(pid) else { return };
        if mv.blocked.is_some() {
            mv.turning = false;
            return;
        }
        if let Some(next) = mv.todo.pop_front() {
            self.before_action(Side::Source, pid);
            match next {
                Do::Move(action) => self.source_act(pid, action),
                Do::After(action) => self.after_act(pid, action),
            }
        } else if let Some(event) = mv.inbox.pop_front() {
            self.source_event(pid, event);
        } else {
            mv.turning = false;
            return;
        }
        let delay = self.dice.turns.range(1..40);
        self.after(delay, Happening::SourceTurn(pid));
    }

    fn source_event(&mut self, pid: Pid, event: Event) {
        let now = self.now;
        let Some(mv) = self.source_move(pid) else { return };
        match event {
            Event::Connected => self.take_control(pid),
            Event::Target(TargetMsg::Ready | TargetMsg::Resumed(_)) => mv.awaiting_word = None,
            _ => {}
        }
        let Some(mv) = self.source_move(pid) else { return };
        match &mut mv.engine {
            Engine::Moving(engine) => {
                let actions = engine.step(now, event);
                let went = engine.went().to_vec();
                mv.todo.extend(actions.into_iter().map(Do::Move));
                for (from, why, to) in went {
                    self.note(|| format!("process {pid}: source {from:?} -{why:?}-> {to:?}"));
                    self.marks.hit(Mark::Source((from, why, to)));
                    if matches!(to, Phase::Preparing | Phase::Committing) {
                        self.remember_switch(pid, to == Phase::Committing);
                    }
                }
            }
            Engine::Committed(_) => self.after_event(pid, event),
            Engine::Between => {}
        }
    }

    /// Goes on if what the thread waited for has come.
    pub fn source_unblocked(&mut self, pid: Pid) {
        let Some(Process { machine, source: Some(mv), .. }) = self.process(pid) else { return };
        let done = match mv.blocked {
            None | Some(Blocked::Connecting | Blocked::LocalProving) => return,
            Some(Blocked::Detaching) => machine
                .as_ref()
                .is_none_or(|machine| machine.disks.iter().all(|d| d.tap.is_none() && d.gates.is_empty())),
            Some(Blocked::Joining) => machine.as_ref().is_none_or(|machine| !machine.draining),
        };
        if !done {
            return;
        }
        let joined = mv.blocked == Some(Blocked::Joining);
        self.source_goes_on(pid);
        if joined {
            self.resume_guest(pid);
        }
    }

    /// The thread waits no more.
    pub fn source_goes_on(&mut self, pid: Pid) {
        let Some(mv) = self.source_move(pid) else { return };
        mv.blocked = None;
        if !std::mem::replace(&mut mv.turning, true) {
            self.after(1, Happening::SourceTurn(pid));
        }
    }

    fn source_act(&mut self, pid: Pid, action: Action) {
        let Some(host) = self.host_of(pid) else { return };
        self.note(|| format!("process {pid}: source {}", brief(&action)));
        match action {
            Action::Journal(record) => self.source_journals(pid, host, &record),
            Action::Connect => self.source_connects(pid, host),
            Action::Reconnect => self.source_reconnects(pid),
            Action::Restore(arrived) => {
                let restored = self.restore_streams(pid, &arrived);
                self.post_source(pid, restored.unwrap_or_else(Event::Failed));
            }
            Action::Tell(message) => self.source_tells(pid, &message),
            Action::StartMirrors => self.start_mirrors(pid),
            Action::StartLogging => {
                let pages = self.shape.pages;
                let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
                machine.log = Some(vmove_mirror::pages::PageSet::empty(pages));
                let resident = machine.touched.clone();
                self.post_source(pid, Event::LoggingStarted { resident });
            }
            Action::SendPages(ranges) => self.send_pages(pid, &ranges),
            Action::EndRound(round) => self.end_round(pid, round),
            Action::CollectDirty => {
                let pages = self.shape.pages;
                let forgetful = self.mutation == Some(Mutation::ForgetDirty) && self.dice.turns.one_in(4);
                let Some(Process { machine: Some(machine), .. }) = self.process(pid) else { return };
                let empty = vmove_mirror::pages::PageSet::empty(pages);
                let mut dirty = machine.log.replace(empty.clone()).unwrap_or(empty);
                if forgetful {
                    let _ = dirty.take(0, 1);
                }
                self.post_source(pid, Event::Dirty(dirty));
            }
            Action::Pause => {
                if let Some(Process { machine: Some(machine), .. }) = self.process(pid) {
                    machine.running = false;
                }
                self.post_source(pid, Event::Paused);
            }
            Action::DrainDisks => {
                if let Some(Process { machine: Some(machine), .. }) = self.process(pid) {
                    machine.draining = true;
                }
                self.drained(pid);
            }
            Action::SaveState => {
                let state = self.stamp();
                // Saving the devices touches their rings.
                if let Some(Process { machine: Some(machine), .. }) = self.process(pid) {
                    machine.write_page(0, state);
                }
                self.post_source(pid, Event::StateSaved(state.to_le_bytes().to_vec()));
            }
            Action::Prove => {
                let proof = self.source_proof(pid);
                self.post_source(pid, Event::Proved(proof));
            }
            Action::DropMirrors => {
                for disk in 0..self.shape.disks.len() {
                    if self.mirror_of(pid, disk).is_some() {
                        self.mirror_told(pid, disk, block::Event::TargetLost);
                        self.close_tap(pid, disk);
                        self.gate(pid, disk, Gate::Detach);
                    }
                }
                let Some(mv) = self.source_move(pid) else { return };
                mv.blocked = Some(Blocked::Detaching);
                self.source_unblocked(pid);
            }
            Action::StopLogging => {
                if let Some(Process { machine: Some(machine), .. }) = self.process(pid) {
                    machine.log = None;
                }
            }
            Action::Resume => {
                let Some(mv) = self.source_move(pid) else { return };
                mv.blocked = Some(Blocked::Joining);
                self.source_unblocked(pid);
            }
            Action::Finish { reason, cancelled } => {
                let reason = if cancelled { "cancelled".to_string() } else { reason };
                let Some(mv) = self.source_move(pid) else { return };
                let mut conns: Vec<ConnId> = mv.links.drain(..).collect();
                conns.extend(mv.made.take().into_iter().flatten());
                conns.extend(
                    mv.dial.take().into_iter().flat_map(|dial| dial.links.into_iter().chain(dial.conn)),
                );
                conns.extend(mv.control);
                conns.extend(mv.pages.as_mut().and_then(PagesOut::away));
                let local: Vec<String> = mv.local.iter().map(|arrival| arrival.path.clone()).collect();
                let ends: Vec<ConnId> = mv.local.iter().filter_map(|arrival| arrival.conn).collect();
                for conn in conns {
                    self.close(conn, 0);
                }
                for conn in ends {
                    self.close(conn, 1);
                }
                let generation = self.generation_of(pid) + 1;
                self.discard_images(host, &local, generation);
                self.move_stayed(pid, host, reason);
            }
        }
    }

    fn source_journals(&mut self, pid: Pid, host: HostId, record: &Record) {
        let hasty = self.mutation == Some(Mutation::CommitUnjournalled);
        let Some(process) = self.process(pid) else { return };
        let commits = matches!(record, Record::Committed { .. } | Record::Owner { .. });
        let appended = if hasty && matches!(record, Record::Committed { .. }) {
            Ok(())
        } else {
            process.journal.append(record)
        };
        if self.journal_struck(host, pid) {
            return;
        }
        match appended {
            Ok(()) if commits => self.source_committed(pid),
            Ok(()) => self.post_source(pid, Event::Journaled),
            Err(AppendError::Unknown(..))
                if commits && self.mutation != Some(Mutation::ResumeWhenUnknown) =>
            {
                self.note(|| format!("process {pid}: whether the move is committed cannot be known"));
                self.process_ends(host, "fenced: the commit record's fate is unknown");
            }
            Err(error) => {
                self.note(|| format!("process {pid}: journal: {error}"));
                self.post_source(pid, Event::JournalFailed(error.to_string()));
            }
        }
    }

    fn source_connects(&mut self, pid: Pid, host: HostId) {
        let sizes = self.shape.disks.clone();
        let generation = self.generation_of(pid) + 1;
        let Some(mv) = self.source_move(pid) else { return };
        if mv.order.to.is_some() {
            mv.blocked = Some(Blocked::Connecting);
            mv.dial = Some(Dial::default());
            return self.dial_next(pid);
        }
        // A datastore-only move: new images here, filled over connections within the process.
        for (index, at) in mv.order.copies.clone() {
            if let Err(why) = self.make_image(host, &at.path, sizes[index], generation) {
                return self.post_source(pid, Event::Failed(why));
            }
            let ends = (host, pid);
            let Some(place) = self.source_move(pid).map(|mv| mv.local.len()) else { return };
            let conn = self.dial(ends, ends, Role::Disk(place as u8));
            let Some(mv) = self.source_move(pid) else { return };
            mv.local.push(BlocksIn::new(at.path, sizes[index], Some(conn)));
            mv.links.push(conn);
        }
        self.post_source(pid, Event::Connected);
    }

    /// Sends on the control connection, or tells the local target.
    pub fn source_tells(&mut self, pid: Pid, message: &SourceMsg) {
        let now = self.now;
        let Some(mv) = self.source_move(pid) else { return };
        if matches!(message, SourceMsg::Setup { .. } | SourceMsg::Resume) {
            mv.awaiting_word = Some(now);
        }
        match (mv.order.to, mv.control) {
            (Some(_), Some(conn)) => {
                if let Ok(bytes) = control::encode(message)
                    && !self.send(conn, 0, Packet::Frame { bytes, data: Vec::new() })
                {
                    if let Some(mv) = self.source_move(pid) {
                        mv.control_lost = true;
                    }
                    self.post_source(pid, Event::LinkLost("the control connection".into()));
                }
            }
            (Some(_), None) => {}
            (None, _) => match message {
                SourceMsg::Setup { .. } => self.post_source(pid, Event::Target(TargetMsg::Ready)),
                SourceMsg::Prepare(_) => {
                    mv.blocked = Some(Blocked::LocalProving);
                    self.finish_arrivals(pid);
                }
                _ => {}
            },
        }
    }

    /// A message of the target, on the control connection or a page stream.
    pub fn source_hears(&mut self, pid: Pid, role: Role, head: &[u8]) {
        match (control::decode::<TargetMsg>(head), role) {
            (Ok(message), Role::Control) => self.post_source(pid, Event::Target(message)),
            (Ok(message), _) => self.pages_answered(pid, message),
            (Err(error), _) => self.post_source(pid, Event::Failed(error.to_string())),
        }
    }

    fn start_mirrors(&mut self, pid: Pid) {
        let sizes = self.shape.disks.clone();
        let Some(mv) = self.source_move(pid) else { return };
        let links = std::mem::take(&mut mv.links);
        let copies: Vec<usize> = mv.order.copies.iter().map(|(disk, _)| *disk).collect();
        for (index, (disk, conn)) in copies.into_iter().zip(links).enumerate() {
            let mirror = BlocksOut::new(index, sizes[disk], conn);
            self.gate(pid, disk, Gate::Attach(Box::new(mirror)));
        }
    }

    /// Closes the block stream of a disk's mirror.
    pub fn close_tap(&mut self, pid: Pid, disk: usize) {
        if let Some(conn) = self.mirror_of(pid, disk).and_then(|tap| tap.conn.take()) {
            self.close(conn, 0);
        }
    }

    fn source_proof(&mut self, pid: Pid) -> Proof {
        let Some(Process { machine: Some(machine), source: Some(mv), .. }) = self.process(pid) else {
            return Proof::default();
        };
        let mut counters = Counters::default();
        let ram = mv.pages.as_ref().map(|pages| {
            counters.data_pages = pages.ledger.counts().data;
            counters.zero_pages = pages.ledger.counts().zero;
            pages.sums.digest()
        });
        let whole = mv.pages.as_ref().map(|_| digest_of(&machine.ram));
        let copied: Vec<usize> = mv.order.copies.iter().map(|(disk, _)| *disk).collect();
        let audit = mv.order.audit;
        let mut chains = Vec::new();
        for disk in &copied {
            if let Some(tap) = &machine.disks[*disk].tap {
                let proof = tap.ledger.proof();
                counters.block_ops += proof.ops;
                counters.block_bytes += proof.bytes;
                chains.push(proof.digest);
            }
        }
        let digest = digest::combine(ram, &chains);
        let audit = audit.then(|| {
            let disks: Vec<[u8; 32]> =
                copied.iter().filter_map(|disk| self.read_digest(pid, *disk)).collect();
            digest::combine(whole, &disks)
        });
        Proof { counters, digest, audit }
    }

    fn read_digest(&mut self, pid: Pid, disk: usize) -> Option<[u8; 32]> {
        let contents = self.disk_contents(pid, disk)?;
        Some(digest_of(&contents.into_iter().map(super::super::storage::read_as).collect::<Vec<_>>()))
    }

    /// A local target has made everything durable.
    pub fn local_prepared(&mut self, pid: Pid) {
        let Some(host) = self.host_of(pid) else { return };
        let Some(mv) = self.source_move(pid) else { return };
        if mv.blocked != Some(Blocked::LocalProving) {
            return;
        }
        let mut counters = Counters::default();
        let (mut chains, mut paths) = (Vec::new(), Vec::new());
        for arrival in &mv.local {
            let proof = arrival.tally.proof();
            counters.block_ops += proof.ops;
            counters.block_bytes += proof.bytes;
            chains.push(proof.digest);
            paths.push(arrival.path.clone());
        }
        let audited = mv.order.audit;
        let audits: Vec<[u8; 32]> = paths.iter().filter_map(|path| self.image_digest(host, path)).collect();
        let audit = audited.then(|| digest::combine(None, &audits));
        let proof = Proof { counters, digest: digest::combine(None, &chains), audit };
        self.source_goes_on(pid);
        self.post_source(
            pid,
            Event::Target(TargetMsg::Prepared { proof, allocated: vec![0; paths.len()], load_us: 0 }),
        );
    }

    /// BLAKE3 of an image as it reads.
    pub fn image_digest(&self, host: HostId, path: &str) -> Option<[u8; 32]> {
        let contents = self.hosts[host].images.get(path)?.contents();
        Some(digest_of(&contents.into_iter().map(super::super::storage::read_as).collect::<Vec<_>>()))
    }

    /// The driver looks at its clock: a guest is not left waiting for a target that has stopped answering.
    pub fn source_glance(&mut self, pid: Pid) {
        let now = self.now;
        let Some(Process { machine, source: Some(mv), .. }) = self.process(pid) else { return };
        let overdue = match &mv.engine {
            Engine::Moving(engine) if engine.phase() < Phase::Committing => {
                overdue(now, engine, mv, machine.as_ref())
            }
            _ => None,
        };
        let committed = matches!(mv.engine, Engine::Committed(_));
        if let Some(event) = overdue {
            self.post_source(pid, event);
        }
        if committed {
            self.after_patience(pid);
        }
        self.after(GLANCE, Happening::Glance(pid));
    }
}

/// A guest is not left waiting, paused or in a write to its disk, for a target that has stopped answering.
fn overdue(now: u64, engine: &Source, mv: &SourceMove, machine: Option<&Machine>) -> Option<Event> {
    let phase = engine.phase();
    let limit = if mv.order.audit { 600_000_000 } else { 20_000_000 } + mv.order.max_downtime * 20;
    if phase >= Phase::Pausing && now > engine.marks().pause + limit {
        return Some(Event::Failed("the switchover has not ended in time".into()));
    }
    let silence = |what: &str| Some(Event::LinkLost(format!("the target has not answered {what}")));
    if machine.is_some_and(|m| m.requests.values().any(|r| r.tapped && now > r.since + STALL)) {
        return silence("a write of the guest");
    }
    if phase >= Phase::Pausing || phase == Phase::Reconnecting {
        return None;
    }
    let taps = machine.into_iter().flat_map(|m| m.disks.iter().filter_map(|disk| disk.tap.as_ref()));
    let blocks = taps.filter(|tap| tap.owed()).map(|tap| tap.heard);
    let pages = mv.pages.iter().filter(|p| p.round_open || p.ledger.unacked() > 0).map(|p| p.heard);
    blocks
        .chain(pages)
        .chain(mv.awaiting_word)
        .any(|since| now > since + SILENCE)
        .then(|| silence("at all"))?
}

/// An action in few words.
fn brief(action: &Action) -> String {
    match action {
        Action::SendPages(ranges) => format!("sends {} pages", ranges.iter().map(|r| r.count).sum::<u64>()),
        Action::Tell(SourceMsg::Setup { .. }) => "tells Setup".into(),
        Action::Tell(SourceMsg::Prepare(_)) => "tells Prepare".into(),
        Action::Journal(Record::Owner { generation, .. }) => format!("journals Owner({generation})"),
        Action::Journal(record) => format!("journals {record:?}"),
        other => format!("{other:?}"),
    }
}
