//! A relay between the two VM processes of a move, for links that drop, fall silent or damage what they carry.
//!
//! VM processes whose agents have [`Relay::environment`] connect here instead of to each other (`VMOVE_DETOUR` of the product). One
//! thread a direction passes the bytes on.
//! Lives here: what becomes of bytes on the way. Never enters: what they mean, except the role in a plain connection's hello.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use vmove_mirror::wire::hello::{Hello, Role};

use crate::wait::until;

/// How long a thread sleeps in the kernel before it looks at what it has been told.
const GLANCE: Duration = Duration::from_millis(10);
/// Bytes passed on at once.
const CHUNK: usize = 64 << 10;

/// What happens to what comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Pass,
    /// Nothing gets through, and nobody is told.
    Hold,
    /// Every connection is reset.
    Refuse,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    /// Connections of an older generation are reset.
    generation: u64,
    /// Generations of the connections that are being served.
    open: Vec<u64>,
    /// Connections that ever reached the other side.
    served: u64,
    /// Bytes towards targets.
    passed: u64,
    /// Bits still to be flipped: in plain connections of this role, towards the target, in this byte of the stream.
    flips: Vec<(Role, u64)>,
    over: bool,
}

/// The relay. Dropping it ends it and all connections through it.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Relay {
    /// Starts one that passes everything on.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let state = Arc::new(Mutex::new(State {
            mode: Mode::Pass,
            generation: 0,
            open: Vec::new(),
            served: 0,
            passed: 0,
            flips: Vec::new(),
            over: false,
        }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            while !lock(&shared).over {
                match listener.accept() {
                    Ok((near, _)) => {
                        let shared = Arc::clone(&shared);
                        let generation = {
                            let mut state = lock(&shared);
                            let generation = state.generation;
                            state.open.push(generation);
                            generation
                        };
                        thread::spawn(move || {
                            // A connection that fails is one that ends.
                            let _ = serve(near, &shared, generation);
                            let open = &mut lock(&shared).open;
                            if let Some(at) = open.iter().position(|one| *one == generation) {
                                open.swap_remove(at);
                            }
                        });
                    }
                    Err(_) => thread::sleep(GLANCE),
                }
            }
        });
        Self { address, state }
    }

    /// What an agent's environment must hold; its VM processes inherit it.
    pub fn environment(&self) -> (&'static str, String) {
        ("VMOVE_DETOUR", self.address.to_string())
    }

    /// Resets all connections there are; waits until they are gone. New ones are served: they may be there before this returns.
    pub fn cut(&self) {
        let newer = {
            let mut state = lock(&self.state);
            state.generation += 1;
            state.generation
        };
        until("the connections through the relay being gone", || {
            lock(&self.state).open.iter().all(|generation| *generation >= newer).then_some(())
        });
    }

    /// Resets all connections there are and every new one, until [`Relay::heal`].
    pub fn refuse(&self) {
        lock(&self.state).mode = Mode::Refuse;
        self.cut();
    }

    /// Lets nothing through any more, without a word to either side, until [`Relay::heal`].
    pub fn hold(&self) {
        lock(&self.state).mode = Mode::Hold;
    }

    /// Passes everything on again; what was held arrives late.
    pub fn heal(&self) {
        lock(&self.state).mode = Mode::Pass;
    }

    /// Flips one bit of byte `at` (from 0, hello included) of the next plain connection in this role that carries so many towards
    /// its target.
    pub fn flip(&self, role: Role, at: u64) {
        lock(&self.state).flips.push((role, at));
    }

    /// Whether all bits were flipped that were to be.
    pub fn has_flipped(&self) -> bool {
        lock(&self.state).flips.is_empty()
    }

    /// Bytes passed on towards targets so far, hellos and TLS included.
    pub fn passed(&self) -> u64 {
        lock(&self.state).passed
    }

    /// Connections made to targets so far.
    pub fn served(&self) -> u64 {
        lock(&self.state).served
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.over = true;
        state.generation += 1;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken() -> io::Error {
    ErrorKind::ConnectionReset.into()
}

/// One connection, until it ends.
fn serve(near: TcpStream, state: &Mutex<State>, generation: u64) -> io::Result<()> {
    let gate = Gate { state, generation };
    tune(&near)?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        gate.read(&near, &mut byte)?;
        line.extend(byte);
    }
    let meant = String::from_utf8_lossy(&line).trim().parse::<SocketAddr>().map_err(io::Error::other)?;
    let far = TcpStream::connect_timeout(&meant, Duration::from_secs(10));
    let refused = matches!(&far, Err(error) if error.kind() == ErrorKind::ConnectionRefused);
    gate.write(&near, &[u8::from(refused)])?;
    let far = far?;
    tune(&far)?;
    lock(state).served += 1;
    thread::scope(|scope| {
        scope.spawn(|| gate.pass(&far, &near, false));
        gate.pass(&near, &far, true);
    });
    Ok(())
}

/// Short waits in the kernel, and a reset instead of an orderly end when the last handle is gone.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GLANCE))?;
    stream.set_write_timeout(Some(GLANCE))?;
    setsockopt(stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    Ok(())
}

