//! Two hosts on this machine: real agents, started with the same commands a user types, in one temporary directory.
//!
//! Lives here: their start, and an end that leaves no process and no file. Never enters: VMs, moves.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::DemoError;
use crate::api::types::VmState;
use crate::client::Client;

/// Names of the two hosts.
pub const HOSTS: [&str; 2] = ["left", "right"];
/// Datastores each of them has; the first is the default.
pub const DATASTORES: [&str; 2] = ["fast", "bulk"];

/// How long an agent may take to answer for the first time.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long a process may take to end before it is killed.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How often something awaited is looked at.
const POLL: Duration = Duration::from_millis(50);
/// Lines of an agent's log in an error.
const LOG_LINES: usize = 15;

/// A running host.
#[derive(Debug)]
struct Host {
    name: &'static str,
    client: Client,
    log: PathBuf,
    agent: Child,
}

/// Two hosts. [`Rig::take_down`] ends them; dropping kills what is left.
#[derive(Debug)]
pub struct Rig {
    dir: TempDir,
    program: PathBuf,
    hosts: Vec<Host>,
}

/// Says clearly why no VM can run here.
pub fn check_kvm() -> Result<(), DemoError> {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let Err(error) = opened else { return Ok(()) };
    let help = match error.kind() {
        ErrorKind::NotFound => {
            "is virtualization enabled in the firmware, and are the modules kvm_intel or kvm_amd loaded?"
        }
        ErrorKind::PermissionDenied => "run as root or as a member of the group 'kvm'",
        _ => "VMs need a working KVM",
    };
    Err(DemoError::NoKvm { reason: format!("{error}; {help}") })
}

impl Rig {
    /// Makes the directory; nothing runs yet.
    pub fn new(prefix: &str) -> Result<Self, DemoError> {
        let dir = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir()
            .map_err(DemoError::io("making a temporary directory"))?;
        let program = std::env::current_exe().map_err(DemoError::io("finding this program"))?;
        Ok(Self { dir, program, hosts: Vec::new() })
    }

    /// The temporary directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The agent of a host that runs.
    pub fn client(&self, host: &str) -> Result<Client, DemoError> {
        let found = self.hosts.iter().find(|running| running.name == host);
        found.map(|running| running.client.clone()).ok_or_else(|| DemoError::Agent {
            host: host.to_owned(),
            what: "has not been started".to_owned(),
            log: String::new(),
        })
    }

    /// Starts both hosts: `init` the first, `join` the second, wait until they know each other.
    pub async fn start(&mut self) -> Result<(), DemoError> {
        let [first, second] = HOSTS;
        let addresses = free_addresses()?;
        let invitation = self.command("init", first, None, &addresses[0]).await?;
        self.agent(first).await?;
        let token = token(&invitation).ok_or_else(|| DemoError::Command {
            command: "init".to_owned(),
            output: format!("no '--token' in what it printed:\n{invitation}"),
        })?;
        self.command("join", second, Some((&addresses[0], token)), &addresses[1]).await?;
        self.agent(second).await?;
        for host in HOSTS {
            self.acquainted(host).await?;
        }
        Ok(())
    }

    fn state(&self, host: &str) -> PathBuf {
        self.dir.path().join(host)
    }

