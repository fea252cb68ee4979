//! Every decoder of bytes from outside, one function each: what the fuzz targets in `fuzz/` and the corpus test both call.
//!
//! A function gives whether the bytes were accepted. It must not panic, and must not take memory out of proportion, whatever it is
//! given. What was accepted and can be written again must read the same. Lives here: the way from bytes to the product's decoders,
//! through files where those read files. Never enters: rules of what is acceptable; those are the product's.

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use serde::de::DeserializeOwned;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;
use vmove::agent::config::{Config, HostsStore};
use vmove::agent::create::check_definition;
use vmove::agent::incoming::check_offer;
use vmove::api::{recovery, removal, types as api};
use vmove::identity::token::{Token, TokenStore};
use vmove_compute::checkpoint::Manifest;
use vmove_compute::kvm::{VcpuState, VmState};
use vmove_compute::process::console::Console;
use vmove_compute::process::console::wire::{self as console, ClientMsg, ServerMsg};
use vmove_compute::process::protocol;
use vmove_devices::net::{Backend, MacAddress, Offloads};
use vmove_devices::state::{self, Sections};
use vmove_devices::{
    Block, DiskHandle, Doorbells, GuestMemory, MsiSender, Net, NetHandle, PciBus, Rng, Serial, SharedMemory,
};
use vmove_mirror::journal::{Journal, Record};
use vmove_mirror::wire::blocks::{BlockAck, BlockHead};
use vmove_mirror::wire::control::{self, SourceMsg, TargetMsg};
use vmove_mirror::wire::frame::{self, Kind};
use vmove_mirror::wire::hello::{Hello, HelloAnswer};
use vmove_mirror::wire::pages::PagesHead;
use vmove_storage::header::Header;
use vmove_storage::{Datastore, ImageFormat, ImageSpec, JournalFile, OpenOptions, Stamp};

/// One decoder.
#[derive(Debug, Clone, Copy)]
pub struct Decoder {
    /// Its name: of the fuzz target, and of the directory of its corpus.
    pub name: &'static str,
    /// Whether the bytes are accepted.
    pub accepts: fn(&[u8]) -> bool,
}

/// All of them.
pub const ALL: &[Decoder] = &[
    Decoder { name: "hello", accepts: hello },
    Decoder { name: "frame", accepts: frame },
    Decoder { name: "frame_head", accepts: frame_head },
    Decoder { name: "control", accepts: control_message },
    Decoder { name: "saved_state", accepts: saved_state },
    Decoder { name: "journal_record", accepts: journal_record },
    Decoder { name: "journal_file", accepts: journal_file },
    Decoder { name: "qcow2_header", accepts: qcow2_header },
    Decoder { name: "image", accepts: image },
    Decoder { name: "companion", accepts: companion },
    Decoder { name: "vm_toml", accepts: vm_toml },
    Decoder { name: "host_toml", accepts: host_toml },
    Decoder { name: "api", accepts: api_body },
    Decoder { name: "recovery", accepts: recovery_body },
    Decoder { name: "token", accepts: token },
    Decoder { name: "process", accepts: process_line },
    Decoder { name: "console", accepts: console_messages },
    Decoder { name: "checkpoint", accepts: checkpoint },
];

/// The decoder of this name.
pub fn named(name: &str) -> Option<&'static Decoder> {
    ALL.iter().find(|decoder| decoder.name == name)
}

/// RAM that page frames are checked against, pages.
const RAM_PAGES: u64 = 1 << 18;
/// Disk that block frames are checked against, bytes.
const DISK_BYTES: u64 = 1 << 30;

/// The first bytes of a connection, and their answer.
pub fn hello(bytes: &[u8]) -> bool {
    let called = bytes.first_chunk().map(Hello::decode);
    let answered = bytes.first_chunk().map(HelloAnswer::decode);
    match called {
        Some(Ok(hello)) => {
            // Bytes that mean nothing today are not kept.
            assert_eq!(Hello::decode(&hello.encode()).as_ref(), Ok(&hello));
            hello.negotiate().is_ok()
        }
        _ => matches!(answered, Some(Ok(_))),
    }
}

/// A frame with its checksum: header, head, and what the head says.
pub fn frame(bytes: &[u8]) -> bool {
    let Some((fixed, rest)) = bytes.split_first_chunk() else { return false };
    let Ok(header) = frame::Header::decode(fixed) else { return false };
    let Some(head) = rest.get(..header.head_len as usize) else { return false };
    header.check(head).is_ok() && head_of(header.kind, head, header.data_len)
}

