//! Checkpoints: a moment of a running guest is kept while it goes on, and it goes on exactly there, again and again, here or elsewhere.
//!
//! The guest is the judge: every page of its RAM and every block of its disk must be those of one moment. Whatever dies on the way, the
//! VM is startable as it was or as it is restored, and nothing is left that nobody owns.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmove::api::checkpoint::CheckpointList;
use vmove::api::types::{MoveReport, VmState};
use vmove_tests::cluster::Cluster;
use vmove_tests::console::Console;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::processes::kill_hard;
use vmove_tests::wait::until;
use vmove_tests::{images, kvm};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

fn checkpoints(cluster: &Cluster, host: &str) -> Vec<String> {
    let list: CheckpointList = cluster.vmove(host, &["checkpoints", "--json"]).json();
    assert!(list.checkpoints.iter().all(|checkpoint| checkpoint.error.is_none()), "{list:?}");
    list.checkpoints
        .into_iter()
        .map(|checkpoint| format!("{}/{}", checkpoint.host, checkpoint.name))
        .collect()
}

fn take(cluster: &Cluster, host: &str, name: &str, more: &[&str]) -> MoveReport {
    let report: MoveReport =
        cluster.vmove(host, &[&["checkpoint", VM, name, "--json"], more].concat()).json();
    println!(
        "checkpoint {name}: {} ms, paused for {} ms, {:?}",
        report.total_ms, report.downtime_ms, report.memory
    );
    report
}

/// Where a checkpoint lies, in the default datastore.
fn dir_of(cluster: &Cluster, host: &str, name: &str) -> PathBuf {
    cluster.host(host).datastore("fast").join(".checkpoints").join(VM).join(name)
}

