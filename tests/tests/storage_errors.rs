//! Disks that fail on either side of a move: the guest goes on at the source, the error says which disk, where and what to do, and the
//! move works once that is done. Full and read-only file systems are real ones, mounted for one agent alone; I/O errors are made by the
//! engine (`vmove_storage`'s `faults`), at bytes of the test's choice.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

use vmove::api::types::{MoveProgress, VmState};
use vmove_tests::cluster::Cluster;
use vmove_tests::console::Console;
use vmove_tests::faults::Operation;
use vmove_tests::guest::{DISK, Spec, VM};
use vmove_tests::kvm;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
/// errno(3).
const EIO: i32 = 5;
/// What the file system mounted for the target has.
const ROOM_MIB: u64 = 96;

/// Two hosts; `fast` of b is a file system of its own, seen by the agent of b and its VM processes alone, and gone with them.
fn with_mounted_target() -> (Cluster, Console) {
    let mut cluster = Cluster::prepare(PROGRAM, &["a", "b"], &[]);
    cluster.join(0);
    let place = cluster.hosts[1].datastore("fast");
    cluster.hosts[1].before_agent =
        Some(format!("mount -t tmpfs -o size={ROOM_MIB}m none '{}'", place.display()));
    cluster.join(1);
    cluster.acquainted();
    let console = cluster.boot("a", &Spec::default());
    (cluster, console)
}

/// A path as the agent of b sees it.
fn seen_by_b(cluster: &Cluster, path: &Path) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{}/root", cluster.agent_process("b")));
    root.join(path.strip_prefix("/").unwrap())
}

/// Takes all the room of a file system.
fn fill(filler: &Path) {
    let mut file = File::create(filler).unwrap();
    let chunk = vec![1; 64 << 10];
    while file.write_all(&chunk).is_ok() {}
    // What is left is less than a chunk.
    while file.write_all(&[1; 512]).is_ok() {}
}

/// Mounts what is mounted for b another way.
fn remount(cluster: &Cluster, how: &str) {
    let agent = cluster.agent_process("b").to_string();
    let own = if nix::unistd::geteuid().is_root() { "-m" } else { "-Um" };
    let status = Command::new("nsenter")
        .args(["-t", &agent, own, "--preserve-credentials", "mount", "-o", &format!("remount,{how}")])
        .arg(cluster.host("b").datastore("fast"))
        .status()
        .unwrap();
    assert!(status.success());
}

/// The end of a move that failed, with all of these words in its reason; the guest goes on and is in order.
fn assert_failed(cluster: &Cluster, console: &Console, id: &str, words: &[&str]) {
    let progress: MoveProgress = until("the end of the move", || {
        let progress: MoveProgress = cluster.vmove("a", &["status", id, "--json"]).json();
        progress.report.is_some().then_some(progress)
    });
    assert_eq!(progress.report.as_ref().unwrap().outcome, "aborted", "{progress:?}");
    let why = progress.error.unwrap();
    for word in words {
        assert!(why.contains(word), "{word:?} is not said in: {why}");
    }
    cluster.until_state("a", VmState::Running);
    console.goes_on();
    console.check();
    cluster.until_clean("b");
}

fn assert_moves(cluster: &Cluster, console: &Console) {
    let last = console.heartbeats().last().unwrap().seq;
    cluster.relocate("a", &["--host", "b", "--audit"]);
    let there = cluster.console("b");
    there.heartbeat_after(last);
    there.check();
}

#[test]
fn a_target_disk_that_runs_full() {
    if !kvm::usable("a_target_disk_that_runs_full") {
        return;
    }
    let (cluster, console) = with_mounted_target();
    let point = "source.start-mirrors";
    cluster.stops.hold(point);
    let id = cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    // Somebody else takes the room that was there when the move was planned.
    let filler = seen_by_b(&cluster, &cluster.host("b").datastore("fast").join("filler"));
    fill(&filler);
    cluster.stops.release(point);
    let words =
        ["disk vda", "host b, datastore fast", "at byte", "No space left on device", "make room there"];
    assert_failed(&cluster, &console, &id, &words);
    assert!(!seen_by_b(&cluster, &cluster.image("b", "fast")).exists());
    fs::remove_file(&filler).unwrap();
    assert_moves(&cluster, &console);
}

/// Held before the target makes its images, something happens there; the move ends with these words.
fn images_that_cannot_be_made(cluster: &Cluster, console: &Console, words: &[&str], happens: impl FnOnce()) {
    let point = "target.make-images";
    cluster.stops.hold(point);
    let id = cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    happens();
    cluster.stops.release(point);
    assert_failed(
        cluster,
        console,
        &id,
        &[&["the target refused: disk vda cannot be made in datastore fast"], words].concat(),
    );
}

#[test]
fn a_target_that_cannot_make_its_images() {
    if !kvm::usable("a_target_that_cannot_make_its_images") {
        return;
    }
    let (cluster, console) = with_mounted_target();
    let filler = seen_by_b(&cluster, &cluster.host("b").datastore("fast").join("filler"));
    images_that_cannot_be_made(&cluster, &console, &["No space left on device", "make room there"], || {
        fill(&filler);
    });
    fs::remove_file(&filler).unwrap();
    let image = seen_by_b(&cluster, &cluster.image("b", "fast"));
    assert!(!image.exists());
    images_that_cannot_be_made(&cluster, &console, &["vda.qcow2: File exists", "remove it there"], || {
        fs::create_dir_all(image.parent().unwrap()).unwrap();
        fs::write(&image, "somebody's").unwrap();
    });
    assert_eq!(fs::read(&image).unwrap(), b"somebody's");
    fs::remove_file(&image).unwrap();
    images_that_cannot_be_made(
        &cluster,
        &console,
        &["Read-only file system", "mount it for writing"],
        || {
            remount(&cluster, "ro");
        },
    );
    assert!(!image.exists());
    remount(&cluster, "rw");
    assert_moves(&cluster, &console);
}

