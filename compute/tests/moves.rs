//! Moves between VM processes (each run on a thread here), on real KVM, without agents: host and datastore, datastore only, and
//! arrivals that are refused.

mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use support::kvm_usable;
use vmove_compute::process::console::wire::{self, ClientMsg, Decoder, ServerMsg};
use vmove_compute::process::{self, protocol::*};
use vmove_storage::{ImageFormat, ImageSpec};

const MIB: u64 = 1 << 20;

/// One VM process on a thread, with its directory.
struct Process {
    dir: PathBuf,
    ended: thread::JoinHandle<Result<(), process::ProcessError>>,
    console: Arc<Mutex<String>>,
}

fn definition(vcpus: u8, memory_mib: u64, words: &str) -> VmDefinition {
    VmDefinition {
        name: "vm".into(),
        vcpus,
        memory_mib,
        cmdline: format!("vmove.cpus={vcpus} vmove.heartbeat_ms=50 {words}"),
        cpu_features: vec![],
        disks: vec![DiskDefinition {
            name: "vda".into(),
            format: DiskFormat::Qcow2,
            size_bytes: 256 * MIB,
            datastore: "d".into(),
            read_only: false,
        }],
        networks: vec![],
        apart: Vec::new(),
    }
}

/// A new client of a process's console.
fn attach(dir: &Path) -> UnixStream {
    let mut socket = until("its console", || UnixStream::connect(dir.join(CONSOLE_SOCKET)).ok());
    let client = uuid::Uuid::new_v4().into_bytes();
    let attach = ClientMsg::Attach { version: wire::VERSION, client, seen: None };
    socket.write_all(&wire::encode(&attach).unwrap()).unwrap();
    socket
}

