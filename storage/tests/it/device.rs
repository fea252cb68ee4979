//! `BlockDevice` against a model in memory, judged by the real `qemu-img`.

use std::cell::{Cell, RefCell};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::common::*;
use futures_util::future::{join, join_all};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmove_storage::{
    AlignedBuf, BackingPolicy, BackingSpec, BlockDevice, BlockError, BlockStatus, ImageFormat, ImageSpec,
    IoVector, IoVectorMut, LayerStatus, OpenOptions, create, info,
};

const MIB: u64 = 1 << 20;

/// `workers` tasks at once, each on a stripe of its own of every 192 KiB, so that the outcome is determined while
/// clusters and tables are shared; then a flush, and everything read back.
async fn storm(device: &BlockDevice, model: &RefCell<Vec<u8>>, seed: u64, steps: u64) {
    const WORKERS: u64 = 16;
    const STRIPE: u64 = 12 * 1024;
    let size = device.size();
    let rounds = size / (WORKERS * STRIPE);
    let flushes = Cell::new(0);
    let worker = |worker: u64| {
        let flushes = &flushes;
        async move {
            let mut random = Random(seed * 1000 + worker + 1);
            for step in 0..steps {
                let base = random.below(rounds) * WORKERS * STRIPE + worker * STRIPE;
                let sector = random.below(STRIPE / 512);
                let offset = base + sector * 512;
                let len = (1 + random.below(STRIPE / 512 - sector)) * 512;
                let target = offset as usize..(offset + len) as usize;
                match random.below(20) {
                    0..10 => {
                        let byte = (1 + random.below(255)) as u8;
                        let mut data = AlignedBuf::zeroed(len as usize + 1);
                        data.fill(byte);
                        // Every other write from a misaligned address, which is bounced under direct I/O.
                        let start = usize::from(step % 2 == 0);
                        let data = &data[start..start + len as usize];
                        device.write(offset, IoVector::from(data)).await.unwrap();
                        model.borrow_mut()[target].fill(byte);
                    }
                    10..12 => {
                        device.discard(offset, len).await.unwrap();
                        model.borrow_mut()[target].fill(0);
                    }
                    12..14 => {
                        device.write_zeroes(offset, len, random.below(2) == 0).await.unwrap();
                        model.borrow_mut()[target].fill(0);
                    }
                    14 => {
                        flushes.set(flushes.get() + 1);
                        device.flush().await.unwrap();
                    }
                    15 => {
                        device.block_status(offset, len).await.unwrap();
                    }
                    _ => {
                        let mut data = AlignedBuf::zeroed(len as usize);
                        device.read(offset, data.io_vec_mut()).await.unwrap();
                        assert!(*data == model.borrow()[target], "seed {seed}: wrong data at {offset}+{len}");
                    }
                }
            }
        }
    };
    join_all((0..WORKERS).map(worker)).await;
    device.flush().await.unwrap();
    let mut all = AlignedBuf::zeroed(size as usize);
    device.read(0, all.io_vec_mut()).await.unwrap();
    assert!(*all == model.borrow()[..], "seed {seed}: wrong data at the end");
}

async fn assert_status_is_true(device: &BlockDevice, model: &[u8]) {
    let mut at = 0;
    while at < device.size() {
        let (status, run) = device.block_status(at, device.size() - at).await.unwrap();
        assert!(run > 0);
        if status != BlockStatus::Data {
            let range = at as usize..(at + run) as usize;
            assert!(model[range].iter().all(|&byte| byte == 0), "{status:?} at {at}+{run} is not zero");
        }
        at += run;
    }
}

fn model_test(spec: &ImageSpec, seed: u64) {
    let (_guard, dir) = scratch();
    let path = dir.join(format!("disk.{}", spec.format.name()));
    create(&path, spec).unwrap();
    let model = RefCell::new(vec![0; spec.virtual_bytes as usize]);
    on_ring(async |ring| {
        for round in 0..2 {
            let device = open(&ring, &path).await;
            storm(&device, &model, seed + round, 120).await;
            let contents = model.borrow().clone();
            assert_status_is_true(&device, &contents).await;
            device.close().await.unwrap();
        }
    });
    if spec.format == ImageFormat::Qcow2 {
        assert_consistent(&path);
    }
    assert_contents(&path, spec.format.name(), &model.borrow(), &dir);
}

#[test]
fn random_requests_on_qcow2_with_64k_clusters() {
    for seed in 1..4 {
        model_test(&ImageSpec::new(ImageFormat::Qcow2, 24 * MIB), seed);
    }
}

