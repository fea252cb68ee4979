//! Frames of guest pages: many runs a frame, data of all runs behind the head in order.
//!
//! Head: `runs u32 | zero u32 | runs x { first u64, count u32, flags u32 } | sums u64 x data pages`. A run of zero pages has no data.

use super::{Reader, WireError, frame};
use crate::{PAGE_BYTES, pages::PageRange};

/// Largest number of data pages in a frame (2 MiB: big enough that system calls do not count, small enough to stay in cache).
pub const MAX_DATA_PAGES: u64 = 512;
/// Largest number of runs in a frame.
pub const MAX_RUNS: usize = 1024;

const ZERO: u32 = 1;

/// A run of pages in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which pages.
    pub range: PageRange,
    /// They are all zeroes; no data follows for them.
    pub zero: bool,
}

/// The decoded head of a page frame.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PagesHead {
    /// Runs, in the order of their data.
    pub runs: Vec<Run>,
    /// Checksum of each data page, in order.
    pub sums: Vec<u64>,
}

impl PagesHead {
    /// Bytes of data that belong to it.
    pub fn data_bytes(&self) -> u64 {
        self.sums.len() as u64 * PAGE_BYTES
    }

    /// Adds one page; neighbours of the same sort become one run. `sum` none = a zero page.
    pub fn push(&mut self, page: u64, sum: Option<u64>) {
        let zero = sum.is_none();
        self.sums.extend(sum);
        match self.runs.last_mut() {
            Some(run)
                if run.zero == zero
                    && run.range.first + run.range.count == page
                    && run.range.count < u64::from(u32::MAX) =>
            {
                run.range.count += 1;
            }
            _ => self.runs.push(Run { range: PageRange { first: page, count: 1 }, zero }),
        }
    }

    /// Whether another page still fits.
    pub fn has_room(&self) -> bool {
        (self.sums.len() as u64) < MAX_DATA_PAGES && self.runs.len() < MAX_RUNS
    }

    /// Header and head bytes; the data must follow.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut head = Vec::with_capacity(8 + self.runs.len() * 16 + self.sums.len() * 8);
        head.extend((self.runs.len() as u32).to_le_bytes());
        head.extend([0; 4]);
        for run in &self.runs {
            head.extend(run.range.first.to_le_bytes());
            head.extend((run.range.count as u32).to_le_bytes());
            head.extend(if run.zero { ZERO } else { 0 }.to_le_bytes());
        }
        for sum in &self.sums {
            head.extend(sum.to_le_bytes());
        }
        frame::encode(frame::Kind::Pages, &head, self.data_bytes() as u32)
    }

    /// Reads a head for a RAM of `pages` pages, with `data_len` bytes of data announced.
    pub fn decode(head: &[u8], data_len: u32, pages: u64) -> Result<Self, WireError> {
        let mut reader = Reader(head);
        let count = reader.u32()? as usize;
        if reader.u32()? != 0 {
            return Err(WireError::Malformed("page frame: reserved bytes set"));
        }
        if count > MAX_RUNS {
            return Err(WireError::TooLong {
                what: "list of page runs",
                bytes: count as u64,
                limit: MAX_RUNS as u64,
            });
        }
        let mut out = Self { runs: Vec::with_capacity(count), sums: Vec::new() };
        let mut data_pages = 0;
        for _ in 0..count {
            let (first, count, flags) = (reader.u64()?, u64::from(reader.u32()?), reader.u32()?);
            if flags > ZERO {
                return Err(WireError::Unknown { what: "page run flags", value: flags.into() });
            }
            if count == 0 || first.checked_add(count).is_none_or(|end| end > pages) {
                return Err(WireError::Malformed("page frame: pages outside the guest's RAM"));
            }
            let zero = flags == ZERO;
            if !zero {
                data_pages += count;
            }
            out.runs.push(Run { range: PageRange { first, count }, zero });
        }
        if data_pages > MAX_DATA_PAGES || data_pages * PAGE_BYTES != u64::from(data_len) {
            return Err(WireError::Malformed("page frame: runs and data length disagree"));
        }
        for _ in 0..data_pages {
            out.sums.push(reader.u64()?);
        }
        reader.end()?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head_of(frame: &[u8]) -> (&[u8], u32) {
        let header = frame::Header::decode(frame[..24].try_into().unwrap()).unwrap();
        (&frame[24..], header.data_len)
    }

    proptest! {
        #[test]
        fn round_trip(pages in proptest::collection::btree_map(0u64..3000, proptest::option::of(1u64..), 0..300)) {
            let mut head = PagesHead::default();
            for (page, sum) in &pages {
                head.push(*page, *sum);
            }
            let frame = head.encode().unwrap();
            let (bytes, data_len) = head_of(&frame);
            prop_assert_eq!(PagesHead::decode(bytes, data_len, 3000).unwrap(), head);
        }

        #[test]
        fn decode_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), data_len: u32) {
            let _ = PagesHead::decode(&bytes, data_len, 1000);
        }
    }

    #[test]
    fn pages_outside_ram_are_refused() {
        let mut head = PagesHead::default();
        head.push(99, Some(5));
        head.push(100, Some(6));
        let frame = head.encode().unwrap();
        let (bytes, data_len) = head_of(&frame);
        assert!(PagesHead::decode(bytes, data_len, 101).is_ok());
        assert!(PagesHead::decode(bytes, data_len, 100).is_err());
        assert!(PagesHead::decode(bytes, data_len - 4096, 101).is_err());
    }
}
