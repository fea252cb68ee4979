//! One image file on a ring: imago's bottom half.
//!
//! Direct I/O where the file system offers it (no double caching, and ext4 hands buffered writes to a kernel
//! worker), buffered otherwise. Requests that miss the alignment are bounced by imago above this type, which
//! reads the alignments reported here. What never enters: formats, policy about who may open what.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::storage::{PreallocateMode, Storage};
use io_uring::{opcode, squeue, types};

use crate::faults;
use crate::ring::{Hold, OnDrop, Op, Ring, RingCore};
use crate::thread_bound::ThreadBound;

/// Segments per readv or writev (Linux `UIO_MAXIOV`).
const MAX_SEGMENTS: usize = 1024;

enum Target {
    Slot(types::Fixed),
    Fd(types::Fd),
}

/// Builds the same entry for either kind of target.
macro_rules! on_target {
    ($target:expr, |$fd:ident| $build:expr) => {
        match $target {
            Target::Slot($fd) => $build,
            Target::Fd($fd) => $build,
        }
    };
}

/// An open file or block device whose I/O goes through a [`Ring`].
pub struct UringFile {
    bound: ThreadBound<Bound>,
    path: PathBuf,
    alignment: Alignment,
    /// Length in bytes as far as operations of this object made it; nobody else writes while the lock is held.
    size: AtomicU64,
    helper: CommonStorageHelper,
}

struct Bound {
    core: Rc<RingCore>,
    file: File,
    /// Slot among the ring's registered files.
    slot: Option<u32>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.core.unregister_file(slot);
        }
    }
}

/// What direct I/O asks of addresses and offsets, in bytes; 1 and 1 for buffered files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alignment {
    memory: usize,
    request: usize,
}

impl Alignment {
    const BUFFERED: Self = Self { memory: 1, request: 1 };
}

impl UringFile {
    /// Opens `path` on `ring`. `whole_sectors_only`: the file must not grow by padding, as a raw disk whose size is
    /// its file's (such a file is opened buffered unless its length is a multiple of the direct I/O alignment).
    pub fn open(ring: &Ring, path: &Path, writable: bool, whole_sectors_only: bool) -> io::Result<Self> {
        let buffered = open_with(path, writable, 0)?;
        let kind = buffered.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        // `lseek` gives the length of block devices too, where `st_size` is 0.
        let size = (&buffered).seek(SeekFrom::End(0))?;
        let direct = direct_alignment(&buffered)
            .filter(|align| !whole_sectors_only || size.is_multiple_of(align.request as u64))
            .and_then(|align| Some((open_with(path, writable, libc::O_DIRECT).ok()?, align)));
        let (file, alignment) = direct.unwrap_or((buffered, Alignment::BUFFERED));
        let core = Rc::clone(ring.core());
        let slot = core.register_file(file.as_raw_fd());
        Ok(Self {
            bound: ThreadBound::new(Bound { core, file, slot }),
            path: path.to_path_buf(),
            alignment,
            size: AtomicU64::new(size),
            helper: CommonStorageHelper::default(),
        })
    }

    /// The path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether I/O bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.alignment != Alignment::BUFFERED
    }

    /// Whether bytes from `offset` on are data or a hole of the file system, and how far that goes, at most `len`.
    /// Past the end everything is a hole. File systems that know no holes say data.
    pub fn extent(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        let size = self.size.load(Ordering::Relaxed);
        if offset >= size {
            return Ok((false, len));
        }
        match self.seek(offset, libc::SEEK_DATA)? {
            None => Ok((false, len)),
            Some(data) if data > offset => Ok((false, len.min(data - offset))),
            Some(_) => {
                let hole = self.seek(offset, libc::SEEK_HOLE)?.unwrap_or(size);
                Ok((true, len.min(hole.saturating_sub(offset).max(1))))
            }
        }
    }

    fn seek(&self, offset: u64, whence: i32) -> io::Result<Option<u64>> {
        let start = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        // SAFETY: a plain system call on an open descriptor; the file position it moves is used by nobody.
        match unsafe { libc::lseek(self.raw_fd(), start, whence) } {
            -1 => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                e => Err(e),
            },
            found => Ok(Some(found as u64)),
        }
    }

    fn raw_fd(&self) -> RawFd {
        self.bound.file.as_raw_fd()
    }

    /// Builds an entry for this file, by registered slot if it has one, and starts it.
    ///
    /// # Safety
    /// As for [`RingCore::start`].
    unsafe fn start(&self, hold: Hold, with: impl FnOnce(Target) -> squeue::Entry) -> io::Result<Op> {
        let target = match self.bound.slot {
            Some(slot) => Target::Slot(types::Fixed(slot)),
            None => Target::Fd(types::Fd(self.raw_fd())),
        };
        // SAFETY: the caller's promise; dropping the future waits.
        unsafe { self.bound.core.start(with(target), hold, OnDrop::Wait) }
    }

    async fn fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        faults::check(&self.path, "write", offset, len)?;
        loop {
            let build = |target| {
                on_target!(target, |fd| opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build())
            };
            // SAFETY: a fallocate points to no memory.
            match unsafe { self.start(Hold::Nothing, build) }?.await {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }

    /// Zeroes the part of the range inside of the file, giving its space back.
    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let inside = len.min(self.size.load(Ordering::Relaxed).saturating_sub(offset));
        if inside == 0 {
            return Ok(());
        }
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, inside).await
    }

    async fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(libc::FALLOC_FL_ZERO_RANGE, offset, len).await?;
        self.size.fetch_max(offset + len, Ordering::Relaxed);
        Ok(())
    }
}

