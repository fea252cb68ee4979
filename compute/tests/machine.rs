//! Machines on real KVM with kernels of a few instructions: boot, end, pause, save and restore.

mod support;

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use support::{Console, LOAD, bzimage, copy_of, elf, kvm_usable, print_and_power_off};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};
use vmove_compute::kvm::{ExitReason, VmState, host_features, missing_features};
use vmove_compute::machine::{Error, Machine, MachineConfig};
use vmove_compute::memory::GuestRam;
use vmove_devices::state::{Section, Sections};

const RAM: u64 = 16 << 20;

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn config(kernel: &Path, vcpus: u8) -> MachineConfig {
    MachineConfig {
        vcpus,
        memory_bytes: RAM,
        kernel: Some(kernel.to_owned()),
        initrd: None,
        cmdline: "console=ttyS0".to_owned(),
        disks: Vec::new(),
        networks: Vec::new(),
    }
}

/// Counts at 2 MiB for ever, in 32-bit mode: inc dword [0x200000]; jmp.
const COUNTER: [u8; 8] = [0xff, 0x05, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf8];
const COUNT_AT: GuestAddress = GuestAddress(0x20_0000);

fn count(machine: &Machine) -> u32 {
    machine.ram().memory().read_obj(COUNT_AT).unwrap()
}

/// Waits until the guest has counted past `from`. The limit only ends a test that hangs.
fn counts_on(machine: &Machine, from: u32) {
    let end = Instant::now() + Duration::from_mins(1);
    while count(machine) <= from {
        assert!(machine.exit_reason().is_none(), "{:?}", machine.exit_reason());
        assert!(Instant::now() < end, "the guest does not count");
        std::thread::yield_now();
    }
}

#[test]
fn a_kernel_prints_and_powers_off_from_every_entry() {
    if !kvm_usable("boot") {
        return;
    }
    let code = print_and_power_off(LOAD, b"hello\n");
    let images = [
        ("PVH", elf(&code, true)),
        ("ELF", elf(&code, false)),
        ("bzImage", bzimage(&print_and_power_off(LOAD + 0x200, b"hello\n"))),
    ];
    for (format, image) in images {
        let kernel = file(&image);
        let console = Console::new();
        let machine = Machine::boot(config(kernel.path(), 2), console.sink()).unwrap();
        machine.resume().unwrap();
        assert_eq!(machine.wait_exit(), ExitReason::Shutdown, "{format}");
        assert_eq!(console.text(), "hello\n");
        machine.pause().unwrap();
        assert!(matches!(machine.resume(), Err(Error::NotNow { .. })));
        assert!(matches!(machine.save_state(), Err(Error::NotNow { .. })));
    }
}

#[test]
fn a_triple_fault_resets() {
    if !kvm_usable("triple fault") {
        return;
    }
    let kernel = file(&elf(&[0x0f, 0x0b], true));
    let machine = Machine::boot(config(kernel.path(), 1), Console::new().sink()).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(), ExitReason::Reset);
}

#[test]
fn a_reset_through_the_keyboard_controller_is_seen() {
    if !kvm_usable("reset") {
        return;
    }
    // mov al, 0xfe; out 0x64, al; hlt
    let kernel = file(&elf(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4], true));
    let machine = Machine::boot(config(kernel.path(), 1), Console::new().sink()).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(), ExitReason::Reset);
}

#[test]
fn a_reset_through_the_register_that_acpi_names_is_seen() {
    if !kvm_usable("ACPI reset") {
        return;
    }
    // mov edx, 0xcf9; mov al, 6; out dx, al; hlt
    let kernel = file(&elf(&[0xba, 0xf9, 0x0c, 0, 0, 0xb0, 6, 0xee, 0xf4], true));
    let machine = Machine::boot(config(kernel.path(), 1), Console::new().sink()).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(), ExitReason::Reset);
}

