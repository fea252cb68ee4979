//! The end of a guest: the first reason given, for whoever waits or polls.
//!
//! What never enters: what to do about it.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::Error;
use crate::kvm::{ExitListener, ExitReason};

pub(super) struct Exit {
    reason: Mutex<Option<ExitReason>>,
    ended: Condvar,
    event: EventFd,
}

impl Exit {
    pub(super) fn new() -> Result<Self, Error> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::Event)?;
        Ok(Self { reason: Mutex::new(None), ended: Condvar::new(), event })
    }

    pub(super) fn reason(&self) -> Option<ExitReason> {
        self.lock().clone()
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    pub(super) fn wait(&self) -> ExitReason {
        let mut reason = self.lock();
        loop {
            if let Some(reason) = &*reason {
                return reason.clone();
            }
            reason = self.ended.wait(reason).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<ExitReason>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a guest's end without keeping its machine alive.
pub struct ExitWatch(pub(super) std::sync::Arc<Exit>);

impl ExitWatch {
    /// Waits until the guest ends.
    pub fn wait(&self) -> ExitReason {
        self.0.wait()
    }
}

impl ExitListener for Exit {
    fn ended(&self, id: u8, reason: ExitReason) {
        tracing::info!(vcpu = id, ?reason, "the guest has ended");
        self.lock().get_or_insert(reason);
        self.ended.notify_all();
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot signal the guest's end");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let exit = Exit::new().unwrap();
        assert_eq!(exit.reason(), None);
        exit.ended(0, ExitReason::Reset);
        exit.ended(1, ExitReason::Shutdown);
        assert_eq!(exit.wait(), ExitReason::Reset);
        assert_eq!(exit.event().read().unwrap(), 2);
    }
}
