//! The XSAVE area of a vCPU, whose size is known only at run time.
//!
//! What never enters: what the area means; the bytes are as the CPU lays them out.

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::{Error, VcpuFd};

/// Bytes of the part that every kernel knows.
const FIXED: usize = size_of::<kvm_xsave>();

/// An area of `size` bytes, at least those of the fixed part.
fn area(size: usize) -> Result<Xsave, Error> {
    Xsave::new(size.saturating_sub(FIXED).div_ceil(4)).map_err(|_| Error::new(libc::ENOMEM))
}

/// Reads the area; `size` is what `KVM_CAP_XSAVE2` says of the VM, or that of the fixed part.
pub(super) fn read(fd: &VcpuFd, size: usize) -> Result<Vec<u8>, Error> {
    let mut area = area(size)?;
    if size > FIXED {
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave for this VM, and nothing here enables more.
        unsafe { fd.get_xsave2(&mut area)? };
    } else {
        // SAFETY: the length of the flexible array, which this reference could break, is not touched.
        unsafe { area.as_mut_fam_struct() }.xsave = fd.get_xsave()?;
    }
    let fixed = area.as_fam_struct_ref().xsave.region;
    Ok(fixed.iter().chain(area.as_slice()).flat_map(|word| word.to_ne_bytes()).collect())
}

/// Writes the area, `size` as for [`read`]. False, with nothing written, if `bytes` has more components than fit.
pub(super) fn write(fd: &VcpuFd, size: usize, bytes: &[u8]) -> Result<bool, Error> {
    let size = size.next_multiple_of(4);
    if bytes.len() > size && bytes[size..].iter().any(|byte| *byte != 0) {
        return Ok(false);
    }
    let mut bytes = bytes.to_vec();
    bytes.resize(size, 0);
    let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect();
    let (fixed, extra) = words.split_at(FIXED / 4);
    let mut area = area(size)?;
    area.as_mut_slice().copy_from_slice(extra);
    // SAFETY: the length of the flexible array, which this reference could break, is not touched.
    unsafe { area.as_mut_fam_struct() }.xsave.region.copy_from_slice(fixed);
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave for this VM, and nothing here enables more.
    unsafe { fd.set_xsave2(&area)? };
    Ok(true)
}
