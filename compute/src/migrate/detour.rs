//! Where tests stand between the two sides of a move.
//!
//! Under `VMOVE_DETOUR=<ip>:<port>` data connections are made to that address and begin with a line that names the one meant; who
//! listens there answers with one byte, 0, or 1 if nobody listens at the one meant, and passes the rest on; it may cut, hold or damage
//! it. Without the variable nothing happens.

use std::{
    env,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// Connects to `address`, by the detour if there is one.
pub fn connect(address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let Some(detour) = env::var("VMOVE_DETOUR").ok().and_then(|text| text.parse().ok()) else {
        return TcpStream::connect_timeout(&address, limit);
    };
    let mut stream = TcpStream::connect_timeout(&detour, limit)?;
    stream.write_all(format!("{address}\n").as_bytes())?;
    let mut refused = [0];
    stream.set_read_timeout(Some(limit))?;
    stream.read_exact(&mut refused)?;
    stream.set_read_timeout(None)?;
    if refused == [0] { Ok(stream) } else { Err(ErrorKind::ConnectionRefused.into()) }
}