#[test]
fn random_requests_on_qcow2_with_small_clusters() {
    model_test(&ImageSpec { cluster_bytes: 512, ..ImageSpec::new(ImageFormat::Qcow2, 6 * MIB) }, 10);
    model_test(&ImageSpec { cluster_bytes: 4096, ..ImageSpec::new(ImageFormat::Qcow2, 12 * MIB) }, 11);
}

#[test]
fn random_requests_on_raw() {
    model_test(&ImageSpec::new(ImageFormat::Raw, 12 * MIB), 20);
    // A length that is no multiple of any direct I/O alignment must stay as it is.
    model_test(&ImageSpec::new(ImageFormat::Raw, 12 * MIB + 7), 21);
}

#[test]
fn random_requests_on_an_overlay_leave_the_base_alone() {
    let (_guard, dir) = scratch();
    let (base, top) = (dir.join("base.qcow2"), dir.join("top.qcow2"));
    let size = 12 * MIB;
    create(&base, &ImageSpec::new(ImageFormat::Qcow2, size)).unwrap();
    let model = RefCell::new(vec![0; size as usize]);
    let backing = BackingSpec { name: "base.qcow2".to_owned(), format: ImageFormat::Qcow2 };
    create(&top, &ImageSpec { backing: Some(backing), ..ImageSpec::new(ImageFormat::Qcow2, size) }).unwrap();
    let options = OpenOptions { backing: BackingPolicy::Within(vec![dir.clone()]), ..OpenOptions::default() };
    on_ring(async |ring| {
        let device = open(&ring, &base).await;
        storm(&device, &model, 30, 60).await;
        device.close().await.unwrap();
        drop(device); // With it goes the writer's lock on the base.
        let base_contents = std::fs::read(&base).unwrap();
        let device = BlockDevice::open(&ring, &top, options).await.unwrap();
        assert_eq!(device.layer_status(0, size).await.unwrap(), (LayerStatus::Unallocated, size));
        storm(&device, &model, 31, 120).await;
        let contents = model.borrow().clone();
        assert_status_is_true(&device, &contents).await;
        device.close().await.unwrap();
        assert!(std::fs::read(&base).unwrap() == base_contents);
    });
    assert_consistent(&top);
    assert_contents(&top, "qcow2", &model.borrow(), &dir);
}

#[test]
fn images_made_by_qemu_are_read_and_written() {
    let (_guard, dir) = scratch();
    let mut random = Random(77);
    let source: Vec<u8> =
        (0..8 * MIB).map(|at| if (at >> 17) % 3 == 0 { random.below(256) as u8 } else { 0 }).collect();
    let raw = dir.join("source.raw");
    std::fs::write(&raw, &source).unwrap();
    let cases: [(&str, &[&str]); 4] = [
        ("v2", &["-o", "compat=0.10"]),
        ("v3", &["-o", "compat=1.1,lazy_refcounts=on"]),
        ("compressed", &["-c"]),
        ("narrow", &["-o", "refcount_bits=1,cluster_size=4k"]),
    ];
    for (name, options) in cases {
        let path = dir.join(format!("{name}.qcow2"));
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
        arguments.extend(options);
        arguments.extend([text(&raw), text(&path)]);
        qemu_img_ok(&arguments);
        let model = RefCell::new(source.clone());
        on_ring(async |ring| {
            let device = open(&ring, &path).await;
            let mut all = AlignedBuf::zeroed(source.len());
            device.read(0, all.io_vec_mut()).await.unwrap();
            assert!(*all == source[..], "{name}: wrong data");
            storm(&device, &model, 40, 60).await;
            device.close().await.unwrap();
        });
        assert_consistent(&path);
        assert_contents(&path, "qcow2", &model.borrow(), &dir);
    }
}

