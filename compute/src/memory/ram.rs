//! The mapping of guest RAM and access to runs of its pages.
//!
//! What never enters: KVM, the dirty log, sockets.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};
use vmove_devices::{GuestMemory, SharedMemory};

use super::layout::{Layout, PAGE_SIZE};
use super::{Error, resident};

/// The RAM of one guest: private anonymous memory with huge pages advised, left out of core dumps.
///
/// Cheap to clone; the memory lives as long as the last clone. Pages are addressed by their dense index, which
/// leaves out the PCI hole (see [`Layout`]).
#[derive(Clone)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    memory: SharedMemory,
    /// Opened at the start, so that a later loss of rights (Landlock, a chroot) does not take it away.
    pagemap: File,
}

impl GuestRam {
    /// Reserves zeroed RAM for a guest; the host gives pages as they are touched.
    ///
    /// # Errors
    /// [`Error::Size`] for an impossible size, [`Error::Map`] when the host has no room, [`Error::PageMap`].
    pub fn new(memory_bytes: u64) -> Result<Self, Error> {
        let layout = Layout::new(memory_bytes)?;
        let ranges: Vec<_> =
            layout.ranges().iter().map(|range| (GuestAddress(range.gpa), range.len as usize)).collect();
        let memory =
            GuestMemory::from_ranges(&ranges).map_err(|source| Error::Map { bytes: memory_bytes, source })?;
        for region in memory.iter() {
            advise(region.as_ptr(), region.size());
        }
        let pagemap =
            File::open("/proc/self/pagemap").map_err(|source| Error::PageMap { what: "open", source })?;
        Ok(Self { inner: Arc::new(Inner { layout, memory: Arc::new(memory), pagemap }) })
    }

    /// The memory as device models use it; every write through it is marked in its own dirty bitmap.
    pub fn memory(&self) -> &SharedMemory {
        &self.inner.memory
    }

    /// Where the RAM lies, and the arithmetic of page indexes.
    pub fn layout(&self) -> &Layout {
        &self.inner.layout
    }

    /// The runs of RAM as (guest physical address, bytes), by rising address.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.layout().ranges().iter().map(|range| (range.gpa, range.len)).collect()
    }

    /// Number of pages; page indexes are `0..pages()`.
    pub fn pages(&self) -> u64 {
        self.layout().pages()
    }

    /// A run of pages as memory that the guest may be changing. Writes through it are marked dirty.
    ///
    /// # Errors
    /// [`Error::Pages`] unless the pages are one run of RAM (see [`Layout::contiguous`]).
    pub fn slice_of(&self, page: u64, count: u64) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>, Error> {
        let refuse = || Error::Pages { page, count };
        let range = self.layout().range_of_page(page).ok_or_else(refuse)?;
        if count > range.first_page + range.pages() - page {
            return Err(refuse());
        }
        let region = self.memory().find_region(GuestAddress(range.gpa)).ok_or_else(refuse)?;
        region
            .get_slice(
                MemoryRegionAddress((page - range.first_page) * PAGE_SIZE),
                (count * PAGE_SIZE) as usize,
            )
            .map_err(|_| refuse())
    }

    /// A run of pages as plain bytes, for bulk reading (zero scan, checksum, socket writes) without a copy.
    ///
    /// A running guest may change them at any moment: the content may be torn and two reads may differ. Take no
    /// decision that must agree with a second read; whatever changes is dirty and comes round again.
    ///
    /// # Errors
    /// [`Error::Pages`] unless the pages are one run of RAM.
    pub fn bytes_of(&self, page: u64, count: u64) -> Result<&[u8], Error> {
        let slice = self.slice_of(page, count)?;
        // SAFETY: the slice was bounds-checked against a live mapping that `self` keeps alive for the borrow, it is
        // readable, and every bit pattern is a valid u8. The bytes are not frozen: guest and devices write them
        // through other mappings and raw pointers, which the compiler cannot see, as with a shared file mapping. It
        // may only assume what it has itself read, and no caller's memory safety hangs on the values.
        Ok(unsafe { std::slice::from_raw_parts(slice.ptr_guard().as_ptr(), slice.len()) })
    }

    /// Which pages were ever touched, one bit a page: present or swapped in the host's page table.
    ///
    /// Never reads the RAM itself. A page whose bit is clear reads as zeroes. Start the dirty log first, so that a
    /// page touched while this runs is in one or the other.
    ///
    /// # Errors
    /// [`Error::PageMap`].
    pub fn resident(&self) -> Result<Vec<u64>, Error> {
        let mut bitmap = vec![0; self.layout().bitmap_words()];
        for (range, region) in self.layout().ranges().iter().zip(self.memory().iter()) {
            let words = (range.first_page / 64) as usize;
            resident::mark(
                &self.inner.pagemap,
                region.as_ptr() as u64,
                range.pages(),
                &mut bitmap[words..words + (range.pages() / 64) as usize],
            )?;
        }
        Ok(bitmap)
    }
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRam").field("layout", self.layout()).finish_non_exhaustive()
    }
}

