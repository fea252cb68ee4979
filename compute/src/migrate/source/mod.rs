//! Drives the source engine: one thread that owns the move, carries out the engine's actions and feeds it events.
//!
//! Lives here: which worker carries out which action. Never enters: decisions.

mod after;
mod peer;
mod reconnect;

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use vmove_mirror::{
    Micros,
    block::Stats,
    digest,
    journal::{DiskAt, MoveId, Record},
    pages::PageSet,
    source::{Action, Event, Phase, Source, SourcePlan},
    wire::control::{Counters, DiskSetup, Proof, SourceMsg, TargetMsg},
};

use super::{
    AppendError, MoveError, ProgressBoard, VmJournal, audit,
    blocks_out::BlocksOut,
    link::Link,
    pace::Pace,
    pages_out::PagesOut,
    report::{self, Meter},
    state, stop_points,
};
use peer::Peer;
use reconnect::{Redial, Redialled};

use crate::{
    machine::Machine,
    process::{
        console::Console,
        protocol::{DiskPlacement, IdentityPaths, ImageShape, MoveOrder, VmDefinition},
    },
};

/// How often the engine's state is shown when nothing happens.
const GLANCE: Duration = Duration::from_millis(100);

/// How long a refusal may lag behind the end of the data connections.
const LAST_WORD: Duration = Duration::from_millis(500);

/// How long a write of the guest may wait for the target before the guest goes on alone.
const STALL: Duration = Duration::from_secs(10);

/// How long a target may owe an answer and give none before its connections count as lost.
const SILENCE: Duration = Duration::from_secs(20);

/// A move to be made from here.
pub struct SourceMove {
    /// The running machine.
    pub machine: Arc<Machine>,
    /// Its console, whose state travels too.
    pub console: Console,
    /// The VM's journal.
    pub journal: Arc<Mutex<VmJournal>>,
    /// The order.
    pub order: MoveOrder,
    /// The VM as it is now.
    pub vm: VmDefinition,
    /// Ownership generation now.
    pub generation: u64,
    /// Where its images are now.
    pub disks: Vec<DiskPlacement>,
    /// Structure of those that are copied.
    pub shapes: Vec<ImageShape>,
    /// This host's identity.
    pub identity: Option<IdentityPaths>,
    /// Where progress is shown.
    pub board: Arc<ProgressBoard>,
    /// The engine's mailbox; whoever holds the sender may cancel.
    pub events: (Sender<Event>, Receiver<Event>),
}

/// How a move ended for its source.
#[derive(Debug)]
pub enum SourceEnd {
    /// The VM runs here as before.
    Stayed,
    /// The VM runs here, on these images.
    Pivoted {
        /// All images.
        disks: Vec<DiskPlacement>,
        /// The new generation.
        generation: u64,
    },
    /// The VM is the target's; end the machine. Images may be retired if the target has confirmed.
    Moved {
        /// Where it is now.
        host: String,
        /// Whether the target has said that it runs.
        confirmed: bool,
    },
    /// Neither side is known to own the VM, or it cannot go on: nobody may run until the journal is settled.
    Fenced(String),
}

struct Driver {
    task: Parts,
    began: Instant,
    peer: Peer,
    pages: Option<PagesOut>,
    mirrors: Arc<Vec<BlocksOut>>,
    pending_links: Vec<Link>,
    /// Number of the connections in use, from 1.
    epoch: u32,
    /// Connections being made anew.
    redial: Option<Arc<Redial>>,
    /// Connections made anew whose streams have not gone on yet.
    redialled: Option<Redialled>,
    /// Since when the target's word is awaited that it is ready, or how far it has got.
    awaiting_word: Option<Instant>,
    pace: Arc<Pace>,
    control_lost: Arc<AtomicBool>,
    meter: Meter,
    digest: [u8; 32],
    draining: Option<thread::JoinHandle<()>>,
    /// Events that were taken out of the mailbox ahead of their turn.
    held: VecDeque<Event>,
    /// Dropped when the pause is over.
    pause_over: Option<Sender<()>>,
}

/// [`SourceMove`] without its receiving end.
struct Parts {
    machine: Arc<Machine>,
    console: Console,
    journal: Arc<Mutex<VmJournal>>,
    order: MoveOrder,
    vm: VmDefinition,
    generation: u64,
    disks: Vec<DiskPlacement>,
    shapes: Vec<ImageShape>,
    identity: Option<IdentityPaths>,
    board: Arc<ProgressBoard>,
    events: Sender<Event>,
}

