//! TLS between agents: version 1.3 only, both sides with a certificate of the cluster, the called side by its host name.
//!
//! A caller without a certificate is let in by the server configuration, marked as nobody, since a joining host has none yet; what
//! nobody may do is decided by the routes. Never enters: sockets, HTTP.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};

use super::{IdentityError, files::IdentityFiles};

/// Configurations for both directions, from one identity.
#[derive(Debug, Clone)]
pub struct HostTls {
    /// For calling other agents.
    pub client: Arc<ClientConfig>,
    /// For being called.
    pub server: Arc<ServerConfig>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn failed(reason: impl ToString) -> IdentityError {
    IdentityError::Certificate { action: "set up TLS", reason: reason.to_string() }
}

impl HostTls {
    /// Loads the identity of a host.
    pub fn load(files: &IdentityFiles) -> Result<Self, IdentityError> {
        let paths = files.paths();
        let damaged = |path: &std::path::Path| {
            let path = path.to_path_buf();
            move |e: rustls::pki_types::pem::Error| IdentityError::Damaged { path, reason: e.to_string() }
        };
        let ca = CertificateDer::from_pem_file(&paths.ca).map_err(damaged(&paths.ca))?;
        let chain = CertificateDer::pem_file_iter(&paths.cert)
            .and_then(|certs| certs.collect::<Result<Vec<_>, _>>())
            .map_err(damaged(&paths.cert))?;
        let key = PrivateKeyDer::from_pem_file(&paths.key).map_err(damaged(&paths.key))?;
        Self::new(ca, chain, key)
    }

    /// From certificates and a key in memory.
    pub fn new(
        ca: CertificateDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, IdentityError> {
        let mut roots = RootCertStore::empty();
        roots.add(ca).map_err(failed)?;
        let roots = Arc::new(roots);
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(failed)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(failed)?;
        // A certificate is looked at on every connection: no tickets from earlier ones.
        client.resumption = rustls::client::Resumption::disabled();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .allow_unauthenticated()
            .build()
            .map_err(failed)?;
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(failed)?;
        // A peer that only sends and never reads loses its last bytes when it closes over unread tickets.
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

/// Name of the host a checked certificate belongs to: its only DNS name.
pub fn host_of(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| match name {
        x509_parser::extensions::GeneralName::DNSName(dns) => Some((*dns).to_owned()),
        _ => None,
    })
}

/// Fingerprint of an authority's certificate, as join tokens carry it (hex).
pub fn fingerprint(ca: &CertificateDer<'_>) -> String {
    blake3::hash(ca.as_ref()).to_hex().to_string()
}

/// Fingerprint of the certificate in a PEM text.
pub fn fingerprint_of_pem(pem: &str) -> Result<String, IdentityError> {
    let ca = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(failed)?;
    Ok(fingerprint(&ca))
}

/// For a host that joins: it has no certificate, and knows the cluster's authority by its fingerprint only.
pub fn joining_client(fingerprint: &str) -> Result<ClientConfig, IdentityError> {
    let verifier = Arc::new(PinnedAuthority { fingerprint: fingerprint.to_owned(), provider: provider() });
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(failed)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth())
}

/// Accepts a server whose chain ends at the authority with this fingerprint, with the usual checks below it.
#[derive(Debug)]
struct PinnedAuthority {
    fingerprint: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|cert| fingerprint(cert) == self.fingerprint)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::identity::authority::{Authority, host_key, signing_request};

    const IP: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn host(authority: &Authority, name: &str) -> HostTls {
        let key = host_key().unwrap();
        let csr = signing_request(name, &key).unwrap();
        let pem = authority.issue_for_request(name, IP, &csr).unwrap();
        let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
        let ca = CertificateDer::from_pem_slice(authority.cert_pem().as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        HostTls::new(ca, chain, key).unwrap()
    }

    /// One exchange over loopback; gives who the server saw, or the client's error.
    async fn meet(server: &HostTls, client: Arc<ClientConfig>, name: &str) -> Result<Option<String>, String> {
        let listener = tokio::net::TcpListener::bind((IP, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(server.server.clone());
        let serve = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.map_err(|e| e.to_string())?;
            let seen = stream.get_ref().1.peer_certificates().map(|chain| host_of(&chain[0]).unwrap());
            stream.write_all(b"hello").await.map_err(|e| e.to_string())?;
            stream.shutdown().await.map_err(|e| e.to_string())?;
            Ok::<_, String>(seen)
        });
        let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut stream = TlsConnector::from(client).connect(name, tcp).await.map_err(|e| e.to_string())?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.map_err(|e| e.to_string())?;
        assert_eq!(text, "hello");
        serve.await.unwrap()
    }

    #[tokio::test]
    async fn two_hosts_of_one_cluster_know_each_other() {
        let (authority, _) = Authority::create().unwrap();
        let (a, b) = (host(&authority, "left"), host(&authority, "right"));
        assert_eq!(meet(&a, b.client.clone(), "left").await.unwrap().as_deref(), Some("right"));
    }

    #[tokio::test]
    async fn a_wrong_name_or_a_wrong_authority_is_refused() {
        let (authority, _) = Authority::create().unwrap();
        let (other, _) = Authority::create().unwrap();
        let (a, b) = (host(&authority, "left"), host(&authority, "right"));
        let stranger = host(&other, "right");
        assert!(meet(&a, b.client.clone(), "right").await.is_err(), "the called host is left");
        assert!(
            meet(&a, stranger.client.clone(), "left").await.is_err(),
            "unknown authority, seen by the caller"
        );
        // Seen by the called side: a caller that trusts our authority but was signed by another one.
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.cert_pem().as_bytes()).unwrap()).unwrap();
        let key = host_key().unwrap();
        let pem = other.issue("right", IP, &key).unwrap();
        let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        let liar = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        assert!(meet(&a, Arc::new(liar), "left").await.is_err());
    }

    #[tokio::test]
    async fn a_joining_host_checks_the_fingerprint_and_is_nobody() {
        let (authority, _) = Authority::create().unwrap();
        let a = host(&authority, "left");
        let right = fingerprint_of_pem(authority.cert_pem()).unwrap();
        let joining = Arc::new(joining_client(&right).unwrap());
        assert_eq!(meet(&a, joining.clone(), "127.0.0.1").await.unwrap(), None);
        assert!(meet(&a, joining, "127.0.0.2").await.is_err(), "the address is checked too");
        let wrong = Arc::new(joining_client(&"0".repeat(64)).unwrap());
        assert!(meet(&a, wrong, "127.0.0.1").await.is_err());
    }

    #[test]
    fn a_request_cannot_ask_for_more_than_a_key() {
        let (authority, _) = Authority::create().unwrap();
        let key = host_key().unwrap();
        let csr = signing_request("left", &key).unwrap();
        let pem = authority.issue_for_request("right", IP, &csr).unwrap();
        let cert = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        assert_eq!(host_of(&cert).as_deref(), Some("right"));
        assert!(authority.issue_for_request("right", IP, "rubbish").is_err());
    }
}