#[test]
fn internal_snapshots_survive_writes_and_discards() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    let size = 6 * MIB;
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, size)).unwrap();
    let model = RefCell::new(vec![0; size as usize]);
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        storm(&device, &model, 50, 60).await;
        device.close().await.unwrap();
    });
    let before = model.borrow().clone();
    qemu_img_ok(&["snapshot", "-c", "before", text(&path)]);
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        device.discard(0, MIB).await.unwrap();
        model.borrow_mut()[..MIB as usize].fill(0);
        storm(&device, &model, 51, 60).await;
        device.close().await.unwrap();
    });
    assert_consistent(&path);
    assert_contents(&path, "qcow2", &model.borrow(), &dir);
    qemu_img_ok(&["snapshot", "-a", "before", text(&path)]);
    assert_contents(&path, "qcow2", &before, &dir);
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn discards_give_space_back_and_status_shows_it() {
    for format in [ImageFormat::Qcow2, ImageFormat::Raw] {
        let (_guard, dir) = scratch();
        let path = dir.join(format!("disk.{}", format.name()));
        create(&path, &ImageSpec::new(format, 64 * MIB)).unwrap();
        on_ring(async |ring| {
            let device = open(&ring, &path).await;
            assert_eq!(device.block_status(0, 64 * MIB).await.unwrap(), (BlockStatus::Hole, 64 * MIB));
            let mut data = AlignedBuf::zeroed(8 << 20);
            data.fill(7);
            device.write(16 * MIB, data.io_vec()).await.unwrap();
            device.flush().await.unwrap();
            assert_eq!(device.block_status(0, 64 * MIB).await.unwrap(), (BlockStatus::Hole, 16 * MIB));
            assert_eq!(device.block_status(16 * MIB, 48 * MIB).await.unwrap(), (BlockStatus::Data, 8 * MIB));
            let full = allocated(&path);
            device.discard(16 * MIB + 100, 8 * MIB - 200).await.unwrap();
            device.read(16 * MIB, data.io_vec_mut()).await.unwrap();
            let end = data.len() - 100;
            assert!(data[..100].iter().chain(&data[end..]).all(|&byte| byte == 7));
            assert!(data[100..end].iter().all(|&byte| byte == 0), "a discard reads as zeroes");
            device.discard(0, 64 * MIB).await.unwrap();
            device.flush().await.unwrap();
            assert_eq!(device.block_status(0, 64 * MIB).await.unwrap(), (BlockStatus::Hole, 64 * MIB));
            assert!(allocated(&path) + 7 * MIB < full, "{} of {full} bytes left", allocated(&path));
            device.write_zeroes(MIB, MIB, false).await.unwrap();
            device.close().await.unwrap();
        });
        if format == ImageFormat::Qcow2 {
            assert_consistent(&path);
        }
    }
}

#[test]
fn discarding_a_huge_hole_allocates_nothing() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 1 << 40)).unwrap();
    let before = allocated(&path);
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        device.discard(0, 1 << 40).await.unwrap();
        device.write_zeroes(0, 1 << 40, false).await.unwrap();
        device.close().await.unwrap();
    });
    assert_eq!(allocated(&path), before);
}

/// A reused cluster must not be hit by the discard that freed it, nor a reader by the cluster's next owner.
#[test]
fn discards_racing_with_allocating_writes_lose_nothing() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    const CLUSTER: u64 = 65536;
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 256 * CLUSTER)).unwrap();
    on_ring(async |ring| {
        let owned = open(&ring, &path).await;
        let device = &owned;
        let churn = |index: u64| async move {
            let mut data = AlignedBuf::zeroed(CLUSTER as usize);
            for round in 0..40 {
                let byte = (index * 40 + round) as u8 | 1;
                data.fill(byte);
                device.write(index * CLUSTER, data.io_vec()).await.unwrap();
                data.fill(0);
                device.read(index * CLUSTER, data.io_vec_mut()).await.unwrap();
                assert!(data.iter().all(|&read| read == byte), "cluster {index} round {round}");
                device.discard(index * CLUSTER, CLUSTER).await.unwrap();
            }
            data.fill(index as u8 | 1);
            device.write(index * CLUSTER, data.io_vec()).await.unwrap();
        };
        join_all((0..32).map(churn)).await;
        device.flush().await.unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() < 80 * CLUSTER, "freed clusters are reused");
        let mut data = AlignedBuf::zeroed(CLUSTER as usize);
        for index in 0..32 {
            device.read(index * CLUSTER, data.io_vec_mut()).await.unwrap();
            assert!(data.iter().all(|&read| read == index as u8 | 1));
        }
        owned.close().await.unwrap();
    });
    assert_consistent(&path);
}

/// Writes already under way on a cluster that is discarded meanwhile must not touch its next owner's data.
/// (Misaligned writes to one sector queue up with their place in the file looked up long before they are done.)
#[test]
fn writes_under_way_never_reach_a_reused_cluster() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    let cluster = 65536;
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 64 * cluster)).unwrap();
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        let filled = |byte| AlignedBuf::from_slice(&vec![byte; cluster as usize]);
        let (ones, twos) = (filled(1), filled(2));
        let mut check = AlignedBuf::zeroed(cluster as usize);
        for round in 0..20 {
            device.write(0, ones.io_vec()).await.unwrap();
            let writing = join_all((0..50).map(|_| device.write(100, IoVector::from(&ones[..100]))));
            let reusing = async {
                device.discard(0, cluster).await.unwrap();
                device.write(cluster, twos.io_vec()).await.unwrap();
            };
            let (written, ()) = join(writing, reusing).await;
            written.into_iter().collect::<Result<(), _>>().unwrap();
            device.read(cluster, check.io_vec_mut()).await.unwrap();
            assert!(check.iter().all(|&byte| byte == 2), "round {round}: a write hit the next owner's data");
            device.discard(0, 64 * cluster).await.unwrap();
        }
        device.close().await.unwrap();
    });
    assert_consistent(&path);
}

