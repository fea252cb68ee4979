//! A guest on the network of two hosts: its clients notice nothing of moves, and what a host lacks is said before anything moves.

use vmove::api::types::VmState;
use vmove_tests::clients::{Announcements, Ping};
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::netns::{BRIDGE, Lan, Namespace};
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
const ANNOUNCEMENTS: &str = env!("CARGO_BIN_EXE_announcements");
/// The guest's addresses.
const IP: &str = "10.77.0.100";
const MAC: &str = "52:54:00:00:00:64";
/// Between two requests of `ping`, ms.
const INTERVAL_MS: f64 = 200.0;

fn on_the_network() -> Spec {
    let spec = Spec::default();
    Spec { words: format!("{} vmove.ip={IP}", spec.words), ..spec }
}

fn taps(host: &Namespace) -> Vec<String> {
    let links = host.ip("-o link").unwrap();
    let names = links.lines().filter_map(|line| line.split(": ").nth(1));
    names.filter(|name| name.starts_with("vm-")).map(str::to_owned).collect()
}

#[test]
fn ping_goes_on_through_moves_there_and_back_and_the_end_of_the_host_it_left() {
    const TEST: &str = "ping_goes_on_through_moves_there_and_back_and_the_end_of_the_host_it_left";
    if !kvm::usable(TEST) {
        return;
    }
    let Some(mut lan) = Lan::new(TEST, 2) else { return };
    let cluster = Cluster::start_on(&lan, PROGRAM, &["a", "b"], &[]);
    let net = format!("bridge={BRIDGE},mac={MAC}");
    cluster.create("a", VM, &on_the_network(), &["--net", &net]).ok();
    cluster.vmove("a", &["start", VM]).ok();
    cluster.console("a").heartbeat_after(2);
    assert_eq!(taps(lan.host(0)), ["vm-vm-0"]);
    let ping = Ping::start(lan.switch(), IP);
    ping.goes_on();
    let mut lost = ping.lost();

    for (from, to, words) in [
        ("a", "b", ["--host", "b", "--datastore", "bulk"]),
        ("b", "a", ["--host", "a", "--datastore", "fast"]),
    ] {
        let report = cluster.relocate(from, &words);
        ping.goes_on();
        let now = ping.lost();
        eprintln!(
            "{from} to {to}: downtime {:.1} ms, {} of ping's requests lost",
            report.downtime_ms,
            now - lost
        );
        // One request falls into the pause; a pause of several intervals swallows as many.
        assert!(now - lost <= 1 + (report.downtime_ms / INTERVAL_MS) as usize, "{report:?}");
        lost = now;
        cluster.until_state(to, VmState::Running);
        cluster.console(to).check();
        let left = usize::from(from == "b");
        until("the tap at the source being gone", || taps(lan.host(left)).is_empty().then_some(()));
        let shown = cluster.vmove(to, &["show", VM]).ok();
        assert!(shown.contains(&format!("network eth0: {MAC} on bridge {BRIDGE}")), "{shown}");
    }

    // The host it came from last is switched off: nothing is lost by that.
    lan.destroy(1);
    ping.goes_on();
    ping.goes_on();
    assert_eq!(ping.lost(), lost);
    let page =
        lan.switch().run("bash", &["-c", &format!("exec 3<>/dev/tcp/{IP}/80; echo GET / >&3; cat <&3")]);
    assert!(page.as_ref().is_ok_and(|page| page.contains("up_ms=")), "{page:?}");
    cluster.console("a").check();
}

#[test]
fn networks_that_a_host_lacks() {
    const TEST: &str = "networks_that_a_host_lacks";
    if !kvm::usable(TEST) {
        return;
    }
    let Some(lan) = Lan::new(TEST, 2) else { return };
    let (a, b) = (lan.host(0), lan.host(1));
    let cluster = Cluster::start_on(&lan, PROGRAM, &["a", "b"], &[]);
    for name in ["br1", "br2", "br3"] {
        a.ip(&format!("link add {name} type bridge")).unwrap();
        a.ip(&format!("link set {name} up")).unwrap();
    }
    a.ip("tuntap add mine mode tap").unwrap();
    a.ip("link set mine up").unwrap();
    b.ip("link add br2 type veth peer name other-end").unwrap();
    b.ip("link add br3 type bridge").unwrap();
    let nets = ["bridge=br0,mac=52:54:00:00:00:64", "bridge=br1", "bridge=br2", "bridge=br3", "tap=mine"];
    let words: Vec<&str> = nets.iter().flat_map(|net| ["--net", net]).collect();
    cluster.create("a", VM, &Spec::default(), &words).ok();
    cluster.vmove("a", &["start", VM]).ok();
    let console = cluster.console("a");
    console.heartbeat_after(2);
    assert_eq!(taps(a).len(), 4);
    cluster.create("b", "other", &Spec::default(), &["--net", "bridge=br0,mac=52:54:00:00:00:64"]).ok();

    let said = [
        "network eth0: MAC address 52:54:00:00:00:64 is that of VM other on host b",
        "network eth1: host b: there is no bridge br1",
        "network eth2: host b: br2 is no bridge",
        "network eth3: host b: bridge br3 is down",
        "network eth4: host b: there is no tap mine",
    ];
    cluster.vmove("a", &[VM, "--host", "b"]).refused(1, &said);
    cluster.vmove("a", &[VM, "--host", "b", "--dry-run"]).refused(1, &said);
    // Nobody may take what this VM has here, and what is not there does not start.
    let taken = ["52:54:00:00:00:64 is that of VM vm on host a"];
    cluster.create("a", "second", &Spec::default(), &["--net", nets[0]]).refused(1, &taken);
    cluster.create("a", "second", &Spec::default(), &["--net", "bridge=br9"]).ok();
    cluster.vmove("a", &["start", "second"]).refused(1, &["network eth0: host a: there is no bridge br9"]);
    cluster.create("a", "third", &Spec::default(), &["--net", "tap=mine"]).ok();
    cluster.vmove("a", &["start", "third"]).refused(1, &["network eth0: host a: tap mine is in use"]);
    console.goes_on();
    console.check();
    assert_eq!((taps(a).len(), taps(b).len()), (4, 0));

    // With everything in order it moves, also to a tap made by hand.
    cluster.vmove("b", &["rm", "other"]).ok();
    b.ip("link del br2").unwrap();
    for name in ["br1", "br2"] {
        b.ip(&format!("link add {name} type bridge")).unwrap();
    }
    b.ip("tuntap add mine mode tap").unwrap();
    for name in ["br1", "br2", "br3", "mine"] {
        b.ip(&format!("link set {name} up")).unwrap();
    }
    cluster.relocate("a", &["--host", "b"]);
    cluster.console("b").check();
    until("the taps at the source being gone", || taps(a).is_empty().then_some(()));
    assert_eq!(taps(b).len(), 4);
    assert!(a.ip("link show mine").is_ok(), "a tap made by hand stays");
    cluster.vmove("b", &["stop", VM]).ok();
    assert!(taps(b).is_empty());
}

