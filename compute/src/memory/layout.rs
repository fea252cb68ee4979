//! Pure arithmetic on the guest's RAM: ranges around the PCI hole, and the dense page index.
//!
//! What never enters: mappings, pointers, KVM.

use super::Error;

/// Bytes of a guest page, the unit of dirty tracking.
pub const PAGE_SIZE: u64 = 4096;
/// First address of the hole that PCI windows, the I/O APIC and the local APIC use.
pub const PCI_HOLE_START: u64 = 3 << 30;
/// First address above that hole, where RAM goes on.
pub const PCI_HOLE_END: u64 = 4 << 30;

/// Smallest guest: below it no kernel has room.
const MIN_BYTES: u64 = 8 << 20;
/// Largest guest. A guard against nonsense in a config or from a peer, not a limit of the design.
const MAX_BYTES: u64 = 4 << 40;
/// Ranges are whole multiples of this, so that each starts on a word of a page bitmap (64 pages = 256 KiB).
const GRANULARITY: u64 = 1 << 20;

/// One run of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes, a multiple of 1 MiB.
    pub len: u64,
    /// Page index of the first page.
    pub first_page: u64,
}

impl Range {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.len / PAGE_SIZE
    }
}

/// Where the RAM of a guest lies: below 3 GiB from address 0, the rest from 4 GiB on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    ranges: Vec<Range>,
}

impl Layout {
    /// The layout of a guest with this much RAM.
    ///
    /// # Errors
    /// [`Error::Size`] unless it is a multiple of 1 MiB from 8 MiB to 4 TiB.
    pub fn new(memory_bytes: u64) -> Result<Self, Error> {
        let refuse = |why| Err(Error::Size { bytes: memory_bytes, why });
        if memory_bytes < MIN_BYTES {
            return refuse("the least is 8 MiB");
        }
        if memory_bytes > MAX_BYTES {
            return refuse("the most is 4 TiB");
        }
        if !memory_bytes.is_multiple_of(GRANULARITY) {
            return refuse("it must be a multiple of 1 MiB");
        }
        let low = memory_bytes.min(PCI_HOLE_START);
        let mut ranges = vec![Range { gpa: 0, len: low, first_page: 0 }];
        if memory_bytes > low {
            ranges.push(Range { gpa: PCI_HOLE_END, len: memory_bytes - low, first_page: low / PAGE_SIZE });
        }
        Ok(Self { ranges })
    }

    /// The runs of RAM, by rising address.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Size of RAM in bytes.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// Number of pages; page indexes are `0..pages()`.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// Words of a bitmap with one bit for each page.
    pub fn bitmap_words(&self) -> usize {
        (self.pages() / 64) as usize
    }

    /// Page index of the page that holds a guest physical address; `None` outside RAM.
    pub fn page_of_gpa(&self, gpa: u64) -> Option<u64> {
        self.ranges
            .iter()
            .find(|range| gpa >= range.gpa && gpa - range.gpa < range.len)
            .map(|range| range.first_page + (gpa - range.gpa) / PAGE_SIZE)
    }

    /// Guest physical address of a page; `None` past the last page.
    pub fn gpa_of_page(&self, page: u64) -> Option<u64> {
        self.range_of_page(page).map(|range| range.gpa + (page - range.first_page) * PAGE_SIZE)
    }

    /// How many of `count` pages from `page` on lie in one run of RAM (0 past the last page).
    pub fn contiguous(&self, page: u64, count: u64) -> u64 {
        self.range_of_page(page).map_or(0, |range| count.min(range.first_page + range.pages() - page))
    }

    pub(super) fn range_of_page(&self, page: u64) -> Option<&Range> {
        self.ranges.iter().find(|range| page >= range.first_page && page - range.first_page < range.pages())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_guest_has_one_range() {
        let layout = Layout::new(64 << 20).unwrap();
        assert_eq!(layout.ranges(), [Range { gpa: 0, len: 64 << 20, first_page: 0 }]);
        assert_eq!(layout.pages(), 16384);
        assert_eq!(layout.bitmap_words(), 256);
    }

    #[test]
    fn large_guest_goes_on_above_the_hole() {
        let layout = Layout::new(4 << 30).unwrap();
        assert_eq!(layout.ranges()[1], Range { gpa: 4 << 30, len: 1 << 30, first_page: 786_432 });
        assert_eq!(layout.page_of_gpa(PCI_HOLE_START), None);
        assert_eq!(layout.page_of_gpa(PCI_HOLE_START - 1), Some(786_431));
        assert_eq!(layout.page_of_gpa(PCI_HOLE_END), Some(786_432));
        assert_eq!(layout.contiguous(786_430, 10), 2);
        assert_eq!(layout.contiguous(786_432, 10), 10);
        assert_eq!(layout.contiguous(layout.pages(), 1), 0);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bytes in [0, 1 << 20, (64 << 20) + 4096, u64::MAX, (4 << 40) + (1 << 20)] {
            assert!(matches!(Layout::new(bytes), Err(Error::Size { .. })), "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn page_and_address_are_inverse(mib in 8_u64..10_000, at in any::<u64>()) {
            let layout = Layout::new(mib << 20).unwrap();
            let page = at % layout.pages();
            let gpa = layout.gpa_of_page(page).unwrap();
            prop_assert_eq!(layout.page_of_gpa(gpa), Some(page));
            prop_assert_eq!(layout.page_of_gpa(gpa + PAGE_SIZE - 1), Some(page));
            prop_assert!(!(PCI_HOLE_START..PCI_HOLE_END).contains(&gpa));
        }
    }
}
