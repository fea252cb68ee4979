//! Dirty pages: KVM's log of the guest's writes, joined with the log of the VMM's own.
//!
//! What never enters: what is done with the pages, and who gives bits back after a failed send (the caller).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::GuestMemoryBackend;

use super::Error;
use crate::kvm::Vm;

/// The dirty log of one VM, over the dense page index.
///
/// A page is dirty if the guest wrote it (KVM's log) or if the VMM did (rings, completed disk reads; the bitmap of
/// the guest memory itself).
pub struct DirtyLog {
    vm: Arc<Vm>,
    on: AtomicBool,
}

impl DirtyLog {
    /// A log that is off.
    pub fn new(vm: Arc<Vm>) -> Self {
        Self { vm, on: AtomicBool::new(false) }
    }

    /// Starts logging with nothing dirty. Pages written before this call are not in the log: send every
    /// [resident](super::GuestRam::resident) page once, asked for after this call.
    ///
    /// # Errors
    /// [`Error::DirtyLogState`] if it is on, [`Error::DirtyLog`] if KVM refuses (then it is off).
    pub fn start_logging(&self) -> Result<(), Error> {
        if self.on.swap(true, Ordering::SeqCst) {
            return Err(Error::DirtyLogState("already on"));
        }
        let started = self.vm.log_dirty_pages(true);
        if started.is_err() {
            let _ = self.stop_logging();
            return started;
        }
        // Whatever a device wrote until now belongs to the resident pages.
        for region in self.vm.ram().memory().iter() {
            region.bitmap().reset();
        }
        Ok(())
    }

    /// Takes the pages dirtied since the start or the last call, one bit a page. The bits are now the caller's: one
    /// that is not sent and acknowledged must be kept and sent later, the log has forgotten it.
    ///
    /// # Errors
    /// [`Error::DirtyLogState`] if the log is off; [`Error::DirtyLog`] if KVM fails: bits taken up to then are lost,
    /// so the move must be given up.
    pub fn collect(&self) -> Result<Vec<u64>, Error> {
        if !self.on.load(Ordering::SeqCst) {
            return Err(Error::DirtyLogState("off"));
        }
        let ram = self.vm.ram();
        let mut dirty = Vec::with_capacity(ram.layout().bitmap_words());
        for (slot, (range, region)) in ram.layout().ranges().iter().zip(ram.memory().iter()).enumerate() {
            let by_guest =
                self.vm.fd().get_dirty_log(slot as u32, range.len as usize).map_err(|source| {
                    Error::DirtyLog { gpa: range.gpa, what: "read", source: source.into() }
                })?;
            let by_vmm = region.bitmap().get_and_reset();
            dirty.extend(by_guest.iter().zip(&by_vmm).map(|(guest, vmm)| guest | vmm));
        }
        Ok(dirty)
    }

    /// Stops logging, as often as wanted; bits not collected are forgotten.
    ///
    /// # Errors
    /// [`Error::DirtyLog`] if KVM refuses.
    pub fn stop_logging(&self) -> Result<(), Error> {
        self.vm.log_dirty_pages(false)?;
        self.on.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the log is on.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }
}
