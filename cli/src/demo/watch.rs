//! Following a guest's console wherever the guest is.
//!
//! Lives here: one task that keeps a console connection to the host that has the VM, and the log it fills.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::DemoError;
use super::guest::GuestLog;
use crate::client::{Client, ConsoleStream};

/// Pause between attempts to find the console.
const RETRY: Duration = Duration::from_millis(50);
/// How long one agent may take to connect a console.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Longest line that is kept, bytes.
const MAX_LINE: usize = 64 << 10;

/// A guest's console, followed until this is dropped.
#[derive(Debug)]
pub struct Watch {
    log: watch::Receiver<GuestLog>,
    input: mpsc::UnboundedSender<u8>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Begins to follow the console of `vm`, which is at one of these agents, the first at the beginning.
    pub fn new(agents: Vec<Client>, vm: &str) -> Self {
        let (sender, log) = watch::channel(GuestLog::default());
        let (input, keys) = mpsc::unbounded_channel();
        let task = tokio::spawn(follow(agents, vm.to_owned(), sender, keys));
        Self { log, input, task }
    }

    /// Types a key. It is delivered when a console is connected.
    pub fn key(&self, key: u8) {
        // The task ends only with this object.
        let _ = self.input.send(key);
    }

    /// What the guest has said so far.
    pub fn log(&self) -> GuestLog {
        self.log.borrow().clone()
    }

    /// Waits until the log fulfils a condition and gives a copy of it.
    pub async fn until(
        &self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut(&GuestLog) -> bool,
    ) -> Result<GuestLog, DemoError> {
        let mut log = self.log.clone();
        let waited = tokio::time::timeout(limit, log.wait_for(|log| condition(log))).await;
        match waited {
            Ok(Ok(log)) => Ok(log.clone()),
            Ok(Err(_)) | Err(_) => {
                let log = self.log.borrow();
                Err(DemoError::Timeout {
                    what: what.to_owned(),
                    seconds: limit.as_secs(),
                    detail: format!("; the guest's last lines:\n{}", log.tail.join("\n")),
                })
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Stays with a connection until it ends, then asks the agents in turn: the guest is at one of them.
async fn follow(
    agents: Vec<Client>,
    vm: String,
    log: watch::Sender<GuestLog>,
    mut keys: mpsc::UnboundedReceiver<u8>,
) {
    let mut waiting_key = None;
    for agent in agents.iter().cycle() {
        if let Ok(Ok(stream)) = tokio::time::timeout(CONNECT_LIMIT, agent.console(&vm)).await {
            pump(stream, &log, &mut keys, &mut waiting_key).await;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Passes lines into the log and keys to the guest until the connection ends.
async fn pump(
    stream: ConsoleStream,
    log: &watch::Sender<GuestLog>,
    keys: &mut mpsc::UnboundedReceiver<u8>,
    waiting_key: &mut Option<u8>,
) {
    let (mut from, mut to) = tokio::io::split(stream);
    let mut pending: Vec<u8> = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    loop {
        if let Some(key) = *waiting_key {
            if to.write_all(&[key]).await.is_err() || to.flush().await.is_err() {
                return;
            }
            *waiting_key = None;
        }
        tokio::select! {
            read = from.read(&mut buffer) => {
                let Ok(n @ 1..) = read else { return };
                pending.extend_from_slice(&buffer[..n]);
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    log.send_modify(|log| log.line(&String::from_utf8_lossy(&line[..end])));
                }
                if pending.len() > MAX_LINE {
                    pending.clear();
                }
            }
            key = keys.recv(), if waiting_key.is_none() => match key {
                Some(key) => *waiting_key = Some(key),
                None => return,
            },
        }
    }
}
