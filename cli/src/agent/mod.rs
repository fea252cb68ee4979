//! The per-host agent: it knows the VMs of its host, starts their processes, and arranges moves with the other agents.
//!
//! | module | what lives there |
//! |---|---|
//! | [`config`], [`config_file`], [`hostinfo`], `datastores` | what the host is and has |
//! | [`http`], `routes_*`, [`listener`], [`forward`], [`console`] | the API and its sockets |
//! | [`peers`], [`cluster`], `removal` | the other agents, becoming one of them, taking one out |
//! | [`registry`], [`vmdir`], [`vms`], [`create`], `seed`, `edit` | VMs of this host |
//! | [`process`], [`launch`], [`control`] | their processes |
//! | [`plan`], `preflight`, [`moves`], [`incoming`] | moves: decided, led, received |
//! | `inventory`, `maintenance` | what the placement of VMs asks; keeping them away |
//! | [`settle`], `other_end`, `recover` | what is left after a crash: settled, asked about, shown |
//! | `leftovers`, `archive` | what is removed of a VM that has gone, and what is kept |
//! | [`checkpoints`], [`restore`], `routes_checkpoint` | moments of a VM that are kept, and going on from one |
//!
//! The agent may end at any time without harm: VM processes go on, directories and journals say what stands, the next agent finds
//! both. Never enters: guest bytes; they go from VM process to VM process.

#[cfg(test)]
mod api_tests;
mod archive;
pub mod checkpoints;
pub mod cluster;
pub mod config;
pub mod config_file;
pub mod console;
pub mod control;
pub mod create;
mod datastores;
mod edit;
pub mod error;
mod estimate;
pub mod forward;
pub mod hostinfo;
pub mod http;
pub mod images;
pub mod incoming;
mod inventory;
pub mod launch;
mod leftovers;
pub mod listener;
mod maintenance;
mod metrics;
pub mod moves;
mod networks;
mod other_end;
pub mod peers;
pub mod plan;
mod preflight;
mod probe;
pub mod process;
mod recover;
#[cfg(test)]
mod recovery_tests;
pub mod registry;
mod removal;
#[cfg(test)]
mod removal_tests;
pub mod restore;
#[cfg(test)]
mod restore_tests;
mod routes_checkpoint;
mod routes_definition;
mod routes_estimate;
mod routes_host;
mod routes_peer;
mod routes_placement;
mod routes_recovery;
mod routes_removal;
mod routes_vm;
mod routes_watch;
mod seed;
pub mod settle;
#[cfg(test)]
mod settle_tests;
#[cfg(test)]
mod test_hosts;
pub mod vmdir;
pub mod vms;
mod watched;

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use tokio::sync::watch;
use vmove_storage::Datastore;

use self::config::{Config, ConfigError, HostsStore};
use self::error::ApiError;
use self::incoming::Arrivals;
use self::maintenance::MaintenanceFile;
use self::peers::Peers;
use self::registry::Registry;
use crate::api::types::{HostInfo, PEER_VERSION};
use crate::identity::IdentityError;
use crate::identity::files::IdentityFiles;
use crate::identity::tls::HostTls;

/// The agent's unix socket in a state directory that is not the usual one.
pub const SOCKET: &str = "agent.sock";

/// Why an agent cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A datastore.
    #[error("datastore {name:?}: {source}")]
    Datastore {
        /// The datastore's name.
        name: String,
        /// What is wrong with it.
        source: vmove_storage::BlockError,
    },
    /// Two names for one datastore.
    #[error("datastores {first:?} and {second:?} are one and the same directory; name it once")]
    SameDatastore {
        /// One name.
        first: String,
        /// The other.
        second: String,
    },
    /// A file or socket.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Another agent has the state directory.
    #[error("another agent runs on {}", path.display())]
    Running {
        /// The state directory.
        path: PathBuf,
    },
    /// The TCP address.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Anything else of the API's kind.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// Everything an agent knows; shared by all its requests and tasks.
#[derive(Debug)]
pub struct Agent {
    state: PathBuf,
    config: Config,
    /// Where its configuration is, and what is changed of it while the agent runs.
    config_path: PathBuf,
    socket: PathBuf,
    stores: RwLock<Arc<Vec<Datastore>>>,
    identity: IdentityFiles,
    tls: Option<HostTls>,
    peers: Arc<Peers>,
    registry: Arc<Registry>,
    arrivals: Mutex<Arrivals>,
    /// Moves that are led from here.
    watched: watched::Watched,
    /// Held by a probe that is taken in.
    probing: tokio::sync::Mutex<()>,
    maintenance: MaintenanceFile,
    program: PathBuf,
    /// True once the agent is to end; long waits give up then.
    ending: watch::Sender<bool>,
    /// Held as long as this agent lives.
    _lock: File,
}

impl Agent {
    /// Opens a state directory. VM processes are started from `program`.
    pub fn open(state: &Path, config: Config, program: PathBuf) -> Result<Arc<Self>, AgentError> {
        config.check()?;
        make_private_dir(state)?;
        let (config_path, socket) = (Config::path(state), config.socket(state));
        let io = |action| move |source| AgentError::Io { action, path: state.to_path_buf(), source };
        let state = std::fs::canonicalize(state).map_err(io("open"))?;
        let lock = lock_state(&state)?;
        let stores = datastores::open(&config)?;
        let identity = IdentityFiles::of(&state);
        let tls = if identity.exists() { Some(HostTls::load(&identity)?) } else { None };
        let peers = Arc::new(Peers::open(&config.name, tls.clone(), &config.hosts, HostsStore::of(&state))?);
        let registry = Arc::new(Registry::open(&state)?);
        let maintenance = MaintenanceFile::open(&state)?;
        Ok(Arc::new(Self {
            state,
            config_path,
            socket,
            stores: RwLock::new(Arc::new(stores)),
            identity,
            tls,
            peers,
            registry,
            arrivals: Mutex::default(),
            watched: watched::Watched::default(),
            probing: tokio::sync::Mutex::default(),
            maintenance,
            program,
            ending: watch::Sender::new(false),
            config,
            _lock: lock,
        }))
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// The unix socket it listens on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What the host is and has.
    pub fn host_info(&self) -> Result<HostInfo, ApiError> {
        let memory = hostinfo::memory()?;
        Ok(HostInfo {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            peer_version: PEER_VERSION,
            address: self.config.listen.to_string(),
            cpus: hostinfo::cpus(),
            memory_bytes: memory.total,
            memory_free_bytes: memory.available,
            cpu_features: hostinfo::cpu_features(&self.config.cpu_mask)?,
            datastores: self.datastore_infos()?,
            maintenance: self.maintenance.get().on,
        })
    }

    /// Ends long waits; VM processes go on.
    pub fn end(&self) {
        self.ending.send_replace(true);
    }

    /// Waits for `duration`; false when the agent ends first.
    async fn pause(&self, duration: std::time::Duration) -> bool {
        let mut ending = self.ending.subscribe();
        tokio::select! {
            () = tokio::time::sleep(duration) => true,
            _ = ending.wait_for(|ending| *ending) => false,
        }
    }
}

/// Makes a directory only its owner may enter; one that is there is left as it is.
pub fn make_private_dir(path: &Path) -> Result<(), AgentError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| AgentError::Io {
        action: "create",
        path: path.to_path_buf(),
        source,
    })
}

/// Takes the state directory for this process.
fn lock_state(state: &Path) -> Result<File, AgentError> {
    let path = state.join("agent.lock");
    let io = |source| AgentError::Io { action: "lock", path: path.clone(), source };
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(AgentError::Running { path: state.to_path_buf() }),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}
