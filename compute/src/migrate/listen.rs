//! How the connections of a move are made: the target listens with a one-time ticket, the source calls once for each role.
//!
//! Lives here: sockets, TLS handshakes, hellos. Never enters: what flows afterwards.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmove_mirror::wire::{
    WireError,
    hello::{Hello, HelloAnswer, MIN_VERSION, Role, VERSION},
};

use super::{MoveError, link::Link, tls};
use crate::process::protocol::{IdentityPaths, Listening};

/// How long one side waits for the other in the handshake of one connection.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Callers greeted at once; more are turned away.
const MAX_GREETINGS: usize = 128;

/// The one-time secret of a move's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket([u8; 16]);

impl Ticket {
    /// A fresh one from the system's random source.
    pub fn random() -> Result<Self, MoveError> {
        let mut bytes = [0; 16];
        let fill = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
        fill.map_err(MoveError::io("read /dev/urandom"))?;
        Ok(Self(bytes))
    }

    /// From 32 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 16];
        if text.len() != 32 || !text.is_ascii() {
            return None;
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// As 32 hexadecimal digits.
    pub fn to_hex(self) -> String {
        vmove_mirror::digest::hex(&self.0)
    }

    /// Compares without telling by its duration where they differ.
    fn is(&self, other: &[u8; 16]) -> bool {
        self.0.iter().zip(other).fold(0, |all, (a, b)| all | (a ^ b)) == 0
    }
}

/// The target's ear.
pub struct Listener {
    socket: TcpListener,
    ticket: Ticket,
    tls: Option<Arc<rustls::ServerConfig>>,
}

/// What the threads that greet callers share.
struct Door {
    ticket: Ticket,
    tls: Option<Arc<rustls::ServerConfig>>,
    /// Roles that nobody has taken yet.
    open: Mutex<Vec<Role>>,
}

impl Listener {
    /// Listens on a free port of `ip`; without an identity the connections are plain.
    pub fn bind(ip: IpAddr, identity: Option<&IdentityPaths>) -> Result<(Self, Listening), MoveError> {
        let what = format!("listen on {ip} for the source");
        let socket = TcpListener::bind((ip, 0)).map_err(MoveError::io(&what))?;
        let port = socket.local_addr().map_err(MoveError::io(&what))?.port();
        socket.set_nonblocking(true).map_err(MoveError::io(&what))?;
        let ticket = Ticket::random()?;
        let tls = identity.map(tls::server).transpose()?;
        let listening = Listening { ip: ip.to_string(), port, ticket: ticket.to_hex() };
        Ok((Self { socket, ticket, tls }, listening))
    }

    /// Accepts one connection for each role. Strangers are turned away, and silent ones hold up nobody; `deadline` ends it.
    pub fn accept(&self, roles: &[Role], deadline: Duration) -> Result<HashMap<Role, Link>, MoveError> {
        let end = Instant::now() + deadline;
        let door =
            Arc::new(Door { ticket: self.ticket, tls: self.tls.clone(), open: Mutex::new(roles.to_vec()) });
        let (greeted, arrived) = mpsc::channel();
        let (waker, woken) = UnixStream::pair().map_err(MoveError::io("make a pair of sockets"))?;
        let waker = Arc::new(waker);
        let mut links = HashMap::new();
        loop {
            links.extend(arrived.try_iter());
            if links.len() == roles.len() {
                return Ok(links);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let timeout = std::io::ErrorKind::TimedOut.into();
                return Err(MoveError::io("wait for the source to connect")(timeout));
            }
            match self.socket.accept() {
                // Each greeting holds a copy of the waker.
                Ok((_, from)) if Arc::strong_count(&waker) > MAX_GREETINGS => {
                    tracing::warn!(%from, "too many callers at once: turned away");
                }
                Ok((stream, from)) => {
                    let (door, greeted, waker) = (Arc::clone(&door), greeted.clone(), Arc::clone(&waker));
                    let greeting = move || match door.greet(stream) {
                        Ok(link) => {
                            // An error means that nobody waits any more.
                            let _ = greeted.send(link);
                            let _ = (&*waker).write_all(&[0]);
                        }
                        Err(error) => tracing::warn!(%from, %error, "a connection was turned away"),
                    };
                    let spawned = thread::Builder::new().name("greeting".into()).spawn(greeting);
                    spawned.map_err(MoveError::io("start a thread"))?;
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    let fds = [self.socket.as_fd(), woken.as_fd()];
                    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                    let wait =
                        PollTimeout::try_from(left.min(Duration::from_secs(1))).unwrap_or(PollTimeout::ZERO);
                    // Interrupted or timed out: the loop looks again.
                    let _ = poll(&mut fds, wait);
                    if fds[1].any().unwrap_or(false) {
                        // One byte is there, for one link to be taken in.
                        let _ = (&woken).read(&mut [0]);
                    }
                }
                Err(e) => return Err(MoveError::io("accept the source's connection")(e)),
            }
        }
    }
}

impl Door {
    /// Takes a role, if it is still open.
    fn take(&self, role: Role) -> bool {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let found = open.iter().position(|one| *one == role);
        found.map(|at| open.swap_remove(at)).is_some()
    }

