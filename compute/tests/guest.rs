//! The bare-metal guest on real KVM: it stamps RAM and disk and checks them for ever, through saves and restores into
//! new machines.

mod support;

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use support::{Console, copy_of, kvm_usable};
use vmove_compute::machine::{DiskConfig, DiskSource, Machine, MachineConfig};
use vmove_storage::{ImageFormat, ImageSpec, OpenOptions};

const MIB: u64 = 1 << 20;

fn config(directory: &Path, vcpus: u8, words: &str) -> MachineConfig {
    let kernel = directory.join("guest.elf");
    std::fs::File::create(&kernel).unwrap().write_all(vmove_guest_image::GUEST_ELF).unwrap();
    let image = directory.join("disk.qcow2");
    vmove_storage::create(&image, &ImageSpec::new(ImageFormat::Qcow2, 64 * MIB)).unwrap();
    MachineConfig {
        vcpus,
        memory_bytes: 64 * MIB,
        kernel: Some(kernel),
        initrd: None,
        cmdline: format!("vmove.cpus={vcpus} vmove.heartbeat_ms=50 {words}"),
        disks: vec![DiskConfig {
            name: "disk0".to_owned(),
            source: DiskSource::Image { path: image, options: OpenOptions::default() },
        }],
        networks: Vec::new(),
    }
}

/// The fields of a `key=value` line of that kind.
fn fields(line: &str, kind: &str) -> Option<HashMap<String, u64>> {
    let rest = line.strip_prefix(kind)?.strip_prefix(' ')?;
    rest.split(' ')
        .map(|pair| {
            let (key, value) = pair.split_once('=')?;
            Some((key.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// The first line of that kind after `seen` lines, and the number of lines up to it. Fails on an error line.
fn next_line(console: &Console, kind: &str, seen: usize) -> (HashMap<String, u64>, usize) {
    console.wait(kind, |lines| {
        if let Some(error) = lines.iter().find(|line| line.starts_with("error ")) {
            panic!("the guest says: {error}");
        }
        let (at, found) =
            lines.iter().enumerate().skip(seen).find_map(|(at, line)| Some((at, fields(line, kind)?)))?;
        Some((found, at + 1))
    })
}

fn check_all(machine: &Machine, console: &Console) {
    let seen = console.text().lines().count();
    machine.console_input(b"c");
    let (check, _) = next_line(console, "check", seen.saturating_sub(1));
    assert_eq!((check["ram_errors"], check["disk_errors"]), (0, 0), "{check:?}");
    assert!(check["checked_pages"] > 0 && check["checked_blocks"] > 0, "{check:?}");
}

#[test]
fn the_guest_moves_through_many_machines_without_an_error() {
    if !kvm_usable("guest") {
        return;
    }
    for vcpus in [1, 2] {
        let directory = tempfile::tempdir().unwrap();
        let words = "vmove.fill_mib=24 vmove.ram_mib=8 vmove.ram_rate=1000 vmove.disk_mib=8 vmove.disk_rate=200 \
                     vmove.flush_ms=100 vmove.discard=1";
        let config = config(directory.path(), vcpus, words);
        let console = Console::new();
        let mut machine = Machine::boot(config.clone(), console.sink()).unwrap();
        machine.resume().unwrap();
        let (ready, _) = next_line(&console, "vmove-guest ready", 0);
        assert_eq!(ready["cpus"], u64::from(vcpus));
        let (mut beat, mut seen) = next_line(&console, "hb", 0);
        for _ in 0..6 {
            machine.pause().unwrap();
            let sections = machine.save_state().unwrap();
            let ram = copy_of(machine.ram());
            let here = machine.ram().clone();
            drop(machine);
            machine = Machine::restore(config.clone(), ram, sections, console.sink()).unwrap();
            let (before, after) = (here.bytes_of(0, here.pages()), machine.ram().bytes_of(0, here.pages()));
            assert!(before.unwrap() == after.unwrap(), "restoring must not touch RAM");
            machine.resume().unwrap();
            // The second one after the move is wholly of the new machine.
            seen = next_line(&console, "hb", seen).1;
            let (next, at) = next_line(&console, "hb", seen);
            assert!(next["seq"] > beat["seq"] && next["written_pages"] > beat["written_pages"], "{next:?}");
            assert!(next["up_ms"] > beat["up_ms"], "the clock goes on");
            assert_eq!((next["ram_errors"], next["disk_errors"]), (0, 0), "{next:?}");
            (beat, seen) = (next, at);
        }
        assert!(next_line(&console, "hb", seen).0["written_blocks"] > 0);
        check_all(&machine, &console);
    }
}

#[test]
fn flushed_writes_are_there_after_a_power_cut() {
    if !kvm_usable("power cut") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let config =
        config(directory.path(), 1, "vmove.disk_mib=4 vmove.disk_rate=500 vmove.flush_ms=50 vmove.ram_mib=1");
    let console = Console::new();
    let machine = Machine::boot(config.clone(), console.sink()).unwrap();
    machine.resume().unwrap();
    let (_, mut seen) = next_line(&console, "vmove-guest ready", 0);
    let mut flushed = 0;
    while flushed == 0 {
        let (beat, at) = next_line(&console, "hb", seen);
        (flushed, seen) = (beat["flushed_seq"], at);
    }
    drop(machine);
    let console = Console::new();
    let machine = Machine::boot(config, console.sink()).unwrap();
    machine.resume().unwrap();
    let (recovered, _) = next_line(&console, "recovered", 0);
    assert_eq!(recovered["errors"], 0, "{recovered:?}");
    assert!(recovered["flushed_seq"] >= flushed, "{recovered:?} but {flushed} was flushed");
}
