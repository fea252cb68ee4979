//! From a path to a chain of checked, locked layers: everything decided before a byte of guest data is touched.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{BlockError, Result};
use crate::header::{BackingName, Header};
use crate::image::ImageFormat;
use crate::lock::{ImageLock, LockMode};
use crate::repair::repair_locked;
use crate::stamp::Stamp;

/// Longest chain of backing files.
const MAX_CHAIN: usize = 16;

/// How to open a block device.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Open for reading only, beside other readers.
    pub read_only: bool,
    /// Format of the image; from its extension when not given, never from its contents.
    pub format: Option<ImageFormat>,
    /// Which backing files may be followed.
    pub backing: BackingPolicy,
    /// For whom the image is opened; its ownership stamp is then checked.
    pub owner: Option<Owner>,
}

/// The VM an image is opened for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Name of the VM.
    pub vm: String,
    /// Generation of ownership the opener knows.
    pub generation: u64,
}

/// Which backing files, named inside of an image, may be opened. The names are untrusted.
#[derive(Clone, Debug, Default)]
pub enum BackingPolicy {
    /// None; images that name one are refused.
    #[default]
    Deny,
    /// Those that lie, links resolved, in one of these directories (datastores).
    Within(Vec<PathBuf>),
}

/// One checked and locked file of a chain.
pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    pub(crate) format: ImageFormat,
    /// `None` for raw.
    pub(crate) header: Option<Header>,
    pub(crate) lock: ImageLock,
}

/// Checks and locks the image at `path` and everything below it; the image itself comes first.
pub(crate) fn open_chain(path: &Path, options: &OpenOptions) -> Result<Vec<Layer>> {
    let format = options
        .format
        .or_else(|| ImageFormat::from_extension(path))
        .ok_or_else(|| BlockError::UnknownFormat { path: path.to_path_buf() })?;
    let mode = if options.read_only { LockMode::Read } else { LockMode::Write };
    let mut seen = HashSet::new();
    let mut chain = vec![open_layer(path, format, mode, options.owner.as_ref(), &mut seen)?];
    while let Some(backing) =
        chain.last().and_then(|layer| layer.header.as_ref()).and_then(|header| header.backing.clone())
    {
        let above = &chain[chain.len() - 1].path;
        if chain.len() >= MAX_CHAIN {
            return Err(refuse(above, &backing, format!("the chain is longer than {MAX_CHAIN} images")));
        }
        let (path, format) = resolve(above, &backing, &options.backing)?;
        let layer = open_layer(&path, format, LockMode::Read, None, &mut seen).map_err(|e| match e {
            BlockError::Backing { reason, .. } => refuse(above, &backing, reason),
            other => other,
        })?;
        chain.push(layer);
    }
    Ok(chain)
}

fn open_layer(
    path: &Path,
    format: ImageFormat,
    mode: LockMode,
    owner: Option<&Owner>,
    seen: &mut HashSet<(u64, u64)>,
) -> Result<Layer> {
    let metadata = fs::metadata(path).map_err(|e| BlockError::io("open", path, e))?;
    if !seen.insert((metadata.dev(), metadata.ino())) {
        let reason = "the chain of backing files loops".to_owned();
        return Err(BlockError::Backing { path: path.to_path_buf(), backing: String::new(), reason });
    }
    let lock = ImageLock::take(path, mode)?;
    if let Some(owner) = owner {
        // After the lock, as nobody changes the stamp of an image they do not hold, and before any repair.
        Stamp::permits(path, &owner.vm, owner.generation)?;
    }
    let header = match format {
        ImageFormat::Raw => None,
        ImageFormat::Qcow2 => {
            let mut header = Header::read(path)?;
            if header.dirty && !header.corrupt && mode == LockMode::Write {
                // The last writer did not close it. Data that was flushed is there; the refcounts are made right
                // before anything is allocated by them.
                let report = repair_locked(path)?;
                tracing::info!(image = %path.display(), ?report, "image was not closed cleanly");
                header = Header::read(path)?;
            }
            header
                .must_be_clean()
                .map_err(|reason| BlockError::Header { path: path.to_path_buf(), reason })?;
            Some(header)
        }
    };
    Ok(Layer { path: path.to_path_buf(), format, header, lock })
}

