//! Every process of a move is killed, and its link cut, at every named point: never two runners, never nobody who may run, nothing
//! flushed is lost, RAM and disk in order, and the next move works with nothing cleaned up by hand.
//!
//! The failure table is in `vmove_mirror::recovery` and `docs/recovery.md`; here real processes go through it, and each case says
//! beforehand what must come of it. Clusters are used again from case to case: what a case leaves behind is the next one's trouble.
//! The table of cases is printed; `VMOVE_HANDOVER=<words>` runs those whose line holds all the words.

mod cases;
mod world;

use std::fmt::Write as _;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use vmove::api::types::VmState;
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::processes::kill_hard;

use cases::Case;
use world::World;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
/// Clusters at work at once: cases mostly wait.
const LANES: usize = 4;

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
    assert!(cases::points_without_a_case().is_empty(), "{:?}", cases::points_without_a_case());
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
    let mut text = String::from("\nmove        held at                    what is dealt  what comes of it\n");
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
