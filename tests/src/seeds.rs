//! Valid bytes for every decoder, made by the product's own encoders where it has them: where fuzzing begins.
//!
//! Never enters: bytes that crashed something; those are kept in `fixtures/fuzz/<decoder>/`.

use kvm_bindings::{kvm_cpuid_entry2, kvm_irqchip, kvm_msr_entry};
use serde_json::json;
use vmove_compute::checkpoint::Manifest;
use vmove_compute::checkpoint::sums::FileSums;
use vmove_compute::kvm::{VcpuState, VmState};
use vmove_compute::process::console::Console;
use vmove_compute::process::console::wire::{self as console, ClientMsg, ServerMsg};
use vmove_mirror::journal::{DiskAt, MoveId, Record};
use vmove_mirror::pages::PageRange;
use vmove_mirror::wire::blocks::{BlockAck, BlockHead, BlockOp};
use vmove_mirror::wire::control::{self, DiskSetup, Proof, SourceMsg, TargetMsg};
use vmove_mirror::wire::frame::Header;
use vmove_mirror::wire::hello::{Hello, HelloAnswer, Role, VERSION};
use vmove_mirror::wire::pages::PagesHead;
use vmove_storage::{ImageFormat, ImageSpec, JournalFile};

use crate::decoders::Devices;

/// Bytes that a decoder accepts.
#[derive(Debug, Clone)]
pub struct Seed {
    /// The decoder's name.
    pub decoder: &'static str,
    /// The seed's name.
    pub name: &'static str,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// All seeds.
pub fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |decoder, name, bytes: Vec<u8>| seeds.push(Seed { decoder, name, bytes });

