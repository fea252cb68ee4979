//! What can go wrong between a client and its agent.

use std::path::PathBuf;

use super::Address;
use crate::api::types::ErrorDetail;

/// A request that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No socket named and none found.
    #[error("no agent found (looked for {}); start one ('systemctl start vmove' or 'vmove agent'), or name one with --agent or 'vmove context'", tried.join(", "))]
    NoAgent {
        /// Paths that were looked at.
        tried: Vec<String>,
    },
    /// What is named is no agent's address.
    #[error("{0:?} is no agent's address: a path, unix://PATH, or ssh://[USER@]HOST[:PORT]")]
    BadAddress(String),
    /// No context has that name.
    #[error("there is no context {name:?} (there is: {known}); see 'vmove context ls'")]
    NoContext {
        /// The name.
        name: String,
        /// Those that are there.
        known: String,
    },
    /// The file with the contexts.
    #[error("{}: {reason}", path.display())]
    Contexts {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The socket is there or named, but nobody listens.
    #[error("cannot reach the agent at {address}: {source}; is 'vmove agent' running there?")]
    Connect {
        /// Where.
        address: Address,
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
