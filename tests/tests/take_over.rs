//! A host that is gone for ever: a VM that had arrived whole elsewhere goes on there by its user's word, a dead third host is taken out
//! of the cluster first, and whoever comes back all the same runs nothing.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Command;

use nix::pty::openpty;
use vmove::api::recovery::{RecoveryReport, StandingKind};
use vmove::api::types::{KnownHost, VmState};
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::processes::kill_hard;
use vmove_tests::runners::Watch;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

/// Runs a command of the program on a terminal, types a line when it is asked for one; gives the exit code and all that was said.
fn typed(cluster: &Cluster, host: &str, words: &[&str], line: &str) -> (i32, String) {
    let terminal = openpty(None, None).unwrap();
    let mut command: Command = cluster.command();
    command.arg("--agent").arg(cluster.host(host).state.join("agent.sock")).args(words);
    let (stdin, stdout) = (terminal.slave.try_clone().unwrap(), terminal.slave.try_clone().unwrap());
    command.stdin(stdin).stdout(stdout).stderr(terminal.slave);
    let mut child = command.spawn().unwrap();
    // Its ends of the terminal are the child's alone from here on.
    drop(command);
    let mut terminal = File::from(terminal.master);
    let (mut said, mut typed) = (String::new(), false);
    let mut buffer = [0; 4096];
    // The terminal's other end being gone is an error (pty(7)), and the end of what is said.
    while let Ok(n @ 1..) = terminal.read(&mut buffer) {
        said += &String::from_utf8_lossy(&buffer[..n]);
        if !typed && said.contains("Type ") {
            typed = true;
            writeln!(terminal, "{line}").unwrap();
        }
    }
    (child.wait().unwrap().code().unwrap(), said)
}

fn report(cluster: &Cluster, host: &str) -> RecoveryReport {
    let answer = cluster.vmove(host, &["recover", VM, "--json"]);
    serde_json::from_str(&answer.stdout).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

fn names(cluster: &Cluster, host: &str) -> Vec<String> {
    let hosts: Vec<KnownHost> = cluster.vmove(host, &["host", "ls", "--json"]).json();
    hosts.into_iter().map(|host| host.name).collect()
}

#[test]
fn a_vm_goes_on_at_its_target_when_its_source_is_gone_for_ever() {
    if !kvm::usable("a_vm_goes_on_at_its_target_when_its_source_is_gone_for_ever") {
        return;
    }
    let point = "target.tell-prepared";
    let mut cluster = Cluster::start(PROGRAM, &["a", "b", "c"], &[point]);
    let before = cluster.boot("a", &Spec::default());
    let watch = Watch::start(&cluster, VM);
    // So that b knows what was on c when that is gone.
    let ballast = Spec { memory_mib: 32, disk_mib: 32, ..Spec::default() };
    cluster.create("c", "ballast", &ballast, &[]).ok();
    cluster.vmove("b", &["ls"]).ok();
    cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    let flushed = before.surely_flushed();
    let last = before.heartbeats().last().unwrap().seq;
    kill_hard(cluster.vm_process("a", VM).unwrap());
    cluster.kill_agent("a");
    cluster.kill_agent("c");
    cluster.stops.release(point);
    cluster.until_state("b", VmState::Undecided);

    // Nobody runs it; what is said is what to do. A dead third host stands in the way.
    let undecided = cluster.vmove("b", &["recover", VM]);
    println!("{}", undecided.stdout);
    undecided.refused(3, &["only that host knows"]);
    for words in ["host b: arrived, prepared", "host a: does not answer", "vmove host rm c"] {
        assert!(undecided.stdout.contains(words), "{words:?} is not said in: {}", undecided.stdout);
    }
    cluster.vmove("b", &["recover", VM, "--take-ownership", "--yes"]).refused(3, &["vmove host rm"]);
    cluster.vmove("b", &["host", "rm", "b", "--yes"]).refused(1, &["ask another one"]);
    cluster.vmove("b", &["host", "rm", "c"]).refused(2, &["--yes"]);
    let (code, said) = typed(&cluster, "b", &["host", "rm", "c"], "c");
    println!("{said}");
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("Given up with it: ballast") && said.contains("they do not answer: a."), "{said}");
    assert_eq!(names(&cluster, "b"), ["a", "b"]);

    // Now it may be taken over, by the VM's name and by nothing else.
    let offered = cluster.vmove("b", &["recover", VM]);
    println!("{}", offered.stdout);
    assert_eq!(offered.code, 3);
    let offer = "If host a is gone for ever, `vmove recover vm --take-ownership`:";
    assert!(
        offered.stdout.contains(offer) && offered.stdout.contains("two hosts run it"),
        "{}",
        offered.stdout
    );
    let take = ["recover", VM, "--take-ownership"];
    cluster.vmove("b", &take).refused(2, &["--yes"]);
    let (code, said) = typed(&cluster, "b", &take, "yes");
    assert!(code == 130 && said.contains("nothing was done"), "{code}: {said}");
    assert_eq!(cluster.until_state("b", VmState::Undecided).summary.host, "b");
    let (code, said) = typed(&cluster, "b", &take, VM);
    println!("{said}");
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("vm is host b's and running"), "{said}");

    // It goes on from where it was paused, and nothing is lost.
    cluster.until_state("b", VmState::Running);
    let there = cluster.console("b");
    there.heartbeat_after(last);
    assert_eq!(there.run(), before.run(), "started again");
    there.check();
    assert!(there.surely_flushed() >= flushed);

    // The source comes back. It has been superseded, and does not run the VM.
    cluster.restart_agent("a");
    until("the source knowing that it has lost", || {
        let report = report(&cluster, "a");
        let lost = report.hosts.iter().find(|held| held.host == "a")?.standing == StandingKind::Lost;
        (lost && report.settled && report.owner.as_deref() == Some("b")).then_some(())
    });
    assert_eq!(cluster.vm_process("a", VM), None);
    assert!(cluster.image("a", "fast").exists(), "what its guest wrote is nowhere else");
    // Asked to start it, a finds that it runs on b; with nobody to ask, it knows that it must not.
    cluster.vmove("a", &["start", VM]).refused(1, &["running already"]);
    cluster.kill_agent("b");
    cluster.vmove("a", &["start", VM]).refused(3, &["host b has taken it over", "never started here"]);
    assert_eq!(cluster.vm_process("a", VM), None);
    cluster.restart_agent("b");
    // So does the third, which is out: nobody answers it.
    cluster.start_agent(2);
    let shut_out = cluster.vmove("c", &["host", "ls"]).ok();
    assert!(shut_out.contains("was removed from the cluster"), "{shut_out}");
    assert_eq!(names(&cluster, "b"), ["a", "b"]);
    until("a having heard of that", || (names(&cluster, "a") == ["a", "b"]).then_some(()));

    // What is kept there goes by another word, and the VM moves back.
    cluster.vmove("b", &["recover", VM, "--discard", "a", "--yes"]).ok();
    cluster.until_clean("a");
    let last = there.goes_on().seq;
    cluster.relocate("b", &["--host", "a", "--audit"]);
    let back = cluster.console("a");
    back.heartbeat_after(last);
    back.check();
    watch.finish();
    cluster.until_clean("b");
    cluster.stop_clean("a");
}
