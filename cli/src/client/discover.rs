//! Which agent a command talks to.
//!
//! In this order: the one named (`--agent`), the context named (`--context`), the context chosen (`vmove context use`), this machine's:
//! that of `$VMOVE_STATE`, else the usual one, at the socket its configuration names.

use std::path::{Path, PathBuf};

use super::contexts::{Contexts, LOCAL};
use super::{Client, ClientError};
use crate::agent::config::{Config, DEFAULT_STATE};

/// The agent at `address` or of the context `context`, else the chosen one, else the nearest.
pub fn discover(address: Option<&str>, context: Option<&str>) -> Result<Client, ClientError> {
    if let Some(address) = address {
        return Ok(Client::at(address.parse()?));
    }
    let contexts = Contexts::load()?;
    match context.or(contexts.current()) {
        None | Some(LOCAL) => local().map(Client::unix),
        Some(name) => Ok(Client::at(contexts.address(name)?)),
    }
}

/// The socket of this machine's agent.
pub fn local() -> Result<PathBuf, ClientError> {
    nearest(&candidates(std::env::var_os("VMOVE_STATE").map(PathBuf::from)))
}

fn candidates(state: Option<PathBuf>) -> Vec<PathBuf> {
    let socket = |state: &Path| match Config::load(state) {
        Ok(config) => config.socket(state),
        // Not there, or not for this user's eyes.
        Err(_) => Config::default_socket(state),
    };
    state.iter().map(PathBuf::as_path).chain([Path::new(DEFAULT_STATE)]).map(socket).collect()
}

fn nearest(candidates: &[PathBuf]) -> Result<PathBuf, ClientError> {
    candidates.iter().find(|path| path.exists()).cloned().ok_or_else(|| ClientError::NoAgent {
        tried: candidates.iter().map(|path| path.display().to_string()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_directory_comes_first_and_absence_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let found = candidates(Some(dir.path().to_owned()));
        assert_eq!(found[0], dir.path().join("agent.sock"));
        assert_eq!(found.len(), 2);
        assert!(nearest(&found[..1]).unwrap_err().to_string().contains("agent.sock"));
        std::fs::write(&found[0], "").unwrap();
        assert_eq!(nearest(&found).unwrap(), found[0]);
        let config =
            Config { socket: Some("/x/y.sock".into()), ..Config::new("a", "127.0.0.1:1".parse().unwrap()) };
        config.save(dir.path()).unwrap();
        assert_eq!(candidates(Some(dir.path().to_owned()))[0], Path::new("/x/y.sock"));
    }
}
