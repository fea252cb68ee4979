//! Which pages of a mapping the host holds, from `/proc/self/pagemap`.
//!
//! What never enters: reading the pages themselves, guest addresses.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::Error;
use super::layout::PAGE_SIZE;

/// Entries read in one go (512 KiB of page map, 256 MiB of memory).
const CHUNK: usize = 65536;
/// "page present" and "page swapped" (kernel documentation, admin-guide/mm/pagemap.rst).
const TOUCHED: u64 = 1 << 63 | 1 << 62;

/// Sets in `bitmap` the bits of the pages that are present or swapped, of `pages` pages from `address` on.
///
/// # Errors
/// [`Error::PageMap`].
pub(super) fn mark(pagemap: &File, address: u64, pages: u64, bitmap: &mut [u64]) -> Result<(), Error> {
    let mut buffer = vec![0_u8; CHUNK.min(pages as usize) * 8];
    let mut done = 0;
    while done < pages {
        let now = (CHUNK as u64).min(pages - done) as usize;
        let bytes = &mut buffer[..now * 8];
        pagemap
            .read_exact_at(bytes, (address / PAGE_SIZE + done) * 8)
            .map_err(|source| Error::PageMap { what: "read", source })?;
        for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
            if u64::from_ne_bytes(*entry) & TOUCHED != 0 {
                let page = done as usize + index;
                bitmap[page / 64] |= 1 << (page % 64);
            }
        }
        done += now as u64;
    }
    Ok(())
}
