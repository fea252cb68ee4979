//! TLS 1.3 with mutual certificates for the data connections, from the host's identity files.
//!
//! Lives here: rustls configurations. Never enters: making certificates (the agent does), sockets.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
    version::TLS13,
};

use super::MoveError;
use crate::process::protocol::IdentityPaths;

struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn bad(what: &str, path: &std::path::Path) -> impl FnOnce(rustls::pki_types::pem::Error) -> MoveError {
    let text = format!("cannot read {what} {}", path.display());
    move |e| MoveError::Tls(format!("{text}: {e}"))
}

fn load(paths: &IdentityPaths) -> Result<Identity, MoveError> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(&paths.ca).map_err(bad("the cluster's certificate", &paths.ca))?;
    roots.add(ca).map_err(|e| MoveError::Tls(e.to_string()))?;
    let chain = CertificateDer::pem_file_iter(&paths.cert)
        .and_then(|certs| certs.collect::<Result<Vec<_>, _>>())
        .map_err(bad("this host's certificate", &paths.cert))?;
    let key = PrivateKeyDer::from_pem_file(&paths.key).map_err(bad("this host's key", &paths.key))?;
    Ok(Identity { roots: Arc::new(roots), chain, key })
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The calling side; the target must be `host` by a certificate of the cluster.
pub fn client(paths: &IdentityPaths, host: &str) -> Result<rustls::Connection, MoveError> {
    let identity = load(paths)?;
    let tls = |e: rustls::Error| MoveError::Tls(e.to_string());
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .with_root_certificates(identity.roots)
        .with_client_auth_cert(identity.chain, identity.key)
        .map_err(tls)?;
    let name = ServerName::try_from(host.to_string())
        .map_err(|_| MoveError::Tls(format!("{host:?} is not a host name")))?;
    rustls::ClientConnection::new(Arc::new(config), name).map(Into::into).map_err(tls)
}

/// The called side; callers need a certificate of the cluster.
pub fn server(paths: &IdentityPaths) -> Result<Arc<ServerConfig>, MoveError> {
    let identity = load(paths)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(identity.roots, provider())
        .build()
        .map_err(|e| MoveError::Tls(e.to_string()))?;
    let tls = |e: rustls::Error| MoveError::Tls(e.to_string());
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain, identity.key)
        .map_err(tls)?;
    // A peer that only sends and never reads loses its last bytes when it closes over unread tickets.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