/// The first segments of a list, as one operation can carry them.
fn first_segments(segments: &[libc::iovec]) -> Vec<libc::iovec> {
    segments[..segments.len().min(MAX_SEGMENTS)].to_vec()
}

fn overflow() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "file offset overflow")
}

impl Storage for UringFile {
    fn mem_align(&self) -> usize {
        self.alignment.memory
    }

    fn req_align(&self) -> usize {
        self.alignment.request
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size.load(Ordering::Relaxed))
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.path.clone())
    }

    async unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        faults::check(&self.path, "read", offset, bufv.len())?;
        while !bufv.is_empty() {
            // SAFETY: the list is used while `bufv`, and the memory it borrows, is alive.
            let segments = first_segments(unsafe { bufv.as_iovec() });
            let (list, count) = (segments.as_ptr(), segments.len());
            let build = |target| {
                on_target!(target, |fd| opcode::Readv::new(fd, list, count as u32).offset(offset).build())
            };
            // SAFETY: the list is held by the operation, the buffers are borrowed by `bufv`, which outlives the
            // future: it is awaited here, and dropping it early waits for the kernel.
            let done = match unsafe { self.start(Hold::Iovecs(segments), build) }?.await {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => u64::from(other?),
            };
            bufv = bufv.split_tail_at(done);
            offset = offset.checked_add(done).ok_or_else(overflow)?;
            // The end of the file: nothing came, or less than a sector of the last one.
            if done == 0 || !offset.is_multiple_of(self.alignment.request as u64) {
                bufv.fill(0);
                break;
            }
        }
        Ok(())
    }

    async unsafe fn pure_writev(&self, mut bufv: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        faults::check(&self.path, "write", offset, bufv.len())?;
        while !bufv.is_empty() {
            // SAFETY: the list is used while `bufv`, and the memory it borrows, is alive.
            let segments = first_segments(unsafe { bufv.as_iovec() });
            let (list, count) = (segments.as_ptr(), segments.len());
            let build = |target| {
                on_target!(target, |fd| opcode::Writev::new(fd, list, count as u32).offset(offset).build())
            };
            // SAFETY: as in `pure_readv`.
            let done = match unsafe { self.start(Hold::Iovecs(segments), build) }?.await {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => u64::from(other?),
            };
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bufv = bufv.split_tail_at(done);
            offset = offset.checked_add(done).ok_or_else(overflow)?;
            self.size.fetch_max(offset, Ordering::Relaxed);
        }
        Ok(())
    }

    async unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or_else(overflow)?;
        self.punch(offset, length).await?;
        let size = self.size.load(Ordering::Relaxed);
        if end > size {
            // Growing by fallocate never cuts off what a concurrent write appended, as ftruncate could.
            let start = offset.max(size);
            self.zero_range(start, end - start).await?;
        }
        Ok(())
    }

    async unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        offset.checked_add(length).ok_or_else(overflow)?;
        self.zero_range(offset, length).await
    }

    async unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.punch(offset, length).await
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(()) // No buffers of our own.
    }

    async fn sync(&self) -> io::Result<()> {
        faults::check(&self.path, "sync", 0, u64::MAX)?;
        loop {
            let build = |target| {
                on_target!(target, |fd| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build())
            };
            // SAFETY: a sync points to no memory.
            match unsafe { self.start(Hold::Nothing, build) }?.await {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }

    async fn settle_writes(&self) -> io::Result<()> {
        Ok(()) // A dropped request is waited for in its `drop`, so none is ever left behind.
    }

    async unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(()) // No buffers of our own.
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    async fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        if !matches!(prealloc_mode, PreallocateMode::None | PreallocateMode::Zero) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.bound.file.set_len(new_size)?;
        self.size.store(new_size, Ordering::Relaxed);
        Ok(())
    }
}

