//! Guest memory by linear address: the walk through a vCPU's page tables (Intel SDM vol. 3, chapter 5), as ring 0 sees it.
//!
//! What never enters: instructions, KVM. Page tables are the guest's: whatever they say, nothing outside RAM is touched.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::kvm_sregs;
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

use super::{Exception, PAGE_FAULT, Stop};
use crate::memory::{GuestRam, PAGE_SIZE};

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
/// Physical address in a page table entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Page fault error code: the page was there; the access was a write.
const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 1 << 1;

const GENERAL_PROTECTION: Exception = Exception { vector: 13, code: Some(0), address: 0 };

/// Part of guest RAM that is marked dirty by whoever writes to it.
pub(super) type Slice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// A vCPU's view of memory.
pub(super) struct Linear<'a> {
    ram: &'a GuestRam,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

impl<'a> Linear<'a> {
    pub(super) fn new(ram: &'a GuestRam, sregs: &kvm_sregs) -> Self {
        Self { ram, cr0: sregs.cr0, cr3: sregs.cr3, cr4: sregs.cr4, efer: sregs.efer }
    }

    /// Up to `most` bytes of code at `address`; fewer where it ends.
    pub(super) fn fetch(&self, address: u64, most: usize) -> Vec<u8> {
        let mut code = Vec::new();
        for at in 0..most as u64 {
            let mut byte = [0];
            if self.read(address.wrapping_add(at), &mut byte).is_err() {
                break;
            }
            code.push(byte[0]);
        }
        code
    }

    /// Reads bytes, across pages where they lie so.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Stop> {
        let mut at = 0;
        while at < data.len() {
            let (slice, bytes) = self.run(address.wrapping_add(at as u64), data.len() - at, false)?;
            slice.copy_to(&mut data[at..at + bytes]);
            at += bytes;
        }
        Ok(())
    }

    /// Writes bytes, across pages where they lie so. All pages are looked at before the first is written.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<(), Stop> {
        let mut runs = Vec::new();
        let mut at = 0;
        while at < data.len() {
            let (slice, bytes) = self.run(address.wrapping_add(at as u64), data.len() - at, true)?;
            runs.push((slice, at, bytes));
            at += bytes;
        }
        for (slice, at, bytes) in runs {
            slice.copy_from(&data[at..at + bytes]);
        }
        Ok(())
    }

    /// `bytes` at an address that is a multiple of them, to be written to.
    pub(super) fn aligned(&self, address: u64, bytes: usize) -> Result<Slice<'a>, Stop> {
        if !address.is_multiple_of(bytes as u64) {
            return Err(GENERAL_PROTECTION.into());
        }
        Ok(self.run(address, bytes, true)?.0)
    }

    /// The RAM at an address, as far as `most` and its page go.
    fn run(&self, address: u64, most: usize, write: bool) -> Result<(Slice<'a>, usize), Stop> {
        let physical = self.translate(address, write)?;
        let bytes = most.min((PAGE_SIZE - physical % PAGE_SIZE) as usize);
        Ok((self.physical(physical, bytes)?, bytes))
    }

    fn physical(&self, address: u64, bytes: usize) -> Result<Slice<'a>, Stop> {
        self.ram
            .memory()
            .get_slice(GuestAddress(address), bytes)
            .map_err(|_| Stop::Unknown("its operand or a page table is not in RAM"))
    }

    /// The physical address of a linear one, with the accessed and dirty bits set as the CPU would.
    fn translate(&self, address: u64, write: bool) -> Result<u64, Stop> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(address & 0xffff_ffff);
        }
        if self.efer & EFER_LMA == 0 {
            return Err(Stop::Unknown("32-bit paging is not known here"));
        }
        let levels = if self.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        let bits = 12 + 9 * levels;
        if (address as i64) << (64 - bits) >> (64 - bits) != address as i64 {
            return Err(GENERAL_PROTECTION.into());
        }
        let fault = |code: u32| {
            let code = Some(code | if write { FAULT_WRITE } else { 0 });
            Err(Exception { vector: PAGE_FAULT, code, address }.into())
        };
        let mut table = self.cr3 & FRAME;
        let mut path = Vec::with_capacity(levels);
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let slice = self.physical(table + (address >> shift & 0x1ff) * 8, 8)?;
            let entry = entry_of(&slice)?.load(Ordering::Acquire);
            if entry & PRESENT == 0 {
                return fault(0);
            }
            if write && entry & WRITABLE == 0 && self.cr0 & CR0_WP != 0 {
                return fault(FAULT_PRESENT);
            }
            path.push(slice);
            if level == 0 || level <= 2 && entry & LARGE != 0 {
                mark_used(&path, write)?;
                let offset = (1_u64 << shift) - 1;
                return Ok(entry & FRAME & !offset | address & offset);
            }
            table = entry & FRAME;
        }
        Err(Stop::Unknown("its page tables have no end"))
    }
}

