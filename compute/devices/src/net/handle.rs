//! How other threads speak to a NIC's thread: commands over a channel, an event to wake it.
//!
//! What lives here: the thread's birth and end, and the questions it answers. What never enters: packets.

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::worker::{Link, Worker};
use super::{Backend, MacAddress, Offloads};
use crate::DeviceError;
use crate::virtio::{DeviceQueue, Interrupt, Pausing, RingPosition};

/// What the thread can be told.
pub enum Command {
    /// Serve these queues.
    Start(Started),
    /// Let the queues go.
    Finish { reply: Sender<()> },
    /// Where the active queues stand, and the packet that waits for room.
    Look { reply: Sender<Standing> },
    /// Take and send no more packets; answer once none is half-way.
    Pause { reply: Sender<()> },
    /// Take packets again.
    Resume,
    /// Tell the network where the guest is.
    Announce,
    /// Let go of the wire for good.
    Leave { reply: Sender<()> },
}

/// Queues to serve.
pub struct Started {
    /// The features that the driver accepted.
    pub features: u64,
    /// The queues that it enabled, with the events that count its notifications.
    pub queues: Vec<(EventFd, DeviceQueue)>,
    /// How to interrupt it.
    pub interrupt: Arc<Interrupt>,
    /// A packet that waits for room, out of a saved state.
    pub pending: Option<Vec<u8>>,
}

/// What a paused NIC has in hand.
#[derive(Default)]
pub struct Standing {
    pub positions: Vec<(u16, RingPosition)>,
    pub pending: Option<Vec<u8>>,
}

/// A NIC and its thread. Clones name the same NIC; when the last is dropped the thread ends and lets go of the wire.
#[derive(Clone)]
pub struct NetHandle(Arc<Inner>);

struct Inner {
    name: String,
    mac: MacAddress,
    offloads: Offloads,
    link: Arc<Link>,
    commands: Mutex<Option<Sender<Command>>>,
    wake: EventFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl NetHandle {
    /// Starts a thread for the NIC `name`, whose guest has the address `mac`.
    pub fn open(name: &str, mac: MacAddress, backend: Box<dyn Backend>) -> Result<Self, DeviceError> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(DeviceError::io(name, "create an event"))?;
        let (commands, inbox) = mpsc::channel();
        let link = Arc::new(Link::default());
        let offloads = backend.offloads();
        let worker = Worker::new(name, mac, backend, Arc::clone(&link), inbox, &wake)
            .map_err(DeviceError::io(name, "watch the wire"))?;
        let thread = thread::Builder::new()
            .name(format!("net-{name}"))
            .spawn(move || worker.run())
            .map_err(DeviceError::io(name, "start a thread"))?;
        Ok(Self(Arc::new(Inner {
            name: name.to_owned(),
            mac,
            offloads,
            link,
            commands: Mutex::new(Some(commands)),
            wake,
            thread: Mutex::new(Some(thread)),
        })))
    }

    /// The NIC's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its guest's address.
    pub fn mac(&self) -> MacAddress {
        self.0.mac
    }

    /// Tells the network that the guest is here now: at once, also while the NIC is paused, and some times more with
    /// growing gaps; and asks the guest to do the same in its own protocols, if it has said that it can. For a guest that
    /// has come from elsewhere and is this host's to run.
    pub fn announce(&self) -> Result<(), DeviceError> {
        self.send(Command::Announce)
    }

    /// Lets go of the wire for good, for a guest that is no longer here: no packet comes or goes any more. Returns once that
    /// is so.
    pub fn leave(&self) -> Result<(), DeviceError> {
        self.ask(|reply| Command::Leave { reply })
    }

    /// Stops taking and sending packets; returns once none is half-way.
    pub fn pause(&self) -> Result<(), DeviceError> {
        self.start_pause()?.wait()
    }

    /// Takes and sends packets again.
    pub fn resume(&self) -> Result<(), DeviceError> {
        self.send(Command::Resume)
    }

    /// What the wire can do.
    pub(crate) fn offloads(&self) -> Offloads {
        self.0.offloads
    }

    /// What the guest reads of its link.
    pub(crate) fn link(&self) -> &Link {
        &self.0.link
    }

    /// Begins [`pause`](Self::pause).
    pub(crate) fn start_pause(&self) -> Result<Pausing, DeviceError> {
        let (reply, done) = mpsc::channel();
        self.send(Command::Pause { reply })?;
        Ok(Pausing::new(self.name(), done))
    }

    /// Serves queues from now on, or from the next resume.
    pub(crate) fn start(&self, started: Started) -> Result<(), DeviceError> {
        self.send(Command::Start(started))
    }

    /// Lets the queues go.
    pub(crate) fn finish(&self) -> Result<(), DeviceError> {
        self.ask(|reply| Command::Finish { reply })
    }

    /// What it has in hand. Meaningful while paused.
    pub(crate) fn standing(&self) -> Result<Standing, DeviceError> {
        self.ask(|reply| Command::Look { reply })
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, DeviceError> {
        let (reply, answer) = mpsc::channel();
        self.send(command(reply))?;
        answer.recv().map_err(|_| self.gone())
    }

    fn send(&self, command: Command) -> Result<(), DeviceError> {
        let commands = self.0.commands.lock().unwrap_or_else(PoisonError::into_inner);
        commands.as_ref().and_then(|sender| sender.send(command).ok()).ok_or_else(|| self.gone())?;
        self.0.wake.write(1).map_err(DeviceError::io(self.name(), "wake the NIC's thread"))
    }

    fn gone(&self) -> DeviceError {
        DeviceError::Gone { device: self.name().to_owned() }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        *self.commands.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        // A thread that has ended already does not mind.
        let _ = self.wake.write(1);
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(nic = self.name, "the NIC's thread panicked");
        }
    }
}
