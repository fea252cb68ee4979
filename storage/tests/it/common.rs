//! Helpers of the storage tests: images in a temporary directory, and the real `qemu-img` to judge them.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;

use vmove_storage::{BlockDevice, OpenOptions, Ring};

/// Small deterministic generator (xorshift64*), so that a failing seed can be run again.
pub struct Random(pub u64);

impl Random {
    /// The next number, less than `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

/// Runs `qemu-img`; whatever it says.
pub fn qemu_img(arguments: &[&str]) -> Output {
    Command::new("qemu-img").args(arguments).output().expect("qemu-img (package qemu-utils) is installed")
}

/// Runs `qemu-img`, which must succeed.
pub fn qemu_img_ok(arguments: &[&str]) -> String {
    let output = qemu_img(arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A path as the string that command lines take.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The image passes `qemu-img check` without errors or leaks.
pub fn assert_consistent(path: &Path) {
    qemu_img_ok(&["check", "-f", "qcow2", text(path)]);
}

/// The image has exactly these contents, as `qemu-img compare` sees it.
pub fn assert_contents(path: &Path, format: &str, expected: &[u8], scratch: &Path) {
    let raw = scratch.join("expected.raw");
    std::fs::write(&raw, expected).unwrap();
    qemu_img_ok(&["compare", "-f", format, "-F", "raw", text(path), text(&raw)]);
}

/// A directory on a real disk: `/tmp` may be memory, which has no direct I/O.
pub fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}

/// Runs a test body on a ring of its own.
pub fn on_ring<T, F: Future<Output = T>>(body: impl FnOnce(Rc<Ring>) -> F) -> T {
    let ring = Ring::new(64).unwrap();
    let future = body(Rc::clone(&ring));
    ring.block_on(future)
}

/// Opens for writing with default options.
pub async fn open(ring: &Ring, path: &Path) -> BlockDevice {
    BlockDevice::open(ring, path, OpenOptions::default()).await.unwrap()
}
