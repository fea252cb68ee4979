//! What this machine lacks for a test: said in a line that `tests/run` counts.

use std::fs::OpenOptions;
use std::io::Write;

/// Whether VMs can run here. If not, says that `test` is skipped.
pub fn usable(test: &str) -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            skipped(test, &format!("/dev/kvm cannot be used: {error}"));
            false
        }
    }
}

/// Says that a test does not run. Written to standard output itself: the test runner keeps what `println!` prints of tests that
/// succeed to itself.
pub fn skipped(test: &str, reason: &str) {
    let mut out = std::io::stdout().lock();
    // A closed output hides the line, not the reason to return.
    let _ = writeln!(out, "\nSKIPPED: {test}: {reason}").and_then(|()| out.flush());
}