impl Process {
    fn start(root: &Path, name: &str, vm: &VmDefinition, generation: u64, start: Start) -> Self {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let kernel = dir.join("kernel");
        std::fs::write(&kernel, vmove_guest_image::GUEST_ELF).unwrap();
        let image = dir.join("vda.qcow2");
        let arrives = start != Start::Boot;
        if start == Start::Boot && !vm.disks.is_empty() {
            vmove_storage::create(&image, &ImageSpec::new(ImageFormat::Qcow2, 256 * MIB)).unwrap();
        }
        let spec = LaunchSpec {
            vm: vm.clone(),
            kernel,
            initrd: None,
            host: name.into(),
            generation,
            disks: vm
                .disks
                .iter()
                .map(|disk| DiskPlacement {
                    name: disk.name.clone(),
                    datastore: "d".into(),
                    path: image.clone(),
                })
                .collect(),
            identity: None,
            start,
        };
        std::fs::write(dir.join(LAUNCH_FILE), serde_json::to_vec(&spec).unwrap()).unwrap();
        let vm_dir = dir.clone();
        let ended = thread::spawn(move || process::run(&vm_dir));
        let console = Arc::new(Mutex::new(String::new()));
        let text = Arc::clone(&console);
        let mut socket = attach(&dir);
        thread::spawn(move || {
            let (mut buffer, mut decoder) = ([0; 4096], Decoder::default());
            // What the guest said before it came here is not kept: what is said here shows that it goes on.
            let mut said_here_from = 0;
            while let Ok(n @ 1..) = socket.read(&mut buffer) {
                decoder.push(&buffer[..n]);
                while let Some(message) = decoder.take().unwrap() {
                    match message {
                        ServerMsg::Attached { end, .. } if arrives => said_here_from = end,
                        ServerMsg::Output { at, bytes } => {
                            let before = (said_here_from.saturating_sub(at) as usize).min(bytes.len());
                            text.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[before..]));
                        }
                        _ => {}
                    }
                }
            }
        });
        Self { dir, ended, console }
    }

    fn ask(&self, request: &Request) -> Reply {
        let mut socket =
            until("its control socket", || UnixStream::connect(self.dir.join(CONTROL_SOCKET)).ok());
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        socket.write_all(&line).unwrap();
        let mut reply = String::new();
        BufReader::new(socket).read_line(&mut reply).unwrap();
        serde_json::from_str(&reply).unwrap()
    }

    /// Asks a process that may be ending.
    fn ask_if_there(&self, request: &Request) -> Option<Reply> {
        let mut socket = UnixStream::connect(self.dir.join(CONTROL_SOCKET)).ok()?;
        socket.write_all(&serde_json::to_vec(request).ok()?).ok()?;
        socket.write_all(b"\n").ok()?;
        let mut reply = String::new();
        BufReader::new(socket).read_line(&mut reply).ok()?;
        serde_json::from_str(&reply).ok()
    }

    fn status(&self) -> ProcessStatus {
        let Reply::Status(status) = self.ask(&Request::Status) else { panic!("no status") };
        status
    }

    fn type_in(&self, keys: &[u8]) {
        let mut socket = attach(&self.dir);
        let keys = ClientMsg::Keys { at: 0, bytes: keys.to_vec() };
        socket.write_all(&wire::encode(&keys).unwrap()).unwrap();
        // Until they are taken: who hangs up before may have changed its mind.
        let (mut buffer, mut decoder) = ([0; 4096], Decoder::default());
        loop {
            let n = socket.read(&mut buffer).unwrap();
            assert!(n > 0, "the console hung up");
            decoder.push(&buffer[..n]);
            while let Some(message) = decoder.take().unwrap() {
                if matches!(message, ServerMsg::Taken { .. }) {
                    return;
                }
            }
        }
    }

    /// The newest complete line of that kind after the first `skip` bytes of output.
    fn line(&self, kind: &str, skip: usize) -> HashMap<String, u64> {
        until(kind, || {
            let text = self.console.lock().unwrap();
            let complete = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
            if let Some(error) = complete.lines().find(|line| line.starts_with("error ")) {
                panic!("the guest says: {error}");
            }
            let rest = complete.get(skip..)?;
            let line = rest.lines().rev().find(|line| line.starts_with(&format!("{kind} ")))?;
            line.split(' ')
                .skip(1)
                .map(|pair| pair.split_once('=').and_then(|(k, v)| Some((k.to_owned(), v.parse().ok()?))))
                .collect()
        })
    }

    fn check_all(&self) -> HashMap<String, u64> {
        let seen = self.console.lock().unwrap().rfind('\n').map_or(0, |end| end + 1);
        self.type_in(b"c");
        let check = self.line("check", seen);
        assert_eq!((check["ram_errors"], check["disk_errors"]), (0, 0), "{check:?}");
        assert!(check["checked_pages"] > 0 && check["checked_blocks"] > 0, "{check:?}");
        check
    }

    fn finished_move(&self, id: &str) -> MoveProgress {
        until("the move's end", || {
            let file = self.dir.join("moves").join(format!("{id}.json"));
            serde_json::from_slice(&std::fs::read(file).ok()?).ok()
        })
    }
}

/// Polls for something that other threads bring about; the deadline only ends a test that hangs.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what} does not come");
        thread::sleep(Duration::from_millis(2));
    }
}

fn incoming(id: &str, from: &Process) -> Start {
    let images = from
        .status()
        .disks
        .iter()
        .map(|place| {
            let info = vmove_storage::info(&place.path).unwrap();
            ImageShape {
                name: place.name.clone(),
                format: DiskFormat::Qcow2,
                virtual_bytes: info.virtual_bytes,
                cluster_bytes: info.cluster_bytes.unwrap(),
                allocated_bytes: info.allocated_bytes,
            }
        })
        .collect();
    Start::Incoming(IncomingSpec {
        move_id: id.into(),
        from_host: "a".into(),
        listen_ip: "127.0.0.1".into(),
        images,
        plain: true,
    })
}