#[test]
fn only_a_guest_that_goes_on_there_is_announced_be_it_moved_or_restored() {
    const TEST: &str = "only_a_guest_that_goes_on_there_is_announced_be_it_moved_or_restored";
    if !kvm::usable(TEST) {
        return;
    }
    let Some(lan) = Lan::new(TEST, 2) else { return };
    let (a, b) = (lan.host(0), lan.host(1));
    // The target has all that it needs, the guest's tap in its bridge included; the source's word alone is missing.
    let point = "target.tell-prepared";
    let cluster = Cluster::start_on(&lan, PROGRAM, &["a", "b"], &[point]);
    for host in [a, b] {
        host.ip("link add br1 type bridge").unwrap();
        host.ip("link set br1 up").unwrap();
    }
    let nets = [&format!("bridge={BRIDGE},mac={MAC}"), "bridge=br1"];
    cluster.create("a", VM, &on_the_network(), &["--net", nets[0], "--net", nets[1]]).ok();
    cluster.vmove("a", &["start", VM]).ok();
    let ping = Ping::start(lan.switch(), IP);
    ping.goes_on();

    let mut at_b = Announcements::start(ANNOUNCEMENTS, b);
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| cluster.vmove("a", &[VM, "--host", "b"]));
        cluster.stops.reached(point);
        assert_eq!(taps(b).len(), 2);
        cluster.vmove("a", &["cancel", VM]).ok();
        cluster.stops.release(point);
        moving.join().unwrap().refused(130, &["cancelled"]);
    });
    until("the taps at the target being gone", || taps(b).is_empty().then_some(()));
    ping.goes_on();
    assert_eq!(at_b.heard("rarp", MAC), 0, "the guest never was there");

    // It stops with its checkpoint and goes on at b, once that has what it needs: announced, its users find it there.
    cluster.vmove("a", &["checkpoint", VM, "one", "--stop"]).ok();
    cluster.until_state("a", VmState::Stopped);
    cluster.vmove("a", &["rm", VM]).ok();
    b.ip("link del br1").unwrap();
    let lacking = ["network eth1: host b: there is no bridge br1"];
    cluster.vmove("a", &["restore", VM, "one", "--host", "b"]).refused(1, &lacking);
    assert!(taps(b).is_empty());
    b.ip("link add br1 type bridge").unwrap();
    b.ip("link set br1 up").unwrap();
    cluster.vmove("a", &["restore", VM, "one", "--host", "b"]).ok();
    at_b.hears("rarp", MAC);
    ping.goes_on();
    cluster.console("b").check();
    let shown = cluster.vmove("b", &["show", VM]).ok();
    assert!(shown.contains(&format!("network eth0: {MAC} on bridge {BRIDGE}")), "{shown}");

    // As it is after a move.
    let mut at_a = Announcements::start(ANNOUNCEMENTS, a);
    cluster.relocate("b", &["--host", "a"]);
    at_a.hears("rarp", MAC);
    ping.goes_on();
    cluster.console("a").check();
}

#[test]
fn without_the_right_to_make_taps_networks_are_refused() {
    const TEST: &str = "without_the_right_to_make_taps_networks_are_refused";
    if !kvm::usable(TEST) {
        return;
    }
    let Some(lan) = Lan::new(TEST, 2) else { return };
    let mut cluster = Cluster::prepare(PROGRAM, &["a", "b"], &[]);
    cluster.place_on(&lan);
    // Host b's agent, and so its VMs, may do all but this.
    let words = ["--", "setpriv", "--bounding-set=-net_admin"].map(str::to_owned);
    cluster.hosts[1].inside.as_mut().unwrap().extend(words);
    for index in [0, 1] {
        cluster.join(index);
    }
    cluster.acquainted();
    let net = format!("bridge={BRIDGE},mac={MAC}");
    let said = ["network eth0: host b: no permission to make a tap", "CAP_NET_ADMIN is needed"];
    cluster.create("b", "other", &Spec::default(), &["--net", &format!("bridge={BRIDGE}")]).ok();
    cluster.vmove("b", &["start", "other"]).refused(1, &said);
    cluster.create("a", VM, &on_the_network(), &["--net", &net]).ok();
    cluster.vmove("a", &["start", VM]).ok();
    cluster.vmove("a", &[VM, "--host", "b"]).refused(1, &said);
    cluster.console("a").goes_on();
    cluster.vmove("a", &["stop", VM]).ok();
}
