//! What QEMU's tool and the file system say of images: a second opinion that shares no code with vmove.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

/// Bytes an image takes in its file system.
pub fn allocated(image: &Path) -> u64 {
    // stat(2): st_blocks counts 512 bytes.
    fs::metadata(image).unwrap().blocks() * 512
}

/// Asserts that two images, which others may have open, hold the same bytes for a guest.
pub fn assert_equal(one: &Path, other: &Path) {
    let words = ["compare", "-U", "-f", "qcow2", "-F", "qcow2"];
    qemu_img(&words, &[one, other]);
}

/// Asserts that an image that nobody has open is in order.
pub fn assert_clean(image: &Path) {
    let text = qemu_img(&["check", "-f", "qcow2"], &[image]);
    assert!(text.contains("No errors were found"), "{}: {text}", image.display());
}

fn qemu_img(words: &[&str], images: &[&Path]) -> String {
    let output = Command::new("qemu-img").args(words).args(images).output().expect("qemu-img is installed");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {words:?} {images:?}: {text}");
    text
}

/// Files below a directory, without vmove's own marker of a datastore.
pub fn files_below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
            if entry.file_name() != ".vmove-datastore.json" {
                found.push(entry.path().display().to_string());
            }
        }
    }
    found
}
