//! Taking a checkpoint of a running machine: disks mirrored and RAM copied while it runs, then a short pause for the rest.
//!
//! Lives here: the order of the steps, the way back. Never enters: the files' layout.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant, SystemTime},
};

use vmove_mirror::{
    PAGE_BYTES,
    block::State as DiskState,
    digest,
    pages::{PageRange, PageSet},
    source::Event,
    wire::control::{Counters, Proof, TargetMsg},
};

use super::{
    CheckpointError,
    manifest::{INITRD, KERNEL, MANIFEST, Manifest, RAM},
    sums::FileSums,
};
use crate::{
    machine::Machine,
    memory::is_zero,
    migrate::{BlocksOut, LocalTarget, MoveError, Pace, ProgressBoard, state, stop_points},
    process::{
        console::Console,
        protocol::{
            CheckpointOrder, DiskPlacement, DiskReport, DowntimeParts, ImageShape, MemoryReport, MoveReport,
            VmDefinition,
        },
    },
};

/// Rounds over RAM before the pause at most.
const MAX_ROUNDS: u32 = 8;
/// Dirty RAM that is left to the pause, pages (4 MiB).
const FEW_PAGES: u64 = 1024;
/// Pages copied between two looks at the mailbox (8 MiB).
const BATCH: u64 = 2048;
/// How long the disks may take to come to rest in the pause.
const DRAIN: Duration = Duration::from_mins(1);
/// How often progress is shown.
const GLANCE: Duration = Duration::from_millis(100);

/// A checkpoint to be taken.
pub struct Taking {
    /// The running machine.
    pub machine: Arc<Machine>,
    /// Its console.
    pub console: Console,
    /// The VM as it is now.
    pub vm: VmDefinition,
    /// This host, for the report.
    pub host: String,
    /// Ownership generation now.
    pub generation: u64,
    /// Structure of all disks, in the definition's order.
    pub shapes: Vec<ImageShape>,
    /// Where progress is shown.
    pub board: Arc<ProgressBoard>,
    /// The mailbox; whoever holds the sender may cancel.
    pub events: (Sender<Event>, Receiver<Event>),
    /// The order.
    pub order: CheckpointOrder,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakingEnd {
    /// The guest goes on.
    GoesOn,
    /// The checkpoint is complete and the guest was to stop with it: it stands still.
    StandsStill,
}

/// What a checkpoint in the making holds of the machine.
struct Hold<'a> {
    task: &'a Taking,
    local: LocalTarget,
    mirrors: Vec<BlocksOut>,
    paused: Option<Instant>,
    logging: bool,
}

/// Counters for the report.
#[derive(Default)]
struct Counted {
    rounds: u32,
    zero_pages: u64,
    written_bytes: u64,
    skipped_bytes: u64,
    pause: Duration,
    drain: Duration,
    digest: [u8; 32],
}

impl Taking {
    /// Takes it. The guest goes on whatever happens, but for a complete checkpoint with which it was to stop.
    pub fn run(self) -> TakingEnd {
        let began = Instant::now();
        self.board.begin(&self.order.id);
        let mut counted = Counted::default();
        let taken = self.take(&mut counted);
        if taken.is_err()
            && let Err(error) = fs::remove_dir_all(&self.order.dir)
        {
            tracing::warn!(%error, "the remains of a checkpoint are not removed");
        }
        let report = self.report(began.elapsed(), &counted, taken.as_ref().err());
        let error = taken.as_ref().err().map(ToString::to_string);
        if let Some(error) = &error {
            tracing::warn!(error, "the checkpoint has not been taken");
        }
        self.board.finish(report, error);
        if taken.is_ok() && self.order.stop { TakingEnd::StandsStill } else { TakingEnd::GoesOn }
    }

    fn take(&self, counted: &mut Counted) -> Result<(), CheckpointError> {
        let dir = &self.order.dir;
        let copies = self.shapes.iter().enumerate().map(|(index, shape)| {
            let path = dir.join(Manifest::disk_file(index));
            (DiskPlacement { name: shape.name.clone(), datastore: String::new(), path }, shape.clone())
        });
        let local =
            LocalTarget::new(Arc::clone(&self.machine), &self.vm.name, self.generation, copies.collect());
        let mut hold = Hold { task: self, local, mirrors: Vec::new(), paused: None, logging: false };
        hold.mirror()?;
        let ram_path = dir.join(RAM);
        let failed = |e| CheckpointError::io("write", &ram_path, e);
        let ram = File::create_new(&ram_path).map_err(failed)?;
        ram.set_len(self.machine.ram().layout().bytes()).map_err(failed)?;
        let mut copy = RamCopy::new(self, &ram, &ram_path);
        hold.rounds(&mut copy, counted)?;
        let state = hold.pause(&mut copy, counted)?;
        if !self.order.stop {
            hold.go_on();
        }
        ram.sync_all().map_err(failed)?;
        (counted.zero_pages, counted.written_bytes) = (copy.zero_pages, copy.written_bytes);
        self.board.update(|progress| progress.phase = "checksums".into());
        stop_points::reach("checkpoint.sums");
        let manifest = self.manifest(state, counted)?;
        self.complete(&manifest)?;
        hold.keep();
        Ok(())
    }

