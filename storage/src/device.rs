//! The one way guest data is read and written: a virtual disk in a qcow2 or raw image, for one ring's thread.
//!
//! imago maps and moves the data; this type adds what guests and mirrors rely on: bounds, order of discards
//! against everything else, holes given back to the file system, durable flushes. What never enters: virtio,
//! mirroring, who may open what ([`crate::OpenOptions`] decides that).

use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use futures_util::lock::Mutex;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::storage::Storage;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, ShallowMapping, StorageExt};

use crate::buffer::AlignedBuf;
use crate::error::{BlockError, Result};
use crate::file::UringFile;
use crate::gate::{Access, Pass, RangeGate};
use crate::header::INCOMPATIBLE_DIRTY;
use crate::image::ImageFormat;
use crate::lock::ImageLock;
use crate::open::{Layer, OpenOptions, open_chain};
use crate::repair::HEADER_INCOMPATIBLE;
use crate::ring::Ring;

/// Requests in flight per disk. An allocating write pins an L2 table of imago's cache, which has room for 128
/// and fails requests beyond; more than this gains nothing anyway.
const MAX_IN_FLIGHT: usize = 64;
/// Pieces of one request (clusters that are not neighbours in the file) in flight.
const PIECES_IN_FLIGHT: usize = 8;
/// Zeroes are written in pieces of this many bytes where they cannot be mapped.
const ZERO_PIECE: usize = 1 << 20;

/// What a range of the disk reads as, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockStatus {
    /// Stored data.
    Data,
    /// Zeroes by mark, or allocated but never written.
    Zero,
    /// Zeroes because nothing is allocated anywhere in the chain.
    Hole,
}

/// What the top image itself holds for a range, its backing files left aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerStatus {
    /// Stored data.
    Data,
    /// Zeroes, whatever the backing file has.
    Zero,
    /// Nothing; the backing file's contents, or zeroes without one.
    Unallocated,
}

/// A virtual disk.
///
/// Requests take `&self` and may run concurrently, also on overlapping ranges (the result of racing writes is
/// then any mix, as on a real disk). Their futures belong to the ring's thread. A request's future may be
/// dropped at any time, which waits for the kernel, but it must not be leaked (`mem::forget`) while its buffers
/// are borrowed: the kernel may still be using them.
pub struct BlockDevice {
    access: FormatAccess<UringFile>,
    path: PathBuf,
    format: ImageFormat,
    version: u32,
    size: u64,
    /// Unit of allocation in bytes; 1 for raw.
    granularity: u64,
    has_backing: bool,
    read_only: bool,
    gate: RangeGate,
    /// Flushes run one by one: imago counts a table as clean while its write is still under way.
    flushing: Mutex<()>,
    sync_lost: Cell<bool>,
    /// Whether the image carries the mark of an image in use.
    marked: Mutex<bool>,
    /// After `access`: locks are released when the files are closed.
    _locks: Vec<ImageLock>,
}