/// Everything of checkpoints on a host that is not a finished one of these names.
fn unfinished(cluster: &Cluster, host: &str, finished: &[&str]) -> Vec<String> {
    let mut left = Vec::new();
    for store in ["fast", "bulk"] {
        let dir = cluster.host(host).datastore(store).join(".checkpoints").join(VM);
        let Ok(entries) = fs::read_dir(dir) else { continue };
        left.extend(entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
    }
    left.retain(|name| !finished.contains(&name.as_str()));
    left
}

/// Lets a guest come so far that one that was started again is known by its heartbeats; gives the newest.
fn come_along(console: &Console) -> u64 {
    console.heartbeat_after(15).seq
}

/// The guest goes on on a host from a moment after heartbeat `earlier`. One that was started anew would be at the first, and one whose
/// RAM is of another moment than its console would leave some out.
fn assert_goes_on(cluster: &Cluster, host: &str, earlier: u64) {
    let console = cluster.console(host);
    let now = console.heartbeats().last().map_or(0, |beat| beat.seq);
    assert!(now >= earlier, "started anew: {now} {earlier}");
    console.goes_on();
    let beats: Vec<u64> = console.heartbeats().iter().map(|beat| beat.seq).collect();
    assert!(beats.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{beats:?}");
    console.check();
}

#[test]
fn a_guest_goes_on_from_where_it_was_again_and_again() {
    if !kvm::usable("a_guest_goes_on_from_where_it_was_again_and_again") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &[]);
    let before = cluster.boot("a", &Spec { vcpus: 2, ..Spec::default() });
    let earlier = come_along(&before);
    let report = take(&cluster, "a", "one", &[]);
    assert_eq!((report.outcome.as_str(), report.verified), ("completed", true));
    // RAM that was never touched takes no room.
    assert!(images::allocated(&dir_of(&cluster, "a", "one").join("ram")) < 48 << 20);
    images::assert_clean(&dir_of(&cluster, "a", "one").join("disk-0"));
    let taken = before.goes_on().seq;
    before.check();
    before.heartbeat_after(taken + 10);
    assert_eq!(checkpoints(&cluster, "a"), ["a/one"]);
    cluster.vmove("a", &["checkpoint", VM, "one"]).refused(1, &["one", "already"]);
    cluster.vmove("a", &["restore", VM, "one"]).refused(1, &["running", "stop it first"]);
    let first_run = before.run();
    drop(before);
    let mut generation = 1;
    for _ in 0..2 {
        cluster.vmove("a", &["stop", VM]).ok();
        cluster.vmove("a", &["restore", VM, "one"]).ok();
        let vm = cluster.until_state("a", VmState::Running);
        let console = cluster.console("a");
        assert_ne!(console.run(), first_run);
        assert_goes_on(&cluster, "a", earlier);
        generation += 1;
        assert_eq!(vm.summary.generation, generation);
        // The images before are gone, only the new one is left, and it is the VM's.
        let dir = cluster.image("a", "fast").parent().unwrap().to_owned();
        let images: Vec<String> = images::files_below(&dir);
        let path = vm.summary.disks[0].path.display().to_string();
        assert!(images.iter().all(|file| file.starts_with(&path)), "{images:?} {path}");
    }
    // From there it is a VM like any other.
    let console = cluster.console("a");
    cluster.relocate("a", &["--datastore", "bulk"]);
    console.goes_on();
    console.check();
    cluster.stop_clean("a");
    cluster.vmove("a", &["checkpoints", VM, "--remove", "one"]).ok();
    assert_eq!(checkpoints(&cluster, "a"), Vec::<String>::new());
    assert_eq!(unfinished(&cluster, "a", &[]), Vec::<String>::new());
    cluster.vmove("a", &["restore", VM, "one"]).refused(1, &["no checkpoint"]);
}

#[test]
fn it_stops_with_its_checkpoint_and_goes_on_on_another_host() {
    if !kvm::usable("it_stops_with_its_checkpoint_and_goes_on_on_another_host") {
        return;
    }
    let mut cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let before = cluster.boot("a", &Spec::default());
    let earlier = come_along(&before);
    take(&cluster, "a", "one", &["--stop", "--datastore", "bulk"]);
    cluster.until_state("a", VmState::Stopped);
    // Never two that could run: where the VM is it is restored, or nowhere.
    cluster.vmove("b", &["restore", VM, "one", "--host", "b"]).refused(1, &["host a has VM", "move it"]);
    cluster.vmove("b", &["restore", VM, "one"]).ok();
    cluster.until_state("a", VmState::Running);
    assert_goes_on(&cluster, "a", earlier);
    cluster.vmove("a", &["stop", VM]).ok();
    cluster.vmove("a", &["rm", VM]).ok();
    // The checkpoint does not go with its VM. While a host is silent, nobody knows that the VM is nowhere.
    cluster.kill_agent("b");
    cluster.vmove("a", &["restore", VM, "one"]).refused(3, &["b", "does not answer"]);
    cluster.restart_agent("b");
    cluster.vmove("a", &["restore", VM, "one", "--host", "b"]).ok();
    cluster.until_state("b", VmState::Running);
    assert_goes_on(&cluster, "b", earlier);
    assert_eq!(checkpoints(&cluster, "b"), ["a/one"], "what was fetched is not kept");
    assert_eq!(unfinished(&cluster, "b", &[]), Vec::<String>::new());
    cluster.relocate("b", &["--host", "a"]);
    cluster.console("a").check();
    cluster.until_clean("b");
    cluster.stop_clean("a");
}

/// Changes one byte of a file, has `meanwhile` done, and changes it back.
fn with_a_wrong_byte(path: &Path, at: u64, meanwhile: impl FnOnce()) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    meanwhile();
    file.write_all_at(&byte, at).unwrap();
}

