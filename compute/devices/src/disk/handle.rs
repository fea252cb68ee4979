//! How other threads speak to a disk's thread: commands over a channel, an event to wake it.
//!
//! What lives here: the thread's birth and end, and the questions it answers. What never enters: requests, images.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use futures_util::future::LocalBoxFuture;
use vmm_sys_util::eventfd::EventFd;
use vmove_storage::{BlockDevice, BlockError, OpenOptions, Ring};

use super::request::DiskFacts;
use super::worker::Worker;
use super::{DiskContext, DiskPath};
use crate::DeviceError;
use crate::virtio::{DeviceQueue, Pausing, RingPosition};

/// Submission entries of a disk's ring: room for all of a guest's requests and a mirror's.
const RING_ENTRIES: u32 = 256;

/// Code to run on a disk's thread. It may go on for as long as it likes; other tasks of the thread run meanwhile.
pub type DiskTask = Box<dyn FnOnce(DiskContext) -> LocalBoxFuture<'static, ()> + Send>;

/// What the thread can be told.
pub enum Command {
    /// Serve a queue.
    Start(Started),
    /// Let the queue go once nothing is in flight.
    Finish { reply: Sender<()> },
    /// Where the active queue stands.
    Position { reply: Sender<Option<(u16, RingPosition)>> },
    /// Take no more requests; answer once nothing is in flight.
    Pause { reply: Sender<()> },
    /// Take requests again.
    Resume,
    /// Run this.
    Run(DiskTask),
    /// Close the image and end.
    Stop { reply: Sender<Result<(), BlockError>> },
}

/// A queue to serve.
pub struct Started {
    pub queue: DeviceQueue,
    pub kick: EventFd,
    pub facts: Arc<DiskFacts>,
}

/// A disk and its thread. Clones name the same disk; when the last is dropped, the image is flushed and closed and
/// the thread ends. All methods but [`resume`](Self::resume) and [`run`](Self::run) wait for the thread, so they
/// must not be called on it.
#[derive(Clone)]
pub struct DiskHandle(Arc<Inner>);

struct Inner {
    name: String,
    size: u64,
    read_only: bool,
    commands: Mutex<Option<Sender<Command>>>,
    wake: EventFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl DiskHandle {
    /// Starts a thread for the disk `name` and opens its image there.
    pub fn open(name: &str, image: &Path, options: OpenOptions) -> Result<Self, DeviceError> {
        let read_only = options.read_only;
        Self::open_as(name, image, options, read_only)
    }

    /// The same for an image that is written here but, with `read_only`, never by the guest: that of a disk that arrives.
    pub fn open_as(
        name: &str,
        image: &Path,
        options: OpenOptions,
        read_only: bool,
    ) -> Result<Self, DeviceError> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let wake = event().map_err(DeviceError::io(name, "create an event"))?;
        let woken = wake.try_clone().map_err(DeviceError::io(name, "duplicate an event"))?;
        let (commands, inbox) = mpsc::channel();
        let (opened, opening) = mpsc::channel();
        let (disk, image) = (name.to_owned(), image.to_owned());
        let thread = thread::Builder::new()
            .name(format!("disk-{name}"))
            .spawn(move || run(disk, image, options, &opened, &inbox, &woken))
            .map_err(DeviceError::io(name, "start a thread"))?;
        let size = opening.recv().map_err(|_| DeviceError::Gone { device: name.to_owned() })??;
        Ok(Self(Arc::new(Inner {
            name: name.to_owned(),
            size,
            read_only,
            commands: Mutex::new(Some(commands)),
            wake,
            thread: Mutex::new(Some(thread)),
        })))
    }

    /// The disk's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Whether the guest may only read.
    pub fn read_only(&self) -> bool {
        self.0.read_only
    }

    /// Runs code on the disk's thread, with access to its ring and path. Returns at once.
    pub fn run(&self, task: DiskTask) -> Result<(), DeviceError> {
        self.send(Command::Run(task))
    }

