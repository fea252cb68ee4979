//! A small checked reader of qcow2 headers, asked before any other code sees an image.
//!
//! Images are untrusted: every field is bounded here, and what this crate does not serve (encryption, external
//! data files, extended L2 entries, other compression than deflate) is refused with its name. Field meanings are
//! from QEMU's `docs/interop/qcow2.txt`, limits from its `block/qcow2.h`. Internal snapshots are safe to have
//! below a running disk: clusters they share are never written or punched, only copied; they are not followed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{BlockError, Result};

/// First bytes of every qcow2 file: "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header, in bytes.
pub const V2_LENGTH: u32 = 72;
/// Length of the shortest version 3 header, in bytes.
pub const V3_LENGTH: u32 = 104;
/// L1 and snapshot tables larger than this many bytes are refused (QEMU's `QCOW_MAX_L1_SIZE`).
const MAX_L1_BYTES: u64 = 32 << 20;
/// Refcount tables larger than this many bytes are refused (QEMU's `QCOW_MAX_REFTABLE_SIZE`).
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// More snapshots are refused (QEMU's `QCOW_MAX_SNAPSHOTS`).
const MAX_SNAPSHOTS: u32 = 65536;
/// Longest backing file name, in bytes.
const MAX_BACKING_NAME: u32 = 1023;
/// Host offsets have 56 bits.
const MAX_OFFSET: u64 = 1 << 56;
/// Header extension with the format of the backing file.
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// Incompatible feature: refcounts may be stale.
pub(crate) const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_EXTERNAL_DATA: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;

/// Why a header is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file ends inside of the header.
    #[error("the file is cut off after {0} bytes")]
    Short(u64),
    /// Not a qcow2 file.
    #[error("it does not begin with the qcow2 magic")]
    Magic,
    /// Not version 2 or 3.
    #[error("version {0} is unknown")]
    Version(u32),
    /// A field has a value the format does not allow.
    #[error("{field} has the invalid value {value:#x}")]
    Field {
        /// Name of the field in the specification.
        field: &'static str,
        /// What it says.
        value: u64,
    },
    /// A table does not lie inside of the file.
    #[error("the {0} does not lie inside of the file")]
    OutsideFile(&'static str),
    /// A feature this crate does not serve.
    #[error("it uses {0}, which is not supported")]
    Unsupported(&'static str),
    /// An incompatible feature bit without a known meaning.
    #[error("it uses the unknown incompatible feature bit {0}")]
    UnknownFeature(u32),
    /// Not closed cleanly; its refcounts may be stale.
    #[error("it is marked dirty (not closed cleanly); run `vmove image check` on it")]
    Dirty,
    /// Marked corrupt by whoever found damage.
    #[error("it is marked corrupt; run `vmove image check` on it")]
    Corrupt,
}

/// The backing file named by a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The name as stored, absolute or relative to the image. Untrusted.
    pub name: String,
    /// The format as stored, if it is.
    pub format: Option<String>,
}

/// A header whose fields were checked against each other and against the size of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size as a power of two, 9 to 21.
    pub cluster_bits: u32,
    /// Virtual size in bytes.
    pub virtual_bytes: u64,
    /// L1 table: byte offset in the file.
    pub l1_offset: u64,
    /// L1 table: number of entries.
    pub l1_entries: u32,
    /// Refcount table: byte offset in the file.
    pub refcount_table_offset: u64,
    /// Refcount table: clusters it occupies.
    pub refcount_table_clusters: u32,
    /// Width of a refcount as a power of two bits, 0 to 6.
    pub refcount_order: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Snapshot table: byte offset in the file.
    pub snapshots_offset: u64,
    /// The backing file, if the image is an overlay.
    pub backing: Option<BackingName>,
    /// Whether refcounts may be written late (compatible feature).
    pub lazy_refcounts: bool,
    /// Whether the image was not closed cleanly.
    pub dirty: bool,
    /// Whether someone marked the image corrupt.
    pub corrupt: bool,
}

