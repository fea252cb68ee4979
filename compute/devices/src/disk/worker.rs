//! A disk's thread: takes requests from the ring while it may, runs them side by side, answers commands.
//!
//! What lives here: who may start a request now (pause, quiet, limit), and when none is in flight. What never enters:
//! what a request does (`request`), how other threads speak to it (`handle`).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::task::{Poll, Waker};

use vmm_sys_util::eventfd::EventFd;
use vmove_storage::{BlockError, Ring};

use super::DiskPath;
use super::handle::{Command, Started};
use super::request::{DiskFacts, DiskRequest};
use crate::virtio::{DeviceQueue, RingError};

/// Most requests of a guest in flight at a time.
const MAX_IN_FLIGHT: usize = 64;

/// All state of the thread; tasks share it.
pub struct Worker {
    name: String,
    ring: Rc<Ring>,
    path: Rc<DiskPath>,
    active: RefCell<Option<Active>>,
    /// Counts activations, so that an old listener can tell that it is old.
    activation: Cell<u64>,
    in_flight: Cell<usize>,
    /// Tasks that wait for `in_flight` to become zero.
    waiting_for_idle: RefCell<Vec<Waker>>,
    /// Number of [`Quiet`] guards.
    quiet: Cell<usize>,
    paused: Cell<bool>,
}

/// A queue being served.
struct Active {
    queue: DeviceQueue,
    kick: Rc<EventFd>,
    facts: Arc<DiskFacts>,
}

/// What code sent to a disk's thread by [`DiskHandle::run`](super::DiskHandle::run) can use there.
#[derive(Clone)]
pub struct DiskContext {
    worker: Rc<Worker>,
}

impl DiskContext {
    /// The thread's ring, for more I/O and tasks.
    pub fn ring(&self) -> &Rc<Ring> {
        &self.worker.ring
    }

    /// The way of guest requests to the image.
    pub fn path(&self) -> &Rc<DiskPath> {
        &self.worker.path
    }

    /// The disk's name.
    pub fn name(&self) -> &str {
        &self.worker.name
    }

    /// Waits until no guest request is in flight and lets none start while the guard lives. The guest only sees its
    /// requests take longer.
    pub async fn quiesce(&self) -> Quiet {
        let quiet = Quiet::new(Rc::clone(&self.worker));
        self.worker.idle().await;
        quiet
    }
}

/// As long as it lives no guest request is in flight. On drop the queue is looked at again.
pub struct Quiet {
    worker: Rc<Worker>,
}

impl Quiet {
    fn new(worker: Rc<Worker>) -> Self {
        worker.quiet.set(worker.quiet.get() + 1);
        Self { worker }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.worker.quiet.set(self.worker.quiet.get() - 1);
        self.worker.pump();
    }
}

impl Worker {
    pub fn new(name: String, ring: Rc<Ring>, path: Rc<DiskPath>) -> Rc<Self> {
        Rc::new(Self {
            name,
            ring,
            path,
            active: RefCell::new(None),
            activation: Cell::new(0),
            in_flight: Cell::new(0),
            waiting_for_idle: RefCell::new(Vec::new()),
            quiet: Cell::new(0),
            paused: Cell::new(false),
        })
    }

    /// Answers commands until the last handle is gone or says stop; then flushes and closes the image.
    pub async fn serve(self: &Rc<Self>, commands: &Receiver<Command>, wake: &EventFd) {
        loop {
            let command = commands.try_recv();
            let stop = match command {
                Ok(Command::Stop { reply }) => Some(Some(reply)),
                Err(TryRecvError::Disconnected) => Some(None),
                Ok(command) => {
                    self.handle(command);
                    continue;
                }
                Err(TryRecvError::Empty) => None,
            };
            if let Some(reply) = stop {
                let result = self.close().await;
                match (reply, result) {
                    // A handle that went away meanwhile does not want to know.
                    (Some(reply), result) => drop(reply.send(result)),
                    (None, Err(error)) => tracing::error!(disk = self.name, %error, "closing"),
                    (None, Ok(())) => {}
                }
                return;
            }
            if let Err(error) = self.ring.readable(wake.as_raw_fd()).await {
                tracing::error!(disk = self.name, %error, "waiting for commands");
                return;
            }
            // Only takes the count back; the channel says what there is to do.
            let _ = wake.read();
        }
    }

