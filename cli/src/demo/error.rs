//! Why a demo or a benchmark did not come to its end.

use std::path::PathBuf;

use crate::client::ClientError;

/// The step that failed and why.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// This machine cannot run VMs, or not for this user.
    #[error("/dev/kvm cannot be used: {reason}")]
    NoKvm {
        /// What the system says and what can be done.
        reason: String,
    },
    /// A file or process operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// One of our own commands failed.
    #[error("'vmove {command}' failed: {output}")]
    Command {
        /// Its first words.
        command: String,
        /// What it said.
        output: String,
    },
    /// An agent ended or does not answer.
    #[error("the agent of host {host} {what}; last lines of its log:\n{log}")]
    Agent {
        /// The host.
        host: String,
        /// What happened.
        what: String,
        /// The end of its log.
        log: String,
    },
    /// An agent refused.
    #[error("{what}: {source}{}", list(source))]
    Client {
        /// What was asked.
        what: String,
        /// The answer.
        source: ClientError,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s{detail}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// More that is known; empty or beginning with a separator.
        detail: String,
    },
    /// A move did not end as it should.
    #[error("the move {title} failed: {reason}")]
    Move {
        /// Which one.
        title: String,
        /// Why.
        reason: String,
    },
    /// Processes or files could not be removed.
    #[error("could not clean up {}: {reason}", path.display())]
    Left {
        /// The temporary directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl DemoError {
    /// Names a failed system call.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Names a refused request.
    pub fn client(what: impl Into<String>) -> impl FnOnce(ClientError) -> Self {
        let what = what.into();
        move |source| Self::Client { what, source }
    }
}

fn list(error: &ClientError) -> String {
    match error {
        ClientError::Api { detail, .. } => detail.blockers.iter().flat_map(|line| ["\n  - ", line]).collect(),
        _ => String::new(),
    }
}
