//! The network device on a socket for a wire: packets both ways, framing, lies, pausing, moving, announcing.

mod support;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use support::requests::pattern;
use support::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmove_devices::net::{Backend, MacAddress, Offloads};
use vmove_devices::pci::FunctionState;
use vmove_devices::state::{Section, Sections};
use vmove_devices::virtio::DeviceState;
use vmove_devices::{Net, NetHandle};

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const HEADER: usize = 12;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MERGEABLE: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CONTROL: u64 = 1 << 17;
const ANNOUNCE: u64 = 1 << 21;
const PLAIN: u64 = VERSION_1 | EVENT_IDX;

/// Longer than any of this needs; only reached by a failing test.
const PATIENCE: Duration = Duration::from_mins(1);

/// The device's end of a wire that is a socket. Remembers which offloads it was set to.
struct Wire {
    file: File,
    set: Arc<Mutex<Vec<Offloads>>>,
}

impl Backend for Wire {
    fn file(&self) -> &File {
        &self.file
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tcp4: true, ..Offloads::default() }
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.set.lock().unwrap().push(offloads);
        Ok(())
    }
}

struct Nic {
    machine: Machine,
    handle: NetHandle,
    /// The network's end of the wire.
    wire: UnixDatagram,
    /// Another name for the device's end.
    inner: UnixDatagram,
    set: Arc<Mutex<Vec<Offloads>>>,
}

fn nic() -> Nic {
    nic_with(MAC)
}

fn nic_with(mac: [u8; 6]) -> Nic {
    let (wire, inner) = UnixDatagram::pair().unwrap();
    wire.set_read_timeout(Some(PATIENCE)).unwrap();
    inner.set_nonblocking(true).unwrap();
    let set: Arc<Mutex<Vec<Offloads>>> = Arc::default();
    let file = File::from(OwnedFd::from(inner.try_clone().unwrap()));
    let backend = Box::new(Wire { file, set: Arc::clone(&set) });
    let handle = NetHandle::open("eth0", MacAddress::new(mac).unwrap(), backend).unwrap();
    let mut machine = Machine::new(memory());
    let device = Net::new(Arc::clone(&machine.memory), handle.clone());
    machine.bus.add_virtio("net-eth0", Box::new(device)).unwrap();
    Nic { machine, handle, wire, inner, set }
}

/// A packet of `len` bytes behind its header, its content told by `seed`.
fn packet(seed: u64, len: usize) -> Vec<u8> {
    [vec![0; HEADER], pattern(seed, len)].concat()
}

/// What the guest finds: the header says in how many buffers.
fn delivered(packet: &[u8], buffers: u16) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[10..12].copy_from_slice(&buffers.to_le_bytes());
    packet
}

