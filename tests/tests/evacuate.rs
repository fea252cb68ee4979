//! A host is emptied and filled again: three hosts in network namespaces, twelve guests that write RAM and disk, a client and an agent
//! that are killed in the middle. And what keeps VMs away from a host, and plans that say what cannot be.

use std::process::{Child, Stdio};

use serde_json::Value;
use vmove::api::types::{VmList, VmState, VmSummary};
use vmove::evacuation::report::{EvacuationReport, Outcome};
use vmove_tests::cluster::Cluster;
use vmove_tests::console::Console;
use vmove_tests::guest::{DISK, Spec};
use vmove_tests::kvm;
use vmove_tests::netns::Lan;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
const HOSTS: [&str; 3] = ["a", "b", "c"];
const VMS_PER_HOST: usize = 4;

fn small() -> Spec {
    let words = "vmove.fill_mib=12 vmove.ram_mib=4 vmove.ram_rate=100 vmove.disk_mib=8 vmove.disk_rate=40 vmove.flush_ms=200 \
                 vmove.heartbeat_ms=200";
    Spec { vcpus: 1, memory_mib: 48, disk_mib: 64, words: words.to_owned() }
}

/// All VMs, by name, from the agent of `host`; each is on one host only once nothing moves.
fn vms(cluster: &Cluster, host: &str) -> Vec<VmSummary> {
    let list: VmList = cluster.vmove(host, &["ls", "--json"]).json();
    list.vms
}

fn on(cluster: &Cluster, host: &str) -> Vec<String> {
    let here = vms(cluster, "b").into_iter().filter(|vm| vm.host == host);
    here.map(|vm| vm.name).collect()
}

fn console(cluster: &Cluster, host: &str, vm: &str) -> Console {
    Console::attach(&cluster.host(host).vm_dir(vm).join("console.sock"))
}

