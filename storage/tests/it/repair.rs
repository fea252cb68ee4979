//! Checking and repairing, with `qemu-img check` as the judge, on images that were damaged or never closed.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmove_storage::header::Header;
use vmove_storage::{
    AlignedBuf, BlockDevice, BlockError, ImageFormat, ImageSpec, OpenOptions as Open, check, create, repair,
};

use crate::common::*;

const MIB: u64 = 1 << 20;

/// An image with some data, and its contents.
fn sample(path: &Path, cluster_bytes: u64) -> Vec<u8> {
    let size = 8 * MIB;
    create(path, &ImageSpec { cluster_bytes, ..ImageSpec::new(ImageFormat::Qcow2, size) }).unwrap();
    let mut model = vec![0; size as usize];
    on_ring(async |ring| {
        let device = open(&ring, path).await;
        for (byte, at) in [(1, 0), (2, 3 * MIB + 4096), (3, 7 * MIB)] {
            let data = AlignedBuf::from_slice(&vec![byte; 300_000]);
            device.write(at, data.io_vec()).await.unwrap();
            model[at as usize..][..300_000].fill(byte);
        }
        device.close().await.unwrap();
    });
    model
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

#[test]
fn clean_images_are_found_clean_and_counted() {
    let (_guard, dir) = scratch();
    for cluster_bytes in [512, 4096, 65536] {
        let path = dir.join(format!("{cluster_bytes}.qcow2"));
        sample(&path, cluster_bytes);
        let report = check(&path).unwrap();
        assert!(report.is_clean(), "{report:?}");
        let json = qemu_img_ok(&["check", "--output=json", text(&path)]);
        let theirs: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(theirs["allocated-clusters"], report.data_clusters);
        assert_eq!(theirs["total-clusters"], report.virtual_clusters);
        assert_eq!(repair(&path).unwrap(), report, "nothing to repair");
    }
}

#[test]
fn images_by_qemu_with_snapshots_and_compression_are_understood() {
    let (_guard, dir) = scratch();
    let (plain, path) = (dir.join("plain.qcow2"), dir.join("disk.qcow2"));
    sample(&plain, 65536);
    for options in ["cluster_size=64k", "cluster_size=4k,refcount_bits=1", "compat=0.10"] {
        let _ = fs::remove_file(&path);
        qemu_img_ok(&["convert", "-c", "-O", "qcow2", "-o", options, text(&plain), text(&path)]);
        let report = check(&path).unwrap();
        assert!(report.is_clean() && report.compressed_clusters > 0, "{options}: {report:?}");
        if !options.contains("refcount_bits=1") {
            qemu_img_ok(&["snapshot", "-c", "one", text(&path)]);
            qemu_img_ok(&["snapshot", "-c", "two", text(&path)]);
            let report = check(&path).unwrap();
            assert!(report.is_clean(), "{options}: {report:?}");
        }
    }
}

#[test]
fn wrong_refcounts_are_found_and_rebuilt() {
    let (_guard, dir) = scratch();
    for cluster_bytes in [512, 65536] {
        let path = dir.join(format!("{cluster_bytes}.qcow2"));
        let model = sample(&path, cluster_bytes);
        qemu_img_ok(&["snapshot", "-c", "kept", text(&path)]);
        let table = Header::read(&path).unwrap().refcount_table_offset;
        let mut entry = [0; 8];
        fs::File::open(&path).unwrap().read_exact_at(&mut entry, table).unwrap();
        let block = u64::from_be_bytes(entry);
        // Some too low, some too high.
        overwrite(&path, block + 8, &[0; 40]);
        overwrite(&path, block + 100, &[0, 9]);
        let before = check(&path).unwrap();
        assert!(before.refcounts_too_low > 0 && before.leaked_clusters > 0, "{before:?}");
        assert!(!qemu_img(&["check", text(&path)]).status.success());
        assert!(repair(&path).unwrap().repaired);
        let after = check(&path).unwrap();
        assert!(after.is_clean(), "{after:?}");
        assert_consistent(&path);
        assert_contents(&path, "qcow2", &model, &dir);
        on_ring(async |ring| {
            let device = open(&ring, &path).await;
            let data = AlignedBuf::from_slice(&vec![9; 2 << 20]);
            device.write(MIB, data.io_vec()).await.unwrap();
            device.close().await.unwrap();
        });
        assert_consistent(&path);
        qemu_img_ok(&["snapshot", "-a", "kept", text(&path)]);
        assert_contents(&path, "qcow2", &model, &dir);
    }
}

#[test]
fn invalid_tables_are_reported_and_left_alone() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    sample(&path, 65536);
    let l1 = Header::read(&path).unwrap().l1_offset;
    overwrite(&path, l1, &(1u64 << 50).to_be_bytes());
    let before = fs::read(&path).unwrap();
    let report = repair(&path).unwrap();
    assert!(report.invalid_entries > 0 && !report.repaired && report.has_errors());
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn an_image_that_was_never_closed_is_marked_and_mended_on_opening() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 8 * MIB)).unwrap();
    let mut model = vec![0; 8 << 20];
    on_ring(async |ring| {
        for round in 0..20u64 {
            let device = open(&ring, &path).await;
            let mut all = AlignedBuf::zeroed(model.len());
            device.read(0, all.io_vec_mut()).await.unwrap();
            assert!(all[..4 << 20] == model[..4 << 20], "round {round}");
            for step in 0..10 {
                let byte = (round * 10 + step) as u8 | 1;
                let at = (round * 7 + step * 13) % 62 * 65536;
                let data = AlignedBuf::from_slice(&vec![byte; 100_000]);
                device.write(at, data.io_vec()).await.unwrap();
                model[at as usize..][..100_000].fill(byte);
            }
            device.discard(round % 60 * 65536, 65536).await.unwrap();
            model[(round % 60 * 65536) as usize..][..65536].fill(0);
            device.flush().await.unwrap();
            // Not flushed: may be there or not, but must not harm the rest.
            let data = AlignedBuf::from_slice(&vec![0xee; 1 << 20]);
            device.write(5 * MIB, data.io_vec()).await.unwrap();
            device.discard(5 * MIB, 65536).await.unwrap();
            drop(device);
            assert!(check(&path).unwrap().dirty);
            let read_only = Open { read_only: true, ..Open::default() };
            let refused = BlockDevice::open(&ring, &path, read_only).await;
            let message = refused.unwrap_err().to_string();
            assert!(message.contains("vmove image check"), "{message}");
        }
        open(&ring, &path).await.close().await.unwrap();
    });
    let report = check(&path).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_consistent(&path);
}

