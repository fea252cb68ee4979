//! A virtio-blk request, taken apart and executed (virtio 1.2 section 5.2.6).
//!
//! What lives here: the checks of what a guest asks, the status it gets. What never enters: rings, threads, image
//! formats.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::DiskPath;
use crate::GuestMemory;
use crate::virtio::{BadChain, Buffers, Chain};

/// Bytes of a sector, the unit of all addresses whatever the block size.
pub const SECTOR: u64 = 512;
/// Most sectors of one discard or write-zeroes segment: 4 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 8 << 20;
/// Most segments of one discard or write-zeroes request.
pub const MAX_DISCARD_SEGMENTS: u32 = 32;
/// Most bytes of one read or write. Linux asks for 1.25 MiB; the cap bounds what unaligned buffers cost in copies.
const MAX_TRANSFER: u64 = 32 << 20;

const HEADER_BYTES: u64 = 16;
const SEGMENT_BYTES: u64 = 16;

/// A status other than OK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// The request is malformed, out of range, or the disk failed.
    Io,
    /// The request is none we know.
    Unsupported,
}

/// A request with its parts apart.
pub struct DiskRequest {
    /// Names the chain in the used ring.
    pub head: u16,
    header: Buffers,
    input: Buffers,
    output: Buffers,
    status: Buffers,
}

/// What a disk is, as far as requests must know.
pub struct DiskFacts {
    /// Size in sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// What GET_ID answers; cut at 20 bytes.
    pub serial: String,
}

impl DiskRequest {
    /// Finds header and status, wherever the driver's framing put them.
    pub fn new(chain: Chain) -> Result<Self, BadChain> {
        let Chain { head, readable: mut input, writable: mut output } = chain;
        let header = input.split_front(HEADER_BYTES).ok_or(BadChain::Frame)?;
        let status = output.split_back(1).ok_or(BadChain::Frame)?;
        Ok(Self { head, header, input, output, status })
    }

    /// Does what is asked and writes the status. Returns the number of bytes written into the chain.
    pub async fn execute(self, path: &DiskPath, memory: &GuestMemory, facts: &DiskFacts) -> u32 {
        let (status, written) = match self.perform(path, memory, facts).await {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        match self.status.write(memory, &[status as u8]) {
            Ok(()) => written + 1,
            Err(error) => {
                tracing::debug!(%error, "the status of a block request lies outside of memory");
                0
            }
        }
    }

    async fn perform(
        &self,
        path: &DiskPath,
        memory: &GuestMemory,
        facts: &DiskFacts,
    ) -> Result<u32, Refusal> {
        let mut header = [0; HEADER_BYTES as usize];
        self.header.read(memory, &mut header).map_err(|_| Refusal::Io)?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = le64(&header[8..]);
        let changes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
        if changes && facts.read_only {
            return Err(Refusal::Io);
        }
        let done = match kind {
            VIRTIO_BLK_T_IN => {
                let offset = facts.transfer(sector, self.output.len())?;
                let buffers = self.output.slices(memory).map_err(|_| Refusal::Io)?;
                path.read(offset, &buffers).await.map(|()| self.output.len() as u32)
            }
            VIRTIO_BLK_T_OUT => {
                let offset = facts.transfer(sector, self.input.len())?;
                let data = self.input.slices(memory).map_err(|_| Refusal::Io)?;
                path.write(offset, &data).await.map(|()| 0)
            }
            VIRTIO_BLK_T_FLUSH => path.flush().await.map(|()| 0),
            VIRTIO_BLK_T_GET_ID => return self.get_id(memory, &facts.serial),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let discard = kind == VIRTIO_BLK_T_DISCARD;
                let mut done = Ok(0);
                for segment in self.segments(memory, facts, discard)? {
                    let Segment { offset, len, unmap } = segment;
                    done = if discard {
                        path.discard(offset, len).await
                    } else {
                        path.write_zeroes(offset, len, unmap).await
                    }
                    .map(|()| 0);
                    if done.is_err() {
                        break;
                    }
                }
                done
            }
            _ => return Err(Refusal::Unsupported),
        };
        done.map_err(|error| {
            tracing::warn!(%error, kind, sector, "a guest's disk request failed");
            Refusal::Io
        })
    }

