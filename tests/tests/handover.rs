//! Every process of a move is killed, and its link cut, at every named point: never two runners, never nobody who may run, nothing
//! flushed is lost, RAM and disk in order, and the next move works with nothing cleaned up by hand.
//!
//! The failure table is in `vmove_mirror::recovery` and `docs/recovery.md`; here real processes go through it, and each case says
//! beforehand what must come of it. Clusters are used again from case to case: what a case leaves behind is the next one's trouble.
//! The table of cases is printed; `VMOVE_HANDOVER=<words>` runs those whose line holds all the words.

use std::fmt::Write as _;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use vmove::api::types::{MoveProgress, VmState};
use vmove_compute::process::protocol::{Reply, Request, RunState};
use vmove_storage::{OwnerState, Stamp};
use vmove_tests::cluster::{Cluster, DATASTORES};
use vmove_tests::console::Console;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::processes::kill_hard;
use vmove_tests::runners::{self, Watch};
use vmove_tests::wait::until;
use vmove_tests::{images, kvm};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
/// Clusters at work at once: cases mostly wait.
const LANES: usize = 3;

/// How far a move has come when it is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// The guest runs at the source.
    Copying,
    /// It is paused; nothing is decided.
    Paused,
    /// The target is prepared; only the source's word is missing.
    Prepared,
    /// The source has committed; the guest does not run yet.
    Committed,
    /// The guest runs at the target, whose images are not stamped as its own yet.
    Resumed,
    /// The target's part is done.
    Ended,
}

/// The points of a move to another host, in the order in which it meets them.
const POINTS: &[(&str, Stage)] = &[
    ("target.journal-incoming", Stage::Copying),
    ("target.make-images", Stage::Copying),
    ("source.journal-moving", Stage::Copying),
    ("source.connect", Stage::Copying),
    ("source.tell-setup", Stage::Copying),
    ("target.tell-ready", Stage::Copying),
    ("source.start-mirrors", Stage::Copying),
    ("source.start-logging", Stage::Copying),
    ("source.send-pages", Stage::Copying),
    ("source.end-round", Stage::Copying),
    ("source.collect-dirty", Stage::Copying),
    ("source.pause", Stage::Copying),
    ("source.drain-disks", Stage::Paused),
    ("source.save-state", Stage::Paused),
    ("source.tell-state", Stage::Paused),
    ("source.prove", Stage::Paused),
    ("target.load-state", Stage::Paused),
    ("source.tell-prepare", Stage::Paused),
    ("target.prove", Stage::Paused),
    ("target.journal-prepared", Stage::Paused),
    ("target.tell-prepared", Stage::Prepared),
    ("source.journal-committed", Stage::Prepared),
    ("source.tell-commit", Stage::Committed),
    ("target.journal-owner", Stage::Committed),
    ("target.run", Stage::Committed),
    ("target.tell-running", Stage::Resumed),
    ("target.finish", Stage::Resumed),
    ("source.journal-released", Stage::Ended),
    ("source.retire", Stage::Ended),
    ("source.finish-committed", Stage::Ended),
];

/// The points of giving a move up, when it is cancelled in the pause.
const CANCELLED_POINTS: &[&str] = &[
    "source.tell-abort",
    "source.journal-aborted",
    "source.drop-mirrors",
    "source.stop-logging",
    "source.resume",
    "source.finish",
    "target.journal-aborted",
    "target.discard",
    "target.finish",
];

/// The points of a move to another datastore, and whether it is committed there.
const DATASTORE_POINTS: &[(&str, bool)] = &[
    ("source.journal-moving", false),
    ("source.connect", false),
    ("source.tell-setup", false),
    ("source.start-mirrors", false),
    ("source.pause", false),
    ("source.drain-disks", false),
    ("source.prove", false),
    ("source.tell-prepare", false),
    ("source.journal-owner", false),
    ("source.pivot", true),
    ("source.retire", true),
    ("source.finish-committed", true),
];

/// What is done to a move that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    SourceVm,
    TargetVm,
    SourceAgent,
    TargetAgent,
}

const BLOWS: [Blow; 4] = [Blow::SourceVm, Blow::TargetVm, Blow::SourceAgent, Blow::TargetAgent];

/// What must come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The guest goes on at the source as if nothing had been.
    StaysRunning,
    /// The guest is gone as in any crash; it can be started again at the source.
    StartableHere,
    /// The guest goes on at the target as if nothing had been.
    MovesOn,
    /// The target's agent starts it again from its disks.
    BootsThere,
    /// It ran at the target and is gone as in any crash; it can be started again there.
    StartableThere,
}

