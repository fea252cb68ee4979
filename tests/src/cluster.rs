//! Hosts on this machine: each with its own state directory, datastores and agent, made with the commands a user types.
//!
//! Lives here: their start, kill and restart, and an end that leaves no process and no file. Never enters: VMs.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};

use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::faults::Faults;
use crate::netns::Lan;
use crate::processes;
use crate::relay::Relay;
use crate::stops::Stops;
use crate::wait::until;

/// Datastores of every host; the first is the default.
pub const DATASTORES: [&str; 2] = ["fast", "bulk"];
/// Where agents listen that have an address of their own.
const AGENT_PORT: u16 = 7070;
/// Lines of each log shown when a test fails.
const LOG_LINES: usize = 40;

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Exit code.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained.
    pub stderr: String,
}

impl Answer {
    /// Asserts success and gives what was printed.
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{} {}", self.stdout, self.stderr);
        self.stdout
    }

    /// Asserts success and reads what was printed as JSON.
    pub fn json<T: DeserializeOwned>(self) -> T {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }

    /// Asserts a refusal with this exit code whose words include all of `words`.
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not said in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

/// One host.
#[derive(Debug)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its state directory.
    pub state: PathBuf,
    /// Where its agent listens for other agents.
    pub address: String,
    /// Runs the agent in a mount namespace of its own after this shell command.
    pub before_agent: Option<String>,
    /// Runs the agent, and the commands that need a network, in this network namespace: words for `nsenter`.
    pub inside: Option<Vec<String>>,
    dir: PathBuf,
    agent: Option<Child>,
}

impl Host {
    /// The directory of one of its datastores.
    pub fn datastore(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{}-{name}", self.name))
    }

    /// The directory of a VM.
    pub fn vm_dir(&self, vm: &str) -> PathBuf {
        self.state.join("vms").join(vm)
    }

    /// Everything of VMs that lies on this host: their directories, images and stamps.
    pub fn remains(&self) -> Vec<String> {
        let stores = DATASTORES.iter().flat_map(|store| crate::images::files_below(&self.datastore(store)));
        let dirs = crate::images::files_below(&self.state.join("vms"));
        let going = fs::read_dir(&self.state).unwrap().filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.starts_with(".gone").then_some(name)
        });
        stores.chain(dirs).chain(going).collect()
    }
}

/// A cluster. Dropping it ends all its processes and removes its files.
#[derive(Debug)]
pub struct Cluster {
    /// The program under test.
    pub program: PathBuf,
    /// Its hosts; the first is the one that made the cluster.
    pub hosts: Vec<Host>,
    /// Stop points of its VM processes.
    pub stops: Stops,
    /// What stands between the VM processes of a move, if anything does.
    pub relay: Option<Relay>,
    /// What makes disks fail, if anything does.
    pub faults: Option<Faults>,
    dir: TempDir,
}

impl Cluster {
    /// Hosts with these names, their agents running and acquainted. VM processes are held at the stop points `hold`.
    pub fn start(program: &str, hosts: &[&str], hold: &[&str]) -> Self {
        let mut cluster = Self::prepare(program, hosts, hold);
        for index in 0..hosts.len() {
            cluster.join(index);
        }
        cluster.acquainted();
        cluster
    }

    /// The same with a relay on all data connections of moves.
    pub fn start_with_relay(program: &str, hosts: &[&str], hold: &[&str]) -> Self {
        let mut cluster = Self::prepare(program, hosts, hold);
        cluster.relay = Some(Relay::start());
        for index in 0..hosts.len() {
            cluster.join(index);
        }
        cluster.acquainted();
        cluster
    }

    /// The same with disks that can be made to fail.
    pub fn start_with_faults(program: &str, hosts: &[&str]) -> Self {
        let mut cluster = Self::prepare(program, hosts, &[]);
        cluster.faults = Some(Faults::new(&cluster.dir.path().join("faults")));
        for index in 0..hosts.len() {
            cluster.join(index);
        }
        cluster.acquainted();
        cluster
    }