    fn get_id(&self, memory: &GuestMemory, serial: &str) -> Result<u32, Refusal> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let len = serial.len().min(id.len());
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let room = self.output.len().min(id.len() as u64) as usize;
        self.output.write(memory, &id[..room]).map_err(|_| Refusal::Io)?;
        Ok(room as u32)
    }

    /// The ranges of a discard or write-zeroes request, all checked before the first is touched.
    fn segments(
        &self,
        memory: &GuestMemory,
        facts: &DiskFacts,
        discard: bool,
    ) -> Result<Vec<Segment>, Refusal> {
        let bytes = self.input.len();
        let count = bytes / SEGMENT_BYTES;
        if !bytes.is_multiple_of(SEGMENT_BYTES) || count == 0 || count > u64::from(MAX_DISCARD_SEGMENTS) {
            return Err(Refusal::Io);
        }
        let mut raw = vec![0; bytes as usize];
        self.input.read(memory, &mut raw).map_err(|_| Refusal::Io)?;
        raw.chunks_exact(SEGMENT_BYTES as usize)
            .map(|segment| {
                let sectors_and_flags = le64(&segment[8..]);
                let (sectors, flags) = (sectors_and_flags as u32, (sectors_and_flags >> 32) as u32);
                // Section 5.2.6.2: the unmap flag is for write-zeroes only, all others are reserved.
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && flags != 0 {
                    return Err(Refusal::Unsupported);
                }
                if sectors > MAX_DISCARD_SECTORS {
                    return Err(Refusal::Io);
                }
                let (offset, len) = facts.range(le64(segment), u64::from(sectors))?;
                Ok(Segment { offset, len, unmap: flags != 0 })
            })
            .collect()
    }
}

struct Segment {
    offset: u64,
    len: u64,
    unmap: bool,
}

impl DiskFacts {
    /// Byte offset of a transfer of `bytes` at `sector`.
    fn transfer(&self, sector: u64, bytes: u64) -> Result<u64, Refusal> {
        if !bytes.is_multiple_of(SECTOR) || bytes > MAX_TRANSFER {
            return Err(Refusal::Io);
        }
        self.range(sector, bytes / SECTOR).map(|(offset, _)| offset)
    }

    /// Byte offset and length of a range of sectors inside the disk.
    fn range(&self, sector: u64, sectors: u64) -> Result<(u64, u64), Refusal> {
        let end = sector.checked_add(sectors).ok_or(Refusal::Io)?;
        // The end is within the disk, so its byte offset fits as the disk's size does.
        if end <= self.sectors { Ok((sector * SECTOR, sectors * SECTOR)) } else { Err(Refusal::Io) }
    }
}

/// The first eight bytes, little-endian; the caller has them.
fn le64(bytes: &[u8]) -> u64 {
    bytes[..8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_stay_inside_the_disk() {
        let facts = DiskFacts { sectors: 100, read_only: false, serial: String::new() };
        assert_eq!(facts.transfer(99, 512), Ok(99 * 512));
        assert_eq!(facts.transfer(100, 0), Ok(100 * 512));
        assert_eq!(facts.transfer(99, 1024), Err(Refusal::Io));
        assert_eq!(facts.transfer(0, 100), Err(Refusal::Io));
        assert_eq!(facts.transfer(u64::MAX, 512), Err(Refusal::Io));
        assert_eq!(facts.transfer(0, MAX_TRANSFER + 512), Err(Refusal::Io));
    }

    #[test]
    fn little_endian() {
        assert_eq!(le64(&[1, 2, 0, 0, 0, 0, 0, 0x80, 9]), 0x8000_0000_0000_0201);
    }
}
