//! Images read and written anew: another format, another size, the same contents, holes left out.
//!
//! Never enters: who owns an image, backing files (refused).

use std::fs;
use std::path::Path;

use crate::buffer::AlignedBuf;
use crate::device::{BlockDevice, BlockStatus};
use crate::error::{BlockError, Result};
use crate::image::{ImageFormat, ImageSpec, create};
use crate::open::OpenOptions;
use crate::ring::Ring;

/// Bytes moved by one read.
const CHUNK: u64 = 1 << 20;
/// Submissions the ring has room for.
const RING: u32 = 64;

/// Creates the image `to` as `spec` says, with the contents of `from`, and zeroes behind them. Durable when this returns; nothing is left
/// behind on an error. Runs a ring on the calling thread.
///
/// # Errors
/// When `from` cannot be opened for reading (locked, unclean, with a backing file), is larger than `spec`, or either cannot be read or
/// written.
pub fn import(from: &Path, format: ImageFormat, to: &Path, spec: &ImageSpec) -> Result<()> {
    let ring = Ring::new(RING).map_err(|e| BlockError::io("make a ring for", to, e))?;
    create(to, spec)?;
    let copied = ring.block_on(copy(&ring, from, format, to, spec));
    if copied.is_err() {
        // Best effort: it was made here, and nobody else knows it.
        let _ = fs::remove_file(to);
    }
    copied
}

async fn copy(ring: &Ring, from: &Path, format: ImageFormat, to: &Path, spec: &ImageSpec) -> Result<()> {
    let read_only = OpenOptions { read_only: true, format: Some(format), ..OpenOptions::default() };
    let source = BlockDevice::open(ring, from, read_only).await?;
    let writable = OpenOptions { format: Some(spec.format), ..OpenOptions::default() };
    let target = BlockDevice::open(ring, to, writable).await?;
    if source.size() > target.size() {
        let (len, size) = (source.size(), target.size());
        return Err(BlockError::OutOfRange { path: to.to_path_buf(), offset: 0, len, size });
    }
    let mut at = 0;
    while at < source.size() {
        let (status, run) = source.block_status(at, source.size() - at).await?;
        let end = at + run;
        while at < end && status == BlockStatus::Data {
            let mut buffer = AlignedBuf::zeroed(CHUNK.min(end - at) as usize);
            source.read(at, buffer.io_vec_mut()).await?;
            if buffer.as_slice().iter().any(|byte| *byte != 0) {
                target.write(at, buffer.io_vec()).await?;
            }
            at += buffer.as_slice().len() as u64;
        }
        at = end;
    }
    target.close().await
}
