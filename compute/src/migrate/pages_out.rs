//! The page stream at the source: one thread that looks at pages, packs many into a frame and sends them from where they lie.
//!
//! The thread ends with its connection; what it knows goes on with the next one ([`PagesOut::end`], [`EndedPages::go_on`]).
//! Lives here: zero scan, checksums, packing. Never enters: which pages (the engine says), the guest's state.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use vmove_mirror::{
    PAGE_BYTES,
    digest::{PageSums, checksum},
    ledger::{PageCounts, PagesLedger},
    pages::{PageRange, PageSet},
    source::Event,
    wire::{
        control::{self, SourceMsg, TargetMsg},
        frame::Kind,
        pages::PagesHead,
    },
};

use super::{
    MoveError,
    link::{Link, LinkCloser, LinkReceiver, LinkSender},
    pace::Pace,
};
use crate::memory::{GuestRam, is_zero};

/// Acknowledgements of rounds and repairs a move can have.
const MAX_ACKS: u32 = 2 * vmove_mirror::precopy::MAX_ROUNDS;
/// Frames that may be unacknowledged (of at most 2 MiB each): more than a link holds, and a bound to what a target can make this side
/// remember.
const WINDOW: usize = 256;

/// What was sent or has arrived, and the digest of its checksums.
#[derive(Debug, Clone, Copy, Default)]
pub struct PagesProof {
    /// BLAKE3 of the table of checksums.
    pub digest: [u8; 32],
    /// Pages by sort.
    pub counts: PageCounts,
}

enum Job {
    Pages(Vec<PageRange>),
    RoundEnd(u32),
    Proof(Sender<PagesProof>),
}

/// What the stream's threads and its handle share.
#[derive(Debug)]
struct Shared {
    ledger: Mutex<Ledger>,
    /// Acknowledgements have come, or will not come any more.
    news: Condvar,
}

#[derive(Debug)]
struct Ledger {
    pages: PagesLedger,
    /// Nothing more will be acknowledged on this connection.
    over: bool,
    /// When the target was last heard of, or began to owe an answer.
    heard: Instant,
    /// The end of a round waits for its answer.
    round_open: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Handle of the stream on one connection; dropping it ends the stream.
#[derive(Debug)]
pub struct PagesOut {
    jobs: Sender<Job>,
    closer: LinkCloser,
    shared: Arc<Shared>,
    stream: JoinHandle<Stream>,
    acks: JoinHandle<()>,
}

/// A stream between two connections.
#[derive(Debug)]
pub struct EndedPages {
    stream: Stream,
    shared: Arc<Shared>,
}

impl PagesOut {
    /// Starts the stream's threads on the first connection of a move.
    pub fn start(
        ram: GuestRam,
        link: Link,
        pace: Arc<Pace>,
        events: Sender<Event>,
    ) -> Result<Self, MoveError> {
        let ledger = Ledger {
            pages: PagesLedger::new(ram.pages()),
            over: false,
            heard: Instant::now(),
            round_open: false,
        };
        let shared = Arc::new(Shared { ledger: Mutex::new(ledger), news: Condvar::new() });
        let stream = Stream { sums: PageSums::new(ram.pages()), ram, pace, unreported: 0 };
        EndedPages { stream, shared }.run(link, events)
    }

    /// Sends pages; answered by `BatchSent`.
    pub fn send(&self, ranges: Vec<PageRange>) {
        self.shared.lock().pages.queue(&ranges);
        let _ = self.jobs.send(Job::Pages(ranges));
    }

    /// Sends the end of a round; the target answers it.
    pub fn end_round(&self, round: u32) {
        let _ = self.jobs.send(Job::RoundEnd(round));
    }

    /// What was sent so far; none if the stream has failed.
    pub fn proof(&self) -> Option<PagesProof> {
        let (reply, proof) = mpsc::channel();
        self.jobs.send(Job::Proof(reply)).ok()?;
        proof.recv().ok()
    }

