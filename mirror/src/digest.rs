//! Proofs that both sides hold the same bytes, without reading them again in the pause.
//!
//! RAM: each side keeps the checksum of every page as last sent or as it arrived in guest memory; after the final pages the tables
//! are equal or something was lost, swapped or damaged. Disks: each side keeps a BLAKE3 chain over the operations it sent or
//! applied, in order. Both end in one BLAKE3 digest that is compared before the commit.
//! Lives here: the tables and chains. Never enters: reading RAM or disks.

/// Checksum of a page or a frame: CRC-64/NVME, never 0 (0 stands for "never sent or all zeroes").
pub fn checksum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes).max(1)
}

/// Checksums of all pages of a RAM, 8 bytes a page.
#[derive(Debug, Clone)]
pub struct PageSums(Vec<u64>);

impl PageSums {
    /// For `pages` pages, all untouched.
    pub fn new(pages: u64) -> Self {
        Self(vec![0; pages as usize])
    }

    /// Notes a page's checksum; 0 = it is all zeroes.
    pub fn set(&mut self, page: u64, sum: u64) {
        self.0[page as usize] = sum;
    }

    /// The checksum noted for a page.
    pub fn get(&self, page: u64) -> u64 {
        self.0[page as usize]
    }

    /// BLAKE3 of the table.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = [0u8; 8 * 1024];
        for chunk in self.0.chunks(1024) {
            for (sum, out) in chunk.iter().zip(buffer.chunks_exact_mut(8)) {
                out.copy_from_slice(&sum.to_le_bytes());
            }
            hasher.update(&buffer[..chunk.len() * 8]);
        }
        *hasher.finalize().as_bytes()
    }
}

/// Chain over the block operations of one disk.
#[derive(Debug, Clone, Default)]
pub struct BlockChain {
    hasher: blake3::Hasher,
}

impl BlockChain {
    /// Adds an operation: its frame header bytes, which hold kind, offset, length and the data's checksum.
    pub fn add(&mut self, header: &[u8]) {
        self.hasher.update(header);
    }

    /// BLAKE3 of the chain so far.
    pub fn digest(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }
}

/// One digest over RAM and disks, disks in plan order.
pub fn combine(ram: Option<[u8; 32]>, disks: &[[u8; 32]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[u8::from(ram.is_some())]);
    hasher.update(&ram.unwrap_or_default());
    for disk in disks {
        hasher.update(disk);
    }
    *hasher.finalize().as_bytes()
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_page_changes_the_digest() {
        let (mut a, mut b) = (PageSums::new(5000), PageSums::new(5000));
        assert_eq!(a.digest(), b.digest());
        a.set(4999, checksum(&[1; 4096]));
        assert_ne!(a.digest(), b.digest());
        b.set(4999, checksum(&[1; 4096]));
        assert_eq!(a.digest(), b.digest());
    }

    #[test]
    fn order_of_operations_counts() {
        let (mut a, mut b) = (BlockChain::default(), BlockChain::default());
        a.add(b"1");
        a.add(b"2");
        b.add(b"2");
        b.add(b"1");
        assert_ne!(combine(None, &[a.digest()]), combine(None, &[b.digest()]));
    }
}
