//! The control queue (virtio 1.2 section 5.1.6.5): the guest's word that it has announced itself.
//!
//! What never enters: packets. Whatever else a driver asks for is answered with an error, as the features said.

use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::Link;
use crate::virtio::{BadChain, Chain, DeviceQueue, RingError, RingPosition};

/// Class and command.
const COMMAND_BYTES: u64 = 2;

/// The control queue.
pub struct Control {
    queue: DeviceQueue,
    link: Arc<Link>,
}

impl Control {
    pub fn new(queue: DeviceQueue, link: Arc<Link>) -> Self {
        Self { queue, link }
    }

    pub fn position(&self) -> (u16, RingPosition) {
        (self.queue.index(), self.queue.position())
    }

    /// The device's way to give up on the ring.
    pub fn queue(&mut self) -> &mut DeviceQueue {
        &mut self.queue
    }

    /// Answers up to `budget` commands. True if there may be more.
    pub fn pump(&mut self, budget: usize) -> Result<bool, RingError> {
        if self.queue.gave_up() {
            return Ok(false);
        }
        self.queue.quiet()?;
        let mut answered = 0;
        while answered < budget {
            match self.queue.next()? {
                Some(chain) => self.answer(&chain)?,
                None if !self.queue.listen()? => return Ok(false),
                None => continue,
            }
            answered += 1;
        }
        Ok(true)
    }

    fn answer(&mut self, chain: &Chain) -> Result<(), RingError> {
        if chain.readable.len() < COMMAND_BYTES || chain.writable.len() == 0 {
            return Err(self.queue.refuse(BadChain::Frame));
        }
        let unmapped = |_| self.queue.refuse(BadChain::Unmapped);
        let mut command = [0; COMMAND_BYTES as usize];
        chain.readable.read(self.queue.memory(), &mut command).map_err(unmapped)?;
        let known = command.map(u32::from) == [VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK];
        if known {
            self.link.announced();
        }
        let answer = if known { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.writable.write(self.queue.memory(), &[answer as u8]).map_err(unmapped)?;
        self.queue.complete(chain.head, 1)
    }
}
