//! The entropy device (virtio 1.2 section 5.4) and its thread.
//!
//! What lives here: filling the guest's buffers from `getrandom(2)`. What never enters: generators of our own.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Chain, DeviceQueue, DeviceState, Pausing, RingError, RingPosition, VirtioDevice};
use crate::{DeviceError, SharedMemory};

const NAME: &str = "rng";
const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one request; a guest that wants more asks again.
const MAX_BYTES: u64 = 4096;

const EVENT_COMMAND: u64 = 0;
const EVENT_KICK: u64 = 1;

/// A virtio entropy device.
pub struct Rng {
    memory: SharedMemory,
    /// None once the device is being dropped, which ends the thread.
    commands: Option<Sender<Command>>,
    wake: EventFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

enum Command {
    Start { queue: DeviceQueue, kick: EventFd },
    Finish { reply: Sender<()> },
    Position { reply: Sender<Option<(u16, RingPosition)>> },
    Pause { reply: Sender<()> },
    Resume,
}

impl Rng {
    /// Starts the device's thread.
    pub fn new(memory: SharedMemory) -> Result<Self, DeviceError> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(DeviceError::io(NAME, "create an event"))?;
        let (commands, inbox) = mpsc::channel();
        let worker = Worker::new(inbox, &wake).map_err(DeviceError::io(NAME, "watch an event"))?;
        let thread = thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(move || worker.run())
            .map_err(DeviceError::io(NAME, "start a thread"))?;
        Ok(Self { memory, commands: Some(commands), wake, thread: Mutex::new(Some(thread)) })
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, DeviceError> {
        let (reply, answer) = mpsc::channel();
        self.send(command(reply))?;
        answer.recv().map_err(|_| gone())
    }

    fn send(&self, command: Command) -> Result<(), DeviceError> {
        self.commands.as_ref().and_then(|sender| sender.send(command).ok()).ok_or_else(gone)?;
        self.wake.write(1).map_err(DeviceError::io(NAME, "wake the thread"))
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.commands = None;
        // A thread that has ended already does not mind.
        let _ = self.wake.write(1);
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the entropy thread panicked");
        }
    }
}

fn gone() -> DeviceError {
    DeviceError::Gone { device: NAME.to_owned() }
}

impl VirtioDevice for Rng {
    fn id(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn class(&self) -> u32 {
        0xff_0000 // No class fits.
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { queues, interrupt, .. } = activation;
        for active in queues {
            let (kick, queue) = DeviceQueue::new(active, Arc::clone(&self.memory), Arc::clone(&interrupt));
            self.send(Command::Start { queue, kick })?;
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Result<(), DeviceError> {
        self.ask(|reply| Command::Finish { reply })
    }

    fn positions(&self) -> Result<Vec<(u16, RingPosition)>, DeviceError> {
        Ok(self.ask(|reply| Command::Position { reply })?.into_iter().collect())
    }

    fn pause(&self) -> Result<Pausing, DeviceError> {
        let (reply, done) = mpsc::channel();
        self.send(Command::Pause { reply })?;
        Ok(Pausing::new(NAME, done))
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.send(Command::Resume)
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        Ok(DeviceState::Entropy)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        match state {
            DeviceState::Entropy => Ok(()),
            other => Err(DeviceError::bad_state(NAME, format!("it is {} there", other.kind()))),
        }
    }
}

/// The thread's state. Requests are served at once, so none is ever in flight between commands.
struct Worker {
    commands: Receiver<Command>,
    wake: EventFd,
    epoll: Epoll,
    active: Option<(DeviceQueue, EventFd)>,
    paused: bool,
}

impl Worker {
    fn new(commands: Receiver<Command>, wake: &EventFd) -> io::Result<Self> {
        let wake = wake.try_clone()?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, EVENT_COMMAND);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        Ok(Self { commands, wake, epoll, active: None, paused: false })
    }

    fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(%error, "the entropy thread ends");
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 2];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            for event in &events[..count] {
                if event.data() == EVENT_KICK {
                    // Only takes the count back; the ring says what there is to do.
                    let _ = self.active.as_ref().map(|(_, kick)| kick.read());
                    continue;
                }
                let _ = self.wake.read();
                loop {
                    match self.commands.try_recv() {
                        Ok(command) => self.handle(command)?,
                        Err(mpsc::TryRecvError::Empty) => break,
                        Err(mpsc::TryRecvError::Disconnected) => return Ok(()),
                    }
                }
            }
            self.pump();
        }
    }

    /// Replies go to a thread that may have gone; then nobody wants them, and dropping the error is right.
    fn handle(&mut self, command: Command) -> io::Result<()> {
        match command {
            Command::Start { queue, kick } => {
                let event = EpollEvent::new(EventSet::IN, EVENT_KICK);
                self.epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event)?;
                self.active = Some((queue, kick));
            }
            Command::Finish { reply } => {
                if let Some((_, kick)) = self.active.take() {
                    self.epoll.ctl(ControlOperation::Delete, kick.as_raw_fd(), EpollEvent::default())?;
                }
                let _ = reply.send(());
            }
            Command::Position { reply } => {
                let _ = reply.send(self.active.as_ref().map(|(queue, _)| (queue.index(), queue.position())));
            }
            Command::Pause { reply } => {
                self.paused = true;
                let _ = reply.send(());
            }
            Command::Resume => self.paused = false,
        }
        Ok(())
    }

    fn pump(&mut self) {
        let Some((queue, _)) = self.active.as_mut().filter(|(queue, _)| !self.paused && !queue.gave_up())
        else {
            return;
        };
        if let Err(error) = fill_all(queue) {
            queue.give_up(&error);
        }
    }
}

/// Answers every request that is there.
fn fill_all(queue: &mut DeviceQueue) -> Result<(), RingError> {
    loop {
        queue.quiet()?;
        while let Some(chain) = queue.next()? {
            let head = chain.head;
            let written = fill(queue.memory(), chain);
            queue.complete(head, written)?;
        }
        if !queue.listen()? {
            return Ok(());
        }
    }
}

/// Writes entropy into the chain's first bytes; returns how many.
fn fill(memory: &SharedMemory, chain: Chain) -> u32 {
    let mut bytes = vec![0; chain.writable.len().min(MAX_BYTES) as usize];
    let filled =
        entropy(&mut bytes).and_then(|()| chain.writable.write(memory, &bytes).map_err(io::Error::other));
    match filled {
        Ok(()) => bytes.len() as u32,
        Err(error) => {
            tracing::warn!(%error, "no entropy for the guest");
            0
        }
    }
}

/// Fills `bytes` from the kernel's generator.
fn entropy(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // SAFETY: the pointer and the length are those of a live, exclusively borrowed slice.
        let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => bytes = &mut bytes[count..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