    /// How long the target has owed an answer without a sign of life.
    pub fn silent(&self) -> Option<Duration> {
        let ledger = self.shared.lock();
        (ledger.round_open || ledger.pages.unacked() > 0).then(|| ledger.heard.elapsed())
    }

    /// Ends the connection. Its threads may still take a moment: see [`PagesOut::end`].
    pub fn close(&self) {
        self.closer.close();
    }

    /// Ends the connection and waits for its threads. None if one of them has panicked.
    pub fn end(self) -> Option<EndedPages> {
        self.closer.close();
        drop(self.jobs);
        let stream = self.stream.join();
        self.acks.join().ok()?;
        Some(EndedPages { stream: stream.ok()?, shared: self.shared })
    }
}

impl EndedPages {
    /// Takes back what is not among the first `frames` frames; gives those pages, and the bytes that were sent for batches that were not
    /// reported as sent.
    pub fn roll_back(&mut self, frames: u64) -> Result<(PageSet, u64), MoveError> {
        let lost = self.shared.lock().pages.roll_back(frames);
        let lost = lost.map_err(|e| MoveError::Machine(e.to_string()))?;
        Ok((lost, std::mem::take(&mut self.stream.unreported)))
    }

    /// Goes on over another connection.
    pub fn go_on(self, link: Link, events: Sender<Event>) -> Result<PagesOut, MoveError> {
        self.run(link, events)
    }

    fn run(self, link: Link, events: Sender<Event>) -> Result<PagesOut, MoveError> {
        let Self { mut stream, shared } = self;
        let (mut sender, receiver, closer) = link.split().map_err(MoveError::io("page stream"))?;
        {
            let mut ledger = shared.lock();
            ledger.over = false;
            ledger.round_open = false;
            ledger.heard = Instant::now();
        }
        let (jobs, inbox) = mpsc::channel();
        let spawn = |name: &str| thread::Builder::new().name(name.into());
        let (acked, told) = (Arc::clone(&shared), events.clone());
        let acks = spawn("pages-acks")
            .spawn(move || {
                let ended = read_acks(receiver, &acked, &told);
                acked.lock().over = true;
                acked.news.notify_all();
                if let Some(event) = ended {
                    let _ = told.send(event);
                }
            })
            .map_err(MoveError::io("start a thread"))?;
        let owed = Arc::clone(&shared);
        let stream = spawn("pages-out")
            .spawn(move || {
                while let Ok(job) = inbox.recv() {
                    match stream.carry_out(job, &mut sender, &owed) {
                        Ok(None) => {}
                        Ok(Some(event)) => drop(events.send(event)),
                        Err(error) => {
                            let _ = events.send(error.into_source_event());
                            break;
                        }
                    }
                }
                stream
            })
            .map_err(MoveError::io("start a thread"))?;
        Ok(PagesOut { jobs, closer, shared, stream, acks })
    }
}

/// Reads acknowledgements until the connection ends; gives why, if that is to be told.
fn read_acks(mut receiver: LinkReceiver, shared: &Shared, events: &Sender<Event>) -> Option<Event> {
    let mut rounds = 0;
    loop {
        let message = receiver.frame().and_then(|(header, head)| match header.kind {
            Kind::Control => control::decode::<TargetMsg>(&head).map_err(MoveError::wire("page stream")),
            _ => Err(MoveError::Machine("the target sent data on a page stream".into())),
        });
        match message {
            Err(error) => return Some(error.into_source_event()),
            Ok(TargetMsg::PagesAck { frames }) => {
                let mut ledger = shared.lock();
                ledger.heard = Instant::now();
                if let Err(error) = ledger.pages.acked(frames) {
                    return Some(Event::Failed(error.to_string()));
                }
                drop(ledger);
                shared.news.notify_all();
            }
            Ok(message) => {
                rounds += 1;
                if rounds > MAX_ACKS {
                    return Some(Event::Failed("the target acknowledges more rounds than there are".into()));
                }
                shared.lock().round_open = false;
                events.send(Event::Target(message)).ok()?;
            }
        }
    }
}

#[derive(Debug)]
struct Stream {
    ram: GuestRam,
    pace: Arc<Pace>,
    sums: PageSums,
    /// Bytes sent for a batch that was never reported as sent.
    unreported: u64,
}

impl Stream {
    fn carry_out(
        &mut self,
        job: Job,
        link: &mut LinkSender,
        shared: &Shared,
    ) -> Result<Option<Event>, MoveError> {
        match job {
            Job::Pages(ranges) => self.send(&ranges, link, shared).map(Some),
            Job::RoundEnd(round) => {
                let frame =
                    control::encode(&SourceMsg::RoundEnd { round }).map_err(MoveError::wire("round end"))?;
                {
                    let mut ledger = shared.lock();
                    ledger.round_open = true;
                    ledger.heard = Instant::now();
                }
                link.send(&[&frame]).map_err(MoveError::io("send the end of a round"))?;
                Ok(None)
            }
            Job::Proof(reply) => {
                let counts = shared.lock().pages.counts();
                let _ = reply.send(PagesProof { digest: self.sums.digest(), counts });
                Ok(None)
            }
        }
    }