/// What comes of one action.
enum Flow {
    Go,
    Committed,
    Ended(SourceEnd),
}

impl SourceMove {
    /// Makes the move. Blocks until it has ended one way or the other.
    pub fn run(self) -> SourceEnd {
        // In every line that this thread logs.
        let _span = tracing::info_span!("move", id = self.order.move_id).entered();
        let (events, inbox) = self.events;
        let pace = Arc::new(Pace::new(self.order.bandwidth));
        self.board.begin(&self.order.move_id);
        let mut driver = Driver {
            task: Parts {
                machine: self.machine,
                console: self.console,
                journal: self.journal,
                order: self.order,
                vm: self.vm,
                generation: self.generation,
                disks: self.disks,
                shapes: self.shapes,
                identity: self.identity,
                board: self.board,
                events,
            },
            began: Instant::now(),
            peer: Peer::None,
            pages: None,
            mirrors: Arc::new(Vec::new()),
            pending_links: Vec::new(),
            epoch: 0,
            redial: None,
            redialled: None,
            awaiting_word: None,
            pace,
            control_lost: Arc::new(AtomicBool::new(false)),
            meter: Meter::default(),
            digest: [0; 32],
            draining: None,
            held: VecDeque::new(),
            pause_over: None,
        };
        let plan = match driver.plan() {
            Ok(plan) => plan,
            Err(error) => {
                tracing::error!(%error, "a move order that cannot be followed");
                return SourceEnd::Stayed;
            }
        };
        driver.run(plan, &inbox)
    }
}

impl Driver {
    fn now(&self) -> Micros {
        self.began.elapsed().as_micros() as Micros
    }

    fn plan(&self) -> Result<SourcePlan, MoveError> {
        let order = &self.task.order;
        let moves = order.target.is_some();
        Ok(SourcePlan {
            move_id: MoveId::new(&order.move_id).map_err(|e| MoveError::Machine(e.to_string()))?,
            to_host: moves.then(|| order.to.host.clone()),
            generation: self.task.generation + 1,
            ram_pages: moves.then(|| self.task.machine.ram().pages()),
            disks: self
                .task
                .shapes
                .iter()
                .map(|s| DiskSetup { name: s.name.clone(), virtual_bytes: s.virtual_bytes })
                .collect(),
            disks_after: self.disks_after().iter().map(at).collect(),
            max_downtime: order.max_downtime_ms.saturating_mul(1000),
            audit: order.audit,
        })
    }

    /// All images once the copied ones are at their new places.
    fn disks_after(&self) -> Vec<DiskPlacement> {
        let copies = &self.task.order.copies;
        let after = |old: &DiskPlacement| copies.iter().find(|c| c.name == old.name).unwrap_or(old).clone();
        self.task.disks.iter().map(after).collect()
    }

    fn run(&mut self, plan: SourcePlan, inbox: &Receiver<Event>) -> SourceEnd {
        let (mut engine, mut actions) = Source::start(plan);
        loop {
            for action in std::mem::take(&mut actions) {
                match self.act(&engine, action) {
                    Flow::Go => {}
                    Flow::Ended(end) => return end,
                    Flow::Committed => {
                        let (committed, actions) = engine.committed(self.now());
                        return self.finish(committed, actions, inbox);
                    }
                }
            }
            let next = self.held.pop_front().map_or_else(|| inbox.recv_timeout(GLANCE), Ok);
            let event = match next {
                Ok(event) => Some(self.reason(event, inbox)),
                Err(RecvTimeoutError::Timeout) => None,
                // The driver itself holds a sender.
                Err(RecvTimeoutError::Disconnected) => None,
            };
            // Looked at on every turn: a target that keeps talking may still not be getting anywhere.
            let event = match self.overdue(&engine) {
                Some(overdue) => {
                    if let Some(event) = event {
                        self.held.push_front(event);
                    }
                    Some(overdue)
                }
                None => event,
            };
            let event = event.map(|event| self.prepare(event));
            if let Some(Event::Failed(why) | Event::LinkLost(why) | Event::JournalFailed(why)) = &event {
                tracing::warn!(phase = ?engine.phase(), why, "the move is in trouble");
            }
            let now = self.now();
            self.meter.publish(&self.task.board, now, &engine, &self.stats());
            if let Some(event) = event {
                actions = engine.step(now, event);
            }
        }
    }