fn resolve(image: &Path, backing: &BackingName, policy: &BackingPolicy) -> Result<(PathBuf, ImageFormat)> {
    let BackingPolicy::Within(roots) = policy else {
        let reason =
            "backing files are not allowed here; open the image with the datastore that holds its base";
        return Err(refuse(image, backing, reason));
    };
    let format = match backing.format.as_deref() {
        // Guessing a format from contents a guest may have written is how hosts get read.
        None => return Err(refuse(image, backing, "its format is not recorded in the image")),
        Some(name) => ImageFormat::from_name(name)
            .ok_or_else(|| refuse(image, backing, format!("its format {name:?} is not supported")))?,
    };
    let directory = image.parent().unwrap_or(Path::new(""));
    let path = fs::canonicalize(directory.join(&backing.name))
        .map_err(|e| refuse(image, backing, format!("cannot resolve it: {e}")))?;
    let inside = roots.iter().any(|root| fs::canonicalize(root).is_ok_and(|root| path.starts_with(root)));
    if !inside {
        return Err(refuse(image, backing, "it does not lie in a datastore"));
    }
    Ok((path, format))
}

fn refuse(image: &Path, backing: &BackingName, reason: impl Into<String>) -> BlockError {
    BlockError::Backing { path: image.to_path_buf(), backing: backing.name.clone(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{BackingSpec, ImageSpec, create};

    fn overlay(path: &Path, backing: &str, format: ImageFormat) {
        let backing = BackingSpec { name: backing.to_owned(), format };
        let spec = ImageSpec { backing: Some(backing), ..ImageSpec::new(ImageFormat::Qcow2, 1 << 20) };
        create(path, &spec).unwrap();
    }

    fn within(dir: &Path) -> OpenOptions {
        OpenOptions { backing: BackingPolicy::Within(vec![dir.to_path_buf()]), ..OpenOptions::default() }
    }

    fn reason(result: Result<Vec<Layer>>) -> String {
        result.err().expect("refused").to_string()
    }

    #[test]
    fn backing_files_are_followed_only_inside_of_datastores() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.qcow2"));
        create(&base, &ImageSpec::new(ImageFormat::Raw, 1 << 20)).unwrap();
        overlay(&top, "base.raw", ImageFormat::Raw);
        assert_eq!(open_chain(&top, &within(dir.path())).unwrap().len(), 2);
        assert!(reason(open_chain(&top, &OpenOptions::default())).contains("not allowed"));
        assert!(reason(open_chain(&top, &within(outside.path()))).contains("does not lie in a datastore"));
        let escaping = dir.path().join("escaping.qcow2");
        overlay(&escaping, "../../../../../../etc/passwd", ImageFormat::Raw);
        assert!(open_chain(&escaping, &within(dir.path())).is_err());
    }

    #[test]
    fn the_stamp_decides_who_opens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        create(&path, &ImageSpec::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
        let stamp = Stamp { vm: "web".to_owned(), generation: 4, state: crate::stamp::OwnerState::Owned };
        stamp.write(&path).unwrap();
        let open_as = |vm: &str, generation| {
            let owner = Some(Owner { vm: vm.to_owned(), generation });
            open_chain(&path, &OpenOptions { owner, ..OpenOptions::default() })
        };
        assert!(open_as("web", 4).is_ok());
        assert!(matches!(open_as("web", 3), Err(BlockError::NotOwner { .. })));
        assert!(matches!(open_as("db", 4), Err(BlockError::NotOwner { .. })));
    }

    #[test]
    fn loops_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a.qcow2"), dir.path().join("b.qcow2"));
        overlay(&a, "b.qcow2", ImageFormat::Qcow2);
        overlay(&b, "a.qcow2", ImageFormat::Qcow2);
        assert!(reason(open_chain(&a, &within(dir.path()))).contains("loops"));
    }

    #[test]
    fn a_base_that_someone_writes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
        create(&base, &ImageSpec::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
        overlay(&top, "base.qcow2", ImageFormat::Qcow2);
        let _writer = ImageLock::take(&base, LockMode::Write).unwrap();
        assert!(matches!(open_chain(&top, &within(dir.path())), Err(BlockError::Locked { .. })));
    }

    #[test]
    fn the_extension_or_the_caller_names_the_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        create(&path, &ImageSpec::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
        assert!(matches!(open_chain(&path, &OpenOptions::default()), Err(BlockError::UnknownFormat { .. })));
        let options = OpenOptions { format: Some(ImageFormat::Qcow2), ..OpenOptions::default() };
        assert_eq!(open_chain(&path, &options).unwrap().len(), 1);
    }
}