    fn send(
        &mut self,
        ranges: &[PageRange],
        link: &mut LinkSender,
        shared: &Shared,
    ) -> Result<Event, MoveError> {
        let ram = self.ram.clone();
        let mut zero_pages = 0;
        let mut head = PagesHead::default();
        for range in ranges {
            for (first, count) in runs(&ram, *range)? {
                let memory = ram.bytes_of(first, count).map_err(machine)?;
                for (page, content) in (first..).zip(memory.chunks_exact(PAGE_BYTES as usize)) {
                    if !head.has_room() {
                        self.flush(&mut head, link, shared)?;
                    }
                    if is_zero(content) {
                        self.sums.set(page, 0);
                        zero_pages += 1;
                        head.push(page, None);
                    } else {
                        // The guest may change the page before it is sent: then it is dirty, and comes again.
                        let sum = checksum(content);
                        self.sums.set(page, sum);
                        head.push(page, Some(sum));
                    }
                }
            }
        }
        self.flush(&mut head, link, shared)?;
        Ok(Event::BatchSent { bytes: std::mem::take(&mut self.unreported), zero_pages })
    }

    fn flush(
        &mut self,
        head: &mut PagesHead,
        link: &mut LinkSender,
        shared: &Shared,
    ) -> Result<(), MoveError> {
        if head.runs.is_empty() {
            return Ok(());
        }
        let fixed = head.encode().map_err(MoveError::wire("page frame"))?;
        let mut parts: Vec<&[u8]> = vec![&fixed];
        for run in head.runs.iter().filter(|run| !run.zero) {
            for (first, count) in runs(&self.ram, run.range)? {
                parts.push(self.ram.bytes_of(first, count).map_err(machine)?);
            }
        }
        let bytes = fixed.len() as u64 + head.data_bytes();
        self.pace.take(bytes);
        {
            let mut ledger = shared.lock();
            while ledger.pages.unacked() >= WINDOW && !ledger.over {
                ledger = shared.news.wait(ledger).unwrap_or_else(PoisonError::into_inner);
            }
            if ledger.pages.unacked() == 0 {
                ledger.heard = Instant::now();
            }
            // Before a byte of it is sent: from then on it may arrive.
            ledger.pages.sent(head);
        }
        self.unreported += bytes;
        link.send(&parts).map_err(MoveError::io("send pages"))?;
        *head = PagesHead::default();
        Ok(())
    }
}

fn machine(error: crate::memory::Error) -> MoveError {
    MoveError::Machine(error.to_string())
}

/// The parts of a range that lie in one piece of memory each.
fn runs(ram: &GuestRam, range: PageRange) -> Result<Vec<(u64, u64)>, MoveError> {
    let mut out = Vec::with_capacity(1);
    let (mut first, end) = (range.first, range.first + range.count);
    while first < end {
        let count = ram.layout().contiguous(first, end - first);
        if count == 0 {
            return Err(MoveError::Machine(format!("page {first} is outside the guest's RAM")));
        }
        out.push((first, count));
        first += count;
    }
    Ok(out)
}
