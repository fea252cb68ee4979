//! TLS connections to an agent, by a host of a cluster or by a stranger, and single HTTP requests over them.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use vmove::identity::files::IdentityFiles;
use vmove::identity::tls::{self, HostTls};

/// Ends a test that hangs.
const LIMIT: Duration = Duration::from_mins(1);

/// An HTTP answer.
#[derive(Debug)]
pub struct HttpAnswer {
    /// Its status.
    pub status: u16,
    /// Everything behind the headers.
    pub body: String,
}

/// Calls as the host with this state directory, believing only in its own cluster.
pub fn as_host(state: &Path) -> Arc<ClientConfig> {
    HostTls::load(&IdentityFiles::of(state)).unwrap().client
}

/// Sends one request to the agent at `address`, which must be host `name`.
pub fn request(
    config: Arc<ClientConfig>,
    address: &str,
    name: &str,
    head: &str,
    body: &[u8],
) -> io::Result<HttpAnswer> {
    let socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.set_write_timeout(Some(LIMIT))?;
    let server = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let session = ClientConnection::new(config, server).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(session, socket);
    let head = format!(
        "{head} HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    // A body that is too long may be answered, and the connection closed, before it is all sent.
    let sent = stream.write_all(body).and_then(|()| stream.flush());
    let mut text = Vec::new();
    // Closed without a farewell after the answer: the answer counts.
    let read = stream.read_to_end(&mut text);
    if text.is_empty() {
        sent?;
        read?;
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    let status = text.split(' ').nth(1).and_then(|word| word.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no HTTP answer: {text:?}")))?;
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    Ok(HttpAnswer { status, body })
}

/// Calls as the host with the state directory `own`, but believes in the cluster of `believed`.
pub fn with_foreign_certificate(own: &Path, believed: &Path) -> Arc<ClientConfig> {
    let (own, believed) = (IdentityFiles::of(own).paths(), IdentityFiles::of(believed).paths());
    let chain = CertificateDer::pem_file_iter(own.cert).unwrap().collect::<Result<Vec<_>, _>>().unwrap();
    let ca = CertificateDer::from_pem_file(believed.ca).unwrap();
    HostTls::new(ca, chain, PrivateKeyDer::from_pem_file(own.key).unwrap()).unwrap().client
}

/// Calls without a certificate of its own; believes in the cluster of `believed`.
pub fn as_nobody(believed: &Path) -> Arc<ClientConfig> {
    let ca = std::fs::read_to_string(IdentityFiles::of(believed).paths().ca).unwrap();
    Arc::new(tls::joining_client(&tls::fingerprint_of_pem(&ca).unwrap()).unwrap())
}
