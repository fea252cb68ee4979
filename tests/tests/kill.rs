//! Every process of a move is killed, well before the commit and just after it: never two runners, never nobody who may run, nothing
//! flushed is lost, and the same move works afterwards.
//!
//! The failure table is in `vmove_mirror::recovery` and `vmove_mirror::journal`; here real processes go through it.

use vmove::api::types::{MoveProgress, VmState};
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::processes::kill_hard;
use vmove_tests::runners::Watch;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    SourceVm,
    TargetVm,
    SourceAgent,
    TargetAgent,
}

/// What must come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The guest goes on at the source as if nothing had been.
    StaysRunning,
    /// The guest is gone as in any crash; it can be started again at the source.
    Startable,
    /// The guest goes on at the target as if nothing had been.
    MovesOn,
    /// The target's agent starts it again from its disks.
    ColdBoot,
}

/// Holds a move from a to b at `point`, kills the victim there, lets the rest go on, and sees what comes of it.
fn kill(test: &str, point: &str, victim: Victim, outcome: Outcome) {
    if !kvm::usable(test) {
        return;
    }
    let mut cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    let before = cluster.boot("a", &Spec::default());
    let watch = Watch::start(&cluster, VM);
    let id = cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    let flushed = before.surely_flushed();
    assert!(flushed > 0);
    let last = before.heartbeats().last().unwrap().seq;

    match victim {
        Victim::SourceVm => kill_hard(cluster.vm_process("a", VM).unwrap()),
        Victim::TargetVm => kill_hard(cluster.vm_process("b", VM).unwrap()),
        Victim::SourceAgent => cluster.kill_agent("a"),
        Victim::TargetAgent => cluster.kill_agent("b"),
    }
    // Before the commit the new agent finds the move under way; after it, only what has become of it.
    let agent = match victim {
        Victim::SourceAgent => Some("a"),
        Victim::TargetAgent => Some("b"),
        Victim::SourceVm | Victim::TargetVm => None,
    };
    let early = point == "source.send-pages";
    if let (Some(host), true) = (agent, early) {
        cluster.restart_agent(host);
    }
    cluster.stops.release(point);
    if let (Some(host), false) = (agent, early) {
        // Whoever is left finishes the move alone.
        until("the VM running at b", || {
            let status = vmove_tests::runners::status(&cluster.host("b").vm_dir(VM))?;
            (status.state == vmove_compute::process::protocol::RunState::Running).then_some(())
        });
        cluster.restart_agent(host);
    }

    let (owner, other) = match outcome {
        Outcome::StaysRunning | Outcome::Startable => ("a", "b"),
        Outcome::MovesOn | Outcome::ColdBoot => ("b", "a"),
    };
    match outcome {
        Outcome::StaysRunning | Outcome::MovesOn => {}
        Outcome::Startable => {
            cluster.until_state("a", VmState::Stopped);
            cluster.start_again("a");
        }
        Outcome::ColdBoot => {}
    }
    cluster.until_state(owner, VmState::Running);
    let console = cluster.console(owner);
    match outcome {
        Outcome::StaysRunning | Outcome::MovesOn => {
            console.heartbeat_after(last);
            assert_eq!(console.run(), before.run(), "started again");
        }
        Outcome::Startable | Outcome::ColdBoot => {
            let recovered = console.recovered();
            assert!(recovered >= flushed, "flushed up to {flushed}, found {recovered}");
        }
    }
    console.goes_on();
    console.check();
    cluster.until_clean(other);
    if outcome == Outcome::MovesOn && victim != Victim::SourceVm {
        let progress: MoveProgress = cluster.vmove("a", &["status", &id, "--json"]).json();
        assert_eq!(progress.report.unwrap().outcome, "completed");
    }

    // Again, with nothing cleaned up by hand.
    let last = console.heartbeats().last().unwrap().seq;
    cluster.relocate(owner, &["--host", other]);
    let console = cluster.console(other);
    console.heartbeat_after(last);
    console.check();
    watch.finish();
    cluster.until_clean(owner);
    cluster.stop_clean(other);
}

macro_rules! kills {
    ($($name:ident: $victim:ident at $point:literal -> $outcome:ident;)*) => {
        $(#[test]
        fn $name() {
            kill(stringify!($name), $point, Victim::$victim, Outcome::$outcome);
        })*
    };
}

kills! {
    // Pages are being sent, the guest runs.
    source_process_dies_in_pre_copy: SourceVm at "source.send-pages" -> Startable;
    target_process_dies_in_pre_copy: TargetVm at "source.send-pages" -> StaysRunning;
    source_agent_dies_in_pre_copy: SourceAgent at "source.send-pages" -> MovesOn;
    target_agent_dies_in_pre_copy: TargetAgent at "source.send-pages" -> MovesOn;
    // The guest is paused, nothing is committed.
    source_process_dies_in_the_pause: SourceVm at "source.drain-disks" -> Startable;
    target_process_dies_in_the_pause: TargetVm at "source.drain-disks" -> StaysRunning;
    // The target is prepared and has said so, the source is about to commit.
    source_process_dies_before_the_commit: SourceVm at "source.journal-committed" -> Startable;
    // The commit is on the source's disk, the target has not heard of it.
    source_process_dies_after_the_commit: SourceVm at "source.tell-commit" -> MovesOn;
    target_process_dies_after_the_commit: TargetVm at "source.tell-commit" -> ColdBoot;
    source_agent_dies_after_the_commit: SourceAgent at "source.tell-commit" -> MovesOn;
    target_agent_dies_after_the_commit: TargetAgent at "source.tell-commit" -> MovesOn;
    // The target owns the VM and is about to let it run.
    source_process_dies_before_the_resume: SourceVm at "target.run" -> MovesOn;
    target_process_dies_before_the_resume: TargetVm at "target.run" -> ColdBoot;
    source_agent_dies_before_the_resume: SourceAgent at "target.run" -> MovesOn;
    target_agent_dies_before_the_resume: TargetAgent at "target.run" -> MovesOn;
}

#[test]
fn both_processes_die_before_the_commit() {
    let test = "both_processes_die_before_the_commit";
    if !kvm::usable(test) {
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