    fn manifest(&self, state: Vec<u8>, counted: &Counted) -> Result<Manifest, CheckpointError> {
        let dir = &self.order.dir;
        let sums = |file: &str| FileSums::of(&dir.join(file));
        let disks = (0..self.shapes.len()).map(|index| sums(&Manifest::disk_file(index)));
        let initrd = dir.join(INITRD).exists().then(|| sums(INITRD)).transpose()?;
        // A clock before 1970 has no better answer.
        let taken_at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        Ok(Manifest {
            name: self.order.name.clone(),
            vm: self.vm.clone(),
            host: self.host.clone(),
            generation: self.generation,
            taken_at,
            pause_us: counted.pause.as_micros() as u64,
            ram: sums(RAM)?,
            disks: disks.collect::<Result<_, _>>()?,
            kernel: sums(KERNEL)?,
            initrd,
            state,
        })
    }

    /// Writes the first file last, and gives the directory its name: from then on there is a checkpoint.
    fn complete(&self, manifest: &Manifest) -> Result<(), CheckpointError> {
        let (dir, to) = (&self.order.dir, &self.order.to);
        let path = dir.join(MANIFEST);
        fs::write(&path, manifest.encode()?).map_err(|e| CheckpointError::io("write", &path, e))?;
        for path in [&path, &dir.join(KERNEL), dir] {
            sync(path)?;
        }
        stop_points::reach("checkpoint.rename");
        // A directory that is not empty is not replaced (rename(2)): no checkpoint is ever lost to another.
        fs::rename(dir, to).map_err(|e| CheckpointError::io("name", to, e))?;
        sync(to.parent().unwrap_or(to))
    }

    /// The next thing in the mailbox that ends the taking.
    fn interrupted(&self, event: &Event) -> Option<CheckpointError> {
        match event {
            Event::Cancel => Some(CheckpointError::GivenUp("cancelled".into())),
            Event::Failed(why) | Event::LinkLost(why) => Some(CheckpointError::GivenUp(why.clone())),
            Event::Disk { index, state: DiskState::Degraded | DiskState::Failed } => {
                let disk = self.shapes.get(*index).map_or("", |shape| shape.name.as_str());
                Some(CheckpointError::GivenUp(format!("the copy of disk {disk} cannot be written")))
            }
            _ => None,
        }
    }

    fn report(&self, total: Duration, counted: &Counted, error: Option<&CheckpointError>) -> MoveReport {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let outcome = match error {
            None => "completed",
            Some(CheckpointError::GivenUp(why)) if why == "cancelled" => "cancelled",
            Some(_) => "aborted",
        };
        MoveReport {
            vm: self.vm.name.clone(),
            from: self.order.place.clone(),
            to: self.order.place.clone(),
            outcome: outcome.into(),
            total_ms: ms(total),
            downtime_ms: ms(counted.pause),
            downtime: DowntimeParts {
                drain_ms: ms(counted.drain),
                final_pages_ms: ms(counted.pause.saturating_sub(counted.drain)),
                ..DowntimeParts::default()
            },
            memory: MemoryReport {
                ram_bytes: self.vm.memory_mib << 20,
                sent_bytes: counted.written_bytes,
                rounds: counted.rounds,
                zero_pages: counted.zero_pages,
                skipped_bytes: counted.skipped_bytes,
                stream_bytes_per_s: 0,
            },
            disks: self
                .shapes
                .iter()
                .map(|shape| DiskReport {
                    name: shape.name.clone(),
                    virtual_bytes: shape.virtual_bytes,
                    ..DiskReport::default()
                })
                .collect(),
            reconnects: 0,
            verified: error.is_none(),
            digest: if error.is_none() { digest::hex(&counted.digest) } else { String::new() },
            reason: error.map(ToString::to_string),
            predicted: None,
        }
    }
}

