//! A target that stops answering without closing its connections: the guest goes on at the source, its writes to disk included.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmove::api::types::MoveProgress;
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

#[test]
fn a_target_that_hangs_is_given_up() {
    if !kvm::usable("a_target_that_hangs_is_given_up") {
        return;
    }
    let point = "source.send-pages";
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    let console = cluster.boot("a", &Spec::default());
    let id = cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    let target = Pid::from_raw(cluster.vm_process("b", VM).unwrap() as i32);
    kill(target, Signal::SIGSTOP).unwrap();
    cluster.stops.release(point);
    let progress: MoveProgress = until("the end of the move", || {
        let progress: MoveProgress = cluster.vmove("a", &["status", &id, "--json"]).json();
        progress.report.is_some().then_some(progress)
    });
    assert_eq!(progress.report.unwrap().outcome, "aborted");
    let why = progress.error.unwrap();
    assert!(why.contains("has not answered"), "{why}");
    // The check reads every block, behind all writes that were waiting.
    console.goes_on();
    console.check();

    kill(target, Signal::SIGCONT).unwrap();
    cluster.until_clean("b");
    cluster.relocate("a", &["--host", "b"]);
    cluster.console("b").check();
    cluster.stop_clean("b");
}
