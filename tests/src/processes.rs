//! Processes of a test: those of the program under test with a path of the test's own directory on their command line.
//!
//! Never enters: any other process.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::until;

/// Living processes of `program` with a path inside `dir` among their words.
pub fn of(program: &Path, dir: &Path) -> Vec<u32> {
    matching(program, |words| words.iter().any(|word| Path::new(word).starts_with(dir)))
}

/// The living VM process of a VM's directory.
pub fn of_vm(program: &Path, vm_dir: &Path) -> Option<u32> {
    let of_dir =
        |words: &[&OsStr]| words.contains(&OsStr::new("vm-process")) && words.contains(&vm_dir.as_os_str());
    matching(program, of_dir).first().copied()
}

fn matching(program: &Path, fits: impl Fn(&[&OsStr]) -> bool) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    // So the kernel names a file that was built anew meanwhile (proc(5), /proc/pid/exe).
    let mut replaced = program.as_os_str().to_owned();
    replaced.push(" (deleted)");
    let replaced = Path::new(&replaced);
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program || exe == replaced)
        })
        .filter(|pid| {
            let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
            let words: Vec<&OsStr> = line.split(|byte| *byte == 0).map(OsStr::from_bytes).collect();
            fits(&words)
        })
        .collect()
}

/// Kills a process that the test started, or had started, and waits for its end.
pub fn kill_hard(pid: u32) {
    // It may have ended by itself meanwhile.
    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    until("the end of a killed process", || ended(pid).then_some(()));
}

/// Whether a process is gone, or dead and only not reaped.
fn ended(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).map_or(true, |line| line.is_empty())
}
