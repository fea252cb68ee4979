//! What `BlockDevice` costs: the same requests on the same ring against a bare file, a raw image and an allocated
//! qcow2 image, all with direct I/O, 32 in flight. Prints rates as shares of the bare file's, and the thread's CPU time
//! a request, which a disk shared with others does not blur.
//!
//! Kinds of target take turns, so that a slow moment of the disk hits all of them; the median of the rounds counts.
//! `cargo bench -p vmove-storage`. Run as a test it only makes sure that everything works.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use imago::storage::Storage;
use nix::sys::resource::{UsageWho, getrusage};
use vmove_storage::file::UringFile;
use vmove_storage::{AlignedBuf, BlockDevice, ImageFormat, ImageSpec, OpenOptions, Ring, create};

const QUEUE_DEPTH: usize = 32;

/// How big and how long.
struct Scale {
    disk_bytes: u64,
    rounds: usize,
    round: Duration,
}

struct Case {
    name: &'static str,
    request_bytes: u64,
    random: bool,
    writing: bool,
}

const CASES: [Case; 6] = [
    Case { name: "4 KiB random read", request_bytes: 4 << 10, random: true, writing: false },
    Case { name: "4 KiB random write", request_bytes: 4 << 10, random: true, writing: true },
    Case { name: "64 KiB random read", request_bytes: 64 << 10, random: true, writing: false },
    Case { name: "64 KiB random write", request_bytes: 64 << 10, random: true, writing: true },
    Case { name: "1 MiB sequential read", request_bytes: 1 << 20, random: false, writing: false },
    Case { name: "1 MiB sequential write", request_bytes: 1 << 20, random: false, writing: true },
];

enum Target {
    Bare(UringFile),
    Device(BlockDevice),
}

impl Target {
    async fn request(&self, offset: u64, buffer: &mut AlignedBuf, writing: bool) {
        let result = match (self, writing) {
            (Self::Device(device), false) => {
                device.read(offset, buffer.io_vec_mut()).await.map_err(io::Error::other)
            }
            (Self::Device(device), true) => {
                device.write(offset, buffer.io_vec()).await.map_err(io::Error::other)
            }
            (Self::Bare(file), false) => {
                // SAFETY: page-aligned memory, offset and length; the future is awaited.
                unsafe { file.pure_readv(buffer.io_vec_mut(), offset) }.await
            }
            (Self::Bare(file), true) => {
                // SAFETY: as above.
                unsafe { file.pure_writev(buffer.io_vec(), offset) }.await
            }
        };
        result.unwrap();
    }

    async fn fill(&self, size: u64) {
        let mut piece = AlignedBuf::zeroed(1 << 20);
        piece.fill(0xa5);
        for offset in (0..size).step_by(piece.len()) {
            self.request(offset, &mut piece, true).await;
        }
        self.sync().await;
    }

    /// So that no target pays for the writes of the one before.
    async fn sync(&self) {
        match self {
            Self::Bare(file) => file.sync().await.unwrap(),
            Self::Device(device) => device.flush().await.unwrap(),
        }
    }

    /// One round of requests.
    async fn round(&self, case: &Case, scale: &Scale) -> Round {
        let requests = scale.disk_bytes / case.request_bytes;
        let state = Cell::new(0x9e37_79b9_7f4a_7c15_u64);
        let next = || {
            let mut value = state.get();
            if case.random {
                value ^= value << 13;
                value ^= value >> 7;
                value ^= value << 17;
            } else {
                value += 1;
            }
            state.set(value);
            value % requests * case.request_bytes
        };
        let done = Cell::new(0_u64);
        let (started, cpu) = (Instant::now(), thread_cpu());
        let worker = |_| {
            let (next, done) = (&next, &done);
            async move {
                let mut buffer = AlignedBuf::zeroed(case.request_bytes as usize);
                while started.elapsed() < scale.round {
                    self.request(next(), &mut buffer, case.writing).await;
                    done.set(done.get() + case.request_bytes);
                }
            }
        };
        join_all((0..QUEUE_DEPTH).map(worker)).await;
        let round = Round {
            bytes_per_second: done.get() as f64 / started.elapsed().as_secs_f64(),
            cpu_micros: (thread_cpu() - cpu) / (done.get() / case.request_bytes) as f64,
        };
        self.sync().await;
        round
    }
}

struct Round {
    bytes_per_second: f64,
    /// CPU time of this thread for one request, in microseconds.
    cpu_micros: f64,
}

/// CPU time this thread has used, in microseconds.
fn thread_cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
    [usage.user_time(), usage.system_time()]
        .map(|time| time.tv_sec() as f64 * 1e6 + time.tv_usec() as f64)
        .iter()
        .sum()
}

fn median(rounds: &[Round], value: impl Fn(&Round) -> f64) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn open(ring: &Ring, path: &Path) -> BlockDevice {
    BlockDevice::open(ring, path, OpenOptions::default()).await.unwrap()
}

async fn targets(ring: &Ring, dir: &Path, size: u64) -> [Target; 3] {
    let image = |name: &str, format| {
        let path: PathBuf = dir.join(name);
        create(&path, &ImageSpec::new(format, size)).unwrap();
        path
    };
    let bare = UringFile::open(ring, &image("bare.raw", ImageFormat::Raw), true, true).unwrap();
    if !bare.is_direct() {
        println!("no direct I/O on this file system: these are figures of the page cache");
    }
    let raw = open(ring, &image("disk.raw", ImageFormat::Raw)).await;
    let qcow2 = open(ring, &image("disk.qcow2", ImageFormat::Qcow2)).await;
    let targets = [Target::Bare(bare), Target::Device(raw), Target::Device(qcow2)];
    for target in &targets {
        target.fill(size).await;
    }
    targets
}

async fn measure(ring: Rc<Ring>, scale: Scale) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let targets = targets(&ring, dir.path(), scale.disk_bytes).await;
    println!(
        "{:23} {:>9} {:>6} {:>6}   CPU us: {:>6} {:>6} {:>6}",
        "", "bare MiB/s", "raw", "qcow2", "bare", "raw", "qcow2"
    );
    for case in &CASES {
        let mut rounds = [const { Vec::new() }; 3];
        // Nobody always follows the same one.
        for turn in 0..scale.rounds * targets.len() {
            let index = (turn + turn / targets.len()) % targets.len();
            rounds[index].push(targets[index].round(case, &scale).await);
        }
        let [bare, raw, qcow2] =
            rounds.each_ref().map(|rounds| median(rounds, |round| round.bytes_per_second));
        print!("{:23} {:10.0} {:6.2} {:6.2}", case.name, bare / 1048576.0, raw / bare, qcow2 / bare);
        let [bare, raw, qcow2] = rounds.each_ref().map(|rounds| median(rounds, |round| round.cpu_micros));
        println!("           {bare:6.1} {raw:6.1} {qcow2:6.1}");
    }
}

fn main() {
    // As criterion does: cargo passes `--bench` when it wants figures, and nothing when it runs tests.
    let scale = if std::env::args().any(|argument| argument == "--bench") {
        Scale { disk_bytes: 512 << 20, rounds: 7, round: Duration::from_millis(300) }
    } else {
        Scale { disk_bytes: 4 << 20, rounds: 1, round: Duration::from_millis(1) }
    };
    let ring = Ring::new(64).unwrap();
    ring.block_on(measure(Rc::clone(&ring), scale));
}
