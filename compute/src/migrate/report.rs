//! What is told of a move while it runs and at its end.
//!
//! Lives here: progress and reports from the engine's counters. Never enters: how they are shown.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use vmove_mirror::{Micros, PAGE_BYTES, block::Stats, committed::Committed, source::Source};

use crate::process::protocol::{
    DiskReport, DowntimeParts, MemoryReport, MoveOrder, MoveProgress, MoveReport, VmDefinition,
};

/// The last known state of the current or last move of a VM process, for whoever asks.
#[derive(Debug)]
pub struct ProgressBoard {
    dir: PathBuf,
    current: Mutex<Option<MoveProgress>>,
}

impl ProgressBoard {
    /// Final states are kept as files in `dir`.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), current: Mutex::new(None) }
    }

    /// The current or last move.
    pub fn get(&self) -> Option<MoveProgress> {
        self.lock().clone()
    }

    /// A move begins.
    pub fn begin(&self, move_id: &str) {
        *self.lock() = Some(MoveProgress {
            move_id: move_id.to_owned(),
            phase: "setup".into(),
            ..MoveProgress::default()
        });
    }

    /// Changes what is known.
    pub fn update(&self, change: impl FnOnce(&mut MoveProgress)) {
        if let Some(progress) = self.lock().as_mut() {
            change(progress);
        }
    }

    /// The end; also written to `<dir>/<move id>.json`, where it is found when the process is gone.
    pub fn finish(&self, report: MoveReport, error: Option<String>) {
        let text = {
            let mut current = self.lock();
            let Some(progress) = current.as_mut() else { return };
            progress.phase.clone_from(&report.outcome);
            progress.elapsed_ms = report.total_ms as u64;
            progress.left_ms = None;
            progress.report = Some(report);
            progress.error = error;
            serde_json::to_string_pretty(progress).map(|text| (progress.move_id.clone(), text))
        };
        let written = text.map_err(std::io::Error::from).and_then(|(id, text)| {
            fs::create_dir_all(&self.dir)?;
            let partial = self.dir.join(format!("{id}.partial"));
            fs::write(&partial, text)?;
            fs::File::open(&partial)?.sync_all()?;
            fs::rename(&partial, self.dir.join(format!("{id}.json")))
        });
        if let Err(error) = written {
            tracing::warn!(%error, "the move's report cannot be kept");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<MoveProgress>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Turns counters seen from time to time into rates and an estimate.
#[derive(Debug, Default)]
pub struct Meter {
    last: Option<(Micros, u64)>,
    rate: u64,
}

impl Meter {
    /// Brings the board up to date.
    pub fn publish(&mut self, board: &ProgressBoard, now: Micros, engine: &Source, disks: &[Stats]) {
        let ram = engine.stats();
        let disk_total: u64 = disks.iter().map(|d| d.total_bytes).sum();
        let disk_done: u64 = disks.iter().map(|d| d.done_bytes.min(d.total_bytes)).sum();
        let sent: u64 = ram.sent_bytes + disks.iter().map(|d| d.copied_bytes + d.mirrored_bytes).sum::<u64>();
        match self.last {
            Some((then, before)) if now > then + 200_000 => {
                let momentary = (sent - before.min(sent)) * 1_000_000 / (now - then);
                // Smoothed, so that an estimate does not jump about.
                self.rate = if self.rate == 0 { momentary } else { (self.rate * 3 + momentary) / 4 };
                self.last = Some((now, sent));
            }
            None => self.last = Some((now, sent)),
            Some(_) => {}
        }
        let memory_pages = engine.plan().ram_pages.unwrap_or(0);
        let ram_total = if ram.round_pages > 0 { ram.round_pages } else { memory_pages } * PAGE_BYTES;
        let ram_done = ram.round_done.min(ram.round_pages) * PAGE_BYTES;
        let left = (disk_total - disk_done) + (ram_total - ram_done.min(ram_total));
        board.update(|p| {
            p.phase = engine.phase().name().into();
            p.elapsed_ms = now / 1000;
            p.disk_total_bytes = disk_total;
            p.disk_done_bytes = disk_done;
            p.ram_total_bytes = ram_total;
            p.ram_done_bytes = ram_done;
            p.round = engine.precopy().round();
            p.rate = self.rate;
            p.dirty_rate = engine.precopy().dirty_rate();
            p.reconnects = engine.reconnects();
            p.left_ms = (left * 1000).checked_div(self.rate);
        });
    }
}

fn ms(from: Micros, to: Micros) -> f64 {
    to.saturating_sub(from) as f64 / 1000.0
}

/// The report of a move that did not commit.
pub fn aborted(
    vm: &VmDefinition,
    order: &MoveOrder,
    now: Micros,
    engine: &Source,
    reason: &str,
    cancelled: bool,
) -> MoveReport {
    MoveReport {
        vm: vm.name.clone(),
        from: order.from.clone(),
        to: order.to.clone(),
        outcome: if cancelled { "cancelled" } else { "aborted" }.into(),
        total_ms: ms(0, now),
        downtime_ms: 0.0,
        downtime: DowntimeParts::default(),
        memory: MemoryReport {
            ram_bytes: vm.memory_mib << 20,
            sent_bytes: engine.stats().sent_bytes,
            rounds: engine.precopy().round(),
            zero_pages: engine.stats().zero_pages,
            skipped_bytes: engine.stats().skipped_pages * PAGE_BYTES,
            stream_bytes_per_s: 0,
        },
        disks: Vec::new(),
        reconnects: engine.reconnects(),
        verified: false,
        digest: String::new(),
        reason: Some(reason.to_owned()),
        predicted: order.predicted.clone(),
    }
}

/// The report of a committed move. `disks` are the mirrors' counters, in plan order.
pub fn committed(
    vm: &VmDefinition,
    order: &MoveOrder,
    now: Micros,
    end: &Committed,
    disks: &[Stats],
    digest: [u8; 32],
    confirmed: bool,
) -> MoveReport {
    let m = end.marks;
    let running = if confirmed { end.running } else { now };
    let (bytes, time) = end.stats.first_round;
    MoveReport {
        vm: vm.name.clone(),
        from: order.from.clone(),
        to: order.to.clone(),
        outcome: "completed".into(),
        total_ms: ms(0, now),
        downtime_ms: ms(m.pause, running),
        downtime: DowntimeParts {
            drain_ms: ms(m.pause, m.drained),
            final_pages_ms: ms(m.saved, m.pages),
            state_ms: ms(m.drained, m.saved) + ms(m.pages, m.prepared),
            commit_ms: ms(m.prepared, m.committed),
            resume_ms: ms(m.committed, running),
        },
        memory: MemoryReport {
            ram_bytes: vm.memory_mib << 20,
            sent_bytes: end.stats.sent_bytes,
            rounds: end.rounds,
            zero_pages: end.stats.zero_pages,
            skipped_bytes: end.stats.skipped_pages * PAGE_BYTES,
            stream_bytes_per_s: (u128::from(bytes) * 1_000_000 / u128::from(time.max(1))) as u64,
        },
        disks: end
            .plan
            .disks
            .iter()
            .zip(disks)
            .enumerate()
            .map(|(i, (disk, stats))| DiskReport {
                name: disk.name.clone(),
                virtual_bytes: disk.virtual_bytes,
                allocated_bytes: end.allocated.get(i).copied().unwrap_or(0),
                copied_bytes: stats.copied_bytes,
                mirrored_bytes: stats.mirrored_bytes,
            })
            .collect(),
        reconnects: end.reconnects,
        // The source commits only after both sides' proofs agreed.
        verified: true,
        digest: vmove_mirror::digest::hex(&digest),
        reason: (!confirmed)
            .then(|| "committed, but the target could not confirm that it runs: ask its host".into()),
        predicted: order.predicted.clone(),
    }
}
