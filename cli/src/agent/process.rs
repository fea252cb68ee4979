//! VM processes as the operating system sees them: finding, starting, ending.
//!
//! A VM process is known by its command line, so an agent that was restarted, or died between the start and a note of it, still
//! finds every one. Never enters: what a process is asked (control), what is done when one has ended (settle).

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::error::ApiError;
use super::vmdir::VmDir;

/// The hidden subcommand that is a VM process.
pub const SUBCOMMAND: &str = "vm-process";

/// The living VM process of a directory.
pub fn find(dir: &Path) -> Option<u32> {
    std::fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        serves(pid, dir).then_some(pid)
    })
}

/// Whether process `pid` lives and is the VM process of `dir`. A dead one that nobody has reaped has no command line.
pub fn serves(pid: u32, dir: &Path) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| is_for(&line, dir))
}

/// Memory that a process has touched and that is its own or shared with none but its children, bytes (proc(5), `/proc/pid/status`).
pub fn touched(pid: u32) -> Option<u64> {
    touched_of(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

fn touched_of(status: &str) -> Option<u64> {
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    // Guest RAM is a memory file or private: one of the two.
    field("RssAnon:")?.checked_add(field("RssShmem:")?)?.checked_mul(1024)
}

fn is_for(cmdline: &[u8], dir: &Path) -> bool {
    let words: Vec<&[u8]> = cmdline.split(|byte| *byte == 0).collect();
    words.get(1) == Some(&SUBCOMMAND.as_bytes())
        && words.windows(2).any(|pair| pair[0] == b"--dir" && OsStr::from_bytes(pair[1]) == dir.as_os_str())
}

/// The program that VM processes are started from: this one, also after an upgrade has replaced its file.
pub fn own_program() -> Result<PathBuf, ApiError> {
    let path = std::env::current_exe()
        .map_err(|e| ApiError::internal(format!("cannot find this program's file: {e}")))?;
    // The kernel marks a replaced file so (proc(5), /proc/pid/exe).
    match path.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(stripped) if !path.exists() => Ok(PathBuf::from(OsStr::from_bytes(stripped))),
        _ => Ok(path),
    }
}

/// The command that is the VM process of a directory: in a process group of its own, so that a signal to the agent's group does not
/// reach it, with its own log.
pub fn command(program: &Path, vm: &VmDir) -> Result<Command, ApiError> {
    let log_path = vm.log();
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|e| ApiError::io("open", &log_path, &e))?;
    let errors = log.try_clone().map_err(|e| ApiError::io("open", &log_path, &e))?;
    let mut command = Command::new(program);
    command
        .arg(SUBCOMMAND)
        .arg("--dir")
        .arg(vm.path())
        .current_dir(vm.path())
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .process_group(0);
    Ok(command)
}

/// Ends the VM process of a directory at once. Whatever it was doing, its journal says what stands.
pub fn kill_now(pid: u32, dir: &Path) {
    if serves(pid, dir) {
        // It may have ended in between: nothing is left to end then.
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_memory_is_read() {
        let text = "VmRSS:\t 500 kB\nRssAnon:\t     100 kB\nRssFile:\t     80 kB\nRssShmem:\t     320 kB\n";
        assert_eq!(touched_of(text), Some(420 * 1024));
        assert_eq!(touched_of("RssAnon: 1 kB"), None);
        assert!(touched(std::process::id()).is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn a_process_is_known_by_its_words() {
        let dir = Path::new("/state/vms/web");
        assert!(is_for(b"/bin/vmove\0vm-process\0--dir\0/state/vms/web\0", dir));
        assert!(!is_for(b"/bin/vmove\0vm-process\0--dir\0/state/vms/web2\0", dir));
        assert!(!is_for(b"/bin/vmove\0agent\0--dir\0/state/vms/web\0", dir));
        assert!(!is_for(b"", dir));
        assert_eq!(find(dir), None);
    }
}
