//! What the tests on real KVM share: whether there is one, kernels of a few instructions, a console that can be waited
//! for. Never enters: the tests.

// Each test file uses its part of this.
#![allow(dead_code)]

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vmove_compute::kvm::Hypervisor;
use vmove_compute::memory::GuestRam;
use vmove_devices::ConsoleSink;

/// Says so and returns false where KVM cannot be used.
pub fn kvm_usable(test: &str) -> bool {
    match Hypervisor::open() {
        Ok(_) => true,
        Err(error) => {
            // Straight to stderr: the test runner hides what passing tests print.
            let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {error}");
            false
        }
    }
}

/// Where the kernels here are loaded.
pub const LOAD: u32 = 0x10_0000;

/// An ELF file with `code` at 1 MiB as its only segment, entered there; with a PVH note if asked for.
pub fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    let code_at = 0x1000_u64;
    let note_at = 0x200_u64;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for field in [u64::from(LOAD), 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for field in [64_u16, 56, 1 + u16::from(pvh), 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: u64, address: u64, bytes: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for field in [offset, address, address, bytes, bytes, 4] {
            file.extend(field.to_le_bytes());
        }
    };
    segment(1, code_at, u64::from(LOAD), code.len() as u64);
    if pvh {
        segment(4, note_at, 0, 20);
    }
    file.resize(note_at as usize, 0);
    for field in [4_u32, 4, 18] {
        file.extend(field.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(LOAD.to_le_bytes());
    file.resize(code_at as usize, 0);
    file.extend(code);
    file
}

/// A bzImage whose 64-bit entry, 0x200 behind [`LOAD`], is `code`; it unpacks itself at 2 MiB and needs 1 MiB there.
/// Fields: Linux, Documentation/arch/x86/boot.rst.
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1; // setup sectors
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20c_u16.to_le_bytes());
    file[0x211] = 1; // loaded high
    file[0x214..0x218].copy_from_slice(&LOAD.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes()); // highest address of an initial RAM disk
    file[0x230..0x234].copy_from_slice(&0x1_0000_u32.to_le_bytes()); // alignment
    file[0x234] = 1; // can be anywhere
    file[0x236] = 1; // has a 64-bit entry
    file[0x258..0x260].copy_from_slice(&0x20_0000_u64.to_le_bytes()); // where it likes to be
    file[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes()); // memory needed
    file.extend([0; 0x200]);
    file.extend(code);
    file
}

/// Instructions for address `at` that print `text` and switch the machine off, the same in 32-bit and 64-bit mode.
pub fn print_and_power_off(at: u32, text: &[u8]) -> Vec<u8> {
    let mut code = vec![0xbe]; // mov esi, the text behind the code
    code.extend((at + 0x27).to_le_bytes());
    code.push(0xb9); // mov ecx, length
    code.extend((text.len() as u32).to_le_bytes());
    code.extend([0xba, 0xf8, 0x03, 0, 0]); // mov edx, 0x3f8
    code.extend([0xfc, 0xf3, 0x6e]); // cld; rep outsb
    code.extend([0xba, 0x04, 0x06, 0, 0]); // mov edx, 0x604
    code.extend([0xb8, 0x00, 0x20, 0, 0]); // mov eax, 0x2000
    code.extend([0x66, 0xef, 0xf4]); // out dx, ax; hlt
    code.resize(0x27, 0x90);
    code.extend(text);
    code
}

/// New RAM with the same bytes.
pub fn copy_of(ram: &GuestRam) -> GuestRam {
    let copy = GuestRam::new(ram.layout().bytes()).unwrap();
    copy.slice_of(0, ram.pages()).unwrap().copy_from(ram.bytes_of(0, ram.pages()).unwrap());
    copy
}

/// A guest's console output.
#[derive(Default)]
pub struct Console {
    text: Mutex<Vec<u8>>,
    grown: Condvar,
}

struct Sink(Arc<Console>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.text.lock().unwrap().extend_from_slice(bytes);
        self.0.grown.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub fn sink(self: &Arc<Self>) -> ConsoleSink {
        Arc::new(Mutex::new(Sink(Arc::clone(self))))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap()).into_owned()
    }

    /// Waits until `found` says what it looks for in the complete lines so far. The limit only ends a test that hangs.
    pub fn wait<T>(&self, what: &str, mut found: impl FnMut(&[&str]) -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_mins(2);
        let mut text = self.text.lock().unwrap();
        loop {
            let complete = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let lines = String::from_utf8_lossy(&text[..complete]).into_owned();
            if let Some(value) = found(&lines.lines().collect::<Vec<_>>()) {
                return value;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "no {what} on the console; it says:\n{}",
                String::from_utf8_lossy(&text)
            );
            text = self.grown.wait_timeout(text, left).unwrap().0;
        }
    }
}
