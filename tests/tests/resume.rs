//! Links between the two hosts that drop, fall silent or damage what they carry: before the pause the move goes on from what had
//! arrived; whatever happens, the guest does, and nothing wrong is ever committed.

use vmove::api::types::{MoveProgress, MoveReport, VmState};
use vmove_mirror::wire::hello::{Hello, Role};
use vmove_tests::cluster::Cluster;
use vmove_tests::console::Console;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::processes::kill_hard;
use vmove_tests::relay::Relay;
use vmove_tests::runners::Watch;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
const MIB: u64 = 1 << 20;
/// More than a lost connection can hold, by its sockets' buffers here and in the relay.
const IN_FLIGHT: u64 = 24 * MIB;
/// Slow enough that there is time to cut.
const PACE: &str = "--bandwidth=60MiB/s";

/// A guest with much to copy and a light load.
fn spec() -> Spec {
    Spec {
        memory_mib: 192,
        disk_mib: 256,
        words: "vmove.fill_mib=128 vmove.ram_mib=8 vmove.ram_rate=100 vmove.disk_mib=96 vmove.disk_rate=50 vmove.flush_ms=100 \
                vmove.heartbeat_ms=100"
            .to_owned(),
        ..Spec::default()
    }
}

fn progress(cluster: &Cluster, id: &str) -> MoveProgress {
    cluster.vmove("a", &["status", id, "--json"]).json()
}

fn report(cluster: &Cluster, id: &str) -> MoveReport {
    until("the end of the move", || progress(cluster, id).report)
}

/// Waits until so many more bytes have gone to the target, the move being in a phase then.
fn under_way(cluster: &Cluster, id: &str, phase: &str, bytes: u64) {
    until(phase, || (progress(cluster, id).phase == phase).then_some(()));
    let from = cluster.relay().passed();
    until("some more bytes", || (cluster.relay().passed() >= from + bytes).then_some(()));
    let now = progress(cluster, id);
    assert_eq!(now.phase, phase, "the move was too quick for the test: {now:?}");
}

/// Bytes of pages and blocks.
fn sent(report: &MoveReport) -> u64 {
    report.memory.sent_bytes + report.disks.iter().map(|d| d.copied_bytes + d.mirrored_bytes).sum::<u64>()
}

/// Moves a VM from a to b with cuts, and back without; the move with cuts must not have sent much more.
fn cut(test: &str, cuts: &[(&str, u64)]) {
    if !kvm::usable(test) {
        return;
    }
    let cluster = Cluster::start_with_relay(PROGRAM, &["a", "b"], &[]);
    let before = cluster.boot("a", &spec());
    let watch = Watch::start(&cluster, VM);
    let last = before.heartbeats().last().unwrap().seq;
    let id = cluster.begin_move("a", &["--host", "b", "--audit", PACE]);
    for (phase, bytes) in cuts {
        under_way(&cluster, &id, phase, *bytes);
        cluster.relay().cut();
    }
    let resumed = report(&cluster, &id);
    assert_eq!((resumed.outcome.as_str(), resumed.verified), ("completed", true), "{resumed:?}");
    assert_eq!(resumed.reconnects as usize, cuts.len());
    cluster.until_state("b", VmState::Running);
    let console = cluster.console("b");
    console.heartbeat_after(last);
    assert_eq!(console.run(), before.run(), "started again");
    console.check();
    cluster.until_clean("a");

    let uncut = cluster.relocate("b", &["--host", "a", "--audit", PACE]);
    assert_eq!(uncut.reconnects, 0);
    let turned_dirty = 16 * MIB;
    let most = sent(&uncut) + cuts.len() as u64 * IN_FLIGHT + turned_dirty;
    println!("{test}: {} bytes with {} cuts, {} without", sent(&resumed), cuts.len(), sent(&uncut));
    assert!(sent(&resumed) <= most, "{} of at most {most}", sent(&resumed));
    watch.finish();
    cluster.console("a").check();
    cluster.stop_clean("a");
}

#[test]
fn a_link_cut_while_disks_are_copied() {
    cut("a_link_cut_while_disks_are_copied", &[("mirror", 40 * MIB)]);
}

#[test]
fn a_link_cut_while_memory_is_copied() {
    cut("a_link_cut_while_memory_is_copied", &[("pre-copy", 50 * MIB)]);
}

#[test]
fn a_link_cut_again_and_again() {
    let cuts = [("mirror", MIB), ("mirror", 30 * MIB), ("pre-copy", MIB), ("pre-copy", 20 * MIB)];
    cut("a_link_cut_again_and_again", &cuts);
}

#[test]
fn a_link_cut_before_anything_was_copied() {
    let test = "a_link_cut_before_anything_was_copied";
    if !kvm::usable(test) {
        return;
    }
    // The target has not heard what will come; the source has not heard that the target is ready; the mirrors have just begun.
    let points = ["source.tell-setup", "target.tell-ready", "source.start-logging"];
    let cluster = Cluster::start_with_relay(PROGRAM, &["a", "b"], &points);
    cluster.boot("a", &Spec::default());
    let id = cluster.begin_move("a", &["--host", "b", "--audit"]);
    for point in points {
        cluster.stops.reached(point);
        cluster.relay().cut();
        cluster.stops.release(point);
    }
    let report = report(&cluster, &id);
    assert_eq!((report.outcome.as_str(), report.verified), ("completed", true), "{report:?}");
    assert_eq!(report.reconnects, 3);
    cluster.console("b").check();
    cluster.until_clean("a");
    cluster.stop_clean("b");
}

