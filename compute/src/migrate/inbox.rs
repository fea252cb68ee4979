//! A mailbox of a disk's thread: any thread puts in, one task of the disk's ring takes out.
//!
//! Lives here: the channel and the event that wakes the ring. Never enters: what the messages mean.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
};

use vmm_sys_util::eventfd::EventFd;
use vmove_storage::Ring;

/// The putting end.
#[derive(Debug)]
pub struct Inbox<T> {
    messages: Sender<T>,
    wake: Arc<EventFd>,
}

impl<T> Clone for Inbox<T> {
    fn clone(&self) -> Self {
        Self { messages: self.messages.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<T> Inbox<T> {
    /// Both ends.
    pub fn new() -> io::Result<(Self, Outbox<T>)> {
        let (messages, receiver) = mpsc::channel();
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        Ok((Self { messages, wake: Arc::clone(&wake) }, Outbox { receiver, wake }))
    }

    /// Puts a message in; whether anybody is there to read it.
    pub fn put(&self, message: T) -> bool {
        self.messages.send(message).is_ok() && self.wake.write(1).is_ok()
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        // The taker may be waiting for a message that can no longer come. A full counter wakes it as well.
        let _ = self.wake.write(1);
    }
}

/// The taking end.
#[derive(Debug)]
pub struct Outbox<T> {
    receiver: Receiver<T>,
    wake: Arc<EventFd>,
}

impl<T> Outbox<T> {
    /// The next message; none once all putting ends are gone.
    pub async fn next(&self, ring: &Ring) -> Option<T> {
        loop {
            match self.receiver.try_recv() {
                Ok(message) => return Some(message),
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => {}
            }
            if let Err(error) = ring.readable(self.wake.as_raw_fd()).await {
                tracing::error!(%error, "cannot wait for messages");
                return None;
            }
            // Not readable after all: another turn of the loop finds out.
            let _ = self.wake.read();
        }
    }
}