/// Looks at the power button for ever and switches off when it was pressed: mov edx, 0x600; in ax, dx; test ah, 1; jz;
/// mov dl, 4; mov ax, 0x2000; out dx, ax; hlt.
const OBEYS_THE_BUTTON: [u8; 21] = [
    0xba, 0x00, 0x06, 0, 0, 0x66, 0xed, 0xf6, 0xc4, 1, 0x74, 0xf9, 0xb2, 4, 0x66, 0xb8, 0x00, 0x20, 0x66,
    0xef, 0xf4,
];

#[test]
fn a_press_of_the_power_button_goes_with_the_guest() {
    if !kvm_usable("power button") {
        return;
    }
    let kernel = file(&elf(&OBEYS_THE_BUTTON, true));
    let config = config(kernel.path(), 1);
    let machine = Machine::boot(config.clone(), Console::new().sink()).unwrap();
    assert!(!machine.press_power_button(), "not before it runs");
    machine.resume().unwrap();
    // Pressed when no vCPU can see it any more, before the state is saved.
    machine.pause_vcpus();
    assert!(machine.press_power_button());
    machine.pause_devices().unwrap();
    assert!(!machine.press_power_button(), "too late for the state");
    let sections = machine.save_state().unwrap();
    let ram = copy_of(machine.ram());
    drop(machine);
    let machine = Machine::restore(config, ram, sections, Console::new().sink()).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(), ExitReason::Shutdown);
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    if !kvm_usable("pause") {
        return;
    }
    let kernel = file(&elf(&COUNTER, true));
    let machine = Machine::boot(config(kernel.path(), 1), Console::new().sink()).unwrap();
    assert_eq!(count(&machine), 0);
    for _ in 0..50 {
        let before = count(&machine);
        machine.resume().unwrap();
        counts_on(&machine, before);
        machine.pause().unwrap();
        let paused = count(&machine);
        machine.save_state().unwrap();
        assert_eq!(count(&machine), paused);
    }
}

#[test]
fn the_state_of_a_running_machine_cannot_be_saved() {
    if !kvm_usable("save while running") {
        return;
    }
    let kernel = file(&elf(&COUNTER, true));
    let machine = Machine::boot(config(kernel.path(), 1), Console::new().sink()).unwrap();
    machine.resume().unwrap();
    assert!(matches!(machine.save_state(), Err(Error::NotNow { .. })));
    machine.pause_vcpus();
    assert!(matches!(machine.save_state(), Err(Error::NotNow { .. })));
    machine.pause_devices().unwrap();
    machine.save_state().unwrap();
}

#[test]
fn a_guest_moves_between_machines_and_counts_on() {
    if !kvm_usable("save and restore") {
        return;
    }
    let kernel = file(&elf(&COUNTER, true));
    for vcpus in [1, 2] {
        let config = config(kernel.path(), vcpus);
        let mut machine = Machine::boot(config.clone(), Console::new().sink()).unwrap();
        for _ in 0..5 {
            machine.resume().unwrap();
            counts_on(&machine, count(&machine));
            machine.pause().unwrap();
            let sections = machine.save_state().unwrap();
            let here = count(&machine);
            let ram = copy_of(machine.ram());
            let next = Machine::restore(config.clone(), ram, sections, Console::new().sink()).unwrap();
            assert_eq!(count(&next), here, "restoring must not touch RAM");
            machine = next;
            machine.resume().unwrap();
            counts_on(&machine, here);
        }
    }
}

#[test]
fn restoring_leaves_all_of_ram_as_it_was() {
    if !kvm_usable("restore and RAM") {
        return;
    }
    let kernel = file(&elf(&COUNTER, true));
    let config = config(kernel.path(), 2);
    let machine = Machine::boot(config.clone(), Console::new().sink()).unwrap();
    machine.resume().unwrap();
    counts_on(&machine, 100);
    machine.pause().unwrap();
    let sections = machine.save_state().unwrap();
    let restored = Machine::restore(config, copy_of(machine.ram()), sections, Console::new().sink()).unwrap();
    assert!(machine.ram().bytes_of(0, 4096).unwrap() == restored.ram().bytes_of(0, 4096).unwrap());
}

