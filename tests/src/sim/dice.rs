//! The world's chance: one seed, a stream of its own for each purpose, so that a change in one leaves the others as they were.
//!
//! Never enters: anything that differs between two runs or two machines.

use std::ops::Range;

/// One stream of chance.
#[derive(Debug, Clone)]
pub struct Dice(fastrand::Rng);

impl Dice {
    /// The stream of `seed` for `purpose`.
    pub fn new(seed: u64, purpose: u64) -> Self {
        // Neighbouring seeds must not give neighbouring streams.
        let mut mixer = fastrand::Rng::with_seed(seed ^ purpose.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self(fastrand::Rng::with_seed(mixer.u64(..)))
    }

    /// A number of the range.
    pub fn range(&mut self, range: Range<u64>) -> u64 {
        self.0.u64(range)
    }

    /// An index below `len`.
    pub fn index(&mut self, len: usize) -> usize {
        self.0.usize(..len)
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.0.u64(..n) == 0
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }
}
