//! Saving a machine's devices and going on elsewhere; and what becomes of states that lie.

mod support;

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use support::requests::*;
use support::*;
use vmove_devices::pci::{BusState, FunctionState};
use vmove_devices::state::{Section, Sections, StateError};
use vmove_devices::virtio::DeviceState;
use vmove_devices::{Block, DeviceError, DiskHandle, Rng};
use vmove_storage::{ImageFormat, ImageSpec, OpenOptions};

const DISK: u64 = 16 << 20;
const FEATURES: u64 = VERSION_1 | EVENT_IDX | INDIRECT;

struct Host {
    machine: Machine,
    disk: DiskHandle,
}

fn host(image: &Path) -> Host {
    let mut machine = Machine::new(memory());
    let disk = DiskHandle::open("disk0", image, OpenOptions::default()).unwrap();
    let block = Block::new(Arc::clone(&machine.memory), disk.clone(), "serial");
    machine.bus.add_virtio("disk0", Box::new(block)).unwrap();
    let rng = Rng::new(Arc::clone(&machine.memory)).unwrap();
    machine.bus.add_virtio("rng", Box::new(rng)).unwrap();
    Host { machine, disk }
}

fn image() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    vmove_storage::create(&path, &ImageSpec::new(ImageFormat::Qcow2, DISK)).unwrap();
    (dir, path)
}

#[test]
fn a_machine_goes_on_elsewhere_again_and_again() {
    let (_dir, image) = image();
    let mut here = host(&image);
    // A window of its own, so that the target has to connect its doorbells elsewhere than by default.
    here.machine.config_write(1, 0x10, 0xe800_0000, 4);
    let mut driver = Driver::start(&here.machine, 1, FEATURES, 64);
    write(&mut driver, &here.machine, 0, &pattern(0, 512));
    for round in 0..40u64 {
        // Offered and notified during the pause: the target has to find them without a notification.
        here.machine.bus.pause_all().unwrap();
        for slot in 0..5 {
            header(&here.machine, slot, if slot % 2 == 0 { OUT } else { IN }, round * 8 + slot / 2);
            put(&here.machine, slot, &pattern(round * 10 + slot, 512));
            driver.offer(&here.machine, &chain(slot, 512, slot % 2 == 1));
        }
        driver.kick(&here.machine);
        let sections = here.machine.bus.save().unwrap();
        let before = here.machine.messages.count();
        here.disk.stop().unwrap();

        let there = host(&image);
        copy_memory(&here.machine.memory, &there.machine.memory);
        let mut sections = Sections::new(sections).unwrap();
        there.machine.bus.restore(&mut sections).unwrap();
        sections.finish().unwrap();
        assert!(there.machine.bells.connected().contains(&0xe800_3000));
        assert_eq!(there.machine.messages.count(), 0, "a restore sends nothing");
        let used = there.machine.used_index();
        there.disk.pause().unwrap();
        assert_eq!(there.machine.used_index(), used, "it is restored paused");
        there.machine.bus.resume_all().unwrap();
        driver.collect(&there.machine, 5);
        assert_eq!(here.machine.messages.count(), before, "nothing runs at the source");
        for slot in [0, 2, 4] {
            assert_eq!(status(&there.machine, slot), OK);
        }
        assert_eq!(read(&mut driver, &there.machine, round * 8 + 2, 512), pattern(round * 10 + 4, 512));
        assert!(driver.status(&there.machine) & NEEDS_RESET == 0);
        here = there;
    }
    assert_eq!(read(&mut driver, &here.machine, 39 * 8, 512), pattern(390, 512));
}

