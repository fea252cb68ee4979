//! Contexts: names a user gives to clusters, each the address of one of its agents, and the one chosen. In
//! `$XDG_CONFIG_HOME/vmove/contexts.toml`, else `~/.config/vmove/contexts.toml`.
//!
//! Never enters: connections.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Address, ClientError};
use crate::identity::files::write_private;

/// The name for "no context": the agent of this machine.
pub const LOCAL: &str = "local";

/// The contexts of a user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contexts {
    path: Option<PathBuf>,
    file: ContextsFile,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContextsFile {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, String>,
}

impl Contexts {
    /// Those of the user who runs this program; none if there are none.
    pub fn load() -> Result<Self, ClientError> {
        let set = |name: &str| std::env::var_os(name).filter(|dir| !dir.is_empty()).map(PathBuf::from);
        let dir = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
        match dir {
            Some(dir) => Self::at(dir.join("vmove/contexts.toml")),
            None => Ok(Self::default()),
        }
    }

    /// Those of a file, which need not be there.
    pub fn at(path: PathBuf) -> Result<Self, ClientError> {
        let wrong = |reason: String| ClientError::Contexts { path: path.clone(), reason };
        let file: ContextsFile = match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map_err(|e| wrong(e.to_string().trim_end().to_owned()))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => ContextsFile::default(),
            Err(e) => return Err(wrong(e.to_string())),
        };
        Ok(Self { path: Some(path), file })
    }

    /// Name, address, and whether it is the chosen one.
    pub fn list(&self) -> impl Iterator<Item = (&str, &str, bool)> {
        let current = self.file.current.as_deref();
        self.file.contexts.iter().map(move |(name, at)| (name.as_str(), at.as_str(), current == Some(name)))
    }

    /// The address of a context.
    pub fn address(&self, name: &str) -> Result<Address, ClientError> {
        self.file.contexts.get(name).ok_or_else(|| self.unknown(name))?.parse()
    }

    /// The chosen one, if one is.
    pub fn current(&self) -> Option<&str> {
        self.file.current.as_deref()
    }

    /// Adds one, or gives it another address.
    pub fn add(&mut self, name: &str, address: &Address) -> Result<(), ClientError> {
        self.file.contexts.insert(name.to_owned(), address.to_string());
        self.save()
    }

    /// Removes one.
    pub fn remove(&mut self, name: &str) -> Result<(), ClientError> {
        if self.file.contexts.remove(name).is_none() {
            return Err(self.unknown(name));
        }
        if self.current() == Some(name) {
            self.file.current = None;
        }
        self.save()
    }

    /// Chooses one for all commands to come; [`LOCAL`] chooses none.
    pub fn choose(&mut self, name: &str) -> Result<(), ClientError> {
        if name != LOCAL && !self.file.contexts.contains_key(name) {
            return Err(self.unknown(name));
        }
        self.file.current = (name != LOCAL).then(|| name.to_owned());
        self.save()
    }

    fn unknown(&self, name: &str) -> ClientError {
        let names = self.file.contexts.keys().map(String::as_str).chain([LOCAL]);
        ClientError::NoContext { name: name.to_owned(), known: names.collect::<Vec<_>>().join(", ") }
    }

    fn save(&self) -> Result<(), ClientError> {
        let Some(path) = &self.path else {
            let reason =
                "neither $HOME nor $XDG_CONFIG_HOME is set: there is no place for contexts".to_owned();
            return Err(ClientError::Contexts { path: "contexts.toml".into(), reason });
        };
        let wrong = |reason: String| ClientError::Contexts { path: path.clone(), reason };
        let text = toml::to_string(&self.file).map_err(|e| wrong(e.to_string()))?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(|e| wrong(e.to_string()))?;
        }
        write_private(path, &text).map_err(|e| wrong(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_kept_chosen_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/contexts.toml");
        let mut contexts = Contexts::at(path.clone()).unwrap();
        assert!(contexts.choose("prod").unwrap_err().to_string().contains("local"));
        contexts.add("prod", &"ssh://root@h1".parse().unwrap()).unwrap();
        contexts.add("lab", &"/lab/agent.sock".parse().unwrap()).unwrap();
        contexts.choose("prod").unwrap();
        let mut again = Contexts::at(path.clone()).unwrap();
        assert_eq!(again, contexts);
        assert_eq!(
            again.list().collect::<Vec<_>>(),
            [("lab", "/lab/agent.sock", false), ("prod", "ssh://root@h1", true)]
        );
        again.remove("prod").unwrap();
        assert_eq!(again.current(), None);
        again.choose("lab").unwrap();
        again.choose(LOCAL).unwrap();
        assert_eq!(Contexts::at(path.clone()).unwrap().current(), None);
        std::fs::write(&path, "[contexts]\nlab = 3\n").unwrap();
        let error = Contexts::at(path).unwrap_err().to_string();
        assert!(error.contains("contexts.toml") && error.contains("line 2, column 7"), "{error}");
    }
}
