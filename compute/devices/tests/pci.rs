//! The bus as a guest finds it: identities, capabilities, base addresses, interrupts, and the virtio registers behind
//! them. The device is the entropy one, which needs no disk.

mod support;

use std::sync::Arc;

use support::*;
use vm_memory::{Bytes, GuestAddress};
use vmove_devices::{DeviceError, PciBus, Rng};

fn machine() -> Machine {
    let mut machine = Machine::new(memory());
    let rng = Rng::new(Arc::clone(&machine.memory)).unwrap();
    machine.bus.add_virtio("rng", Box::new(rng)).unwrap();
    machine
}

#[test]
fn linux_finds_the_mechanism_and_the_devices() {
    let machine = machine();
    // What Linux's pci_check_type1 does: a byte write must not disturb the latch.
    machine.bus.io_write(0xcfb, &[1]);
    machine.bus.io_write(0xcf8, &0x8000_0000u32.to_le_bytes());
    let mut latch = [0; 4];
    machine.bus.io_read(0xcf8, &mut latch);
    assert_eq!(u32::from_le_bytes(latch), 0x8000_0000);
    assert_eq!(machine.config_read(0, 0, 2), 0x8086);
    assert_eq!(machine.config_read(0, 10, 2), 0x0600, "a host bridge");
    assert_eq!(machine.config_read(1, 0, 4), 0x1044_1af4);
    assert_eq!(machine.config_read(2, 0, 4), 0xffff_ffff, "an empty slot");
    machine.bus.io_write(0xcf8, &0u32.to_le_bytes());
    let mut data = [0; 4];
    machine.bus.io_read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4], "the latch is not enabled");
}

#[test]
fn names_are_unique_and_slots_end() {
    let mut machine = machine();
    let mut add = |name: &str| {
        let rng = Rng::new(Arc::clone(&machine.memory)).unwrap();
        machine.bus.add_virtio(name, Box::new(rng))
    };
    assert!(matches!(add("rng"), Err(DeviceError::BusFull { .. })));
    for index in 1..31 {
        add(&format!("rng{index}")).unwrap();
    }
    assert!(matches!(add("one too many"), Err(DeviceError::BusFull { .. })));
    assert_eq!(machine.config_read(31, 0, 4), 0x1044_1af4);
}

#[test]
fn the_window_is_sized_moved_and_switched_off_with_its_doorbells() {
    let machine = machine();
    let bar = u64::from(machine.config_read(1, 0x10, 4));
    assert_eq!(bar, PciBus::MMIO_START);
    let notify = machine.structure(1, 2);
    assert_eq!(machine.bells.connected(), [notify]);

    machine.config_write(1, 0x10, 0xffff_ffff, 4);
    let size = !machine.config_read(1, 0x10, 4) + 1;
    assert!(size.is_power_of_two());
    assert!(machine.bells.connected().is_empty(), "while sized it is nowhere");
    assert!(!machine.bus.mmio_read(bar, &mut [0]));

    machine.config_write(1, 0x10, 0xe100_0000, 4);
    assert_eq!(machine.bells.connected(), [0xe100_0000 + (notify - bar)]);
    assert_eq!(machine.read(0xe100_0000 + 0x12, 2), 1, "one queue");
    assert!(!machine.bus.mmio_read(bar, &mut [0]));

    machine.config_write(1, 4, 0, 2);
    assert!(machine.bells.connected().is_empty());
    assert!(!machine.bus.mmio_write(0xe100_0000, &[0]));
    machine.config_write(1, 4, 6, 2);
    assert_eq!(machine.bells.connected().len(), 1);

    machine.config_write(1, 0x10, 0x1000_0000, 4);
    assert!(machine.bells.connected().is_empty(), "not over RAM");
    assert!(!machine.bus.mmio_read(0x1000_0000, &mut [0]));
}

#[test]
fn the_configuration_access_capability_reaches_the_window() {
    let machine = machine();
    let at = machine.capability(1, 9, 5);
    machine.config_write(1, at + 4, 0, 1);
    machine.config_write(1, at + 8, 0x12, 4);
    machine.config_write(1, at + 12, 2, 4);
    assert_eq!(machine.config_read(1, at + 16, 2), 1, "num_queues");
    machine.config_write(1, at + 8, 0x14, 4);
    machine.config_write(1, at + 12, 1, 4);
    machine.config_write(1, at + 16, 3, 1);
    assert_eq!(machine.read(machine.structure(1, 1) + 0x14, 1), 3, "device_status");
    machine.config_write(1, at + 12, 3, 4);
    machine.config_write(1, at + 16, 0, 1);
    machine.config_write(1, at + 8, 0xffff_fffc, 4);
    machine.config_write(1, at + 12, 4, 4);
    machine.config_write(1, at + 16, 0, 4);
    assert_eq!(machine.read(machine.structure(1, 1) + 0x14, 1), 3, "odd accesses do nothing");
}

#[test]
fn entropy_comes_with_and_without_interrupts() {
    let machine = machine();
    for features in [VERSION_1, VERSION_1 | EVENT_IDX | INDIRECT] {
        let mut driver = Driver::start(&machine, 1, features, 16);
        for round in 0..100u64 {
            let buffer = BUFFERS + round * 0x100;
            machine.memory.write_slice(&[0; 64], GuestAddress(buffer)).unwrap();
            driver.offer(&machine, &[(buffer, 30, true), (buffer + 30, 34, true)]);
            driver.kick(&machine);
            let used = driver.collect(&machine, 1);
            assert_eq!(used[0].1, 64);
            let mut bytes = [0; 64];
            machine.memory.read_slice(&mut bytes, GuestAddress(buffer)).unwrap();
            assert!(bytes[..30] != [0; 30] && bytes[30..] != [0; 34], "both buffers are filled");
        }
        assert!(machine.messages.take().iter().all(|message| *message == (0xfee0_0000, 0x43)));
    }
}

