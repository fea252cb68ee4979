//! The registers and tables of the first vCPU's first instruction.
//!
//! What never enters: calls to KVM.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::{Error, place, put};
use crate::memory::GuestRam;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 2;

/// Selectors as Linux' boot protocol names them (`__BOOT_CS`, `__BOOT_DS`); PVH leaves them open.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// GDT with a 64-bit and a flat data segment, and page tables that map the first 4 GiB one to one with 2 MiB pages.
/// PVH has no use for either, but a kernel may look at GDTR before it loads its own.
///
/// # Errors
/// [`Error::Room`].
pub(super) fn write_tables(ram: &GuestRam) -> Result<(), Error> {
    // Descriptors: Intel SDM vol. 3, 3.4.5. Unused, unused, code (L, P, execute/read), data (D/B, read/write), TSS.
    let gdt: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
    put(ram, "the descriptor table", place::GDT, &words(gdt))?;
    // Present, writable; the page directories' entries are 2 MiB pages.
    const TABLE: u64 = 0x3;
    const PAGE: u64 = 0x83;
    put(ram, "page tables", place::PML4, &words([place::PDPT | TABLE]))?;
    put(
        ram,
        "page tables",
        place::PDPT,
        &words((0..4).map(|i| (place::PAGE_DIRECTORIES + i * 0x1000) | TABLE)),
    )?;
    put(ram, "page tables", place::PAGE_DIRECTORIES, &words((0..2048).map(|i| i << 21 | PAGE)))
}

fn words(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// State at a PVH entry: flat 32-bit segments, no paging, RBX = `hvm_start_info`.
pub(super) fn protected_mode(rip: u64, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    *regs = kvm_regs { rip, rbx: place::START_INFO, rflags: RFLAGS, ..Default::default() };
    segments(sregs, false);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// State at Linux' 64-bit entry: paging on, RSI = zero page, interrupts off.
pub(super) fn long_mode(rip: u64, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    *regs = kvm_regs {
        rip,
        rsi: place::ZERO_PAGE,
        rsp: place::STACK,
        rbp: place::STACK,
        rflags: RFLAGS,
        ..Default::default()
    };
    segments(sregs, true);
    sregs.cr3 = place::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn segments(sregs: &mut kvm_sregs, long: bool) {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let code = flat(CODE, 11);
    sregs.cs = kvm_segment { db: u8::from(!long), l: u8::from(long), ..code };
    let data = flat(DATA, 3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy TSS: VT-x refuses entry without one. PVH: base 0, limit 0x67.
    sregs.tr = kvm_segment { limit: 0x67, db: 0, s: 0, g: 0, ..flat(TASK, 11) };
    sregs.gdt.base = place::GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}
