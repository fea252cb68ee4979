//! Watching a running VM for some seconds, for an estimate of its move: by the dirty log that a move uses, and the disks' own counters.
//!
//! One watch at a time, and none beside anything else that needs the dirty log: whoever does calls [`Watch::give_way`] first. Lives here:
//! what is watched, and for how long. Never enters: what is foreseen from it (`vmove_mirror::predict`).

use std::{
    fs::File,
    io::Write,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use vmove_mirror::{
    PAGE_BYTES,
    pages::PageSet,
    predict::{DirtyPoint, DirtySampler, Span},
};

use crate::{
    machine::Machine,
    memory::{self, is_zero},
};

/// The shortest span over which pages are counted.
const WINDOW: Duration = Duration::from_millis(50);
/// The longest watch that is asked for.
pub const LONGEST: Duration = Duration::from_mins(1);
/// Pages looked at to tell how many of those touched are zero.
const SAMPLES: u64 = 1024;
/// Records synced to see how long one takes.
const SYNCS: u32 = 5;

/// What was seen of a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measurement {
    /// Distinct pages that turned dirty within growing spans: `(µs, fewest, most)`.
    pub dirty: Vec<(u64, u64, u64)>,
    /// Pages of the RAM.
    pub ram_pages: u64,
    /// Pages that were ever touched.
    pub resident_pages: u64,
    /// Of those, zero ones, of 1000, by sample.
    pub zero_permille: u64,
    /// What the guest wrote to each disk: its name, bytes a second.
    pub disks: Vec<(String, u64)>,
    /// A record synced in the VM's directory, µs: median and longest of a few.
    pub sync_us: (u64, u64),
    /// How long was watched, ms.
    pub watched_ms: u64,
}

/// The one watch of a VM process.
#[derive(Debug, Default)]
pub struct Watch(Mutex<Stage>);

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Idle,
    Going {
        /// Dropped to end it early.
        stop: Sender<()>,
        thread: JoinHandle<Result<Measurement, String>>,
    },
    Ended(Result<Measurement, String>),
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to watch; `dir` is where the VM's records are synced.
    ///
    /// # Errors
    /// One is going on, or no thread is to be had.
    pub fn begin(&self, machine: Arc<Machine>, dir: &Path, time: Duration) -> Result<(), String> {
        let mut stage = self.lock();
        if matches!(&*stage, Stage::Going { thread, .. } if !thread.is_finished()) {
            return Err("the VM is being measured already".into());
        }
        let (stop, stopped) = mpsc::channel();
        let (dir, time) = (dir.to_owned(), time.min(LONGEST));
        let thread = thread::Builder::new()
            .name("measure".into())
            .spawn(move || watch(&machine, &dir, time, &stopped))
            .map_err(|error| format!("start a thread: {error}"))?;
        *stage = Stage::Going { stop, thread };
        Ok(())
    }

    /// What was seen; none while it goes on.
    ///
    /// # Errors
    /// It failed, was ended early, or never began.
    pub fn result(&self) -> Result<Option<Measurement>, String> {
        let mut stage = self.lock();
        match std::mem::take(&mut *stage) {
            Stage::Idle => Err("nothing was measured".into()),
            Stage::Going { stop, thread } if !thread.is_finished() => {
                *stage = Stage::Going { stop, thread };
                Ok(None)
            }
            Stage::Going { thread, .. } => {
                let result =
                    thread.join().unwrap_or_else(|_| Err("the measuring thread has panicked".into()));
                *stage = Stage::Ended(result.clone());
                result.map(Some)
            }
            Stage::Ended(result) => {
                *stage = Stage::Ended(result.clone());
                result.map(Some)
            }
        }
    }

    /// Ends a watch that goes on. When this returns the dirty log is off and the machine is let go.
    pub fn give_way(&self) {
        let mut stage = self.lock();
        if let Stage::Going { stop, thread } = std::mem::take(&mut *stage) {
            drop(stop);
            let result = thread.join().unwrap_or_else(|_| Err("the measuring thread has panicked".into()));
            *stage = Stage::Ended(result);
        }
    }
}