/// What stands in the head of a frame, as if its checksum were right: `kind u8 | data_len u32 | head`.
pub fn frame_head(bytes: &[u8]) -> bool {
    let [kind, a, b, c, d, head @ ..] = bytes else { return false };
    let kind = match kind % 4 {
        0 => Kind::Control,
        1 => Kind::Pages,
        2 => Kind::Block,
        _ => Kind::BlockAck,
    };
    let data_len = u32::from_le_bytes([*a, *b, *c, *d]);
    head.len() <= kind.max_head() as usize && data_len <= kind.max_data() && head_of(kind, head, data_len)
}

fn head_of(kind: Kind, head: &[u8], data_len: u32) -> bool {
    // What is written again must be the same bytes, but for the frame's header.
    let same = |again: Vec<u8>| assert_eq!(&again[frame::Header::BYTES..], head);
    match kind {
        Kind::Control => control_message(head),
        Kind::Pages => match PagesHead::decode(head, data_len, RAM_PAGES) {
            Ok(pages) => {
                same(pages.encode().expect("what was accepted can be written"));
                true
            }
            Err(_) => false,
        },
        Kind::Block => match BlockHead::decode(head, data_len, DISK_BYTES) {
            Ok(block) => {
                let again = block.encode().expect("what was accepted can be written");
                assert_eq!(
                    BlockHead::decode(&again[frame::Header::BYTES..], data_len, DISK_BYTES),
                    Ok(block)
                );
                true
            }
            Err(_) => false,
        },
        Kind::BlockAck => BlockAck::decode(head).is_ok(),
    }
}

/// Messages of the two engines.
pub fn control_message(bytes: &[u8]) -> bool {
    let from_source = control::decode::<SourceMsg>(bytes);
    let from_target = control::decode::<TargetMsg>(bytes);
    if let Ok(message) = &from_source {
        let again = control::encode(message).expect("what was accepted can be written");
        assert_eq!(control::decode::<SourceMsg>(&again[frame::Header::BYTES..]).as_ref(), Ok(message));
    }
    from_source.is_ok() || from_target.is_ok()
}

/// The state of a machine: sections, console, vCPUs, VM, devices. Everything but what KVM itself judges.
pub fn saved_state(bytes: &[u8]) -> bool {
    let Ok(mut sections) = state::decode(bytes) else { return false };
    let console = Console::arriving().restore(&mut sections);
    let Ok(mut sections) = Sections::new(sections) else { return false };
    let vm = VmState::decode(&mut sections);
    let vcpu = VcpuState::decode(0, &mut sections);
    let machine = Devices::new();
    let devices = machine.bus.restore(&mut sections);
    let serial = machine.serial.restore(&mut sections);
    console.is_ok()
        && vm.is_ok()
        && vcpu.is_ok()
        && devices.is_ok()
        && serial.is_ok()
        && sections.finish().is_ok()
}

/// One record of a journal.
pub fn journal_record(bytes: &[u8]) -> bool {
    let Ok(record) = Record::decode(bytes) else { return false };
    let again = record.encode().expect("what was accepted can be written");
    assert_eq!(Record::decode(&again).as_ref(), Ok(&record));
    // Admitted or refused, by a journal in whatever state.
    let mut journal = Journal::default();
    let _ = journal.append(&Record::Owner { generation: 1, disks: vec![] });
    let _ = journal.append(&record);
    if let Some(id) = record.move_id() {
        let _ = journal.verdict(id);
    }
    let _ = Journal::default().append(&record);
    true
}

/// A journal as it lies on disk: records, their checksums, a torn tail.
pub fn journal_file(bytes: &[u8]) -> bool {
    let path = scratch("journal", bytes);
    let Ok(records) = JournalFile::read_all(&path) else { return false };
    Journal::replay(records.iter().map(Vec::as_slice)).is_ok()
}

/// The first cluster of a qcow2 file, in a file that may be longer: `file_bytes u64 | cluster`.
pub fn qcow2_header(bytes: &[u8]) -> bool {
    let Some((length, first)) = bytes.split_first_chunk() else { return false };
    let file_bytes = u64::from_le_bytes(*length);
    Header::parse(first, file_bytes).is_ok_and(|header| header.must_be_clean().is_ok())
}