    /// Runs `init`, or `join` with the address and the token of who invited, for a host and gives back what it printed.
    async fn command(
        &self,
        command: &str,
        host: &str,
        invitation: Option<(&str, &str)>,
        address: &str,
    ) -> Result<String, DemoError> {
        let mut process = Command::new(&self.program);
        process.arg(command).arg("--state").arg(self.state(host));
        process.args(["--name", host, "--listen", address]);
        for datastore in DATASTORES {
            let path = self.dir.path().join(format!("{host}-{datastore}"));
            fs::create_dir(&path).map_err(DemoError::io(format!("making {}", path.display())))?;
            process.arg("--datastore").arg(format!("{datastore}={}", path.display()));
        }
        if let Some((inviting, token)) = invitation {
            // Not as an argument: everybody on the machine can read those.
            process.arg(inviting).env("VMOVE_TOKEN", token);
        }
        process.env_remove("VMOVE_AGENT").env_remove("VMOVE_STATE").stdin(Stdio::null()).kill_on_drop(true);
        let output = process.output().await.map_err(DemoError::io(format!("running vmove {command}")))?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(stdout);
        }
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(DemoError::Command { command: format!("{command} --name {host}"), output: stderr })
    }

    /// Starts a host's agent and waits for its first answer.
    async fn agent(&mut self, name: &'static str) -> Result<(), DemoError> {
        let state = self.state(name);
        let log = self.dir.path().join(format!("{name}-agent.log"));
        let file = fs::File::create(&log).map_err(DemoError::io(format!("making {}", log.display())))?;
        let errors = file.try_clone().map_err(DemoError::io("duplicating the log"))?;
        let agent = Command::new(&self.program)
            .arg("agent")
            .arg("--state")
            .arg(&state)
            .env_remove("VMOVE_AGENT")
            .env_remove("VMOVE_STATE")
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            // A Ctrl-C on the terminal is for us: agents must live until their VMs are stopped.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(DemoError::io("starting an agent"))?;
        self.hosts.push(Host { name, client: Client::unix(state.join("agent.sock")), log, agent });
        let Some(host) = self.hosts.last_mut() else { return Ok(()) };
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let what = match (host.client.host().await, host.agent.try_wait()) {
                (Ok(_), _) => return Ok(()),
                (Err(_), Ok(Some(status))) => format!("ended at once ({status})"),
                (Err(error), _) if Instant::now() > deadline => format!("does not answer: {error}"),
                (Err(_), _) => {
                    tokio::time::sleep(POLL).await;
                    continue;
                }
            };
            return Err(DemoError::Agent { host: name.to_owned(), what, log: log_tail(&host.log) });
        }
    }

    /// Waits until a host reaches all hosts.
    async fn acquainted(&self, host: &str) -> Result<(), DemoError> {
        let client = self.client(host)?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let known =
                client.hosts().await.map_err(DemoError::client(format!("asking {host} for its hosts")))?;
            if HOSTS.iter().all(|name| known.iter().any(|known| known.name == *name && known.reachable)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let detail =
                    known.iter().filter_map(|known| known.error.clone()).collect::<Vec<_>>().join("; ");
                return Err(DemoError::Timeout {
                    what: format!("{host} reaching {}", HOSTS.join(" and ")),
                    seconds: START_LIMIT.as_secs(),
                    detail: if detail.is_empty() { detail } else { format!(": {detail}") },
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The last lines of both agents' logs, for the report of a failure.
    pub fn logs(&self) -> String {
        let logs: Vec<String> = self
            .hosts
            .iter()
            .map(|host| format!("agent of {}:\n{}\n", host.name, log_tail(&host.log)))
            .collect();
        logs.concat()
    }

    /// Stops the VMs, ends the agents, kills what is left, removes the directory.
    pub async fn take_down(mut self) -> Result<(), DemoError> {
        for host in &self.hosts {
            // Processes that do not obey are found below; a broken agent must not hold this up.
            let _ = tokio::time::timeout(END_LIMIT, stop_all(&host.client)).await;
        }
        for host in &mut self.hosts {
            end_agent(&mut host.agent).await;
        }
        self.hosts.clear();
        let path = self.dir.path().to_owned();
        let left = end_leftovers(&self.program, &path).await;
        let removed = fs::remove_dir_all(&path);
        if !left.is_empty() {
            let reason = format!("processes {left:?} do not end");
            return Err(DemoError::Left { path, reason });
        }
        removed.map_err(|error| DemoError::Left { path, reason: error.to_string() })
    }
}

impl Drop for Rig {
    /// Only for panics and early returns: [`Rig::take_down`] leaves nothing to do.
    fn drop(&mut self) {
        for pid in own_processes(&self.program, self.dir.path()) {
            // It may have ended by itself meanwhile.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

async fn stop_all(client: &Client) {
    let Ok(list) = client.vms(false).await else { return };
    for vm in list.vms {
        if !matches!(vm.state, VmState::Stopped | VmState::Failed) {
            // What does not stop is killed.
            let _ = client.stop(&vm.name).await;
        }
    }
}

async fn end_agent(agent: &mut Child) {
    if let Some(id) = agent.id() {
        // Not waited for yet, so the id is still its own; if it has ended the signal does nothing.
        let _ = kill(Pid::from_raw(id as i32), Signal::SIGTERM);
    }
    if tokio::time::timeout(END_LIMIT, agent.wait()).await.is_err() {
        // The error would be that it has just ended.
        let _ = agent.kill().await;
    }
}

/// Ends VM processes that outlived their agents, first politely; gives back those that stay.
async fn end_leftovers(program: &Path, dir: &Path) -> Vec<i32> {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let deadline = Instant::now() + END_LIMIT;
        let mut told = false;
        loop {
            let left = own_processes(program, dir);
            if left.is_empty() {
                return Vec::new();
            }
            if !told {
                for pid in left {
                    // It may have ended since it was listed.
                    let _ = kill(pid, signal);
                }
                told = true;
            } else if Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
    }
    own_processes(program, dir).into_iter().map(Pid::as_raw).collect()
}

/// Processes of this very program with a path inside `dir` on their command line; `dir` is ours alone.
fn own_processes(program: &Path, dir: &Path) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let inside = |words: &[u8]| {
        words.split(|byte| *byte == 0).any(|word| Path::new(OsStr::from_bytes(word)).starts_with(dir))
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != std::process::id() as i32)
        .filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program))
        .filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|words| inside(&words)))
        .map(Pid::from_raw)
        .collect()
}

/// Two addresses on the loopback interface that nobody uses now.
fn free_addresses() -> Result<[String; 2], DemoError> {
    let bind =
        || TcpListener::bind("127.0.0.1:0").and_then(|listener| Ok((listener.local_addr()?, listener)));
    let what = "finding a free port";
    // Both are held until both are known, else they could be the same.
    let (first, _held) = bind().map_err(DemoError::io(what))?;
    let (second, _held_too) = bind().map_err(DemoError::io(what))?;
    Ok([first.to_string(), second.to_string()])
}

/// The word after `--token` in what `init` prints.
fn token(text: &str) -> Option<&str> {
    let mut words = text.split_whitespace();
    words.find(|word| *word == "--token")?;
    words.next()
}

fn log_tail(path: &Path) -> String {
    let Ok(bytes) = fs::read(path) else { return "(none)".to_owned() };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_found_in_the_invitation() {
        let text = "Host left is ready.\nOn another host run:\n  vmove join 127.0.0.1:1 --token abc.def --state DIR\n";
        assert_eq!(token(text), Some("abc.def"));
        assert_eq!(token("nothing here"), None);
        assert_eq!(token("ends with --token"), None);
    }

    #[test]
    fn addresses_differ() -> Result<(), DemoError> {
        let [first, second] = free_addresses()?;
        assert_ne!(first, second);
        Ok(())
    }

    #[test]
    fn only_processes_of_the_directory_are_ours() -> Result<(), Box<dyn std::error::Error>> {
        let (ours, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let program = fs::canonicalize("/usr/bin/tail")?;
        let file = ours.path().join("log");
        fs::write(&file, "")?;
        let mut process =
            std::process::Command::new(&program).arg("-f").arg(&file).stdout(Stdio::null()).spawn()?;
        // A process is its program a moment before its words can be read.
        while fs::read(format!("/proc/{}/cmdline", process.id()))?.is_empty() {
            std::thread::yield_now();
        }
        let found = [
            own_processes(&program, ours.path()),
            own_processes(&program, other.path()),
            own_processes(Path::new("/bin/other"), ours.path()),
        ];
        process.kill()?;
        process.wait()?;
        assert_eq!(found, [vec![Pid::from_raw(process.id() as i32)], vec![], vec![]]);
        Ok(())
    }
}
