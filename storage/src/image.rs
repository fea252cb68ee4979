//! What an image file is, and making an empty one with the structure of another.
//!
//! A mirror target has to arrive with its source's virtual size, cluster size and backing relation, so that it
//! is as thin as the source was. Creating is plain file I/O, it needs no ring.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::durable;
use crate::error::{BlockError, Result};
use crate::header::{BackingName, Header, MAGIC, V3_LENGTH};

/// Cluster size when none is asked for, in bytes; also QEMU's.
pub const DEFAULT_CLUSTER_BYTES: u64 = 64 * 1024;
/// Width of refcounts in created images, in bits; also QEMU's.
const REFCOUNT_BITS: u64 = 16;
/// Longest L1 table, in bytes (QEMU refuses longer ones).
const MAX_L1_BYTES: u64 = 32 << 20;

/// Format of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// qcow2, versions 2 and 3 (compat 0.10 and 1.1).
    Qcow2,
    /// The disk's bytes and nothing else.
    Raw,
}

impl ImageFormat {
    /// The name QEMU and this project's files use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }

    /// The format with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" => Some(Self::Raw),
            _ => None,
        }
    }

    /// The format a file's extension stands for. Contents never decide how an image is opened: a guest could
    /// write a qcow2 header into its raw disk and so name any file of the host as its backing file.
    pub fn from_extension(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "qcow2" => Some(Self::Qcow2),
            "raw" | "img" => Some(Self::Raw),
            _ => None,
        }
    }
}

/// What an image file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ImageInfo {
    /// Format of the file.
    pub format: ImageFormat,
    /// Size of the disk a guest sees, in bytes.
    pub virtual_bytes: u64,
    /// Unit of allocation in bytes; raw images have none.
    pub cluster_bytes: Option<u64>,
    /// Space the file takes on its file system, in bytes (`st_blocks` x 512).
    pub allocated_bytes: u64,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Name of the backing file as stored in the image.
    pub backing: Option<String>,
    /// Format of the backing file as stored in the image.
    pub backing_format: Option<String>,
    /// Internal snapshots; a mirror copies the active state only.
    pub internal_snapshots: u32,
    /// Whether the image was not closed cleanly.
    pub dirty: bool,
    /// Whether someone marked the image corrupt.
    pub corrupt: bool,
}

impl ImageInfo {
    /// A specification for an empty image of the same structure. The backing file is kept by name.
    ///
    /// # Errors
    /// When the image names a backing file without a format this crate knows.
    pub fn spec(&self) -> Result<ImageSpec> {
        let backing = match &self.backing {
            None => None,
            Some(name) => {
                let format =
                    self.backing_format.as_deref().and_then(ImageFormat::from_name).ok_or_else(|| {
                        BlockError::Backing {
                            path: name.into(),
                            backing: name.clone(),
                            reason: "its format is not recorded as qcow2 or raw".to_owned(),
                        }
                    })?;
                Some(BackingSpec { name: name.clone(), format })
            }
        };
        Ok(ImageSpec {
            format: self.format,
            virtual_bytes: self.virtual_bytes,
            cluster_bytes: self.cluster_bytes.unwrap_or(DEFAULT_CLUSTER_BYTES),
            backing,
        })
    }
}

/// Backing file to be recorded in a new image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingSpec {
    /// Path, absolute or relative to the new image.
    pub name: String,
    /// Format of the backing file.
    pub format: ImageFormat,
}

/// An image to be created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// Format of the file.
    pub format: ImageFormat,
    /// Size of the disk a guest sees, in bytes.
    pub virtual_bytes: u64,
    /// Unit of allocation in bytes, a power of two from 512 to 2 MiB; ignored for raw.
    pub cluster_bytes: u64,
    /// Backing file; qcow2 only.
    pub backing: Option<BackingSpec>,
}

impl ImageSpec {
    /// A standalone image with default clusters.
    pub fn new(format: ImageFormat, virtual_bytes: u64) -> Self {
        Self { format, virtual_bytes, cluster_bytes: DEFAULT_CLUSTER_BYTES, backing: None }
    }
}

