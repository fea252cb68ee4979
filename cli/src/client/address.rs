//! Where an agent is, and connections to it: its unix socket on this machine, or that of another machine by way of `ssh`.
//!
//! Over ssh, `vmove dial` on the other machine passes the bytes to its agent, so who may use an agent is decided by its socket alone,
//! there as here. Never enters: what is said on a connection.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Stdio;
use std::str::FromStr;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::{ClientError, connect_unix};
use crate::agent::SOCKET;

/// Where an agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Its socket on this machine.
    Unix(PathBuf),
    /// The agent of another machine, as `[USER@]HOST[:PORT]`.
    Ssh(String),
}

impl FromStr for Address {
    type Err = ClientError;

    /// A path, `unix://PATH` or `ssh://[USER@]HOST[:PORT]`. A directory means the socket in it.
    fn from_str(text: &str) -> Result<Self, ClientError> {
        let unix = |path: &str| {
            let path = PathBuf::from(path);
            Self::Unix(if path.is_dir() { path.join(SOCKET) } else { path })
        };
        // A word that ssh, or a shell on its way, could take for anything else is no host.
        let is_host = |host: &str| {
            !host.starts_with('-')
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"@.:_-[]".contains(&b))
        };
        match text.split_once("://") {
            None if !text.is_empty() => Ok(unix(text)),
            Some(("unix", path)) if !path.is_empty() => Ok(unix(path)),
            Some(("ssh", host)) if !host.is_empty() && is_host(host) => Ok(Self::Ssh(host.to_owned())),
            _ => Err(ClientError::BadAddress(text.to_owned())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Ssh(host) => write!(f, "ssh://{host}"),
        }
    }
}

impl Address {
    /// A connection to the agent. Over ssh an error shows only when something is said on it.
    pub async fn connect(&self) -> io::Result<Connection> {
        match self {
            Self::Unix(path) => Ok(Connection::Unix(connect_unix(path).await?)),
            Self::Ssh(host) => {
                let mut command = Command::new("ssh");
                command.args(["-T", "-e", "none", "--", &format!("ssh://{host}"), "vmove", "dial"]);
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
                let mut child = command
                    .spawn()
                    .map_err(|e| io::Error::new(e.kind(), format!("ssh cannot be run: {e}")))?;
                match (child.stdin.take(), child.stdout.take()) {
                    (Some(to), Some(from)) => Ok(Connection::Ssh { to, from, _child: Box::new(child) }),
                    _ => Err(io::ErrorKind::BrokenPipe.into()),
                }
            }
        }
    }
}

/// A connection to an agent.
#[derive(Debug)]
pub enum Connection {
    /// To its socket.
    Unix(UnixStream),
    /// Through ssh, which ends with it.
    Ssh {
        /// To the agent.
        to: ChildStdin,
        /// From the agent.
        from: ChildStdout,
        /// Killed when dropped.
        _child: Box<Child>,
    },
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Ssh { from, .. } => Pin::new(from).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Ssh { to, .. } => Pin::new(to).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Ssh { to, .. } => Pin::new(to).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Ssh { to, .. } => Pin::new(to).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_and_tricks_are_no_hosts() {
        for (text, shown) in [
            ("/x/agent.sock", "/x/agent.sock"),
            ("unix:///x/agent.sock", "/x/agent.sock"),
            ("ssh://root@10.0.0.1:22", "ssh://root@10.0.0.1:22"),
            ("ssh://h1", "ssh://h1"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        for text in
            ["", "ssh://", "ssh://-oProxyCommand=x", "ssh://a;b", "ssh://a b", "https://host:1", "unix://"]
        {
            assert!(matches!(text.parse::<Address>(), Err(ClientError::BadAddress(_))), "{text}");
        }
        let dir = tempfile::tempdir().unwrap();
        let named = dir.path().to_str().unwrap().parse::<Address>().unwrap();
        assert_eq!(named, Address::Unix(dir.path().join("agent.sock")));
    }
}
