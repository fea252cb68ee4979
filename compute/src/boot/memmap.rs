//! The map of usable memory that a kernel is told.
//!
//! What never enters: the two formats it is written in.

use super::place;
use crate::memory::Layout;

/// Usable RAM or not; the numbers are those of E820 and of PVH alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub address: u64,
    pub bytes: u64,
    pub kind: Kind,
}

/// Conventional memory, and RAM from 1 MiB on; between them lies what PCs keep for firmware.
pub(super) fn memmap(layout: &Layout) -> Vec<Entry> {
    let entry = |address, end, kind| Entry { address, bytes: end - address, kind };
    let mut map = vec![
        entry(0, place::CONVENTIONAL_END, Kind::Ram),
        entry(place::CONVENTIONAL_END, place::HIGH, Kind::Reserved),
    ];
    for range in layout.ranges() {
        map.push(entry(range.gpa.max(place::HIGH), range.gpa + range.len, Kind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_touch_and_leave_out_the_hole() {
        let layout = Layout::new(5 << 30).unwrap();
        let map = memmap(&layout);
        assert_eq!(map.len(), 4);
        assert_eq!(map[2], Entry { address: 1 << 20, bytes: (3 << 30) - (1 << 20), kind: Kind::Ram });
        assert_eq!(map[3], Entry { address: 4 << 30, bytes: 2 << 30, kind: Kind::Ram });
        let first: u64 = map[..3].iter().map(|entry| entry.bytes).sum();
        assert_eq!(first, 3 << 30);
    }
}
