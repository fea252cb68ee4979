//! The same images through a second, independent qcow2 implementation (the crate `qcow2-rs`): each side reads what
//! the other wrote, and `qemu-img` judges both.
//!
//! That crate carries no guest data, it is a witness only, kept to what it does reliably: it reads anything here,
//! but writes only to flat version 3 images with 64 KiB clusters and 16 bit refcounts that hold no zero clusters,
//! with caches that hold every table, and through plain file I/O of ours. What never enters: tests that need no
//! second implementation (`tests/it`).

#[path = "it/common.rs"]
#[allow(dead_code, reason = "shared with the other test target, which uses all of it")]
mod common;

use std::cell::RefCell;
use std::fs::File;
use std::future::poll_fn;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::task::Poll;

use common::*;
use futures_util::future::join_all;
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::error::Qcow2Result;
use qcow2_rs::ops::Qcow2IoOps;
use qcow2_rs::utils::qcow2_alloc_dev;
use vmove_storage::{
    AlignedBuf, BackingPolicy, BackingSpec, BlockDevice, BlockStatus, ImageFormat, ImageSpec, OpenOptions,
    create,
};

const MIB: u64 = 1 << 20;
/// Tasks at once, each on a stripe of its own, so that the outcome is determined while clusters are shared.
const WORKERS: u64 = 8;
/// Three clusters of 64 KiB and a bit: requests meet clusters in every way.
const STRIPE: u64 = 200 * 1024;
/// The part of the disk at each of the model's places that is written.
const WINDOW: u64 = 2 * WORKERS * STRIPE;
const SECTOR: u64 = 512;
/// Cluster size the second implementation writes with.
const CLUSTER: u64 = 65536;

/// Plain file I/O for the second implementation, which yields before it acts so that requests overtake each other.
struct PlainFile {
    file: File,
    random: RefCell<Random>,
}

impl PlainFile {
    async fn yield_sometimes(&self) {
        let mut turns = self.random.borrow_mut().below(3);
        poll_fn(|context| {
            if turns == 0 {
                return Poll::Ready(());
            }
            turns -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }
}

impl Qcow2IoOps for PlainFile {
    async fn read_to(&self, offset: u64, buffer: &mut [u8]) -> Qcow2Result<usize> {
        self.yield_sometimes().await;
        let mut done = 0;
        while done < buffer.len() {
            let read = self.file.read_at(&mut buffer[done..], offset + done as u64)?;
            if read == 0 {
                // An image may end inside of its last cluster.
                buffer[done..].fill(0);
                break;
            }
            done += read;
        }
        Ok(buffer.len())
    }

    async fn write_from(&self, offset: u64, buffer: &[u8]) -> Qcow2Result<()> {
        self.yield_sometimes().await;
        Ok(self.file.write_all_at(buffer, offset)?)
    }

    /// Only ever asked to make a range read as zeroes.
    async fn fallocate(&self, offset: u64, len: usize, _flags: u32) -> Qcow2Result<()> {
        self.write_from(offset, &vec![0; len]).await
    }

    async fn fsync(&self, _offset: u64, _len: usize, _flags: u32) -> Qcow2Result<()> {
        self.yield_sometimes().await;
        Ok(()) // Nothing here loses power.
    }
}

type Witness = Qcow2Dev<PlainFile>;

async fn open_witness(path: &Path, writable: bool, seed: u64) -> Witness {
    let top = open_witness_layer(path, writable, false, seed).await;
    top.qcow2_prep_io().await.unwrap();
    top
}

async fn open_witness_layer(path: &Path, writable: bool, below: bool, seed: u64) -> Witness {
    let cluster_bits = vmove_storage::info(path).unwrap().cluster_bytes.unwrap().trailing_zeros() as u8;
    let slice_bits = cluster_bits.min(12);
    let caches = Some((slice_bits, 4 << 20));
    let parameters = Qcow2DevParams::new(9, caches, caches, !writable, false);
    if below {
        parameters.mark_backing_dev(Some(true));
    }
    let file = File::options().read(true).write(writable).open(path).unwrap();
    let io = PlainFile { file, random: RefCell::new(Random(seed)) };
    let (mut device, backing) = qcow2_alloc_dev(path, io, &parameters).await.unwrap();
    if let Some(name) = backing {
        let base = path.parent().unwrap().join(name);
        device.set_backing_dev(Box::new(Box::pin(open_witness_layer(&base, false, true, seed)).await));
    }
    device
}

/// What the disk should hold: bytes at a few places, zeroes elsewhere.
struct Model {
    size: u64,
    /// Offsets of the windows on the disk.
    places: Vec<u64>,
    /// The windows, one after the other.
    bytes: RefCell<Vec<u8>>,
}

impl Model {
    fn new(size: u64, places: &[u64]) -> Self {
        assert!(places.iter().all(|place| place + WINDOW <= size));
        let bytes = RefCell::new(vec![0; places.len() * WINDOW as usize]);
        Self { size, places: places.to_vec(), bytes }
    }

    /// Offset on the disk of the model's byte `at`.
    fn offset(&self, at: u64) -> u64 {
        self.places[(at / WINDOW) as usize] + at % WINDOW
    }

    fn is(&self, at: u64, bytes: &[u8]) -> bool {
        self.bytes.borrow()[at as usize..][..bytes.len()] == *bytes
    }

    /// QEMU sees a sound image with these contents and zeroes elsewhere.
    fn assert_qemu_agrees(&self, path: &Path) {
        assert_consistent(path);
        let raw = path.with_extension("expected");
        let expected = File::create(&raw).unwrap();
        expected.set_len(self.size).unwrap();
        for (place, window) in self.places.iter().zip(self.bytes.borrow().chunks(WINDOW as usize)) {
            expected.write_all_at(window, *place).unwrap();
        }
        qemu_img_ok(&["compare", "-f", "qcow2", "-F", "raw", text(path), text(&raw)]);
    }
}

/// Names the seed of a test that panics, wherever it does.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the failing seed is {}", self.0);
        }
    }
}