    add("hello", "hello", Hello::new(Role::Disk(1), [7; 16], 3).encode().to_vec());
    add("hello", "accepted", HelloAnswer::Accepted(VERSION).encode().to_vec());
    for (name, bytes) in frames() {
        let (header, head) = bytes.split_at(Header::BYTES);
        // As `frame_head` reads it: kinds count from 1, the length of data lies behind that of the head.
        let mut bare = vec![header[2] - 1];
        bare.extend(&header[8..12]);
        bare.extend(head);
        add("frame_head", name, bare);
        if header[2] == 1 {
            add("control", name, head.to_vec());
        }
        add("frame", name, bytes.clone());
    }
    add("saved_state", "one-vcpu", machine());
    for (name, record) in records() {
        add("journal_record", name, record.encode().expect("a record"));
    }
    add("journal_file", "move", journal());
    let qcow2 = qcow2();
    let mut header = (qcow2.len() as u64).to_le_bytes().to_vec();
    header.extend(&qcow2[..512]);
    add("qcow2_header", "empty", header);
    add("image", "empty", qcow2);
    add("companion", "stamp", br#"{"vm":"web","generation":7,"state":"owned"}"#.to_vec());
    add("companion", "datastore", br#"{"id":"67e55044-10b1-426f-9247-bb680e5fe0c8"}"#.to_vec());
    add("vm_toml", "two-disks", VM_TOML.as_bytes().to_vec());
    add("host_toml", "agent", HOST_TOML.as_bytes().to_vec());
    add("host_toml", "hosts", b"[[hosts]]\nname = \"b\"\naddress = \"10.0.0.2:7070\"\n".to_vec());
    for (name, body) in bodies() {
        add("api", name, body.to_string().into_bytes());
    }
    for (name, body) in accounts() {
        add("recovery", name, body.to_string().into_bytes());
    }
    add("recovery", "removed-file", b"names = [\"b\", \"c\"]\n".to_vec());
    let token = format!("vmove1-{}-{}", "0123456789abcdef".repeat(2), "0123456789abcdef".repeat(4));
    add("token", "token", token.into_bytes());
    for (name, line) in lines() {
        add("process", name, line.to_string().into_bytes());
    }
    add("console", "client", stream(&typed()));
    add("console", "server", stream(&said()));
    let (whole, body) = manifest();
    add("checkpoint", "whole", whole);
    add("checkpoint", "body", body);
    seeds
}

/// The first file of a checkpoint with one disk, and what stands in it behind the sum.
fn manifest() -> (Vec<u8>, Vec<u8>) {
    let dir = tempfile::tempdir().expect("make a directory");
    let sums = |bytes: &[u8], length: u64| {
        let path = dir.path().join("file");
        std::fs::write(&path, bytes).expect("write a file");
        std::fs::File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_len(length))
            .expect("grow it");
        FileSums::of(&path).expect("its sums")
    };
    let manifest = Manifest {
        name: "before-upgrade".into(),
        vm: serde_json::from_value(definition()).expect("a definition"),
        host: "a".into(),
        generation: 3,
        taken_at: 1_700_000_000,
        pause_us: 20_000,
        ram: sums(b"ram", 512 << 20),
        disks: vec![sums(&qcow2(), 64 << 10)],
        kernel: sums(b"kernel", 6),
        initrd: Some(sums(b"initrd", 6)),
        state: vec![1, 2, 3],
    };
    let whole = manifest.encode().expect("a checkpoint");
    let body = whole[Manifest::HEAD_BYTES..].to_vec();
    (whole, body)
}

/// Messages of a console behind each other, in pieces of 8 bytes.
fn stream<T: serde::Serialize>(messages: &[T]) -> Vec<u8> {
    let mut bytes = vec![7];
    bytes.extend(messages.iter().flat_map(|message| console::encode(message).expect("a message")));
    bytes
}

fn typed() -> [ClientMsg; 2] {
    [
        ClientMsg::Attach { version: console::VERSION, client: [1; 16], seen: Some(([3; 16], 7)) },
        ClientMsg::Keys { at: 0, bytes: b"root\r".to_vec() },
    ]
}

fn said() -> [ServerMsg; 4] {
    [
        ServerMsg::Attached { run: [3; 16], at: 7, end: 14, taken: Some(0) },
        ServerMsg::Output { at: 7, bytes: b"login: ".to_vec() },
        ServerMsg::Taken { count: 5 },
        ServerMsg::Moved { host: "b".into() },
    ]
}

fn frames() -> Vec<(&'static str, Vec<u8>)> {
    let tell = |message: &SourceMsg| control::encode(message).expect("a message");
    let answer = |message: &TargetMsg| control::encode(message).expect("a message");
    let mut pages = PagesHead::default();
    for page in 0..6 {
        pages.push(page * 3 / 2, (page % 3 > 0).then_some(page));
    }
    let write = BlockHead { seq: 1, op: BlockOp::Write { sum: 9 }, offset: 4096, len: 512 };
    let discard = BlockHead { seq: 2, op: BlockOp::Discard, offset: 0, len: 1 << 20 };
    let disks = vec![DiskSetup { name: "vda".into(), virtual_bytes: 1 << 30 }];
    let damaged = vec![PageRange { first: 3, count: 2 }];
    vec![
        ("setup", tell(&SourceMsg::Setup { ram_pages: 1 << 18, disks, audit: true })),
        ("state", tell(&SourceMsg::State(vec![1, 2, 3]))),
        ("prepare", tell(&SourceMsg::Prepare(Proof { audit: Some([1; 32]), ..Proof::default() }))),
        ("abort", tell(&SourceMsg::Abort { reason: "cancelled".into() })),
        ("round-ack", answer(&TargetMsg::RoundAck { round: 2, damaged })),
        (
            "prepared",
            answer(&TargetMsg::Prepared { proof: Proof::default(), allocated: vec![7], load_us: 9 }),
        ),
        ("pages", pages.encode().expect("a frame")),
        ("write", write.encode().expect("a frame")),
        ("discard", discard.encode().expect("a frame")),
        ("block-ack", BlockAck { seq: 1, result: Ok(()) }.encode().expect("a frame")),
    ]
}

/// The state of a machine of one vCPU with the devices of [`Devices`].
fn machine() -> Vec<u8> {
    let vcpu = VcpuState {
        id: 0,
        cpuid: vec![kvm_cpuid_entry2::default(); 2],
        tsc_khz: 2_000_000,
        mp_state: Default::default(),
        regs: Default::default(),
        sregs: Default::default(),
        xsave: vec![0; 576],
        xcrs: Default::default(),
        debugregs: Default::default(),
        events: Default::default(),
        lapic: Default::default(),
        msrs: vec![kvm_msr_entry { index: 0x10, ..Default::default() }],
    };
    let vm = VmState {
        irqchips: [0, 1, 2].map(|chip_id| kvm_irqchip { chip_id, ..Default::default() }),
        pit: Default::default(),
        clock_ns: 5,
        realtime_ns: 7,
    };
    let devices = Devices::new();
    let console = Console::new([3; 16]);
    let said = console.sink().lock().is_ok_and(|mut sink| sink.write_all(b"login: ").is_ok());
    assert!(said, "a console takes what is said");
    let mut sections = vec![console.save().expect("a state")];
    sections.extend([vm.encode().expect("a state"), vcpu.encode().expect("a state")]);
    sections.extend(devices.bus.save().expect("a state"));
    sections.push(devices.serial.save().expect("a state"));
    postcard::to_stdvec(&sections).expect("a state")
}

fn records() -> Vec<(&'static str, Record)> {
    let move_id = MoveId::new("67e55044-10b1-426f-9247-bb680e5fe0c8").expect("an id");
    let disks =
        vec![DiskAt { name: "vda".into(), datastore: "fast".into(), path: "/srv/fast/web/vda.qcow2".into() }];
    vec![
        ("owner", Record::Owner { generation: 1, disks: disks.clone() }),
        ("moving", Record::Moving { move_id: move_id.clone(), to_host: Some("b".into()), generation: 2 }),
        (
            "incoming",
            Record::Incoming { move_id: move_id.clone(), from_host: "a".into(), generation: 2, disks },
        ),
        ("prepared", Record::Prepared { move_id: move_id.clone() }),
        ("committed", Record::Committed { move_id: move_id.clone() }),
        ("aborted", Record::Aborted { move_id: move_id.clone() }),
        ("released", Record::Released { move_id }),
    ]
}

fn journal() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("make a directory");
    let path = dir.path().join("journal");
    let mut file = JournalFile::open(&path).expect("make a journal");
    let records = records();
    for name in ["owner", "moving", "committed", "released"] {
        let record = records.iter().find(|record| record.0 == name).expect("one of them");
        file.append(&record.1.encode().expect("a record")).expect("append");
    }
    std::fs::read(&path).expect("read it")
}