/// Which move is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Host(Stage),
    /// One that is cancelled in the pause.
    Cancelled,
    /// To another datastore: whether it is committed at the point.
    Datastore(bool),
}

#[derive(Debug, Clone, Copy)]
struct Case {
    kind: Kind,
    point: &'static str,
    blow: Blow,
}

impl Case {
    fn all() -> Vec<Self> {
        let host = POINTS.iter().map(|(point, stage)| (Kind::Host(*stage), *point));
        let cancelled = CANCELLED_POINTS.iter().map(|point| (Kind::Cancelled, *point));
        let datastore = DATASTORE_POINTS.iter().map(|(point, done)| (Kind::Datastore(*done), *point));
        let points = host.chain(cancelled).chain(datastore);
        points
            .flat_map(|(kind, point)| BLOWS.map(|blow| Self { kind, point, blow }))
            // A move to another datastore has no second host.
            .filter(|case| {
                !matches!(case.kind, Kind::Datastore(_))
                    || matches!(case.blow, Blow::SourceVm | Blow::SourceAgent)
            })
            .collect()
    }

    fn expected(self) -> Outcome {
        match (self.kind, self.blow) {
            // It has heard that the target is prepared: from there it commits, whatever becomes of the target.
            (Kind::Host(_), Blow::TargetVm) if self.point == "source.journal-committed" => {
                Outcome::BootsThere
            }
            (Kind::Host(stage), Blow::SourceVm) if stage < Stage::Committed => Outcome::StartableHere,
            (Kind::Host(stage), Blow::TargetVm) if stage < Stage::Committed => Outcome::StaysRunning,
            (Kind::Host(Stage::Ended), Blow::TargetVm) => Outcome::StartableThere,
            (Kind::Host(_), Blow::TargetVm) => Outcome::BootsThere,
            (Kind::Host(_), Blow::SourceVm | Blow::SourceAgent | Blow::TargetAgent) => Outcome::MovesOn,
            (Kind::Cancelled | Kind::Datastore(false), Blow::SourceVm) => Outcome::StartableHere,
            (Kind::Cancelled, _) => Outcome::StaysRunning,
            (Kind::Datastore(true), Blow::SourceVm) => Outcome::StartableThere,
            (Kind::Datastore(_), _) => Outcome::MovesOn,
        }
    }

    fn line(self) -> String {
        let kind = match self.kind {
            Kind::Host(_) => "host",
            Kind::Cancelled => "cancelled",
            Kind::Datastore(_) => "datastore",
        };
        format!("{kind:<9}  {:<24}  {:<11}", self.point, format!("{:?}", self.blow))
    }
}

/// A pair of hosts with one VM, between two cases.
struct World {
    cluster: Cluster,
    console: Console,
    watch: Watch,
    /// The host that has the VM.
    at: &'static str,
    /// The datastore its disk lies in.
    store: &'static str,
}

impl World {
    fn new() -> Self {
        let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
        let spec = Spec {
            memory_mib: 32,
            disk_mib: 32,
            words: "vmove.fill_mib=4 vmove.ram_mib=4 vmove.ram_rate=500 vmove.disk_mib=4 vmove.disk_rate=200 vmove.flush_ms=40 \
                    vmove.heartbeat_ms=40"
                .to_owned(),
            ..Spec::default()
        };
        let console = cluster.boot("a", &spec);
        let watch = Watch::start(&cluster, VM);
        Self { cluster, console, watch, at: "a", store: DATASTORES[0] }
    }