/// Looks at an image without locking or changing it. The format comes from the extension, else (and for `.img`, which is used for both)
/// from the magic.
///
/// Numbers of an image in use are a snapshot of a moving thing.
pub fn info(path: &Path) -> Result<ImageInfo> {
    let file = File::open(path).map_err(|e| BlockError::io("open", path, e))?;
    let metadata = file.metadata().map_err(|e| BlockError::io("look at", path, e))?;
    let format = match ImageFormat::from_extension(path) {
        Some(format) if path.extension().is_none_or(|extension| extension != "img") => format,
        _ if starts_with_magic(&file) => ImageFormat::Qcow2,
        _ => ImageFormat::Raw,
    };
    let header = match format {
        ImageFormat::Qcow2 => Some(Header::read_from(&file, path)?),
        ImageFormat::Raw => None,
    };
    let backing: Option<BackingName> = header.as_ref().and_then(|header| header.backing.clone());
    Ok(ImageInfo {
        format,
        virtual_bytes: header.as_ref().map_or(metadata.len(), |header| header.virtual_bytes),
        cluster_bytes: header.as_ref().map(Header::cluster_bytes),
        allocated_bytes: metadata.blocks() * 512,
        file_bytes: metadata.len(),
        backing_format: backing.as_ref().and_then(|backing| backing.format.clone()),
        backing: backing.map(|backing| backing.name),
        internal_snapshots: header.as_ref().map_or(0, |header| header.snapshots),
        dirty: header.as_ref().is_some_and(|header| header.dirty),
        corrupt: header.as_ref().is_some_and(|header| header.corrupt),
    })
}

fn starts_with_magic(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && u32::from_be_bytes(magic) == MAGIC
}

/// Creates an empty image. It is durable when this returns; nothing is left behind on an error.
///
/// # Errors
/// [`BlockError::BadSpec`] for a specification no image can have; an I/O error of kind `AlreadyExists` when there
/// is a file at `path`.
pub fn create(path: &Path, spec: &ImageSpec) -> Result<()> {
    let plan = match spec.format {
        ImageFormat::Qcow2 => Some(Layout::plan(path, spec)?),
        ImageFormat::Raw if spec.backing.is_some() => {
            return Err(bad_spec(path, "a raw image cannot have a backing file"));
        }
        ImageFormat::Raw => None,
    };
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|e| BlockError::io("create", path, e))?;
    let write = || match &plan {
        Some(plan) => plan.write(&file),
        None => file.set_len(spec.virtual_bytes),
    };
    write().and_then(|()| file.sync_all()).map_err(|e| BlockError::io("create", path, e)).inspect_err(
        |_| {
            // It is ours and unusable; the first error is the one to report.
            let _ = fs::remove_file(path);
        },
    )?;
    durable::sync_parent(path)
}

fn bad_spec(path: &Path, reason: impl Into<String>) -> BlockError {
    BlockError::BadSpec { path: path.to_path_buf(), reason: reason.into() }
}

/// Where the tables of an empty qcow2 file lie: header, refcount table, refcount blocks, L1 table.
struct Layout {
    cluster: u64,
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
    total_clusters: u64,
    /// The whole first cluster's used part.
    header: Vec<u8>,
}

