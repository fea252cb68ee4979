//! A value that only the thread that made it may touch, carried by types that must be `Send + Sync`.
//!
//! imago asks its storage objects to be `Send + Sync`, a ring belongs to one thread. The check is at run time:
//! any use from another thread panics, a drop from another thread leaks the value.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::thread::{self, ThreadId};

/// Owner of a `T` that is usable on one thread only.
pub(crate) struct ThreadBound<T> {
    home: ThreadId,
    value: ManuallyDrop<T>,
}

// SAFETY: `value` is only reachable through `deref` and `drop`, which both compare the calling thread with `home`
// before they touch it, so no other thread ever gets at the `T`.
unsafe impl<T> Send for ThreadBound<T> {}
// SAFETY: as above; shared access from another thread panics before it touches the value.
unsafe impl<T> Sync for ThreadBound<T> {}

impl<T> ThreadBound<T> {
    /// Binds `value` to the calling thread.
    pub(crate) fn new(value: T) -> Self {
        Self { home: thread::current().id(), value: ManuallyDrop::new(value) }
    }
}

impl<T> Deref for ThreadBound<T> {
    type Target = T;

    fn deref(&self) -> &T {
        assert_eq!(self.home, thread::current().id(), "a block device was used outside of its ring's thread");
        &self.value
    }
}

impl<T> Drop for ThreadBound<T> {
    fn drop(&mut self) {
        if self.home == thread::current().id() {
            // SAFETY: `value` is not used again, `self` is going away.
            unsafe { ManuallyDrop::drop(&mut self.value) }
        }
    }
}
