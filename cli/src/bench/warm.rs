//! Host memory that is warm before it is measured.
//!
//! A hypervisor below this machine may have taken free memory back; its first touch is then tens of times slower than the thing
//! measured. Touching and freeing as much as will be needed brings it back.

use std::io;

use memmap2::{Advice, MmapMut, MmapOptions};

/// Size of a page, bytes.
const PAGE: usize = 4096;

/// An anonymous private mapping with huge-page advice. Untouched.
pub fn mapping(bytes: u64) -> io::Result<MmapMut> {
    let len = usize::try_from(bytes).map_err(io::Error::other)?;
    let map = MmapOptions::new().len(len).map_anon()?;
    match map.advise(Advice::HugePage) {
        // A kernel without transparent huge pages does not know the advice.
        Err(error) if error.kind() != io::ErrorKind::InvalidInput => Err(error),
        _ => Ok(map),
    }
}

/// Touches `bytes` of memory, and a quarter more, and frees it.
pub fn host_memory(bytes: u64) -> io::Result<()> {
    let mut map = mapping(bytes + bytes / 4)?;
    touch(&mut map);
    Ok(())
}

/// Writes to each page.
pub fn touch(map: &mut [u8]) {
    for page in map.chunks_mut(PAGE) {
        page[0] = 1;
    }
    std::hint::black_box(map);
}