/// Begins a command in the background, against the agent of b.
fn begin(cluster: &Cluster, words: &[&str]) -> Child {
    let mut command = cluster.command();
    command.arg("--agent").arg(cluster.host("b").state.join("agent.sock")).args(words);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Every guest goes on, and its RAM and disk are in order.
fn all_in_order(cluster: &Cluster) {
    let all = vms(cluster, "b");
    assert_eq!(all.len(), HOSTS.len() * VMS_PER_HOST, "{all:?}");
    for vm in &all {
        assert_eq!(vm.state, VmState::Running, "{vm:?}");
        let console = console(cluster, &vm.host, &vm.name);
        console.goes_on();
        console.check();
    }
}

/// The sums of a report are those of its parts.
fn adds_up(report: &EvacuationReport) {
    let real: Vec<_> = report.vms.iter().filter_map(|vm| vm.real).collect();
    let totals = &report.totals;
    assert_eq!(totals.vms, report.vms.len());
    assert_eq!(totals.moved, report.vms.iter().filter(|vm| vm.outcome == Outcome::Moved).count());
    assert_eq!(totals.bytes, real.iter().map(|figures| figures.bytes).sum::<u64>());
    assert_eq!(totals.attempts, report.vms.iter().map(|vm| vm.attempts).sum::<u32>());
    assert_eq!(totals.stays, report.stays.len());
    assert!(real.iter().all(|figures| figures.bytes > 0 && figures.seconds <= totals.seconds + 1.0));
    for vm in &report.vms {
        let word = match vm.real {
            Some(real) => format!("{:.1} s, {:.0} ms, {} bytes", real.seconds, real.downtime_ms, real.bytes),
            None => "no figures".to_owned(),
        };
        let predicted = vm.predicted;
        eprintln!(
            "{} {} -> {} {:?} after {} tries: {word} (predicted {:.1} s, {:.0} ms, {} bytes)",
            vm.vm,
            vm.from,
            vm.to,
            vm.outcome,
            vm.attempts,
            predicted.seconds,
            predicted.downtime_ms,
            predicted.bytes
        );
    }
}

#[test]
fn a_host_is_emptied_over_the_deaths_of_a_client_and_an_agent_and_filled_again() {
    const TEST: &str = "a_host_is_emptied_over_the_deaths_of_a_client_and_an_agent_and_filled_again";
    if !kvm::usable(TEST) {
        return;
    }
    let Some(lan) = Lan::new(TEST, HOSTS.len()) else { return };
    let mut cluster = Cluster::start_on(&lan, PROGRAM, &HOSTS, &[]);
    for host in HOSTS {
        for number in 0..VMS_PER_HOST {
            let name = format!("{host}{number}");
            // One of a and one of b must not meet on one host.
            let apart: &[&str] = if host != "c" && number == 0 { &["--apart", "db"] } else { &[] };
            cluster.create(host, &name, &small(), apart).ok();
            cluster.vmove(host, &["start", &name]).ok();
        }
    }
    for vm in vms(&cluster, "b") {
        console(&cluster, &vm.host, &vm.name).heartbeat_after(2);
    }
    let had = on(&cluster, "a");

    nothing_comes_to_a_host_in_maintenance(&cluster);
    let plan = cluster.path().join("plan.json");
    let plan = plan.to_str().unwrap();
    // Slow enough for something to happen in the middle.
    let words =
        ["evacuate", "a", "--dry-run", "--save", plan, "--parallel", "2", "--bandwidth", "12MB/s", "--json"];
    // Something only the agent of b knows of: a file in the way of a3.
    let in_the_way = cluster.host("b").datastore("fast").join("a3");
    std::fs::create_dir(&in_the_way).unwrap();
    std::fs::write(in_the_way.join("vda.qcow2"), "mine").unwrap();
    let planned: Value = cluster.vmove("b", &words).json();
    std::fs::remove_dir_all(&in_the_way).unwrap();
    let target = |vm: &str| {
        let steps = planned["moves"].as_array().unwrap();
        steps.iter().find(|step| step["vm"] == vm).unwrap()["to"].clone()
    };
    assert_eq!((target("a0"), target("a3")), ("c".into(), "c".into()), "{planned}");
    assert_eq!(planned["moves"].as_array().unwrap().len(), VMS_PER_HOST);
    assert_eq!((&planned["at_once"], planned["blocked"].as_array().unwrap().len()), (&Value::from(2), 0));
    impossible_plans_begin_nothing(&cluster, plan);

    // The client dies with moves under way. They go on.
    let carry_out = ["evacuate", "--plan", plan, "--json"];
    let mut client = begin(&cluster, &carry_out);
    until("a VM on the move", || {
        vms(&cluster, "b").iter().any(|vm| vm.state == VmState::Moving).then_some(())
    });
    client.kill().unwrap();
    client.wait().unwrap();
    // The next one finds them. The agent that leads them dies, and is started again.
    let client = begin(&cluster, &carry_out);
    until("moves after the client's death", || {
        let left = vms(&cluster, "b").iter().filter(|vm| vm.host == "a").count();
        (left < VMS_PER_HOST).then_some(())
    });
    cluster.kill_agent("a");
    cluster.restart_agent("a");
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let report: EvacuationReport = serde_json::from_slice(&output.stdout).unwrap();
    adds_up(&report);
    assert!(report.complete && report.vms.len() == VMS_PER_HOST, "{report:?}");
    assert!(report.vms.iter().all(|vm| vm.outcome.has_left()), "{report:?}");
    assert_eq!(on(&cluster, "a"), [""; 0]);
    assert!(on(&cluster, "c").contains(&"a0".to_owned()), "on b is one of its group");
    until("nothing being left on a", || cluster.host("a").remains().is_empty().then_some(()));
    all_in_order(&cluster);
    // A plan that is done is done.
    let again: EvacuationReport = cluster.vmove("b", &carry_out).json();
    assert!(again.complete && again.totals.attempts == 0, "{again:?}");

    // Out of maintenance the empty host is the one to even out with; and everything comes back.
    cluster.vmove("b", &["host", "maintenance", "off", "a"]).ok();
    let balance: Value = cluster.vmove("c", &["balance", "--dry-run", "--json"]).json();
    let moves = balance["moves"].as_array().unwrap();
    assert!(!moves.is_empty() && moves.iter().all(|step| step["to"] == "a"), "{balance}");
    let back: EvacuationReport =
        cluster.vmove("b", &["host", "maintenance", "off", "a", "--return", "--json"]).json();
    adds_up(&back);
    assert!(back.complete && back.totals.moved == VMS_PER_HOST, "{back:?}");
    assert_eq!(on(&cluster, "a"), had);
    assert!(vms(&cluster, "b").iter().all(|vm| vm.disks[0].name == DISK && vm.disks[0].datastore == "fast"));
    all_in_order(&cluster);

    // What cannot move is said, and the rest moves.
    cluster.vmove("c", &["checkpoint", "c3", "moment"]).ok();
    cluster.vmove("c", &["stop", "--now", "c3"]).ok();
    let stopped = cluster.vmove("c", &["evacuate", "c", "--dry-run"]);
    stopped.refused(1, &["1 of the VMs of host c"]);
    assert!(stopped.stdout.contains("c3 cannot move:\n  - it does not run"), "{}", stopped.stdout);
    let rest = cluster.vmove("c", &["evacuate", "c", "--to", "a", "--json"]);
    rest.refused(1, &["host c is not empty", "c3: it does not run"]);
    let rest: EvacuationReport = serde_json::from_str(&rest.stdout).unwrap();
    adds_up(&rest);
    assert!(!rest.complete && rest.totals.moved == 3 && rest.vms.iter().all(|vm| vm.to == "a"), "{rest:?}");
    assert_eq!(on(&cluster, "c"), ["c3"]);
    cluster.vmove("c", &["host", "maintenance", "on", "c", "--no-evacuate"]).ok();
    for words in [&["start", "c3"][..], &["restore", "c3", "moment"][..]] {
        cluster.vmove("c", words).refused(1, &["host c is in maintenance"]);
    }
}

fn nothing_comes_to_a_host_in_maintenance(cluster: &Cluster) {
    cluster.vmove("c", &["host", "maintenance", "on", "a", "--no-evacuate"]).ok();
    let listed = cluster.vmove("b", &["host", "ls"]).ok();
    let line = listed.lines().find(|line| line.starts_with("a ")).unwrap();
    assert!(line.ends_with("in maintenance"), "{listed}");
    let why = ["host a is in maintenance", "vmove host maintenance off a"];
    cluster.create("a", "new", &small(), &[]).refused(1, &why);
    cluster.vmove("b", &["b0", "--host", "a"]).refused(1, &why);
    cluster.vmove("a", &["start", "a0"]).refused(1, &why);
    cluster.vmove("b", &["evacuate", "b", "--to", "a", "--dry-run"]).refused(1, &["4 of the VMs"]);
    let said = cluster.vmove("b", &["evacuate", "b", "--to", "a", "--dry-run"]).stdout;
    assert!(said.contains("b0 cannot move:\n  - host a: it is in maintenance"), "{said}");
    assert_eq!(on(cluster, "a").len(), VMS_PER_HOST);
    cluster.vmove("b", &["host", "maintenance", "on", "nowhere"]).refused(1, &["nowhere"]);
}

/// A good plan, edited by hand.
fn impossible_plans_begin_nothing(cluster: &Cluster, plan: &str) {
    let good: Value = serde_json::from_slice(&std::fs::read(plan).unwrap()).unwrap();
    let before = vms(cluster, "b");
    let edited = format!("{plan}.edited");
    let refused = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let mut bad = good.clone();
        change(&mut bad);
        std::fs::write(&edited, bad.to_string()).unwrap();
        cluster.vmove("b", &["evacuate", "--plan", &edited]).refused(1, words);
    };
    refused(&|plan| plan["plan"]["moves"][0]["to"] = "nowhere".into(), &["no host \"nowhere\""]);
    refused(&|plan| plan["plan"]["moves"][1]["vm"] = "ghost".into(), &["\"ghost\"", "no such VM"]);
    refused(&|plan| plan["plan"]["moves"][2]["disks"][DISK] = "moon".into(), &["no datastore \"moon\""]);
    refused(&|plan| plan["plan"]["moves"][3]["from"] = "b".into(), &["from b"]);
    refused(&|plan| plan["plan"]["at_once"] = 0.into(), &["0 moves at once"]);
    refused(&|plan| plan["limits"]["parallel"] = 0.into(), &["parallel is 0"]);
    refused(&|plan| plan["plan"]["moves"][0]["speed"] = 9.into(), &["unknown field `speed`"]);
    // Two of a group on one host.
    let together = |plan: &mut Value| {
        for step in plan["plan"]["moves"].as_array_mut().unwrap() {
            step["to"] = "b".into();
        }
    };
    refused(&together, &["group db"]);
    std::fs::write(&edited, "{").unwrap();
    cluster.vmove("b", &["evacuate", "--plan", &edited]).refused(1, &["this is no plan"]);
    cluster.vmove("b", &["evacuate", "--plan", "/nonexistent"]).refused(1, &["/nonexistent"]);
    cluster.vmove("b", &["evacuate", "--plan", &edited, "--parallel", "3"]).refused(2, &["--parallel"]);
    cluster.vmove("b", &["evacuate", "nowhere"]).refused(1, &["nowhere"]);
    cluster.vmove("b", &["balance"]).refused(2, &["--dry-run"]);
    assert_eq!(vms(cluster, "b"), before);
}
