//! The guest's serial console: recent output, and everybody who watches or types.
//!
//! Lives here: fan-out of bytes. Never enters: what they mean, terminals.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, SyncSender, TrySendError},
    },
    thread,
};

/// Bytes of output kept for those who attach later.
const BACKLOG: usize = 64 << 10;
/// Pieces of output a watcher may lag behind before it is let go.
const LAG: usize = 4096;

#[derive(Default)]
struct Inner {
    recent: VecDeque<u8>,
    watchers: Vec<SyncSender<Vec<u8>>>,
}

/// Where the guest's output goes. Writing never blocks on a watcher: one that does not keep up is disconnected.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Inner>>);

impl Console {
    /// Serves the console on a socket in the VM's directory; what watchers type goes to `input`.
    pub fn serve(&self, path: &Path, input: impl Fn(&[u8]) + Send + Sync + 'static) -> io::Result<()> {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        let (console, input) = (self.clone(), Arc::new(input));
        thread::Builder::new().name("console".into()).spawn(move || {
            for stream in listener.incoming() {
                let watched = stream.and_then(|stream| console.watch(stream, Arc::clone(&input)));
                if let Err(error) = watched {
                    tracing::warn!(%error, "console watcher");
                }
            }
        })?;
        Ok(())
    }

    fn watch(
        &self,
        mut stream: UnixStream,
        input: Arc<impl Fn(&[u8]) + Send + Sync + 'static>,
    ) -> io::Result<()> {
        let mut typed = stream.try_clone()?;
        let (sender, output) = mpsc::sync_channel::<Vec<u8>>(LAG);
        {
            // Under one lock: nothing is missed between the backlog and what comes next, and nothing is doubled.
            let mut inner = self.lock();
            let recent: Vec<u8> = inner.recent.iter().copied().collect();
            let _ = sender.try_send(recent);
            inner.watchers.push(sender);
        }
        thread::Builder::new().name("console-out".into()).spawn(move || {
            while let Ok(bytes) = output.recv() {
                if stream.write_all(&bytes).is_err() {
                    return;
                }
            }
            let _ = stream.shutdown(std::net::Shutdown::Both);
        })?;
        thread::Builder::new().name("console-in".into()).spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = typed.read(&mut buffer) {
                input(&buffer[..n]);
            }
        })?;
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut inner = self.lock();
        inner.recent.extend(bytes);
        let over = inner.recent.len().saturating_sub(BACKLOG);
        inner.recent.drain(..over);
        inner.watchers.retain(|watcher| match watcher.try_send(bytes.to_vec()) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        });
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchers_see_the_backlog_then_everything_and_can_type() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let mut console = Console::default();
        console.write_all(b"before ").unwrap();
        let (typed, input) = mpsc::channel();
        console.serve(&path, move |bytes| typed.send(bytes.to_vec()).unwrap()).unwrap();
        let mut watcher = UnixStream::connect(&path).unwrap();
        let mut seen = [0; 7];
        watcher.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"before ");
        console.write_all(b"after").unwrap();
        let mut seen = [0; 5];
        watcher.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"after");
        watcher.write_all(b"c").unwrap();
        assert_eq!(input.recv().unwrap(), b"c");
    }

    #[test]
    fn the_backlog_is_bounded() {
        let mut console = Console::default();
        console.write_all(&vec![1; 3 * BACKLOG]).unwrap();
        assert_eq!(console.lock().recent.len(), BACKLOG);
    }
}