#[test]
fn features_are_negotiated_and_locked() {
    let machine = machine();
    let common = machine.structure(1, 1);
    let feature = |select: u64, value: u64| {
        machine.write(common + 8, select, 4);
        machine.write(common + 12, value, 4);
    };
    machine.write(common, 1, 4);
    assert_eq!(machine.read(common + 4, 4) & 1, 1, "VERSION_1 is offered");
    machine.write(common + 0x14, 3, 1);
    feature(0, 0);
    machine.write(common + 0x14, 11, 1);
    assert_eq!(machine.read(common + 0x14, 1), 3, "not without VERSION_1");
    feature(1, 1);
    feature(0, 1);
    machine.write(common + 0x14, 11, 1);
    assert_eq!(machine.read(common + 0x14, 1), 3, "not with what was not offered");
    feature(0, 0);
    machine.write(common + 0x14, 11, 1);
    assert_eq!(machine.read(common + 0x14, 1), 11);
    feature(0, 5);
    assert_eq!(machine.read(common + 12, 4), 0, "locked");
    machine.write(common + 0x14, 0, 1);
    assert_eq!(machine.read(common + 0x14, 1), 0);
}

#[test]
fn rings_outside_of_memory_need_a_reset() {
    let machine = machine();
    let driver = Driver::start(&machine, 1, VERSION_1, 16);
    let common = driver.common;
    machine.write(common + 0x14, 0, 1);
    assert_eq!(machine.read(common + 0x18, 2), 64, "reset restores the size");
    machine.write(common + 0x0c, 0, 4);
    machine.write(common + 0x08, 1, 4);
    machine.write(common + 0x0c, 1, 4);
    machine.write(common + 0x14, 11, 1);
    machine.write(common + 0x18, 16, 2);
    machine.write(common + 0x18, 17, 2);
    machine.write(common + 0x18, 128, 2);
    assert_eq!(machine.read(common + 0x18, 2), 16, "odd sizes are ignored");
    machine.write(common + 0x20, RAM as u64 - 0x10, 8);
    machine.write(common + 0x28, AVAILABLE, 8);
    machine.write(common + 0x30, USED, 8);
    machine.write(common + 0x1c, 1, 2);
    machine.write(common + 0x14, 15, 1);
    assert_eq!(machine.read(common + 0x14, 1) & NEEDS_RESET, NEEDS_RESET);
    machine.write(common + 0x14, 0, 1);
    assert_eq!(machine.read(common + 0x14, 1), 0);
    let mut driver = Driver::start(&machine, 1, VERSION_1, 16);
    driver.offer(&machine, &[(BUFFERS, 8, true)]);
    driver.kick(&machine);
    driver.collect(&machine, 1);
}

#[test]
fn nonsense_in_the_rings_needs_a_reset() {
    let good = |driver: &mut Driver, machine: &Machine| {
        driver.offer(machine, &[(BUFFERS, 8, true)]);
    };
    type Damage = fn(&mut Driver, &Machine);
    let damages: [Damage; 6] = [
        // More chains than the ring has.
        |_, machine| machine.memory.write_obj(1000u16, GuestAddress(AVAILABLE + 2)).unwrap(),
        // A head outside of the table.
        |driver, machine| driver.offer_head(machine, 16),
        // A loop.
        |driver, machine| {
            Driver::raw_descriptor(machine, 3, (BUFFERS, 8, 3, 3));
            driver.offer_head(machine, 3);
        },
        // A link out of the table.
        |driver, machine| {
            Driver::raw_descriptor(machine, 3, (BUFFERS, 8, 3, 99));
            driver.offer_head(machine, 3);
        },
        // An indirect table of half a descriptor.
        |driver, machine| {
            Driver::raw_descriptor(machine, 3, (BUFFERS, 8, 4, 0));
            driver.offer_head(machine, 3);
        },
        // An indirect table outside of memory.
        |driver, machine| {
            Driver::raw_descriptor(machine, 3, (1 << 40, 32, 4, 0));
            driver.offer_head(machine, 3);
        },
    ];
    let machine = machine();
    for damage in damages {
        let mut driver = Driver::start(&machine, 1, VERSION_1, 16);
        good(&mut driver, &machine);
        driver.kick(&machine);
        driver.collect(&machine, 1);
        machine.messages.take();
        damage(&mut driver, &machine);
        driver.kick(&machine);
        machine.messages.wait_until(|| driver.status(&machine) & NEEDS_RESET != 0);
        assert_eq!(machine.messages.take(), [(0xfee0_0000, 0x42)], "the configuration vector");
        let isr = machine.structure(1, 3);
        assert_eq!(machine.read(isr, 1) & 2, 2);
        assert_eq!(machine.read(isr, 1), 0, "reading clears it");
    }
    let mut driver = Driver::start(&machine, 1, VERSION_1, 16);
    good(&mut driver, &machine);
    driver.kick(&machine);
    driver.collect(&machine, 1);
}
