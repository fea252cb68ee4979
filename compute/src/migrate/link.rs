//! One connection of a move, as two halves that different threads use: plain, or TLS 1.3.
//!
//! Lives here: moving bytes, whole, in order. Never enters: what they mean.

use std::{
    io::{self, IoSlice, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
};

use nix::sys::socket::{setsockopt, sockopt};
use vm_memory::{Bytes, ReadVolatile, VolatileSlice, bitmap::BitmapSlice};

use vmove_mirror::wire::frame::Header;

/// Bytes encrypted or decrypted in one go.
const TLS_CHUNK: usize = 256 << 10;

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(s) => Self::Tcp(s.try_clone()?),
            Self::Unix(s) => Self::Unix(s.try_clone()?),
        })
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buf),
            Self::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(buf),
            Self::Unix(s) => s.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write_vectored(bufs),
            Self::Unix(s) => s.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The TLS session both halves share. It is locked for computing only, never while a socket may block: else two peers that both
/// send could wait for each other for ever.
type Session = Arc<Mutex<rustls::Connection>>;

/// A connection before it is split.
#[derive(Debug)]
pub struct Link {
    socket: Socket,
    session: Option<Session>,
}

impl Link {
    /// An unprotected TCP connection.
    pub fn plain(stream: TcpStream) -> io::Result<Self> {
        prepare(&stream)?;
        Ok(Self { socket: Socket::Tcp(stream), session: None })
    }

    /// Both ends of a connection inside this process.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = UnixStream::pair()?;
        let link = |s| Self { socket: Socket::Unix(s), session: None };
        Ok((link(a), link(b)))
    }

    /// A TLS connection whose handshake is completed here.
    pub fn tls(mut stream: TcpStream, mut session: rustls::Connection) -> io::Result<Self> {
        prepare(&stream)?;
        while session.is_handshaking() {
            session.complete_io(&mut stream)?;
        }
        session.set_buffer_limit(None);
        Ok(Self { socket: Socket::Tcp(stream), session: Some(Arc::new(Mutex::new(session))) })
    }

    /// Speaks a few words over the connection before it is split; gives it back with what came of them.
    pub fn exchange<T, E>(
        self,
        words: impl FnOnce(&mut LinkSender, &mut LinkReceiver) -> Result<T, E>,
    ) -> Result<(Self, T), E>
    where
        E: From<io::Error>,
    {
        let (mut sender, mut receiver, _closer) = self.split()?;
        let value = words(&mut sender, &mut receiver)?;
        if !receiver.cipher.is_empty() {
            // Neither side may run ahead before the last of these words.
            return Err(io::Error::from(io::ErrorKind::InvalidData).into());
        }
        Ok((Self { socket: receiver.socket, session: receiver.session }, value))
    }

    /// The two halves, and a handle that ends both.
    pub fn split(self) -> io::Result<(LinkSender, LinkReceiver, LinkCloser)> {
        let session = self.session;
        let sender =
            LinkSender { socket: self.socket.try_clone()?, session: session.clone(), cipher: Vec::new() };
        let closer = LinkCloser(Arc::new(self.socket.try_clone()?));
        let receiver = LinkReceiver { socket: self.socket, session, bounce: Vec::new(), cipher: 0..0 };
        Ok((sender, receiver, closer))
    }
}

/// No delays for small frames, and a peer that has silently gone is noticed: after 5 + 3 x 5 s of silence, or 20 s without an
/// acknowledgement of what was sent.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &5)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &5)?;
    setsockopt(stream, sockopt::TcpKeepCount, &3)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &20_000)?;
    Ok(())
}

fn lock(session: &Session) -> std::sync::MutexGuard<'_, rustls::Connection> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a connection from any thread: blocked readers and writers return.
#[derive(Debug, Clone)]
pub struct LinkCloser(Arc<Socket>);

