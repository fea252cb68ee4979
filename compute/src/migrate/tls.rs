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

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        path::Path,
        thread,
    };

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;
    use crate::migrate::link::Link;

    /// An authority and one certificate by it, as files.
    fn identity(dir: &Path, host: &str) -> IdentityPaths {
        std::fs::create_dir_all(dir).unwrap();
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(vec![]).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_cert = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec![host.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        let paths =
            IdentityPaths { ca: dir.join("ca.pem"), cert: dir.join("cert.pem"), key: dir.join("key.pem") };
        std::fs::write(&paths.ca, ca_cert.pem()).unwrap();
        std::fs::write(&paths.cert, cert.pem()).unwrap();
        std::fs::write(&paths.key, key.serialize_pem()).unwrap();
        paths
    }

    fn sockets() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (caller, listener.accept().unwrap().0)
    }

    #[test]
    fn both_sides_send_a_lot_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let paths = identity(dir.path(), "right");
        let (here, there) = sockets();
        let config = server(&paths).unwrap();
        let called = thread::spawn(move || {
            Link::tls(there, rustls::ServerConnection::new(config).unwrap().into()).unwrap().split().unwrap()
        });
        let caller = Link::tls(here, client(&paths, "right").unwrap()).unwrap().split().unwrap();
        let called = called.join().unwrap();
        let data: Vec<u8> = (0..5_000_003u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        thread::scope(|scope| {
            for (mut sender, mut receiver, _closer) in [caller, called] {
                let data = &data;
                scope.spawn(move || sender.send(&[&data[..10], &data[10..]]).unwrap());
                scope.spawn(move || {
                    let mut got = vec![0; data.len()];
                    let (small, large) = got.split_at_mut(24);
                    receiver.receive(small).unwrap();
                    receiver.receive(large).unwrap();
                    assert!(got == *data);
                });
            }
        });
    }

    #[test]
    fn another_authority_or_another_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let ours = identity(&dir.path().join("ours"), "right");
        let theirs = identity(&dir.path().join("theirs"), "right");
        for (caller, name) in [(&theirs, "right"), (&ours, "wrong")] {
            let (here, there) = sockets();
            let config = server(&ours).unwrap();
            let called = thread::spawn(move || {
                let link = Link::tls(there, rustls::ServerConnection::new(config).unwrap().into());
                link.and_then(|l| l.split()?.1.receive(&mut [0; 1])).is_err()
            });
            let refused = Link::tls(here, client(caller, name).unwrap());
            assert!(refused.is_err(), "{name}");
            drop(refused);
            assert!(called.join().unwrap());
        }
    }
}
