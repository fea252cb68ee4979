//! How a device interrupts its guest: vectors, the ISR byte, and the "needs reset" flag.
//!
//! What lives here: the little state that device threads and vCPUs share without the function's lock. What never
//! enters: rings. There is no INTx pin: a guest without MSI-X polls.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use serde::{Deserialize, Serialize};

use crate::pci::Msix;

/// "No vector" (virtio 1.2 section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// ISR bits (virtio 1.2 section 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupts of one device. Shared by its threads and its transport.
pub struct Interrupt {
    msix: Arc<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    needs_reset: AtomicBool,
    /// Not saved: after a restore it begins anew, which a driver in the middle of a read takes as a change.
    generation: AtomicU8,
}

/// The saved part. Plain and public: untrusted until restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptState {
    /// Vector of configuration changes, 0xffff for none.
    pub config_vector: u16,
    /// Vector of each queue, 0xffff for none.
    pub queue_vectors: Vec<u16>,
    /// The ISR byte, not yet read by the guest.
    pub isr: u8,
    /// The device found nonsense and waits for its reset.
    pub needs_reset: bool,
}

impl Interrupt {
    pub(crate) fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        }
    }

    /// Tells the driver that queue `index` has used buffers.
    pub fn queue(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.msix.signal(vector.load(Ordering::Acquire));
        }
    }

    /// Sets `DEVICE_NEEDS_RESET` and tells the driver: the device met something it cannot go on with.
    pub fn needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
            self.msix.signal(self.config_vector.load(Ordering::Acquire));
        }
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix.signal(self.config_vector.load(Ordering::Acquire));
    }

    /// Counts changes of the configuration, so that a driver that read it in pieces knows whether they fit.
    pub(crate) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether [`needs_reset`](Self::needs_reset) was called since the last reset.
    pub fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The guest's read of the ISR byte, which clears it.
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.known(vector), Ordering::Release);
    }

    pub(crate) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors.get(usize::from(index)).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire))
    }

    pub(crate) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(index)) {
            slot.store(self.known(vector), Ordering::Release);
        }
    }

    /// A vector the table does not have reads back as "no vector".
    fn known(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    pub(crate) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    pub(crate) fn state(&self) -> InterruptState {
        InterruptState {
            config_vector: self.config_vector(),
            queue_vectors: self.queue_vectors.iter().map(|v| v.load(Ordering::Acquire)).collect(),
            isr: self.isr.load(Ordering::Acquire),
            needs_reset: self.is_broken(),
        }
    }

    /// Takes a saved state; the caller has checked the number of queues.
    pub(crate) fn restore(&self, state: &InterruptState) {
        self.set_config_vector(state.config_vector);
        for (index, vector) in (0..).zip(&state.queue_vectors) {
            self.set_queue_vector(index, *vector);
        }
        self.isr.store(state.isr & (ISR_QUEUE | ISR_CONFIG), Ordering::Release);
        self.needs_reset.store(state.needs_reset, Ordering::Release);
    }
}
