//! How the connections of a move are made: the target listens with a one-time ticket, the source calls once for each role.
//!
//! All connections of a move are one set, an epoch. A source that has lost one makes all of them anew under a higher number; from the
//! first of these on, the target takes none of an older set.
//! Lives here: sockets, TLS handshakes, hellos. Never enters: what flows afterwards.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::Read,
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmove_mirror::wire::{
    WireError,
    hello::{Hello, HelloAnswer, MIN_VERSION, Role, VERSION},
};

use super::{MoveError, detour, link::Link, tls};
use crate::process::protocol::{IdentityPaths, Listening};

/// How long one side waits for the other in the handshake of one connection.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Callers greeted at once; more wait until one of them is through or has had its time.
const GREETINGS: usize = 128;
/// How often a listener looks at its callers.
const GLANCE: Duration = Duration::from_millis(20);
/// How often one without callers looks whether it is still needed.
const IDLE: Duration = Duration::from_millis(250);

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
    door: Arc<Door>,
}

/// What decides who gets in.
struct Door {
    ticket: Ticket,
    tls: Option<Arc<rustls::ServerConfig>>,
    open: Mutex<Open>,
}

/// The set of connections being made.
#[derive(Default)]
struct Open {
    epoch: u32,
    /// Roles of every set.
    all: HashSet<Role>,
    /// Roles of this one that nobody has taken yet.
    free: HashSet<Role>,
}

/// Connections of one epoch, one for each role.
pub type Links = HashMap<Role, Link>;

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
        Ok((Self { socket, door: Arc::new(Door { ticket, tls, open: Mutex::default() }) }, listening))
    }

    /// Accepts one connection for each role, and again for every newer epoch, and gives them to `made` when they are all there, until
    /// `over` is set. Strangers are turned away and do not end it.
    ///
    /// Every caller is greeted on a thread of its own, a few at a time, and not for long: silent ones hold nobody up.
    pub fn serve(
        &self,
        roles: &[Role],
        over: &AtomicBool,
        mut made: impl FnMut(Links),
    ) -> Result<(), MoveError> {
        self.door.lock().all.extend(roles);
        let (mut epoch, mut links) = (0, Links::new());
        let mut greeting: Vec<(Instant, TcpStream, Arc<AtomicBool>)> = Vec::new();
        let (admitted, arrivals) = mpsc::channel();
        while !over.load(Ordering::SeqCst) {
            for (of, role, link) in arrivals.try_iter() {
                if of > epoch {
                    // What is there of an older set will not be complete any more.
                    links.clear();
                    epoch = of;
                }
                if of == epoch {
                    links.insert(role, link);
                }
            }
            if links.len() == roles.len() {
                made(std::mem::take(&mut links));
            }
            greeting.retain(|(until, stream, over)| {
                if Instant::now() >= *until {
                    // Gone already, or gone now.
                    let _ = stream.shutdown(Shutdown::Both);
                }
                !over.load(Ordering::SeqCst) && Instant::now() < *until
            });
            if greeting.len() >= GREETINGS {
                thread::sleep(GLANCE);
                continue;
            }
            match self.socket.accept() {
                Ok((stream, from)) => {
                    let over = Arc::new(AtomicBool::new(false));
                    let clone =
                        stream.try_clone().map_err(MoveError::io("accept the source's connection"))?;
                    greeting.push((Instant::now() + HANDSHAKE, clone, Arc::clone(&over)));
                    let (door, admitted) = (Arc::clone(&self.door), admitted.clone());
                    let greet = move || {
                        match door.greet(stream) {
                            Ok(arrival) => drop(admitted.send(arrival)),
                            Err(error) => tracing::warn!(%from, %error, "a connection was turned away"),
                        }
                        over.store(true, Ordering::SeqCst);
                    };
                    let spawned = thread::Builder::new().name("greeting".into()).spawn(greet);
                    spawned.map_err(MoveError::io("start a thread"))?;
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                    let wait = if greeting.is_empty() { IDLE } else { GLANCE };
                    // Interrupted or timed out: the loop looks again.
                    let _ = poll(&mut fds, PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO));
                }
                Err(e) => return Err(MoveError::io("accept the source's connection")(e)),
            }
        }
        Ok(())
    }
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a caller may have this role; from then on nobody else does.
    fn admit(&self, epoch: u32, role: Role) -> bool {
        let mut open = self.lock();
        let Open { epoch: newest, all, free } = &mut *open;
        if epoch > *newest {
            *newest = epoch;
            free.clone_from(all);
        }
        epoch == *newest && free.remove(&role)
    }

    fn greet(&self, stream: TcpStream) -> Result<(u32, Role, Link), MoveError> {
        let io = |e| MoveError::io("handshake")(e);
        stream.set_nonblocking(false).map_err(io)?;
        let link = match &self.tls {
            None => Link::plain(stream).map_err(io)?,
            Some(config) => {
                let session = rustls::ServerConnection::new(Arc::clone(config))
                    .map_err(|e| MoveError::Tls(e.to_string()))?;
                Link::tls(stream, session.into()).map_err(MoveError::io("TLS handshake"))?
            }
        };
        let (link, (epoch, role)) = link.exchange(|sender, receiver| {
            let mut bytes = [0; Hello::BYTES];
            receiver.receive(&mut bytes).map_err(io)?;
            let hello = Hello::decode(&bytes).map_err(MoveError::wire("hello"))?;
            let (answer, verdict) = match hello.negotiate() {
                Err(error) => (HelloAnswer::NoCommonVersion(MIN_VERSION, VERSION), Err(error)),
                Ok(_) if !self.ticket.is(&hello.ticket) => {
                    (HelloAnswer::BadTicket, Err(WireError::Refused("wrong ticket")))
                }
                Ok(_) if !self.admit(hello.epoch, hello.role) => {
                    (HelloAnswer::BadRole, Err(WireError::Refused("role not expected")))
                }
                Ok(version) => (HelloAnswer::Accepted(version), Ok((hello.epoch, hello.role))),
            };
            sender.send(&[&answer.encode()]).map_err(io)?;
            verdict.map_err(MoveError::wire("hello"))
        })?;
        Ok((epoch, role, link))
    }
}

