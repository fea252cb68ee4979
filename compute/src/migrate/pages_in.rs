//! The page stream at the target: one thread that reads frames straight into guest memory and checks what arrived.
//!
//! The thread ends with its connection; what it knows stays for the next one. Only whole frames count as arrived.
//! Lives here: filling RAM, checksums of what is there now. Never enters: decisions, devices.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    thread::{self, JoinHandle},
};

use vm_memory::Bytes;
use vmove_mirror::{
    PAGE_BYTES,
    digest::{PageSums, checksum},
    ledger::PageCounts,
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

/// The checksum noted for a page that a frame cut short may have written: neither that of zeroes nor of anything sent.
const HALF: u64 = u64::MAX;

/// Handle of the stream; dropping it ends its connection.
#[derive(Debug)]
pub struct PagesIn {
    ram: GuestRam,
    state: Arc<Mutex<State>>,
    connection: Option<(LinkCloser, JoinHandle<()>)>,
}

#[derive(Debug)]
struct State {
    sums: PageSums,
    /// Frames that arrived whole, and the pages in them.
    frames: u64,
    counts: PageCounts,
    /// Pages whose content is not what the source's checksum says, until they arrive well.
    damaged: BTreeSet<u64>,
}

impl PagesIn {
    /// For an empty RAM.
    pub fn new(ram: GuestRam) -> Self {
        let sums = PageSums::new(ram.pages());
        let state = State { sums, frames: 0, counts: PageCounts::default(), damaged: BTreeSet::new() };
        Self { ram, state: Arc::new(Mutex::new(state)), connection: None }
    }

    /// Takes in what comes over `link`.
    pub fn connect(&mut self, link: Link, events: Sender<Event>) -> Result<(), MoveError> {
        let (sender, receiver, closer) = link.split().map_err(MoveError::io("page stream"))?;
        let mut stream = Stream { ram: self.ram.clone(), sender, receiver, state: Arc::clone(&self.state) };
        let thread = thread::Builder::new()
            .name("pages-in".into())
            .spawn(move || {
                if let Err(error) = stream.run() {
                    let _ = events.send(error.into_target_event());
                }
            })
            .map_err(MoveError::io("start a thread"))?;
        self.connection = Some((closer, thread));
        Ok(())
    }

    /// Ends the connection, if there is one; gives how many frames have arrived. Nothing is written to memory any more.
    pub fn end_connection(&mut self) -> Result<u64, MoveError> {
        if let Some((closer, thread)) = self.connection.take() {
            closer.close();
            if thread.join().is_err() {
                return Err(MoveError::Machine("the page stream has panicked".into()));
            }
        }
        Ok(self.lock().frames)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What has arrived so far.
    pub fn proof(&self) -> PagesProof {
        let state = self.lock();
        PagesProof { digest: state.sums.digest(), counts: state.counts }
    }
}

impl Drop for PagesIn {
    fn drop(&mut self) {
        if let Some((closer, _)) = &self.connection {
            closer.close();
        }
    }
}

struct Stream {
    ram: GuestRam,
    sender: LinkSender,
    receiver: LinkReceiver,
    state: Arc<Mutex<State>>,
}

impl Stream {
    fn run(&mut self) -> Result<(), MoveError> {
        loop {
            let (header, head) = self.receiver.frame()?;
            match header.kind {
                Kind::Pages => {
                    let head = PagesHead::decode(&head, header.data_len, self.ram.pages())
                        .map_err(MoveError::wire("page stream"))?;
                    let frames = self.pages(&head)?;
                    self.tell(&TargetMsg::PagesAck { frames })?;
                }
                Kind::Control => {
                    let message = control::decode(&head).map_err(MoveError::wire("page stream"))?;
                    let SourceMsg::RoundEnd { round } = message else {
                        return Err(MoveError::Machine(
                            "a message that does not belong on a page stream".into(),
                        ));
                    };
                    // They stay noted: the source may have to ask again over another connection.
                    let damaged = ranges(&lock(&self.state).damaged);
                    self.tell(&TargetMsg::RoundAck { round, damaged })?;
                }
                _ => return Err(MoveError::Machine("blocks on a page stream".into())),
            }
        }
    }

    fn tell(&mut self, message: &TargetMsg) -> Result<(), MoveError> {
        let frame = control::encode(message).map_err(MoveError::wire("page stream"))?;
        self.sender.send(&[&frame]).map_err(MoveError::io("acknowledge pages"))
    }

    /// Takes in one frame; gives how many there are now.
    fn pages(&mut self, head: &PagesHead) -> Result<u64, MoveError> {
        let state = Arc::clone(&self.state);
        let mut state = lock(&state);
        if let Err(error) = self.fill(head, &mut state) {
            // The source sends all of it again. Until then what is there may be anything, and must not pass for untouched.
            for run in head.runs.iter().filter(|run| !run.zero) {
                for page in run.range.first..run.range.first + run.range.count {
                    state.sums.set(page, HALF);
                }
            }
            return Err(error);
        }
        state.counts.add(head);
        state.frames += 1;
        Ok(state.frames)
    }

    fn fill(&mut self, head: &PagesHead, state: &mut State) -> Result<(), MoveError> {
        let memory = |e: crate::memory::Error| MoveError::Machine(e.to_string());
        let mut sums = head.sums.iter();
        for run in &head.runs {
            let (mut first, end) = (run.range.first, run.range.first + run.range.count);
            while first < end {
                let count = self.ram.layout().contiguous(first, end - first);
                if run.zero {
                    for page in first..first + count {
                        state.damaged.remove(&page);
                        // What never arrived is a fresh mapping: zero already, and not to be touched.
                        if state.sums.get(page) != 0 {
                            let slice = self.ram.slice_of(page, 1).map_err(memory)?;
                            slice
                                .write_slice(&[0; PAGE_BYTES as usize], 0)
                                .map_err(|e| MoveError::Machine(e.to_string()))?;
                            state.sums.set(page, 0);
                        }
                    }
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
                            state.damaged.remove(&page);
                        } else {
                            state.damaged.insert(page);
                        }
                    }
                }
                first += count;
            }
        }
        Ok(())
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vmove_mirror::source;

    use super::*;
    use crate::migrate::{pace::Pace, pages_out::PagesOut};

    const RAM: u64 = 32 << 20;

    #[test]
    fn pages_of_a_frame_cut_short_are_not_taken_for_untouched() {
        let ram = GuestRam::new(RAM).unwrap();
        let mut pages = PagesIn::new(ram.clone());
        let (events, inbox) = mpsc::channel();
        let (here, there) = Link::pair().unwrap();
        pages.connect(there, events.clone()).unwrap();
        let (mut sender, _receiver, closer) = here.split().unwrap();
        let page = [7; PAGE_BYTES as usize];
        let mut head = PagesHead::default();
        for index in 0..2 {
            head.push(index, Some(checksum(&page)));
        }
        sender.send(&[&head.encode().unwrap(), &page, &page[..100]]).unwrap();
        closer.close();
        assert!(matches!(inbox.recv().unwrap(), Event::LinkLost(_)));
        assert_eq!(pages.end_connection().unwrap(), 0);
        assert_eq!(ram.bytes_of(0, 1).unwrap(), page, "half of the frame is in memory");

        // Meanwhile they have become zero at the source.
        let (here, there) = Link::pair().unwrap();
        pages.connect(there, events).unwrap();
        let (mut sender, mut receiver, _closer) = here.split().unwrap();
        let mut head = PagesHead::default();
        for index in 0..2 {
            head.push(index, None);
        }
        sender.send(&[&head.encode().unwrap()]).unwrap();
        let (_, answer) = receiver.frame().unwrap();
        assert_eq!(control::decode::<TargetMsg>(&answer).unwrap(), TargetMsg::PagesAck { frames: 1 });
        assert!(ram.bytes_of(0, 2).unwrap().iter().all(|byte| *byte == 0));
        assert_eq!(pages.proof().counts, PageCounts { data: 0, zero: 2 });
        assert_eq!(pages.proof().digest, PageSums::new(ram.pages()).digest());
    }

    #[test]
    fn a_stream_goes_on_over_another_connection() {
        let (from, to) = (GuestRam::new(RAM).unwrap(), GuestRam::new(RAM).unwrap());
        let count = 4000;
        for page in (0..count).filter(|page| page % 5 > 0) {
            from.slice_of(page, 1).unwrap().write_slice(&[page as u8; PAGE_BYTES as usize], 0).unwrap();
        }
        let (told, target_events) = mpsc::channel();
        let (events, source_events) = mpsc::channel();
        let mut arriving = PagesIn::new(to.clone());
        let (here, there) = Link::pair().unwrap();
        arriving.connect(there, told.clone()).unwrap();
        let slow = Arc::new(Pace::new(Some(10 << 20)));
        let leaving = PagesOut::start(from.clone(), here, slow, events.clone()).unwrap();
        leaving.send(vec![PageRange { first: 0, count }]);
        while arriving.lock().frames < 2 {
            thread::yield_now();
        }
        leaving.close();
        assert!(matches!(target_events.recv().unwrap(), Event::LinkLost(_)));
        let mut ended = leaving.end().unwrap();
        let frames = arriving.end_connection().unwrap();
        assert!(ended.roll_back(frames + 1000).is_err());
        let (mut lost, bytes) = ended.roll_back(frames).unwrap();
        let counted = arriving.proof().counts;
        assert_eq!(lost.len() + counted.data + counted.zero, count);
        assert!(!lost.is_empty() && bytes > 0);

        let (here, there) = Link::pair().unwrap();
        arriving.connect(there, told).unwrap();
        let leaving = ended.go_on(here, events).unwrap();
        leaving.send(lost.take(0, count).0);
        leaving.end_round(1);
        let acked = source_events.iter().find_map(|event| match event {
            source::Event::Target(message) => Some(message),
            _ => None,
        });
        assert_eq!(acked, Some(TargetMsg::RoundAck { round: 1, damaged: vec![] }));
        let (sent, arrived) = (leaving.proof().unwrap(), arriving.proof());
        assert_eq!((sent.digest, sent.counts), (arrived.digest, arrived.counts));
        assert_eq!(from.bytes_of(0, count).unwrap(), to.bytes_of(0, count).unwrap());
    }
}
