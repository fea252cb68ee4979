//! Waiting for what other processes bring about.

use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take. Only ends tests that hang, so it is far longer than anything takes on a busy machine.
pub const LIMIT: Duration = Duration::from_mins(2);
/// How often is looked.
const INTERVAL: Duration = Duration::from_millis(10);

/// Looks again and again until there is something to be seen.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let found: Result<T, String> = until_ok(|| look().ok_or_else(String::new));
    found.unwrap_or_else(|_| panic!("{what} does not come within {LIMIT:?}"))
}

/// Tries again and again until it succeeds; at the end of the time gives the last failure.
pub fn until_ok<T, E>(mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let end = Instant::now() + LIMIT;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => return Err(error),
            Err(_) => thread::sleep(INTERVAL),
        }
    }
}