impl Hold<'_> {
    /// Copies of all disks, in step with them when this returns.
    fn mirror(&mut self) -> Result<(), CheckpointError> {
        let task = self.task;
        task.board.update(|progress| progress.phase = "mirror".into());
        let links = self.local.make(&task.events.0)?;
        let pace = Arc::new(Pace::new(None));
        for (index, link) in links.into_iter().enumerate() {
            let name = &task.shapes[index].name;
            let disk = task
                .machine
                .disk(name)
                .ok_or_else(|| MoveError::Machine(format!("the VM has no disk {name}")))?;
            let place = &task.order.place;
            let to = format!("the checkpoint on host {}, datastore {}", place.host, place.datastore);
            let (pace, events) = (Arc::clone(&pace), task.events.0.clone());
            self.mirrors.push(BlocksOut::start(disk, index, (link, to), pace, events)?);
        }
        stop_points::reach("checkpoint.mirror");
        self.until_disks_are(DiskState::Synced, None)
    }

    /// Waits until all mirrors have reached a state.
    fn until_disks_are(&self, wanted: DiskState, limit: Option<Duration>) -> Result<(), CheckpointError> {
        let end = limit.map(|limit| Instant::now() + limit);
        let mut reached = vec![false; self.mirrors.len()];
        while reached.contains(&false) {
            if end.is_some_and(|end| Instant::now() > end) {
                return Err(CheckpointError::GivenUp("the disks do not come to rest".into()));
            }
            match self.task.events.1.recv_timeout(GLANCE) {
                Ok(Event::Disk { index, state }) if state == wanted => {
                    if let Some(reached) = reached.get_mut(index) {
                        *reached = true;
                    }
                }
                Ok(event) => self.task.interrupted(&event).map_or(Ok(()), Err)?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            let stats = self.mirrors.iter().map(BlocksOut::stats);
            let (total, done) =
                stats.fold((0, 0), |(total, done), disk| (total + disk.total_bytes, done + disk.done_bytes));
            self.task.board.update(|progress| {
                (progress.disk_total_bytes, progress.disk_done_bytes) = (total, done.min(total));
            });
        }
        Ok(())
    }

    /// Rounds over RAM, the guest running, until little is left or it gets no less.
    fn rounds(&mut self, copy: &mut RamCopy<'_>, counted: &mut Counted) -> Result<(), CheckpointError> {
        let task = self.task;
        let memory = |e: crate::memory::Error| MoveError::Machine(e.to_string());
        task.board.update(|progress| progress.phase = "pre-copy".into());
        self.logging = true;
        task.machine.dirty_log().start_logging().map_err(memory)?;
        let pages = task.machine.ram().pages();
        let mut left = PageSet::from_words(task.machine.ram().resident().map_err(memory)?, pages);
        counted.skipped_bytes = (pages - left.len()) * PAGE_BYTES;
        for round in 1..=MAX_ROUNDS {
            counted.rounds = round;
            let before = left.len();
            task.board.update(|progress| {
                (progress.round, progress.ram_total_bytes, progress.ram_done_bytes) =
                    (round, before * PAGE_BYTES, 0);
            });
            copy.pages(left, true)?;
            left = PageSet::from_words(task.machine.dirty_log().collect().map_err(memory)?, pages);
            if left.len() <= FEW_PAGES || left.len() > before / 2 {
                break;
            }
        }
        copy.left = Some(left);
        Ok(())
    }

    /// The guest stands still: the rest of disks and RAM, and the state.
    fn pause(&mut self, copy: &mut RamCopy<'_>, counted: &mut Counted) -> Result<Vec<u8>, CheckpointError> {
        let task = self.task;
        let machine_failed = |e: crate::machine::Error| MoveError::Machine(e.to_string());
        let memory = |e: crate::memory::Error| MoveError::Machine(e.to_string());
        task.board.update(|progress| progress.phase = "switchover".into());
        let began = Instant::now();
        self.paused = Some(began);
        task.machine.pause_vcpus();
        task.machine.pause_devices().map_err(machine_failed)?;
        self.mirrors.iter().for_each(BlocksOut::drain);
        self.until_disks_are(DiskState::Drained, Some(DRAIN))?;
        counted.drain = began.elapsed();
        let state = state::save(&task.machine, &task.console)?;
        stop_points::reach("checkpoint.paused");
        // After the state: saving touches the rings.
        let words = task.machine.dirty_log().collect().map_err(memory)?;
        let mut left = PageSet::from_words(words, task.machine.ram().pages());
        copy.left.take().iter().for_each(|more| left.merge(more));
        counted.rounds += 1;
        copy.pages(left, false)?;
        counted.digest = self.prove()?;
        self.mirrors.iter().for_each(BlocksOut::detach);
        self.local.close()?;
        counted.pause = began.elapsed();
        Ok(state)
    }

    /// Both sides of all mirrors must have seen the same.
    fn prove(&self) -> Result<[u8; 32], MoveError> {
        let mut counters = Counters::default();
        let mut chains = Vec::new();
        for mirror in &self.mirrors {
            let proof = mirror.proof();
            counters.block_ops += proof.ops;
            counters.block_bytes += proof.bytes;
            chains.push(proof.digest);
        }
        let ours = Proof { counters, digest: digest::combine(None, &chains), audit: None };
        match self.local.prepare(false)? {
            TargetMsg::Prepared { proof, .. } if proof == ours => Ok(ours.digest),
            _ => Err(MoveError::Machine("the copies of the disks are not what was sent to them".into())),
        }
    }

    /// The guest goes on, as if nothing had been.
    fn go_on(&mut self) {
        self.mirrors.iter().for_each(BlocksOut::detach);
        self.mirrors.clear();
        if std::mem::take(&mut self.logging)
            && let Err(error) = self.task.machine.dirty_log().stop_logging()
        {
            tracing::warn!(%error, "the dirty log stays on");
        }
        if self.paused.take().is_some() {
            // A guest that has ended meanwhile is the process's concern.
            if let Err(error) = self.task.machine.resume() {
                tracing::error!(%error, "the guest cannot go on");
            }
            self.task.console.go_on();
        }
    }

    /// The checkpoint is complete. A guest that was to stop stays paused.
    fn keep(mut self) {
        self.paused = None;
        self.go_on();
    }
}

