//! A queue as a device serves it: chains out of the available ring, results into the used ring, interrupts when
//! the driver wants them.
//!
//! What lives here: the checks around `virtio-queue`, whose own iterator swallows what is wrong with a ring. What
//! never enters: what a chain asks for.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{BadChain, Chain};
use super::{ActiveQueue, Interrupt, RingPosition};
use crate::SharedMemory;

/// Layout of the rings (virtio 1.2 section 2.7): what comes before the elements, and a used element.
const AVAILABLE_HEADER_BYTES: u64 = 4;
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

/// A ring that cannot be served any more.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// `virtio-queue` refused an index or an address.
    #[error("ring of queue {index}: {source}")]
    Queue {
        /// The queue's number.
        index: u16,
        /// The reason.
        source: virtio_queue::Error,
    },
    /// A chain that leads nowhere.
    #[error("ring of queue {index}: {source}")]
    Chain {
        /// The queue's number.
        index: u16,
        /// What is wrong with it.
        source: BadChain,
    },
    /// The available ring cannot be read.
    #[error("ring of queue {index}: the available ring cannot be read")]
    Unreadable {
        /// The queue's number.
        index: u16,
    },
}

/// One queue in the hands of its device.
pub struct DeviceQueue {
    index: u16,
    queue: Queue,
    memory: SharedMemory,
    interrupt: Arc<Interrupt>,
    gave_up: bool,
}

impl DeviceQueue {
    /// The queue, and the event that counts its notifications.
    pub fn new(active: ActiveQueue, memory: SharedMemory, interrupt: Arc<Interrupt>) -> (EventFd, Self) {
        let ActiveQueue { index, queue, kick } = active;
        (kick, Self { index, queue, memory, interrupt, gave_up: false })
    }

    pub fn index(&self) -> u16 {
        self.index
    }

    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    pub fn position(&self) -> RingPosition {
        RingPosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// The next chain, if the driver has offered one.
    pub fn next(&mut self) -> Result<Option<Chain>, RingError> {
        let index = self.index;
        let fail = |source| RingError::Queue { index, source };
        let offered = self.queue.avail_idx(&*self.memory, Ordering::Acquire).map_err(fail)?;
        if offered.0 == self.queue.next_avail() {
            return Ok(None);
        }
        // The iterator's "none" would mean an entry that cannot be read: something is offered.
        let chain = self.queue.iter(Arc::clone(&self.memory)).map_err(fail)?.next();
        let chain = chain.ok_or(RingError::Unreadable { index })?;
        Chain::parse(chain).map(Some).map_err(|source| self.refuse(source))
    }

    /// The error for a chain that is well-formed but no request.
    pub fn refuse(&self, source: BadChain) -> RingError {
        RingError::Chain { index: self.index, source }
    }

    /// Asks the driver to leave out notifications while the device looks at the ring anyway.
    pub fn quiet(&mut self) -> Result<(), RingError> {
        let index = self.index;
        self.queue.disable_notification(&*self.memory).map_err(|source| RingError::Queue { index, source })
    }

    /// Asks for a notification of the next chain. True if one is there already.
    pub fn listen(&mut self) -> Result<bool, RingError> {
        let index = self.index;
        self.queue.enable_notification(&*self.memory).map_err(|source| RingError::Queue { index, source })
    }

    /// Takes the last chain back that [`next`](Self::next) gave: it comes again.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Gives chain `head` back with `written` bytes written into it, and interrupts the driver if it wants that.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.complete_together(&[(head, written)])
    }

    /// Gives several chains back, in this order, so that the driver sees all of them or none yet (virtio 1.2 section
    /// 5.1.6.3.2 asks for it where one packet fills them).
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) -> Result<(), RingError> {
        let index = self.index;
        let fail = |source| RingError::Queue { index, source };
        let Some(((head, written), before)) = chains.split_last() else { return Ok(()) };
        // `add_used` shows an element at once, so all but the last are put behind the index by hand.
        for (head, written) in before {
            let slot = u64::from(self.queue.next_used() % self.queue.size());
            let mut element = [0; USED_ELEMENT_BYTES as usize];
            element[..4].copy_from_slice(&u32::from(*head).to_le_bytes());
            element[4..].copy_from_slice(&written.to_le_bytes());
            let at = self.queue.used_ring().wrapping_add(USED_HEADER_BYTES + slot * USED_ELEMENT_BYTES);
            self.memory
                .write_slice(&element, GuestAddress(at))
                .map_err(|source| fail(virtio_queue::Error::GuestMemory(source)))?;
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
        }
        self.queue.add_used(&*self.memory, *head, *written).map_err(fail)?;
        if self.interrupt_wanted(chains.len() as u16)? {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Whether [`give_up`](Self::give_up) was called. Nothing more is taken from such a queue.
    pub fn gave_up(&self) -> bool {
        self.gave_up
    }

    /// The device cannot go on with this ring: the driver has to reset it.
    pub fn give_up(&mut self, error: &RingError) {
        tracing::warn!(%error, "the device needs a reset");
        self.gave_up = true;
        self.interrupt.needs_reset();
    }

    /// Whether the driver wants an interrupt for the last `count` used elements: with EVENT_IDX, if one of them is the
    /// one it named (virtio 1.2 section 2.7.7.2); else unless its flag says no.
    fn interrupt_wanted(&self, count: u16) -> Result<bool, RingError> {
        // The driver writes its wish before it looks at the used ring a last time.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let at = if self.queue.event_idx_enabled() {
            available.wrapping_add(AVAILABLE_HEADER_BYTES + u64::from(self.queue.size()) * 2)
        } else {
            available
        };
        let index = self.index;
        let word: u16 = self
            .memory
            .load(GuestAddress(at), Ordering::Relaxed)
            .map_err(|_| RingError::Unreadable { index })?;
        let word = u16::from_le(word);
        if !self.queue.event_idx_enabled() {
            return Ok(u32::from(word) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let passed = Wrapping(self.queue.next_used()) - Wrapping(word) - Wrapping(1);
        Ok(passed.0 < count)
    }
}
