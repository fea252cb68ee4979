//! What is refused is refused in clear words with the right exit code, and changes nothing: the guest goes on, nothing is left behind.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use vmove::api::types::{HostInfo, Offer, VmState};
use vmove_compute::process::protocol::Listening;
use vmove_mirror::wire::hello::{Hello, HelloAnswer, Role, VERSION};
use vmove_tests::cluster::Cluster;
use vmove_tests::console::Console;
use vmove_tests::guest::{DISK, Spec, VM};
use vmove_tests::wait::until;
use vmove_tests::{kvm, peer, runners};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

/// After a refusal: the guest goes on at a and is in order, b has nothing of it.
fn assert_nothing_happened(cluster: &Cluster, console: &Console) {
    cluster.until_state("a", VmState::Running);
    console.goes_on();
    console.check();
    if cluster.hosts.len() > 1 {
        cluster.until_clean("b");
    }
}

#[test]
fn places_and_names_that_do_not_exist() {
    if !kvm::usable("places_and_names_that_do_not_exist") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &Spec::default());
    let refused = |words: &[&str], code: i32, said: &[&str]| cluster.vmove("a", words).refused(code, said);
    refused(&[VM, "--host", "nowhere"], 1, &["nowhere", "a", "b"]);
    refused(&[VM, "--host", "b", "--datastore", "attic"], 1, &["attic", "b", "fast", "bulk"]);
    refused(&[VM, "--datastore", "attic"], 1, &["attic", "fast", "bulk"]);
    refused(&[VM, "--disk", "vdz=bulk"], 1, &["vdz", DISK]);
    refused(&["ghost", "--host", "b"], 1, &["ghost", "no VM"]);
    refused(&[VM, "--host", "a"], 1, &["there already"]);
    // All that stands in the way is said at once.
    refused(&[VM, "--disk", "vdz=bulk", "--host", "b", "--datastore", "attic"], 1, &["vdz", "attic"]);
    // A dry run says the same and has the same exit code.
    refused(&[VM, "--host", "b", "--datastore", "attic", "--dry-run"], 1, &["attic"]);
    // Not the agent's business at all: usage.
    refused(&[VM], 2, &["--host"]);
    refused(&[VM, "--host", "b", "--bandwidth", "fast"], 2, &["bandwidth"]);
    refused(&[VM, "--host", "b", "--disk", "vda"], 2, &["NAME=DATASTORE"]);
    refused(&["create", "ls", "--kernel", &cluster.kernel()], 2, &["command of vmove"]);
    refused(&["create", "x/y", "--kernel", &cluster.kernel()], 1, &["x/y"]);
    refused(&["start", VM], 1, &["running already"]);
    refused(&["rm", VM], 1, &["stop it first"]);
    assert_nothing_happened(&cluster, &console);
}

#[test]
fn a_datastore_that_is_too_small() {
    if !kvm::usable("a_datastore_that_is_too_small") {
        return;
    }
    let mut cluster = Cluster::prepare(PROGRAM, &["a", "b"], &[]);
    cluster.join(0);
    // Seen by the agent of b alone, and gone with it.
    let small = cluster.hosts[1].datastore("fast");
    cluster.hosts[1].before_agent = Some(format!("mount -t tmpfs -o size=8m none '{}'", small.display()));
    cluster.join(1);
    cluster.acquainted();
    let console = cluster.boot("a", &Spec::default());
    let answer = cluster.vmove("a", &[VM, "--host", "b"]);
    answer.refused(1, &["datastore fast on host b has", "free, the disks need"]);
    assert_nothing_happened(&cluster, &console);
    cluster.relocate("a", &["--host", "b", "--datastore", "bulk"]);
    cluster.console("b").check();
}

#[test]
fn a_name_that_is_taken_at_the_target() {
    if !kvm::usable("a_name_that_is_taken_at_the_target") {
        return;
    }
    let mut cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &Spec::default());
    cluster.create("b", VM, &Spec::default(), &[]).refused(1, &[VM, "a has a VM", "already"]);
    cluster.create("a", VM, &Spec::default(), &[]).refused(1, &[VM, "already"]);
    // Two hosts that do not see each other cannot know better.
    cluster.kill_agent("a");
    cluster.create("b", VM, &Spec::default(), &[]).ok();
    cluster.restart_agent("a");
    let there = cluster.host("b").remains();
    cluster.vmove("a", &[VM, "--host", "b"]).refused(1, &["host b has a VM", "already (stopped)"]);
    assert_eq!(cluster.host("b").remains(), there);
    cluster.until_state("a", VmState::Running);
    console.goes_on();
    console.check();
}

