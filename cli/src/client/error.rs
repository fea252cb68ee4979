//! What can go wrong between a client and its agent.

use std::path::PathBuf;

use crate::api::types::ErrorDetail;

/// A request that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No socket named and none found.
    #[error("no agent found (looked for {}); start one with 'vmove agent' or name its socket with --agent", tried.join(", "))]
    NoAgent {
        /// Paths that were looked at.
        tried: Vec<String>,
    },
    /// The `--agent` word is not a socket.
    #[error("--agent {0}: only unix sockets are supported here: a path, or unix://PATH")]
    BadAddress(String),
    /// The socket is there or named, but nobody listens.
    #[error("cannot reach the agent at {}: {source}; is 'vmove agent' running?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection broke in the middle of an exchange.
    #[error("{what}: connection to the agent failed: {reason}")]
    Transport {
        /// Method and path.
        what: String,
        /// Why.
        reason: String,
    },
    /// The answer is not what the API says.
    #[error("{what}: cannot understand the agent's answer: {reason} (different versions?)")]
    Decode {
        /// Method and path.
        what: String,
        /// Why.
        reason: String,
    },
    /// The agent refused or failed.
    #[error("{}", detail.message)]
    Api {
        /// HTTP status.
        status: u16,
        /// The agent's words.
        detail: ErrorDetail,
    },
}

impl ClientError {
    /// The connection could not be made or broke: asking again may help.
    pub fn is_connection(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Transport { .. })
    }

    /// The agent's error word, if it answered.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Api { detail, .. } => Some(&detail.code),
            _ => None,
        }
    }
}
