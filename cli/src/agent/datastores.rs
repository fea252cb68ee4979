//! The datastores of this host: opened with the agent, added and removed while it runs.
//!
//! The configuration file says which there are; it is changed first, and what is in memory follows it. Never enters: images.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use vmove_storage::Datastore;

use super::config::{Config, DatastoreConfig};
use super::error::ApiError;
use super::{Agent, AgentError, config_file, plan};
use crate::api::datastores::AddDatastore;
use crate::api::types::DatastoreInfo;
use crate::identity::files::write_private;

/// Opens the datastores of a configuration, the default one first.
pub(super) fn open(config: &Config) -> Result<Vec<Datastore>, AgentError> {
    let mut stores: Vec<Datastore> = Vec::new();
    for entry in &config.datastores {
        let store = Datastore::open(&entry.name, &entry.path)
            .map_err(|source| AgentError::Datastore { name: entry.name.clone(), source })?;
        if let Some(first) = stores.iter().find(|other| other.id() == store.id()) {
            return Err(AgentError::SameDatastore {
                first: first.name().to_owned(),
                second: entry.name.clone(),
            });
        }
        stores.push(store);
    }
    if let Some(default) = &config.default_datastore {
        // The default one comes first everywhere.
        stores.sort_by_key(|store| store.name() != default);
    }
    Ok(stores)
}

impl Agent {
    /// The datastores as they are now, the default one first.
    pub fn stores(&self) -> Arc<Vec<Datastore>> {
        // An `Arc` is replaced under the lock: nothing is left half done by a panic.
        self.stores.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The datastore of a name.
    pub fn store(&self, name: &str) -> Result<Datastore, ApiError> {
        let stores = self.stores();
        stores.iter().find(|store| store.name() == name).cloned().ok_or_else(|| {
            ApiError::invalid(format!(
                "host {} has no datastore {name:?} (it has: {})",
                self.config.name,
                plan::list(stores.iter().map(Datastore::name))
            ))
        })
    }

    /// The datastore for what names none.
    pub(super) fn default_store(&self) -> Result<Datastore, ApiError> {
        let none = || ApiError::conflict(format!("host {} has no datastore", self.config.name));
        self.stores().first().cloned().ok_or_else(none)
    }

    /// What there is to say of the datastores, the default one first.
    pub fn datastore_infos(&self) -> Result<Vec<DatastoreInfo>, ApiError> {
        let stores = self.stores();
        stores.iter().enumerate().map(|(index, store)| info(store, index == 0)).collect()
    }

    /// Adds a directory as a datastore, now and for every later start.
    pub fn add_datastore(&self, add: &AddDatastore) -> Result<DatastoreInfo, ApiError> {
        let _one = one_at_a_time();
        let stores = self.stores();
        vmove_storage::datastore::check_name("datastore", &add.name)?;
        if stores.iter().any(|store| store.name() == add.name) {
            return Err(ApiError::name_taken(format!(
                "host {} has a datastore {:?} already",
                self.config.name, add.name
            )));
        }
        let refuse = |e: vmove_storage::BlockError| {
            ApiError::invalid(format!("cannot add datastore {:?}: {e}", add.name))
        };
        if !add.path.is_absolute() {
            return Err(ApiError::invalid(format!("{}: name an absolute path", add.path.display())));
        }
        let path = Datastore::probe(&add.path).map_err(refuse)?;
        let store = Datastore::open(&add.name, &path).map_err(refuse)?;
        if let Some(same) = stores.iter().find(|other| other.id() == store.id()) {
            return Err(ApiError::conflict(format!(
                "cannot add datastore {:?}: {} is datastore {:?} already",
                add.name,
                path.display(),
                same.name()
            )));
        }
        let entry = DatastoreConfig { name: add.name.clone(), path };
        let config = self.change_config(|text| config_file::with_datastore(text, &entry, add.default))?;
        self.follow(&config)?;
        tracing::info!(datastore = add.name, path = %entry.path.display(), "datastore added");
        info(&store, self.stores().first().is_some_and(|first| first.name() == add.name))
    }

    /// Forgets a datastore that no VM uses. What lies in its directory stays.
    pub fn remove_datastore(&self, name: &str) -> Result<(), ApiError> {
        let _one = one_at_a_time();
        let store = self.store(name)?;
        let mut users = store.list_vms()?;
        for vm in self.registry.names()? {
            let definition = self.registry.vm(&vm)?.definition();
            if definition.is_ok_and(|vm| vm.disks.iter().any(|disk| disk.datastore == name)) {
                users.push(vm);
            }
        }
        users.sort_unstable();
        users.dedup();
        if !users.is_empty() {
            return Err(ApiError::conflict(format!(
                "datastore {name:?} holds disks of {}; move or remove them first",
                users.join(", ")
            )));
        }
        let config = self.change_config(|text| config_file::without_datastore(text, name))?;
        self.follow(&config)?;
        tracing::info!(datastore = name, "datastore removed");
        Ok(())
    }

    /// Changes the configuration file, checked before it is written; gives what it says then.
    fn change_config(&self, change: impl FnOnce(&str) -> Result<String, String>) -> Result<Config, ApiError> {
        let path = &self.config_path;
        let told = |text: &str| Config::parse(text, path).map_err(|e| ApiError::conflict(e.to_string()));
        let text = std::fs::read_to_string(path).map_err(|e| ApiError::io("read", path, &e))?;
        if !self.is_known(&told(&text)?) {
            return Err(ApiError::conflict(format!(
                "the agent was started with other datastores than those in {}; start it again without --datastore",
                path.display()
            )));
        }
        let text = change(&text).map_err(|why| ApiError::conflict(format!("{}: {why}", path.display())))?;
        let config = told(&text)?;
        write_private(path, &text)?;
        Ok(config)
    }

    /// Whether a configuration has the very datastores this agent has.
    fn is_known(&self, config: &Config) -> bool {
        let stores = self.stores();
        let known = |entry: &DatastoreConfig| {
            let is = |path: &Path| stores.iter().any(|s| s.name() == entry.name && s.path() == path);
            std::fs::canonicalize(&entry.path).is_ok_and(|path| is(&path))
        };
        config.datastores.len() == stores.len() && config.datastores.iter().all(known)
    }

    /// Takes over the datastores of a changed configuration.
    fn follow(&self, config: &Config) -> Result<(), ApiError> {
        let stores = open(config).map_err(|e| ApiError::storage(e.to_string()))?;
        *self.stores.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(stores);
        Ok(())
    }
}

fn info(store: &Datastore, default: bool) -> Result<DatastoreInfo, ApiError> {
    Ok(DatastoreInfo {
        name: store.name().to_owned(),
        id: store.id().to_string(),
        path: store.path().to_path_buf(),
        total_bytes: store.total_bytes()?,
        free_bytes: store.free_bytes()?,
        default,
    })
}

/// Of two changes of one file the second must see the first.
fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
    static CHANGING: Mutex<()> = Mutex::new(());
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}
