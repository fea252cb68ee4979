//! The host's configuration: `/etc/vmove/agent.toml`, or `agent.toml` in a state directory that is not the usual one. Written by `init`
//! and `join`, edited by people; the agent changes only its list of datastores ([`super::config_file`]).
//!
//! What was learned from the cluster lies beside it and belongs to the agent: `hosts.toml`, `removed-hosts.toml`, and in `seen.toml` the
//! VMs that other hosts had when they were last asked. Never enters: identity, VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::config_file;
use crate::api::removal::RemovedHosts;
use crate::api::types::HostAddress;
use crate::identity::files::write_private;
use crate::identity::{IdentityError, check_host_name};

/// Where the state of a host lies when nobody says otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/vmove";
/// Where its configuration is then.
pub const DEFAULT_CONFIG: &str = "/etc/vmove/agent.toml";
/// And its unix socket.
pub const DEFAULT_SOCKET: &str = "/run/vmove/agent.sock";
/// Port of agents when nobody says otherwise.
pub const DEFAULT_PORT: u16 = 7070;
/// How far the clocks of two hosts may be apart, ms, when nobody says otherwise.
pub const DEFAULT_CLOCK_SKEW_MS: u64 = 5000;

/// What can be wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It is not the TOML that was expected; the reason names line and column.
    #[error("{}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// It says something that cannot be.
    #[error("{what}")]
    Invalid {
        /// What.
        what: String,
    },
    /// Host name or file of the identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// `agent.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The host's name, unique in the cluster.
    pub name: String,
    /// Address that other agents reach this one at.
    pub listen: SocketAddr,
    /// The agent's unix socket; without it `/run/vmove/agent.sock`, or `agent.sock` in a state directory that is not the usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Datastore for disks that name none; without it the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_datastore: Option<String>,
    /// CPU features this host does not offer to guests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpu_mask: Vec<String>,
    /// A VM is not taken from a host whose clock is further from this one's, ms.
    #[serde(default = "default_clock_skew_ms")]
    pub max_clock_skew_ms: u64,
    /// Directories for disks.
    #[serde(default)]
    pub datastores: Vec<DatastoreConfig>,
    /// Hosts known beforehand; those that joined are in `hosts.toml`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<HostAddress>,
}

fn default_clock_skew_ms() -> u64 {
    DEFAULT_CLOCK_SKEW_MS
}

/// A datastore in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatastoreConfig {
    /// Its name on this host.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
}

impl std::str::FromStr for DatastoreConfig {
    type Err = String;

    /// `NAME=PATH`, as on the command line.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.to_owned(), path: path.into() })
            }
            _ => Err(format!("{text:?} is not NAME=PATH")),
        }
    }
}

impl Config {
    /// That of a host without datastores, everything else at its default.
    pub fn new(name: &str, listen: SocketAddr) -> Self {
        Self {
            name: name.to_owned(),
            listen,
            socket: None,
            default_datastore: None,
            cpu_mask: Vec::new(),
            max_clock_skew_ms: DEFAULT_CLOCK_SKEW_MS,
            datastores: Vec::new(),
            hosts: Vec::new(),
        }
    }

    /// Where the configuration of a state directory is.
    pub fn path(state: &Path) -> PathBuf {
        if state == Path::new(DEFAULT_STATE) { DEFAULT_CONFIG.into() } else { state.join("agent.toml") }
    }

    /// Where the socket of an agent is whose configuration names none.
    pub fn default_socket(state: &Path) -> PathBuf {
        if state == Path::new(DEFAULT_STATE) { DEFAULT_SOCKET.into() } else { state.join(super::SOCKET) }
    }