/// Calls the target in one role of an epoch.
pub fn call(
    to: &Listening,
    host: &str,
    role: Role,
    epoch: u32,
    identity: Option<&IdentityPaths>,
) -> Result<Link, MoveError> {
    let ip: IpAddr =
        to.ip.parse().map_err(|_| MoveError::Machine(format!("{:?} is not an IP address", to.ip)))?;
    let ticket = Ticket::from_hex(&to.ticket)
        .ok_or_else(|| MoveError::Machine("the ticket is not 32 digits".into()))?;
    let address = SocketAddr::new(ip, to.port);
    let what = format!("connect to {host} at {address}");
    let stream = detour::connect(address, HANDSHAKE).map_err(MoveError::io(&what))?;
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
        sender.send(&[&Hello::new(role, ticket.0, epoch).encode()]).map_err(MoveError::io(&what))?;
        let mut answer = [0; HelloAnswer::BYTES];
        receiver.receive(&mut answer).map_err(MoveError::io(format!("{what}: hello")))?;
        HelloAnswer::decode(&answer).map_err(MoveError::wire(&what)).map(|_| ())
    })?;
    timer.set_read_timeout(None).map_err(MoveError::io(&what))?;
    Ok(link)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const ANY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    /// Serves on a thread, until the second value is set.
    fn serve(listener: Listener, roles: &'static [Role]) -> (mpsc::Receiver<Links>, Arc<AtomicBool>) {
        let (sets, made) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        thread::spawn(move || listener.serve(roles, &ended, |links| drop(sets.send(links))));
        (made, over)
    }

    fn next(sets: &mpsc::Receiver<Links>) -> Links {
        sets.recv_timeout(Duration::from_mins(1)).unwrap()
    }

    #[test]
    fn strangers_are_turned_away_and_the_right_one_gets_in() {
        let (listener, listening) = Listener::bind(ANY, None).unwrap();
        let (sets, over) = serve(listener, &[Role::Control]);
        let wrong = Listening { ticket: Ticket([9; 16]).to_hex(), ..listening.clone() };
        let refused = call(&wrong, "b", Role::Control, 1, None).unwrap_err().to_string();
        let mut noise = TcpStream::connect((ANY, listening.port)).unwrap();
        noise.write_all(&[0xff; 64]).unwrap();
        let unexpected = call(&listening, "b", Role::Pages(3), 1, None).unwrap_err().to_string();
        call(&listening, "b", Role::Control, 1, None).unwrap();
        assert!(next(&sets).contains_key(&Role::Control));
        assert!(refused.contains("ticket") && unexpected.contains("role"), "{refused} {unexpected}");
        over.store(true, Ordering::SeqCst);
    }

    #[test]
    fn a_newer_set_takes_the_place_of_an_older_one() {
        const ROLES: [Role; 2] = [Role::Control, Role::Pages(0)];
        let (listener, listening) = Listener::bind(ANY, None).unwrap();
        let (sets, over) = serve(listener, &ROLES);
        let calls = |role, epoch| call(&listening, "b", role, epoch, None);
        // Half a set, that is never complete.
        let half = calls(Role::Control, 1).unwrap();
        let newer = ROLES.map(|role| calls(role, 3).unwrap());
        assert_eq!(next(&sets).len(), 2);
        for (role, epoch) in [(Role::Pages(0), 1), (Role::Control, 2), (Role::Control, 3)] {
            let refused = calls(role, epoch).unwrap_err().to_string();
            assert!(refused.contains("role"), "{refused}");
        }
        let newest = ROLES.map(|role| calls(role, 4).unwrap());
        assert_eq!(next(&sets).len(), 2);
        assert!(sets.try_recv().is_err());
        over.store(true, Ordering::SeqCst);
        drop((half, newer, newest));
    }

    #[test]
    fn silent_callers_hold_nobody_up() {
        let (listener, listening) = Listener::bind(ANY, None).unwrap();
        let (sets, over) = serve(listener, &[Role::Control]);
        let silent: Vec<_> = (0..20).map(|_| TcpStream::connect((ANY, listening.port)).unwrap()).collect();
        let began = Instant::now();
        call(&listening, "b", Role::Control, 1, None).unwrap();
        next(&sets);
        // Not an assertion on speed: served one after the other, each silent caller would take a whole handshake time.
        assert!(began.elapsed() < HANDSHAKE * 20);
        over.store(true, Ordering::SeqCst);
        drop(silent);
    }

    #[test]
    fn tickets_are_hexadecimal() {
        let ticket = Ticket::random().unwrap();
        assert_eq!(Ticket::from_hex(&ticket.to_hex()), Some(ticket));
        assert_eq!(Ticket::from_hex("zz"), None);
        assert_eq!(Ticket::from_hex(&"é".repeat(16)), None);
    }
}