#[test]
fn a_cpu_feature_that_the_target_lacks() {
    if !kvm::usable("a_cpu_feature_that_the_target_lacks") {
        return;
    }
    let mut cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &Spec::default());
    let given = cluster.show("a").unwrap().definition.cpu_features;
    assert!(given.iter().any(|feature| feature == "sse2"), "{given:?}");
    cluster.kill_agent("b");
    let config = cluster.host("b").state.join("agent.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("cpu_mask = [\"sse2\"]\n{text}")).unwrap();
    cluster.restart_agent("b");
    cluster.vmove("a", &[VM, "--host", "b"]).refused(1, &["host b does not offer", "sse2"]);
    assert_nothing_happened(&cluster, &console);
}

#[test]
fn everything_that_stands_in_the_way_is_said_at_once() {
    if !kvm::usable("everything_that_stands_in_the_way_is_said_at_once") {
        return;
    }
    let mut cluster = Cluster::prepare(PROGRAM, &["a", "b"], &[]);
    cluster.join(0);
    let small = cluster.hosts[1].datastore("fast");
    cluster.hosts[1].before_agent = Some(format!("mount -t tmpfs -o size=8m none '{}'", small.display()));
    cluster.join(1);
    cluster.kill_agent("b");
    let config = cluster.host("b").state.join("agent.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("cpu_mask = [\"sse2\"]\n{text}")).unwrap();
    cluster.restart_agent("b");
    let console = cluster.boot("a", &Spec::default());
    let kernel = cluster.host("a").vm_dir(VM).join("kernel");
    let good = fs::read(&kernel).unwrap();
    // Another VM of this name, made while the hosts could not see each other.
    cluster.kill_agent("a");
    cluster.create("b", VM, &Spec::default(), &[]).ok();
    cluster.restart_agent("a");
    fs::write(&kernel, "no kernel").unwrap();

    let words = [VM, "--host", "b", "--disk", "vdz=bulk"];
    let all = [
        "not a kernel",
        "no disk \"vdz\"",
        "has a VM vm already (stopped)",
        "CPU features the guest has been given: sse2",
        "datastore fast on host b has",
        "there is a file at",
    ];
    let dry = cluster.vmove("a", &[&words[..], &["--dry-run", "--json"]].concat());
    dry.refused(1, &all);
    let plan: serde_json::Value = serde_json::from_str(&dry.stdout).unwrap();
    let blockers: Vec<&str> =
        plan["blockers"].as_array().unwrap().iter().filter_map(|b| b.as_str()).collect();
    assert_eq!(blockers.len(), all.len(), "{blockers:?}");
    for said in all {
        assert!(blockers.iter().any(|blocker| blocker.contains(said)), "{said}: {blockers:?}");
    }
    // The move itself says the same, and has done nothing.
    let there = cluster.host("b").remains();
    cluster.vmove("a", &words).refused(1, &all);
    assert_eq!(cluster.host("b").remains(), there);
    console.goes_on();
    // Nor does a VM that is stopped keep the rest from being said.
    cluster.vmove("a", &["stop", "--now", VM]).ok();
    let dry = cluster.vmove("a", &[&words[..], &["--dry-run"]].concat());
    dry.refused(
        1,
        &["only a running VM can be moved", "not a kernel", "vdz", "datastore fast on host b has"],
    );
    fs::write(&kernel, good).unwrap();
    cluster.vmove("a", &["start", VM]).ok();
}