    fn other_host(&self) -> &'static str {
        if self.at == "a" { "b" } else { "a" }
    }

    fn other_store(&self) -> &'static str {
        if self.store == DATASTORES[0] { DATASTORES[1] } else { DATASTORES[0] }
    }

    /// Deals one blow, and sees that what must come of it comes.
    fn suffer(mut self, case: Case) -> Self {
        let (source, target, point) = (self.at, self.other_host(), case.point);
        let store = if matches!(case.kind, Kind::Datastore(_)) { self.other_store() } else { self.store };
        let id = self.hold(case, target, store);
        let flushed = self.console.surely_flushed();
        assert!(flushed > 0, "nothing flushed yet");
        let last = self.console.heartbeats().last().unwrap().seq;
        match case.blow {
            Blow::SourceVm => kill_hard(self.cluster.vm_process(source, VM).unwrap()),
            Blow::TargetVm => {
                if case.kind == Kind::Host(Stage::Ended) {
                    self.until_owned(target);
                }
                // Given up already, it may have ended by itself.
                if let Some(pid) = self.cluster.vm_process(target, VM) {
                    kill_hard(pid);
                }
            }
            Blow::SourceAgent | Blow::TargetAgent => {
                let host = if case.blow == Blow::SourceAgent { source } else { target };
                self.cluster.kill_agent(host);
                let decided = matches!(case.kind, Kind::Host(stage) if stage >= Stage::Committed)
                    || case.kind == Kind::Datastore(true);
                // Before the commit the new agent finds the move under way; after it, only what has become of it.
                if decided {
                    self.cluster.stops.release(point);
                    self.until_runs(if matches!(case.kind, Kind::Host(_)) { target } else { source });
                }
                self.cluster.restart_agent(host);
            }
        }
        self.cluster.stops.release_all();
        self.see(case, target, store, last, flushed);
        if case.expected() == Outcome::MovesOn && case.blow != Blow::SourceVm {
            let progress: MoveProgress = self.cluster.vmove(source, &["status", &id, "--json"]).json();
            assert_eq!(progress.report.unwrap().outcome, "completed");
        }
        self.again(case, target, store)
    }

    /// Begins the move and waits until it stands at the point.
    fn hold(&self, case: Case, target: &str, store: &str) -> String {
        let stops = &self.cluster.stops;
        let words = match case.kind {
            Kind::Datastore(_) => ["--datastore", store],
            Kind::Host(_) | Kind::Cancelled => ["--host", target],
        };
        let first = if case.kind == Kind::Cancelled { "source.drain-disks" } else { case.point };
        stops.hold(first);
        let id = self.cluster.begin_move(self.at, &words);
        stops.reached(first);
        if case.kind == Kind::Cancelled {
            stops.hold(case.point);
            let told = runners::ask(&self.cluster.host(self.at).vm_dir(VM), &Request::Cancel);
            assert_eq!(told, Some(Reply::Ok));
            stops.release(first);
            stops.reached(case.point);
        }
        id
    }

    fn until_owned(&self, host: &str) {
        let image = self.cluster.image(host, self.store);
        until("the image being stamped as the target's own", || {
            let stamp = Stamp::read(&image).ok()??;
            (stamp.state == OwnerState::Owned).then_some(())
        });
    }

    fn until_runs(&self, host: &str) {
        until("the VM running", || {
            let status = runners::status(&self.cluster.host(host).vm_dir(VM))?;
            (status.state == RunState::Running && status.moving.is_none()).then_some(())
        });
    }

    /// Waits for the outcome; the guest runs then, and what it has is in order.
    fn see(&mut self, case: Case, target: &'static str, store: &'static str, last: u64, flushed: u64) {
        let expected = case.expected();
        match expected {
            Outcome::StaysRunning | Outcome::StartableHere => {}
            Outcome::MovesOn | Outcome::BootsThere | Outcome::StartableThere => {
                self.store = store;
                if matches!(case.kind, Kind::Host(_)) {
                    self.at = target;
                }
            }
        }
        if matches!(expected, Outcome::StartableHere | Outcome::StartableThere) {
            self.cluster.until_state(self.at, VmState::Stopped);
            self.cluster.start_again(self.at);
        }
        let there = self.cluster.until_state(self.at, VmState::Running);
        assert_eq!(there.summary.disks[0].datastore, self.store);
        let before = std::mem::replace(&mut self.console, self.cluster.console(self.at));
        match expected {
            Outcome::StaysRunning | Outcome::MovesOn => {
                self.console.heartbeat_after(last);
                assert_eq!(self.console.run(), before.run(), "started again");
            }
            Outcome::StartableHere | Outcome::BootsThere | Outcome::StartableThere => {
                let recovered = self.console.recovered();
                assert!(recovered >= flushed, "flushed up to {flushed}, found {recovered}");
            }
        }
        self.console.goes_on();
        self.console.check();
        self.cluster.until_clean(self.other_host());
        let elsewhere = self.cluster.host(self.at).datastore(self.other_store());
        until("nothing being left in the other datastore", || {
            images::files_below(&elsewhere).is_empty().then_some(())
        });
    }

    /// The same move again where it did not come about, with nothing cleaned up by hand.
    fn again(mut self, case: Case, target: &'static str, store: &'static str) -> Self {
        let words = match (case.expected(), case.kind) {
            (Outcome::MovesOn | Outcome::BootsThere | Outcome::StartableThere, _) => return self,
            (_, Kind::Datastore(_)) => ["--datastore", store],
            (_, Kind::Host(_) | Kind::Cancelled) => ["--host", target],
        };
        let last = self.console.heartbeats().last().unwrap().seq;
        self.cluster.relocate(self.at, &words);
        if !matches!(case.kind, Kind::Datastore(_)) {
            self.at = target;
            self.console = self.cluster.console(target);
        }
        self.store = store;
        self.console.heartbeat_after(last);
        self.console.check();
        self
    }

    /// One last move, and an image that QEMU finds in order.
    fn end(self) {
        let target = self.other_host();
        self.cluster.relocate(self.at, &["--host", target]);
        self.cluster.console(target).check();
        self.watch.finish();
        self.cluster.until_clean(self.at);
        self.cluster.stop_clean(target);
    }
}