impl BlockDevice {
    /// Opens the image at `path` and, as far as `options` allow, its backing files.
    ///
    /// # Errors
    /// When the image is locked by someone else, not this VM's, malformed, unclean, of an unsupported kind, or
    /// names a backing file that may not be used. Nothing was changed then.
    pub async fn open(ring: &Ring, path: &Path, options: OpenOptions) -> Result<Self> {
        let chain = open_chain(path, &options)?;
        let top = &chain[0];
        let format = top.format;
        let version = top.header.as_ref().map_or(0, |header| header.version);
        let granularity = top.header.as_ref().map_or(1, |header| header.cluster_bytes());
        let has_backing = chain.len() > 1;
        let mut below = None;
        let mut locks = Vec::new();
        for (index, layer) in chain.into_iter().enumerate().rev() {
            let writable = index == 0 && !options.read_only;
            let (access, lock) = open_layer(ring, layer, writable, below.take()).await?;
            below = Some(access);
            locks.push(lock);
        }
        let mut access = below.expect("a chain has at least the image itself");
        access.set_async_read_parallelization(PIECES_IN_FLIGHT);
        access.set_async_write_parallelization(PIECES_IN_FLIGHT);
        Ok(Self {
            size: access.size(),
            access,
            path: path.to_path_buf(),
            format,
            version,
            granularity,
            has_backing,
            read_only: options.read_only,
            gate: RangeGate::new(MAX_IN_FLIGHT),
            flushing: Mutex::new(()),
            sync_lost: Cell::new(false),
            marked: Mutex::new(false),
            _locks: locks,
        })
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Format of the image.
    pub fn format(&self) -> ImageFormat {
        self.format
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Unit of allocation in bytes: the cluster size, or 1 for raw. Discards of less free nothing.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Alignment in bytes that buffers and ranges should have to be moved without a copy.
    pub fn alignment(&self) -> usize {
        self.access.req_align().max(self.access.mem_align())
    }

    /// Fills `buffers` from `offset` on.
    pub async fn read(&self, offset: u64, buffers: IoVectorMut<'_>) -> Result<()> {
        let range = self.range(offset, buffers.len())?;
        let _pass = self.gate.enter(range, Access::Shared).await;
        self.access.readv(buffers, offset).await.map_err(|e| BlockError::io("read from", &self.path, e))
    }

    /// Writes `buffers` from `offset` on. Durable only after a [`BlockDevice::flush`].
    pub async fn write(&self, offset: u64, buffers: IoVector<'_>) -> Result<()> {
        self.writable()?;
        let range = self.range(offset, buffers.len())?;
        self.mark_in_use().await?;
        let _pass = self.gate.enter(range, Access::Shared).await;
        self.access.writev(buffers, offset).await.map_err(|e| BlockError::io("write to", &self.path, e))
    }

    /// Makes every write, discard and zeroing acknowledged before this call durable.
    ///
    /// # Errors
    /// After a failed sync every later flush fails too ([`BlockError::SyncLost`]): the kernel reports lost data
    /// once and then forgets it. A failure before the sync (tables could not be written) may be retried.
    pub async fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let _one_by_one = self.flushing.lock().await;
        if self.sync_lost.get() {
            return Err(BlockError::SyncLost { path: self.path.clone() });
        }
        self.access.flush().await.map_err(|e| BlockError::io("flush", &self.path, e))?;
        self.access.sync().await.map_err(|e| {
            self.sync_lost.set(true);
            BlockError::io("sync", &self.path, e)
        })
    }

    /// Makes the range read as zeroes and gives its space back where whole clusters are covered.
    ///
    /// Unlike a bare discard this promises what is read afterwards, so that a mirrored disk stays equal to its
    /// source whatever the formats and alignments on both sides.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(offset, len, true).await
    }