/// One of the two implementations.
enum Engine {
    Ours(BlockDevice),
    Witness(Witness),
}

impl Engine {
    async fn write(&self, offset: u64, data: &AlignedBuf) {
        match self {
            Self::Ours(device) => device.write(offset, data.io_vec()).await.unwrap(),
            Self::Witness(device) => device.write_at(data, offset).await.unwrap(),
        }
    }

    async fn read(&self, offset: u64, len: u64) -> AlignedBuf {
        let mut data = AlignedBuf::zeroed(len as usize);
        data.fill(0x55);
        match self {
            Self::Ours(device) => device.read(offset, data.io_vec_mut()).await.unwrap(),
            Self::Witness(device) => assert_eq!(device.read_at(&mut data, offset).await.unwrap(), data.len()),
        }
        data
    }

    /// Zeroes a range; only ours does.
    async fn zero(&self, offset: u64, len: u64, how: u64) {
        let Self::Ours(device) = self else { panic!("the second implementation does not zero") };
        match how {
            0 => device.discard(offset, len).await.unwrap(),
            _ => device.write_zeroes(offset, len, how == 1).await.unwrap(),
        }
    }

    async fn flush(&self) {
        match self {
            Self::Ours(device) => device.flush().await.unwrap(),
            Self::Witness(device) => device.flush_meta().await.unwrap(),
        }
    }

    async fn close(self) {
        match self {
            Self::Ours(device) => device.close().await.unwrap(),
            Self::Witness(device) => device.flush_meta().await.unwrap(),
        }
    }

    /// The windows hold what the model says, and samples of everything else are zero.
    async fn assert_agrees(&self, model: &Model) {
        for at in (0..model.places.len() as u64 * WINDOW).step_by(STRIPE as usize) {
            let data = self.read(model.offset(at), STRIPE).await;
            assert!(model.is(at, &data), "wrong data at {}+{STRIPE}", model.offset(at));
        }
        for at in (0..model.size).step_by((model.size / 64).next_multiple_of(CLUSTER) as usize) {
            let outside = model.places.iter().all(|place| at + SECTOR <= *place || place + WINDOW <= at);
            if outside {
                assert!(self.read(at, SECTOR).await.iter().all(|&byte| byte == 0), "not zero at {at}");
            }
        }
    }

    /// Random requests of [`WORKERS`] tasks at once; `zeroing`: also discards and zeroings.
    async fn storm(&self, model: &Model, seed: u64, steps: u64, zeroing: bool) {
        let stripes = model.places.len() as u64 * WINDOW / (WORKERS * STRIPE);
        let worker = |worker: u64| async move {
            let mut random = Random(seed * 1000 + worker + 1);
            for _ in 0..steps {
                let base = (random.below(stripes) * WORKERS + worker) * STRIPE;
                let first = random.below(STRIPE / SECTOR);
                let longest = STRIPE / SECTOR - first;
                let longest = if random.below(2) == 0 { longest.min(16) } else { longest };
                let (at, len) = (base + first * SECTOR, (1 + random.below(longest)) * SECTOR);
                let target = at as usize..(at + len) as usize;
                let offset = model.offset(at);
                match random.below(16) {
                    0..4 if zeroing => {
                        self.zero(offset, len, random.below(3)).await;
                        model.bytes.borrow_mut()[target].fill(0);
                    }
                    0..10 => {
                        let mut data = AlignedBuf::zeroed(len as usize);
                        let (value, step) = (random.below(256), random.below(256) | 1);
                        for (index, byte) in (0_u64..).zip(data.iter_mut()) {
                            *byte = (value + (index >> 5) * step) as u8;
                        }
                        self.write(offset, &data).await;
                        model.bytes.borrow_mut()[target].copy_from_slice(&data);
                    }
                    10 => self.flush().await,
                    _ => {
                        let data = self.read(offset, len).await;
                        assert!(model.is(at, &data), "wrong data at {offset}+{len}");
                    }
                }
            }
        };
        join_all((0..WORKERS).map(worker)).await;
    }
}