fn order(id: &str, target: Option<Listening>, path: PathBuf) -> Request {
    let place = |host: &str| Place { host: host.into(), datastore: "d".into() };
    Request::Move(Box::new(MoveOrder {
        move_id: id.into(),
        from: place("a"),
        to: place(if target.is_some() { "b" } else { "a" }),
        target,
        copies: vec![DiskPlacement { name: "vda".into(), datastore: "d".into(), path }],
        max_downtime_ms: 100,
        bandwidth: None,
        keep_source: false,
        audit: true,
        plain: true,
        predicted: None,
    }))
}

/// Moves the VM of `source` into a new process; gives that and the report.
fn move_to(root: &Path, name: &str, source: Process, vm: &VmDefinition) -> (Process, MoveReport) {
    let generation = source.status().generation + 1;
    let target = Process::start(root, name, vm, generation, incoming(name, &source));
    let listening = until("the target to listen", || target.status().listening);
    let Request::Move(mut order) = order(name, Some(listening), target.dir.join("vda.qcow2")) else {
        panic!()
    };
    if vm.disks.is_empty() {
        order.copies.clear();
    }
    assert_eq!(source.ask(&Request::Move(order)), Reply::Ok);
    let ended = source.finished_move(name);
    assert_eq!(ended.error, None);
    let report = ended.report.unwrap();
    assert_eq!((report.outcome.as_str(), report.verified), ("completed", true), "{report:?}");
    source.ended.join().unwrap().unwrap();
    assert!(!source.dir.join("vda.qcow2").exists(), "the source's image is left");
    until("the target to run", || (target.status().state == RunState::Running).then_some(()));
    assert_eq!(target.status().generation, generation);
    (target, report)
}

fn stop(process: Process) {
    assert_eq!(process.ask(&Request::Stop), Reply::Ok);
    process.ended.join().unwrap().unwrap();
    let image = process.dir.join("vda.qcow2");
    if image.exists() {
        let check = vmove_storage::check(&image).unwrap();
        assert!(check.is_clean(), "{check:?}");
    }
}

const WORDS: &str = "vmove.fill_mib=40 vmove.ram_mib=16 vmove.ram_rate=2000 vmove.disk_mib=24 vmove.disk_rate=500 vmove.discard=1";

#[test]
fn a_running_guest_moves_host_and_datastore_again_and_again() {
    if !kvm_usable("moves") {
        return;
    }
    for vcpus in [1, 2] {
        let root = tempfile::tempdir().unwrap();
        let vm = definition(vcpus, 64, WORDS);
        let mut process = Process::start(root.path(), "p0", &vm, 1, Start::Boot);
        process.line("hb", 0);
        process.check_all();
        for n in 1..=5 {
            let (next, report) = move_to(root.path(), &format!("p{n}"), process, &vm);
            println!(
                "{vcpus} vCPUs, move {n}: downtime {} ms, {:?}, {:?}",
                report.downtime_ms, report.downtime, report.memory
            );
            next.line("hb", 0);
            process = next;
        }
        process.check_all();
        stop(process);
    }
}

#[test]
fn a_guest_without_disks_moves() {
    if !kvm_usable("moves") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let vm = VmDefinition {
        disks: vec![],
        ..definition(1, 64, "vmove.fill_mib=8 vmove.ram_mib=4 vmove.ram_rate=500")
    };
    let source = Process::start(root.path(), "s", &vm, 1, Start::Boot);
    source.line("hb", 0);
    let (target, report) = move_to(root.path(), "t", source, &vm);
    assert!(report.disks.is_empty());
    target.line("hb", 0);
    stop(target);
}

#[test]
fn disks_change_their_datastore_under_a_running_guest() {
    if !kvm_usable("moves") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let vm = definition(1, 64, WORDS);
    let process = Process::start(root.path(), "p", &vm, 1, Start::Boot);
    process.line("hb", 0);
    process.line("hb", 0);
    for n in 2..=4 {
        let id = format!("m{n}");
        let path = root.path().join(format!("other{n}")).join("vda.qcow2");
        assert_eq!(process.ask(&order(&id, None, path.clone())), Reply::Ok);
        let ended = process.finished_move(&id);
        assert_eq!(ended.error, None);
        assert!(ended.report.unwrap().verified);
        until("the new place", || (process.status().disks[0].path == path).then_some(()));
        assert_eq!(process.status().generation, n);
    }
    assert!(!root.path().join("other2").exists() && !root.path().join("p/vda.qcow2").exists());
    process.check_all();
    stop(process);
}

