//! The VM process's main thread: the one owner of the VM, from boot or arrival to its end.
//!
//! ```text
//! Boot     -> Running -> (moves away) ended | (stopped, powered off) ended | (reset) Boot
//! Incoming -> Running | discarded, ended | undecided -> Running or discarded
//! Restore  -> Running | ended, nothing changed
//! ```
//! Lives here: what the process is now, and who may change it. Never enters: how a move works, what an agent wants.

mod checkpoints;

use std::{
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use vmove_mirror::{
    journal::{self, MoveId, Record, Standing},
    source, target,
};
use vmove_storage::{BackingPolicy, OpenOptions, Owner, OwnerState, Stamp};

use super::{
    console::{
        Console,
        wire::{MAX_TEXT, ServerMsg},
    },
    control,
    measure::Watch,
    protocol::{
        CONSOLE_SOCKET, CONTROL_SOCKET, DiskDefinition, DiskPlacement, ImageShape, IncomingSpec,
        JOURNAL_FILE, LAUNCH_FILE, LaunchSpec, Listening, MoveOrder, ProcessStatus, Reply, Request, RunState,
        Start, Verdict,
    },
};
use crate::{
    checkpoint::CheckpointError,
    machine::{DiskConfig, DiskSource, ExitReason, Machine, MachineConfig},
    migrate::{MoveError, ProgressBoard, SourceEnd, SourceMove, TargetEnd, TargetMove, VmJournal, placement},
};

/// Why the process ended other than by plan.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// A file of the VM's directory.
    #[error("{what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The launch file says nothing sensible.
    #[error("{path} is no launch file of this version: {source}")]
    Launch {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Images, stamps, journal.
    #[error(transparent)]
    Storage(#[from] vmove_storage::BlockError),
    /// The machine could not be built or has failed.
    #[error(transparent)]
    Machine(#[from] crate::machine::Error),
    /// The journal says that the VM may not run here.
    #[error("VM {vm} may not be started here: {why}")]
    NotOurs {
        /// Its name.
        vm: String,
        /// What the journal says.
        why: String,
    },
    /// The arrival or a move ended in a state in which nobody may run.
    #[error("{0}")]
    Settle(String),
    /// The guest.
    #[error("the guest has failed: {0}")]
    Guest(String),
    /// The parts of a move.
    #[error(transparent)]
    Move(#[from] MoveError),
    /// The checkpoint it was to go on from.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// What wakes the main thread.
enum Wake {
    GuestEnded(ExitReason),
    MoveEnded(SourceEnd),
    Stop,
}

struct State {
    run: RunState,
    machine: Option<Arc<Machine>>,
    generation: u64,
    disks: Vec<DiskPlacement>,
    spec: LaunchSpec,
    moving: Option<(String, Sender<source::Event>)>,
    arriving: Option<Sender<target::Event>>,
    undecided: Option<Arc<AtomicBool>>,
    listening: Option<Listening>,
}

/// What the main thread, the control socket and the console share.
struct Shared {
    dir: PathBuf,
    state: Mutex<State>,
    journal: Arc<Mutex<VmJournal>>,
    board: Arc<ProgressBoard>,
    console: Console,
    measuring: Watch,
    wake: Sender<Wake>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn journal(&self) -> MutexGuard<'_, VmJournal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the VM whose directory this is, until it ends here.
pub fn run(dir: &Path) -> Result<(), ProcessError> {
    let launch = dir.join(LAUNCH_FILE);
    let text = fs::read(&launch).map_err(file("read", &launch))?;
    let spec: LaunchSpec =
        serde_json::from_slice(&text).map_err(|source| ProcessError::Launch { path: launch, source })?;
    let journal = VmJournal::open(&dir.join(JOURNAL_FILE))?;
    let (wake, woken) = mpsc::channel();
    let shared = Arc::new(Shared {
        dir: dir.to_owned(),
        state: Mutex::new(State {
            run: match spec.start {
                Start::Boot => RunState::Running,
                Start::Incoming(_) | Start::Restore(_) => RunState::Incoming,
            },
            machine: None,
            generation: spec.generation,
            disks: spec.disks.clone(),
            spec: spec.clone(),
            moving: None,
            arriving: None,
            undecided: None,
            listening: None,
        }),
        journal: Arc::new(Mutex::new(journal)),
        board: Arc::new(ProgressBoard::new(&dir.join("moves"))),
        console: match spec.start {
            Start::Boot => Console::new(uuid::Uuid::new_v4().into_bytes()),
            Start::Incoming(_) | Start::Restore(_) => Console::arriving(),
        },
        measuring: Watch::default(),
        wake,
    });
    let machine = match &spec.start {
        Start::Boot => {
            own(&shared)?;
            let machine = boot(&shared)?;
            serve(&shared)?;
            machine.resume()?;
            machine
        }
        Start::Incoming(incoming) => match arrive(&shared, incoming)? {
            Some(machine) => machine,
            None => return Ok(()),
        },
        Start::Restore(from) => checkpoints::restore(&shared, &from.dir)?,
    };
    let left = live(&shared, machine, &woken);
    shared.console.end(match &left {
        Ok(Left::For(host)) => ServerMsg::Moved { host: host.clone() },
        Ok(Left::Stopped) => ServerMsg::Ended { reason: "the VM has stopped".into() },
        Err(error) => ServerMsg::Ended { reason: error.to_string().chars().take(MAX_TEXT / 4).collect() },
    });
    left.map(|_| ())
}

/// How a VM that ran here has left.
enum Left {
    /// It runs on another host now.
    For(String),
    Stopped,
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ProcessError {
    let path = path.to_owned();
    move |source| ProcessError::File { what, path, source }
}

/// Makes sure that the journal gives this host the VM, ends what a crash left open, and brings the stamps up to date.
fn own(shared: &Shared) -> Result<(), ProcessError> {
    let mut state = shared.lock();
    let vm = state.spec.vm.name.clone();
    let mut journal = shared.journal();
    let append = |journal: &mut VmJournal, record: &Record| {
        journal.append(record).map_err(|e| ProcessError::Settle(e.to_string()))
    };
    match journal.standing().clone() {
        Standing::Nothing => {
            let disks = state.disks.iter().map(placement).collect();
            append(&mut journal, &Record::Owner { generation: state.generation, disks })?;
        }
        // The process that moved it died before the commit: it can never commit now.
        Standing::Moving { move_id, .. } => append(&mut journal, &Record::Aborted { move_id })?,
        Standing::Owner { .. } => {}
        other => return Err(ProcessError::NotOurs { vm, why: format!("{other:?}") }),
    }
    let Standing::Owner { generation, disks } = journal.standing().clone() else {
        return Err(ProcessError::NotOurs { vm, why: format!("{:?}", journal.standing()) });
    };
    state.generation = generation;
    for at in &disks {
        if let Some(place) = state.disks.iter_mut().find(|place| place.name == at.name) {
            place.datastore.clone_from(&at.datastore);
            place.path = PathBuf::from(&at.path);
        }
    }
    for place in &state.disks {
        // The journal is what counts; a crash between it and the stamps leaves these behind.
        let stamp = Stamp::read(&place.path)?;
        let ours = stamp
            .as_ref()
            .is_none_or(|s| s.vm == vm && s.generation <= generation && s.state != OwnerState::Stale);
        if ours && stamp.is_none_or(|s| s.generation != generation || s.state != OwnerState::Owned) {
            Stamp { vm: vm.clone(), generation, state: OwnerState::Owned }.write(&place.path)?;
        }
    }
    sync_definition(&mut state);
    Ok(())
}

/// The definition names the datastores as they are now.
fn sync_definition(state: &mut State) {
    for disk in &mut state.spec.vm.disks {
        if let Some(place) = state.disks.iter().find(|place| place.name == disk.name) {
            disk.datastore.clone_from(&place.datastore);
        }
    }
}

fn boot(shared: &Shared) -> Result<Arc<Machine>, ProcessError> {
    let mut state = shared.lock();
    let spec = &state.spec;
    let disks = spec
        .vm
        .disks
        .iter()
        .filter_map(|disk| {
            let place = state.disks.iter().find(|place| place.name == disk.name)?;
            let options = OpenOptions {
                read_only: disk.read_only,
                format: Some(crate::migrate::image_format(disk.format)),
                backing: BackingPolicy::Deny,
                owner: Some(Owner { vm: spec.vm.name.clone(), generation: state.generation }),
            };
            let source = DiskSource::Image { path: place.path.clone(), options };
            Some(DiskConfig { name: disk.name.clone(), source })
        })
        .collect();
    let config = MachineConfig {
        vcpus: spec.vm.vcpus,
        memory_bytes: spec.vm.memory_mib << 20,
        kernel: Some(spec.kernel.clone()),
        initrd: spec.initrd.clone(),
        cmdline: spec.vm.cmdline.clone(),
        disks,
        networks: super::networks::configs(&spec.vm)?,
    };
    let machine = Arc::new(Machine::boot(config, shared.console.sink())?);
    state.machine = Some(Arc::clone(&machine));
    Ok(machine)
}

fn serve(shared: &Arc<Shared>) -> Result<(), ProcessError> {
    let typed = Arc::clone(shared);
    let path = shared.dir.join(CONSOLE_SOCKET);
    shared.console.serve(&path, move |keys| type_in(&typed, keys)).map_err(file("listen on", &path))?;
    let asked = Arc::clone(shared);
    let path = shared.dir.join(CONTROL_SOCKET);
    control::serve(&path, move |request| answer(&asked, request)).map_err(file("listen on", &path))
}

/// Gives the guest what a watcher types, as far as it has room. A guest that arrives, or starts again, has none.
fn type_in(shared: &Shared, keys: &[u8]) -> usize {
    let machine = shared.lock().machine.clone();
    machine.map_or(0, |machine| machine.console_input(keys))
}

/// Takes a VM in; none if it did not come.
fn arrive(shared: &Arc<Shared>, incoming: &IncomingSpec) -> Result<Option<Arc<Machine>>, ProcessError> {
    let (vm, generation, disks, identity) = {
        let state = shared.lock();
        (state.spec.vm.clone(), state.generation, state.disks.clone(), state.spec.identity.clone())
    };
    let (sender, inbox) = mpsc::channel();
    let (arrival, listening) = TargetMove::listen(
        incoming.clone(),
        vm,
        generation,
        disks,
        identity.as_ref(),
        Arc::clone(&shared.journal),
        shared.console.clone(),
        (sender.clone(), inbox),
    )?;
    {
        let mut state = shared.lock();
        state.arriving = Some(sender);
        state.undecided = Some(Arc::clone(&arrival.undecided));
        state.listening = Some(listening);
    }
    serve(shared)?;
    match arrival.run() {
        TargetEnd::Running(machine) => {
            let machine = Arc::new(*machine);
            let mut state = shared.lock();
            state.machine = Some(Arc::clone(&machine));
            state.run = RunState::Running;
            state.arriving = None;
            state.undecided = None;
            state.listening = None;
            // A take-over has raised it.
            if let Standing::Owner { generation, .. } = shared.journal().standing() {
                state.generation = *generation;
            }
            sync_definition(&mut state);
            Ok(Some(machine))
        }
        TargetEnd::Refused(why) => {
            tracing::info!(why, "the VM did not come");
            Ok(None)
        }
        TargetEnd::Broken(why) => Err(ProcessError::Settle(why)),
    }
}

/// A running VM, until it ends here.
fn live(
    shared: &Arc<Shared>,
    mut machine: Arc<Machine>,
    woken: &Receiver<Wake>,
) -> Result<Left, ProcessError> {
    watch(shared, &machine);
    loop {
        match woken.recv() {
            Ok(Wake::Stop) => {
                shared.lock().run = RunState::Leaving;
                return end(shared, machine);
            }
            Ok(Wake::MoveEnded(end_of_move)) => {
                if let Some(host) = settled(shared, end_of_move)? {
                    return Ok(Left::For(host));
                }
            }
            Ok(Wake::GuestEnded(reason)) => {
                let moving = shared.lock().moving.as_ref().map(|(_, events)| events.clone());
                if let Some(events) = moving {
                    // The move gives up and says so, or it was quicker.
                    let _ = events.send(source::Event::Failed("the guest has ended".into()));
                    loop {
                        match woken.recv() {
                            Ok(Wake::MoveEnded(end_of_move)) => {
                                if let Some(host) = settled(shared, end_of_move)? {
                                    return Ok(Left::For(host));
                                }
                                break;
                            }
                            Ok(_) => {}
                            Err(_) => return end(shared, machine),
                        }
                    }
                }
                match reason {
                    ExitReason::Shutdown => return end(shared, machine),
                    ExitReason::Reset => {
                        shared.lock().machine = None;
                        shared.measuring.give_way();
                        stop(machine)?;
                        machine = boot(shared)?;
                        machine.resume()?;
                        watch(shared, &machine);
                    }
                    ExitReason::Error(why) => {
                        end(shared, machine)?;
                        return Err(ProcessError::Guest(why));
                    }
                }
            }
            Err(_) => return end(shared, machine),
        }
    }
}

/// Takes in how a move ended; gives the host on which the VM is now, if it is not this process's any more.
fn settled(shared: &Shared, end_of_move: SourceEnd) -> Result<Option<String>, ProcessError> {
    let mut state = shared.lock();
    match end_of_move {
        SourceEnd::Stayed => state.moving = None,
        SourceEnd::Pivoted { disks, generation } => {
            state.moving = None;
            state.disks = disks;
            state.generation = generation;
            sync_definition(&mut state);
        }
        SourceEnd::Moved { host, .. } => {
            state.run = RunState::Leaving;
            state.machine = None;
            return Ok(Some(host));
        }
        SourceEnd::Fenced(why) => return Err(ProcessError::Settle(why)),
    }
    Ok(None)
}

/// Reports the guest's end to the main thread. Holds no machine alive that was replaced or moved away.
fn watch(shared: &Arc<Shared>, machine: &Arc<Machine>) {
    let (wake, watched) = (shared.wake.clone(), machine.exit_watch());
    let spawned = thread::Builder::new().name("guest-end".into()).spawn(move || {
        let _ = wake.send(Wake::GuestEnded(watched.wait()));
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "the guest's end will not be noticed");
    }
}

fn end(shared: &Shared, machine: Arc<Machine>) -> Result<Left, ProcessError> {
    shared.lock().machine = None;
    shared.measuring.give_way();
    stop(machine)?;
    Ok(Left::Stopped)
}

/// Pauses the guest, then closes its images cleanly.
fn stop(machine: Arc<Machine>) -> Result<(), ProcessError> {
    machine.pause()?;
    for disk in machine.disks() {
        disk.stop().map_err(crate::machine::Error::Device)?;
    }
    Ok(())
}

fn answer(shared: &Arc<Shared>, request: Request) -> Reply {
    match request {
        Request::Status => Reply::Status(status(shared)),
        Request::MoveStatus => Reply::MoveStatus(shared.board.get().map(Box::new)),
        Request::Stop => {
            let state = shared.lock();
            if let Some(arriving) = &state.arriving {
                let _ = arriving.send(target::Event::Failed("the target was told to stop".into()));
                return Reply::Ok;
            }
            if let Some((id, _)) = &state.moving {
                return Reply::Error(format!("the VM is on the move ({id}): cancel that first"));
            }
            drop(state);
            let _ = shared.wake.send(Wake::Stop);
            Reply::Ok
        }
        Request::PowerButton => {
            let machine = shared.lock().machine.clone();
            match machine {
                Some(machine) if machine.press_power_button() => Reply::Ok,
                _ => Reply::Error("the guest stands still: it is changing hosts, starting or ending".into()),
            }
        }
        Request::Move(order) => match begin_move(shared, *order) {
            Ok(()) => Reply::Ok,
            Err(why) => Reply::Error(why),
        },
        Request::Checkpoint(order) => match checkpoints::begin(shared, *order) {
            Ok(()) => Reply::Ok,
            Err(why) => Reply::Error(why),
        },
        Request::Cancel => {
            let state = shared.lock();
            if let Some((_, events)) = &state.moving {
                let _ = events.send(source::Event::Cancel);
                return Reply::Ok;
            }
            if let Some(arriving) = &state.arriving {
                let _ = arriving.send(target::Event::Failed("cancelled".into()));
                return Reply::Ok;
            }
            Reply::Error("no move is under way".into())
        }
        Request::Verdict { move_id } => match MoveId::new(move_id) {
            Ok(id) => Reply::Verdict(verdict(shared, &id)),
            Err(error) => Reply::Error(error.to_string()),
        },
        Request::Resolve { move_id, verdict } => {
            decide(shared, &move_id, target::Event::Resolved(from_protocol(verdict)))
        }
        Request::TakeOver { move_id } => decide(shared, &move_id, target::Event::TakeOver),
        Request::Measure { millis } => match measure(shared, Duration::from_millis(millis)) {
            Ok(()) => Reply::Ok,
            Err(why) => Reply::Error(why),
        },
        Request::Measured => match shared.measuring.result() {
            Ok(seen) => Reply::Measured(seen.map(Box::new)),
            Err(why) => Reply::Error(why),
        },
        Request::Cleared { move_id } => match cleared(shared, move_id) {
            Ok(()) => Reply::Ok,
            Err(why) => Reply::Error(why),
        },
    }
}

/// Begins to watch the VM for an estimate, unless it is on the move.
fn measure(shared: &Shared, time: Duration) -> Result<(), String> {
    // Held until the watch is known: a move that begins meanwhile has to find it.
    let state = shared.lock();
    if let Some((id, _)) = &state.moving {
        return Err(format!("the VM is on the move ({id})"));
    }
    let Some(machine) = state.machine.clone() else {
        return Err("the VM does not run here".into());
    };
    shared.measuring.begin(machine, &shared.dir, time)
}

fn status(shared: &Shared) -> ProcessStatus {
    let state = shared.lock();
    let undecided = state.undecided.as_ref().is_some_and(|u| u.load(Ordering::SeqCst));
    let incoming = match &state.spec.start {
        Start::Incoming(spec) if state.arriving.is_some() => {
            Some((spec.move_id.clone(), spec.from_host.clone()))
        }
        _ => None,
    };
    ProcessStatus {
        state: if undecided { RunState::Undecided } else { state.run },
        pid: std::process::id(),
        generation: state.generation,
        disks: state.disks.clone(),
        vm: state.spec.vm.clone(),
        listening: state.listening.clone(),
        incoming,
        moving: state.moving.as_ref().map(|(id, _)| id.clone()),
    }
}

fn begin_move(shared: &Arc<Shared>, order: MoveOrder) -> Result<(), String> {
    let mut state = shared.lock();
    if let Some((id, _)) = &state.moving {
        return Err(format!("the VM is on the move already ({id})"));
    }
    let Some(machine) = state.machine.clone() else {
        return Err("the VM does not run here".into());
    };
    MoveId::new(&order.move_id).map_err(|e| e.to_string())?;
    let moves = order.target.is_some();
    let copied = |name: &str| order.copies.iter().any(|copy| copy.name == name);
    if let Some(disk) = state.disks.iter().find(|disk| moves && !copied(&disk.name)) {
        return Err(format!("disk {} has no place on {}", disk.name, order.to.host));
    }
    let mut shapes = Vec::new();
    for copy in &order.copies {
        let place = state.disks.iter().find(|place| place.name == copy.name);
        let definition = state.spec.vm.disks.iter().find(|disk| disk.name == copy.name);
        let (Some(place), Some(definition)) = (place, definition) else {
            return Err(format!("the VM has no disk {}", copy.name));
        };
        shapes.push(shape(definition, &place.path)?);
    }
    if shapes.is_empty() && !moves {
        return Err("nothing is to be moved: the disks are there already".into());
    }
    end_dangling(shared)?;
    shared.measuring.give_way();
    let (sender, inbox) = mpsc::channel();
    let task = SourceMove {
        machine,
        console: shared.console.clone(),
        journal: Arc::clone(&shared.journal),
        vm: state.spec.vm.clone(),
        generation: state.generation,
        disks: state.disks.clone(),
        shapes,
        identity: state.spec.identity.clone(),
        board: Arc::clone(&shared.board),
        events: (sender.clone(), inbox),
        order,
    };
    state.moving = Some((task.order.move_id.clone(), sender));
    // So that a question right after the answer finds the new move.
    shared.board.begin(&task.order.move_id);
    let wake = shared.wake.clone();
    let spawned = thread::Builder::new().name("move".into()).spawn(move || {
        // A defect in the move must not leave the guest paused with nobody to end the process; the journal says who owns the VM.
        let ended = catch_unwind(AssertUnwindSafe(|| task.run()))
            .unwrap_or_else(|_| SourceEnd::Fenced("the move's thread has panicked".into()));
        let _ = wake.send(Wake::MoveEnded(ended));
    });
    spawned.map(|_| ()).map_err(|e| {
        state.moving = None;
        format!("cannot start a thread: {e}")
    })
}

/// Structure of a disk's image.
fn shape(disk: &DiskDefinition, path: &Path) -> Result<ImageShape, String> {
    let info = vmove_storage::info(path).map_err(|e| e.to_string())?;
    Ok(ImageShape {
        name: disk.name.clone(),
        format: disk.format,
        virtual_bytes: info.virtual_bytes,
        cluster_bytes: info.cluster_bytes.unwrap_or(0),
        allocated_bytes: info.allocated_bytes,
    })
}

/// A move whose end could not be journalled is over all the same; nobody runs it. Its record is made up for.
fn end_dangling(shared: &Shared) -> Result<(), String> {
    let mut journal = shared.journal();
    let Standing::Moving { move_id, .. } = journal.standing().clone() else { return Ok(()) };
    journal
        .append(&Record::Aborted { move_id })
        .map_err(|e| format!("an earlier move cannot be ended in the journal: {e}"))
}

/// The source's word on a move. A target only asks when it cannot hear us: a move that has not committed is given up, and the
/// answer is "aborted" only once that is on disk.
fn verdict(shared: &Shared, id: &MoveId) -> Verdict {
    let answer = match shared.journal().fold().verdict(id) {
        journal::Verdict::Committed => Verdict::Committed,
        journal::Verdict::Aborted => Verdict::Aborted,
        journal::Verdict::Moving => Verdict::Moving,
        journal::Verdict::Unknown => Verdict::Unknown,
    };
    if answer == Verdict::Moving {
        let state = shared.lock();
        match &state.moving {
            Some((_, events)) => {
                let _ = events.send(source::Event::Failed("the target has asked how it ended".into()));
            }
            None if end_dangling(shared).is_ok() => return Verdict::Aborted,
            None => {}
        }
    }
    answer
}

fn from_protocol(verdict: Verdict) -> journal::Verdict {
    match verdict {
        Verdict::Committed => journal::Verdict::Committed,
        Verdict::Aborted => journal::Verdict::Aborted,
        Verdict::Moving => journal::Verdict::Moving,
        Verdict::Unknown => journal::Verdict::Unknown,
    }
}

/// Notes that the target of an aborted move can never run the VM.
fn cleared(shared: &Shared, move_id: String) -> Result<(), String> {
    let move_id = MoveId::new(move_id).map_err(|e| e.to_string())?;
    let mut journal = shared.journal();
    if journal.fold().open_ends().iter().all(|end| end.move_id != move_id) {
        return Ok(());
    }
    journal.append(&Record::Cleared { move_id }).map_err(|e| e.to_string())
}

/// Hands the arrival what ends its wait for the source.
fn decide(shared: &Shared, move_id: &str, event: target::Event) -> Reply {
    let state = shared.lock();
    let arriving = match (&state.spec.start, &state.arriving) {
        (Start::Incoming(spec), Some(arriving)) if spec.move_id == move_id => arriving,
        _ => return Reply::Error(format!("move {move_id} is not waiting for a decision here")),
    };
    let _ = arriving.send(event);
    Reply::Ok
}