    /// A target that refuses says why on the control connection and closes all: its data connections may be seen to end first.
    /// Then its last word is waited for a moment, for a message that explains itself.
    fn reason(&mut self, event: Event, inbox: &Receiver<Event>) -> Event {
        if !matches!(event, Event::LinkLost(_))
            || !self.held.is_empty()
            || self.control_lost.load(Ordering::SeqCst)
        {
            return event;
        }
        let end = Instant::now() + LAST_WORD;
        while let Ok(next) = inbox.recv_timeout(end.saturating_duration_since(Instant::now())) {
            if matches!(next, Event::Target(TargetMsg::Refused { .. })) {
                self.held.push_back(event);
                return next;
            }
            // Whatever else comes is not lost, only later.
            self.held.push_back(next);
            if Instant::now() >= end || self.control_lost.load(Ordering::SeqCst) {
                break;
            }
        }
        event
    }

    /// What the driver does itself about an event before the engine hears of it.
    fn prepare(&mut self, event: Event) -> Event {
        match event {
            Event::Connected => match self.connected_again() {
                Ok(()) => Event::Connected,
                Err(error) => Event::Failed(error.to_string()),
            },
            Event::Target(TargetMsg::Ready | TargetMsg::Resumed(_)) => {
                self.awaiting_word = None;
                event
            }
            event => event,
        }
    }

    /// A guest is not left waiting, paused or in a write to its disk, for a peer that has stopped answering without closing its
    /// connections. Before the pause such connections are lost ones.
    fn overdue(&mut self, engine: &Source) -> Option<Event> {
        let phase = engine.phase();
        if phase >= Phase::Committing {
            return None;
        }
        let limit = self.pause_limit().as_micros() as Micros;
        if phase >= Phase::Pausing && self.now() > engine.marks().pause + limit {
            return Some(Event::Failed(format!(
                "the switchover has not ended within {} s",
                limit / 1_000_000
            )));
        }
        let silence = |what: &str, time: Duration| {
            Event::LinkLost(format!("the target has not answered {what} for {} s", time.as_secs()))
        };
        if self.mirrors.iter().filter_map(BlocksOut::stalled).any(|time| time > STALL) {
            return Some(silence("a write of the guest", STALL));
        }
        let silent = |time: Duration| time > SILENCE;
        let overdue = match phase {
            Phase::Setup | Phase::Resuming => self.awaiting_word.is_some_and(|since| silent(since.elapsed())),
            Phase::Mirror | Phase::PreCopy => {
                self.mirrors.iter().filter_map(BlocksOut::silent).any(silent)
                    || self.pages.iter().filter_map(PagesOut::silent).any(silent)
            }
            // Between connections nothing is owed; in the pause its limit counts.
            _ => false,
        };
        overdue.then(|| silence("at all", SILENCE))
    }

    fn pause_limit(&self) -> Duration {
        let fixed = if self.task.order.audit { 600 } else { 20 };
        Duration::from_secs(fixed) + Duration::from_millis(self.task.order.max_downtime_ms.saturating_mul(20))
    }

    /// Ends the control connection if the pause lasts too long. This thread may itself be held up by a peer that reads a few bytes
    /// now and then, so another one watches.
    fn watch_pause(&mut self) {
        let Peer::Remote { closer, .. } = &self.peer else { return };
        let (closer, limit) = (closer.clone(), self.pause_limit());
        let (over, end) = mpsc::channel::<()>();
        let spawned = thread::Builder::new().name("pause-limit".into()).spawn(move || {
            // Disconnected: the pause is over.
            if matches!(end.recv_timeout(limit), Err(RecvTimeoutError::Timeout)) {
                closer.close();
            }
        });
        match spawned {
            Ok(_) => self.pause_over = Some(over),
            Err(error) => self.post(Event::Failed(format!("start a thread: {error}"))),
        }
    }

    fn stats(&self) -> Vec<Stats> {
        self.mirrors.iter().map(BlocksOut::stats).collect()
    }

    fn post(&self, event: Event) {
        // The receiving end lives as long as this driver.
        let _ = self.task.events.send(event);
    }

    fn attempt(&self, what: &str, result: Result<(), impl std::fmt::Display>) {
        if let Err(error) = result {
            self.post(Event::Failed(format!("{what}: {error}")));
        }
    }