impl Drop for Hold<'_> {
    /// Whatever failed: the guest goes on.
    fn drop(&mut self) {
        self.go_on();
    }
}

/// RAM on its way into a file.
struct RamCopy<'a> {
    task: &'a Taking,
    file: &'a File,
    path: &'a Path,
    /// Pages that are not zero in the file.
    filled: PageSet,
    /// Pages the rounds have left.
    left: Option<PageSet>,
    zero_pages: u64,
    written_bytes: u64,
}

impl<'a> RamCopy<'a> {
    fn new(task: &'a Taking, file: &'a File, path: &'a Path) -> Self {
        let filled = PageSet::empty(task.machine.ram().pages());
        Self { task, file, path, filled, left: None, zero_pages: 0, written_bytes: 0 }
    }

    /// Copies pages as they are now; what the guest changes meanwhile is dirty, and comes again.
    fn pages(&mut self, mut pages: PageSet, running: bool) -> Result<(), CheckpointError> {
        let mut cursor = 0;
        let mut done = 0;
        while !pages.is_empty() {
            if running {
                while let Ok(event) = self.task.events.1.try_recv() {
                    self.task.interrupted(&event).map_or(Ok(()), Err)?;
                }
                stop_points::reach("checkpoint.pages");
            }
            let (ranges, next) = pages.take(cursor, BATCH);
            cursor = next;
            for range in ranges {
                self.range(range)?;
                done += range.count * PAGE_BYTES;
            }
            self.task.board.update(|progress| progress.ram_done_bytes = done);
        }
        Ok(())
    }

    fn range(&mut self, range: PageRange) -> Result<(), CheckpointError> {
        let ram = self.task.machine.ram();
        let (mut first, end) = (range.first, range.first + range.count);
        while first < end {
            // Never none: the set is over this RAM.
            let count = ram.layout().contiguous(first, end - first).max(1);
            let bytes = ram.bytes_of(first, count).map_err(|e| MoveError::Machine(e.to_string()))?;
            self.run(first, bytes)?;
            first += count;
        }
        Ok(())
    }

    /// One run of memory: neighbouring pages that are to be written go out in one call.
    fn run(&mut self, first: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        let size = PAGE_BYTES as usize;
        let (mut from, mut at) = (0, 0);
        while at < bytes.len() {
            let page = first + (at / size) as u64;
            // The first look decides only whether a hole is enough; a page that changes now is dirty.
            let zero = is_zero(&bytes[at..at + size]);
            self.zero_pages += u64::from(zero);
            if zero && !self.filled.contains(page) {
                self.write(first, &bytes[from..at], from)?;
                from = at + size;
            } else {
                self.filled.insert(PageRange { first: page, count: 1 });
            }
            at += size;
        }
        self.write(first, &bytes[from..], from)
    }

    fn write(&mut self, first: u64, bytes: &[u8], skipped: usize) -> Result<(), CheckpointError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.written_bytes += bytes.len() as u64;
        self.file
            .write_all_at(bytes, first * PAGE_BYTES + skipped as u64)
            .map_err(|e| CheckpointError::io("write", self.path, e))
    }
}

fn sync(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| CheckpointError::io("sync", path, e))
}