#[test]
fn damaged_torn_and_foreign_checkpoints_are_refused_and_change_nothing() {
    if !kvm::usable("damaged_torn_and_foreign_checkpoints_are_refused_and_change_nothing") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &[]);
    let before = cluster.boot("a", &Spec::default());
    let earlier = come_along(&before);
    take(&cluster, "a", "one", &[]);
    before.goes_on();
    let flushed = before.surely_flushed();
    cluster.vmove("a", &["stop", VM]).ok();
    let there = cluster.host("a").remains();
    let refused = |what: &str, words: &[&str]| {
        let answer = cluster.vmove("a", &["restore", VM, "one"]);
        println!("{what}: {}", answer.stderr.trim());
        answer.refused(1, words);
        cluster.until_state("a", VmState::Stopped);
    };
    let dir = dir_of(&cluster, "a", "one");
    let ends = |file: &str| fs::metadata(dir.join(file)).unwrap().len() - 1;
    for (file, at, words) in [
        ("checkpoint", 100, "damaged"),
        ("checkpoint", 3, "no checkpoint"),
        ("checkpoint", 8, "version"),
        ("ram", 5 << 20, "damaged"),
        ("ram", ends("ram"), "damaged"),
        ("disk-0", 0, "damaged"),
        ("disk-0", ends("disk-0"), "damaged"),
    ] {
        with_a_wrong_byte(&dir.join(file), at, || refused(file, &[words]));
    }
    for file in ["checkpoint", "ram", "disk-0"] {
        let whole = fs::read(dir.join(file)).unwrap();
        fs::write(dir.join(file), &whole[..whole.len() - 4096.min(whole.len() / 2)]).unwrap();
        refused("torn", &["cannot be used"]);
        fs::write(dir.join(file), b"QFI\xfb").unwrap();
        refused("foreign", &["cannot be used"]);
        fs::remove_file(dir.join(file)).unwrap();
        refused("missing", &[file]);
        fs::write(dir.join(file), whole).unwrap();
    }
    assert_eq!(unfinished(&cluster, "a", &["one"]), Vec::<String>::new());
    until("nothing being left of the attempts", || {
        (cluster.host("a").remains().len() <= there.len() + 2).then_some(())
    });
    // Nothing of the VM was touched: it starts from its own disk.
    cluster.start_again("a");
    let console = cluster.console("a");
    assert!(console.recovered() >= flushed);
    console.check();
    drop(console);
    // And the checkpoint is as good as ever.
    cluster.vmove("a", &["stop", VM]).ok();
    cluster.vmove("a", &["restore", VM, "one"]).ok();
    assert_goes_on(&cluster, "a", earlier);
    cluster.stop_clean("a");
}

/// The VM's process is killed at a point while a checkpoint is taken.
fn killed_while_taking(test: &str, point: &str) {
    if !kvm::usable(test) {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &[point]);
    let before = cluster.boot("a", &Spec::default());
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| cluster.vmove("a", &["checkpoint", VM, "one"]));
        cluster.stops.reached(point);
        let flushed = before.surely_flushed();
        kill_hard(cluster.vm_process("a", VM).unwrap());
        cluster.stops.release(point);
        cluster.until_state("a", VmState::Stopped);
        until("nothing being left of it", || unfinished(&cluster, "a", &[]).is_empty().then_some(()));
        assert_eq!(checkpoints(&cluster, "a"), Vec::<String>::new());
        cluster.start_again("a");
        let console = cluster.console("a");
        assert!(console.recovered() >= flushed);
        console.check();
        let answer = taking.join().unwrap();
        assert_ne!(answer.code, 0, "{answer:?}");
    });
    let earlier = come_along(&cluster.console("a"));
    take(&cluster, "a", "one", &[]);
    cluster.stop_clean("a");
    cluster.vmove("a", &["restore", VM, "one"]).ok();
    assert_goes_on(&cluster, "a", earlier);
}

#[test]
fn the_process_dies_while_disks_are_copied() {
    killed_while_taking("the_process_dies_while_disks_are_copied", "checkpoint.mirror");
}

#[test]
fn the_process_dies_in_the_pause() {
    killed_while_taking("the_process_dies_in_the_pause", "checkpoint.paused");
}

#[test]
fn the_process_dies_before_the_checkpoint_has_its_name() {
    killed_while_taking("the_process_dies_before_the_checkpoint_has_its_name", "checkpoint.rename");
}

#[test]
fn the_agent_dies_while_a_checkpoint_is_taken() {
    let test = "the_agent_dies_while_a_checkpoint_is_taken";
    if !kvm::usable(test) {
        return;
    }
    let point = "checkpoint.pages";
    let mut cluster = Cluster::start(PROGRAM, &["a"], &[point]);
    let console = cluster.boot("a", &Spec::default());
    let earlier = come_along(&console);
    std::thread::scope(|scope| {
        let command = {
            let mut command = cluster.command();
            command.arg("--agent").arg(cluster.host("a").state.join("agent.sock")).args([
                "checkpoint",
                VM,
                "one",
            ]);
            command
        };
        let taking = scope.spawn(move || {
            let mut command = command;
            command.output().unwrap()
        });
        cluster.stops.reached(point);
        cluster.kill_agent("a");
        cluster.restart_agent("a");
        cluster.stops.release(point);
        // The command has waited for the agent to come back.
        let output = taking.join().unwrap();
        assert!(output.status.success(), "{output:?}");
    });
    console.goes_on();
    assert_eq!(checkpoints(&cluster, "a"), ["a/one"]);
    assert_eq!(unfinished(&cluster, "a", &["one"]), Vec::<String>::new());
    cluster.until_state("a", VmState::Running);
    cluster.stop_clean("a");
    cluster.vmove("a", &["restore", VM, "one"]).ok();
    assert_goes_on(&cluster, "a", earlier);
}