/// An empty image with the smallest clusters.
fn qcow2() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("make a directory");
    let path = dir.path().join("image.qcow2");
    let spec = ImageSpec { cluster_bytes: 512, ..ImageSpec::new(ImageFormat::Qcow2, 64 << 10) };
    vmove_storage::create(&path, &spec).expect("make an image");
    std::fs::read(&path).expect("read it")
}

const VM_TOML: &str = r#"name = "web"
vcpus = 2
memory_mib = 512
cmdline = "console=ttyS0 root=/dev/vda"

[[disks]]
name = "vda"
format = "qcow2"
size_bytes = 10737418240
datastore = "fast"

[[disks]]
name = "vdb"
format = "raw"
size_bytes = 1048576
datastore = ""
read_only = true
"#;

const HOST_TOML: &str = r#"name = "left"
listen = "10.0.0.1:7070"
default_datastore = "fast"
cpu_mask = ["avx512f"]

[[datastores]]
name = "fast"
path = "/srv/nvme"

[[hosts]]
name = "right"
address = "10.0.0.2:7070"
"#;

fn definition() -> serde_json::Value {
    json!({
        "name": "web", "vcpus": 2, "memory_mib": 512, "cmdline": "console=ttyS0",
        "disks": [{"name": "vda", "format": "qcow2", "size_bytes": 1_048_576, "datastore": "fast"}],
    })
}