    fn greet(&self, stream: TcpStream) -> Result<(Role, Link), MoveError> {
        let io = |e| MoveError::io("handshake")(e);
        stream.set_nonblocking(false).map_err(io)?;
        let timer = stream.try_clone().map_err(io)?;
        timer.set_read_timeout(Some(HANDSHAKE)).map_err(io)?;
        let link = match &self.tls {
            None => Link::plain(stream).map_err(io)?,
            Some(config) => {
                let session = rustls::ServerConnection::new(Arc::clone(config))
                    .map_err(|e| MoveError::Tls(e.to_string()))?;
                Link::tls(stream, session.into()).map_err(MoveError::io("TLS handshake"))?
            }
        };
        let (link, role) = link.exchange(|sender, receiver| {
            let mut bytes = [0; Hello::BYTES];
            receiver.receive(&mut bytes).map_err(io)?;
            let hello = Hello::decode(&bytes).map_err(MoveError::wire("hello"))?;
            let (answer, verdict) = match hello.negotiate() {
                Err(error) => (HelloAnswer::NoCommonVersion(MIN_VERSION, VERSION), Err(error)),
                Ok(_) if !self.ticket.is(&hello.ticket) => {
                    (HelloAnswer::BadTicket, Err(WireError::Refused("wrong ticket")))
                }
                // Whoever takes a role has the ticket: if it hangs up now, the move is over.
                Ok(_) if !self.take(hello.role) => {
                    (HelloAnswer::BadRole, Err(WireError::Refused("role not expected")))
                }
                Ok(version) => (HelloAnswer::Accepted(version), Ok(hello.role)),
            };
            sender.send(&[&answer.encode()]).map_err(io)?;
            verdict.map_err(MoveError::wire("hello"))
        })?;
        timer.set_read_timeout(None).map_err(io)?;
        Ok((role, link))
    }
}

/// Calls the target in one role.
pub fn call(
    to: &Listening,
    host: &str,
    role: Role,
    identity: Option<&IdentityPaths>,
) -> Result<Link, MoveError> {
    let ip: IpAddr =
        to.ip.parse().map_err(|_| MoveError::Machine(format!("{:?} is not an IP address", to.ip)))?;
    let ticket = Ticket::from_hex(&to.ticket)
        .ok_or_else(|| MoveError::Machine("the ticket is not 32 digits".into()))?;
    let address = SocketAddr::new(ip, to.port);
    let what = format!("connect to {host} at {address}");
    let stream = TcpStream::connect_timeout(&address, HANDSHAKE).map_err(MoveError::io(&what))?;
    let timer = stream.try_clone().map_err(MoveError::io(&what))?;
    timer.set_read_timeout(Some(HANDSHAKE)).map_err(MoveError::io(&what))?;
    let link = match identity {
        None => Link::plain(stream).map_err(MoveError::io(&what))?,
        Some(identity) => {
            let session = tls::client(identity, host)?;
            Link::tls(stream, session).map_err(MoveError::io(format!("{what}: TLS handshake")))?
        }
    };
    let (link, ()) = link.exchange(|sender, receiver| {
        sender.send(&[&Hello::new(role, ticket.0).encode()]).map_err(MoveError::io(&what))?;
        let mut answer = [0; HelloAnswer::BYTES];
        receiver.receive(&mut answer).map_err(MoveError::io(format!("{what}: hello")))?;
        HelloAnswer::decode(&answer).map_err(MoveError::wire(&what)).map(|_| ())
    })?;
    timer.set_read_timeout(None).map_err(MoveError::io(&what))?;
    Ok(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn strangers_are_turned_away_and_the_right_one_gets_in() {
        let (listener, listening) = Listener::bind(ANY, None).unwrap();
        let caller = thread::spawn(move || {
            let wrong = Listening { ticket: Ticket([9; 16]).to_hex(), ..listening.clone() };
            let refused = call(&wrong, "b", Role::Control, None).unwrap_err().to_string();
            let mut noise = TcpStream::connect((ANY, listening.port)).unwrap();
            noise.write_all(&[0xff; 64]).unwrap();
            let unexpected = call(&listening, "b", Role::Pages(3), None).unwrap_err().to_string();
            let right = call(&listening, "b", Role::Control, None);
            (refused, unexpected, right.is_ok())
        });
        let links = listener.accept(&[Role::Control], Duration::from_mins(1)).unwrap();
        assert!(links.contains_key(&Role::Control));
        let (refused, unexpected, right) = caller.join().unwrap();
        assert!(refused.contains("ticket") && unexpected.contains("role") && right, "{refused} {unexpected}");
    }

    #[test]
    fn tickets_are_hexadecimal() {
        let ticket = Ticket::random().unwrap();
        assert_eq!(Ticket::from_hex(&ticket.to_hex()), Some(ticket));
        assert_eq!(Ticket::from_hex("zz"), None);
        assert_eq!(Ticket::from_hex(&"é".repeat(16)), None);
    }
}
