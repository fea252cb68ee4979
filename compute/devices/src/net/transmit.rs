//! Packets from the guest's transmit ring onto the wire, straight out of its memory.
//!
//! A packet is sent and its chain given back before the next one is looked at, so none is ever in flight. What never
//! enters: threads.

use std::fs::File;
use std::io::ErrorKind;

use super::{ETHERNET_BYTES, HEADER_BYTES, MAX_PACKET, sys};
use crate::virtio::{BadChain, DeviceQueue, RingError, RingPosition};

/// The transmit queue.
pub struct Transmit {
    queue: DeviceQueue,
    /// Packets that were none, or that the wire did not take.
    dropped: u64,
}

impl Transmit {
    pub fn new(queue: DeviceQueue) -> Self {
        Self { queue, dropped: 0 }
    }

    pub fn position(&self) -> (u16, RingPosition) {
        (self.queue.index(), self.queue.position())
    }

    /// The device's way to give up on the ring.
    pub fn queue(&mut self) -> &mut DeviceQueue {
        &mut self.queue
    }

    /// Sends up to `budget` packets. True if there may be more: call again. False once the ring is empty or the wire is
    /// full: the guest or the wire will tell.
    pub fn pump(&mut self, wire: &File, budget: usize) -> Result<bool, RingError> {
        if self.queue.gave_up() {
            return Ok(false);
        }
        self.queue.quiet()?;
        let mut sent = 0;
        while sent < budget {
            let Some(chain) = self.queue.next()? else {
                if self.queue.listen()? {
                    continue;
                }
                return Ok(false);
            };
            let bytes = chain.readable.len();
            if (HEADER_BYTES + ETHERNET_BYTES..=MAX_PACKET)
                .contains(&usize::try_from(bytes).unwrap_or(usize::MAX))
            {
                let slices = chain.readable.slices(self.queue.memory());
                let slices = slices.map_err(|_| self.queue.refuse(BadChain::Unmapped))?;
                match sys::send(wire, &slices) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        drop(slices);
                        self.queue.put_back();
                        return Ok(false);
                    }
                    Err(error) => self.drop_packet(bytes, &error.to_string()),
                }
            } else {
                self.drop_packet(bytes, "no packet has this length");
            }
            self.queue.complete(chain.head, 0)?;
            sent += 1;
        }
        Ok(true)
    }

    fn drop_packet(&mut self, bytes: u64, why: &str) {
        self.dropped += 1;
        tracing::debug!(bytes, dropped = self.dropped, why, "a packet of the guest is not sent");
    }
}