    /// Makes the range read as zeroes; `may_unmap` as in virtio: whether its space may be given back.
    pub async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.zero(offset, len, may_unmap).await
    }

    /// What the disk has at `offset`, and for how many bytes, at least 1 and at most `len`, that is so.
    ///
    /// # Errors
    /// When the range is empty or out of bounds.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<(BlockStatus, u64)> {
        let _pass = self.enter_for_status(offset, len).await?;
        let (status, mut run) = self.status_at(offset, len).await?;
        while run < len {
            let (next, more) = self.status_at(offset + run, len - run).await?;
            if next != status {
                break;
            }
            run += more;
        }
        Ok((status, run))
    }

    /// As [`BlockDevice::block_status`] for the top image alone.
    pub async fn layer_status(&self, offset: u64, len: u64) -> Result<(LayerStatus, u64)> {
        let _pass = self.enter_for_status(offset, len).await?;
        let (status, mut run) = self.layer_status_at(offset, len).await?;
        while run < len {
            let (next, more) = self.layer_status_at(offset + run, len - run).await?;
            if next != status {
                break;
            }
            run += more;
        }
        Ok((status, run))
    }

    /// Flushes and takes the mark of an image in use away. Without it, tables still in memory are lost as in a crash
    /// (flushed data is not), and the next one to open the image for writing has to walk its tables first.
    ///
    /// Call it with no write under way. Files and locks are released when the device is dropped.
    pub async fn close(&self) -> Result<()> {
        self.flush().await?;
        let mut marked = self.marked.lock().await;
        if std::mem::take(&mut *marked) {
            self.write_mark(0).await?;
        }
        Ok(())
    }

    /// Marks a qcow2 image dirty, durably, before its first change: imago writes refcounts and tables in the right
    /// order but without barriers between, so after a power cut the refcounts may be behind. Version 2 has no mark.
    async fn mark_in_use(&self) -> Result<()> {
        if self.version < 3 {
            return Ok(());
        }
        let mut marked = self.marked.lock().await;
        if !*marked {
            self.write_mark(INCOMPATIBLE_DIRTY).await?;
            *marked = true;
        }
        Ok(())
    }

    async fn write_mark(&self, incompatible: u64) -> Result<()> {
        let io_error = |e| BlockError::io("mark the state of", &self.path, e);
        let files = self.access.inner().collect_storage_dependencies();
        // The image's own file comes after those of its backing files; external data files are refused.
        let file = files.last().expect("an image has a file");
        file.write(&incompatible.to_be_bytes()[..], HEADER_INCOMPATIBLE).await.map_err(io_error)?;
        file.sync().await.map_err(io_error)
    }

    fn writable(&self) -> Result<()> {
        if self.read_only { Err(BlockError::ReadOnly { path: self.path.clone() }) } else { Ok(()) }
    }

    fn range(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(offset..end),
            _ => Err(BlockError::OutOfRange { path: self.path.clone(), offset, len, size: self.size }),
        }
    }

    async fn enter_for_status(&self, offset: u64, len: u64) -> Result<Pass<'_>> {
        let range = self.range(offset, len)?;
        if range.is_empty() {
            return Err(BlockError::OutOfRange { path: self.path.clone(), offset, len, size: self.size });
        }
        Ok(self.gate.enter(range, Access::Shared).await)
    }

    async fn status_at(&self, offset: u64, len: u64) -> Result<(BlockStatus, u64)> {
        let io_error = |e| BlockError::io("read the map of", &self.path, e);
        let (mapping, run) = self.access.get_mapping(offset, len).await.map_err(io_error)?;
        Ok(match mapping {
            Mapping::Zero { explicit: true, .. } => (BlockStatus::Zero, run),
            Mapping::Zero { .. } => (BlockStatus::Hole, run),
            Mapping::Raw { storage, offset, .. } => match storage.extent(offset, run).map_err(io_error)? {
                (true, run) => (BlockStatus::Data, run),
                (false, run) if self.format == ImageFormat::Raw => (BlockStatus::Hole, run),
                (false, run) => (BlockStatus::Zero, run),
            },
            Mapping::Eof { .. } => (BlockStatus::Hole, len),
            _ => (BlockStatus::Data, run),
        })
    }

    async fn layer_status_at(&self, offset: u64, len: u64) -> Result<(LayerStatus, u64)> {
        let io_error = |e| BlockError::io("read the map of", &self.path, e);
        let (mapping, run) = self.access.get_shallow_mapping(offset, len).await.map_err(io_error)?;
        Ok(match mapping {
            ShallowMapping::Zero { explicit: true, .. } => (LayerStatus::Zero, run),
            ShallowMapping::Zero { .. } | ShallowMapping::Indirect { .. } => (LayerStatus::Unallocated, run),
            ShallowMapping::Raw { storage, offset, .. } => {
                match storage.extent(offset, run).map_err(io_error)? {
                    (true, run) => (LayerStatus::Data, run),
                    (false, run) if self.format == ImageFormat::Raw => (LayerStatus::Unallocated, run),
                    (false, run) => (LayerStatus::Zero, run),
                }
            }
            ShallowMapping::Eof { .. } => (LayerStatus::Unallocated, len),
            _ => (LayerStatus::Data, run),
        })
    }

    async fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.writable()?;
        let range = self.range(offset, len)?;
        if range.is_empty() {
            return Ok(());
        }
        self.mark_in_use().await?;
        // The whole clusters at both ends: zeroing a part of one may remap all of it.
        let start = range.start - range.start % self.granularity;
        let _pass = self.gate.enter(start..range.end.next_multiple_of(self.granularity), Access::Alone).await;
        self.zero_alone(range, unmap).await.map_err(|e| BlockError::io("zero a range of", &self.path, e))
    }

    /// Zeroes what is not zero yet. Nobody else is using the clusters of `range`.
    async fn zero_alone(&self, range: Range<u64>, unmap: bool) -> std::io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (mapping, run) = self.access.get_mapping(at, range.end - at).await?;
            if run == 0 {
                break;
            }
            match mapping {
                // Asking imago to zero a hole would allocate a table to say so.
                Mapping::Zero { explicit: false, .. } => {}
                Mapping::Zero { .. } if !unmap => {}
                Mapping::Raw { storage, offset, .. } if self.format == ImageFormat::Raw => {
                    if unmap {
                        storage.write_zeroes(offset, run).await?;
                    } else {
                        storage.write_allocated_zeroes(offset, run).await?;
                    }
                }
                _ => self.zero_clusters(at..at + run, unmap).await?,
            }
            at += run;
        }
        Ok(())
    }

    /// Zeroes a range of a qcow2 image that is mapped in one way throughout.
    async fn zero_clusters(&self, range: Range<u64>, unmap: bool) -> std::io::Result<()> {
        let start = range.start.next_multiple_of(self.granularity);
        let end = if range.end == self.size { range.end } else { range.end - range.end % self.granularity };
        if !unmap || start >= end {
            return self.zero_in_place(range).await;
        }
        self.zero_in_place(range.start..start).await?;
        self.punch(start..end).await?;
        if !self.has_backing {
            // SAFETY: nobody else has looked up a mapping of these clusters: the gate let us in alone.
            unsafe { self.access.discard_to_backing_unsafe(start, end - start) }.await?;
        } else if self.version >= 3 {
            // SAFETY: as above.
            unsafe { self.access.discard_to_zero_unsafe(start, end - start) }.await?;
        } else {
            self.zero_in_place(start..end).await?;
        }
        self.zero_in_place(end..range.end).await
    }

    /// Gives the space of whole clusters back to the file system, *before* they are freed: once freed, a cluster
    /// may be another write's at any moment. Clusters shared with a snapshot are left alone.
    async fn punch(&self, range: Range<u64>) -> std::io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (mapping, run) = self.access.get_shallow_mapping(at, range.end - at).await?;
            if run == 0 {
                break;
            }
            if let ShallowMapping::Raw { storage, offset, writable: true, .. } = mapping {
                storage.discard(offset, run).await?;
            }
            at += run;
        }
        Ok(())
    }

    /// Zeroes a range, keeping what is allocated.
    async fn zero_in_place(&self, range: Range<u64>) -> std::io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if self.version >= 3 {
            return self.access.write_zeroes(range.start, range.end - range.start).await;
        }
        // Version 2 has no mark for zeroes.
        let zeroes = AlignedBuf::zeroed(ZERO_PIECE.min((range.end - range.start) as usize));
        let mut at = range.start;
        while at < range.end {
            let piece = zeroes.len().min((range.end - at) as usize);
            self.access.write(&zeroes[..piece], at).await?;
            at += piece as u64;
        }
        Ok(())
    }
}

async fn open_layer(
    ring: &Ring,
    layer: Layer,
    writable: bool,
    below: Option<FormatAccess<UringFile>>,
) -> Result<(FormatAccess<UringFile>, ImageLock)> {
    let io_error = |e| BlockError::io("open", &layer.path, e);
    let is_raw = layer.format == ImageFormat::Raw;
    let file = UringFile::open(ring, &layer.path, writable, is_raw).map_err(io_error)?;
    let gate = DenyImplicitOpenGate::default();
    let access = if is_raw {
        let raw = Raw::builder(file).write(writable).open(gate).await.map_err(io_error)?;
        FormatAccess::new(raw)
    } else {
        let builder = Qcow2::<UringFile>::builder(file).write(writable).backing(below).data_file(None);
        FormatAccess::new(builder.open(gate).await.map_err(io_error)?)
    };
    Ok((access, layer.lock))
}

impl fmt::Debug for BlockDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockDevice({}, {} bytes)", self.path.display(), self.size)
    }
}
