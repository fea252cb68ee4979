//! How a future is woken while its ring's thread sleeps in the kernel: a flag, and an eventfd the ring polls.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Waker of one ring. Any thread may wake it.
pub(super) struct RingWaker {
    /// Something became runnable since the executor was last polled.
    woken: AtomicBool,
    /// The ring's thread is in, or about to enter, a wait in the kernel.
    asleep: AtomicBool,
    event: EventFd,
}

impl RingWaker {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Self { woken: AtomicBool::new(true), asleep: AtomicBool::new(false), event }))
    }

    /// The eventfd that turns readable when a sleeping ring is woken.
    pub(super) fn fd(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }

    /// Forgets wake-ups so far; call before polling.
    pub(super) fn clear(&self) {
        self.woken.store(false, Ordering::SeqCst);
    }

    /// Announces a wait. `false`: a wake-up came first, do not wait.
    pub(super) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        // A waker sets `woken` before it looks at `asleep`, so one of the two sides always sees the other.
        if self.woken.load(Ordering::SeqCst) {
            self.asleep.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// Ends a wait.
    pub(super) fn wake_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Takes the eventfd's count, so that it is quiet again.
    pub(super) fn drain(&self) {
        // Nothing to read only means that another completion drained it already.
        let _ = self.event.read();
    }
}

impl Wake for RingWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            // The count cannot overflow: one write per sleep, and every sleep ends with a read.
            let _ = self.event.write(1);
        }
    }
}