#[test]
fn a_link_that_falls_silent() {
    let test = "a_link_that_falls_silent";
    if !kvm::usable(test) {
        return;
    }
    let cluster = Cluster::start_with_relay(PROGRAM, &["a", "b"], &[]);
    let before = cluster.boot("a", &spec());
    let id = cluster.begin_move("a", &["--host", "b", "--audit", PACE]);
    under_way(&cluster, &id, "pre-copy", 20 * MIB);
    cluster.relay().hold();
    until("the silence being noticed", || (progress(&cluster, &id).phase == "reconnecting").then_some(()));
    // The guest does not wait for it: the check reads behind all its writes.
    before.goes_on();
    before.check();
    let last = before.heartbeats().last().unwrap().seq;
    // What was held arrives now, late, on connections that nobody wants any more.
    cluster.relay().heal();
    let report = report(&cluster, &id);
    assert_eq!((report.outcome.as_str(), report.verified), ("completed", true), "{report:?}");
    assert!(report.reconnects > 0);
    let console = cluster.console("b");
    console.heartbeat_after(last);
    console.check();
    cluster.until_clean("a");
    cluster.stop_clean("b");
}

/// Nothing of a move to b is left anywhere, the guest has not noticed, and the move can be made.
fn nothing_happened(cluster: &Cluster, console: &Console) {
    cluster.until_clean("b");
    cluster.until_state("a", VmState::Running);
    console.goes_on();
    console.check();
    let last = console.heartbeats().last().unwrap().seq;
    cluster.relocate("a", &["--host", "b"]);
    let console = cluster.console("b");
    console.heartbeat_after(last);
    console.check();
    cluster.until_clean("a");
}

#[test]
fn a_move_is_cancelled_while_reconnecting() {
    let test = "a_move_is_cancelled_while_reconnecting";
    if !kvm::usable(test) {
        return;
    }
    let cluster = Cluster::start_with_relay(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &spec());
    for phase in ["mirror", "pre-copy"] {
        let id = cluster.begin_move("a", &["--host", "b", PACE]);
        under_way(&cluster, &id, phase, 10 * MIB);
        cluster.relay().refuse();
        until("the loss being noticed", || (progress(&cluster, &id).phase == "reconnecting").then_some(()));
        cluster.vmove("a", &["cancel", &id]).ok();
        assert_eq!(report(&cluster, &id).outcome, "cancelled");
        cluster.until_clean("b");
        cluster.until_state("a", VmState::Running);
        console.goes_on();
        cluster.relay().heal();
    }
    nothing_happened(&cluster, &console);
}

#[test]
fn a_target_that_is_gone_for_good_is_given_up() {
    let test = "a_target_that_is_gone_for_good_is_given_up";
    if !kvm::usable(test) {
        return;
    }
    let point = "source.send-pages";
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    let console = cluster.boot("a", &Spec::default());
    let id = cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    kill_hard(cluster.vm_process("b", VM).unwrap());
    cluster.stops.release(point);
    assert_eq!(report(&cluster, &id).outcome, "aborted");
    let why = progress(&cluster, &id).error.unwrap();
    assert!(why.contains("could not be made again"), "{why}");
    nothing_happened(&cluster, &console);
}

/// Damages one bit of a plain connection and says how the move ended.
fn damage(cluster: &Cluster, role: Role, at: u64) -> (MoveReport, Option<String>) {
    let relay: &Relay = cluster.relay();
    relay.flip(role, at);
    let id = cluster.begin_move("a", &["--host", "b", "--insecure-plain", "--audit"]);
    let report = report(cluster, &id);
    assert!(relay.has_flipped(), "{report:?}");
    (report, progress(cluster, &id).error)
}

#[test]
fn damage_on_the_way_is_found_before_the_commit() {
    let test = "damage_on_the_way_is_found_before_the_commit";
    if !kvm::usable(test) {
        return;
    }
    let cluster = Cluster::start_with_relay(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &Spec::default());
    let hello = Hello::BYTES as u64;
    // The heads of the first frames: a length (byte 9 of a frame, see `vmove_mirror::wire::frame`), and what the head says (its
    // first byte is the 24th of the frame). Then data of a block, far behind.
    let damages = [
        (Role::Control, hello + 24),
        (Role::Disk(0), hello + 9),
        (Role::Disk(0), hello + 24 + 16),
        (Role::Disk(0), 5 * MIB + 12_345),
        (Role::Pages(0), hello + 9),
        (Role::Pages(0), hello + 24),
    ];
    for (role, at) in damages {
        let (report, error) = damage(&cluster, role, at);
        assert_eq!(report.outcome, "aborted", "{role:?} {at}");
        let why = error.unwrap();
        println!("{role:?}, byte {at}: {why}");
        assert!(why.contains("damaged on the way"), "{role:?} {at}: {why}");
        cluster.until_clean("b");
        cluster.until_state("a", VmState::Running);
        console.goes_on();
        console.check();
    }
    // A page that arrives damaged is sent again: the digests of both sides agree in the end, and what the guest reads as well.
    let last = console.heartbeats().last().unwrap().seq;
    let (report, _) = damage(&cluster, Role::Pages(0), 9 * MIB + 12_345);
    assert_eq!((report.outcome.as_str(), report.verified), ("completed", true), "{report:?}");
    let console = cluster.console("b");
    console.heartbeat_after(last);
    console.check();
    cluster.until_clean("a");
    cluster.stop_clean("b");
}
