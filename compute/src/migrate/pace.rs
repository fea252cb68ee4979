//! The bandwidth cap: all streams of a move share one allowance.
//!
//! Lives here: when the next bytes may go. Never enters: which bytes.

use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Bytes a second over all connections of a move, or no cap.
#[derive(Debug)]
pub struct Pace {
    rate: Option<u64>,
    /// When everything allowed so far has been used up.
    free_at: Mutex<Instant>,
}

impl Pace {
    /// A pace of `rate` bytes a second; none = unlimited.
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate: rate.map(|r| r.max(1)), free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be sent.
    pub fn take(&self, bytes: u64) {
        let Some(rate) = self.rate else { return };
        let wait = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let start = (*free_at).max(now);
            *free_at =
                start + Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate)) as u64);
            start - now
        };
        if !wait.is_zero() {
            thread::sleep(wait);
        }
    }
}