    fn act(&mut self, engine: &Source, action: Action) -> Flow {
        stop_points::reach(&format!("source.{}", name(&action)));
        let machine = Arc::clone(&self.task.machine);
        match action {
            Action::Journal(record) => return self.journal(&record),
            Action::Connect => {
                let connected = self.connect();
                match connected {
                    Ok(()) => self.post(Event::Connected),
                    Err(error) => self.post(Event::Failed(error.to_string())),
                }
            }
            Action::Reconnect => {
                let begun = self.reconnect();
                self.attempt("connect again", begun);
            }
            Action::Restore(arrived) => match self.restore(&arrived) {
                Ok(event) => self.post(event),
                Err(error) => self.post(Event::Failed(error.to_string())),
            },
            Action::Tell(message) => self.tell(&message),
            Action::StartMirrors => {
                let started = self.start_mirrors();
                self.attempt("start the mirrors", started);
            }
            Action::StartLogging => {
                let logged = machine.dirty_log().start_logging().and_then(|()| machine.ram().resident());
                match logged {
                    Ok(words) => {
                        let resident = PageSet::from_words(words, machine.ram().pages());
                        self.post(Event::LoggingStarted { resident });
                    }
                    Err(error) => self.post(Event::Failed(format!("log dirty pages: {error}"))),
                }
            }
            Action::SendPages(ranges) => {
                if let Some(pages) = &self.pages {
                    pages.send(ranges);
                }
            }
            Action::EndRound(round) => {
                if let Some(pages) = &self.pages {
                    pages.end_round(round);
                }
            }
            Action::CollectDirty => match machine.dirty_log().collect() {
                Ok(words) => self.post(Event::Dirty(PageSet::from_words(words, machine.ram().pages()))),
                Err(error) => self.post(Event::Failed(format!("collect dirty pages: {error}"))),
            },
            Action::Pause => {
                self.watch_pause();
                machine.pause_vcpus();
                self.post(Event::Paused);
            }
            Action::DrainDisks => self.drain(),
            Action::SaveState => match state::save(&machine, &self.task.console) {
                Ok(bytes) => self.post(Event::StateSaved(bytes)),
                Err(error) => self.post(Event::Failed(error.to_string())),
            },
            Action::Prove => match self.prove() {
                Ok(proof) => {
                    self.digest = proof.audit.unwrap_or(proof.digest);
                    self.post(Event::Proved(proof));
                }
                Err(error) => self.post(Event::Failed(error.to_string())),
            },
            Action::DropMirrors => self.mirrors.iter().for_each(BlocksOut::detach),
            Action::StopLogging => {
                if let Err(error) = machine.dirty_log().stop_logging() {
                    tracing::warn!(%error, "the dirty log stays on");
                }
            }
            Action::Resume => {
                self.pause_over = None;
                // The mirrors are gone, so nothing holds the drain up; left behind, it would pause what resumes here.
                if self.draining.take().is_some_and(|thread| thread.join().is_err()) {
                    tracing::error!("the thread that drains the queues has panicked");
                }
                // A guest that has ended meanwhile is the process's concern.
                if let Err(error) = machine.resume() {
                    tracing::error!(%error, "the guest cannot go on");
                }
                self.task.console.go_on();
            }
            Action::Finish { reason, cancelled } => {
                if let Some(redial) = &self.redial {
                    redial.give_up();
                }
                self.redialled = None;
                self.mirrors = Arc::new(Vec::new());
                self.pages = None;
                match &mut self.peer {
                    Peer::Local(target) => target.discard(),
                    Peer::Remote { closer, .. } => closer.close(),
                    Peer::None => {}
                }
                let report =
                    report::aborted(&self.task.vm, &self.task.order, self.now(), engine, &reason, cancelled);
                tracing::warn!(reason, "the move has ended, the VM stays");
                self.task.board.finish(report, Some(reason));
                return Flow::Ended(SourceEnd::Stayed);
            }
        }
        Flow::Go
    }

    fn journal(&mut self, record: &Record) -> Flow {
        let appended = self.task.journal.lock().unwrap_or_else(PoisonError::into_inner).append(record);
        let commits = matches!(record, Record::Committed { .. } | Record::Owner { .. });
        match appended {
            Ok(()) if commits => {
                self.pause_over = None;
                return Flow::Committed;
            }
            Ok(()) => self.post(Event::Journaled),
            Err(error @ AppendError::Unknown(..)) if commits => {
                let why = format!("whether the move is committed cannot be known: {error}");
                return Flow::Ended(SourceEnd::Fenced(why));
            }
            Err(error) => self.post(Event::JournalFailed(error.to_string())),
        }
        Flow::Go
    }

