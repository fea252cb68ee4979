//! Named points between the steps of a move at which a test can hold a process, to kill it or its peer exactly there.
//!
//! `VMOVE_STOP_DIR` names a directory. A process that comes to a point for which there is a file `<dir>/<name>.hold` makes
//! `<dir>/<name>.reached` (with its pid inside) and waits until the first file is gone. Without the variable nothing happens.
//! The names are `source.<action>` and `target.<action>`, the actions as the engines give them, each *before* it is carried out, and
//! `checkpoint.<step>` and `restore.<step>`.

use std::{env, fs, path::PathBuf, thread, time::Duration};

/// Holds here if a test wants it.
pub fn reach(name: &str) {
    let Some(dir) = env::var_os("VMOVE_STOP_DIR").map(PathBuf::from) else { return };
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
