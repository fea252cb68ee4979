//! How a command ends when it does not succeed, and the exit code that says so.

use std::process::ExitCode;

use crate::client::ClientError;

/// The failure of a command: what is printed, and with which code the program ends.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command line makes no sense. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The agent could not be asked, or refused. Exit code 1, or 3 if it says that ownership is undecided.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Refused or failed; a VM that was to be moved still runs where it was. Exit code 1.
    #[error("{message}")]
    Failed {
        /// What was tried, on what, what to do.
        message: String,
        /// Everything that stands in the way.
        blockers: Vec<String>,
    },
    /// Nobody knows yet who owns the VM. Exit code 3.
    #[error("{0}")]
    Undecided(String),
    /// Given up on request. Exit code 130.
    #[error("{0}")]
    Cancelled(String),
    /// Standard input or output failed. Exit code 1.
    #[error("standard input or output: {0}")]
    Output(#[from] std::io::Error),
}

impl CommandError {
    /// A failure that is one sentence.
    pub fn failed(message: impl ToString) -> Self {
        Self::Failed { message: message.to_string(), blockers: Vec::new() }
    }

    /// What stands in the way, when it is a list.
    pub fn blockers(&self) -> &[String] {
        match self {
            Self::Failed { blockers, .. } => blockers,
            Self::Client(ClientError::Api { detail, .. }) => &detail.blockers,
            _ => &[],
        }
    }

    /// The program's exit code: the contract of `vmove --help`.
    pub fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Undecided(_) => 3,
            Self::Client(error) if error.code() == Some("undecided") => 3,
            Self::Cancelled(_) => 130,
            _ => 1,
        }
    }

    /// Says it on standard error, one line and a line for each blocker, and gives the exit code.
    pub fn report(&self) -> ExitCode {
        eprintln!("vmove: {self}");
        for blocker in self.blockers() {
            eprintln!("  - {blocker}");
        }
        ExitCode::from(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::ErrorDetail;

    #[test]
    fn codes_are_the_documented_ones() {
        let api = |code: &str| {
            CommandError::Client(ClientError::Api {
                status: 409,
                detail: ErrorDetail { code: code.into(), message: "m".into(), blockers: vec!["b".into()] },
            })
        };
        assert_eq!(CommandError::Usage(String::new()).code(), 2);
        assert_eq!(CommandError::failed("x").code(), 1);
        assert_eq!(api("blocked").code(), 1);
        assert_eq!(api("blocked").blockers(), ["b"]);
        assert_eq!(api("undecided").code(), 3);
        assert_eq!(CommandError::Undecided(String::new()).code(), 3);
        assert_eq!(CommandError::Cancelled(String::new()).code(), 130);
    }
}
