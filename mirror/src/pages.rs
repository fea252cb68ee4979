//! Sets and ranges of guest pages, by page index: 4 KiB pages of RAM counted densely from 0, holes in the address space left out.
//!
//! Lives here: bitmaps and their arithmetic. Never enters: what a page contains.

/// `count` pages from `first`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PageRange {
    /// Index of the first page.
    pub first: u64,
    /// Number of pages, at least 1.
    pub count: u64,
}

/// A set of pages of a RAM of known size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
    len: u64,
}

impl PageSet {
    /// The empty set over `pages` pages.
    pub fn empty(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages, len: 0 }
    }

    /// From a bitmap (bit `i % 64` of word `i / 64` = page `i`); bits past the end are dropped, missing words are empty.
    pub fn from_words(mut words: Vec<u64>, pages: u64) -> Self {
        words.resize(pages.div_ceil(64) as usize, 0);
        if !pages.is_multiple_of(64)
            && let Some(last) = words.last_mut()
        {
            *last &= (1 << (pages % 64)) - 1;
        }
        let len = words.iter().map(|w| u64::from(w.count_ones())).sum();
        Self { words, pages, len }
    }

    /// Pages in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pages of the RAM.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether page `index` is in the set.
    pub fn contains(&self, index: u64) -> bool {
        index < self.pages && self.words[(index / 64) as usize] >> (index % 64) & 1 == 1
    }

    /// Adds a range; the part past the end of RAM is ignored.
    pub fn insert(&mut self, range: PageRange) {
        let end = range.first.saturating_add(range.count).min(self.pages);
        let mut page = range.first;
        while page < end {
            let (word, bit) = ((page / 64) as usize, page % 64);
            let n = (64 - bit).min(end - page);
            let mask = if n == 64 { u64::MAX } else { ((1 << n) - 1) << bit };
            self.len += u64::from((mask & !self.words[word]).count_ones());
            self.words[word] |= mask;
            page += n;
        }
    }

    /// Removes a range; the part past the end of RAM is ignored.
    pub fn remove(&mut self, range: PageRange) {
        let end = range.first.saturating_add(range.count).min(self.pages);
        let mut page = range.first;
        while page < end {
            let (word, bit) = ((page / 64) as usize, page % 64);
            let n = (64 - bit).min(end - page);
            let mask = if n == 64 { u64::MAX } else { ((1 << n) - 1) << bit };
            self.len -= u64::from((mask & self.words[word]).count_ones());
            self.words[word] &= !mask;
            page += n;
        }
    }

    /// Adds all of `other`, a set over the same RAM.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "page sets of different machines");
        self.len = 0;
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
            self.len += u64::from(mine.count_ones());
        }
    }

    /// Removes up to `limit` pages, in order from page `from` on and around the end, as ranges; also gives the page to go on from.
    pub fn take(&mut self, from: u64, limit: u64) -> (Vec<PageRange>, u64) {
        let mut out: Vec<PageRange> = Vec::new();
        let mut left = limit.min(self.len);
        let words = self.words.len();
        if words == 0 || left == 0 {
            return (out, from);
        }
        let start = if from < self.pages { from } else { 0 };
        let mut next = start;
        let mut index = (start / 64) as usize;
        let mut mask = u64::MAX << (start % 64);
        // One word more than there are: the first is visited again for the bits below `from`.
        for _ in 0..=words {
            let mut bits = self.words[index] & mask;
            mask = u64::MAX;
            while bits != 0 && left > 0 {
                let bit = u64::from(bits.trailing_zeros());
                let run = u64::from((bits >> bit).trailing_ones()).min(left);
                let first = index as u64 * 64 + bit;
                let gone = if run == 64 { u64::MAX } else { ((1 << run) - 1) << bit };
                self.words[index] &= !gone;
                bits &= !gone;
                self.len -= run;
                left -= run;
                next = first + run;
                match out.last_mut() {
                    Some(last) if last.first + last.count == first => last.count += run,
                    _ => out.push(PageRange { first, count: run }),
                }
            }
            if left == 0 {
                break;
            }
            index = (index + 1) % words;
        }
        (out, next)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(
            pages in 1u64..400,
            ranges in proptest::collection::vec((0u64..450, 1u64..200), 0..12),
            removals in proptest::collection::vec((0u64..450, 1u64..200), 0..4),
            takes in proptest::collection::vec((0u64..450, 0u64..150), 0..12),
        ) {
            let mut set = PageSet::empty(pages);
            let mut model = BTreeSet::new();
            for (first, count) in ranges {
                set.insert(PageRange { first, count });
                model.extend((first..first + count).filter(|p| *p < pages));
                prop_assert_eq!(set.len(), model.len() as u64);
            }
            for (first, count) in removals {
                set.remove(PageRange { first, count });
                model.retain(|p| !(first..first + count).contains(p));
                prop_assert_eq!(set.len(), model.len() as u64);
            }
            for (from, limit) in takes {
                let (got, _) = set.take(from, limit);
                let got: Vec<u64> = got.iter().flat_map(|r| r.first..r.first + r.count).collect();
                let start = if from < pages { from } else { 0 };
                let want: Vec<u64> =
                    model.range(start..).chain(model.range(..start)).take(limit as usize).copied().collect();
                prop_assert_eq!(&got, &want);
                for page in &got {
                    model.remove(page);
                }
                prop_assert_eq!(set.len(), model.len() as u64);
                prop_assert!(got.iter().all(|p| !set.contains(*p)));
            }
        }
    }

    #[test]
    fn bits_past_the_end_are_dropped() {
        let set = PageSet::from_words(vec![u64::MAX, u64::MAX], 70);
        assert_eq!(set.len(), 70);
        assert!(!set.contains(70));
    }
}