    /// The agent's unix socket.
    pub fn socket(&self, state: &Path) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| Self::default_socket(state))
    }

    /// Reads and checks it.
    pub fn load(state: &Path) -> Result<Self, ConfigError> {
        let path = Self::path(state);
        let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Io {
            action: "read",
            path: path.clone(),
            source,
        })?;
        Self::parse(&text, &path)
    }

    /// Reads it from a text; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| ConfigError::Parse {
            path: path.to_path_buf(),
            reason: e.to_string().trim_end().to_owned(),
        })?;
        config.check().map_err(|e| ConfigError::Parse { path: path.to_path_buf(), reason: e.to_string() })?;
        Ok(config)
    }

    /// Checks what types cannot.
    pub fn check(&self) -> Result<(), ConfigError> {
        let invalid = |what: String| Err(ConfigError::Invalid { what });
        check_host_name(&self.name)?;
        if self.listen.ip().is_unspecified() {
            return invalid(format!(
                "listen = {}: name the IP address that other hosts reach this one at, not every address",
                self.listen
            ));
        }
        if self.socket.as_ref().is_some_and(|socket| !socket.is_absolute() || socket.file_name().is_none()) {
            return invalid("socket must be the absolute path of a file".to_owned());
        }
        let mut names = std::collections::BTreeSet::new();
        for store in &self.datastores {
            vmove_storage::datastore::check_name("datastore", &store.name)
                .map_err(|e| ConfigError::Invalid { what: e.to_string() })?;
            if !names.insert(&store.name) {
                return invalid(format!("datastore {:?} is there twice", store.name));
            }
            if !store.path.is_absolute() {
                return invalid(format!("datastore {:?}: its path must be absolute", store.name));
            }
        }
        if let Some(default) = &self.default_datastore
            && !names.contains(default)
        {
            return invalid(format!("default_datastore {default:?} is none of the datastores"));
        }
        Ok(())
    }

    /// Writes it with a word on every key (0600, whole or not at all).
    pub fn save(&self, state: &Path) -> Result<(), ConfigError> {
        self.check()?;
        let path = Self::path(state);
        if let Some(dir) = path.parent() {
            let io = |source| ConfigError::Io { action: "create", path: dir.to_path_buf(), source };
            std::fs::create_dir_all(dir).map_err(io)?;
        }
        Ok(write_private(&path, &config_file::render(self, state)?)?)
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostsFile {
    #[serde(default)]
    hosts: Vec<HostAddress>,
}

/// The hosts learned from the cluster.
#[derive(Debug, Clone)]
pub struct HostsStore {
    path: PathBuf,
}

impl HostsStore {
    /// That of a state directory.
    pub fn of(state: &Path) -> Self {
        Self { path: state.join("hosts.toml") }
    }

    /// Name -> address; empty if there is no file yet.
    pub fn load(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(source) => {
                return Err(ConfigError::Io { action: "read", path: self.path.clone(), source });
            }
        };
        let file: HostsFile = toml::from_str(&text)
            .map_err(|e| ConfigError::Parse { path: self.path.clone(), reason: e.to_string() })?;
        Ok(file.hosts.into_iter().map(|host| (host.name, host.address)).collect())
    }

    /// Hosts that were taken out of the cluster; none if there is no file yet.
    pub fn load_removed(&self) -> Result<RemovedHosts, ConfigError> {
        let path = self.path.with_file_name("removed-hosts.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map_err(|e| ConfigError::Parse { path, reason: e.to_string() }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(RemovedHosts::default()),
            Err(source) => Err(ConfigError::Io { action: "read", path, source }),
        }
    }

    /// Writes all of them.
    pub fn save_removed(&self, removed: &RemovedHosts) -> Result<(), ConfigError> {
        let text = toml::to_string(removed).map_err(|e| ConfigError::Invalid { what: e.to_string() })?;
        Ok(write_private(&self.path.with_file_name("removed-hosts.toml"), &text)?)
    }

    /// VMs that other hosts had when they were last asked. Only to be told to people: what cannot be read is nothing.
    pub fn load_seen(&self) -> BTreeMap<String, BTreeSet<String>> {
        let text = std::fs::read_to_string(self.path.with_file_name("seen.toml")).unwrap_or_default();
        toml::from_str(&text).unwrap_or_default()
    }

    /// Writes all of them.
    pub fn save_seen(&self, seen: &BTreeMap<String, BTreeSet<String>>) -> Result<(), ConfigError> {
        let text = toml::to_string(seen).map_err(|e| ConfigError::Invalid { what: e.to_string() })?;
        Ok(write_private(&self.path.with_file_name("seen.toml"), &text)?)
    }

    /// Writes all of them.
    pub fn save(&self, hosts: &BTreeMap<String, String>) -> Result<(), ConfigError> {
        let hosts = hosts
            .iter()
            .map(|(name, address)| HostAddress { name: name.clone(), address: address.clone() })
            .collect();
        let text = toml::to_string(&HostsFile { hosts })
            .map_err(|e| ConfigError::Invalid { what: e.to_string() })?;
        Ok(write_private(&self.path, &text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("agent.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn errors_name_the_file_the_line_and_the_column() {
        let error = parse("name = \"a\"\nlisten = \"127.0.0.1:1\"\ndatastors = 3\n").unwrap_err();
        assert!(error.contains("agent.toml") && error.contains("line 3, column 1"), "{error}");
        let error = parse("name = \"a\"\nlisten = 5\n").unwrap_err();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(parse("name = \"-\"\nlisten = \"127.0.0.1:1\"").unwrap_err().contains("no host name"));
        assert!(parse("name = \"a\"\nlisten = \"0.0.0.0:1\"").unwrap_err().contains("IP address"));
        let twice = "name = \"a\"\nlisten = \"127.0.0.1:1\"\n[[datastores]]\nname=\"x\"\npath=\"/a\"\n[[datastores]]\nname=\"x\"\npath=\"/b\"";
        assert!(parse(twice).unwrap_err().contains("twice"));
        assert!(parse("name = \"a\"\nlisten = \"127.0.0.1:1\"\ndefault_datastore = \"x\"").is_err());
    }

    #[test]
    fn a_saved_configuration_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            default_datastore: Some("fast".into()),
            cpu_mask: vec!["avx512f".into()],
            datastores: vec!["fast=/data/fast".parse().unwrap()],
            ..Config::new("left", "127.0.0.1:7070".parse().unwrap())
        };
        config.save(dir.path()).unwrap();
        assert_eq!(Config::load(dir.path()).unwrap(), config);
        let store = HostsStore::of(dir.path());
        assert!(store.load().unwrap().is_empty());
        let hosts = BTreeMap::from([("right".to_owned(), "10.0.0.2:7070".to_owned())]);
        store.save(&hosts).unwrap();
        assert_eq!(store.load().unwrap(), hosts);
    }
}
