//! What `init` and `join` are told about a host, and what they find out by themselves: its name, its address, its datastores.
//!
//! Everything is checked before anything is made, and what was made goes again when the rest fails. Never enters: identity.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};

use clap::Args;
use vmove_storage::Datastore;

use super::CommandError;
use crate::agent::cluster;
use crate::agent::config::{Config, DEFAULT_PORT, DEFAULT_STATE, DatastoreConfig};

/// Where a host's state is.
#[derive(Debug, Clone, Args)]
pub struct StateArgs {
    /// Directory of this host's state; with another one than the default, the configuration (agent.toml) and the socket
    /// (agent.sock) are there too
    #[arg(long, value_name = "DIR", env = "VMOVE_STATE", default_value = DEFAULT_STATE)]
    pub state: PathBuf,
}

impl StateArgs {
    /// The words that start the agent.
    pub fn start_agent(&self) -> String {
        if self.state == Path::new(DEFAULT_STATE) {
            "systemctl enable --now vmove   (or, without systemd: vmove agent)".to_owned()
        } else {
            format!("vmove agent --state {}", self.state.display())
        }
    }
}

/// Options of a host's configuration, for `init` and `join`.
#[derive(Debug, Args)]
pub struct HostArgs {
    /// Where its state is.
    #[command(flatten)]
    pub state: StateArgs,
    /// Name of this host, unique in the cluster [default: the machine's host name]
    #[arg(long)]
    pub name: Option<String>,
    /// Address that other agents reach this one at [default: the one this machine uses towards the others, port 7070]
    #[arg(long, value_name = "IP[:PORT]", value_parser = address)]
    pub listen: Option<SocketAddr>,
    /// Directories for disks; the first is the default one [default: one named "default" in the state directory]
    #[arg(long = "datastore", value_name = "NAME=PATH")]
    pub datastores: Vec<DatastoreConfig>,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let ip = |ip: IpAddr| SocketAddr::new(ip, DEFAULT_PORT);
    text.parse().or_else(|_| text.parse().map(ip)).map_err(|_| format!("{text:?} is not IP or IP:PORT"))
}

/// Directories that were made. Dropping it removes those in which nothing is.
#[derive(Debug, Default)]
pub struct Made(Vec<PathBuf>);

impl Made {
    /// All went well: they stay.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for dir in self.0.iter().rev() {
            // Not empty: somebody else uses it.
            let _ = std::fs::remove_dir(dir);
        }
    }
}

impl HostArgs {
    /// The configuration, seen to be possible; directories of datastores are made where only the last step of the path is missing.
    /// `towards` is a host of the cluster, if there is one yet.
    pub fn config(&self, towards: Option<SocketAddr>) -> Result<(Config, Made), CommandError> {
        let state = &self.state.state;
        cluster::refuse_second_identity(state).map_err(CommandError::failed)?;
        let name = match &self.name {
            Some(name) => name.clone(),
            None => host_name()?,
        };
        let listen = match self.listen {
            Some(listen) => listen,
            None => own_address(towards)?,
        };
        let mut config = Config::new(&name, listen);
        for store in &self.datastores {
            let path = std::path::absolute(&store.path).map_err(CommandError::failed)?;
            config.datastores.push(DatastoreConfig { name: store.name.clone(), path });
        }
        let mut made = Made::default();
        if config.datastores.is_empty() {
            let path = std::path::absolute(state.join("datastore")).map_err(CommandError::failed)?;
            config.datastores.push(DatastoreConfig { name: "default".to_owned(), path });
        }
        config.check().map_err(CommandError::failed)?;
        made.make_all(state)?;
        for store in &config.datastores {
            let fail = |error: &dyn std::fmt::Display| {
                CommandError::failed(format!("datastore {:?}: {error}", store.name))
            };
            match std::fs::create_dir(&store.path) {
                Ok(()) => made.0.push(store.path.clone()),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(fail(&format!("cannot create {}: {error}", store.path.display())));
                }
            }
            Datastore::probe(&store.path).map_err(|e| fail(&e))?;
        }
        Ok((config, made))
    }
}

impl Made {
    /// Makes a directory and those above it that are missing, for its owner alone.
    fn make_all(&mut self, dir: &Path) -> Result<(), CommandError> {
        let dir = std::path::absolute(dir).map_err(CommandError::failed)?;
        let missing: Vec<PathBuf> =
            dir.ancestors().take_while(|dir| !dir.exists()).map(Path::to_path_buf).collect();
        crate::agent::make_private_dir(&dir).map_err(CommandError::failed)?;
        self.0.extend(missing.into_iter().rev());
        Ok(())
    }
}

/// The machine's name, as far as it can be that of a host: up to the first dot (proc(5), `/proc/sys/kernel/hostname`).
fn host_name() -> Result<String, CommandError> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(CommandError::failed)?;
    let name = name.trim().split('.').next().unwrap_or_default();
    if name.is_empty() || name == "localhost" {
        return Err(CommandError::Usage(
            "this machine has no name of its own: give one with --name".to_owned(),
        ));
    }
    Ok(name.to_owned())
}

/// The address this machine uses towards `towards`, else towards the rest of the world. Nothing is sent: connecting a UDP socket only
/// asks the kernel for its route (udp(7)).
fn own_address(towards: Option<SocketAddr>) -> Result<SocketAddr, CommandError> {
    // An address for documentation (RFC 5737): routed like any other that is far away.
    let far = SocketAddr::from(([192, 0, 2, 1], DEFAULT_PORT));
    let to = towards.unwrap_or(far);
    let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    let route = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(to)?;
        socket.local_addr()
    });
    match route {
        Ok(own) if !own.ip().is_loopback() || to.ip().is_loopback() => {
            Ok(SocketAddr::new(own.ip(), DEFAULT_PORT))
        }
        _ => Err(CommandError::Usage(
            "cannot find out by which address other hosts reach this one: give it with --listen IP:PORT"
                .to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(state: &Path, datastores: &[&str]) -> HostArgs {
        HostArgs {
            state: StateArgs { state: state.to_path_buf() },
            name: Some("left".into()),
            listen: Some(address("127.0.0.1").unwrap()),
            datastores: datastores.iter().map(|store| store.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn what_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let store = |name: &str| format!("{name}={}", at(name).display());
        std::fs::write(at("file"), b"x").unwrap();
        let deep = format!("deep={}", at("deep/er").display());
        for (bad, word) in
            [(store("file"), "Not a directory"), (deep, "No such file"), (store("good"), "twice")]
        {
            let error = args(&at("state"), &[&store("good"), &bad]).config(None).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        drop(args(&at("some/state"), &[]).config(None).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the file");
        let (config, made) = args(&at("some/state"), &[]).config(None).unwrap();
        made.keep();
        assert_eq!((config.listen.port(), config.datastores[0].name.as_str()), (7070, "default"));
        assert!(at("some/state/datastore").is_dir());
    }

    #[test]
    fn the_address_towards_a_host_is_found() {
        let towards = "127.0.0.9:1".parse().unwrap();
        assert_eq!(own_address(Some(towards)).unwrap(), "127.0.0.1:7070".parse().unwrap());
        assert!(address("host:1").is_err() && address("127.0.0.1:9").unwrap().port() == 9);
    }
}