#[test]
fn an_image_in_use_is_not_checked() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    sample(&path, 65536);
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        assert!(matches!(check(&path), Err(BlockError::Locked { .. })));
        device.close().await.unwrap();
    });
}

/// Damaged images end in errors or in wrong data, never in a panic, a hang or a process out of memory.
#[test]
fn random_damage_is_survived() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    sample(&path, 4096);
    let good = fs::read(&path).unwrap();
    let mut state = 1u64;
    let mut random = |limit: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % limit
    };
    let header = Header::read(&path).unwrap();
    let tables = [0, header.l1_offset, header.refcount_table_offset, header.refcount_table_offset + 4096];
    for _ in 0..200 {
        let mut bytes = good.clone();
        for _ in 0..=random(6) {
            let near = tables[random(4) as usize] + random(160);
            let at = if random(3) == 0 { random(bytes.len() as u64) } else { near };
            bytes[at as usize] = random(256) as u8;
        }
        if random(5) == 0 {
            bytes.truncate(random(good.len() as u64) as usize);
        }
        fs::write(&path, &bytes).unwrap();
        let _ = vmove_storage::info(&path);
        let _ = check(&path);
        on_ring(async |ring| {
            let Ok(device) = BlockDevice::open(&ring, &path, Open::default()).await else { return };
            if device.size() > 1 << 30 {
                return;
            }
            let mut data = AlignedBuf::zeroed(MIB as usize);
            for at in (0..device.size() / MIB).map(|index| index * MIB) {
                let _ = device.read(at, data.io_vec_mut()).await;
                let _ = device.block_status(at, MIB).await;
                let _ = device.write(at, data.io_vec()).await;
                let _ = device.discard(at, MIB / 2).await;
            }
            let _ = device.close().await;
        });
        let _ = repair(&path);
    }
}
