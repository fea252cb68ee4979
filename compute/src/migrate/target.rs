//! Drives the target engine: makes images and memory, takes in what comes, and ends with a running machine or with nothing.
//!
//! Lives here: which worker carries out which action. Never enters: decisions.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use vmove_devices::DiskHandle;
use vmove_mirror::{
    digest,
    journal::{MoveId, Standing},
    target::{Action, Event, Phase, Target, TargetPlan},
    wire::{
        control::{self, Arrived, Counters, DiskSetup, Proof, SourceMsg, TargetMsg},
        frame::Kind,
        hello::Role,
    },
};
use vmove_storage::OwnerState;

use super::{
    MAX_MESSAGES, MoveError, VmJournal, audit,
    blocks_in::{BlocksIn, Image},
    disk_trouble, images,
    link::{LinkCloser, LinkReceiver, LinkSender},
    listen::{Links, Listener},
    pages_in::PagesIn,
    source::at,
    state, stop_points,
};
use crate::{
    machine::{DiskConfig, DiskSource, Machine, MachineConfig, PreparedMachine},
    memory::GuestRam,
    process::{
        console::Console,
        networks,
        protocol::{DiskPlacement, IdentityPaths, IncomingSpec, Listening, VmDefinition},
    },
};

/// How long the source may take to connect after it was told where.
const CONNECT: Duration = Duration::from_mins(1);
/// How long it may take to connect again when the connections were lost: longer than it tries.
const COME_BACK: Duration = Duration::from_mins(2);
/// How long the source's last word may lag behind the end of the data connections.
const LAST_WORD: Duration = Duration::from_millis(500);

/// An arrival to be carried through.
pub struct TargetMove {
    /// What was agreed.
    pub spec: IncomingSpec,
    /// The VM.
    pub vm: VmDefinition,
    /// Generation after the commit.
    pub generation: u64,
    /// Where its images are to be made.
    pub disks: Vec<DiskPlacement>,
    /// The VM's journal on this host.
    pub journal: Arc<Mutex<VmJournal>>,
    /// Where the guest's console goes.
    pub console: Console,
    /// The engine's mailbox; whoever holds the sender may resolve or cancel.
    pub events: (Sender<Event>, Receiver<Event>),
    /// Set while the source's commit is awaited and cannot be heard.
    pub undecided: Arc<AtomicBool>,
    listener: Option<Listener>,
}

/// How an arrival ended.
pub enum TargetEnd {
    /// The VM is ours and runs.
    Running(Box<Machine>),
    /// It did not come; nothing of it is left here.
    Refused(String),
    /// It is ours or not, and cannot run here now: the agent settles it from the journal.
    Broken(String),
}

struct Driver {
    task: TargetMove,
    ram: Option<GuestRam>,
    disks: Vec<DiskHandle>,
    arrivals: Vec<BlocksIn>,
    pages: Option<PagesIn>,
    control: Option<Control>,
    /// Connections that have been made and not been taken yet.
    made: Arc<Mutex<Option<Links>>>,
    /// Nobody need call any more.
    closed: Arc<AtomicBool>,
    /// No connection is in use.
    unlinked: bool,
    /// Why images or memory could not be made: the source is told once it has called.
    unmade: Option<String>,
    /// Connections that nothing here serves; open, so that the source hears what it is told before it hears their end.
    unserved: Links,
    /// What the threads of ended connections still had to say; heard before anything else.
    late: VecDeque<Event>,
    /// When the source must have called.
    deadline: Option<Instant>,
    prepared: Option<PreparedMachine>,
    machine: Option<Machine>,
    loaded_in: Duration,
    commit_seen: Option<Instant>,
}

/// The control connection.
struct Control {
    sender: LinkSender,
    closer: LinkCloser,
    reader: JoinHandle<()>,
}

impl TargetMove {
    /// Listens for the source; gives where.
    #[allow(clippy::too_many_arguments)]
    pub fn listen(
        spec: IncomingSpec,
        vm: VmDefinition,
        generation: u64,
        disks: Vec<DiskPlacement>,
        identity: Option<&IdentityPaths>,
        journal: Arc<Mutex<VmJournal>>,
        console: Console,
        events: (Sender<Event>, Receiver<Event>),
    ) -> Result<(Self, Listening), MoveError> {
        let ip: IpAddr = spec
            .listen_ip
            .parse()
            .map_err(|_| MoveError::Machine(format!("{:?} is not an IP address", spec.listen_ip)))?;
        if !spec.plain && identity.is_none() {
            return Err(MoveError::Tls("this host has no identity: run `vmove init` or `vmove join`".into()));
        }
        let (listener, listening) = Listener::bind(ip, if spec.plain { None } else { identity })?;
        let undecided = Arc::new(AtomicBool::new(false));
        let this = Self {
            spec,
            vm,
            generation,
            disks,
            journal,
            console,
            events,
            undecided,
            listener: Some(listener),
        };
        Ok((this, listening))
    }