#[test]
fn dirty_pages_are_those_of_guest_and_vmm() {
    if !kvm_usable("dirty log") {
        return;
    }
    let kernel = file(&elf(&COUNTER, true));
    let machine = Machine::boot(config(kernel.path(), 1), Console::new().sink()).unwrap();
    let log = machine.dirty_log();
    assert!(log.collect().is_err(), "off");
    log.start_logging().unwrap();
    assert!(log.start_logging().is_err(), "already on");
    assert!(log.collect().unwrap().iter().all(|word| *word == 0), "nothing ran");
    machine.resume().unwrap();
    counts_on(&machine, 100);
    machine.ram().memory().write_obj(1_u8, GuestAddress(0x80_0000)).unwrap();
    machine.pause().unwrap();
    let is_set = |bitmap: &[u64], gpa: u64| bitmap[(gpa >> 18) as usize] >> (gpa >> 12 & 63) & 1 == 1;
    let dirty = log.collect().unwrap();
    assert_eq!(dirty.len(), machine.ram().layout().bitmap_words());
    assert!(is_set(&dirty, COUNT_AT.0), "the guest's page");
    assert!(is_set(&dirty, 0x80_0000), "the VMM's page");
    assert!(!is_set(&dirty, 0x90_0000), "nobody's page");
    assert!(log.collect().unwrap().iter().all(|word| *word == 0), "taken");
    machine.resume().unwrap();
    counts_on(&machine, count(&machine) + 100);
    machine.pause().unwrap();
    assert!(is_set(&log.collect().unwrap(), COUNT_AT.0), "dirty again");
    log.stop_logging().unwrap();
    assert!(log.collect().is_err());
}

#[test]
fn bad_states_are_refused() {
    if !kvm_usable("bad states") {
        return;
    }
    let kernel = file(&elf(&COUNTER, true));
    let config = config(kernel.path(), 2);
    let machine = Machine::boot(config.clone(), Console::new().sink()).unwrap();
    let sections = machine.save_state().unwrap();
    let restore = |config: &MachineConfig, sections: Vec<Section>| {
        let ram = GuestRam::new(config.memory_bytes).unwrap();
        Machine::restore(config.clone(), ram, sections, Console::new().sink()).map(|_| ())
    };
    restore(&config, sections.clone()).unwrap();
    for index in 0..sections.len() {
        let mut missing = sections.clone();
        let name = missing.remove(index).name;
        assert!(restore(&config, missing).is_err(), "without {name}");
        let mut newer = sections.clone();
        newer[index].version += 1;
        assert!(restore(&config, newer).is_err(), "{name} of a newer version");
        let mut short = sections.clone();
        short[index].bytes.pop();
        assert!(restore(&config, short).is_err(), "{name} cut short");
    }
    let mut more = sections.clone();
    more.push(Section { name: "unknown".to_owned(), version: 1, bytes: Vec::new() });
    assert!(restore(&config, more).is_err(), "an unknown section");
    let fewer = MachineConfig { vcpus: 1, ..config.clone() };
    assert!(matches!(restore(&fewer, sections.clone()), Err(Error::Mismatch { .. })));
    let larger = MachineConfig { memory_bytes: RAM * 2, ..config };
    assert!(matches!(restore(&larger, sections), Err(Error::Mismatch { .. })));
}

