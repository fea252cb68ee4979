//! Named points between the steps of a move at which a test can hold a process, to kill it or its peer exactly there.
//!
//! `VMOVE_STOP_DIR` names a directory. A process that comes to a point for which there is a file `<dir>/<name>.hold` makes
//! `<dir>/<name>.reached` (with its pid inside) and waits until the first file is gone. Without the variable nothing happens.
//! The names are `source.<action>` and `target.<action>`, the actions as the engines give them, each *before* it is carried out, and
//! `checkpoint.<step>` and `restore.<step>`.

use std::{env, fs, path::PathBuf, thread, time::Duration};

/// All points of moves. A test that claims to stop at every one compares its cases with this.
pub const POINTS: [&str; 48] = [
    "source.collect-dirty",
    "source.connect",
    "source.drain-disks",
    "source.drop-mirrors",
    "source.end-round",
    "source.finish",
    "source.finish-committed",
    "source.journal-aborted",
    "source.journal-committed",
    "source.journal-moving",
    "source.journal-owner",
    "source.journal-released",
    "source.pause",
    "source.pivot",
    "source.prove",
    "source.reconnect",
    "source.restore",
    "source.resume",
    "source.retire",
    "source.save-state",
    "source.send-pages",
    "source.start-logging",
    "source.start-mirrors",
    "source.stop-logging",
    "source.tell-abort",
    "source.tell-commit",
    "source.tell-prepare",
    "source.tell-resume",
    "source.tell-setup",
    "source.tell-state",
    "target.ask-verdict",
    "target.await",
    "target.discard",
    "target.finish",
    "target.journal-aborted",
    "target.journal-incoming",
    "target.journal-owner",
    "target.journal-prepared",
    "target.journal-taken-over",
    "target.load-state",
    "target.make-images",
    "target.prove",
    "target.run",
    "target.tell-prepared",
    "target.tell-ready",
    "target.tell-refused",
    "target.tell-resumed",
    "target.tell-running",
];

/// Holds here if a test wants it.
pub fn reach(name: &str) {
    let Some(dir) = env::var_os("VMOVE_STOP_DIR").map(PathBuf::from) else { return };
    let of_a_move = name.starts_with("source.") || name.starts_with("target.");
    debug_assert!(!of_a_move || POINTS.contains(&name), "{name} is missing from the list of stop points");
    let hold = dir.join(format!("{name}.hold"));
    if !hold.exists() {
        return;
    }
    tracing::warn!(point = name, "held at a stop point");
    // The name appears with its content, so that who waits for the file can read the pid at once.
    let partial = dir.join(format!("{name}.{}", std::process::id()));
    if fs::write(&partial, std::process::id().to_string()).is_err()
        || fs::rename(&partial, dir.join(format!("{name}.reached"))).is_err()
    {
        return;
    }
    while hold.exists() {
        thread::sleep(Duration::from_millis(5));
    }
}
