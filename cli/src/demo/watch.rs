//! Following a guest's console wherever the guest is.
//!
//! Lives here: one task that takes lines from a console into the log it fills.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::DemoError;
use super::guest::GuestLog;
use crate::client::attachment::Seen;
use crate::client::{Client, Console, ConsoleEvent};

/// Longest line that is kept, bytes.
const MAX_LINE: usize = 64 << 10;

/// A guest's console, followed until this is dropped.
#[derive(Debug)]
pub struct Watch {
    log: watch::Receiver<GuestLog>,
    keys: mpsc::Sender<Vec<u8>>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Begins to follow the console of `vm`, which this agent has now.
    pub async fn new(agent: Client, vm: &str) -> Result<Self, DemoError> {
        let console = Console::attach(agent, vm)
            .await
            .map_err(DemoError::client(format!("attaching to the console of {vm}")))?;
        let (sender, log) = watch::channel(GuestLog::default());
        let keys = console.keys();
        let task = tokio::spawn(follow(console, sender));
        Ok(Self { log, keys, task })
    }

    /// Types a key.
    pub async fn key(&self, key: u8) {
        // A console that has ended takes no keys; who waits for what they bring finds that out.
        let _ = self.keys.send(vec![key]).await;
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

/// Takes lines in until the console ends.
async fn follow(mut console: Console, log: watch::Sender<GuestLog>) {
    let mut pending: Vec<u8> = Vec::new();
    while let Some(event) = console.next().await {
        let ConsoleEvent::Seen(Seen::Output(bytes)) = event else { continue };
        pending.extend_from_slice(&bytes);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            log.send_modify(|log| log.line(&String::from_utf8_lossy(&line[..end])));
        }
        if pending.len() > MAX_LINE {
            pending.clear();
        }
    }
}
