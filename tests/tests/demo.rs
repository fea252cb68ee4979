//! The whole way of a move, seen by a user: the demo, equal and thin images, what is sent, many moves, QEMU's opinion of the guest.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use vmove::api::types::{DiskFormat, VmState};
use vmove_tests::cluster::Cluster;
use vmove_tests::console::Console;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::wait::until;
use vmove_tests::{images, kvm, processes};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

#[test]
fn the_demo_moves_three_times_and_leaves_nothing_behind() {
    if !kvm::usable("the_demo_moves_three_times_and_leaves_nothing_behind") {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().canonicalize().unwrap();
    let output = Command::new(PROGRAM).args(["demo", "--json"]).env("TMPDIR", &dir).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let moves = said["moves"].as_array().unwrap();
    assert_eq!(moves.len(), 3);
    for one in moves {
        assert_eq!((&one["outcome"], &one["verified"]), (&"completed".into(), &true.into()), "{one}");
        println!(
            "{} -> {}: pause {} ms, the guest missed {} ms",
            one["from"], one["to"], one["downtime_ms"], one["guest_gap_ms"]
        );
        assert!(one["guest_gap_ms"].as_f64().is_some() && one["downtime_ms"].as_f64().is_some(), "{one}");
    }
    let guest = &said["guest"];
    assert_eq!((guest["ram_errors"].as_u64(), guest["disk_errors"].as_u64()), (Some(0), Some(0)), "{guest}");
    assert!(
        guest["checked_pages"].as_u64() > Some(0) && guest["checked_blocks"].as_u64() > Some(0),
        "{guest}"
    );
    assert_eq!(images::files_below(&dir), Vec::<String>::new());
    assert_eq!(processes::of(&Path::new(PROGRAM).canonicalize().unwrap(), &dir), Vec::<u32>::new());
}

/// The image that is about to be used holds what the one that was used holds, and takes no more room.
fn same_and_thin(from: &Path, to: &Path) {
    images::assert_equal(from, to);
    let (before, after) = (images::allocated(from), images::allocated(to));
    assert!(before > 16 << 20, "the guest has written {before} bytes only");
    assert!(after as f64 <= before as f64 * 1.02, "{before} bytes have become {after}");
}

#[test]
fn images_are_equal_and_thin_when_host_and_datastore_change() {
    if !kvm::usable("images_are_equal_and_thin_when_host_and_datastore_change") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &["target.run"]);
    let before = cluster.boot("a", &Spec::default());
    cluster.begin_move("a", &["--host", "b", "--datastore", "bulk"]);
    cluster.stops.reached("target.run");
    same_and_thin(&cluster.image("a", "fast"), &cluster.image("b", "bulk"));
    let last = before.heartbeats().last().unwrap().seq;
    cluster.stops.release("target.run");
    cluster.until_state("b", VmState::Running);
    let after = cluster.console("b");
    after.heartbeat_after(last);
    assert_eq!(after.run(), before.run(), "started again");
    after.check();
    cluster.until_clean("a");
    cluster.stop_clean("b");
}

#[test]
fn images_are_equal_and_thin_when_the_datastore_changes() {
    if !kvm::usable("images_are_equal_and_thin_when_the_datastore_changes") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &["source.pivot"]);
    let console = cluster.boot("a", &Spec::default());
    cluster.begin_move("a", &["--datastore", "bulk"]);
    cluster.stops.reached("source.pivot");
    same_and_thin(&cluster.image("a", "fast"), &cluster.image("a", "bulk"));
    cluster.stops.release("source.pivot");
    let vm = cluster.until_state("a", VmState::Running);
    console.goes_on();
    console.check();
    assert_eq!(vm.summary.disks[0].datastore, "bulk");
    assert!(!cluster.image("a", "fast").exists());
    // One after the other without a break.
    cluster.relocate("a", &["--datastore", "fast"]);
    cluster.relocate("a", &["--datastore", "bulk"]);
    cluster.vmove("a", &["stop", VM]).ok();
    cluster.vmove("a", &["start", VM]).ok();
    cluster.console("a").recovered();
    cluster.stop_clean("a");
}

#[test]
fn ram_that_was_never_touched_is_never_sent() {
    if !kvm::usable("ram_that_was_never_touched_is_never_sent") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let words = "vmove.fill_mib=100 vmove.disk_mib=1 vmove.heartbeat_ms=100".to_owned();
    let console = cluster.boot("a", &Spec { memory_mib: 4096, words, ..Spec::default() });
    let last = console.heartbeats().last().unwrap().seq;
    let report = cluster.relocate("a", &["--host", "b"]);
    println!("{:?}", report.memory);
    assert_eq!(report.memory.ram_bytes, 4 << 30);
    assert!(report.memory.sent_bytes >= 100 << 20, "{:?}", report.memory);
    assert!(report.memory.sent_bytes <= 110 << 20, "{:?}", report.memory);
    let console = cluster.console("b");
    console.heartbeat_after(last);
    console.check();
}

