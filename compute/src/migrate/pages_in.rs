//! The page stream at the target: one thread that reads frames straight into guest memory and checks what arrived.
//!
//! Lives here: filling RAM, checksums of what is there now. Never enters: decisions, devices.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError, mpsc::Sender},
    thread,
};

use vm_memory::Bytes;
use vmove_mirror::{
    PAGE_BYTES,
    digest::{PageSums, checksum},
    pages::PageRange,
    target::Event,
    wire::{
        control::{self, SourceMsg, TargetMsg},
        frame::Kind,
        pages::PagesHead,
    },
};

use super::{
    MoveError,
    link::{Link, LinkCloser, LinkReceiver, LinkSender},
    pages_out::PagesProof,
};
use crate::memory::GuestRam;

/// Handle of the stream's thread; dropping it ends the stream.
#[derive(Debug)]
pub struct PagesIn {
    state: Arc<Mutex<State>>,
    closer: LinkCloser,
}

#[derive(Debug)]
struct State {
    sums: PageSums,
    proof: PagesProof,
}

impl PagesIn {
    /// Starts the stream's thread on a connection.
    pub fn start(ram: GuestRam, link: Link, events: Sender<Event>) -> Result<Self, MoveError> {
        let (sender, receiver, closer) = link.split().map_err(MoveError::io("page stream"))?;
        let state =
            Arc::new(Mutex::new(State { sums: PageSums::new(ram.pages()), proof: PagesProof::default() }));
        let shared = Arc::clone(&state);
        thread::Builder::new()
            .name("pages-in".into())
            .spawn(move || {
                let mut stream = Stream { ram, sender, receiver, state: shared, damaged: BTreeSet::new() };
                if let Err(error) = stream.run() {
                    let _ = events.send(match error {
                        MoveError::Io { .. } => Event::LinkLost(error.to_string()),
                        // Nonsense from the peer, or memory that cannot be written: no use in going on.
                        error => Event::Failed(error.to_string()),
                    });
                }
            })
            .map_err(MoveError::io("start a thread"))?;
        Ok(Self { state, closer })
    }

    /// What has arrived so far.
    pub fn proof(&self) -> PagesProof {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.proof.digest = state.sums.digest();
        state.proof
    }
}

impl Drop for PagesIn {
    fn drop(&mut self) {
        self.closer.close();
    }
}

struct Stream {
    ram: GuestRam,
    sender: LinkSender,
    receiver: LinkReceiver,
    state: Arc<Mutex<State>>,
    /// Pages whose content is not what the source's checksum says.
    damaged: BTreeSet<u64>,
}

impl Stream {
    fn run(&mut self) -> Result<(), MoveError> {
        loop {
            let (header, head) = self.receiver.frame()?;
            match header.kind {
                Kind::Pages => {
                    let head = PagesHead::decode(&head, header.data_len, self.ram.pages())
                        .map_err(MoveError::wire("page stream"))?;
                    self.pages(&head)?;
                }
                Kind::Control => {
                    let message = control::decode(&head).map_err(MoveError::wire("page stream"))?;
                    let SourceMsg::RoundEnd { round } = message else {
                        return Err(MoveError::Machine(
                            "a message that does not belong on a page stream".into(),
                        ));
                    };
                    let ack =
                        TargetMsg::RoundAck { round, damaged: ranges(&std::mem::take(&mut self.damaged)) };
                    let frame = control::encode(&ack).map_err(MoveError::wire("page stream"))?;
                    self.sender.send(&[&frame]).map_err(MoveError::io("acknowledge a round"))?;
                }
                _ => return Err(MoveError::Machine("blocks on a page stream".into())),
            }
        }
    }

    fn pages(&mut self, head: &PagesHead) -> Result<(), MoveError> {
        let memory = |e: crate::memory::Error| MoveError::Machine(e.to_string());
        let mut sums = head.sums.iter();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for run in &head.runs {
            let (mut first, end) = (run.range.first, run.range.first + run.range.count);
            while first < end {
                let count = self.ram.layout().contiguous(first, end - first);
                if run.zero {
                    for page in first..first + count {
                        self.damaged.remove(&page);
                        // What never arrived is a fresh mapping: zero already, and not to be touched.
                        if state.sums.get(page) != 0 {
                            let slice = self.ram.slice_of(page, 1).map_err(memory)?;
                            slice
                                .write_slice(&[0; PAGE_BYTES as usize], 0)
                                .map_err(|e| MoveError::Machine(e.to_string()))?;
                            state.sums.set(page, 0);
                        }
                    }
                    state.proof.zero_pages += count;
                } else {
                    let slice = self.ram.slice_of(first, count).map_err(memory)?;
                    self.receiver.receive_into(&slice).map_err(MoveError::io("receive pages"))?;
                    let bytes = self.ram.bytes_of(first, count).map_err(memory)?;
                    for ((page, content), sent) in
                        (first..).zip(bytes.chunks_exact(PAGE_BYTES as usize)).zip(&mut sums)
                    {
                        let found = checksum(content);
                        state.sums.set(page, found);
                        if found == *sent {
                            self.damaged.remove(&page);
                        } else {
                            self.damaged.insert(page);
                        }
                    }
                    state.proof.data_pages += count;
                }
                first += count;
            }
        }
        Ok(())
    }
}

fn ranges(pages: &BTreeSet<u64>) -> Vec<PageRange> {
    let mut out: Vec<PageRange> = Vec::new();
    for page in pages {
        match out.last_mut() {
            Some(last) if last.first + last.count == *page => last.count += 1,
            _ => out.push(PageRange { first: *page, count: 1 }),
        }
    }
    out
}