#[test]
fn images_that_are_damaged() {
    if !kvm::usable("images_that_are_damaged") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &[]);
    let bad = cluster.path().join("bad.qcow2");
    // A qcow2 of version 3 whose L1 table lies far behind the end of the file.
    let mut header = vec![0_u8; 512];
    header[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, 3]);
    header[20..24].copy_from_slice(&16_u32.to_be_bytes());
    header[24..32].copy_from_slice(&(64_u64 << 20).to_be_bytes());
    header[36..40].copy_from_slice(&1_u32.to_be_bytes());
    header[40..48].copy_from_slice(&(1_u64 << 50).to_be_bytes());
    fs::write(&bad, &header).unwrap();
    let disk = format!("name={DISK},from={}", bad.display());
    let answer = cluster.create("a", VM, &Spec::default(), &["--disk", &disk]);
    answer.refused(1, &["bad.qcow2"]);
    assert!(cluster.show("a").is_none());
    cluster.until_clean("a");

    // The same happens to an image of a VM that is stopped.
    let console = cluster.boot("a", &Spec::default());
    console.goes_on();
    cluster.stop_clean("a");
    let image = cluster.image("a", "fast");
    let good = fs::read(&image).unwrap();
    fs::write(&image, &header).unwrap();
    cluster.vmove("a", &["start", VM]).refused(1, &[DISK]);
    assert_eq!(cluster.vm_process("a", VM), None);
    fs::write(&image, b"not an image").unwrap();
    cluster.vmove("a", &["start", VM]).refused(1, &[DISK]);
    // Put right, it starts.
    fs::write(&image, good).unwrap();
    cluster.start_again("a");
    cluster.console("a").check();
}

#[test]
fn kernels_that_are_missing_or_are_none() {
    if !kvm::usable("kernels_that_are_missing_or_are_none") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let none = cluster.path().join("letter.txt");
    fs::write(&none, "Dear kernel,\n").unwrap();
    let none = none.display().to_string();
    let create = |kernel: &str| cluster.vmove("a", &["create", VM, "--kernel", kernel]);
    create("/nonexistent/vmlinux").refused(1, &["/nonexistent/vmlinux"]);
    create(&none).refused(1, &["letter.txt is not a kernel", "neither an ELF file nor a bzImage"]);
    cluster.until_clean("a");

    // A running guest needs its kernel no more, until it is started again: it is not moved away from what it has not.
    let console = cluster.boot("a", &Spec::default());
    let kernel = cluster.host("a").vm_dir(VM).join("kernel");
    let name = kernel.display().to_string();
    let good = fs::read(&kernel).unwrap();
    fs::remove_file(&kernel).unwrap();
    cluster.vmove("a", &[VM, "--host", "b"]).refused(1, &["cannot read kernel", &name]);
    assert_nothing_happened(&cluster, &console);
    fs::write(&kernel, "no kernel").unwrap();
    cluster.vmove("a", &[VM, "--host", "b", "--dry-run"]).refused(1, &[&name, "not a kernel"]);
    cluster.vmove("a", &[VM, "--host", "b"]).refused(1, &[&name, "not a kernel"]);
    assert_nothing_happened(&cluster, &console);
    fs::write(&kernel, good).unwrap();
    cluster.relocate("a", &["--host", "b"]);
    cluster.console("b").check();
}

#[test]
fn a_second_move_of_a_vm_on_the_move() {
    if !kvm::usable("a_second_move_of_a_vm_on_the_move") {
        return;
    }
    let point = "source.send-pages";
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    let before = cluster.boot("a", &Spec::default());
    let id = cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    cluster.vmove("a", &[VM, "--host", "b"]).refused(1, &["on the move"]);
    cluster.vmove("b", &[VM, "--datastore", "bulk"]).refused(1, &["on the move"]);
    cluster.vmove("a", &["stop", VM, "--now"]).refused(1, &["on the move", "cancel"]);
    cluster.vmove("a", &["rm", VM]).refused(1, &[VM]);
    before.goes_on();
    let last = before.heartbeats().last().unwrap().seq;
    cluster.stops.release(point);
    cluster.until_state("b", VmState::Running);
    let console = cluster.console("b");
    console.heartbeat_after(last);
    assert_eq!(console.run(), before.run(), "started again");
    console.check();
    // Until then the answer would be that it is too late.
    cluster.until_clean("a");
    cluster.vmove("a", &["cancel", &id]).refused(1, &["ended"]);
}

#[test]
fn a_cancelled_move_leaves_no_trace() {
    if !kvm::usable("a_cancelled_move_leaves_no_trace") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &Spec::default());
    // So slow that it cannot have ended before it is cancelled.
    let id = cluster.begin_move("a", &["--host", "b", "--bandwidth", "64KiB/s"]);
    cluster.vmove("a", &["cancel", VM]).ok();
    let status: serde_json::Value = {
        let answer = cluster.vmove("a", &["status", &id, "--json"]);
        serde_json::from_str(&answer.stdout).unwrap()
    };
    assert_eq!(status["report"]["outcome"], "cancelled", "{status}");
    assert_nothing_happened(&cluster, &console);
    cluster.relocate("a", &["--host", "b"]);
    cluster.console("b").check();
}