    fn start_mirrors(&mut self) -> Result<(), MoveError> {
        let mut mirrors = Vec::new();
        for (index, link) in std::mem::take(&mut self.pending_links).into_iter().enumerate() {
            let shape = &self.task.shapes[index];
            let disk = self
                .task
                .machine
                .disk(&shape.name)
                .ok_or_else(|| MoveError::Machine(format!("the VM has no disk {}", shape.name)))?;
            let order = &self.task.order;
            let copy = order.copies.iter().find(|copy| copy.name == shape.name);
            let to = format!(
                "host {}, datastore {}",
                order.to.host,
                copy.map_or(order.to.datastore.as_str(), |copy| copy.datastore.as_str())
            );
            let (pace, events) = (Arc::clone(&self.pace), self.task.events.clone());
            let started = BlocksOut::start(disk, index, (link, to), pace, events);
            match started {
                Ok(mirror) => mirrors.push(mirror),
                Err(error) => {
                    mirrors.iter().for_each(BlocksOut::detach);
                    return Err(error);
                }
            }
        }
        self.mirrors = Arc::new(mirrors);
        Ok(())
    }

    /// On a thread of its own: a target that stops answering must not keep the engine from giving up.
    fn drain(&mut self) {
        let (machine, mirrors) = (Arc::clone(&self.task.machine), Arc::clone(&self.mirrors));
        let events = self.task.events.clone();
        let spawned = thread::Builder::new().name("drain".into()).spawn(move || {
            if let Err(error) = machine.pause_devices() {
                let _ = events.send(Event::Failed(error.to_string()));
                return;
            }
            let _ = events.send(Event::QueuesEmpty);
            mirrors.iter().for_each(BlocksOut::drain);
        });
        match spawned {
            Ok(thread) => self.draining = Some(thread),
            Err(error) => self.post(Event::Failed(format!("start a thread: {error}"))),
        }
    }

    fn prove(&self) -> Result<Proof, MoveError> {
        let task = &self.task;
        let mut counters = Counters::default();
        let ram = match &self.pages {
            Some(pages) => {
                let gone = || MoveError::Machine("the page stream has ended".into());
                let proof = pages.proof().ok_or_else(gone)?;
                counters.data_pages = proof.counts.data;
                counters.zero_pages = proof.counts.zero;
                Some(proof.digest)
            }
            None => None,
        };
        let mut chains = Vec::new();
        for mirror in self.mirrors.iter() {
            let proof = mirror.proof();
            counters.block_ops += proof.ops;
            counters.block_bytes += proof.bytes;
            chains.push(proof.digest);
        }
        let audit = if task.order.audit { Some(self.audit(ram.is_some())?) } else { None };
        Ok(Proof { counters, digest: digest::combine(ram, &chains), audit })
    }

    fn audit(&self, with_ram: bool) -> Result<[u8; 32], MoveError> {
        let memory = |e: crate::memory::Error| MoveError::Machine(e.to_string());
        let ram = if with_ram { Some(audit::ram(self.task.machine.ram()).map_err(memory)?) } else { None };
        let disks = self.mirrors.iter().map(BlocksOut::audit).collect::<Result<Vec<_>, _>>()?;
        Ok(digest::combine(ram, &disks))
    }
}

/// A placement as journals name it.
pub fn at(place: &DiskPlacement) -> DiskAt {
    DiskAt {
        name: place.name.clone(),
        datastore: place.datastore.clone(),
        path: place.path.to_string_lossy().into_owned(),
    }
}

/// Names of the stop points, in the order a move meets them.
fn name(action: &Action) -> &'static str {
    match action {
        Action::Journal(Record::Moving { .. }) => "journal-moving",
        Action::Journal(Record::Aborted { .. }) => "journal-aborted",
        Action::Journal(Record::Committed { .. }) => "journal-committed",
        Action::Journal(_) => "journal-owner",
        Action::Connect => "connect",
        Action::Reconnect => "reconnect",
        Action::Restore(_) => "restore",
        Action::Tell(SourceMsg::Setup { .. }) => "tell-setup",
        Action::Tell(SourceMsg::State(_)) => "tell-state",
        Action::Tell(SourceMsg::Prepare(_)) => "tell-prepare",
        Action::Tell(SourceMsg::Resume) => "tell-resume",
        Action::Tell(_) => "tell-abort",
        Action::StartMirrors => "start-mirrors",
        Action::StartLogging => "start-logging",
        Action::SendPages(_) => "send-pages",
        Action::EndRound(_) => "end-round",
        Action::CollectDirty => "collect-dirty",
        Action::Pause => "pause",
        Action::DrainDisks => "drain-disks",
        Action::SaveState => "save-state",
        Action::Prove => "prove",
        Action::DropMirrors => "drop-mirrors",
        Action::StopLogging => "stop-logging",
        Action::Resume => "resume",
        Action::Finish { .. } => "finish",
    }
}
