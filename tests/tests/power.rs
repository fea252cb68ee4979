//! The power button: a guest that obeys it, one that does not, and one that is on the move.

use std::thread;

use vmove::api::types::VmState;
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::{images, kvm};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

#[test]
fn a_guest_that_obeys_the_button_is_stopped_in_peace() {
    if !kvm::usable("a_guest_that_obeys_the_button_is_stopped_in_peace") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &[]);
    let console = cluster.boot("a", &Spec::default());
    cluster.vmove("a", &["stop", VM]).ok();
    let vm = cluster.until_state("a", VmState::Stopped);
    console
        .wait("line that says off", |lines| lines.iter().any(|line| line.starts_with("off ")).then_some(()));
    images::assert_clean(&vm.summary.disks[0].path);
    cluster.vmove("a", &["stop", VM]).refused(1, &["stopped"]);
    cluster.vmove("a", &["start", VM]).ok();
    cluster.console("a").recovered();
}

#[test]
fn a_guest_that_ignores_the_button_runs_on_until_it_is_ended() {
    if !kvm::usable("a_guest_that_ignores_the_button_runs_on_until_it_is_ended") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &[]);
    let words = format!("{} vmove.power_button=0", Spec::default().words);
    let console = cluster.boot("a", &Spec { words, ..Spec::default() });
    cluster.vmove("a", &["stop", VM, "--timeout", "500ms"]).refused(1, &["power button", "runs on", "--now"]);
    cluster.until_state("a", VmState::Running);
    console.goes_on();
    cluster.vmove("a", &["stop", VM, "--now"]).ok();
    cluster.until_state("a", VmState::Stopped);
}

#[test]
fn a_button_pressed_while_the_guest_changes_hosts_is_not_lost() {
    if !kvm::usable("a_button_pressed_while_the_guest_changes_hosts_is_not_lost") {
        return;
    }
    // The guest is paused, its state saved and sent.
    let point = "source.tell-prepare";
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    cluster.boot("a", &Spec::default());
    cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    cluster.vmove("a", &["stop", VM, "--timeout", "200ms"]).refused(1, &["stands still"]);
    thread::scope(|scope| {
        let stop = scope.spawn(|| cluster.vmove("a", &["stop", VM]));
        cluster.stops.release(point);
        stop.join().unwrap().ok();
    });
    let vm = cluster.until_state("b", VmState::Stopped);
    images::assert_clean(&vm.summary.disks[0].path);
}