impl Header {
    /// Cluster size in bytes.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Reads and checks the header of `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| BlockError::io("open", path, e))?;
        Self::read_from(&file, path)
    }

    /// Reads and checks the header of an open file; `path` is for errors.
    pub fn read_from(file: &File, path: &Path) -> Result<Self> {
        let io_error = |e| BlockError::io("read the header of", path, e);
        let file_bytes = file.metadata().map_err(io_error)?.len();
        // Header, extensions and backing name lie in the first cluster; 2 MiB is the largest.
        let mut first = vec![0; file_bytes.min(u64::from(V3_LENGTH)) as usize];
        file.read_exact_at(&mut first, 0).map_err(io_error)?;
        let refuse = |reason| BlockError::Header { path: path.to_path_buf(), reason };
        let cluster_bits = Fixed(&first).cluster_bits().map_err(refuse)?;
        first.resize(file_bytes.min(1 << cluster_bits) as usize, 0);
        file.read_exact_at(&mut first, 0).map_err(io_error)?;
        Self::parse(&first, file_bytes).map_err(refuse)
    }

    /// Checks a header. `first` is the first cluster of the file, or as much of it as there is; `file_bytes` the
    /// length of the file. A dirty or corrupt mark is reported in the result, see [`Header::must_be_clean`].
    pub fn parse(first: &[u8], file_bytes: u64) -> std::result::Result<Self, HeaderError> {
        let raw = Fixed(first);
        let cluster_bits = raw.cluster_bits()?;
        let cluster = 1u64 << cluster_bits;
        // A last cluster that was never written whole is normal: QEMU lets files end anywhere.
        let file_end = file_bytes.checked_next_multiple_of(cluster).ok_or(HeaderError::Short(file_bytes))?;
        let version = raw.u32(4)?;
        let (incompatible, compatible, refcount_order, length) = if version == 3 {
            (raw.u64(72)?, raw.u64(80)?, raw.u32(96)?, raw.u32(100)?)
        } else {
            (0, 0, 4, V2_LENGTH)
        };
        check_features(incompatible, version, length, raw)?;
        let bad_length = u64::from(length) > cluster || !length.is_multiple_of(8);
        field_unless(bad_length || (version == 3 && length < V3_LENGTH), "header_length", u64::from(length))?;
        field_unless(refcount_order > 6, "refcount_order", u64::from(refcount_order))?;
        if raw.u32(32)? != 0 {
            return Err(HeaderError::Unsupported("encryption"));
        }
        let header = Self {
            version,
            cluster_bits,
            virtual_bytes: raw.u64(24)?,
            l1_offset: raw.u64(40)?,
            l1_entries: raw.u32(36)?,
            refcount_table_offset: raw.u64(48)?,
            refcount_table_clusters: raw.u32(56)?,
            refcount_order,
            snapshots: raw.u32(60)?,
            snapshots_offset: raw.u64(64)?,
            backing: parse_backing(raw, length, cluster)?,
            lazy_refcounts: compatible & COMPATIBLE_LAZY_REFCOUNTS != 0,
            dirty: incompatible & INCOMPATIBLE_DIRTY != 0,
            corrupt: incompatible & INCOMPATIBLE_CORRUPT != 0,
        };
        header.check_tables(file_end)?;
        Ok(header)
    }

    fn check_tables(&self, file_end: u64) -> std::result::Result<(), HeaderError> {
        let cluster = self.cluster_bytes();
        field_unless(self.virtual_bytes >= MAX_OFFSET, "size", self.virtual_bytes)?;
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let covered_per_entry = cluster * (cluster / 8);
        let needed = self.virtual_bytes.div_ceil(covered_per_entry);
        let bad_count = l1_bytes > MAX_L1_BYTES || u64::from(self.l1_entries) < needed;
        field_unless(bad_count, "l1_size", u64::from(self.l1_entries))?;
        if self.l1_entries > 0 {
            inside("L1 table", "l1_table_offset", self.l1_offset, l1_bytes, cluster, file_end)?;
        }
        let table_bytes = u64::from(self.refcount_table_clusters) * cluster;
        let bad_count = table_bytes == 0 || table_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster);
        field_unless(bad_count, "refcount_table_clusters", u64::from(self.refcount_table_clusters))?;
        let offset = self.refcount_table_offset;
        inside("refcount table", "refcount_table_offset", offset, table_bytes, cluster, file_end)?;
        field_unless(self.snapshots > MAX_SNAPSHOTS, "nb_snapshots", u64::from(self.snapshots))?;
        if self.snapshots > 0 {
            inside("snapshot table", "snapshots_offset", self.snapshots_offset, 1, cluster, file_end)?;
        }
        Ok(())
    }

    /// Refuses an image that must be checked before it is used.
    pub fn must_be_clean(&self) -> std::result::Result<(), HeaderError> {
        if self.corrupt {
            return Err(HeaderError::Corrupt);
        }
        if self.dirty {
            return Err(HeaderError::Dirty);
        }
        Ok(())
    }
}

fn field_unless(bad: bool, field: &'static str, value: u64) -> std::result::Result<(), HeaderError> {
    if bad { Err(HeaderError::Field { field, value }) } else { Ok(()) }
}