/// What decides whether bytes of one connection go on.
struct Gate<'a> {
    state: &'a Mutex<State>,
    generation: u64,
}

impl Gate<'_> {
    /// Waits while everything is held; an error if the connection is to end.
    fn check(&self) -> io::Result<()> {
        loop {
            let state = lock(self.state);
            if state.generation != self.generation || state.mode == Mode::Refuse {
                return Err(broken());
            }
            if state.mode == Mode::Pass {
                return Ok(());
            }
            drop(state);
            thread::sleep(GLANCE);
        }
    }

    /// At least one byte; none at the end of the stream.
    fn read(&self, mut from: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.check()?;
            match from.read(buffer) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                other => return other,
            }
        }
    }

    fn write(&self, mut to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.check()?;
            match to.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Passes one direction on until it ends.
    fn pass(&self, from: &TcpStream, to: &TcpStream, forward: bool) {
        let ended = self.pump(from, to, forward);
        // An orderly end is passed on as one. A broken connection is reset by the last of its handles; the other direction must not
        // wait for it.
        let how = if ended.is_ok() { std::net::Shutdown::Write } else { std::net::Shutdown::Read };
        let _ = to.shutdown(how);
        if ended.is_err() {
            let _ = from.shutdown(how);
        }
    }

    fn pump(&self, from: &TcpStream, to: &TcpStream, forward: bool) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        let (mut at, mut head, mut role) = (0, Vec::new(), None);
        loop {
            let n = self.read(from, &mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            let bytes = &mut buffer[..n];
            self.check()?;
            if forward {
                if head.len() < Hello::BYTES {
                    head.extend(&bytes[..n.min(Hello::BYTES - head.len())]);
                    let whole: Option<&[u8; Hello::BYTES]> = head.as_slice().try_into().ok();
                    role = whole.and_then(|head| Hello::decode(head).ok()).map(|hello| hello.role);
                }
                self.damage(role, at, bytes);
                lock(self.state).passed += n as u64;
            }
            at += n as u64;
            self.write(to, bytes)?;
        }
    }

    fn damage(&self, role: Option<Role>, at: u64, bytes: &mut [u8]) {
        let mut state = lock(self.state);
        state.flips.retain(|(wanted, byte)| {
            let hit = Some(*wanted) == role && (at..at + bytes.len() as u64).contains(byte);
            if hit {
                bytes[(byte - at) as usize] ^= 1;
            }
            !hit
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers each byte with the next one.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut byte = [0];
                    while matches!(stream.read(&mut byte), Ok(1)) {
                        if stream.write_all(&[byte[0].wrapping_add(1)]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn call(relay: &Relay, to: SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(relay.address).unwrap();
        stream.write_all(format!("{to}\n").as_bytes()).unwrap();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        // The relay's own answer; none if it refuses all.
        let _ = stream.read(&mut [0]);
        stream
    }

    fn answer(stream: &mut TcpStream, byte: u8) -> io::Result<u8> {
        stream.write_all(&[byte])?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        Ok(answer[0])
    }

    #[test]
    fn passes_holds_cuts_and_refuses() {
        let (relay, to) = (Relay::start(), echo());
        let mut stream = call(&relay, to);
        assert_eq!(answer(&mut stream, 1).unwrap(), 2);

        relay.hold();
        stream.write_all(&[7]).unwrap();
        stream.set_read_timeout(Some(GLANCE * 10)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        relay.heal();
        stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        let mut late = [0];
        stream.read_exact(&mut late).unwrap();
        assert_eq!(late, [8]);

        // Whoever calls again at once is not waited for.
        let mut again = thread::scope(|scope| {
            let cut = scope.spawn(|| relay.cut());
            while answer(&mut stream, 1).is_ok() {}
            let mut again = call(&relay, to);
            assert_eq!(answer(&mut again, 9).unwrap(), 10);
            cut.join().unwrap();
            again
        });
        assert_eq!(answer(&mut again, 3).unwrap(), 4);

        relay.refuse();
        assert!(answer(&mut again, 1).is_err());
        assert!(answer(&mut call(&relay, to), 1).is_err());
        relay.heal();
        assert_eq!(answer(&mut call(&relay, to), 5).unwrap(), 6);
    }

    #[test]
    fn flips_the_bit_it_is_told_to() {
        let (relay, to) = (Relay::start(), echo());
        relay.flip(Role::Pages(0), Hello::BYTES as u64 + 1);
        let say = |role| {
            let mut stream = call(&relay, to);
            let hello = Hello::new(role, [0; 16], 1).encode();
            for byte in hello {
                answer(&mut stream, byte).unwrap();
            }
            [answer(&mut stream, 10).unwrap(), answer(&mut stream, 20).unwrap()]
        };
        assert_eq!(say(Role::Disk(0)), [11, 21]);
        assert!(!relay.has_flipped());
        assert_eq!(say(Role::Pages(0)), [11, 22]);
        assert!(relay.has_flipped());
        assert_eq!(say(Role::Pages(0)), [11, 21]);
    }
}