/// Sets the accessed bit of all entries on the way, and the dirty bit of the last one before a write.
fn mark_used(path: &[Slice<'_>], write: bool) -> Result<(), Stop> {
    for (index, slice) in path.iter().enumerate() {
        let last = index + 1 == path.len();
        let bits = ACCESSED | if last && write { DIRTY } else { 0 };
        if entry_of(slice)?.fetch_or(bits, Ordering::AcqRel) & bits != bits {
            slice.bitmap().mark_dirty(0, 8);
        }
    }
    Ok(())
}

fn entry_of<'a>(slice: &'a Slice<'_>) -> Result<&'a AtomicU64, Stop> {
    slice.get_atomic_ref(0).map_err(|_| Stop::Unknown("a page table is not aligned"))
}

#[cfg(test)]
pub(super) mod tests {
    use vm_memory::Bytes;

    use super::*;

    /// 64-bit mode with page tables at 1 MiB: linear 4 MiB is physical 2 MiB (4 KiB pages, the second read-only, the
    /// third absent), linear 1 GiB is physical 4 MiB (one 2 MiB page).
    pub(in super::super) fn paged() -> (GuestRam, kvm_sregs) {
        let ram = GuestRam::new(16 << 20).unwrap();
        let put = |at: u64, entry: u64| ram.memory().write_obj(entry, GuestAddress(at)).unwrap();
        put(0x10_0000, 0x10_1000 | 3);
        put(0x10_1000, 0x10_2000 | 3);
        put(0x10_1008, 0x10_4000 | 3);
        put(0x10_2010, 0x10_3000 | 3);
        put(0x10_3000, 0x20_0000 | 3);
        put(0x10_3008, 0x20_1000 | 1);
        put(0x10_4000, 0x40_0000 | LARGE | 3);
        let sregs = kvm_sregs {
            cr0: CR0_PG | CR0_WP | 1,
            cr3: 0x10_0000,
            cr4: 1 << 5,
            efer: EFER_LMA | 1 << 8,
            ..Default::default()
        };
        (ram, sregs)
    }

    fn fault(address: u64, code: u32) -> Stop {
        Exception { vector: PAGE_FAULT, code: Some(code), address }.into()
    }

    #[test]
    fn pages_of_all_sizes_are_found() {
        let (ram, sregs) = paged();
        let memory = Linear::new(&ram, &sregs);
        memory.write(0x40_0010, b"small").unwrap();
        memory.write(0x4000_1234, b"large").unwrap();
        let mut there = [0; 5];
        ram.memory().read_slice(&mut there, GuestAddress(0x20_0010)).unwrap();
        assert_eq!(&there, b"small");
        ram.memory().read_slice(&mut there, GuestAddress(0x40_1234)).unwrap();
        assert_eq!(&there, b"large");
        memory.read(0x4000_1234, &mut there).unwrap();
        assert_eq!(&there, b"large");
    }

    #[test]
    fn bits_are_set_as_the_cpu_does() {
        let (ram, sregs) = paged();
        let memory = Linear::new(&ram, &sregs);
        let entry = |at| ram.memory().read_obj::<u64>(GuestAddress(at)).unwrap() & (ACCESSED | DIRTY);
        memory.read(0x40_0000, &mut [0]).unwrap();
        assert_eq!([entry(0x10_0000), entry(0x10_3000)], [ACCESSED; 2]);
        memory.write(0x40_0000, &[0]).unwrap();
        assert_eq!([entry(0x10_0000), entry(0x10_3000)], [ACCESSED, ACCESSED | DIRTY]);
    }

    #[test]
    fn what_may_not_be_touched_faults_and_nothing_is_written() {
        let (ram, sregs) = paged();
        let memory = Linear::new(&ram, &sregs);
        assert_eq!(memory.read(0x40_2000, &mut [0]), Err(fault(0x40_2000, 0)));
        assert_eq!(memory.write(0x40_2000, &[0]), Err(fault(0x40_2000, 2)));
        assert_eq!(memory.write(0x40_1000, &[0]), Err(fault(0x40_1000, 3)));
        assert_eq!(memory.write(0x40_0ffe, b"abcd"), Err(fault(0x40_1000, 3)), "across the edge");
        let mut before = [0; 2];
        memory.read(0x40_0ffe, &mut before).unwrap();
        assert_eq!(before, [0; 2]);
        assert_eq!(memory.read(1 << 60, &mut [0]), Err(GENERAL_PROTECTION.into()));
        let careless = kvm_sregs { cr0: CR0_PG | 1, ..sregs };
        assert_eq!(Linear::new(&ram, &careless).write(0x40_1000, &[0]), Ok(()), "write protection is off");
    }

    #[test]
    fn tables_that_point_out_of_ram_are_refused() {
        let (ram, sregs) = paged();
        ram.memory().write_obj(0xffff_f000_u64 | 3, GuestAddress(0x10_0000)).unwrap();
        assert!(matches!(Linear::new(&ram, &sregs).read(0x40_0000, &mut [0]), Err(Stop::Unknown(_))));
    }

    #[test]
    fn code_is_fetched_up_to_where_it_ends() {
        let (ram, sregs) = paged();
        assert_eq!(Linear::new(&ram, &sregs).fetch(0x40_1ffd, 15), [0; 3]);
    }
}