#[test]
fn masked_and_pending_interrupts_move_along() {
    let (_dir, image) = image();
    let here = host(&image);
    let mut driver = Driver::start(&here.machine, 1, VERSION_1, 64);
    let bar = u64::from(here.machine.config_read(1, 0x10, 4));
    let table = bar + u64::from(here.machine.config_read(1, here.machine.capability(1, 0x11, 0) + 4, 4));
    here.machine.write(table + 16 + 12, 1, 4);
    header(&here.machine, 0, FLUSH, 0);
    driver.offer(&here.machine, &chain(0, 0, false));
    driver.kick(&here.machine);
    while here.machine.used_index() == 0 {
        std::thread::yield_now();
    }
    here.machine.bus.pause_all().unwrap();
    assert_eq!(here.machine.messages.count(), 0);
    let sections = here.machine.bus.save().unwrap();
    here.disk.stop().unwrap();

    let there = host(&image);
    copy_memory(&here.machine.memory, &there.machine.memory);
    there.machine.bus.restore(&mut Sections::new(sections).unwrap()).unwrap();
    there.machine.bus.resume_all().unwrap();
    there.machine.write(table + 16 + 12, 0, 4);
    assert_eq!(there.machine.messages.take(), [(0xfee0_0000, 0x43)]);
    driver.collect(&there.machine, 1);
}

#[test]
fn a_device_without_a_driver_and_a_broken_one_move_too() {
    let (_dir, image) = image();
    let here = host(&image);
    let mut driver = Driver::start(&here.machine, 1, VERSION_1, 64);
    driver.offer_head(&here.machine, 64);
    driver.kick(&here.machine);
    here.machine.messages.wait_until(|| driver.status(&here.machine) & NEEDS_RESET != 0);
    here.machine.bus.pause_all().unwrap();
    let sections = here.machine.bus.save().unwrap();
    here.disk.stop().unwrap();

    let there = host(&image);
    copy_memory(&here.machine.memory, &there.machine.memory);
    there.machine.bus.restore(&mut Sections::new(sections).unwrap()).unwrap();
    there.machine.bus.resume_all().unwrap();
    assert_eq!(driver.status(&there.machine), 15 | NEEDS_RESET);
    let mut driver = Driver::start(&there.machine, 1, VERSION_1, 64);
    write(&mut driver, &there.machine, 0, &pattern(1, 512));
    let mut rng = Driver::start(&there.machine, 2, VERSION_1, 16);
    rng.offer(&there.machine, &[(BUFFERS, 8, true)]);
    rng.kick(&there.machine);
    assert_eq!(rng.collect(&there.machine, 1)[0].1, 8);
}

/// A saved machine with an active disk, and one to restore it into.
struct Saved {
    sections: Vec<Section>,
    target: Host,
    _dir: tempfile::TempDir,
}

fn saved() -> Saved {
    let (dir, image) = image();
    let here = host(&image);
    let mut driver = Driver::start(&here.machine, 1, FEATURES, 64);
    write(&mut driver, &here.machine, 0, &pattern(0, 512));
    here.machine.bus.pause_all().unwrap();
    let sections = here.machine.bus.save().unwrap();
    here.disk.stop().unwrap();
    let target = host(&image);
    copy_memory(&here.machine.memory, &target.machine.memory);
    Saved { sections, target, _dir: dir }
}

