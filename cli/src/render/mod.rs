//! What people see: units, tables, progress bars, the report of a move.
//!
//! Lives here: text made from values that others fetched. Never enters: connections, files, decisions.

pub mod evacuation;
pub mod progress;
pub mod report;
pub mod screen;
pub mod table;
pub mod units;

use std::io::{ErrorKind, Write};

use serde::Serialize;

/// Writes text to standard output. A reader that has gone away (`vmove ls | head -1`) is not an error; any other failure is.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Writes a value to standard output as indented JSON with a newline at its end.
pub fn print_json<T: Serialize>(value: &T) -> std::io::Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(std::io::Error::from)?;
    text.push('\n');
    print(&text)
}