    /// Hosts with these names in the namespaces of a network, the first in its host 0 and so on.
    pub fn start_on(lan: &Lan, program: &str, hosts: &[&str], hold: &[&str]) -> Self {
        let mut cluster = Self::prepare(program, hosts, hold);
        cluster.place_on(lan);
        for index in 0..hosts.len() {
            cluster.join(index);
        }
        cluster.acquainted();
        cluster
    }

    /// Gives the hosts of a cluster that was only prepared their places in the namespaces of a network.
    pub fn place_on(&mut self, lan: &Lan) {
        for (index, host) in self.hosts.iter_mut().enumerate() {
            host.inside = Some(lan.host(index).words());
            host.address = format!("{}:{AGENT_PORT}", Lan::address(index));
        }
    }

    /// The faults of a cluster that was started with them.
    pub fn faults(&self) -> &Faults {
        self.faults.as_ref().unwrap_or_else(|| panic!("this cluster has no faults"))
    }

    /// The process id of a host's agent.
    pub fn agent_process(&self, host: &str) -> u32 {
        self.host(host).agent.as_ref().unwrap_or_else(|| panic!("{host} has no agent")).id()
    }

    /// The relay of a cluster that was started with one.
    pub fn relay(&self) -> &Relay {
        self.relay.as_ref().unwrap_or_else(|| panic!("this cluster has no relay"))
    }

    /// The same without anything run: what is still to be changed is changed before [`Cluster::join`].
    pub fn prepare(program: &str, hosts: &[&str], hold: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("vmt-").tempdir().unwrap();
        // As agents and the kernel name paths.
        let path = dir.path().canonicalize().unwrap();
        let host = |name: &&str| Host {
            name: (*name).to_owned(),
            state: path.join(name),
            address: free_address(),
            before_agent: None,
            inside: None,
            dir: path.clone(),
            agent: None,
        };
        let hosts = hosts.iter().map(host).collect();
        Self {
            program: Path::new(program).canonicalize().unwrap(),
            hosts,
            stops: Stops::new(&path.join("stops"), hold),
            relay: None,
            faults: None,
            dir,
        }
    }

    /// Makes a host (the first by `init`, the others by `join`) and starts its agent.
    pub fn join(&mut self, index: usize) {
        let host = &self.hosts[index];
        let mut command = self.command_on(host);
        if index == 0 {
            command.arg("init");
        } else {
            let invitation =
                Self::run(self.command().args(["token", "--json", "--state"]).arg(&self.hosts[0].state));
            let invitation: serde_json::Value = invitation.json();
            command
                .args(["join", &self.hosts[0].address])
                .env("VMOVE_TOKEN", invitation["token"].as_str().unwrap());
        }
        command.arg("--state").arg(&host.state).args(["--name", &host.name, "--listen", &host.address]);
        for store in DATASTORES {
            command.arg("--datastore").arg(format!("{store}={}", host.datastore(store).display()));
        }
        Self::run(&mut command).ok();
        self.start_agent(index);
    }

    /// A directory for the test's own files.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A host by its name.
    pub fn host(&self, name: &str) -> &Host {
        &self.hosts[self.index(name)]
    }

    fn index(&self, name: &str) -> usize {
        self.hosts.iter().position(|host| host.name == name).unwrap_or_else(|| panic!("no host {name}"))
    }

    /// Runs a command of the program against the agent of a host.
    pub fn vmove(&self, host: &str, words: &[&str]) -> Answer {
        Self::run(self.command().arg("--agent").arg(self.host(host).state.join("agent.sock")).args(words))
    }

