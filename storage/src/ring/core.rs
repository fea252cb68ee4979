//! The ring proper: submission, completion, and the state of every operation in flight.
//!
//! An operation's state lives in a slot until its completion came, whatever happens to the future that waits for
//! it. A future that owns or borrows memory the kernel may touch blocks in `drop` until the kernel is done with it.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::wake::RingWaker;

/// `user_data` of completions nobody waits for (cancellations).
const IGNORED: u64 = u64::MAX;
/// `user_data` of the poll on the waker's eventfd.
const WAKE: u64 = u64::MAX - 1;
/// Registered file slots per ring; files beyond that are used by descriptor.
const FIXED_FILES: u32 = 64;

/// What must stay in memory until an operation completes, beside the data buffers.
pub(crate) enum Hold {
    /// Nothing.
    Nothing,
    /// The vector list of a readv or writev.
    Iovecs(#[allow(dead_code, reason = "kept alive for the kernel, never read")] Vec<libc::iovec>),
    /// The time of a timeout.
    Timespec(#[allow(dead_code, reason = "kept alive for the kernel, never read")] Box<types::Timespec>),
}

/// What dropping the future of an unfinished operation does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnDrop {
    /// Wait: the kernel may still touch caller memory, or change a file behind a later request's back.
    Wait,
    /// Cancel and forget: no memory, no file contents involved (polls, timers).
    Cancel,
}

enum State {
    Free,
    Pending { waker: Option<Waker>, _hold: Hold, orphan: bool },
    Done(i32),
}

struct Slot {
    /// Counts reuses, so that a late completion is never taken for a newer operation's.
    generation: u32,
    state: State,
}

#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Key(u64);

impl Key {
    fn index(self) -> usize {
        (self.0 & u64::from(u32::MAX)) as usize
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl Slots {
    fn insert(&mut self, hold: Hold) -> Key {
        let state = State::Pending { waker: None, _hold: hold, orphan: false };
        let index = if let Some(index) = self.free.pop() {
            self.slots[index as usize].state = state;
            index
        } else {
            self.slots.push(Slot { generation: 0, state });
            (self.slots.len() - 1) as u32
        };
        Key(u64::from(self.slots[index as usize].generation) << 32 | u64::from(index))
    }

    fn release(&mut self, key: Key) -> State {
        let slot = &mut self.slots[key.index()];
        // The two highest generations are left out: with them a key could look like `IGNORED` or `WAKE`.
        slot.generation = if slot.generation >= u32::MAX - 2 { 0 } else { slot.generation + 1 };
        self.free.push(key.index() as u32);
        std::mem::replace(&mut slot.state, State::Free)
    }

    /// Records a completion and returns the waker to call, and the state to drop, outside of any borrow.
    fn complete(&mut self, key: Key, result: i32) -> (Option<Waker>, Option<State>) {
        let Some(slot) = self.slots.get_mut(key.index()) else { return (None, None) };
        if slot.generation != key.generation() {
            return (None, None);
        }
        match &mut slot.state {
            State::Pending { orphan: true, .. } => (None, Some(self.release(key))),
            State::Pending { waker, .. } => {
                let waker = waker.take();
                (waker, Some(std::mem::replace(&mut slot.state, State::Done(result))))
            }
            State::Free | State::Done(_) => (None, None),
        }
    }
}

/// One `io_uring` with its operations. Belongs to one thread.
pub(crate) struct RingCore {
    uring: RefCell<IoUring>,
    slots: RefCell<Slots>,
    fixed_free: RefCell<Vec<u32>>,
    pub(super) waker: Arc<RingWaker>,
}

impl RingCore {
    pub(super) fn new(entries: u32) -> io::Result<Self> {
        // Kernels before 6.1 know neither flag; the ring works without, completions only cost interrupts.
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(entries.saturating_mul(4))
            .setup_clamp()
            .build(entries)
            .or_else(|_| IoUring::new(entries))?;
        let fixed = uring.submitter().register_files_sparse(FIXED_FILES).is_ok();
        let core = Self {
            uring: RefCell::new(uring),
            slots: RefCell::default(),
            fixed_free: RefCell::new(if fixed { (0..FIXED_FILES).rev().collect() } else { Vec::new() }),
            waker: RingWaker::new()?,
        };
        core.arm_waker()?;
        Ok(core)
    }

    fn arm_waker(&self) -> io::Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(self.waker.fd()), libc::POLLIN as u32).multi(true);
        self.push(&poll.build().user_data(WAKE))
    }

    /// Puts `fd` in a registered slot; `None` when there is none left.
    pub(crate) fn register_file(&self, fd: RawFd) -> Option<u32> {
        let slot = self.fixed_free.borrow_mut().pop()?;
        if self.uring.borrow().submitter().register_files_update(slot, &[fd]).is_ok() {
            Some(slot)
        } else {
            self.fixed_free.borrow_mut().push(slot);
            None
        }
    }