    /// Replies go to a thread that may have gone; then nobody wants them, and dropping the error is right.
    fn handle(self: &Rc<Self>, command: Command) {
        match command {
            Command::Start(started) => self.activate(started),
            Command::Finish { reply } => {
                let worker = Rc::clone(self);
                self.ring.spawn(async move {
                    let quiet = DiskContext { worker: Rc::clone(&worker) }.quiesce().await;
                    worker.deactivate();
                    drop(quiet);
                    let _ = reply.send(());
                });
            }
            Command::Position { reply } => {
                let position = self.active.borrow().as_ref().map(|a| (a.queue.index(), a.queue.position()));
                let _ = reply.send(position);
            }
            Command::Pause { reply } => {
                self.paused.set(true);
                let worker = Rc::clone(self);
                self.ring.spawn(async move {
                    worker.idle().await;
                    let _ = reply.send(());
                });
            }
            Command::Resume => {
                self.paused.set(false);
                self.pump();
            }
            Command::Run(task) => self.ring.spawn(task(DiskContext { worker: Rc::clone(self) })),
            Command::Stop { .. } => unreachable!("handled by the command loop"),
        }
    }

    fn activate(self: &Rc<Self>, started: Started) {
        let kick = Rc::new(started.kick);
        let activation = self.activation.get() + 1;
        self.activation.set(activation);
        *self.active.borrow_mut() =
            Some(Active { queue: started.queue, kick: Rc::clone(&kick), facts: started.facts });
        let worker = Rc::clone(self);
        self.ring.spawn(async move {
            loop {
                let ready = worker.ring.readable(kick.as_raw_fd()).await;
                if worker.activation.get() != activation {
                    return; // The count, if any, belongs to the next activation.
                }
                if let Err(error) = ready {
                    tracing::error!(disk = worker.name, %error, "waiting for the guest");
                    return;
                }
                // Only takes the count back; the ring says what there is to do.
                let _ = kick.read();
                worker.pump();
            }
        });
        self.pump();
    }

    fn deactivate(&self) {
        self.activation.set(self.activation.get() + 1);
        if let Some(active) = self.active.borrow_mut().take() {
            // Wakes the listener, which sees that it is old. A full counter wakes it too.
            let _ = active.kick.write(1);
        }
    }

    /// Starts every request that is there and may start.
    fn pump(self: &Rc<Self>) {
        let mut active = self.active.borrow_mut();
        let Some(active) = active.as_mut().filter(|active| !active.queue.gave_up()) else { return };
        if let Err(error) = self.try_pump(active) {
            active.queue.give_up(&error);
        }
    }

    fn try_pump(self: &Rc<Self>, active: &mut Active) -> Result<(), RingError> {
        let may_start =
            || !self.paused.get() && self.quiet.get() == 0 && self.in_flight.get() < MAX_IN_FLIGHT;
        while may_start() {
            active.queue.quiet()?;
            while may_start() {
                let Some(chain) = active.queue.next()? else { break };
                let request = DiskRequest::new(chain).map_err(|e| active.queue.refuse(e))?;
                self.start(request, active);
            }
            if may_start() && !active.queue.listen()? {
                return Ok(());
            }
        }
        Ok(())
    }

    fn start(self: &Rc<Self>, request: DiskRequest, active: &Active) {
        self.in_flight.set(self.in_flight.get() + 1);
        let worker = Rc::clone(self);
        let memory = Arc::clone(active.queue.memory());
        let facts = Arc::clone(&active.facts);
        self.ring.spawn(async move {
            let head = request.head;
            let written = request.execute(&worker.path, &memory, &facts).await;
            worker.complete(head, written);
        });
    }

    fn complete(self: &Rc<Self>, head: u16, written: u32) {
        if let Some(active) = self.active.borrow_mut().as_mut()
            && let Err(error) = active.queue.complete(head, written)
        {
            active.queue.give_up(&error);
        }
        self.in_flight.set(self.in_flight.get() - 1);
        if self.in_flight.get() == 0 {
            self.waiting_for_idle.take().into_iter().for_each(Waker::wake);
        }
        self.pump();
    }

    /// Waits until no request is in flight. The caller has seen to it that none starts.
    async fn idle(&self) {
        poll_fn(|context| {
            if self.in_flight.get() == 0 {
                return Poll::Ready(());
            }
            self.waiting_for_idle.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Lets the guest's requests end, then makes the image clean for its next user, who may open it once the thread
    /// has ended and dropped it.
    async fn close(self: &Rc<Self>) -> Result<(), BlockError> {
        let quiet = DiskContext { worker: Rc::clone(self) }.quiesce().await;
        self.deactivate();
        drop(quiet);
        self.path.device().close().await
    }
}