#[test]
fn hosts_of_another_cluster() {
    if !kvm::usable("hosts_of_another_cluster") {
        return;
    }
    let mut cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &Spec::default());
    // A host named b, of a cluster of its own, is where a believes b to be.
    let mut other = Cluster::prepare(PROGRAM, &["b"], &[]);
    other.join(0);
    let true_b = cluster.hosts[1].address.clone();
    let (a_tls, b_tls) = (peer::as_host(&cluster.host("a").state), peer::as_host(&other.host("b").state));
    let head = "GET /v1/host";
    assert_eq!(peer::request(a_tls.clone(), &true_b, "b", head, b"").unwrap().status, 200);
    let wrong_server =
        peer::request(a_tls, &other.host("b").address, "b", head, b"").unwrap_err().to_string();
    assert!(wrong_server.contains("certificate"), "{wrong_server}");
    // The stranger does not believe b, and one that believes everybody is not believed by b.
    assert!(peer::request(b_tls, &true_b, "b", head, b"").is_err());
    let trusting = peer::with_foreign_certificate(&other.host("b").state, &cluster.host("a").state);
    assert!(peer::request(trusting, &true_b, "b", head, b"").is_err());
    let nobody = peer::as_nobody(&cluster.host("a").state);
    for (head, body) in
        [("GET /v1/host", ""), ("GET /v1/vms", ""), ("POST /v1/incoming", "{}"), ("DELETE /v1/vms/vm", "")]
    {
        let answer = peer::request(nobody.clone(), &true_b, "b", head, body.as_bytes()).unwrap();
        assert_eq!(answer.status, 403, "{head}: {}", answer.body);
    }

    // The same through the agent: the move is refused.
    cluster.kill_agent("a");
    cluster.kill_agent("b");
    let hosts = cluster.host("a").state.join("hosts.toml");
    let text = fs::read_to_string(&hosts).unwrap_or_default().replace(&true_b, &other.host("b").address);
    fs::write(&hosts, text).unwrap();
    cluster.restart_agent("a");
    let answer = cluster.vmove("a", &[VM, "--host", "b"]);
    answer.refused(1, &["b"]);
    assert!(answer.stderr.contains("certificate") || answer.stderr.contains("TLS"), "{}", answer.stderr);
    assert_eq!(other.host("b").remains(), Vec::<String>::new());
    console.goes_on();
    console.check();
}

/// Sends bytes to a port and gives what comes back until the other side closes.
fn send(address: (&str, u16), bytes: &[u8], close: bool) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).unwrap();
    // Only ends a test that hangs.
    socket.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
    // The other side may have heard enough before it has heard all.
    let _ = socket.write_all(bytes);
    if close {
        let _ = socket.shutdown(std::net::Shutdown::Write);
    }
    let mut answer = Vec::new();
    // Closed with bytes unread: an error, and an end.
    let _ = socket.read_to_end(&mut answer);
    answer
}

fn listening(cluster: &Cluster) -> Listening {
    until("the target listening", || runners::status(&cluster.host("b").vm_dir(VM))?.listening)
}

fn ticket(listening: &Listening) -> [u8; 16] {
    let mut ticket = [0; 16];
    for (index, byte) in ticket.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&listening.ticket[2 * index..2 * index + 2], 16).unwrap();
    }
    ticket
}