    /// Empties a registered slot.
    pub(crate) fn unregister_file(&self, slot: u32) {
        // A slot that cannot be emptied keeps its file and is not given out again.
        if self.uring.borrow().submitter().register_files_update(slot, &[-1]).is_ok() {
            self.fixed_free.borrow_mut().push(slot);
        }
    }

    fn push(&self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: whatever the entry points to is kept until its completion: `Hold` in the slot for lists and
            // times, and the caller of `start` for data buffers.
            if unsafe { self.uring.borrow_mut().submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
            self.reap();
        }
    }

    fn enter(&self, want: usize) -> io::Result<()> {
        match self.uring.borrow().submit_and_wait(want) {
            Ok(_) => Ok(()),
            // Interrupted, or the completion queue is full: reap and come again.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Submits what is queued, waits for one completion if `wait`, and hands out what completed.
    pub(super) fn turn(&self, wait: bool) -> io::Result<()> {
        self.enter(usize::from(wait))?;
        self.reap();
        Ok(())
    }

    fn reap(&self) {
        loop {
            let entry: Option<cqueue::Entry> = self.uring.borrow_mut().completion().next();
            let Some(entry) = entry else { return };
            match entry.user_data() {
                IGNORED => {}
                WAKE => {
                    self.waker.drain();
                    if !cqueue::more(entry.flags()) {
                        // Without its wake-up poll the thread could sleep for ever; there is no going on.
                        self.arm_waker().expect("the ring takes its wake-up poll");
                    }
                }
                key => {
                    let (waker, old) = self.slots.borrow_mut().complete(Key(key), entry.result());
                    drop(old);
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                }
            }
        }
    }

    /// Starts an operation.
    ///
    /// # Safety
    /// Memory that `entry` points to, other than what `hold` owns, must stay valid (and, if the kernel writes it,
    /// otherwise unused) until the returned future completed or was dropped; the future must not be leaked.
    /// With `OnDrop::Cancel` the entry must not point to any such memory.
    pub(crate) unsafe fn start(
        self: &Rc<Self>,
        entry: squeue::Entry,
        hold: Hold,
        on_drop: OnDrop,
    ) -> io::Result<Op> {
        let key = self.slots.borrow_mut().insert(hold);
        if let Err(e) = self.push(&entry.user_data(key.0)) {
            self.slots.borrow_mut().release(key);
            return Err(e);
        }
        Ok(Op { core: Rc::clone(self), key: Some(key), on_drop })
    }
}

impl std::fmt::Debug for RingCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RingCore")
    }
}

/// Future of one operation; gives the completion's result.
#[must_use = "an operation does nothing useful unless awaited"]
pub(crate) struct Op {
    core: Rc<RingCore>,
    /// `None` once the result was taken.
    key: Option<Key>,
    on_drop: OnDrop,
}

impl Op {
    /// Takes the result if the completion is there.
    fn take(&mut self) -> Option<i32> {
        let key = self.key?;
        let mut slots = self.core.slots.borrow_mut();
        if let State::Done(result) = slots.slots[key.index()].state {
            slots.release(key);
            self.key = None;
            return Some(result);
        }
        None
    }
}

impl Future for Op {
    type Output = io::Result<u32>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("an operation is not polled after its end");
        if let Some(result) = self.take() {
            return Poll::Ready(u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)));
        }
        let mut old = Some(context.waker().clone());
        if let State::Pending { waker, .. } = &mut self.core.slots.borrow_mut().slots[key.index()].state {
            std::mem::swap(waker, &mut old);
        }
        // `old` is dropped here, outside of the borrow: dropping a waker may run foreign code.
        Poll::Pending
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        if self.take().is_some() {
            return;
        }
        let cancel = opcode::AsyncCancel::new(key.0).build().user_data(IGNORED);
        match self.on_drop {
            OnDrop::Cancel => {
                let old = match &mut self.core.slots.borrow_mut().slots[key.index()].state {
                    State::Pending { waker, orphan, .. } => {
                        *orphan = true;
                        waker.take()
                    }
                    State::Free | State::Done(_) => None,
                };
                drop(old);
                // If the cancellation cannot be queued the operation simply stays until it ends by itself.
                let _ = self.core.push(&cancel);
            }
            OnDrop::Wait => {
                while self.take().is_none() {
                    if let Err(error) = self.core.turn(true) {
                        // The memory cannot be proven free of the kernel's hands, and there is no way to go on.
                        eprintln!("io_uring_enter failed with an operation in flight: {error}");
                        std::process::abort();
                    }
                }
            }
        }
    }
}
