//! Digests over whole contents, read again: what `--audit` compares in the pause.
//!
//! Chunks that are all zero are left out, so that holes, zero clusters and RAM never touched are the same thing on both sides.
//! Lives here: reading and hashing. Never enters: comparing (the engines do).

use vmove_storage::{AlignedBuf, BlockDevice, BlockError, BlockStatus};

use crate::memory::{self, GuestRam, is_zero};

/// Pages hashed together (256 KiB: BLAKE3 is twice as fast on these as on single pages).
const RAM_PAGES: u64 = 64;
/// Bytes of a disk hashed together.
const DISK_BYTES: u64 = 64 << 10;

/// BLAKE3 of a paused guest's RAM. `resident` (a bit a page) keeps it from touching what the guest never did.
pub fn ram(ram: &GuestRam) -> Result<[u8; 32], memory::Error> {
    let resident = ram.resident()?;
    let mut hasher = blake3::Hasher::new();
    let mut page = 0;
    while page < ram.pages() {
        // Regions begin at multiples of 64 pages, so one word of the map is one chunk.
        let count = ram.layout().contiguous(page, RAM_PAGES).max(1);
        if resident[(page / 64) as usize] != 0 {
            let bytes = ram.bytes_of(page, count)?;
            if !is_zero(bytes) {
                hasher.update(&page.to_le_bytes());
                hasher.update(bytes);
            }
        }
        page += count;
    }
    Ok(*hasher.finalize().as_bytes())
}

/// BLAKE3 of a disk that nobody writes.
pub async fn disk(device: &BlockDevice) -> Result<[u8; 32], BlockError> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = AlignedBuf::zeroed(DISK_BYTES as usize);
    let mut at = 0;
    while at < device.size() {
        let (status, run) = device.block_status(at, device.size() - at).await?;
        // Whole chunks only, counted from 0 on both sides, however their images are cut into runs.
        if status != BlockStatus::Data && run >= DISK_BYTES {
            at += run / DISK_BYTES * DISK_BYTES;
            continue;
        }
        let len = DISK_BYTES.min(device.size() - at) as usize;
        let part = &mut buffer.as_mut_slice()[..len];
        device.read(at, (&mut *part).into()).await?;
        if !is_zero(part) {
            hasher.update(&at.to_le_bytes());
            hasher.update(part);
        }
        at += len as u64;
    }
    Ok(*hasher.finalize().as_bytes())
}