#[test]
fn guest_memory_is_read_and_written_in_place() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 16 * MIB)).unwrap();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    memory.write_slice(&[0x5a; 8192], GuestAddress(0x1000)).unwrap();
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        let slices = [
            memory.get_slice(GuestAddress(0x1000), 4096).unwrap(),
            memory.get_slice(GuestAddress(0x2000), 4096).unwrap(),
        ];
        let (vector, _guard) = IoVector::from_volatile_slice(&slices[..]);
        device.write(4096, vector).await.unwrap();
        device.flush().await.unwrap();
        let target = memory.get_slice(GuestAddress(0x8000), 12288).unwrap();
        let parts = [target.subslice(0, 512).unwrap(), target.subslice(512, 11776).unwrap()];
        let (vector, _guard) = IoVectorMut::from_volatile_slice(&parts[..]);
        device.read(0, vector).await.unwrap();
        device.close().await.unwrap();
    });
    let mut bytes = [0; 12288];
    memory.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
    assert!(bytes[..4096].iter().all(|&byte| byte == 0) && bytes[4096..].iter().all(|&byte| byte == 0x5a));
}

#[test]
fn flushed_writes_are_there_without_a_close() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 16 * MIB)).unwrap();
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        for index in 0..32 {
            let data = AlignedBuf::from_slice(&[index as u8 + 1; 4096]);
            device.write(index * 300_000 / 512 * 512, data.io_vec()).await.unwrap();
        }
        device.flush().await.unwrap();
        drop(device);
        let device = open(&ring, &path).await;
        for index in 0..32 {
            let mut data = AlignedBuf::zeroed(4096);
            device.read(index * 300_000 / 512 * 512, data.io_vec_mut()).await.unwrap();
            assert!(data.iter().all(|&byte| byte == index as u8 + 1));
        }
    });
}

#[test]
fn dropped_requests_leave_memory_and_image_sound() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, 16 * MIB)).unwrap();
    on_ring(async |ring| {
        let device = open(&ring, &path).await;
        let mut random = Random(5);
        for _ in 0..200 {
            let mut data = AlignedBuf::zeroed(65536);
            let offset = random.below(250) * 65536;
            data.fill(1);
            let polls = random.below(4);
            let mut request: std::pin::Pin<Box<dyn Future<Output = _>>> = match random.below(3) {
                0 => Box::pin(device.write(offset, data.io_vec())),
                1 => Box::pin(device.discard(offset, 65536)),
                _ => Box::pin(device.read(offset, data.io_vec_mut())),
            };
            for _ in 0..polls {
                if futures_util::poll!(request.as_mut()).is_ready() {
                    break;
                }
            }
            drop(request);
            drop(data);
        }
        device.close().await.unwrap();
    });
    assert_consistent(&path);
}

#[test]
fn requests_out_of_bounds_and_writes_to_read_only_disks_are_refused() {
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec::new(ImageFormat::Qcow2, MIB)).unwrap();
    on_ring(async |ring| {
        let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
        let device = BlockDevice::open(&ring, &path, read_only).await.unwrap();
        let mut data = AlignedBuf::zeroed(512);
        assert!(matches!(device.write(0, data.io_vec()).await, Err(BlockError::ReadOnly { .. })));
        assert!(matches!(device.discard(0, 512).await, Err(BlockError::ReadOnly { .. })));
        for offset in [MIB, MIB - 511, u64::MAX] {
            let result = device.read(offset, data.io_vec_mut()).await;
            assert!(matches!(result, Err(BlockError::OutOfRange { .. })), "{offset}");
        }
        assert!(device.block_status(0, 0).await.is_err());
        device.flush().await.unwrap();
    });
}

#[test]
fn created_images_are_what_qemu_creates() {
    let (_guard, dir) = scratch();
    for (index, cluster_bytes) in [512, 65536, 2 << 20].into_iter().enumerate() {
        let path = dir.join(format!("{index}.qcow2"));
        create(&path, &ImageSpec { cluster_bytes, ..ImageSpec::new(ImageFormat::Qcow2, 100 * MIB) }).unwrap();
        assert_consistent(&path);
        let json = qemu_img_ok(&["info", "--output=json", text(&path)]);
        let theirs: serde_json::Value = serde_json::from_str(&json).unwrap();
        let ours = info(&path).unwrap();
        assert_eq!(theirs["virtual-size"], ours.virtual_bytes);
        assert_eq!(theirs["cluster-size"], cluster_bytes);
        assert_eq!(theirs["actual-size"], ours.allocated_bytes);
        assert_eq!(theirs["format-specific"]["data"]["compat"], "1.1");
    }
}