fn at(machine: &Machine, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    machine.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn put_at(machine: &Machine, address: u64, bytes: &[u8]) {
    machine.memory.write_slice(bytes, GuestAddress(address)).unwrap();
}

fn receive(wire: &UnixDatagram) -> Vec<u8> {
    let mut packet = vec![0; 1 << 17];
    let len = wire.recv(&mut packet).expect("a packet comes");
    packet.truncate(len);
    packet
}

/// Offers a receive buffer of `len` bytes at `address`.
fn offer(driver: &mut Driver, machine: &Machine, address: u64, len: u32) {
    driver.offer(machine, &[(address, len, true)]);
    driver.kick(machine);
}

#[test]
fn packets_go_both_ways() {
    for features in [PLAIN, VERSION_1, PLAIN | MERGEABLE, VERSION_1 | INDIRECT] {
        let nic = nic();
        let machine = &nic.machine;
        let mut drivers = Driver::start_queues(machine, 1, features, &[16, 16]);
        let [rx, tx] = &mut drivers[..] else { panic!("two queues") };
        for round in 0..40 {
            offer(rx, machine, BUFFERS, 2048);
            nic.handle.pause().unwrap(); // So that an activation that throws old packets away is over.
            nic.handle.resume().unwrap();
            let sent = packet(round, 60 + round as usize * 36);
            nic.wire.send(&sent).unwrap();
            assert_eq!(rx.collect(machine, 1)[0].1 as usize, sent.len());
            assert_eq!(at(machine, BUFFERS, sent.len()), delivered(&sent, 1));

            let sent = packet(round + 100, 60 + round as usize * 36);
            put_at(machine, BUFFERS + 0x1_0000, &sent);
            // Header and packet, cut where the driver likes.
            let cut = 12 + round as u32;
            let rest = sent.len() as u32 - cut;
            let pieces =
                [(BUFFERS + 0x1_0000, cut, false), (BUFFERS + 0x1_0000 + u64::from(cut), rest, false)];
            if features & INDIRECT != 0 {
                tx.offer_indirect(machine, &pieces);
            } else {
                tx.offer(machine, &pieces);
            }
            tx.kick(machine);
            assert_eq!(tx.collect(machine, 1)[0].1, 0);
            assert_eq!(receive(&nic.wire), sent);
        }
    }
}

#[test]
fn features_and_configuration_say_what_there_is() {
    let nic = nic();
    let machine = &nic.machine;
    let common = machine.structure(1, 1);
    machine.write(common, 0, 4);
    let features = machine.read(common + 4, 4) & 0xff_ffff;
    let expected =
        CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4 | MERGEABLE | STATUS | CONTROL | ANNOUNCE | 1 << 5;
    assert_eq!(features, expected);
    let config = machine.structure(1, 4);
    let mac: Vec<u8> = (0..6).map(|at| machine.read(config + at, 1) as u8).collect();
    assert_eq!(mac, MAC);
    assert_eq!(machine.read(config + 6, 2), 1, "the link is up");
    Driver::start_queues(machine, 1, PLAIN | GUEST_CSUM | GUEST_TSO4, &[16, 16]);
    Driver::start_queues(machine, 1, PLAIN, &[16, 16]);
    nic.handle.pause().unwrap();
    let all = Offloads { checksum: true, tcp4: true, ..Offloads::default() };
    assert_eq!(*nic.set.lock().unwrap(), [all, Offloads::default()]);
}

#[test]
fn a_large_packet_fills_several_buffers_at_once() {
    let nic = nic();
    let machine = &nic.machine;
    let mut rx = Driver::start_queues(machine, 1, PLAIN | MERGEABLE, &[64, 16]).remove(0);
    nic.handle.pause().unwrap();
    nic.handle.resume().unwrap();
    let sent = packet(7, 60_000);
    nic.wire.send(&sent).unwrap();
    let buffers = 40u16;
    for index in 0..buffers - 1 {
        offer(&mut rx, machine, BUFFERS + u64::from(index) * 1536, 1536);
    }
    nic.handle.pause().unwrap();
    assert_eq!(rx.waiting(machine), 0, "a packet that does not fit yet is not begun");
    nic.handle.resume().unwrap();
    offer(&mut rx, machine, BUFFERS + u64::from(buffers - 1) * 1536, 1536);
    let used = rx.collect(machine, buffers);
    assert_eq!(used.iter().map(|(_, len)| *len as usize).sum::<usize>(), sent.len());
    assert_eq!(at(machine, BUFFERS, sent.len()), delivered(&sent, buffers));
    assert_eq!(rx.waiting(machine), 0);
}

#[test]
fn a_packet_too_long_for_its_buffer_is_dropped_and_the_buffer_kept() {
    let nic = nic();
    let machine = &nic.machine;
    let mut rx = Driver::start_queues(machine, 1, PLAIN, &[16, 16]).remove(0);
    nic.handle.pause().unwrap();
    nic.handle.resume().unwrap();
    nic.wire.send(&packet(1, 3000)).unwrap();
    nic.wire.send(&packet(2, 5)).unwrap();
    nic.wire.send(&packet(3, 600)).unwrap();
    offer(&mut rx, machine, BUFFERS, 1526);
    assert_eq!(rx.collect(machine, 1)[0].1, 612);
    assert_eq!(at(machine, BUFFERS, 612), delivered(&packet(3, 600), 1));
}

#[test]
fn received_packets_make_their_pages_dirty() {
    let nic = nic();
    let machine = &nic.machine;
    let mut rx = Driver::start_queues(machine, 1, PLAIN | MERGEABLE, &[16, 16]).remove(0);
    nic.handle.pause().unwrap();
    nic.handle.resume().unwrap();
    offer(&mut rx, machine, BUFFERS + 4090, 2000);
    offer(&mut rx, machine, BUFFERS + 0x1_0000, 2000);
    let region = machine.memory.find_region(GuestAddress(BUFFERS)).unwrap();
    let dirty = |address: u64| GuestMemoryRegion::bitmap(region).dirty_at(address as usize);
    nic.handle.pause().unwrap();
    region.get_mmap().bitmap().reset();
    assert!(!dirty(BUFFERS));
    nic.handle.resume().unwrap();
    nic.wire.send(&packet(1, 3000)).unwrap();
    rx.collect(machine, 2);
    // The packet crosses a page's edge and goes on in the second buffer; both used elements, too.
    for page in [BUFFERS, BUFFERS + 4096, BUFFERS + 0x1_0000, USED] {
        assert!(dirty(page), "{page:#x}");
    }
    assert!(!dirty(BUFFERS + 8192));
}

#[test]
fn what_is_no_packet_is_not_sent() {
    let nic = nic();
    let machine = &nic.machine;
    let mut tx = Driver::start_queues(machine, 1, PLAIN, &[16, 16]).remove(1);
    let good = packet(5, 100);
    put_at(machine, BUFFERS, &good);
    let whole = good.len() as u32;
    let strange: [&[Piece]; 5] = [
        &[(BUFFERS, 12, false)],     // a header alone
        &[(BUFFERS, 3, false)],      // not even that
        &[(BUFFERS, 25, false)],     // less than Ethernet's own header
        &[(BUFFERS, whole, true)],   // nothing to read
        &[(BUFFERS, 66_000, false)], // longer than any packet
    ];
    for pieces in strange {
        tx.offer(machine, pieces);
        tx.kick(machine);
        assert_eq!(tx.collect(machine, 1)[0].1, 0);
    }
    tx.offer(machine, &[(BUFFERS, whole, false)]);
    tx.kick(machine);
    tx.collect(machine, 1);
    assert_eq!(receive(&nic.wire), good);
    assert_eq!(tx.status(machine) & NEEDS_RESET, 0);
}

/// Brings the device up, offers a lie in queue `queue`, sends a packet that would be delivered, and sees the device ask for
/// its reset; afterwards everything works.
fn needs_a_reset(queue: usize, features: u64, lie: impl Fn(&Machine, &mut Driver)) {
    let nic = nic();
    let machine = &nic.machine;
    let mut drivers = Driver::start_queues(machine, 1, features, &[16, 16, 16]);
    nic.handle.pause().unwrap();
    nic.handle.resume().unwrap();
    lie(machine, &mut drivers[queue]);
    drivers[queue].kick(machine);
    nic.wire.send(&packet(1, 200)).unwrap();
    machine.messages.wait_until(|| drivers[queue].status(machine) & NEEDS_RESET != 0);
    let mut drivers = Driver::start_queues(machine, 1, features, &[16, 16, 16]);
    nic.handle.pause().unwrap();
    nic.handle.resume().unwrap();
    assert_eq!(drivers[0].status(machine) & NEEDS_RESET, 0);
    offer(&mut drivers[0], machine, BUFFERS, 2048);
    nic.wire.send(&packet(2, 200)).unwrap();
    drivers[0].collect(machine, 1);
    assert_eq!(at(machine, BUFFERS, 212), delivered(&packet(2, 200), 1));
}

#[test]
fn rings_that_lie_need_a_reset() {
    let outside = RAM as u64 + 0x1000;
    for features in [PLAIN, PLAIN | MERGEABLE] {
        needs_a_reset(0, features, |m, rx| _ = rx.offer(m, &[(outside, 2048, true)]));
        // A loop, and heads that are none.
        needs_a_reset(0, features, |m, rx| {
            Driver::raw_descriptor(m, 0, (BUFFERS, 16, 3, 1));
            Driver::raw_descriptor(m, 1, (BUFFERS, 16, 3, 0));
            rx.offer_head(m, 0);
        });
        needs_a_reset(0, features, |m, rx| rx.offer_head(m, 16));
        // A part that is readable behind one that is writable.
        needs_a_reset(0, features, |m, rx| _ = rx.offer(m, &[(BUFFERS, 2048, true), (BUFFERS, 8, false)]));
    }
    // The same head over and over, with nothing to write: the device does not collect for ever.
    needs_a_reset(0, PLAIN | MERGEABLE, |m, rx| {
        for round in 0..40 {
            rx.offer(m, &[(BUFFERS, 0, true)]);
            rx.kick(m);
            // Its index may run ahead of the device by the ring's size at most.
            if round % 16 == 15 {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
    needs_a_reset(1, PLAIN, |m, tx| _ = tx.offer(m, &[(outside, 200, false)]));
    let endless = (BUFFERS, u32::MAX, false);
    needs_a_reset(1, PLAIN, |m, tx| _ = tx.offer(m, &[endless, endless]));
    needs_a_reset(2, PLAIN | CONTROL, |m, ctrl| _ = ctrl.offer(m, &[(BUFFERS, 2, false)]));
    needs_a_reset(2, PLAIN | CONTROL, |m, ctrl| {
        ctrl.offer(m, &[(BUFFERS, 1, false), (BUFFERS + 8, 1, true)]);
    });
    needs_a_reset(2, PLAIN | CONTROL, |m, ctrl| {
        ctrl.offer(m, &[(outside, 2, false), (BUFFERS + 8, 1, true)]);
    });
}

#[test]
fn what_came_before_the_guest_listened_is_not_for_it() {
    let nic = nic();
    nic.wire.send(&packet(1, 100)).unwrap();
    nic.wire.send(&packet(2, 100)).unwrap();
    let machine = &nic.machine;
    let mut rx = Driver::start_queues(machine, 1, PLAIN, &[16, 16]).remove(0);
    offer(&mut rx, machine, BUFFERS, 2048);
    nic.handle.pause().unwrap();
    assert_eq!(rx.waiting(machine), 0);
    nic.handle.resume().unwrap();
    nic.wire.send(&packet(3, 100)).unwrap();
    rx.collect(machine, 1);
    assert_eq!(at(machine, BUFFERS, 112), delivered(&packet(3, 100), 1));
}

/// Sends a command to the device; gives its answer.
fn command(ctrl: &mut Driver, machine: &Machine, class: u8, command: u8) -> u8 {
    put_at(machine, BUFFERS, &[class, command]);
    put_at(machine, BUFFERS + 8, &[0xee]);
    ctrl.offer(machine, &[(BUFFERS, 2, false), (BUFFERS + 8, 1, true)]);
    ctrl.kick(machine);
    assert_eq!(ctrl.collect(machine, 1)[0].1, 1);
    at(machine, BUFFERS + 8, 1)[0]
}

#[test]
fn the_guests_place_is_announced_by_the_host_and_by_the_guest() {
    let nic = nic();
    let machine = &nic.machine;
    let features = PLAIN | STATUS | CONTROL | ANNOUNCE;
    let mut ctrl = Driver::start_queues(machine, 1, features, &[16, 16, 16]).remove(2);
    let config = machine.structure(1, 4);
    assert_eq!(command(&mut ctrl, machine, 0, 0), 1, "promiscuous mode was not offered");
    machine.bus.pause_all().unwrap();
    let generation = machine.read(ctrl.common + 0x15, 1);
    machine.messages.take();
    nic.handle.announce().unwrap();
    let frame = receive(&nic.wire);
    assert_eq!(frame.len(), HEADER + 60);
    assert_eq!(
        (&frame[12..18], &frame[18..24], &frame[24..26]),
        (&[0xff; 6][..], &MAC[..], &[0x80, 0x35][..])
    );
    machine.messages.wait_until(|| machine.read(config + 6, 2) == 3);
    assert_ne!(machine.read(ctrl.common + 0x15, 1), generation);
    while machine.messages.count() == 0 {
        std::thread::yield_now();
    }
    assert_eq!(machine.messages.take()[0].1, 0x42, "the configuration's vector");
    machine.bus.resume_all().unwrap();
    assert_eq!(command(&mut ctrl, machine, 3, 0), 0);
    assert_eq!(machine.read(config + 6, 2), 1, "the guest has said that it did");
    for _ in 1..5 {
        assert_eq!(receive(&nic.wire), frame);
    }
    nic.handle.pause().unwrap();
    nic.wire.set_nonblocking(true).unwrap();
    assert!(nic.wire.recv(&mut [0; 100]).is_err(), "five times is enough");
}

#[test]
fn a_guest_that_cannot_announce_itself_is_not_asked() {
    let nic = nic();
    let machine = &nic.machine;
    Driver::start_queues(machine, 1, PLAIN, &[16, 16]);
    nic.handle.announce().unwrap();
    receive(&nic.wire);
    nic.handle.pause().unwrap();
    assert_eq!(machine.read(machine.structure(1, 4) + 6, 2), 1);
}

#[test]
fn a_nic_that_left_sends_and_takes_nothing() {
    let nic = nic();
    let machine = &nic.machine;
    let mut drivers = Driver::start_queues(machine, 1, PLAIN, &[16, 16]);
    offer(&mut drivers[0], machine, BUFFERS, 2048);
    nic.handle.announce().unwrap();
    receive(&nic.wire);
    drop(nic.inner);
    nic.handle.leave().unwrap();
    assert!(nic.wire.send(&packet(1, 100)).is_err(), "nobody holds the other end");
    drivers[1].offer(machine, &[(BUFFERS, 100, false)]);
    drivers[1].kick(machine);
    nic.handle.announce().unwrap();
    nic.handle.pause().unwrap();
    assert_eq!((drivers[0].waiting(machine), drivers[1].waiting(machine)), (0, 0));
}

/// Saves a paused machine and goes on with its memory and state in a new one.
fn move_on(from: &Nic) -> Nic {
    let to = nic();
    to.machine.bus.pause_all().unwrap();
    copy_memory(&from.machine.memory, &to.machine.memory);
    let mut sections = Sections::new(from.machine.bus.save().unwrap()).unwrap();
    to.machine.bus.restore(&mut sections).unwrap();
    sections.finish().unwrap();
    // So that what is on the wire from now on is for this guest.
    to.handle.pause().unwrap();
    to
}

/// The saved state of a paused NIC.
fn state_of(nic: &Nic) -> FunctionState {
    let sections = nic.machine.bus.save().unwrap();
    sections.iter().find(|section| section.name == "pci/net-eth0").unwrap().decode(1).unwrap()
}

#[test]
fn a_packet_without_room_moves_along() {
    let from = nic();
    let mut rx = Driver::start_queues(&from.machine, 1, PLAIN | MERGEABLE, &[16, 16]).remove(0);
    from.handle.pause().unwrap();
    from.handle.resume().unwrap();
    offer(&mut rx, &from.machine, BUFFERS, 1000);
    from.wire.send(&packet(1, 1500)).unwrap();
    from.wire.send(&packet(2, 100)).unwrap();
    // Until the device has taken the first one from the wire.
    loop {
        from.machine.bus.pause_all().unwrap();
        if state_of(&from).transport.device != (DeviceState::Net { mac: MAC, pending: None }) {
            break;
        }
        from.machine.bus.resume_all().unwrap();
    }
    let to = move_on(&from);
    to.machine.bus.resume_all().unwrap();
    offer(&mut rx, &to.machine, BUFFERS + 1000, 1000);
    rx.collect(&to.machine, 2);
    assert_eq!(at(&to.machine, BUFFERS, 1512), delivered(&packet(1, 1500), 2));
    // The source goes on as well, had it been an abort: with the very same packets.
    from.machine.bus.resume_all().unwrap();
    assert_eq!(from.machine.used_index(), 0);
}

#[test]
fn each_lie_of_a_saved_state_is_refused_by_name() {
    let from = nic();
    Driver::start_queues(&from.machine, 1, PLAIN | MERGEABLE, &[16, 16]);
    from.machine.bus.pause_all().unwrap();
    let sections = from.machine.bus.save().unwrap();
    let place = sections.iter().position(|section| section.name == "pci/net-eth0").unwrap();
    let honest: FunctionState = sections[place].decode(1).unwrap();
    let lies = [
        ("an entropy device", DeviceState::Entropy),
        ("52:54:00:01:02:04", DeviceState::Net { mac: [0x52, 0x54, 0, 1, 2, 4], pending: None }),
        ("multicast", DeviceState::Net { mac: [1, 0, 0, 0, 0, 1], pending: None }),
        ("0 bytes", DeviceState::Net { mac: MAC, pending: Some(Vec::new()) }),
        ("25 bytes", DeviceState::Net { mac: MAC, pending: Some(vec![0; 25]) }),
        ("100000 bytes", DeviceState::Net { mac: MAC, pending: Some(vec![0; 100_000]) }),
    ];
    let target = nic();
    target.machine.bus.pause_all().unwrap();
    let restore = |state: &FunctionState| {
        let mut sections = sections.clone();
        sections[place] = Section::encode("pci/net-eth0", 1, state).unwrap();
        target.machine.bus.restore(&mut Sections::new(sections).unwrap()).map_err(|error| error.to_string())
    };
    for (name, device) in lies {
        let mut state = honest.clone();
        state.transport.device = device;
        let error = restore(&state).unwrap_err();
        assert!(error.contains("eth0") && error.contains(name), "{name}: {error}");
    }
    // Offloads that the wire here does not have.
    let mut state = honest.clone();
    state.transport.driver_features |= 1 << 10;
    assert!(restore(&state).unwrap_err().contains("features"));
    restore(&honest).unwrap();
}

/// What happens to a NIC in the property test.
#[derive(Clone, Debug)]
enum Step {
    /// The guest offers a receive buffer.
    Offer(u16),
    /// The network sends a packet.
    Arrive(u16),
    /// The guest sends a packet.
    Send(u16),
    /// A pause and nothing more, as when a move is given up.
    Pause,
    /// A move to another host.
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (200u16..3000).prop_map(Step::Offer),
        4 => (14u16..4000).prop_map(Step::Arrive),
        3 => (14u16..3000).prop_map(Step::Send),
        1 => Just(Step::Pause),
        1 => Just(Step::Move),
    ]
}

const SLOT: u64 = 0x1000;
const RING: u16 = 64;

/// Both directions against what a network would have seen: every packet once, whole and in order, whatever happens between.
fn run(steps: Vec<Step>) {
    let mut nic = nic();
    let mut drivers = Driver::start_queues(&nic.machine, 1, PLAIN | MERGEABLE, &[RING, RING]);
    nic.handle.pause().unwrap();
    nic.handle.resume().unwrap();
    let (mut arrived, mut got) = (Vec::new(), Vec::new());
    let (mut sent, mut seen) = (Vec::new(), Vec::new());
    // Offered and not yet used, by head.
    let mut offered: std::collections::VecDeque<(u16, u64, u32)> = std::collections::VecDeque::new();
    let mut slots = 0u64;
    for (seed, step) in (1u64..).zip(steps) {
        match step {
            Step::Offer(len) if offered.len() < usize::from(RING) => {
                let address = BUFFERS + slots % 128 * SLOT;
                slots += 1;
                let head = drivers[0].offer(&nic.machine, &[(address, u32::from(len), true)]);
                drivers[0].kick(&nic.machine);
                offered.push_back((head, address, u32::from(len)));
            }
            Step::Arrive(len) => {
                let packet = packet(seed, usize::from(len));
                nic.wire.set_nonblocking(true).unwrap();
                if nic.wire.send(&packet).is_ok() {
                    arrived.push(packet);
                }
                nic.wire.set_nonblocking(false).unwrap();
            }
            Step::Send(len) => {
                let packet = packet(seed, usize::from(len));
                let address = BUFFERS + 128 * SLOT;
                put_at(&nic.machine, address, &packet);
                drivers[1]
                    .offer(&nic.machine, &[(address, 12, false), (address + 12, u32::from(len), false)]);
                drivers[1].kick(&nic.machine);
                sent.push(packet);
                drivers[1].collect(&nic.machine, 1);
                seen.push(receive(&nic.wire));
            }
            Step::Pause => {
                nic.machine.bus.pause_all().unwrap();
                nic.machine.bus.resume_all().unwrap();
            }
            Step::Move => {
                nic.machine.bus.pause_all().unwrap();
                let to = move_on(&nic);
                // What the source's wire still holds was not taken: the network would send it to the new place.
                let mut left = vec![0; 1 << 17];
                while let Ok(len) = nic.inner.recv(&mut left) {
                    to.wire.send(&left[..len]).unwrap();
                }
                nic = to;
                nic.machine.bus.resume_all().unwrap();
            }
            Step::Offer(_) => {}
        }
        // Take what has been delivered so far, a packet at a time.
        take(&nic, &mut drivers[0], &mut offered, &mut got);
    }
    // Give it room for all the rest.
    let end = Instant::now() + PATIENCE;
    while got.len() < arrived.len() {
        assert!(Instant::now() < end, "{} packets of {} came", got.len(), arrived.len());
        if offered.len() < usize::from(RING) {
            let address = BUFFERS + slots % 128 * SLOT;
            slots += 1;
            let head = drivers[0].offer(&nic.machine, &[(address, 4000, true)]);
            drivers[0].kick(&nic.machine);
            offered.push_back((head, address, 4000));
        }
        std::thread::yield_now();
        take(&nic, &mut drivers[0], &mut offered, &mut got);
    }
    for (index, (got, arrived)) in got.iter().zip(&arrived).enumerate() {
        assert!(got[HEADER..] == arrived[HEADER..], "packet {index} of {}", arrived.len());
    }
    assert_eq!(seen, sent);
    assert_eq!(drivers[0].status(&nic.machine) & NEEDS_RESET, 0);
}

fn take(
    nic: &Nic,
    rx: &mut Driver,
    offered: &mut std::collections::VecDeque<(u16, u64, u32)>,
    got: &mut Vec<Vec<u8>>,
) {
    while rx.waiting(&nic.machine) > 0 {
        let mut packet = Vec::new();
        let mut left = 1;
        while left > 0 {
            let (head, len) = rx.collect(&nic.machine, 1)[0];
            let (offered_head, address, room) = offered.pop_front().expect("only offered buffers come back");
            assert!(head == offered_head && len <= room);
            packet.extend(at(&nic.machine, address, len as usize));
            if packet.len() == len as usize {
                left = u16::from_le_bytes([packet[10], packet[11]]);
                assert!(rx.waiting(&nic.machine) + 1 >= left, "all buffers of a packet are seen together");
            }
            left -= 1;
        }
        got.push(packet);
    }
}

#[test]
fn every_packet_goes_once_and_in_order() {
    let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(steps in proptest::collection::vec(step(), 1..60))| run(steps));
}