/// Ours writes, twice with a close between; the witness reads.
fn witness_reads_ours(cluster_bytes: u64, size: u64, places: &[u64], seed: u64) {
    let _seed = Seed(seed);
    let (_guard, dir) = scratch();
    let path = dir.join("disk.qcow2");
    create(&path, &ImageSpec { cluster_bytes, ..ImageSpec::new(ImageFormat::Qcow2, size) }).unwrap();
    let model = Model::new(size, places);
    on_ring(async |ring| {
        for round in 0..2 {
            let ours = Engine::Ours(open(&ring, &path).await);
            ours.storm(&model, seed + round, 40, true).await;
            ours.close().await;
            Engine::Witness(open_witness(&path, false, seed).await).assert_agrees(&model).await;
        }
    });
    model.assert_qemu_agrees(&path);
}

#[test]
fn a_second_implementation_reads_what_ours_wrote() {
    // The second window lies across the border of two L2 tables, the third ends with the disk.
    let size = 600 * MIB;
    for seed in [1, 2, 3] {
        witness_reads_ours(CLUSTER, size, &[0, 510 * MIB, size - WINDOW], seed * 100);
    }
    let size = 24 * MIB + 512;
    witness_reads_ours(4096, size, &[0, 8 * MIB, size - WINDOW], 400);
    witness_reads_ours(512, size, &[MIB, 8 * MIB, size - WINDOW], 500);
}

#[test]
fn a_second_implementation_reads_overlays_ours_wrote() {
    for seed in [600, 700] {
        let _seed = Seed(seed);
        let (_guard, dir) = scratch();
        let (base, top) = (dir.join("base.qcow2"), dir.join("top.qcow2"));
        let size = 24 * MIB;
        let model = Model::new(size, &[MIB, 16 * MIB]);
        let spec = ImageSpec::new(ImageFormat::Qcow2, size);
        let backing = Some(BackingSpec { name: "base.qcow2".to_owned(), format: ImageFormat::Qcow2 });
        create(&base, &spec).unwrap();
        create(&top, &ImageSpec { backing, ..spec }).unwrap();
        let options =
            OpenOptions { backing: BackingPolicy::Within(vec![dir.clone()]), ..OpenOptions::default() };
        on_ring(async |ring| {
            let ours = Engine::Ours(open(&ring, &base).await);
            ours.storm(&model, seed, 40, true).await;
            ours.close().await;
            let ours = Engine::Ours(BlockDevice::open(&ring, &top, options).await.unwrap());
            ours.storm(&model, seed + 1, 20, true).await;
            ours.close().await;
            Engine::Witness(open_witness(&top, false, seed).await).assert_agrees(&model).await;
        });
        model.assert_qemu_agrees(&top);
    }
}

#[test]
fn ours_reads_what_a_second_implementation_wrote() {
    for seed in [1000, 1100, 1200, 1300] {
        let _seed = Seed(seed);
        let (_guard, dir) = scratch();
        let path = dir.join("disk.qcow2");
        let size = 600 * MIB;
        let spec = ImageSpec::new(ImageFormat::Qcow2, size);
        assert_eq!(spec.cluster_bytes, CLUSTER);
        create(&path, &spec).unwrap();
        let model = Model::new(size, &[0, 510 * MIB, size - WINDOW]);
        on_ring(async |ring| {
            // By turns, so that each also goes on where the other left off.
            for round in 0..2 {
                let witness = Engine::Witness(open_witness(&path, true, seed + round).await);
                witness.storm(&model, seed + 10 * round, 30, false).await;
                witness.close().await;
                model.assert_qemu_agrees(&path);
                let device = open(&ring, &path).await;
                // Not a cluster of what lies between was touched.
                let gap = WINDOW.next_multiple_of(CLUSTER);
                let len = 510 * MIB - gap;
                assert_eq!(device.block_status(gap, len).await.unwrap(), (BlockStatus::Hole, len));
                let ours = Engine::Ours(device);
                ours.assert_agrees(&model).await;
                ours.storm(&model, seed + 10 * round + 1, 30, round == 1).await;
                ours.close().await;
            }
            Engine::Witness(open_witness(&path, false, seed).await).assert_agrees(&model).await;
        });
        model.assert_qemu_agrees(&path);
    }
}
