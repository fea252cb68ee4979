//! The page stream at the source: one thread that looks at pages, packs many into a frame and sends them from where they lie.
//!
//! Lives here: zero scan, checksums, packing. Never enters: which pages (the engine says), the guest's state.

use std::{
    sync::{
        Arc,
        mpsc::{self, Sender},
    },
    thread,
};

use vmove_mirror::{
    PAGE_BYTES,
    digest::{PageSums, checksum},
    pages::PageRange,
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

/// What was sent, and the digest of its checksums.
#[derive(Debug, Clone, Copy, Default)]
pub struct PagesProof {
    /// BLAKE3 of the table of checksums.
    pub digest: [u8; 32],
    /// Pages with data.
    pub data_pages: u64,
    /// Pages as flags.
    pub zero_pages: u64,
}

enum Job {
    Pages(Vec<PageRange>),
    RoundEnd(u32),
    Proof(Sender<PagesProof>),
}

/// Handle of the stream's thread; dropping it ends the stream.
#[derive(Debug)]
pub struct PagesOut {
    jobs: Sender<Job>,
    closer: LinkCloser,
}

impl PagesOut {
    /// Starts the stream's threads on a connection.
    pub fn start(
        ram: GuestRam,
        link: Link,
        pace: Arc<Pace>,
        events: Sender<Event>,
    ) -> Result<Self, MoveError> {
        let (sender, receiver, closer) = link.split().map_err(MoveError::io("page stream"))?;
        let (jobs, inbox) = mpsc::channel();
        let acks = events.clone();
        let spawn = |name: &str| thread::Builder::new().name(name.into());
        spawn("pages-acks")
            .spawn(move || read_acks(receiver, &acks))
            .map_err(MoveError::io("start a thread"))?;
        let mut stream = Stream {
            sums: PageSums::new(ram.pages()),
            ram,
            link: sender,
            pace,
            proof: PagesProof::default(),
        };
        spawn("pages-out")
            .spawn(move || {
                while let Ok(job) = inbox.recv() {
                    match stream.carry_out(job) {
                        Ok(None) => {}
                        Ok(Some(event)) => drop(events.send(event)),
                        Err(error) => {
                            let _ = events.send(Event::LinkLost(error.to_string()));
                            return;
                        }
                    }
                }
            })
            .map_err(MoveError::io("start a thread"))?;
        Ok(Self { jobs, closer })
    }

    /// Sends pages; answered by `BatchSent`.
    pub fn send(&self, ranges: Vec<PageRange>) {
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
}

impl Drop for PagesOut {
    fn drop(&mut self) {
        self.closer.close();
    }
}

fn read_acks(mut receiver: LinkReceiver, events: &Sender<Event>) {
    for _ in 0..MAX_ACKS {
        let message = receiver.frame().and_then(|(header, head)| match header.kind {
            Kind::Control => control::decode::<TargetMsg>(&head).map_err(MoveError::wire("page stream")),
            _ => Err(MoveError::Machine("the target sent data on a page stream".into())),
        });
        let event = match message {
            Ok(message) => Event::Target(message),
            Err(error) => {
                let _ = events.send(Event::LinkLost(error.to_string()));
                return;
            }
        };
        if events.send(event).is_err() {
            return;
        }
    }
    let _ = events.send(Event::Failed("the target acknowledges more rounds than there are".into()));
}

struct Stream {
    ram: GuestRam,
    link: LinkSender,
    pace: Arc<Pace>,
    sums: PageSums,
    proof: PagesProof,
}

impl Stream {
    fn carry_out(&mut self, job: Job) -> Result<Option<Event>, MoveError> {
        match job {
            Job::Pages(ranges) => self.send(&ranges).map(Some),
            Job::RoundEnd(round) => {
                let frame =
                    control::encode(&SourceMsg::RoundEnd { round }).map_err(MoveError::wire("round end"))?;
                self.link.send(&[&frame]).map_err(MoveError::io("send the end of a round"))?;
                Ok(None)
            }
            Job::Proof(reply) => {
                self.proof.digest = self.sums.digest();
                let _ = reply.send(self.proof);
                Ok(None)
            }
        }
    }

    fn send(&mut self, ranges: &[PageRange]) -> Result<Event, MoveError> {
        let ram = self.ram.clone();
        let (mut bytes, zero_before) = (0, self.proof.zero_pages);
        let mut head = PagesHead::default();
        for range in ranges {
            for (first, count) in runs(&ram, *range)? {
                let memory = ram.bytes_of(first, count).map_err(machine)?;
                for (page, content) in (first..).zip(memory.chunks_exact(PAGE_BYTES as usize)) {
                    if !head.has_room() {
                        bytes += self.flush(&mut head)?;
                    }
                    if is_zero(content) {
                        self.sums.set(page, 0);
                        self.proof.zero_pages += 1;
                        head.push(page, None);
                    } else {
                        // The guest may change the page before it is sent: then it is dirty, and comes again.
                        let sum = checksum(content);
                        self.sums.set(page, sum);
                        self.proof.data_pages += 1;
                        head.push(page, Some(sum));
                    }
                }
            }
        }
        bytes += self.flush(&mut head)?;
        Ok(Event::BatchSent { bytes, zero_pages: self.proof.zero_pages - zero_before })
    }

    fn flush(&mut self, head: &mut PagesHead) -> Result<u64, MoveError> {
        if head.runs.is_empty() {
            return Ok(0);
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
        self.link.send(&parts).map_err(MoveError::io("send pages"))?;
        *head = PagesHead::default();
        Ok(bytes)
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
