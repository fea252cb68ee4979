//! A target that stops answering without closing its connections: the guest goes on at the source, its writes to disk included, and
//! the move goes on if the target comes back.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmove::api::types::MoveProgress;
use vmove_tests::cluster::Cluster;
use vmove_tests::console::Console;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
const POINT: &str = "source.send-pages";

/// Stops the target's process in pre-copy and waits until the source has noticed.
fn hang() -> (Cluster, Console, String, Pid) {
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[POINT]);
    let console = cluster.boot("a", &Spec::default());
    let id = cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(POINT);
    let target = Pid::from_raw(cluster.vm_process("b", VM).unwrap() as i32);
    kill(target, Signal::SIGSTOP).unwrap();
    cluster.stops.release(POINT);
    until("the silence being noticed", || (status(&cluster, &id).phase == "reconnecting").then_some(()));
    // The check reads every block, behind all writes that were waiting.
    console.goes_on();
    console.check();
    (cluster, console, id, target)
}

fn status(cluster: &Cluster, id: &str) -> MoveProgress {
    cluster.vmove("a", &["status", id, "--json"]).json()
}

fn ended(cluster: &Cluster, id: &str) -> MoveProgress {
    until("the end of the move", || {
        let progress = status(cluster, id);
        progress.report.is_some().then_some(progress)
    })
}

#[test]
fn a_target_that_hangs_is_given_up() {
    if !kvm::usable("a_target_that_hangs_is_given_up") {
        return;
    }
    let (cluster, console, id, target) = hang();
    let progress = ended(&cluster, &id);
    assert_eq!(progress.report.unwrap().outcome, "aborted");
    let why = progress.error.unwrap();
    assert!(why.contains("has not answered") && why.contains("could not be made again"), "{why}");
    console.goes_on();
    console.check();

    kill(target, Signal::SIGCONT).unwrap();
    cluster.until_clean("b");
    cluster.relocate("a", &["--host", "b"]);
    cluster.console("b").check();
    cluster.stop_clean("b");
}

#[test]
fn a_target_that_comes_back_is_gone_on_with() {
    if !kvm::usable("a_target_that_comes_back_is_gone_on_with") {
        return;
    }
    let (cluster, before, id, target) = hang();
    // Ten a second: longer than an answer may be owed, so that what was owed on the old connections must not count on the new ones.
    let last = before.heartbeat_after(before.heartbeats().last().unwrap().seq + 220).seq;
    kill(target, Signal::SIGCONT).unwrap();
    let report = ended(&cluster, &id).report.unwrap();
    assert_eq!((report.outcome.as_str(), report.verified), ("completed", true), "{report:?}");
    assert!(report.reconnects > 0);
    let console = cluster.console("b");
    console.heartbeat_after(last);
    assert_eq!(console.run(), before.run(), "started again");
    console.check();
    cluster.stop_clean("b");
}