/// The VM's process is killed at a point while it is restored: before the journal has it, the old VM is there; after it, the restored.
fn killed_while_restoring(test: &str, point: &str, owned: bool) {
    if !kvm::usable(test) {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &[point]);
    let before = cluster.boot("a", &Spec::default());
    let earlier = come_along(&before);
    take(&cluster, "a", "one", &[]);
    before.goes_on();
    let flushed = before.surely_flushed();
    cluster.vmove("a", &["stop", VM]).ok();
    let old = cluster.until_state("a", VmState::Stopped).summary.disks[0].path.clone();
    std::thread::scope(|scope| {
        let restoring = scope.spawn(|| cluster.vmove("a", &["restore", VM, "one"]));
        cluster.stops.reached(point);
        kill_hard(cluster.vm_process("a", VM).unwrap());
        cluster.stops.release(point);
        assert_ne!(restoring.join().unwrap().code, 0);
    });
    let vm = until("the VM being stopped", || {
        cluster.show("a").filter(|vm| matches!(vm.summary.state, VmState::Stopped | VmState::Failed))
    });
    let kept = &vm.summary.disks[0].path;
    assert_eq!(*kept == old, !owned, "{}", kept.display());
    until("one image being left", || {
        let dir = kept.parent().unwrap();
        let path = kept.display().to_string();
        images::files_below(dir).iter().all(|file| file.starts_with(&path)).then_some(())
    });
    cluster.start_again("a");
    let console = cluster.console("a");
    let recovered = console.recovered();
    assert!(owned || recovered >= flushed, "{recovered} {flushed}");
    console.check();
    drop(console);
    cluster.vmove("a", &["stop", VM]).ok();
    cluster.vmove("a", &["restore", VM, "one"]).ok();
    assert_goes_on(&cluster, "a", earlier);
    cluster.stop_clean("a");
}

#[test]
fn the_process_dies_while_it_loads() {
    killed_while_restoring("the_process_dies_while_it_loads", "restore.load", false);
}

#[test]
fn the_process_dies_before_the_vm_is_the_restored_one() {
    killed_while_restoring(
        "the_process_dies_before_the_vm_is_the_restored_one",
        "restore.journal-owner",
        false,
    );
}

#[test]
fn the_process_dies_before_the_restored_vm_runs() {
    killed_while_restoring("the_process_dies_before_the_restored_vm_runs", "restore.run", true);
}

#[test]
fn a_full_disk_ends_the_checkpoint_and_not_the_guest() {
    if !kvm::usable("a_full_disk_ends_the_checkpoint_and_not_the_guest") {
        return;
    }
    let mut cluster = Cluster::prepare(PROGRAM, &["a"], &[]);
    // Room for the disk, not for RAM. Seen by the agent and its VM alone, and gone with them.
    let small = cluster.hosts[0].datastore("bulk");
    cluster.hosts[0].before_agent = Some(format!("mount -t tmpfs -o size=40m none '{}'", small.display()));
    cluster.join(0);
    let console = cluster.boot("a", &Spec::default());
    let answer = cluster.vmove("a", &["checkpoint", VM, "one", "--datastore", "bulk"]);
    answer.refused(1, &["no checkpoint", "No space left"]);
    console.goes_on();
    console.check();
    assert_eq!(checkpoints(&cluster, "a"), Vec::<String>::new());
    let earlier = come_along(&console);
    take(&cluster, "a", "one", &[]);
    console.goes_on();
    cluster.stop_clean("a");
    cluster.vmove("a", &["restore", VM, "one"]).ok();
    assert_goes_on(&cluster, "a", earlier);
}
