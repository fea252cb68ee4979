//! A descriptor chain taken apart: what the device may read, what it may write.
//!
//! What lives here: the checks of a chain's shape, and buffers that can be cut anywhere, because a driver may frame a
//! request as it likes (virtio 1.2 section 2.7.4). What never enters: the meaning of the bytes.

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use crate::{GuestMemory, SharedMemory};

/// Most descriptors of one chain, as in QEMU; Linux uses at most 256.
const MAX_DESCRIPTORS: usize = 1024;

/// A piece of guest memory. Writing through it marks its pages dirty.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// Why a chain cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// A link or an indirect table points nowhere, or the links form a loop.
    #[error("a descriptor chain does not end properly")]
    Broken,
    /// A buffer to read comes after one to write (virtio 1.2 section 2.7.4.2).
    #[error("a descriptor chain has a readable buffer behind a writable one")]
    Order,
    /// More descriptors than anyone needs.
    #[error("a descriptor chain has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A buffer lies outside the guest's memory.
    #[error("a descriptor chain has a buffer outside guest memory")]
    Unmapped,
    /// The header or the status is missing, so that the driver cannot even be told.
    #[error("a request has no room for its header or its status")]
    Frame,
}

/// Buffers in guest memory, in order. Their addresses are not checked before [`slices`](Self::slices).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers(Vec<(GuestAddress, u32)>);

/// A request of a driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers,
    /// Where the device answers.
    pub writable: Buffers,
}

impl Chain {
    /// Follows the descriptors.
    pub fn parse(mut chain: DescriptorChain<SharedMemory>) -> Result<Self, BadChain> {
        let head = chain.head_index();
        let mut parsed = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut ended = false;
        for descriptor in chain.by_ref() {
            if parsed.readable.0.len() + parsed.writable.0.len() >= MAX_DESCRIPTORS {
                return Err(BadChain::TooLong);
            }
            ended = !descriptor.has_next();
            if descriptor.is_write_only() {
                parsed.writable.0.push((descriptor.addr(), descriptor.len()));
            } else if parsed.writable.0.is_empty() {
                parsed.readable.0.push((descriptor.addr(), descriptor.len()));
            } else {
                return Err(BadChain::Order);
            }
        }
        // The iterator ends in silence at whatever it cannot follow.
        if ended { Ok(parsed) } else { Err(BadChain::Broken) }
    }
}

impl Buffers {
    /// Bytes in all of them.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// Cuts the first `bytes` off and returns them; none if there are fewer.
    pub fn split_front(&mut self, bytes: u64) -> Option<Self> {
        let rest = self.split_back(self.len().checked_sub(bytes)?)?;
        Some(std::mem::replace(self, rest))
    }

    /// Cuts the last `bytes` off and returns them; none if there are fewer.
    pub fn split_back(&mut self, bytes: u64) -> Option<Self> {
        let mut keep = self.len().checked_sub(bytes)?;
        let mut at = 0;
        while at < self.0.len() && u64::from(self.0[at].1) <= keep {
            keep -= u64::from(self.0[at].1);
            at += 1;
        }
        let mut back = self.0.split_off(at);
        if keep > 0 {
            // `keep` is less than this descriptor's length, so it fits into 32 bits.
            let (address, len) = &mut back[0];
            self.0.push((*address, keep as u32));
            address.0 = address.0.wrapping_add(keep);
            *len -= keep as u32;
        }
        Some(Self(back))
    }

    /// The memory itself. Fails if any part lies outside the guest's.
    pub fn slices<'a>(&self, memory: &'a GuestMemory) -> Result<Vec<GuestSlice<'a>>, GuestMemoryError> {
        let mut slices = Vec::with_capacity(self.0.len());
        for (address, len) in &self.0 {
            for slice in memory.get_slices(*address, *len as usize) {
                slices.push(slice?);
            }
        }
        Ok(slices)
    }

    /// Copies the first bytes into `data`, which is no longer than the buffers.
    pub fn read(&self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut rest = data;
        for (address, len) in &self.0 {
            let (now, later) = rest.split_at_mut(rest.len().min(*len as usize));
            memory.read_slice(now, *address)?;
            rest = later;
        }
        Ok(())
    }

    /// Copies `data`, which is no longer than the buffers, into the first bytes.
    pub fn write(&self, memory: &GuestMemory, data: &[u8]) -> Result<(), GuestMemoryError> {
        let mut rest = data;
        for (address, len) in &self.0 {
            let (now, later) = rest.split_at(rest.len().min(*len as usize));
            memory.write_slice(now, *address)?;
            rest = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers(list: &[(u64, u32)]) -> Buffers {
        Buffers(list.iter().map(|(address, len)| (GuestAddress(*address), *len)).collect())
    }

    #[test]
    fn buffers_are_cut_anywhere() {
        let mut all = buffers(&[(0x1000, 10), (0x2000, 0), (0x3000, 6)]);
        assert_eq!(all.split_front(12), Some(buffers(&[(0x1000, 10), (0x2000, 0), (0x3000, 2)])));
        assert_eq!(all, buffers(&[(0x3002, 4)]));
        assert_eq!(all.split_back(1), Some(buffers(&[(0x3005, 1)])));
        assert_eq!(all, buffers(&[(0x3002, 3)]));
        assert_eq!(all.split_front(4), None);
        assert_eq!(all.split_back(4), None);
        assert_eq!(all.split_front(3).map(|b| b.len()), Some(3));
        assert_eq!(all.len(), 0);
    }

    proptest::proptest! {
        #[test]
        fn cuts_keep_every_byte(lens in proptest::collection::vec(0u32..50, 0..8), at in 0u64..400) {
            let bytes = |b: &Buffers| -> Vec<u64> {
                b.0.iter().flat_map(|(a, l)| (a.0..a.0 + u64::from(*l)).collect::<Vec<_>>()).collect()
            };
            let list: Vec<_> = (1u64..).zip(&lens).map(|(i, l)| (i * 0x1000, *l)).collect();
            let mut rest = buffers(&list);
            let before = bytes(&rest);
            if let Some(front) = rest.split_front(at) {
                proptest::prop_assert_eq!(front.len(), at);
                proptest::prop_assert_eq!([bytes(&front), bytes(&rest)].concat(), before);
            } else {
                proptest::prop_assert!(at > before.len() as u64);
            }
        }
    }
}
