//! What went wrong with a disk that is copied, in words: which disk, where, what, and what to do about it.
//!
//! Lives here: the sentences. Never enters: deciding whether the move goes on.

use std::io;

use vmove_mirror::wire::blocks::Failure;
use vmove_storage::BlockError;

use super::MoveError;
use crate::process::protocol::DiskPlacement;

/// The target failed an operation. `place` is its first byte and length, none for a flush; `to` names the target and its datastore.
pub fn at_target(disk: &str, to: &str, place: Option<(u64, u64)>, failure: Failure) -> String {
    let what = match place {
        Some((offset, len)) => format!("write {len} bytes at byte {offset}"),
        None => "flush".to_owned(),
    };
    let why = match failure.error {
        0 => "the image there cannot be used".to_owned(),
        number => io::Error::from_raw_os_error(number as i32).to_string(),
    };
    format!("disk {disk}: {to} cannot {what}: {why}; {}", advice(failure.error as i32, "there"))
}

/// The target cannot make an image for it; said by the target, heard at the source.
pub fn at_creation(place: &DiskPlacement, error: &MoveError) -> String {
    let number = match error {
        MoveError::Io { source, .. } => source.raw_os_error(),
        MoveError::Disk { source, .. } => source.os_error(),
        _ => None,
    };
    let mut what = error.to_string();
    // Its own words may begin with the disk.
    if let Some(rest) = what.strip_prefix(&format!("disk {}: ", place.name)) {
        what = rest.to_owned();
    }
    format!(
        "disk {} cannot be made in datastore {}: {what}; {}",
        place.name,
        place.datastore,
        advice(number.unwrap_or(0), "there")
    )
}

/// The source's own image cannot be read for the copy.
pub fn at_source(disk: &str, place: (u64, u64), error: &BlockError) -> String {
    let (offset, len) = place;
    format!(
        "disk {disk}: {len} bytes at byte {offset} cannot be read for the copy: {error}; {}",
        advice(error.os_error().unwrap_or(0), "here")
    )
}

fn advice(number: i32, place: &str) -> String {
    match number {
        libc::ENOSPC | libc::EDQUOT => {
            format!("make room {place} or name another datastore, then try again")
        }
        libc::EROFS => {
            format!("the file system {place} is read-only: mount it for writing or name another datastore")
        }
        libc::EEXIST => format!("remove it {place} or name another datastore, then try again"),
        libc::EACCES | libc::EPERM => {
            format!("let the agent {place} write to the datastore, or name another one")
        }
        libc::EIO => format!("the disk below the image {place} fails: see the kernel's log"),
        _ => format!("see the log of the VM's process {place}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_says_why_it_cannot_make_an_image() {
        let place = DiskPlacement {
            name: "vda".into(),
            datastore: "fast".into(),
            path: "/srv/fast/vm/vda.qcow2".into(),
        };
        let exists =
            MoveError::io("make image /srv/fast/vm/vda.qcow2")(io::Error::from_raw_os_error(libc::EEXIST));
        assert_eq!(
            at_creation(&place, &exists),
            "disk vda cannot be made in datastore fast: make image /srv/fast/vm/vda.qcow2: File exists (os error 17); remove it \
             there or name another datastore, then try again"
        );
        let full = BlockError::Io {
            action: "create",
            path: place.path.clone(),
            source: io::Error::from_raw_os_error(libc::ENOSPC),
        };
        let said = at_creation(&place, &MoveError::disk("vda")(full));
        assert!(
            said.contains("No space left")
                && said.ends_with("make room there or name another datastore, then try again")
        );
        assert_eq!(said.matches("vda:").count(), 0, "{said}");
    }

    #[test]
    fn says_which_disk_where_and_what_to_do() {
        let said = at_target("vda", "host b, datastore fast", Some((65536, 4096)), Failure { error: 28 });
        assert_eq!(
            said,
            "disk vda: host b, datastore fast cannot write 4096 bytes at byte 65536: No space left on device (os error 28); make \
             room there or name another datastore, then try again"
        );
        let said = at_target("vda", "host b, datastore fast", None, Failure { error: 0 });
        assert!(said.contains("cannot flush") && said.contains("see the log"), "{said}");
    }
}
