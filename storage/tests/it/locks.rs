//! Image locks against the real `qemu-img` and `qemu-storage-daemon`-style users.

use crate::common::*;
use vmove_storage::{
    BlockDevice, BlockError, ImageFormat, ImageLock, ImageSpec, LockMode, OpenOptions, create,
};

#[test]
fn qemu_img_refuses_an_image_in_use() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        for command in ["info", "check"] {
            let output = qemu_img(&[command, text(&path)]);
            assert!(!output.status.success());
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(error.contains("lock"), "{error}");
        }
        qemu_img_ok(&["info", "-U", text(&path)]);
        let second = BlockDevice::open(&ring, &path, OpenOptions::default()).await;
        assert!(matches!(second, Err(BlockError::Locked { .. })));
        device.close().await.unwrap();
    });
    qemu_img_ok(&["check", text(&path)]);
}

#[test]
fn qemu_img_may_read_beside_our_readers_but_not_write() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
    let lock = ImageLock::take(&path, LockMode::Read).unwrap();
    qemu_img_ok(&["info", text(&path)]);
    assert!(!qemu_img(&["resize", text(&path), "2M"]).status.success());
    drop(lock);
    qemu_img_ok(&["resize", text(&path), "2M"]);
}

#[test]
fn an_image_that_qemu_has_open_is_refused() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
    // qemu-io waits for commands on its standard input with the image open.
    let mut qemu = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", text(&path)])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0];
    std::io::Read::read_exact(qemu.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    let error = ImageLock::take(&path, LockMode::Write).unwrap_err();
    assert!(error.to_string().contains(text(&path)), "{error}");
    assert!(matches!(ImageLock::take(&path, LockMode::Read), Err(BlockError::Locked { .. })));
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    ImageLock::take(&path, LockMode::Write).unwrap();
}