fn watch(machine: &Machine, dir: &Path, time: Duration, stop: &Receiver<()>) -> Result<Measurement, String> {
    let log = machine.dirty_log();
    let words = |error: memory::Error| error.to_string();
    log.start_logging().map_err(words)?;
    let seen = look(machine, dir, time, stop);
    let stopped = log.stop_logging().map_err(words);
    let seen = seen?;
    stopped.map(|()| seen)
}

fn look(machine: &Machine, dir: &Path, time: Duration, stop: &Receiver<()>) -> Result<Measurement, String> {
    let pages = machine.ram().pages();
    let words = |error: memory::Error| error.to_string();
    let written = || -> Result<Vec<u64>, String> {
        machine.disks().iter().map(|disk| disk.written_bytes().map_err(|e| e.to_string())).collect()
    };
    let (began, before) = (Instant::now(), written()?);
    let mut sampler = DirtySampler::default();
    let mut last = began;
    while began.elapsed() < time {
        match stop.recv_timeout((last + WINDOW).saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return Err("the measurement has made way for something else".into()),
        }
        let pages = PageSet::from_words(machine.dirty_log().collect().map_err(words)?, pages);
        let now = Instant::now();
        sampler.window(pages, (now - last).as_micros() as u64);
        last = now;
    }
    let watched = began.elapsed();
    let after = written()?;
    let disks = machine.disks().iter().zip(before.iter().zip(&after)).map(|(disk, (before, after))| {
        let bytes = u128::from(after - before) * 1_000_000 / watched.as_micros().max(1);
        (disk.name().to_owned(), bytes as u64)
    });
    let disks = disks.collect();
    let resident = PageSet::from_words(machine.ram().resident().map_err(words)?, pages);
    Ok(Measurement {
        dirty: sampler.points().iter().map(|p| (p.within, p.pages.low, p.pages.high)).collect(),
        ram_pages: pages,
        resident_pages: resident.len(),
        zero_permille: zero_permille(machine, resident)?,
        disks,
        sync_us: syncs(dir).map_err(|error| format!("sync a file in {}: {error}", dir.display()))?,
        watched_ms: watched.as_millis() as u64,
    })
}

/// Zero pages of 1000 touched ones, from a sample spread evenly.
fn zero_permille(machine: &Machine, mut resident: PageSet) -> Result<u64, String> {
    let stride = resident.len().div_ceil(SAMPLES).max(1);
    let (mut looked, mut zero, mut from) = (0, 0, 0);
    while !resident.is_empty() {
        let (ranges, next) = resident.take(from, stride);
        let Some(first) = ranges.first() else { break };
        let bytes = machine.ram().bytes_of(first.first, 1).map_err(|error| error.to_string())?;
        zero += u64::from(is_zero(bytes));
        looked += 1;
        from = next;
    }
    Ok((zero * 1000).checked_div(looked).unwrap_or(0))
}

/// How long a small record takes to the disk, µs: median and longest.
fn syncs(dir: &Path) -> std::io::Result<(u64, u64)> {
    let path = dir.join("measure.tmp");
    let mut file = File::create(&path)?;
    let mut times = Vec::new();
    for _ in 0..SYNCS {
        let began = Instant::now();
        file.write_all(&[0; PAGE_BYTES as usize])?;
        file.sync_data()?;
        times.push(began.elapsed().as_micros() as u64);
    }
    std::fs::remove_file(&path)?;
    times.sort_unstable();
    Ok((times[times.len() / 2], times[times.len() - 1]))
}

impl Measurement {
    /// What was seen of dirty pages, as the prediction takes it.
    pub fn dirty_points(&self) -> Vec<DirtyPoint> {
        let point = |&(within, low, high): &(u64, u64, u64)| DirtyPoint { within, pages: Span { low, high } };
        self.dirty.iter().map(point).collect()
    }
}