impl Layout {
    fn plan(path: &Path, spec: &ImageSpec) -> Result<Self> {
        let cluster = spec.cluster_bytes;
        if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
            return Err(bad_spec(
                path,
                format!("a cluster size of {cluster} bytes is not a power of two from 512 to 2 MiB"),
            ));
        }
        let l1_entries = spec.virtual_bytes.div_ceil(cluster * (cluster / 8)).max(1);
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(bad_spec(
                path,
                format!("{} bytes are too many for clusters of {cluster} bytes", spec.virtual_bytes),
            ));
        }
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let per_block = cluster * 8 / REFCOUNT_BITS;
        // The refcounts count their own clusters too: grow until they cover themselves.
        let (mut table_clusters, mut blocks) = (1, 1);
        let total_clusters = loop {
            let total = 1 + table_clusters + blocks + l1_clusters;
            let needed_blocks = total.div_ceil(per_block);
            let needed_table = (needed_blocks * 8).div_ceil(cluster);
            if needed_blocks <= blocks && needed_table <= table_clusters {
                break total;
            }
            (blocks, table_clusters) = (needed_blocks.max(blocks), needed_table.max(table_clusters));
        };
        let mut layout =
            Self { cluster, table_clusters, blocks, l1_entries, total_clusters, header: Vec::new() };
        layout.header = layout.header_bytes(path, spec)?;
        Ok(layout)
    }

    fn l1_offset(&self) -> u64 {
        (1 + self.table_clusters + self.blocks) * self.cluster
    }

    fn header_bytes(&self, path: &Path, spec: &ImageSpec) -> Result<Vec<u8>> {
        let mut extensions = Vec::new();
        let name = spec.backing.as_ref().map_or("", |backing| &backing.name);
        if let Some(backing) = &spec.backing {
            if backing.name.is_empty() || backing.name.len() > 1023 || backing.name.contains('\0') {
                return Err(bad_spec(
                    path,
                    "the backing file's name is empty, too long, or contains a zero byte",
                ));
            }
            let format = backing.format.name().as_bytes();
            extensions.extend(0xe279_2aca_u32.to_be_bytes());
            extensions.extend((format.len() as u32).to_be_bytes());
            extensions.extend(format);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        extensions.extend([0; 8]); // end of extensions
        let name_offset = if name.is_empty() { 0 } else { u64::from(V3_LENGTH) + extensions.len() as u64 };
        if name_offset + name.len() as u64 > self.cluster {
            return Err(bad_spec(path, "the backing file's name does not fit into a cluster"));
        }
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(3u32.to_be_bytes()); // version: compat 1.1
        bytes.extend(name_offset.to_be_bytes());
        bytes.extend((name.len() as u32).to_be_bytes());
        bytes.extend(self.cluster.trailing_zeros().to_be_bytes());
        bytes.extend(spec.virtual_bytes.to_be_bytes());
        bytes.extend(0u32.to_be_bytes()); // crypt_method: none
        bytes.extend((self.l1_entries as u32).to_be_bytes());
        bytes.extend(self.l1_offset().to_be_bytes());
        bytes.extend(self.cluster.to_be_bytes()); // refcount table: the second cluster
        bytes.extend((self.table_clusters as u32).to_be_bytes());
        bytes.extend([0; 12]); // snapshots: none
        bytes.extend([0; 24]); // incompatible, compatible, autoclear features: none
        bytes.extend(REFCOUNT_BITS.trailing_zeros().to_be_bytes());
        bytes.extend(V3_LENGTH.to_be_bytes());
        bytes.extend(extensions);
        bytes.extend(name.as_bytes());
        Ok(bytes)
    }

    fn write(&self, file: &File) -> std::io::Result<()> {
        file.set_len(self.total_clusters * self.cluster)?;
        file.write_all_at(&self.header, 0)?;
        let first_block = 1 + self.table_clusters;
        let table: Vec<u8> =
            (0..self.blocks).flat_map(|block| ((first_block + block) * self.cluster).to_be_bytes()).collect();
        file.write_all_at(&table, self.cluster)?;
        let refcounts: Vec<u8> = (0..self.total_clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
        file.write_all_at(&refcounts, first_block * self.cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn created_images_have_the_structure_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        for (index, (cluster_bytes, virtual_bytes)) in
            [(512, 3 << 20), (4096, 1 << 30), (65536, 10 << 40), (2 << 20, 12345 * 512), (65536, 0)]
                .into_iter()
                .enumerate()
        {
            let path = dir.path().join(format!("{index}.qcow2"));
            let spec = ImageSpec { cluster_bytes, ..ImageSpec::new(ImageFormat::Qcow2, virtual_bytes) };
            create(&path, &spec).unwrap();
            let info = info(&path).unwrap();
            assert_eq!((info.virtual_bytes, info.cluster_bytes), (virtual_bytes, Some(cluster_bytes)));
            assert_eq!(info.spec().unwrap(), spec);
            assert!(info.allocated_bytes <= 64 * 1024, "{info:?}");
        }
    }

    #[test]
    fn backing_files_are_recorded_with_their_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay.qcow2");
        let backing = BackingSpec { name: "base.raw".to_owned(), format: ImageFormat::Raw };
        let spec = ImageSpec { backing: Some(backing), ..ImageSpec::new(ImageFormat::Qcow2, 1 << 20) };
        create(&path, &spec).unwrap();
        assert_eq!(info(&path).unwrap().spec().unwrap(), spec);
        assert_eq!(create(&path, &spec).unwrap_err().io_kind(), Some(std::io::ErrorKind::AlreadyExists));
    }

    #[test]
    fn impossible_specifications_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        for (cluster_bytes, virtual_bytes) in
            [(1000, 1 << 20), (256, 1 << 20), (4 << 20, 1 << 20), (512, 1 << 40)]
        {
            let spec = ImageSpec { cluster_bytes, ..ImageSpec::new(ImageFormat::Qcow2, virtual_bytes) };
            assert!(matches!(create(&path, &spec), Err(BlockError::BadSpec { .. })));
        }
        assert!(!path.exists());
    }
}