fn back_and_forth(vcpus: u8) {
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let mut console = cluster.boot("a", &Spec { vcpus, ..Spec::default() });
    for n in 0..20 {
        let (from, to) = if n % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let last = console.heartbeats().last().unwrap().seq;
        let report = cluster.relocate(from, &["--host", to]);
        let run = console.run();
        console = cluster.console(to);
        let beat = console.heartbeat_after(last);
        println!("{vcpus} vCPUs, move {n}: pause {} ms, heartbeat {}", report.downtime_ms, beat.seq);
        assert_eq!(console.run(), run, "started again");
    }
    console.goes_on();
    console.check();
    assert_eq!(cluster.until_state("a", VmState::Running).summary.generation, 21);
    cluster.stop_clean("a");
}

#[test]
fn one_vcpu_moves_twenty_times() {
    if kvm::usable("one_vcpu_moves_twenty_times") {
        back_and_forth(1);
    }
}

#[test]
fn two_vcpus_move_twenty_times() {
    if kvm::usable("two_vcpus_move_twenty_times") {
        back_and_forth(2);
    }
}

#[test]
fn an_audited_move_says_that_it_is_verified() {
    if !kvm::usable("an_audited_move_says_that_it_is_verified") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &Spec::default());
    let text = cluster.vmove("a", &[VM, "--host", "b", "--audit"]).ok();
    assert!(text.contains("completed") && text.contains("verified"), "{text}");
    drop(console);
    let audited = cluster.relocate("b", &["--datastore", "bulk", "--audit"]);
    assert_eq!((audited.to.host.as_str(), audited.to.datastore.as_str()), ("b", "bulk"));
    cluster.console("b").check();
}

#[test]
fn images_that_are_kept_are_never_started_again() {
    if !kvm::usable("images_that_are_kept_are_never_started_again") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let _console = cluster.boot("a", &Spec::default());
    cluster.relocate("a", &["--host", "b", "--keep-source"]);
    let kept = cluster.image("a", "fast");
    until("the source putting its VM away", || (!cluster.host("a").vm_dir(VM).exists()).then_some(()));
    let stamp = vmove_storage::Stamp::read(&kept).unwrap().unwrap();
    assert_eq!(stamp.state, vmove_storage::OwnerState::Stale);
    // Back: the stale image makes room for the new one.
    cluster.relocate("b", &["--host", "a"]);
    cluster.console("a").check();
    let info = vmove_storage::info(&kept).unwrap();
    assert_eq!(info.format.name(), "qcow2");
    assert_eq!(cluster.until_state("a", VmState::Running).definition.disks[0].format, DiskFormat::Qcow2);
}

#[test]
fn the_guest_is_the_same_on_qemu() {
    let test = "the_guest_is_the_same_on_qemu";
    if !kvm::usable(test) {
        return;
    }
    if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        kvm::skipped(test, "there is no qemu-system-x86_64");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (kernel, disk, socket) =
        (dir.path().join("guest"), dir.path().join("disk.qcow2"), dir.path().join("console"));
    fs::write(&kernel, vmove_guest_image::GUEST_ELF).unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&disk)
        .arg("128M")
        .status()
        .unwrap();
    assert!(made.success());
    let spec = Spec::default();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-enable-kvm",
            "-M",
            "pc",
            "-bios",
            "qboot.rom",
            "-nodefaults",
            "-no-reboot",
            "-display",
            "none",
        ])
        .args(["-monitor", "none", "-smp", "2", "-m"])
        .arg(format!("{}M", spec.memory_mib))
        .arg("-kernel")
        .arg(&kernel)
        .args(["-append", &format!("vmove.cpus=2 vmove.discard=1 {}", spec.words)])
        .arg("-serial")
        .arg(format!("unix:{},server=on,wait=on", socket.display()))
        .arg("-drive")
        .arg(format!("if=none,id=d0,file={},format=qcow2,discard=unmap,cache=none", disk.display()))
        .args(["-device", "virtio-blk-pci,disable-legacy=on,drive=d0"])
        .spawn()
        .unwrap();
    let seen = std::panic::catch_unwind(|| {
        let console = Console::attach_plain(&socket);
        console.heartbeat_after(2);
        console.check();
        console.goes_on();
        console.check();
    });
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    seen.unwrap_or_else(|failure| std::panic::resume_unwind(failure));
}