impl fmt::Debug for UringFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UringFile({}, {:?})", self.path.display(), self.alignment)
    }
}

impl fmt::Display for UringFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

fn open_with(path: &Path, writable: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(writable).custom_flags(flags | libc::O_CLOEXEC).open(path)
}

/// Direct I/O alignment by `statx(STATX_DIOALIGN)` (Linux 6.1); `None` where direct I/O is not to be had or the
/// kernel does not say, so that buffered I/O is used.
fn direct_alignment(file: &File) -> Option<Alignment> {
    // SAFETY: `statx` is plain old data, all zero bytes are a value of it.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let empty = c"".as_ptr();
    // SAFETY: an open descriptor, a terminated string, and room for one `statx`.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), empty, libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    if result != 0 || stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    let (memory, request) = (stat.stx_dio_mem_align as usize, stat.stx_dio_offset_align as usize);
    (memory.is_power_of_two() && request.is_power_of_two()).then_some(Alignment { memory, request })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring_and_dir() -> (Rc<Ring>, tempfile::TempDir) {
        // Beside the test binary: `/tmp` may be memory, which has no direct I/O and no holes to speak of.
        let binary = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(binary.parent().unwrap()).unwrap();
        (Ring::new(8).unwrap(), dir)
    }

    #[test]
    fn odd_lengths_of_raw_files_are_kept_by_buffered_io() {
        let (ring, dir) = ring_and_dir();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![1; 4099]).unwrap();
        let file = UringFile::open(&ring, &path, true, true).unwrap();
        assert!(!file.is_direct());
        assert_eq!(file.size().unwrap(), 4099);
        std::fs::write(&path, vec![1; 8192]).unwrap();
        let file = UringFile::open(&ring, &path, true, true).unwrap();
        let plain = File::open(&path).unwrap();
        assert_eq!(file.is_direct(), direct_alignment(&plain).is_some());
    }

    #[test]
    fn reads_past_the_end_give_zeroes_and_long_lists_are_split() {
        let (ring, dir) = ring_and_dir();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![1; 4099]).unwrap();
        let file = UringFile::open(&ring, &path, true, false).unwrap();
        let mut pages: Vec<_> = (0..MAX_SEGMENTS + 10).map(|_| crate::AlignedBuf::zeroed(4096)).collect();
        for page in &mut pages {
            page.fill(9);
        }
        let mut vector = IoVectorMut::new();
        for page in &mut pages {
            vector.push(page.as_mut_slice());
        }
        // SAFETY: page-aligned memory, offset and lengths; the future is awaited.
        ring.block_on(async { unsafe { file.pure_readv(vector, 0) }.await }).unwrap();
        let all: Vec<u8> = pages.iter().flat_map(|page| page.iter().copied()).collect();
        assert!(all[..4099].iter().all(|&byte| byte == 1) && all[4099..].iter().all(|&byte| byte == 0));
        let mut vector = IoVector::new();
        for page in &pages {
            vector.push(page.as_slice());
        }
        // SAFETY: as above.
        ring.block_on(async { unsafe { file.pure_writev(vector, 4096) }.await }).unwrap();
        assert_eq!(file.size().unwrap(), 4096 * (MAX_SEGMENTS as u64 + 11));
        assert_eq!(std::fs::read(&path).unwrap()[4096..], all);
    }

    #[test]
    fn extents_follow_holes() {
        let (ring, dir) = ring_and_dir();
        let path = dir.path().join("a");
        let plain = File::create(&path).unwrap();
        plain.set_len(1 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&plain, &[1; 65536], 65536).unwrap();
        let file = UringFile::open(&ring, &path, true, false).unwrap();
        assert_eq!(file.extent(0, 1 << 20).unwrap(), (false, 65536));
        assert_eq!(file.extent(65536, 1 << 20).unwrap(), (true, 65536));
        assert_eq!(file.extent(131_072, 4096).unwrap(), (false, 4096));
        assert_eq!(file.extent(1 << 30, 4096).unwrap(), (false, 4096));
    }

    #[test]
    fn more_files_than_registered_slots_work() {
        let (ring, dir) = ring_and_dir();
        let files: Vec<_> = (0..80)
            .map(|index| {
                let path = dir.path().join(index.to_string());
                std::fs::write(&path, vec![index as u8; 4096]).unwrap();
                UringFile::open(&ring, &path, false, false).unwrap()
            })
            .collect();
        for (index, file) in files.iter().enumerate() {
            let mut page = crate::AlignedBuf::zeroed(4096);
            // SAFETY: page-aligned memory, offset and length; the future is awaited.
            ring.block_on(async { unsafe { file.pure_readv(page.io_vec_mut(), 0) }.await }).unwrap();
            assert!(page.iter().all(|&byte| byte == index as u8));
        }
    }
}
