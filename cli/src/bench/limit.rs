//! What this machine can do at most: one loopback TCP stream from memory into fresh memory, and memcpy.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::warm;

/// Bytes of one write(2) or read(2).
const CALL: usize = 1 << 20;

/// Filled memory that is copied from. Clones share it.
#[derive(Clone)]
pub struct Source {
    map: Arc<MmapMut>,
}

impl Source {
    /// Fills `bytes` of memory with incompressible data.
    pub fn fill(bytes: u64) -> io::Result<Self> {
        let mut map = warm::mapping(bytes)?;
        // Marsaglia's xorshift64: good enough that nothing on the way can shorten it.
        let mut x: u64 = 0x9e37_79b9_7f4a_7c15;
        for word in map.chunks_exact_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            word.copy_from_slice(&x.to_le_bytes());
        }
        Ok(Self { map: Arc::new(map) })
    }

    /// Bytes per second of one TCP stream on the loopback interface, from this memory into a fresh mapping, a thread at each end.
    pub fn over_loopback(&self) -> io::Result<f64> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut sender = TcpStream::connect(listener.local_addr()?)?;
        let (mut receiver, _) = listener.accept()?;
        let mut target = warm::mapping(self.map.len() as u64)?;
        let begin = Instant::now();
        let received = std::thread::scope(|scope| {
            let sending = scope.spawn(move || {
                let sent = self.map.chunks(CALL).try_for_each(|chunk| sender.write_all(chunk));
                // Ends the stream, so that the receiver does not wait after an error.
                drop(sender);
                sent
            });
            let received = receive(&mut receiver, &mut target);
            let sent = sending.join().map_err(|_| io::Error::other("the sending thread panicked"))?;
            sent.and(received)
        });
        let elapsed = begin.elapsed();
        received?;
        if target[..] != self.map[..] {
            return Err(io::Error::other("the loopback copy is not equal to its source"));
        }
        Ok(per_second(self.map.len(), elapsed))
    }

    /// Bytes per second of memcpy into touched memory.
    pub fn memcpy(&self) -> io::Result<f64> {
        let mut target = warm::mapping(self.map.len() as u64)?;
        warm::touch(&mut target);
        let begin = Instant::now();
        target.copy_from_slice(&self.map);
        let elapsed = begin.elapsed();
        std::hint::black_box(&target[..]);
        Ok(per_second(self.map.len(), elapsed))
    }
}

fn receive(stream: &mut TcpStream, target: &mut [u8]) -> io::Result<()> {
    let mut at = 0;
    while at < target.len() {
        let end = target.len().min(at + CALL);
        match stream.read(&mut target[at..end]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => at += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn per_second(bytes: usize, elapsed: Duration) -> f64 {
    bytes as f64 / elapsed.as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_arrive_and_have_a_rate() -> io::Result<()> {
        warm::host_memory(4 << 20)?;
        let source = Source::fill((3 << 20) + 4096)?;
        assert!(source.over_loopback()? > 0.0);
        assert!(source.memcpy()? > 0.0);
        Ok(())
    }
}