/// Whether all bytes are zero; at memory speed.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Folding a whole chunk before the test lets the compiler use vector registers.
    let mut chunks = bytes.chunks_exact(128);
    chunks.by_ref().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && chunks.remainder().iter().all(|byte| *byte == 0)
}

/// Huge pages wanted, not in core dumps. Both are advice: a host without them runs the guest all the same.
fn advise(start: *mut u8, len: usize) {
    for (advice, name) in [(libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"), (libc::MADV_DONTDUMP, "MADV_DONTDUMP")] {
        // SAFETY: the range is one whole mapping of ours, and neither advice changes its content.
        if unsafe { libc::madvise(start.cast(), len, advice) } != 0 {
            tracing::debug!(error = %io::Error::last_os_error(), "{name} refused for guest RAM");
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn runs_are_checked_against_the_layout() {
        let ram = GuestRam::new(16 << 20).unwrap();
        assert_eq!(ram.slice_of(0, 4096).unwrap().len(), 16 << 20);
        assert!(ram.slice_of(0, 4097).is_err());
        assert!(ram.slice_of(4096, 1).is_err());
        assert!(ram.slice_of(u64::MAX, 1).is_err());
        assert!(ram.slice_of(1, u64::MAX).is_err());
    }

    #[test]
    fn bytes_show_what_was_written() {
        let ram = GuestRam::new(8 << 20).unwrap();
        ram.memory().write_slice(b"here", GuestAddress(5 * PAGE_SIZE + 7)).unwrap();
        assert_eq!(&ram.bytes_of(5, 1).unwrap()[7..11], b"here");
        assert!(!is_zero(ram.bytes_of(4, 2).unwrap()));
        assert!(is_zero(ram.bytes_of(6, 2).unwrap()));
    }

    #[test]
    fn touched_pages_are_resident_and_others_not() {
        let ram = GuestRam::new(16 << 20).unwrap();
        assert!(ram.resident().unwrap().iter().all(|word| *word == 0));
        ram.memory().write_obj(1_u8, GuestAddress(9 << 20)).unwrap();
        let resident = ram.resident().unwrap();
        let page = ((9 << 20) / PAGE_SIZE) as usize;
        assert_ne!(resident[page / 64] & (1 << (page % 64)), 0);
        // With huge pages the whole 2 MiB around it came in, but no more.
        assert!(resident.iter().map(|word| word.count_ones()).sum::<u32>() <= 512);
    }

    #[test]
    fn zero_test_sees_every_byte() {
        let mut bytes = vec![0; 4096 + 5];
        assert!(is_zero(&bytes));
        for at in [0, 127, 128, 2000, 4095, 4100] {
            bytes[at] = 0x80;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }
}