#[test]
fn a_target_disk_that_is_read_only() {
    if !kvm::usable("a_target_disk_that_is_read_only") {
        return;
    }
    let (cluster, console) = with_mounted_target();
    let place = cluster.host("b").datastore("fast");
    remount(&cluster, "ro");
    let answer = cluster.vmove("a", &[VM, "--host", "b"]);
    answer.refused(1, &["host b", "Read-only file system", &place.display().to_string()]);
    cluster.until_state("a", VmState::Running);
    console.goes_on();
    console.check();
    cluster.until_clean("b");
    remount(&cluster, "rw");
    assert_moves(&cluster, &console);
}

#[test]
fn a_target_disk_that_fails() {
    if !kvm::usable("a_target_disk_that_fails") {
        return;
    }
    let cluster = Cluster::start_with_faults(PROGRAM, &["a", "b"]);
    let console = cluster.boot("a", &Spec::default());
    let image = cluster.image("b", "fast");
    for (operation, from, words) in [
        (Operation::Write, 2 << 20, ["cannot write", "at byte", "Input/output error", "kernel's log"]),
        (Operation::Sync, 0, ["disk vda", "host b, datastore fast", "cannot", "Input/output error"]),
    ] {
        // Once the image is made.
        let point = "source.start-mirrors";
        cluster.stops.hold(point);
        let id = cluster.begin_move("a", &["--host", "b"]);
        cluster.stops.reached(point);
        cluster.faults().fail(&image, operation, EIO, from..u64::MAX);
        cluster.stops.release(point);
        assert_failed(&cluster, &console, &id, &words);
        cluster.faults().mend();
    }
    assert_moves(&cluster, &console);
}

/// An image whose second half holds data that the guest never looks at, so that only the copy meets an error there. Gives the bytes of
/// the image file that hold it.
fn image_with_untouched_data(cluster: &Cluster) -> (PathBuf, std::ops::Range<u64>) {
    let (raw, image) = (cluster.path().join("old.raw"), cluster.path().join("old.qcow2"));
    let mut file = File::create(&raw).unwrap();
    file.set_len(128 << 20).unwrap();
    file.seek(SeekFrom::Start(64 << 20)).unwrap();
    file.write_all(&vec![0xa5; 16 << 20]).unwrap();
    drop(file);
    let done = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &image])
        .status()
        .expect("qemu-img is installed");
    assert!(done.success());
    // Its tables come first in the file, then the data, in order.
    (image, 4 << 20..16 << 20)
}

#[test]
fn a_source_disk_that_cannot_be_read() {
    if !kvm::usable("a_source_disk_that_cannot_be_read") {
        return;
    }
    let cluster = Cluster::start_with_faults(PROGRAM, &["a", "b"]);
    let (old, bytes) = image_with_untouched_data(&cluster);
    let disk = format!("name={DISK},from={}", old.display());
    cluster.create("a", VM, &Spec::default(), &["--disk", &disk]).ok();
    cluster.vmove("a", &["start", VM]).ok();
    let console = cluster.console("a");
    console.heartbeat_after(2);
    let image = cluster.image("a", "fast");
    cluster.faults().fail(&image, Operation::Read, EIO, bytes);
    let id = cluster.begin_move("a", &["--host", "b"]);
    let path = image.display().to_string();
    let words = [
        "disk vda",
        "at byte",
        "cannot be read for the copy",
        path.as_str(),
        "Input/output error",
        "kernel's log",
    ];
    assert_failed(&cluster, &console, &id, &words);
    cluster.faults().mend();
    assert_moves(&cluster, &console);
    cluster.stop_clean("b");
}

#[test]
fn a_guest_meets_an_error_of_its_own_disk_and_nothing_else_happens() {
    if !kvm::usable("a_guest_meets_an_error_of_its_own_disk_and_nothing_else_happens") {
        return;
    }
    let cluster = Cluster::start_with_faults(PROGRAM, &["a"]);
    let console = cluster.boot("a", &Spec::default());
    let (pid, flushed) = (cluster.vm_process("a", VM), console.surely_flushed());
    let image = cluster.image("a", "fast");
    cluster.faults().fail(&image, Operation::Write, EIO, 0..u64::MAX);
    // The guest is told, by the status of its request; the console's judge repeats what it says of it.
    let said = catch_unwind(AssertUnwindSafe(|| console.wait("error", |_| None::<()>))).unwrap_err();
    let said = said.downcast_ref::<String>().unwrap();
    assert!(said.contains("error io"), "{said}");
    cluster.faults().mend();
    let there = cluster.until_state("a", VmState::Running);
    assert_eq!(there.pid, pid, "the same process");
    // What the guest was told is flushed is there.
    cluster.vmove("a", &["stop", "--now", VM]).ok();
    cluster.start_again("a");
    let recovered = cluster.console("a").recovered();
    assert!(recovered >= flushed && flushed > 0, "flushed up to {flushed}, found {recovered}");
}
