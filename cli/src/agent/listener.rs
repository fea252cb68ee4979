//! The agent's sockets: the unix socket for its own host's users, TCP with TLS for other agents; and who is at the other end.
//!
//! Lives here: accepting, handshakes with their limits, the caller's identity. Never enters: routes.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::AgentError;
use super::vmdir::MAX_SOCKET_PATH;
use crate::identity::tls::{HostTls, host_of};

/// Time for a TLS handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Handshakes at once; others wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 64;
/// Time that a caller without a certificate gets in all.
const NOBODY_DEADLINE: Duration = Duration::from_secs(20);

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A user of this host who may open the unix socket.
    Local,
    /// Another agent, by its checked certificate.
    Host(String),
    /// Somebody without a certificate.
    Nobody,
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(_stream: IncomingStream<'_, UnixListener>) -> Self {
        Self::Local
    }
}

impl Connected<IncomingStream<'_, TlsListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        stream.remote_addr().clone()
    }
}

/// Listens on a unix socket only its owner may open (0600). The caller holds the state directory's lock, so a socket that is there
/// is nobody's.
pub fn listen_unix(path: &Path) -> Result<UnixListener, AgentError> {
    let io = |action| move |source| AgentError::Io { action, path: path.to_path_buf(), source };
    if let Some(dir) = path.parent() {
        super::make_private_dir(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io("remove")(e)),
        _ => {}
    }
    let listener = bind_any_length(path).map_err(io("listen on"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io("protect"))?;
    Ok(listener)
}

/// Binds a path that may be too long for a socket address, then by way of its open directory.
fn bind_any_length(path: &Path) -> io::Result<UnixListener> {
    if path.as_os_str().len() <= MAX_SOCKET_PATH {
        return UnixListener::bind(path);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the path of a file"));
    };
    let directory = std::fs::File::open(parent)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&directory);
    UnixListener::bind(PathBuf::from(format!("/proc/self/fd/{fd}")).join(name))
}

/// TLS connections whose handshake is done.
#[derive(Debug)]
pub struct TlsListener {
    ready: mpsc::Receiver<(TlsIo, Caller)>,
    address: SocketAddr,
}

impl TlsListener {
    /// Listens on an address. Handshakes run beside each other, so that a slow one holds up nobody.
    pub async fn bind(address: SocketAddr, tls: &HostTls) -> Result<Self, AgentError> {
        let listener =
            TcpListener::bind(address).await.map_err(|source| AgentError::Listen { address, source })?;
        let address = listener.local_addr().map_err(|source| AgentError::Listen { address, source })?;
        let (sender, ready) = mpsc::channel(16);
        let acceptor = TlsAcceptor::from(tls.server.clone());
        tokio::spawn(accept_all(listener, acceptor, sender));
        Ok(Self { ready, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn accept_all(listener: TcpListener, acceptor: TlsAcceptor, sender: mpsc::Sender<(TlsIo, Caller)>) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: give others time to close some.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            },
            () = sender.closed() => return,
        };
        let (acceptor, sender) = (acceptor.clone(), sender.clone());
        tokio::spawn(async move {
            let shaken = tokio::time::timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream)).await;
            drop(slot);
            match shaken {
                Ok(Ok(stream)) => {
                    let caller = caller_of(&stream);
                    // A closed channel: the agent ends.
                    let _ = sender.send((TlsIo::new(stream, &caller), caller)).await;
                }
                Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                Err(_) => tracing::debug!("a TLS handshake took too long"),
            }
        });
    }
}

fn caller_of(stream: &TlsStream<TcpStream>) -> Caller {
    let chain = stream.get_ref().1.peer_certificates();
    // A failure here cannot reach delay: the stream works without it.
    let _ = stream.get_ref().0.set_nodelay(true);
    chain.and_then(|chain| host_of(chain.first()?)).map_or(Caller::Nobody, Caller::Host)
}

impl Listener for TlsListener {
    type Io = TlsIo;
    type Addr = Caller;

    async fn accept(&mut self) -> (TlsIo, Caller) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // The acceptor ends only with the runtime.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Caller> {
        Ok(Caller::Local)
    }
}

/// A TLS connection; one of nobody's ends when its time is up.
#[derive(Debug)]
pub struct TlsIo {
    stream: TlsStream<TcpStream>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl TlsIo {
    fn new(stream: TlsStream<TcpStream>, caller: &Caller) -> Self {
        let deadline =
            matches!(caller, Caller::Nobody).then(|| Box::pin(tokio::time::sleep(NOBODY_DEADLINE)));
        Self { stream, deadline }
    }

    fn check_deadline(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(deadline) = &mut self.deadline else { return Ok(()) };
        if deadline.as_mut().poll(cx).is_ready() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
}

impl AsyncRead for TlsIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_deadline(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check_deadline(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_deadline(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
