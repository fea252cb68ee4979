//! Who a host is in its cluster: the cluster's authority, host certificates, TLS between agents, join tokens.
//!
//! | module | what lives there |
//! |---|---|
//! | [`authority`] | the cluster's CA and the certificates it signs |
//! | [`files`] | where an identity lies on disk, with which rights |
//! | [`tls`] | rustls configurations, the check that a peer is the host it should be |
//! | [`token`] | one-time join tokens |
//!
//! Never enters: HTTP, VMs. A private key is written once, by the host it belongs to, and never sent.

pub mod authority;
pub mod files;
pub mod tls;
pub mod token;

use std::path::{Path, PathBuf};

/// What can go wrong with identities.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file of the identity.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file of the identity does not hold what it should.
    #[error("{} is not usable: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A name that cannot be a host's.
    #[error("{name:?} is no host name: 1 to 63 letters, digits and dashes, no dash at either end")]
    BadHostName {
        /// The name.
        name: String,
    },
    /// Certificates could not be made or read.
    #[error("cannot {action}: {reason}")]
    Certificate {
        /// What was tried.
        action: &'static str,
        /// Why not.
        reason: String,
    },
    /// A token was not accepted.
    #[error("{0}")]
    Token(&'static str),
    /// This host does not hold the authority's key.
    #[error(
        "this host does not hold the cluster's authority key; ask the host on which `vmove init` was run"
    )]
    NoAuthority,
}

impl IdentityError {
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }
}

/// Checks a host's name: it must fit into a certificate as one DNS label (RFC 1123, section 2.1).
pub fn check_host_name(name: &str) -> Result<(), IdentityError> {
    let chars = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if name.is_empty() || name.len() > 63 || !chars || name.starts_with('-') || name.ends_with('-') {
        return Err(IdentityError::BadHostName { name: name.chars().take(80).collect() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_dns_labels() {
        for good in ["a", "A", "host-1", "10"] {
            check_host_name(good).unwrap();
        }
        for bad in ["", "-a", "a-", "a.b", "a_b", "ä", "a b", &"x".repeat(64)] {
            assert!(check_host_name(bad).is_err(), "{bad:?}");
        }
    }
}