struct Row {
    index: usize,
    line: String,
    failed: bool,
}

/// Takes cases from the front until there are none.
fn lane(cases: &Mutex<std::vec::IntoIter<(usize, Case)>>, rows: &Mutex<Vec<Row>>) {
    let mut world = None;
    let next = || cases.lock().unwrap().next();
    while let Some((index, case)) = next() {
        let began = Instant::now();
        let before = world.take();
        let result = catch_unwind(AssertUnwindSafe(|| before.unwrap_or_else(World::new).suffer(case)));
        let took = began.elapsed();
        let said = match result {
            Ok(after) => {
                world = Some(after);
                format!("{:?}", case.expected())
            }
            Err(_) => format!("FAILED: {:?} was to come of it", case.expected()),
        };
        let line = format!("{}  {said:<15}  {:>6} ms", case.line(), took.as_millis());
        rows.lock().unwrap().push(Row { index, line, failed: world.is_none() });
    }
    if let Some(world) = world {
        world.end();
    }
}

#[test]
fn every_blow_at_every_point() {
    if !kvm::usable("every_blow_at_every_point") {
        return;
    }
    let wanted = std::env::var("VMOVE_HANDOVER").unwrap_or_default();
    let wanted: Vec<&str> = wanted.split_whitespace().collect();
    let cases: Vec<(usize, Case)> = Case::all()
        .into_iter()
        .enumerate()
        .filter(|(_, case)| wanted.iter().all(|word| case.line().contains(word)))
        .collect();
    let total = cases.len();
    let began = Instant::now();
    let (queue, rows) = (Mutex::new(cases.into_iter()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(|| lane(&queue, &rows))).collect();
        for lane in lanes {
            lane.join().expect("a lane's last move failed");
        }
    });
    let mut rows = rows.into_inner().unwrap();
    rows.sort_unstable_by_key(|row| row.index);
    let failed = rows.iter().filter(|row| row.failed).count();
    print(&rows, total, failed, began.elapsed());
    assert_eq!(rows.len(), total);
    assert_eq!(failed, 0, "of {total} cases");
}

/// Past the test runner, which keeps what succeeds to itself.
fn print(rows: &[Row], total: usize, failed: usize, took: Duration) {
    let mut text = String::from("\nmove       held at                   what is dealt  what comes of it\n");
    for row in rows {
        let _ = writeln!(text, "{}", row.line);
    }
    let _ = writeln!(text, "handover: {total} cases, {failed} failed, {} s", took.as_secs());
    let mut out = std::io::stdout().lock();
    // A closed output hides the table, not its result.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[test]
fn both_processes_die_before_the_commit() {
    if !kvm::usable("both_processes_die_before_the_commit") {
        return;
    }
    let point = "source.journal-committed";
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    let before = cluster.boot("a", &Spec::default());
    cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    let flushed = before.surely_flushed();
    // The target first: it is prepared, and only the source's word decides on what is left of it.
    kill_hard(cluster.vm_process("b", VM).unwrap());
    kill_hard(cluster.vm_process("a", VM).unwrap());
    cluster.stops.release(point);
    cluster.until_state("a", VmState::Stopped);
    cluster.until_clean("b");
    cluster.start_again("a");
    let console = cluster.console("a");
    assert!(console.recovered() >= flushed);
    cluster.relocate("a", &["--host", "b"]);
    cluster.console("b").check();
}