    /// Bytes of data that the guest has had written since the image was opened.
    pub fn written_bytes(&self) -> Result<u64, DeviceError> {
        let (reply, answer) = mpsc::channel();
        self.run(Box::new(move |disk| {
            // Whoever asked may have gone.
            let _ = reply.send(disk.path().written_bytes());
            Box::pin(async {})
        }))?;
        answer.recv().map_err(|_| self.gone())
    }

    /// Stops taking guest requests and waits until all in flight are in the used ring. Works while the vCPUs are
    /// stopped. Notifications that come meanwhile are served after [`resume`](Self::resume).
    pub fn pause(&self) -> Result<(), DeviceError> {
        self.start_pause()?.wait()
    }

    /// Begins [`pause`](Self::pause), so that several disks can drain side by side.
    pub fn start_pause(&self) -> Result<Pausing, DeviceError> {
        let (reply, done) = mpsc::channel();
        self.send(Command::Pause { reply })?;
        Ok(Pausing::new(self.name(), done))
    }

    /// Takes guest requests again, looking at the queue even without a notification.
    pub fn resume(&self) -> Result<(), DeviceError> {
        self.send(Command::Resume)
    }

    /// Lets requests in flight end, flushes, closes the image and ends the thread. Later calls answer
    /// [`DeviceError::Gone`].
    pub fn stop(&self) -> Result<(), DeviceError> {
        let closed = self.ask(|reply| Command::Stop { reply })?;
        self.0.join();
        closed.map_err(|source| self.image_error("flush and close the image", source))
    }

    /// Serves a queue from now on, or from the next resume.
    pub(crate) fn start(&self, started: Started) -> Result<(), DeviceError> {
        self.send(Command::Start(started))
    }

    /// Lets the queue go, after its requests in flight have ended.
    pub(crate) fn finish(&self) -> Result<(), DeviceError> {
        self.ask(|reply| Command::Finish { reply })
    }

    /// Number and position of the active queue.
    pub(crate) fn position(&self) -> Result<Option<(u16, RingPosition)>, DeviceError> {
        self.ask(|reply| Command::Position { reply })
    }

    fn image_error(&self, action: &'static str, source: BlockError) -> DeviceError {
        DeviceError::Image { disk: self.name().to_owned(), action, source }
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, DeviceError> {
        let (reply, answer) = mpsc::channel();
        self.send(command(reply))?;
        answer.recv().map_err(|_| self.gone())
    }

    fn send(&self, command: Command) -> Result<(), DeviceError> {
        let commands = self.0.commands.lock().unwrap_or_else(PoisonError::into_inner);
        commands.as_ref().and_then(|sender| sender.send(command).ok()).ok_or_else(|| self.gone())?;
        self.0.wake.write(1).map_err(DeviceError::io(self.name(), "wake the disk's thread"))
    }

    fn gone(&self) -> DeviceError {
        DeviceError::Gone { device: self.name().to_owned() }
    }
}

impl Inner {
    /// Waits for the thread's end, unless this is the thread.
    fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!(disk = self.name, "the disk's thread panicked");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        *self.commands.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        // A thread that has ended already does not mind.
        let _ = self.wake.write(1);
        self.join();
    }
}

/// The thread. Says the disk's size in `opened`, then serves until it is stopped.
fn run(
    name: String,
    image: PathBuf,
    options: OpenOptions,
    opened: &Sender<Result<u64, DeviceError>>,
    commands: &Receiver<Command>,
    wake: &EventFd,
) {
    let open = || {
        let ring = Ring::new(RING_ENTRIES).map_err(DeviceError::io(&name, "create an io_uring"))?;
        let device = ring
            .block_on(BlockDevice::open(&ring, &image, options))
            .map_err(|source| DeviceError::Image { disk: name.clone(), action: "open the image", source })?;
        Ok((ring, device))
    };
    let (ring, device) = match open() {
        Ok(open) => open,
        Err(error) => return drop(opened.send(Err(error))),
    };
    let size = device.size();
    let worker = Worker::new(name, Rc::clone(&ring), Rc::new(DiskPath::new(device)));
    if opened.send(Ok(size)).is_ok() {
        ring.block_on(worker.serve(commands, wake));
    }
    // Tasks hold the ring and the worker.
    ring.shutdown();
}