    /// The program, without what the environment of the tests may say.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env_remove("VMOVE_AGENT").env_remove("VMOVE_STATE").stdin(Stdio::null());
        command
    }

    /// The program in the namespace of a host, if it has one.
    fn command_on(&self, host: &Host) -> Command {
        let Some(inside) = &host.inside else { return self.command() };
        let mut command = Command::new("nsenter");
        command.args(inside).arg("--").arg(&self.program);
        command.env_remove("VMOVE_AGENT").env_remove("VMOVE_STATE").stdin(Stdio::null());
        command
    }

    fn run(command: &mut Command) -> Answer {
        let output = command.output().unwrap();
        Answer {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts a host's agent, for the first time or again, and waits until it answers.
    pub fn start_agent(&mut self, index: usize) {
        let host = &self.hosts[index];
        let log = File::options().append(true).create(true).open(self.log(host)).unwrap();
        let mut command = match &host.before_agent {
            None => self.command_on(host),
            Some(before) => {
                // As root a mount namespace is enough; else one is to be had with a user namespace.
                let flags = if nix::unistd::geteuid().is_root() { "-m" } else { "-Urm" };
                let mut command = Command::new("unshare");
                command
                    .args([flags, "sh", "-c", &format!("{before} && exec \"$0\" \"$@\"")])
                    .arg(&self.program);
                command.env_remove("VMOVE_AGENT").env_remove("VMOVE_STATE").stdin(Stdio::null());
                command
            }
        };
        command.args(["agent", "--state"]).arg(&host.state).envs(self.stops.environment());
        command.envs(self.relay.iter().map(Relay::environment));
        command.envs(self.faults.iter().map(Faults::environment));
        let mut agent = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        until(&format!("the agent of {}", host.name), || {
            assert!(agent.try_wait().unwrap().is_none(), "the agent of {} ended: {}", host.name, self.logs());
            (self.vmove(&host.name, &["host", "ls", "--json"]).code == 0).then_some(())
        });
        self.hosts[index].agent = Some(agent);
    }

    /// Kills a host's agent. Its VM processes go on.
    pub fn kill_agent(&mut self, host: &str) {
        let index = self.index(host);
        let mut agent = self.hosts[index].agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Starts the agent of a host again.
    pub fn restart_agent(&mut self, host: &str) {
        self.start_agent(self.index(host));
        self.acquainted();
    }

    /// Waits until every host with an agent reaches all others with one.
    pub fn acquainted(&self) {
        let alive = |host: &&Host| host.agent.is_some();
        for host in self.hosts.iter().filter(alive) {
            until(&format!("{} reaching the others", host.name), || {
                let known: Vec<vmove::api::types::KnownHost> =
                    self.vmove(&host.name, &["host", "ls", "--json"]).json();
                let reached =
                    |other: &Host| known.iter().any(|known| known.name == other.name && known.reachable);
                self.hosts.iter().filter(alive).all(reached).then_some(())
            });
        }
    }

    /// The id of the VM process of a VM on a host.
    pub fn vm_process(&self, host: &str, vm: &str) -> Option<u32> {
        processes::of_vm(&self.program, &self.host(host).vm_dir(vm))
    }

    fn log(&self, host: &Host) -> PathBuf {
        self.dir.path().join(format!("{}.log", host.name))
    }

    /// The last lines of all logs.
    fn logs(&self) -> String {
        let mut text = String::new();
        for host in &self.hosts {
            let mut logs = vec![self.log(host)];
            if let Ok(vms) = fs::read_dir(host.state.join("vms")) {
                logs.extend(vms.filter_map(|vm| Some(vm.ok()?.path().join("log"))));
            }
            for log in logs {
                let lines = fs::read_to_string(&log).unwrap_or_default();
                let lines: Vec<&str> = lines.lines().collect();
                let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
                // Writing to a String cannot fail.
                let _ = writeln!(text, "--- {}\n{tail}", log.display());
            }
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for host in &mut self.hosts {
            if let Some(mut agent) = host.agent.take() {
                // It may have ended already.
                let _ = agent.kill();
                let _ = agent.wait();
            }
        }
        let dir = self.dir.path().canonicalize().unwrap();
        for pid in processes::of(&self.program, &dir) {
            processes::kill_hard(pid);
        }
    }
}

/// A loopback address that is this host's alone, so that ports of tests that run beside each other cannot collide.
fn free_address() -> String {
    static NEXT: AtomicU8 = AtomicU8::new(0);
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    // 127.0.0.0/8 is the loopback interface (RFC 1122, 3.2.1.3); 127.0.x.x is left to others.
    let last = 1 + NEXT.fetch_add(1, Ordering::Relaxed) % 250;
    let ip = std::net::Ipv4Addr::new(127, 1 + high % 250, low, last);
    TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap().to_string()
}