    /// Carries it through. Blocks until it has ended one way or the other.
    pub fn run(self) -> TargetEnd {
        // In every line that this thread logs.
        let _span = tracing::info_span!("move", id = self.spec.move_id).entered();
        let plan = match self.plan() {
            Ok(plan) => plan,
            Err(error) => return TargetEnd::Refused(error.to_string()),
        };
        let driver = Driver {
            task: self,
            ram: None,
            disks: Vec::new(),
            arrivals: Vec::new(),
            pages: None,
            control: None,
            made: Arc::default(),
            closed: Arc::default(),
            unlinked: true,
            unmade: None,
            unserved: Links::new(),
            late: VecDeque::new(),
            deadline: None,
            prepared: None,
            machine: None,
            loaded_in: Duration::ZERO,
            commit_seen: None,
        };
        driver.run(plan)
    }

    fn plan(&self) -> Result<TargetPlan, MoveError> {
        Ok(TargetPlan {
            move_id: MoveId::new(&self.spec.move_id).map_err(|e| MoveError::Machine(e.to_string()))?,
            from_host: self.spec.from_host.clone(),
            generation: self.generation,
            ram_pages: (self.vm.memory_mib << 20) / vmove_mirror::PAGE_BYTES,
            disks: self
                .spec
                .images
                .iter()
                .map(|i| DiskSetup { name: i.name.clone(), virtual_bytes: i.virtual_bytes })
                .collect(),
            images: self.disks.iter().map(at).collect(),
        })
    }
}

impl Driver {
    fn run(mut self, plan: TargetPlan) -> TargetEnd {
        let (mut engine, mut actions) = Target::start(plan);
        loop {
            for action in std::mem::take(&mut actions) {
                if let Some(end) = self.act(action) {
                    self.closed.store(true, Ordering::SeqCst);
                    return end;
                }
            }
            match self.next() {
                Some(Event::Linked(_)) => actions = self.linked(&mut engine),
                Some(event) => {
                    if matches!(
                        event,
                        Event::Source(SourceMsg::Commit) | Event::Resolved(_) | Event::TakeOver
                    ) {
                        self.commit_seen = Some(Instant::now());
                    }
                    if let Event::Failed(why) | Event::LinkLost(why) | Event::JournalFailed(why) = &event {
                        tracing::warn!(phase = ?engine.phase(), why, "the arrival is in trouble");
                    }
                    actions = engine.step(event);
                }
                None => return TargetEnd::Broken("the arrival's mailbox is gone".into()),
            }
        }
    }

    fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.late.pop_front() {
            return Some(event);
        }
        let inbox = &self.task.events.1;
        let Some(deadline) = self.deadline else { return inbox.recv().ok() };
        match inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => {
                self.deadline = None;
                let unmade = self.unmade.take();
                Some(Event::Failed(unmade.unwrap_or_else(|| "the source has not called in time".into())))
            }
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }

    /// The source has called in all roles. What is left of older connections is ended first, and whatever their threads still had to
    /// say is heard before the new ones are taken.
    fn linked(&mut self, engine: &mut Target) -> Vec<Action> {
        if engine.phase() > Phase::Waiting {
            return Vec::new();
        }
        if !self.unlinked {
            return engine.step(Event::LinkLost("the source calls anew".into()));
        }
        let Some(links) = lock(&self.made).take() else { return Vec::new() };
        let linked = self.arrived().map(|arrived| engine.step(Event::Linked(arrived)));
        match linked.and_then(|actions| self.take_in(links).map(|()| actions)) {
            Ok(actions) => {
                self.unlinked = false;
                self.deadline = None;
                if let Some(why) = self.unmade.take() {
                    self.post(Event::Failed(why));
                }
                actions
            }
            Err(error) => engine.step(error.into_target_event()),
        }
    }

    /// Counts what has arrived on connections that have ended.
    fn arrived(&mut self) -> Result<Arrived, MoveError> {
        let frames = self.pages.as_mut().map_or(Ok(0), PagesIn::end_connection)?;
        let operations = self.arrivals.iter_mut().map(BlocksIn::end_connection).collect::<Result<_, _>>()?;
        Ok(Arrived { frames, operations })
    }

    /// Starts the streams on new connections.
    fn take_in(&mut self, mut links: Links) -> Result<(), MoveError> {
        let mut take = |role| {
            links.remove(&role).ok_or_else(|| MoveError::Machine(format!("{role:?} was not connected")))
        };
        let (sender, receiver, closer) = take(Role::Control)?.split()?;
        let events = &self.task.events.0;
        if let Some(pages) = &mut self.pages {
            pages.connect(take(Role::Pages(0))?, events.clone())?;
        }
        for (i, arrival) in self.arrivals.iter_mut().enumerate() {
            let events = events.clone();
            let lost = move |error: MoveError| drop(events.send(error.into_target_event()));
            arrival.connect(take(Role::Disk(i as u8))?, lost)?;
        }
        self.unserved = links;
        let events = self.task.events.0.clone();
        let reader = thread::Builder::new()
            .name("control".into())
            .spawn(move || listen_to_source(receiver, &events))
            .map_err(MoveError::io("start a thread"))?;
        self.control = Some(Control { sender, closer, reader });
        Ok(())
    }

    /// Ends all connections; keeps what has arrived. When it returns, nothing of them is written any more, and their threads have
    /// posted all they had to say.
    fn end_connections(&mut self) {
        if let Some(control) = self.control.take() {
            // A source that gives up says so before it closes all.
            let end = Instant::now() + LAST_WORD;
            while !control.reader.is_finished() && Instant::now() < end {
                thread::sleep(Duration::from_millis(5));
            }
            control.closer.close();
            if control.reader.join().is_err() {
                self.post(Event::Failed("the control connection's thread has panicked".into()));
            }
        }
        if let Err(error) = self.arrived() {
            self.post(Event::Failed(error.to_string()));
        }
        self.unlinked = true;
        self.deadline = Some(Instant::now() + COME_BACK);
        // New connections, even if they are there already, are taken only after what is left of the old ones was heard.
        let heard = self.task.events.1.try_iter();
        self.late.extend(heard.filter(|event| !matches!(event, Event::Linked(_))));
        if lock(&self.made).is_some() {
            self.post(Event::Linked(Arrived::default()));
        }
    }

    /// Lets the source call, from now on until [`Driver::closed`].
    fn open(&mut self) -> Result<(), MoveError> {
        let Some(listener) = self.task.listener.take() else { return Ok(()) };
        let mut roles = vec![Role::Control, Role::Pages(0)];
        roles.extend((0..self.task.disks.len()).map(|i| Role::Disk(i as u8)));
        let (made, closed, events) =
            (Arc::clone(&self.made), Arc::clone(&self.closed), self.task.events.0.clone());
        self.deadline = Some(Instant::now() + CONNECT);
        let serve = move || {
            let served = listener.serve(&roles, &closed, |links| {
                *lock(&made) = Some(links);
                // Says that they are there; what has arrived is counted when they are taken.
                let _ = events.send(Event::Linked(Arrived::default()));
            });
            if let Err(error) = served {
                let _ = events.send(Event::Failed(error.to_string()));
            }
        };
        let spawned = thread::Builder::new().name("listener".into()).spawn(serve);
        spawned.map(|_| ()).map_err(MoveError::io("start a thread"))
    }

    fn post(&self, event: Event) {
        // The receiving end lives as long as this driver.
        let _ = self.task.events.0.send(event);
    }

    fn answer(&self, result: Result<Event, MoveError>) {
        self.post(result.unwrap_or_else(|error| Event::Failed(error.to_string())));
    }

    fn act(&mut self, action: Action) -> Option<TargetEnd> {
        stop_points::reach(&format!("target.{}", name(&action)));
        match action {
            Action::Journal(record) => {
                let appended =
                    self.task.journal.lock().unwrap_or_else(PoisonError::into_inner).append(&record);
                self.post(match appended {
                    Ok(()) => Event::Journaled,
                    Err(error) => Event::JournalFailed(error.to_string()),
                });
            }
            Action::MakeImages => match self.make() {
                Ok(()) => self.post(Event::ImagesReady),
                Err(error) => self.unmade(error.to_string()),
            },
            Action::Await => self.end_connections(),
            Action::Tell(message) => self.tell(&message),
            Action::LoadState(bytes) => {
                // The guest is paused: a connection lost from here on is not made anew.
                self.closed.store(true, Ordering::SeqCst);
                let began = Instant::now();
                let loaded = self.load(&bytes);
                self.loaded_in = began.elapsed();
                self.answer(loaded.map(|()| Event::Loaded));
            }
            Action::Prove { audit } => {
                let proved = self.prove(audit);
                self.answer(proved);
            }
            Action::AskVerdict => self.task.undecided.store(true, Ordering::SeqCst),
            Action::Run => {
                let Some(machine) = &self.machine else {
                    return Some(TargetEnd::Broken("no machine was loaded".into()));
                };
                // The guest is this host's now. Its first packets and those for it find their way at once.
                if let Err(error) = machine.announce() {
                    tracing::warn!(%error, "the guest's networks are not told that it is here");
                }
                if let Err(error) = machine.resume() {
                    return Some(TargetEnd::Broken(format!("the guest cannot go on here: {error}")));
                }
                let resume_us = self.commit_seen.map_or(0, |t| t.elapsed().as_micros() as u64);
                self.post(Event::Resumed { resume_us });
            }
            Action::Discard => self.discard(),
            Action::Finish { refused: None } => {
                self.own_images();
                let machine = self.machine.take()?;
                return Some(TargetEnd::Running(Box::new(machine)));
            }
            Action::Finish { refused: Some(why) } => {
                if let Some(control) = &self.control {
                    control.closer.close();
                }
                let discarded = self.disks.is_empty() && self.machine.is_none();
                return Some(if discarded { TargetEnd::Refused(why) } else { TargetEnd::Broken(why) });
            }
        }
        None
    }

    fn make(&mut self) -> Result<(), MoveError> {
        let task = &self.task;
        let ram = GuestRam::new(task.vm.memory_mib << 20).map_err(|e| MoveError::Machine(e.to_string()))?;
        for place in &task.disks {
            let shape = task.spec.images.iter().find(|shape| shape.name == place.name).ok_or_else(|| {
                MoveError::Machine(format!("the structure of disk {} was not announced", place.name))
            })?;
            images::make(&place.path, shape, &task.vm.name, task.generation)
                .map_err(|error| MoveError::Machine(disk_trouble::at_creation(place, &error)))?;
            let read_only = task.vm.disks.iter().any(|disk| disk.name == place.name && disk.read_only);
            let disk = DiskHandle::open_as(&place.name, &place.path, images::filling(shape), read_only)
                .map_err(|e| MoveError::Machine(e.to_string()))?;
            self.disks.push(disk);
        }
        self.prepare(ram.clone())?;
        for disk in &self.disks {
            self.arrivals.push(BlocksIn::start(disk, Image::Own)?);
        }
        self.pages = Some(PagesIn::new(ram.clone()));
        self.ram = Some(ram);
        self.open()
    }

    /// Images or memory could not be made. The source is let in all the same, to be told why; one that does not call is not waited for
    /// longer than any other.
    fn unmade(&mut self, why: String) {
        match self.open() {
            Ok(()) => self.unmade = Some(why),
            Err(error) => {
                tracing::warn!(%error, "the source cannot be told why it is refused");
                self.post(Event::Failed(why));
            }
        }
    }

    fn tell(&mut self, message: &TargetMsg) {
        let Some(Control { sender, .. }) = &mut self.control else { return };
        let sent = control::encode(message)
            .map_err(|e| e.to_string())
            .and_then(|frame| sender.send(&[&frame]).map_err(|e| e.to_string()));
        if let Err(error) = sent {
            self.post(Event::LinkLost(error));
        }
    }

    /// Everything of the machine that does not depend on its state, so that the guest does not wait for it.
    fn prepare(&mut self, ram: GuestRam) -> Result<(), MoveError> {
        let networks = networks::configs(&self.task.vm).map_err(|e| MoveError::Machine(e.to_string()))?;
        let config = MachineConfig {
            vcpus: self.task.vm.vcpus,
            memory_bytes: self.task.vm.memory_mib << 20,
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            disks: self
                .disks
                .iter()
                .map(|disk| DiskConfig {
                    name: disk.name().to_owned(),
                    source: DiskSource::Open(disk.clone()),
                })
                .collect(),
            networks,
        };
        let prepared = Machine::prepare(config, ram, self.task.console.sink());
        self.prepared = Some(prepared.map_err(|e| MoveError::Machine(format!("prepare the machine: {e}")))?);
        Ok(())
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), MoveError> {
        let prepared =
            self.prepared.take().ok_or_else(|| MoveError::Machine("no machine was prepared".into()))?;
        self.machine = Some(state::load(prepared, &self.task.console, bytes)?);
        Ok(())
    }

    fn prove(&mut self, audited: bool) -> Result<Event, MoveError> {
        let began = Instant::now();
        let mut counters = Counters::default();
        let (mut chains, mut audits) = (Vec::new(), Vec::new());
        for arrival in &self.arrivals {
            audits.extend(arrival.finish(audited)?.audit);
            let proof = arrival.proof();
            counters.block_ops += proof.ops;
            counters.block_bytes += proof.bytes;
            chains.push(proof.digest);
        }
        let gone = || MoveError::Machine("no pages have arrived".into());
        let pages = self.pages.as_ref().ok_or_else(gone)?.proof();
        counters.data_pages = pages.counts.data;
        counters.zero_pages = pages.counts.zero;
        let audit = if audited {
            let ram = self.ram.as_ref().ok_or_else(gone)?;
            let ram = audit::ram(ram).map_err(|e| MoveError::Machine(e.to_string()))?;
            Some(digest::combine(Some(ram), &audits))
        } else {
            None
        };
        let mut allocated = Vec::new();
        for place in &self.task.disks {
            let info = vmove_storage::info(&place.path).map_err(MoveError::disk(&place.name))?;
            allocated.push(info.allocated_bytes);
        }
        let proof = Proof { counters, digest: digest::combine(Some(pages.digest), &chains), audit };
        let load_us = (self.loaded_in + began.elapsed()).as_micros() as u64;
        Ok(Event::Proved { proof, allocated, load_us })
    }

    /// After the guest runs: a stamp that could not be written is written by the next start, from the journal.
    fn own_images(&self) {
        let generation = match self.task.journal.lock().unwrap_or_else(PoisonError::into_inner).standing() {
            Standing::Owner { generation, .. } => *generation,
            _ => self.task.generation,
        };
        for place in &self.task.disks {
            let owned = OwnerState::Owned;
            if let Err(error) = images::stamp(&place.path, &self.task.vm.name, generation, owned) {
                tracing::warn!(%error, "an image is not stamped as owned yet");
            }
        }
    }

    fn discard(&mut self) {
        self.pages = None;
        self.arrivals.clear();
        self.prepared = None;
        self.machine = None;
        self.ram = None;
        for disk in self.disks.drain(..) {
            if let Err(error) = disk.stop() {
                tracing::debug!(%error, "while discarding an arrival");
            }
        }
        for place in &self.task.disks {
            images::discard(&place.path, &self.task.vm.name, self.task.generation);
        }
    }
}

