//! Named points between the steps of a move at which a test can hold a process, to kill it or its peer exactly there.
//!
//! `VMOVE_STOP_AT` holds names separated by commas, `VMOVE_STOP_DIR` a directory. A process that reaches a named point makes the file
//! `<dir>/<name>.reached` (with its pid inside) and waits until `<dir>/<name>.go` exists. Without the variables nothing happens.
//! The names are `source.<action>` and `target.<action>`, the actions as the engines give them, each *before* it is carried out.

use std::{env, fs, path::PathBuf, thread, time::Duration};

/// Holds here if the point was named.
pub fn reach(name: &str) {
    let Ok(wanted) = env::var("VMOVE_STOP_AT") else { return };
    if !wanted.split(',').any(|w| w == name) {
        return;
    }
    let Some(dir) = env::var_os("VMOVE_STOP_DIR").map(PathBuf::from) else { return };
    tracing::warn!(point = name, "held at a stop point");
    // The name appears with its content, so that who waits for the file can read the pid at once.
    let partial = dir.join(format!("{name}.{}", std::process::id()));
    if fs::write(&partial, std::process::id().to_string()).is_err()
        || fs::rename(&partial, dir.join(format!("{name}.reached"))).is_err()
    {
        return;
    }
    while !dir.join(format!("{name}.go")).exists() && dir.exists() {
        thread::sleep(Duration::from_millis(5));
    }
}