#[test]
fn an_initial_ram_disk_lies_where_the_kernel_is_told() {
    if !kvm_usable("initial RAM disk") {
        return;
    }
    let initrd = file(b"the initial RAM disk");
    for (image, address_at, size_at) in
        [(elf(&COUNTER, true), 0x6100, 0x6108), (bzimage(&COUNTER), 0x7218, 0x721c)]
    {
        let kernel = file(&image);
        let config = MachineConfig { initrd: Some(initrd.path().to_owned()), ..config(kernel.path(), 1) };
        let machine = Machine::boot(config, Console::new().sink()).unwrap();
        let read = |at| machine.ram().memory().read_obj::<u32>(GuestAddress(at)).unwrap();
        let mut bytes = vec![0; read(size_at) as usize];
        machine.ram().memory().read_slice(&mut bytes, GuestAddress(u64::from(read(address_at)))).unwrap();
        assert_eq!(bytes, b"the initial RAM disk");
    }
    // One that is larger than RAM, and one that would lie where the kernel unpacks itself, from 2 to 3 MiB.
    for (image, bytes) in [(elf(&COUNTER, true), RAM), (bzimage(&COUNTER), RAM - (5 << 19))] {
        let huge = file(&vec![1; bytes as usize]);
        let kernel = file(&image);
        let config = MachineConfig { initrd: Some(huge.path().to_owned()), ..config(kernel.path(), 1) };
        let error = Machine::boot(config, Console::new().sink()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(&huge.path().display().to_string()), "{error}");
    }
}

#[test]
fn the_guests_clock_goes_on_while_it_is_between_machines() {
    if !kvm_usable("clock") {
        return;
    }
    let kernel = file(&elf(&COUNTER, true));
    let config = config(kernel.path(), 1);
    let machine = Machine::boot(config.clone(), Console::new().sink()).unwrap();
    machine.resume().unwrap();
    counts_on(&machine, 0);
    machine.pause().unwrap();
    let sections = machine.save_state().unwrap();
    let ram = copy_of(machine.ram());
    drop(machine);
    std::thread::sleep(Duration::from_secs(2));
    let machine = Machine::restore(config, ram, sections.clone(), Console::new().sink()).unwrap();
    let state = |sections| VmState::decode(&mut Sections::new(sections).unwrap()).unwrap();
    let (before, after) = (state(sections), state(machine.save_state().unwrap()));
    let passed = after.realtime_ns - before.realtime_ns;
    assert!(passed >= 2_000_000_000);
    // Both hosts' clocks and the guest's agree on how much that was; the slack is for a test that is not scheduled.
    let off = (after.clock_ns - before.clock_ns).abs_diff(passed);
    assert!(off < 1_000_000_000, "the guest's clock is {off} ns off");
}

#[test]
fn bad_kernels_are_named() {
    if !kvm_usable("bad kernels") {
        return;
    }
    let boot = |path: &Path| {
        let error = Machine::boot(config(path, 1), Console::new().sink()).map(|_| ()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&path.display().to_string()), "{text}");
        text
    };
    boot(Path::new("/nonexistent/kernel"));
    boot(Path::new("/dev/null"));
    for bytes in [&b""[..], b"abc", b"not a kernel at all", &[0; 8192], b"\x7fELF"] {
        boot(file(bytes).path());
    }
    let mut large = elf(&COUNTER, true);
    large[64 + 40..64 + 48].copy_from_slice(&(RAM).to_le_bytes()); // memory size of the first segment
    assert!(boot(file(&large).path()).contains("needs RAM"));
    let mut old = bzimage(&COUNTER);
    old[0x236] = 0;
    assert!(boot(file(&old).path()).contains("64-bit entry"));
    let mut low = elf(&COUNTER, true);
    low[24..32].copy_from_slice(&0x1000_u64.to_le_bytes()); // entry below 1 MiB
    boot(file(&low).path());
}

#[test]
fn this_host_offers_what_it_offers() {
    if !kvm_usable("features") {
        return;
    }
    let features = host_features().unwrap();
    assert!(features.contains("sse2") && features.contains("lm"), "{features:?}");
    assert!(missing_features(&features).unwrap().is_empty());
    let wanted = ["sse2".to_owned(), "warp_drive".to_owned()].into();
    assert_eq!(missing_features(&wanted).unwrap(), ["warp_drive".to_owned()].into());
}
