//! One `io_uring` per disk thread, with a single-threaded executor driven by it.
//!
//! Futures run on this ring are `!Send` and may share state by `Rc`. Wakers may be called from any thread, so a
//! task may wait for a channel that another thread feeds. What never enters: policy about disks or guests.

mod core;
mod wake;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_executor::LocalExecutor;
use io_uring::{opcode, types};

pub(crate) use self::core::{Hold, OnDrop, Op, RingCore};

/// A ring and the tasks that run on it. Made on, and bound to, one thread.
pub struct Ring {
    /// Replaced as a whole by [`Ring::shutdown`].
    tasks: RefCell<Rc<LocalExecutor<'static>>>,
    core: Rc<RingCore>,
    driving: Cell<bool>,
}

impl Ring {
    /// Makes a ring for the calling thread with room for `entries` submissions at a time (a power of two; the
    /// kernel rounds up). Fails when the kernel has no `io_uring` or forbids it (`ENOSYS`, `EPERM`, `ENOMEM`).
    pub fn new(entries: u32) -> io::Result<Rc<Self>> {
        Ok(Rc::new(Self {
            tasks: RefCell::new(Rc::new(LocalExecutor::new())),
            core: Rc::new(RingCore::new(entries)?),
            driving: Cell::new(false),
        }))
    }

    pub(crate) fn core(&self) -> &Rc<RingCore> {
        &self.core
    }

    /// Starts a task. It runs whenever some [`Ring::block_on`] drives the ring.
    ///
    /// A task that holds an `Rc<Ring>` keeps the ring alive: end such tasks, or call [`Ring::shutdown`].
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.tasks.borrow().spawn(future).detach();
    }

    /// Drops every spawned task, waiting for disk operations they have in flight. Call it outside of tasks.
    pub fn shutdown(&self) {
        // The old executor, with its tasks, goes at the end of the statement, outside of the borrow.
        drop(self.tasks.replace(Rc::new(LocalExecutor::new())));
    }

    /// Drives tasks and the ring until `future` is done.
    ///
    /// # Panics
    /// When called from inside itself, or when the kernel refuses the ring for good.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        assert!(!self.driving.replace(true), "Ring::block_on was called from inside itself");
        let _reset = ResetOnDrop(&self.driving);
        let executor = Rc::clone(&self.tasks.borrow());
        let mut future = pin!(executor.run(future));
        let wake = &self.core.waker;
        let waker = Waker::from(Arc::clone(wake));
        let mut context = Context::from_waker(&waker);
        loop {
            wake.clear();
            if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
                return value;
            }
            let wait = wake.fall_asleep();
            let turned = self.core.turn(wait);
            wake.wake_up();
            turned.expect("io_uring_enter works on a ring that was set up");
        }
    }

    /// Waits until `fd` (an eventfd, a pipe, a socket) is readable.
    ///
    /// The caller keeps `fd` open while it waits; closing it early only means that the wait may never end.
    pub async fn readable(&self, fd: RawFd) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build();
        // SAFETY: a poll points to no memory.
        unsafe { self.core.start(entry, Hold::Nothing, OnDrop::Cancel) }?.await?;
        Ok(())
    }

    /// Waits for `time`.
    pub async fn sleep(&self, time: Duration) -> io::Result<()> {
        let timespec = Box::new(types::Timespec::from(time));
        let entry = opcode::Timeout::new(&raw const *timespec).build();
        // SAFETY: the only memory is the time, which the slot holds until the completion.
        match unsafe { self.core.start(entry, Hold::Timespec(timespec), OnDrop::Cancel) }?.await {
            Err(e) if e.raw_os_error() == Some(libc::ETIME) => Ok(()),
            other => other.map(drop),
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

struct ResetOnDrop<'a>(&'a Cell<bool>);

impl Drop for ResetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    /// The smallest cross-thread one-shot: a mutex, a value and a waker.
    mod oneshot {
        use std::future::{Future, poll_fn};
        use std::sync::{Arc, Mutex};
        use std::task::{Poll, Waker};

        type Shared<T> = Arc<Mutex<(Option<T>, Option<Waker>)>>;

        pub(super) struct Sender<T>(Shared<T>);

        impl<T> Sender<T> {
            pub(super) fn send(self, value: T) {
                let waker = {
                    let mut shared = self.0.lock().unwrap();
                    shared.0 = Some(value);
                    shared.1.take()
                };
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        }

        pub(super) fn channel<T>() -> (Sender<T>, impl Future<Output = T>) {
            let shared: Shared<T> = Arc::new(Mutex::new((None, None)));
            let receiver = Arc::clone(&shared);
            let future = poll_fn(move |context| {
                let mut shared = receiver.lock().unwrap();
                match shared.0.take() {
                    Some(value) => Poll::Ready(value),
                    None => {
                        shared.1 = Some(context.waker().clone());
                        Poll::Pending
                    }
                }
            });
            (Sender(shared), future)
        }
    }

    #[test]
    fn a_task_woken_by_another_thread_goes_on() {
        let ring = Ring::new(8).unwrap();
        for _ in 0..100 {
            let (sender, receiver) = oneshot::channel();
            let thread = std::thread::spawn(move || sender.send(7));
            assert_eq!(ring.block_on(receiver), 7);
            thread.join().unwrap();
        }
    }

    #[test]
    fn spawned_tasks_run_while_a_future_is_driven() {
        let ring = Ring::new(8).unwrap();
        let (sender, receiver) = oneshot::channel();
        ring.spawn(async move { sender.send(3) });
        assert_eq!(ring.block_on(receiver), 3);
    }

    #[test]
    fn readable_waits_for_an_eventfd() {
        let ring = Ring::new(8).unwrap();
        let event = Arc::new(nix::sys::eventfd::EventFd::new().unwrap());
        let fd = std::os::fd::AsFd::as_fd(&*event).as_raw_fd();
        let writer = Arc::clone(&event);
        let thread = std::thread::spawn(move || writer.write(1).unwrap());
        ring.block_on(ring.readable(fd)).unwrap();
        assert_eq!(event.read().unwrap(), 1);
        thread.join().unwrap();
    }

    #[test]
    fn a_dropped_poll_leaves_the_ring_usable() {
        let ring = Ring::new(8).unwrap();
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        let fd = std::os::fd::AsFd::as_fd(&event).as_raw_fd();
        for _ in 0..50 {
            let mut wait = Box::pin(ring.readable(fd));
            assert!(wait.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        event.write(1).unwrap();
        ring.block_on(ring.readable(fd)).unwrap();
        ring.block_on(ring.sleep(Duration::from_millis(1))).unwrap();
    }

    #[test]
    fn shutdown_drops_tasks_that_hold_the_ring() {
        let ring = Ring::new(8).unwrap();
        let held = Rc::clone(&ring);
        ring.spawn(async move { held.sleep(Duration::from_hours(1)).await.unwrap() });
        let (sender, receiver) = oneshot::channel();
        ring.spawn(async move { sender.send(()) });
        ring.block_on(receiver);
        ring.shutdown();
        assert_eq!(Rc::strong_count(&ring), 1);
    }
}