impl LinkCloser {
    /// Ends it, both ways.
    pub fn close(&self) {
        // Already closed by the other side: that is what was wanted.
        let _ = match &*self.0 {
            Socket::Tcp(s) => s.shutdown(Shutdown::Both),
            Socket::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }
}

/// The sending half.
#[derive(Debug)]
pub struct LinkSender {
    socket: Socket,
    session: Option<Session>,
    cipher: Vec<u8>,
}

impl LinkSender {
    /// Sends all parts, in order. A plain connection takes them as they lie, without a copy.
    pub fn send(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        let Some(session) = self.session.clone() else {
            return write_all_vectored(&mut self.socket, parts);
        };
        for part in parts {
            for chunk in part.chunks(TLS_CHUNK) {
                {
                    let mut session = lock(&session);
                    session.writer().write_all(chunk)?;
                    while session.wants_write() {
                        session.write_tls(&mut self.cipher)?;
                    }
                }
                // Small parts travel together with what follows.
                if self.cipher.len() >= TLS_CHUNK {
                    self.socket.write_all(&self.cipher)?;
                    self.cipher.clear();
                }
            }
        }
        self.socket.write_all(&self.cipher)?;
        self.cipher.clear();
        Ok(())
    }
}

fn write_all_vectored(socket: &mut Socket, parts: &[&[u8]]) -> io::Result<()> {
    // The kernel takes at most 1024 slices a call (IOV_MAX).
    for group in parts.chunks(1024) {
        let mut slices: Vec<IoSlice<'_>> =
            group.iter().filter(|p| !p.is_empty()).map(|p| IoSlice::new(p)).collect();
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            match socket.write_vectored(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut rest, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

/// The receiving half.
#[derive(Debug)]
pub struct LinkReceiver {
    socket: Socket,
    session: Option<Session>,
    bounce: Vec<u8>,
    /// Part of `bounce` that the session has not taken in yet.
    cipher: std::ops::Range<usize>,
}

impl LinkReceiver {
    /// Fills `buf`; the peer's orderly end is `UnexpectedEof`.
    pub fn receive(&mut self, mut buf: &mut [u8]) -> io::Result<()> {
        let Some(session) = self.session.clone() else {
            return self.socket.read_exact(buf);
        };
        while !buf.is_empty() {
            match lock(&session).reader().read(buf) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    buf = &mut buf[n..];
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
            // The session takes in about a record at a time, and no more before its plaintext has been read.
            if !self.cipher.is_empty() {
                let mut session = lock(&session);
                let mut rest = &self.bounce[self.cipher.clone()];
                let before = rest.len();
                session.read_tls(&mut rest)?;
                self.cipher.start += before - rest.len();
                session.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                continue;
            }
            self.bounce.resize(TLS_CHUNK, 0);
            match self.socket.read(&mut self.bounce) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.cipher = 0..n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Fills guest memory; a plain connection writes it without a copy.
    pub fn receive_into<B: BitmapSlice>(&mut self, memory: &VolatileSlice<'_, B>) -> io::Result<()> {
        let other = |e: vm_memory::VolatileMemoryError| io::Error::other(e.to_string());
        if self.session.is_none() {
            let mut whole = memory.offset(0).map_err(other)?;
            let result = match &mut self.socket {
                Socket::Tcp(s) => s.read_exact_volatile(&mut whole),
                Socket::Unix(s) => s.read_exact_volatile(&mut whole),
            };
            return result.map_err(|e| match e {
                vm_memory::VolatileMemoryError::IOError(e) => e,
                e => other(e),
            });
        }
        let mut buffer = vec![0; memory.len().min(TLS_CHUNK)];
        let mut at = 0;
        while at < memory.len() {
            let n = buffer.len().min(memory.len() - at);
            self.receive(&mut buffer[..n])?;
            memory.write_slice(&buffer[..n], at).map_err(other)?;
            at += n;
        }
        Ok(())
    }

    /// The next frame's header and checked head.
    pub fn frame(&mut self) -> Result<(Header, Vec<u8>), super::MoveError> {
        let mut fixed = [0; Header::BYTES];
        self.receive(&mut fixed).map_err(super::MoveError::io("receive a frame"))?;
        let header = Header::decode(&fixed).map_err(super::MoveError::wire("frame"))?;
        let mut head = vec![0; header.head_len as usize];
        self.receive(&mut head).map_err(super::MoveError::io("receive a frame's head"))?;
        header.check(&head).map_err(super::MoveError::wire("frame"))?;
        Ok((header, head))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn parts_arrive_whole_and_in_order() {
        let (a, b) = Link::pair().unwrap();
        let (mut sender, _keep, _closer) = a.split().unwrap();
        let (_s, mut receiver, _c) = b.split().unwrap();
        let big: Vec<u8> = (0..3_000_000u32).map(|i| i as u8).collect();
        let expected = big.clone();
        let writer = thread::spawn(move || sender.send(&[b"head", &[], &big]).unwrap());
        let mut head = [0; 4];
        receiver.receive(&mut head).unwrap();
        let mut data = vec![0; expected.len()];
        receiver.receive(&mut data).unwrap();
        writer.join().unwrap();
        assert!(&head == b"head" && data == expected);
    }

    #[test]
    fn closing_wakes_a_blocked_reader() {
        let (a, b) = Link::pair().unwrap();
        let (_s, mut receiver, closer) = a.split().unwrap();
        let reader = thread::spawn(move || receiver.receive(&mut [0; 1]).unwrap_err().kind());
        closer.close();
        assert_eq!(reader.join().unwrap(), io::ErrorKind::UnexpectedEof);
        drop(b);
    }
}