/// A whole image, looked at and checked: all tables are walked.
pub fn image(bytes: &[u8]) -> bool {
    let path = scratch("image", bytes);
    let seen = vmove_storage::info(&path).is_ok();
    let checked = vmove_storage::check(&path);
    seen && checked.is_ok_and(|report| !report.has_errors())
}

/// Files beside images: ownership stamps and the identity of a datastore.
pub fn companion(bytes: &[u8]) -> bool {
    let image = scratch("disk", &[]);
    write(&Stamp::path_of(&image), bytes);
    let stamped = Stamp::read(&image).is_ok_and(|stamp| stamp.is_some());
    let _ = Stamp::permits(&image, "web", 7);
    let store = directory().join("store");
    std::fs::create_dir_all(&store).expect("make a directory");
    write(&store.join(".vmove-datastore.json"), bytes);
    stamped | Datastore::open("store", &store).is_ok()
}

/// A VM's definition, as people write it, and as it is kept.
pub fn vm_toml(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    if let Ok(written) = vmove::definition::parse(text) {
        let mut vm = written.definition;
        // Of disks that take their image's size it is not known yet.
        vm.disks.retain(|disk| disk.size_bytes > 0);
        let again = vmove::definition::parse(&vmove::definition::render(&vm));
        assert_eq!(again.map(|again| again.definition), Ok(vm));
    }
    let Ok(definition) = toml::from_str::<protocol::VmDefinition>(text) else { return false };
    let again = toml::to_string(&definition).expect("what was accepted can be written");
    assert_eq!(toml::from_str::<protocol::VmDefinition>(&again).as_ref(), Ok(&definition));
    check_definition(&definition).is_ok()
}

/// A host's configuration and its list of hosts.
pub fn host_toml(bytes: &[u8]) -> bool {
    write(&directory().join("hosts.toml"), bytes);
    let hosts = HostsStore::of(&directory()).load();
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    Config::parse(text, Path::new("agent.toml")).is_ok() || hosts.is_ok()
}

/// Bodies of the agents' API: requests from users and other agents, and other agents' answers.
pub fn api_body(bytes: &[u8]) -> bool {
    let created =
        json::<api::CreateVm>(bytes).is_some_and(|create| check_definition(&create.definition).is_ok());
    let offered = json::<api::Offer>(bytes).is_some_and(|offer| check_offer("a", &offer).is_ok());
    let read = [
        json::<api::MoveRequest>(bytes).is_some(),
        json::<api::JoinRequest>(bytes).is_some(),
        json::<api::HostAddress>(bytes).is_some(),
        json::<api::JoinAnswer>(bytes).is_some(),
        json::<api::OfferAccepted>(bytes).is_some(),
        json::<api::VerdictAnswer>(bytes).is_some(),
        json::<api::MoveAnswer>(bytes).is_some(),
        json::<api::VmDetail>(bytes).is_some(),
        json::<api::VmList>(bytes).is_some(),
        json::<api::HostInfo>(bytes).is_some(),
        json::<api::ErrorBody>(bytes).is_some(),
        json::<protocol::Listening>(bytes).is_some(),
        json::<protocol::MoveProgress>(bytes).is_some(),
    ];
    created || offered || read.contains(&true)
}

/// Other agents' accounts of what they hold of a VM and of hosts that are gone, and what users are told of them. A host's own file of
/// removed hosts is read with the same care.
pub fn recovery_body(bytes: &[u8]) -> bool {
    write(&directory().join("removed-hosts.toml"), bytes);
    let store = HostsStore::of(&directory());
    let read = [
        json::<recovery::HostStanding>(bytes).is_some(),
        json::<recovery::RecoveryReport>(bytes).is_some(),
        json::<removal::HostTies>(bytes).is_some(),
        json::<removal::HostRemoval>(bytes).is_some(),
        json::<removal::RemovedHosts>(bytes).is_some(),
        store.load_removed().is_ok(),
    ];
    read.contains(&true)
}

/// Join tokens as people paste them, and the file of those given out.
pub fn token(bytes: &[u8]) -> bool {
    write(&directory().join("tokens.json"), bytes);
    let _ = TokenStore::of(&directory()).check("0");
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(token) = Token::parse(text) else { return false };
    assert_eq!(Token::parse(&token.to_string()).expect("as it was printed"), token);
    true
}

/// What agents and VM processes say to each other, and the file a VM process is started with.
pub fn process_line(bytes: &[u8]) -> bool {
    let read = [
        json::<protocol::Request>(bytes).is_some(),
        json::<protocol::Reply>(bytes).is_some(),
        json::<protocol::LaunchSpec>(bytes).is_some(),
    ];
    read.contains(&true)
}

