//! What cloud-init in a guest finds at its first start: a small FAT image labelled CIDATA (cloud-init's data source "NoCloud").
//!
//! Lives here: the image's bytes. Never enters: what is in the user data.

use std::io::{Cursor, Write};
use std::path::Path;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use super::error::ApiError;
use crate::api::definitions::CloudInit;
use crate::api::types::{DiskDefinition, DiskFormat};

/// Name of the disk that carries it.
pub const DISK: &str = "cidata";
/// Most bytes of all texts together.
pub const MAX_TEXTS: usize = 1 << 20;
/// The image: room for the texts, the tables, and the last cluster of each text.
pub const IMAGE_BYTES: u64 = 2 << 20;
const META_DATA: &str = "meta-data";

/// The disk in a VM's definition.
pub fn disk() -> DiskDefinition {
    DiskDefinition {
        name: DISK.to_owned(),
        format: DiskFormat::Raw,
        size_bytes: IMAGE_BYTES,
        datastore: String::new(),
        read_only: true,
    }
}

fn failed(error: std::io::Error) -> ApiError {
    ApiError::storage(format!("cannot make the cloud-init image: {error}"))
}

/// Checks the texts.
pub fn check(seed: &CloudInit) -> Result<(), ApiError> {
    let texts = [Some(&seed.user_data), seed.network_config.as_ref(), seed.hostname.as_ref()];
    let bytes: usize = texts.into_iter().flatten().map(String::len).sum();
    if bytes > MAX_TEXTS {
        return Err(ApiError::too_large(format!(
            "cloud_init has {bytes} bytes, at most {MAX_TEXTS} are possible"
        )));
    }
    if let Some(name) = &seed.hostname {
        crate::identity::check_host_name(name)?;
    }
    Ok(())
}

/// The whole image.
pub fn image(seed: &CloudInit, vm: &str) -> Result<Vec<u8>, ApiError> {
    let mut image = Cursor::new(vec![0; IMAGE_BYTES as usize]);
    let options = FormatVolumeOptions::new().volume_label(*b"CIDATA     ");
    fatfs::format_volume(&mut image, options).map_err(failed)?;
    write(&mut image, "user-data", &seed.user_data).map_err(failed)?;
    write(&mut image, META_DATA, &meta_data(seed.hostname.as_deref().unwrap_or(vm))).map_err(failed)?;
    if let Some(config) = &seed.network_config {
        write(&mut image, "network-config", config).map_err(failed)?;
    }
    Ok(image.into_inner())
}

/// Makes the image of a cloned VM's own: another instance, under another name, so that cloud-init does its work again.
pub fn give_new_identity(path: &Path, vm: &str) -> Result<(), ApiError> {
    let io = |action| move |e: std::io::Error| ApiError::io(action, path, &e);
    let bytes = std::fs::read(path).map_err(io("read"))?;
    let mut image = Cursor::new(bytes);
    write(&mut image, META_DATA, &meta_data(vm)).map_err(io("change"))?;
    let mut file = std::fs::OpenOptions::new().write(true).open(path).map_err(io("open"))?;
    file.write_all(image.get_ref()).and_then(|()| file.sync_all()).map_err(io("write"))
}

fn meta_data(hostname: &str) -> String {
    format!("instance-id: {}\nlocal-hostname: {hostname}\n", uuid::Uuid::new_v4())
}

fn write(image: &mut Cursor<Vec<u8>>, name: &str, text: &str) -> std::io::Result<()> {
    image.set_position(0);
    let volume = FileSystem::new(image, FsOptions::new())?;
    let mut file = volume.root_dir().create_file(name)?;
    file.truncate()?;
    file.write_all(text.as_bytes())?;
    file.flush()?;
    drop(file);
    volume.unmount()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn read(bytes: &[u8], name: &str) -> std::io::Result<String> {
        let volume = FileSystem::new(Cursor::new(bytes.to_vec()), FsOptions::new())?;
        let mut text = String::new();
        volume.root_dir().open_file(name)?.read_to_string(&mut text)?;
        Ok(text)
    }

    fn seed(user_data: &str) -> CloudInit {
        CloudInit {
            user_data: user_data.to_owned(),
            network_config: Some("version: 2\n".into()),
            hostname: None,
        }
    }

    #[test]
    fn cloud_init_finds_its_texts_under_the_right_label() {
        let bytes = image(&seed("#cloud-config\n"), "web01").unwrap();
        assert_eq!(bytes.len() as u64, IMAGE_BYTES);
        assert_eq!(read(&bytes, "user-data").unwrap(), "#cloud-config\n");
        assert_eq!(read(&bytes, "network-config").unwrap(), "version: 2\n");
        let meta = read(&bytes, META_DATA).unwrap();
        assert!(meta.starts_with("instance-id: ") && meta.ends_with("local-hostname: web01\n"), "{meta}");
        // A second opinion on what the image is.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.raw");
        std::fs::write(&path, &bytes).unwrap();
        let seen =
            std::process::Command::new("blkid").args(["-p", "-o", "export"]).arg(&path).output().unwrap();
        let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
        assert!(seen.contains("LABEL=CIDATA\n") && seen.contains("TYPE=vfat\n"), "{seen}");
        give_new_identity(&path, "web02").unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let changed = read(&bytes, META_DATA).unwrap();
        assert!(changed.ends_with("local-hostname: web02\n") && changed[..50] != meta[..50], "{changed}");
        assert_eq!(read(&bytes, "user-data").unwrap(), "#cloud-config\n");
    }

    #[test]
    fn as_much_as_is_allowed_fits_and_more_is_refused() {
        let most = seed(&"x".repeat(MAX_TEXTS - "version: 2\n".len()));
        check(&most).unwrap();
        assert_eq!(read(&image(&most, "web01").unwrap(), "user-data").unwrap().len(), most.user_data.len());
        let more = seed(&"x".repeat(MAX_TEXTS));
        assert_eq!(check(&more).unwrap_err().code, "too_large");
    }
}