/// A table must be aligned, behind the header, and inside of the file.
fn inside(
    table: &'static str,
    field: &'static str,
    offset: u64,
    bytes: u64,
    cluster: u64,
    file_end: u64,
) -> std::result::Result<(), HeaderError> {
    field_unless(!offset.is_multiple_of(cluster) || offset < cluster || offset >= MAX_OFFSET, field, offset)?;
    if offset.checked_add(bytes).is_none_or(|end| end > file_end) {
        return Err(HeaderError::OutsideFile(table));
    }
    Ok(())
}

fn check_features(
    incompatible: u64,
    version: u32,
    length: u32,
    raw: Fixed<'_>,
) -> std::result::Result<(), HeaderError> {
    if incompatible & INCOMPATIBLE_EXTERNAL_DATA != 0 {
        return Err(HeaderError::Unsupported("an external data file"));
    }
    let compression = if version == 3 && length > V3_LENGTH { raw.u8(V3_LENGTH as usize)? } else { 0 };
    if incompatible & INCOMPATIBLE_COMPRESSION != 0 || compression != 0 {
        return Err(HeaderError::Unsupported("a compression other than deflate"));
    }
    if incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 {
        return Err(HeaderError::Unsupported("extended L2 entries (subclusters)"));
    }
    let unknown = incompatible & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
    if unknown != 0 {
        return Err(HeaderError::UnknownFeature(unknown.trailing_zeros()));
    }
    Ok(())
}

fn parse_backing(
    raw: Fixed<'_>,
    header_length: u32,
    cluster: u64,
) -> std::result::Result<Option<BackingName>, HeaderError> {
    let (offset, length) = (raw.u64(8)?, raw.u32(16)?);
    // Extensions go on until their end marker, the backing name, or the end of the first cluster.
    let end = if offset != 0 { offset.min(cluster) } else { cluster };
    let mut format = None;
    let mut at = u64::from(header_length);
    while at + 8 <= end {
        let Ok(kind) = raw.u32(at as usize) else { break };
        let size = u64::from(raw.u32(at as usize + 4)?);
        if kind == 0 {
            break;
        }
        field_unless(size > end - at - 8, "header extension length", size)?;
        if kind == EXTENSION_BACKING_FORMAT {
            format = Some(raw.text(at + 8, size, "backing format")?);
        }
        at += 8 + size.next_multiple_of(8);
    }
    if offset == 0 {
        return Ok(None);
    }
    let bad = length == 0 || length > MAX_BACKING_NAME;
    field_unless(bad, "backing_file_size", u64::from(length))?;
    // The name may be longer than the smallest clusters.
    let outside = offset.checked_add(u64::from(length)).is_none_or(|end| end > cluster);
    let bad = offset < u64::from(header_length) || outside;
    field_unless(bad, "backing_file_offset", offset)?;
    Ok(Some(BackingName { name: raw.text(offset, u64::from(length), "backing file name")?, format }))
}

/// Big-endian fields at fixed places in bytes that may be too short.
#[derive(Clone, Copy)]
struct Fixed<'a>(&'a [u8]);