#[test]
fn each_lie_is_refused_by_name() {
    let saved = saved();
    let bus = &saved.target.machine.bus;
    let place = saved.sections.iter().position(|section| section.name == "pci/disk0").unwrap();
    let honest: FunctionState = saved.sections[place].decode(1).unwrap();
    type Lie = (&'static str, fn(&mut FunctionState));
    let lies: [Lie; 15] = [
        ("configuration byte", |state| state.config.bytes[0] ^= 1),
        ("bytes of configuration", |state| _ = state.config.bytes.pop()),
        ("interrupt vectors", |state| _ = state.msix.entries.pop()),
        ("interrupt vectors", |state| state.msix.pending.push(true)),
        ("status", |state| state.transport.status |= 64),
        ("status", |state| state.transport.status &= !8),
        ("features", |state| state.transport.driver_features |= 1 << 33),
        ("queues", |state| state.transport.queues.push(state.transport.queues[0])),
        ("queues", |state| _ = state.transport.interrupt.queue_vectors.pop()),
        ("queue 0", |state| state.transport.queues[0].size = 512),
        ("queue 0", |state| state.transport.queues[0].size = 3),
        ("queue 0", |state| state.transport.queues[0].size = 0),
        ("queue 0", |state| state.transport.queues[0].descriptors = !0xf),
        ("queue 0", |state| state.transport.queues[0].available += 1),
        ("an entropy device", |state| state.transport.device = DeviceState::Entropy),
    ];
    for (name, lie) in lies {
        let mut state = honest.clone();
        lie(&mut state);
        let mut sections = saved.sections.clone();
        sections[place] = Section::encode("pci/disk0", 1, &state).unwrap();
        let error = bus.restore(&mut Sections::new(sections).unwrap()).unwrap_err().to_string();
        assert!(error.contains("disk0") && error.contains(name), "{name}: {error}");
    }
    let mut other_size = honest.clone();
    other_size.transport.device =
        DeviceState::Block { sectors: 7, read_only: false, serial: "serial".into() };
    let mut sections = saved.sections.clone();
    sections[place] = Section::encode("pci/disk0", 1, &other_size).unwrap();
    assert!(bus.restore(&mut Sections::new(sections).unwrap()).is_err());
    // And the honest one still goes.
    bus.restore(&mut Sections::new(saved.sections).unwrap()).unwrap();
}

#[test]
fn another_machine_is_refused() {
    let saved = saved();
    let bus = &saved.target.machine.bus;
    let mut sections = saved.sections.clone();
    let names = vec!["disk1".to_owned(), "rng".to_owned()];
    sections[0] = Section::encode("pci", 1, &BusState { address: 0, functions: names }).unwrap();
    assert!(matches!(bus.restore(&mut Sections::new(sections).unwrap()), Err(DeviceError::BadState { .. })));
    let mut sections = saved.sections.clone();
    sections.pop();
    assert!(matches!(
        bus.restore(&mut Sections::new(sections).unwrap()),
        Err(DeviceError::State(StateError::Missing(name))) if name == "pci/rng"
    ));
    let mut sections = saved.sections;
    sections[1].version = 2;
    assert!(matches!(
        bus.restore(&mut Sections::new(sections).unwrap()),
        Err(DeviceError::State(StateError::Version { .. }))
    ));
}

#[test]
fn a_position_that_cannot_be_true_needs_a_reset() {
    let saved = saved();
    let mut sections = saved.sections;
    let mut state: FunctionState = sections[1].decode(1).unwrap();
    state.transport.queues[0].position.next_avail = 30_000;
    sections[1] = Section::encode("pci/disk0", 1, &state).unwrap();
    let machine = &saved.target.machine;
    machine.bus.restore(&mut Sections::new(sections).unwrap()).unwrap();
    machine.bus.resume_all().unwrap();
    machine.messages.wait_until(|| machine.read(machine.structure(1, 1) + 0x14, 1) & NEEDS_RESET != 0);
}

#[test]
fn damaged_bytes_never_panic() {
    let saved = saved();
    let bus = &saved.target.machine.bus;
    let config = ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() };
    let sections = saved.sections;
    let strategy = (0..sections.len(), any::<prop::sample::Index>(), any::<u8>(), 0..3u8);
    proptest!(config, |((which, at, value, kind) in strategy)| {
        let mut sections = sections.clone();
        let bytes = &mut sections[which].bytes;
        let at = at.index(bytes.len());
        match kind {
            0 => bytes[at] = value,
            1 => bytes.truncate(at),
            _ => bytes.insert(at, value),
        }
        // Either it is refused, or it is a state that devices can live with.
        if bus.restore(&mut Sections::new(sections).unwrap()).is_ok() {
            bus.resume_all().unwrap();
            bus.pause_all().unwrap();
        }
    });
}
