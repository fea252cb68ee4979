//! Packets from the wire into the guest's receive ring.
//!
//! A packet is read into a buffer of its own first: its length is not known before, and one that comes while the ring is
//! short must be neither lost nor cut. It waits there, and moves with the guest. What never enters: threads.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::sync::Arc;

use super::{ETHERNET_BYTES, HEADER_BYTES, MAX_PACKET};
use crate::virtio::{BadChain, Chain, DeviceQueue, RingError, RingPosition};

/// Where `num_buffers` is in the header (virtio 1.2 section 5.1.6).
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// The receive queue.
pub struct Receive {
    queue: DeviceQueue,
    /// A packet may fill several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    /// Chains taken from the ring and not filled yet.
    staged: VecDeque<Chain>,
    /// Holds the packet that is being delivered.
    buffer: Box<[u8]>,
    /// Its length; 0 for none.
    pending: usize,
    /// Packets that found no place and were let go.
    dropped: u64,
}

impl Receive {
    /// `pending` is a packet that came before, checked by [`check_pending`].
    pub fn new(queue: DeviceQueue, mergeable: bool, pending: Option<&[u8]>) -> Self {
        let mut buffer = vec![0; MAX_PACKET + 1].into_boxed_slice();
        let pending = pending.unwrap_or_default();
        buffer[..pending.len()].copy_from_slice(pending);
        Self { queue, mergeable, staged: VecDeque::new(), buffer, pending: pending.len(), dropped: 0 }
    }

    /// Where the ring stands: chains that are not filled count as not taken.
    pub fn position(&self) -> (u16, RingPosition) {
        let mut position = self.queue.position();
        position.next_avail = position.next_avail.wrapping_sub(self.staged.len() as u16);
        (self.queue.index(), position)
    }

    /// The packet that waits for room.
    pub fn pending(&self) -> Option<Vec<u8>> {
        (self.pending > 0).then(|| self.buffer[..self.pending].to_vec())
    }

    /// The device's way to give up on the ring.
    pub fn queue(&mut self) -> &mut DeviceQueue {
        &mut self.queue
    }

    /// Delivers up to `budget` packets. True if there may be more: call again. False once the wire is empty or the ring is
    /// full: the wire or the guest will tell.
    pub fn pump(&mut self, wire: &File, budget: usize) -> Result<bool, RingError> {
        if self.queue.gave_up() {
            return Ok(false);
        }
        self.queue.quiet()?;
        for _ in 0..budget {
            if self.pending == 0 && !self.read(wire) {
                return Ok(false);
            }
            if self.pending > 0 && !self.deliver()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes a packet from the wire. False if there is none.
    fn read(&mut self, mut wire: &File) -> bool {
        match wire.read(&mut self.buffer) {
            // As long as the buffer is longer than any packet, a full one was cut.
            Ok(len) if (HEADER_BYTES + ETHERNET_BYTES..=MAX_PACKET).contains(&len) => self.pending = len,
            Ok(0) => return false,
            Ok(len) => self.drop_packet(len, "is no packet"),
            Err(error) => {
                // Such as a tap that was switched off or removed: its next event is waited for.
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::debug!(%error, "reading a packet");
                }
                return false;
            }
        }
        true
    }

    /// Writes the packet into the guest's memory. False if the ring has no room for it.
    fn deliver(&mut self) -> Result<bool, RingError> {
        while !self.enough_staged() {
            match self.queue.next()? {
                // A driver that offers what it has offered already would have it go on for ever.
                Some(_) if self.staged.len() >= usize::from(self.queue.size()) => {
                    return Err(self.queue.refuse(BadChain::TooLong));
                }
                Some(chain) => self.staged.push_back(chain),
                None if !self.queue.listen()? => return Ok(false),
                None => {}
            }
        }
        if !self.mergeable
            && self.staged.front().is_none_or(|chain| chain.writable.len() < self.pending as u64)
        {
            self.drop_packet(self.pending, "is too long for the guest's buffer");
            self.pending = 0;
            return Ok(true);
        }
        self.write()?;
        self.pending = 0;
        Ok(true)
    }

    /// Whether the staged chains decide on the packet: they hold it, or it is one chain's to hold or not.
    fn enough_staged(&self) -> bool {
        if self.mergeable {
            self.staged.iter().map(|chain| chain.writable.len()).sum::<u64>() >= self.pending as u64
        } else {
            !self.staged.is_empty()
        }
    }

    /// Fills staged chains with the packet and gives them back.
    fn write(&mut self) -> Result<(), RingError> {
        let memory = Arc::clone(self.queue.memory());
        let mut need = self.pending as u64;
        let mut count = 0;
        while need > 0 {
            need = need.saturating_sub(self.staged[count].writable.len());
            count += 1;
        }
        self.buffer[NUM_BUFFERS].copy_from_slice(&(count as u16).to_le_bytes());
        let mut rest = &self.buffer[..self.pending];
        let mut used = Vec::with_capacity(count);
        for chain in self.staged.drain(..count) {
            let (now, later) =
                rest.split_at(rest.len().min(usize::try_from(chain.writable.len()).unwrap_or(usize::MAX)));
            let written = chain.writable.write(&memory, now);
            written.map_err(|_| self.queue.refuse(BadChain::Unmapped))?;
            used.push((chain.head, now.len() as u32));
            rest = later;
        }
        self.queue.complete_together(&used)
    }

    fn drop_packet(&mut self, bytes: usize, why: &str) {
        self.dropped += 1;
        tracing::debug!(bytes, dropped = self.dropped, "what came {why}");
    }
}

/// Checks a waiting packet out of a saved state.
pub fn check_pending(packet: &[u8]) -> Result<(), String> {
    if (HEADER_BYTES + ETHERNET_BYTES..=MAX_PACKET).contains(&packet.len()) {
        Ok(())
    } else {
        Err(format!("a waiting packet of {} bytes", packet.len()))
    }
}
