//! Where guest I/O meets the image: the device of now, and a tap that a mirror may put in front of its writes.
//!
//! What lives here: one function an operation, and the two things that may be exchanged between requests. What never
//! enters: rings, threads, what the tap does.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use futures_util::future::LocalBoxFuture;
use vmove_storage::{BlockDevice, BlockError, IoVector, IoVectorMut};

use super::Quiet;
use crate::virtio::GuestSlice;

/// Takes over what changes the disk while it is set: it writes to the image itself, and elsewhere too.
///
/// Calls come concurrently, from tasks of the disk's thread. A future that ends with success has changed the image.
/// The guest may change `data` at any time, so whoever needs the same bytes twice copies them first.
pub trait WriteTap {
    /// Writes `data` at byte `offset`; it lies inside the disk.
    fn write<'a>(
        &'a self,
        offset: u64,
        data: &'a [GuestSlice<'a>],
    ) -> LocalBoxFuture<'a, Result<(), BlockError>>;
    /// Zeroes or discards `len` bytes at byte `offset`, inside the disk.
    fn zero(&self, offset: u64, len: u64, kind: ZeroKind) -> LocalBoxFuture<'_, Result<(), BlockError>>;
}

/// What becomes of a range that is not written with data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroKind {
    /// It reads as zeroes afterwards.
    Zero {
        /// Its space may be given back.
        may_unmap: bool,
    },
    /// Its content is of no interest; its space should be given back.
    Discard,
}

/// A new device does not have the size of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the new image has {new} bytes, the disk has {disk}")]
pub struct SizeMismatch {
    /// Size of the disk as the guest knows it, in bytes.
    pub disk: u64,
    /// Size of the image offered, in bytes.
    pub new: u64,
}

/// The way of a guest's requests to the disk. Lives on the disk's thread.
pub struct DiskPath {
    device: RefCell<Rc<BlockDevice>>,
    tap: RefCell<Option<Rc<dyn WriteTap>>>,
    /// Bytes of data that the guest had written.
    written: Cell<u64>,
}

impl DiskPath {
    pub(super) fn new(device: BlockDevice) -> Self {
        Self { device: RefCell::new(Rc::new(device)), tap: RefCell::new(None), written: Cell::new(0) }
    }

    /// The image of now.
    pub fn device(&self) -> Rc<BlockDevice> {
        Rc::clone(&self.device.borrow())
    }

    /// Bytes of data that the guest has had written since the image was opened.
    pub fn written_bytes(&self) -> u64 {
        self.written.get()
    }

    /// Puts a tap in front of all later writes, or takes it away. No write is in flight meanwhile, which `Quiet`
    /// proves: one that had passed by a new tap would be missing in the mirror.
    pub fn set_tap(&self, _quiet: &Quiet, tap: Option<Rc<dyn WriteTap>>) {
        *self.tap.borrow_mut() = tap;
    }

    /// Goes on with another image of the same size, and returns the old one for the caller to close.
    pub fn replace_device(
        &self,
        _quiet: &Quiet,
        device: Rc<BlockDevice>,
    ) -> Result<Rc<BlockDevice>, SizeMismatch> {
        let (disk, new) = (self.device().size(), device.size());
        if disk != new {
            return Err(SizeMismatch { disk, new });
        }
        Ok(self.device.replace(device))
    }

    /// Reads into guest memory, whose pages are marked dirty once they are written, also when the read fails midway.
    pub async fn read(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> Result<(), BlockError> {
        let device = self.device();
        let (vector, guard) = IoVectorMut::from_volatile_slice(buffers);
        let result = device.read(offset, vector).await;
        drop(guard);
        result
    }

    /// Writes from guest memory.
    pub async fn write(&self, offset: u64, data: &[GuestSlice<'_>]) -> Result<(), BlockError> {
        let bytes: usize = data.iter().map(GuestSlice::len).sum();
        self.written.set(self.written.get() + bytes as u64);
        let tap = self.tap.borrow().clone();
        if let Some(tap) = tap {
            return tap.write(offset, data).await;
        }
        let device = self.device();
        let (vector, guard) = IoVector::from_volatile_slice(data);
        let result = device.write(offset, vector).await;
        drop(guard);
        result
    }

    /// Makes every write that was answered before durable.
    pub async fn flush(&self) -> Result<(), BlockError> {
        self.device().flush().await
    }

    /// Gives the range's space back.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        let tap = self.tap.borrow().clone();
        match tap {
            Some(tap) => tap.zero(offset, len, ZeroKind::Discard).await,
            None => self.device().discard(offset, len).await,
        }
    }

    /// Makes the range read as zeroes.
    pub async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        let tap = self.tap.borrow().clone();
        match tap {
            Some(tap) => tap.zero(offset, len, ZeroKind::Zero { may_unmap }).await,
            None => self.device().write_zeroes(offset, len, may_unmap).await,
        }
    }
}
