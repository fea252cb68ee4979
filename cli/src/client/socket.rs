//! Connecting to unix sockets whose path does not fit into a socket address.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;

/// Longest path a unix socket address holds (`sun_path` is 108 bytes with the ending zero, unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Connects to a unix socket; a path that is too long goes through `/proc/self/fd`.
pub async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    if path.as_os_str().len() <= MAX_SOCKET_PATH {
        return UnixStream::connect(path).await;
    }
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket path names no file"));
    };
    // Held open until the connection is there: the short path leads through it.
    let dir = File::open(dir)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    UnixStream::connect(short).await
}