fn lock(made: &Mutex<Option<Links>>) -> MutexGuard<'_, Option<Links>> {
    made.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen_to_source(mut receiver: LinkReceiver, events: &Sender<Event>) {
    for _ in 0..MAX_MESSAGES {
        let message = receiver.frame().and_then(|(header, head)| match header.kind {
            Kind::Control => control::decode::<SourceMsg>(&head).map_err(MoveError::wire("control link")),
            _ => Err(MoveError::Machine("the source sent data on the control link".into())),
        });
        let event = match message {
            Ok(message) => Event::Source(message),
            Err(error) => error.into_target_event(),
        };
        let ended = !matches!(event, Event::Source(_));
        if events.send(event).is_err() || ended {
            return;
        }
    }
    let _ = events.send(Event::Failed("the source sends more messages than a move has".into()));
}

/// Names of the stop points, in the order a move meets them.
fn name(action: &Action) -> &'static str {
    use vmove_mirror::journal::Record;
    match action {
        Action::Journal(Record::Incoming { .. }) => "journal-incoming",
        Action::Journal(Record::Prepared { .. }) => "journal-prepared",
        Action::Journal(Record::Owner { .. }) => "journal-owner",
        Action::Journal(Record::TakenOver { .. }) => "journal-taken-over",
        Action::Journal(_) => "journal-aborted",
        Action::MakeImages => "make-images",
        Action::Await => "await",
        Action::Tell(TargetMsg::Ready) => "tell-ready",
        Action::Tell(TargetMsg::Prepared { .. }) => "tell-prepared",
        Action::Tell(TargetMsg::Running { .. }) => "tell-running",
        Action::Tell(TargetMsg::Resumed(_)) => "tell-resumed",
        Action::Tell(_) => "tell-refused",
        Action::LoadState(_) => "load-state",
        Action::Prove { .. } => "prove",
        Action::AskVerdict => "ask-verdict",
        Action::Run => "run",
        Action::Discard => "discard",
        Action::Finish { .. } => "finish",
    }
}
