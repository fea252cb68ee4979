//! Which agent a command talks to when none is named.

use std::path::PathBuf;

use super::{Client, ClientError};

/// Sockets that are looked for after `$VMOVE_STATE/agent.sock`, in order.
pub const DEFAULT_SOCKETS: [&str; 2] = ["/run/vmove/agent.sock", "/var/lib/vmove/agent.sock"];

/// The agent at `address` (a path or `unix://PATH`; a directory means `agent.sock` in it), else the nearest one.
pub fn discover(address: Option<&str>) -> Result<Client, ClientError> {
    match address {
        Some(address) => named(address),
        None => nearest(candidates(std::env::var_os("VMOVE_STATE").map(PathBuf::from))),
    }
}

fn named(address: &str) -> Result<Client, ClientError> {
    let path = match address.split_once("://") {
        None => PathBuf::from(address),
        Some(("unix", path)) => PathBuf::from(path),
        Some(_) => return Err(ClientError::BadAddress(address.to_owned())),
    };
    Ok(Client::unix(if path.is_dir() { path.join("agent.sock") } else { path }))
}

fn candidates(state: Option<PathBuf>) -> Vec<PathBuf> {
    let own = state.map(|dir| dir.join("agent.sock"));
    own.into_iter().chain(DEFAULT_SOCKETS.iter().map(PathBuf::from)).collect()
}

fn nearest(candidates: Vec<PathBuf>) -> Result<Client, ClientError> {
    match candidates.iter().find(|path| path.exists()) {
        Some(path) => Ok(Client::unix(path.clone())),
        None => Err(ClientError::NoAgent {
            tried: candidates.iter().map(|path| path.display().to_string()).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_addresses() -> Result<(), ClientError> {
        assert_eq!(named("/x/agent.sock")?.socket(), PathBuf::from("/x/agent.sock"));
        assert_eq!(named("unix:///x/agent.sock")?.socket(), PathBuf::from("/x/agent.sock"));
        assert!(matches!(named("https://host:1"), Err(ClientError::BadAddress(_))));
        Ok(())
    }

    #[test]
    fn the_state_directory_comes_first_and_absence_is_told() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let found = candidates(Some(dir.path().to_owned()));
        assert_eq!(found.len(), 3);
        let none = nearest(vec![found[0].clone()]);
        assert!(none.is_err_and(|e| e.to_string().contains("agent.sock")));
        std::fs::write(&found[0], "")?;
        assert!(nearest(vec![found[0].clone()]).is_ok_and(|client| client.socket() == found[0]));
        Ok(())
    }
}