/// What clients of the console and VM processes say to each other, as it comes in pieces: `piece u8 | stream`.
pub fn console_messages(bytes: &[u8]) -> bool {
    let [piece, stream @ ..] = bytes else { return false };
    read_all::<ClientMsg>(stream, *piece) | read_all::<ServerMsg>(stream, *piece)
}

/// The first file of a checkpoint, and what stands in it behind the sum, as if that were right.
pub fn checkpoint(bytes: &[u8]) -> bool {
    let Ok(manifest) = Manifest::decode(bytes).or_else(|_| Manifest::decode_body(bytes)) else {
        return false;
    };
    let again = manifest.encode().expect("what was accepted can be written");
    assert_eq!(Manifest::decode(&again[..]).expect("as it was written"), manifest);
    true
}

/// Whether a stream of messages is read to its end.
fn read_all<T: DeserializeOwned>(stream: &[u8], piece: u8) -> bool {
    let mut decoder = console::Decoder::default();
    let mut messages = 0;
    for piece in stream.chunks(usize::from(piece) + 1) {
        decoder.push(piece);
        loop {
            match decoder.take::<T>() {
                Ok(Some(_)) => messages += 1,
                Ok(None) => break,
                Err(_) => return false,
            }
        }
    }
    messages > 0
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    serde_json::from_slice(bytes).ok()
}

thread_local! {
    static DIRECTORY: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
}

/// A directory of this thread, for decoders that read files; in memory where there is such a place.
fn directory() -> PathBuf {
    DIRECTORY.with(|cell| {
        let make = || {
            let memory = Path::new("/dev/shm");
            let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            made.expect("make a directory")
        };
        cell.get_or_init(make).path().to_owned()
    })
}

fn scratch(name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory().join(name);
    write(&path, bytes);
    path
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("write a file of our own");
}

/// The devices of a machine without KVM.
pub(crate) struct Devices {
    pub(crate) bus: PciBus,
    pub(crate) serial: Serial,
}

/// A wire that leads nowhere.
struct Wire(File);

impl Backend for Wire {
    fn file(&self) -> &File {
        &self.0
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tcp4: true, ..Offloads::default() }
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
}

struct Nobody;

impl MsiSender for Nobody {
    fn send(&self, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
}

impl Doorbells for Nobody {
    fn connect(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn disconnect(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

impl Devices {
    pub(crate) fn new() -> Self {
        static HOST: OnceLock<(SharedMemory, DiskHandle, NetHandle)> = OnceLock::new();
        // One disk, one NIC and one RAM for all: each opened starts a thread.
        let (memory, disk, nic) = HOST.get_or_init(|| {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("map RAM");
            let path = std::env::temp_dir().join(format!("vmove-decoders-{}.raw", std::process::id()));
            let spec = ImageSpec::new(ImageFormat::Raw, 1 << 20);
            vmove_storage::create(&path, &spec).expect("make an image");
            let disk = DiskHandle::open("disk", &path, OpenOptions::default()).expect("open it");
            // It lives as long as it is open.
            std::fs::remove_file(&path).expect("remove it");
            let (wire, _) = UnixDatagram::pair().expect("make a wire");
            wire.set_nonblocking(true).expect("make it non-blocking");
            let wire = Wire(File::from(OwnedFd::from(wire)));
            let mac = MacAddress::new([2, 0, 0, 0, 0, 1]).expect("an address");
            let nic = NetHandle::open("nic", mac, Box::new(wire)).expect("start a NIC");
            (Arc::new(memory), disk, nic)
        });
        let mut bus = PciBus::new(Arc::new(Nobody), Arc::new(Nobody));
        let block = Block::new(Arc::clone(memory), disk.clone(), "serial");
        bus.add_virtio("disk", Box::new(block)).expect("a free slot");
        let rng = Rng::new(Arc::clone(memory)).expect("make an entropy device");
        bus.add_virtio("entropy", Box::new(rng)).expect("a free slot");
        let net = Net::new(Arc::clone(memory), nic.clone());
        bus.add_virtio("nic", Box::new(net)).expect("a free slot");
        bus.pause_all().expect("pause devices that do nothing");
        let line = EventFd::new(0).expect("make an event");
        Self { bus, serial: Serial::new(line, Arc::new(Mutex::new(io::sink()))) }
    }
}