/// Strangers at the port where the target awaits its source: turned away, and the move they disturbed goes well.
fn strangers_at_the_data_port(words: &[&str], plain: bool) {
    let point = "source.connect";
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    let before = cluster.boot("a", &Spec::default());
    cluster.begin_move("a", &[&["--host", "b"], words].concat());
    cluster.stops.reached(point);
    let listening = listening(&cluster);
    let address = (listening.ip.as_str(), listening.port);
    let right = Hello::new(Role::Control, ticket(&listening), 1);
    let wrong_ticket = Hello::new(Role::Control, [0; 16], 1).encode();
    let other_version = Hello { min_version: 900, max_version: 999, ..right.clone() }.encode();
    let other_role = Hello { role: Role::Pages(200), ..right.clone() }.encode();
    let answers = [
        send(address, &wrong_ticket, true),
        send(address, &other_version, true),
        send(address, &other_role, true),
        send(address, &[0xff; 4096], true),
        send(address, &vec![0x16; 8 << 20], true),
        send(address, &right.encode()[..17], true),
        send(address, b"GET / HTTP/1.1\r\n\r\n", true),
        send(address, b"", true),
    ];
    if plain {
        for (answer, status) in answers.iter().zip([2, 1, 3]) {
            assert_eq!((answer.len(), answer.get(6)), (HelloAnswer::BYTES, Some(&status)), "{answer:?}");
        }
        assert!(answers[3..].iter().all(Vec::is_empty), "{answers:?}");
    } else {
        // Nothing of the protocol is said to who does not speak TLS: at most an alert (content type 21, RFC 8446 5.1).
        assert!(answers.iter().all(|answer| answer.first().is_none_or(|kind| *kind == 21)), "{answers:?}");
    }
    // And some that connect and say nothing, for as long as the move takes.
    let silent: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
    before.goes_on();
    let last = before.heartbeats().last().unwrap().seq;
    cluster.stops.release(point);
    cluster.until_state("b", VmState::Running);
    drop(silent);
    let console = cluster.console("b");
    console.heartbeat_after(last);
    assert_eq!(console.run(), before.run(), "started again");
    console.check();
}

#[test]
fn strangers_at_a_plain_data_port() {
    if kvm::usable("strangers_at_a_plain_data_port") {
        strangers_at_the_data_port(&["--insecure-plain"], true);
    }
}

#[test]
fn strangers_at_a_tls_data_port() {
    if kvm::usable("strangers_at_a_tls_data_port") {
        strangers_at_the_data_port(&[], false);
    }
}

#[test]
fn a_source_that_talks_rubbish() {
    if !kvm::usable("a_source_that_talks_rubbish") {
        return;
    }
    let point = "source.connect";
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    let console = cluster.boot("a", &Spec::default());
    // Kind 1 with a head of 4 GiB, kind 99, a wrong checksum, half a frame; see `vmove_mirror::wire::frame`.
    let oversized = b"VM\x01\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let unknown = b"VM\x63\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let wrong_sum = b"VM\x01\0\x01\0\0\0\0\0\0\0\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08\x09";
    let rubbish: [&[u8]; 4] = [oversized, unknown, wrong_sum, b"VM\x01\0"];
    for bytes in rubbish {
        let id = cluster.begin_move("a", &["--host", "b", "--insecure-plain"]);
        cluster.stops.reached(point);
        let listening = listening(&cluster);
        let target = cluster.vm_process("b", VM).unwrap();
        let ticket = ticket(&listening);
        let call = |role| {
            let mut link = TcpStream::connect((listening.ip.as_str(), listening.port)).unwrap();
            link.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
            link.write_all(&Hello::new(role, ticket, 1).encode()).unwrap();
            let mut answer = [0; HelloAnswer::BYTES];
            link.read_exact(&mut answer).unwrap();
            assert_eq!(HelloAnswer::decode(&answer).unwrap(), VERSION);
            link
        };
        let links = [Role::Control, Role::Pages(0), Role::Disk(0)].map(call);
        for mut link in &links {
            // The first of them may have ended the arrival already.
            let _ = link.write_all(bytes);
            let _ = link.shutdown(std::net::Shutdown::Write);
        }
        let gives_up = || {
            until("the target giving up", || (cluster.vm_process("b", VM) != Some(target)).then_some(()));
        };
        // Half a frame is a connection that was lost: the target waits for the source to call again, and ends when the source, whose
        // place was taken, does not.
        if bytes.len() > 4 {
            gives_up();
        }
        cluster.stops.release(point);
        gives_up();
        until("the end of the move", || {
            let answer = cluster.vmove("a", &["status", &id, "--json"]);
            let status: serde_json::Value = serde_json::from_str(&answer.stdout).ok()?;
            (status["report"]["outcome"] == "aborted").then_some(())
        });
        assert_nothing_happened(&cluster, &console);
        cluster.stops.hold(point);
    }
    cluster.stops.release(point);
    cluster.relocate("a", &["--host", "b"]);
    cluster.console("b").check();
}