fn bodies() -> Vec<(&'static str, serde_json::Value)> {
    let shape = json!({
        "name": "vda", "format": "qcow2", "virtual_bytes": 1_048_576, "cluster_bytes": 65536,
        "allocated_bytes": 262_144,
    });
    let digest = json!({"bytes": 7, "blake3": "0123456789abcdef".repeat(4)});
    vec![
        (
            "create",
            json!({"definition": definition(), "kernel": "/boot/vmlinux", "images": {"vda": "/a.qcow2"}}),
        ),
        (
            "move",
            json!({"host": "b", "disks": {"vda": "fast"}, "max_downtime_ms": 50, "bandwidth": 1_000_000}),
        ),
        ("join", json!({"token": "0123", "name": "b", "address": "10.0.0.2:7070", "csr_pem": "-----"})),
        ("host", json!({"name": "b", "address": "10.0.0.2:7070"})),
        ("joined", json!({"cert_pem": "-----", "ca_pem": "-----", "hosts": []})),
        ("verdict", json!({"verdict": "committed"})),
        ("listening", json!({"ip": "10.0.0.2", "port": 4000, "ticket": "00112233445566778899aabbccddeeff"})),
        ("error", json!({"error": {"code": "blocked", "message": "no", "blockers": ["a", "b"]}})),
        (
            "offer",
            json!({
                "version": 1, "move_id": "67e55044-10b1-426f-9247-bb680e5fe0c8", "from_host": "a",
                "definition": definition(), "generation": 2, "plain": false, "cpu_features": ["sse2"],
                "disks": [{"image": shape, "source_datastore_id": "1", "datastore": null}],
                "kernel": digest, "initrd": null, "dry_run": false,
            }),
        ),
    ]
}

/// What agents say after a failure.
fn accounts() -> Vec<(&'static str, serde_json::Value)> {
    let held = json!({
        "host": "b", "standing": "prepared", "generation": 2, "move_id": "67e55044-10b1-426f-9247-bb680e5fe0c8",
        "other_host": "a", "waits_for": "a", "process": {"pid": 7, "state": "undecided"},
        "images": [{
            "disk": "vda", "datastore": "fast", "path": "/srv/fast/web/vda.qcow2", "allocated_bytes": 262_144,
            "stamp": "incoming, generation 2",
        }],
        "next": "waits for host a",
    });
    let offer =
        json!({"host": "b", "instead_of": "a", "effect": "it runs on host b", "risks": ["two hosts"]});
    let tied = json!({"vm": "web", "host": "b", "what": "waits for host a"});
    vec![
        ("standing", held.clone()),
        (
            "report",
            json!({
                "vm": "web", "hosts": [held], "unreachable": [{"host": "a", "error": "no answer"}], "settled": false,
                "owner": null, "summary": "web is not settled", "take_over": offer,
            }),
        ),
        ("ties", json!({"reachable": false, "authority": true, "seen": ["web"], "waiting": [tied]})),
        (
            "removal",
            json!({
                "host": "a", "given_up": ["db"], "waiting": [tied], "unreachable": ["c"], "authority_lost": true,
                "blockers": [],
            }),
        ),
        ("removed", json!({"names": ["b", "c"]})),
    ]
}

fn lines() -> Vec<(&'static str, serde_json::Value)> {
    let placement = json!({"name": "vda", "datastore": "fast", "path": "/srv/fast/web/vda.qcow2"});
    let place = json!({"host": "a", "datastore": "fast"});
    vec![
        ("status", json!("status")),
        ("verdict", json!({"verdict": {"move_id": "m"}})),
        ("resolve", json!({"resolve": {"move_id": "m", "verdict": "aborted"}})),
        (
            "order",
            json!({"move": {
                "move_id": "m", "from": place, "to": place, "target": null, "copies": [placement],
                "max_downtime_ms": 50, "bandwidth": null, "keep_source": false, "audit": true, "plain": false,
            }}),
        ),
        ("refused", json!({"error": "no"})),
        (
            "launch",
            json!({
                "vm": definition(), "kernel": "kernel", "initrd": null, "host": "a", "generation": 1,
                "disks": [placement], "identity": null, "start": "boot",
            }),
        ),
    ]
}