#[test]
fn a_cancelled_move_leaves_the_source_running_and_can_be_tried_again() {
    if !kvm_usable("moves") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let vm = definition(1, 64, WORDS);
    let source = Process::start(root.path(), "s", &vm, 1, Start::Boot);

    source.line("hb", 0);
    let target = Process::start(root.path(), "t", &vm, 2, incoming("m1", &source));
    let listening = until("the target to listen", || target.status().listening);
    let Request::Move(mut slow) = order("m1", Some(listening), target.dir.join("vda.qcow2")) else {
        panic!()
    };
    // Slow enough that it is still under way when it is cancelled.
    slow.bandwidth = Some(1 << 20);
    assert_eq!(source.ask(&Request::Move(slow.clone())), Reply::Ok);
    assert!(matches!(source.ask(&Request::Move(slow)), Reply::Error(why) if why.contains("already")));
    until("some progress", || match source.ask(&Request::MoveStatus) {
        Reply::MoveStatus(Some(p)) if p.disk_done_bytes > 0 => Some(()),
        _ => None,
    });
    assert_eq!(source.ask(&Request::Cancel), Reply::Ok);
    let ended = source.finished_move("m1");
    assert_eq!(ended.report.unwrap().outcome, "cancelled");
    target.ended.join().unwrap().unwrap();
    assert!(!target.dir.join("vda.qcow2").exists());
    source.check_all();
    let (target, _) = move_to(root.path(), "t2", source, &vm);
    target.check_all();
    stop(target);
}

/// Cancels at many moments of a quick move: whichever way each ends, exactly one of the two has the VM.
#[test]
fn a_cancel_at_any_moment_leaves_exactly_one_owner() {
    if !kvm_usable("moves") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let vm = definition(1, 64, WORDS);
    let mut process = Process::start(root.path(), "p0", &vm, 1, Start::Boot);
    process.line("hb", 0);
    let (mut cancelled, mut completed) = (0, 0);
    for n in 1..=24 {
        let name = format!("p{n}");
        let target = Process::start(
            root.path(),
            &name,
            &vm,
            process.status().generation + 1,
            incoming(&name, &process),
        );
        let listening = until("the target to listen", || target.status().listening);
        assert_eq!(process.ask(&order(&name, Some(listening), target.dir.join("vda.qcow2"))), Reply::Ok);
        // Spread over the whole of a move, which takes half a second or so with the audit; nothing depends on where it hits.
        thread::sleep(Duration::from_millis(n * 61 % 900));
        let _ = process.ask_if_there(&Request::Cancel);
        let ended = process.finished_move(&name);
        let outcome = ended.report.unwrap().outcome;
        match outcome.as_str() {
            "completed" => {
                completed += 1;
                process.ended.join().unwrap().unwrap();
                until("the target to run", || (target.status().state == RunState::Running).then_some(()));
                process = target;
            }
            "cancelled" => {
                cancelled += 1;
                // As the agent does: a target that had lost its connections would wait for them to be made again.
                let _ = target.ask_if_there(&Request::Cancel);
                target.ended.join().unwrap().unwrap();
                assert!(!target.dir.join("vda.qcow2").exists());
                until("the end of the move", || process.status().moving.is_none().then_some(()));
                let seen = process.console.lock().unwrap().rfind('\n').map_or(0, |end| end + 1);
                process.line("hb", seen);
            }
            other => panic!("{other}: {:?}", ended.error),
        }
    }
    println!("{cancelled} cancelled, {completed} completed");
    process.check_all();
    stop(process);
}