impl Fixed<'_> {
    fn bytes<const N: usize>(self, at: usize) -> std::result::Result<[u8; N], HeaderError> {
        let short = HeaderError::Short(self.0.len() as u64);
        let end = at.checked_add(N).ok_or_else(|| short.clone())?;
        self.0.get(at..end).and_then(|bytes| bytes.try_into().ok()).ok_or(short)
    }

    fn u8(self, at: usize) -> std::result::Result<u8, HeaderError> {
        self.bytes::<1>(at).map(|[byte]| byte)
    }

    fn u32(self, at: usize) -> std::result::Result<u32, HeaderError> {
        self.bytes(at).map(u32::from_be_bytes)
    }

    fn u64(self, at: usize) -> std::result::Result<u64, HeaderError> {
        self.bytes(at).map(u64::from_be_bytes)
    }

    fn text(self, at: u64, size: u64, field: &'static str) -> std::result::Result<String, HeaderError> {
        let bytes =
            self.0.get(at as usize..(at + size) as usize).ok_or(HeaderError::Short(self.0.len() as u64))?;
        let text = std::str::from_utf8(bytes).map_err(|_| HeaderError::Field { field, value: at })?;
        field_unless(text.contains('\0'), field, at)?;
        Ok(text.to_owned())
    }

    /// Checks what comes before everything else: magic, version, cluster size.
    fn cluster_bits(self) -> std::result::Result<u32, HeaderError> {
        if self.u32(0)? != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = self.u32(4)?;
        if !matches!(version, 2 | 3) {
            return Err(HeaderError::Version(version));
        }
        let cluster_bits = self.u32(20)?;
        field_unless(!(9..=21).contains(&cluster_bits), "cluster_bits", u64::from(cluster_bits))?;
        Ok(cluster_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{ImageFormat, ImageSpec, create};
    use proptest::prelude::*;

    fn sample() -> (Vec<u8>, u64) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        create(&path, &ImageSpec::new(ImageFormat::Qcow2, 1 << 30)).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let len = bytes.len() as u64;
        (bytes[..65536].to_vec(), len)
    }

    fn patched(at: usize, value: &[u8]) -> std::result::Result<Header, HeaderError> {
        let (mut bytes, len) = sample();
        bytes[at..at + value.len()].copy_from_slice(value);
        Header::parse(&bytes, len)
    }

    #[test]
    fn a_fresh_header_is_accepted() {
        let (bytes, len) = sample();
        let header = Header::parse(&bytes, len).unwrap();
        assert_eq!((header.version, header.cluster_bits, header.virtual_bytes), (3, 16, 1 << 30));
        assert!(header.must_be_clean().is_ok());
    }

    #[test]
    fn each_bad_field_is_refused_by_name() {
        let field = |result: std::result::Result<Header, HeaderError>| match result {
            Err(HeaderError::Field { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(patched(0, b"QFI\xfa"), Err(HeaderError::Magic));
        assert_eq!(patched(4, &4u32.to_be_bytes()), Err(HeaderError::Version(4)));
        assert_eq!(field(patched(20, &8u32.to_be_bytes())), "cluster_bits");
        assert_eq!(field(patched(20, &22u32.to_be_bytes())), "cluster_bits");
        assert_eq!(field(patched(24, &(1u64 << 60).to_be_bytes())), "size");
        assert_eq!(patched(32, &1u32.to_be_bytes()), Err(HeaderError::Unsupported("encryption")));
        assert_eq!(field(patched(36, &0u32.to_be_bytes())), "l1_size");
        assert_eq!(field(patched(36, &u32::MAX.to_be_bytes())), "l1_size");
        assert_eq!(field(patched(40, &0u64.to_be_bytes())), "l1_table_offset");
        assert_eq!(patched(40, &(1u64 << 40).to_be_bytes()), Err(HeaderError::OutsideFile("L1 table")));
        assert_eq!(field(patched(48, &513u64.to_be_bytes())), "refcount_table_offset");
        assert_eq!(field(patched(56, &0u32.to_be_bytes())), "refcount_table_clusters");
        assert_eq!(field(patched(60, &65537u32.to_be_bytes())), "nb_snapshots");
        assert_eq!(field(patched(96, &7u32.to_be_bytes())), "refcount_order");
        assert_eq!(field(patched(100, &96u32.to_be_bytes())), "header_length");
        assert_eq!(field(patched(100, &105u32.to_be_bytes())), "header_length");
        assert_eq!(patched(72, &(1u64 << 63).to_be_bytes()), Err(HeaderError::UnknownFeature(63)));
        assert!(matches!(patched(72, &4u64.to_be_bytes()), Err(HeaderError::Unsupported(_))));
        assert_eq!(patched(72, &1u64.to_be_bytes()).unwrap().must_be_clean(), Err(HeaderError::Dirty));
        assert_eq!(patched(72, &2u64.to_be_bytes()).unwrap().must_be_clean(), Err(HeaderError::Corrupt));
    }

    #[test]
    fn a_backing_name_longer_than_a_cluster_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        create(&path, &ImageSpec { cluster_bytes: 512, ..ImageSpec::new(ImageFormat::Qcow2, 64 << 10) })
            .unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[8..16].copy_from_slice(&104u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&600u32.to_be_bytes());
        let refused = Header::parse(&bytes[..512], bytes.len() as u64);
        assert_eq!(refused, Err(HeaderError::Field { field: "backing_file_offset", value: 104 }));
    }

    proptest! {
        #[test]
        fn mutated_headers_never_panic(
            edits in prop::collection::vec((0usize..160, any::<u8>()), 1..8),
            cut in prop::option::of(0usize..200),
        ) {
            let (mut bytes, len) = sample();
            for (at, value) in edits {
                bytes[at] = value;
            }
            let bytes = &bytes[..cut.unwrap_or(bytes.len())];
            if let Ok(header) = Header::parse(bytes, len) {
                prop_assert!((9..=21).contains(&header.cluster_bits));
                prop_assert!(header.refcount_table_offset < len.next_multiple_of(header.cluster_bytes()));
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), len in any::<u64>()) {
            let mut bytes = bytes;
            if bytes.len() >= 8 {
                bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            }
            let _ = Header::parse(&bytes, len);
        }
    }
}
