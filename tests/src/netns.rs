//! Network namespaces for tests: hosts with a bridge each, joined by a switch.
//!
//! ```text
//! switch:  sw0 10.77.0.1/24 ---- port to each host            (the test's own place: ping, clients)
//! host i:  br0 10.77.0.(10+i)/24 ---- uplink to the switch     (agent, VM processes, taps in br0)
//! ```
//! A namespace lives as long as its keeper, a process that reads from a pipe of this one: however the test ends, the keeper
//! ends with it, and with the last process in it the namespace and all its interfaces. Without root the whole is made in a
//! user namespace. Never enters: agents and VMs (`cluster` runs them in a namespace it is given).

use std::io::Read;
use std::process::{Child, Command, Output, Stdio};

use crate::kvm;
use crate::wait::until;

/// The bridge on every host.
pub const BRIDGE: &str = "br0";
/// The switch's own address: where clients of the guests are.
pub const CLIENT: &str = "10.77.0.1";

/// A network namespace and, without root, the user namespace it is in.
#[derive(Debug)]
pub struct Namespace {
    keeper: Child,
    /// Keeper of the namespace whose user namespace this one is in.
    root: u32,
}

impl Namespace {
    /// A new one, in the same user namespace as `beside`; fails with the reason, as people see it.
    fn new(beside: Option<&Self>) -> Result<Self, String> {
        let mut command = match beside {
            Some(other) => other.command("unshare"),
            None => Command::new("unshare"),
        };
        if beside.is_none() && !nix::unistd::geteuid().is_root() {
            command.args(["-U", "-r"]);
        }
        // A word that all is made, then nothing until the pipe ends.
        command.args(["-n", "sh", "-c", "echo; exec cat"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut keeper = command.spawn().map_err(|error| format!("unshare: {error}"))?;
        let mut word = [0; 1];
        let made = keeper.stdout.as_mut().is_some_and(|out| out.read_exact(&mut word).is_ok());
        if !made {
            let said = keeper.wait_with_output().map_err(|error| error.to_string())?;
            return Err(String::from_utf8_lossy(&said.stderr).trim().to_owned());
        }
        let root = beside.map_or(keeper.id(), |other| other.root);
        let this = Self { keeper, root };
        this.run("ip", &["link", "set", "lo", "up"])?;
        Ok(this)
    }

    /// A command that runs inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(self.words()).arg("--").arg(program);
        command
    }

    /// The words for `nsenter` to come inside.
    pub fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        if !nix::unistd::geteuid().is_root() {
            words
                .extend([format!("--user=/proc/{}/ns/user", self.root), "--preserve-credentials".to_owned()]);
        }
        words.push(format!("--net=/proc/{}/ns/net", self.keeper.id()));
        words
    }

    /// Runs a command inside; fails with what it complained.
    pub fn run(&self, program: &str, words: &[&str]) -> Result<String, String> {
        let what = format!("{program} {}", words.join(" "));
        let Output { status, stdout, stderr } = self
            .command(program)
            .args(words)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("{what}: {error}"))?;
        if status.success() {
            Ok(String::from_utf8_lossy(&stdout).into_owned())
        } else {
            Err(format!("{what}: {}", String::from_utf8_lossy(&stderr).trim()))
        }
    }

    /// Runs `ip` inside, with words as they are typed.
    pub fn ip(&self, words: &str) -> Result<String, String> {
        self.run("ip", &words.split(' ').collect::<Vec<_>>())
    }

    /// Ends every process inside.
    fn kill_all(&self) {
        let inside = std::fs::read_link(format!("/proc/{}/ns/net", self.keeper.id()));
        let Ok(inside) = inside else { return };
        let Ok(entries) = std::fs::read_dir("/proc") else { return };
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let others = pids.filter(|pid| {
            *pid != self.keeper.id()
                && std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| ns == inside)
        });
        for pid in others.collect::<Vec<_>>() {
            crate::processes::kill_hard(pid);
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.kill_all();
        // It may have ended already.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Hosts joined by a switch.
#[derive(Debug)]
pub struct Lan {
    switch: Namespace,
    hosts: Vec<Option<Namespace>>,
}

impl Lan {
    /// A switch and this many hosts; none, and a line that says so, where namespaces cannot be made.
    pub fn new(test: &str, hosts: usize) -> Option<Self> {
        match Self::make(hosts) {
            Ok(lan) => Some(lan),
            Err(why) => {
                kvm::skipped(test, &format!("network namespaces, bridges and taps cannot be made: {why}"));
                None
            }
        }
    }

    fn make(hosts: usize) -> Result<Self, String> {
        let switch = Namespace::new(None)?;
        let mut lan = Self { switch, hosts: Vec::new() };
        add_bridge(&lan.switch, "sw0", &format!("{CLIENT}/24"))?;
        for index in 0..hosts {
            let host = Namespace::new(Some(&lan.switch))?;
            let (port, keeper) = (format!("port{index}"), host.keeper.id());
            lan.switch.ip(&format!("link add {port} type veth peer name uplink netns {keeper}"))?;
            lan.switch.ip(&format!("link set {port} master sw0 up"))?;
            add_bridge(&host, BRIDGE, &format!("{}/24", Self::address(index)))?;
            host.ip(&format!("link set uplink master {BRIDGE} up"))?;
            lan.hosts.push(Some(host));
        }
        // Seen to work as a whole: a veth carries only once both its ends are up, and so does the bridge.
        lan.host(0).ip("tuntap add probe mode tap")?;
        lan.host(0).ip("tuntap del probe mode tap")?;
        Ok(lan)
    }

    /// The address of a host.
    pub fn address(index: usize) -> String {
        format!("10.77.0.{}", 10 + index)
    }

    /// A host's namespace.
    pub fn host(&self, index: usize) -> &Namespace {
        self.hosts[index].as_ref().expect("the host was not destroyed")
    }

    /// Where the clients are.
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }

    /// Switches a host off: its processes are killed and its interfaces vanish.
    pub fn destroy(&mut self, index: usize) {
        let host = self.hosts[index].take().expect("the host was not destroyed before");
        drop(host);
        let port = format!("port{index}");
        until(&format!("{port} vanishing with its host"), || {
            self.switch.ip(&format!("link show {port}")).is_err().then_some(())
        });
    }
}

/// A bridge that forwards at once, with an address.
fn add_bridge(namespace: &Namespace, name: &str, address: &str) -> Result<(), String> {
    namespace.ip(&format!("link add {name} type bridge forward_delay 0 stp_state 0"))?;
    namespace.ip(&format!("address add {address} dev {name}"))?;
    namespace.ip(&format!("link set {name} up")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_reach_each_other_and_leave_nothing() {
        let Some(mut lan) = Lan::new("hosts_reach_each_other_and_leave_nothing", 2) else { return };
        let address = Lan::address(1);
        let heard = std::net::Ipv4Addr::from([10, 77, 0, 11]).to_string();
        assert_eq!(address, heard);
        // The neighbour's address is found only through both bridges and the switch.
        until("host 1 as a neighbour of host 0", || {
            let _ = lan.host(0).run("bash", &["-c", &format!("exec 3<>/dev/udp/{address}/9; echo >&3")]);
            let known = lan.host(0).ip(&format!("neigh show {address}")).unwrap();
            known.contains("lladdr").then_some(())
        });
        let mut inside = lan.host(1).command("sleep").arg("1000").spawn().unwrap();
        lan.destroy(1);
        assert!(!inside.wait().unwrap().success(), "it was killed");
    }
}