#[test]
fn rubbish_at_the_agents_port() {
    if !kvm::usable("rubbish_at_the_agents_port") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let console = cluster.boot("a", &Spec::default());
    let address = cluster.host("b").address.clone();
    let (ip, port) = address.split_once(':').unwrap();
    let raw = (ip, port.parse().unwrap());
    for bytes in [
        &b""[..],
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 4096],
        b"\x16\x03\x01\x02\x00\x01",
        &vec![0x16; 8 << 20],
    ] {
        let answer = send(raw, bytes, true);
        assert!(answer.first().is_none_or(|kind| *kind == 21), "{answer:?}");
    }
    let silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(&address).unwrap()).collect();

    let tls = peer::as_host(&cluster.host("a").state);
    let call = |head: &str, body: &[u8]| peer::request(tls.clone(), &address, "b", head, body).unwrap();
    let offer = offer(&cluster);
    let with = |change: &dyn Fn(&mut Offer)| {
        let mut changed = offer.clone();
        change(&mut changed);
        serde_json::to_vec(&changed).unwrap()
    };
    let good = call("POST /v1/incoming", &with(&|offer| offer.dry_run = true));
    assert_eq!(good.status, 200, "{}", good.body);
    assert!(good.body.contains("\"blockers\":[]"), "{}", good.body);
    let late = call("POST /v1/incoming", &with(&|offer| (offer.dry_run, offer.clock_ms) = (true, Some(0))));
    assert!(late.status == 200 && late.body.contains("the clocks of hosts a and b are"), "{}", late.body);
    let refused: [(&str, &[u8], &str); 8] = [
        ("POST /v1/incoming", &with(&|offer| offer.version = 99), "version"),
        ("POST /v1/incoming", &with(&|offer| offer.from_host = "b".into()), "in the name of"),
        ("POST /v1/incoming", &with(&|offer| offer.definition.name = "../../etc".into()), "name"),
        ("POST /v1/incoming", &with(&|offer| offer.definition.memory_mib = u64::MAX), "memory"),
        ("POST /v1/incoming", &with(&|offer| offer.move_id = "../x".into()), "move id"),
        ("POST /v1/incoming", b"{\"version\": 1", "EOF"),
        ("PUT /v1/incoming/no-such-move/files/kernel", &[0; 100], "no move"),
        ("GET /v1/nothing", b"", "no such call"),
    ];
    for (head, body, word) in refused {
        let answer = call(head, body);
        assert!((400..500).contains(&answer.status), "{head}: {} {}", answer.status, answer.body);
        assert!(
            answer.body.contains(word) && answer.body.contains("\"code\""),
            "{head}, {word}: {}",
            answer.body
        );
    }
    // Refused as it comes: the answer, or the end of the connection with most of the body unread.
    let endless = vec![b' '; 64 << 20];
    if let Ok(answer) = peer::request(tls, &address, "b", "POST /v1/incoming", &endless) {
        assert_eq!(answer.status, 413, "{}", answer.body);
    }
    drop(silent);
    assert_nothing_happened(&cluster, &console);
    cluster.relocate("a", &["--host", "b"]);
    cluster.console("b").check();
}

/// An offer of the VM of a, as its agent would make it.
fn offer(cluster: &Cluster) -> Offer {
    let vm = cluster.show("a").unwrap();
    let host: HostInfo = {
        let tls = peer::as_host(&cluster.host("b").state);
        let answer = peer::request(tls, &cluster.host("a").address, "a", "GET /v1/host", b"").unwrap();
        serde_json::from_str(&answer.body).unwrap()
    };
    let disk = &vm.definition.disks[0];
    let digest = "0".repeat(64);
    serde_json::from_value(serde_json::json!({
        "version": host.peer_version,
        "move_id": uuid::Uuid::new_v4().to_string(),
        "from_host": "a",
        "definition": vm.definition,
        "generation": vm.summary.generation + 1,
        "disks": [{
            "image": {
                "name": disk.name,
                "format": disk.format,
                "virtual_bytes": disk.size_bytes,
                "cluster_bytes": 65536,
                "allocated_bytes": 1 << 20,
            },
            "source_datastore_id": host.datastores[0].id,
            "datastore": null,
        }],
        "plain": false,
        "cpu_features": [],
        "kernel": {"bytes": 100, "blake3": digest},
        "initrd": null,
        "dry_run": false,
    }))
    .unwrap()
}
