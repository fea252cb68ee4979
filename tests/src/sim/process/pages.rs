//! The page streams: packing pages into frames at the source, taking and checking them at the target.
//!
//! As in `compute` a page's checksum is taken first and its contents later: the guest may write in between.

use std::collections::{BTreeSet, VecDeque};

use vmove_mirror::{
    digest::PageSums,
    ledger::{Impossible, PageCounts, PagesLedger},
    pages::{PageRange, PageSet},
    source, target,
    wire::{
        control::{self, SourceMsg, TargetMsg},
        frame::{Header, Kind},
        pages::PagesHead,
    },
};

use super::{
    super::{
        Pid,
        net::{ConnId, Packet},
        world::{Happening, World},
    },
    Process,
};

enum Job {
    /// Pages still to be packed, and how many of those before were zero.
    Pages(VecDeque<u64>, u64),
    RoundEnd(u32),
}

/// The stream at the source.
pub struct PagesOut {
    /// Its connection; none while there is none.
    pub conn: Option<ConnId>,
    jobs: VecDeque<Job>,
    /// The frame whose contents are about to be taken.
    frame: Option<PagesHead>,
    /// Bytes sent for a batch that was not reported as sent.
    unreported: u64,
    /// Checksums of all pages as sent.
    pub sums: PageSums,
    /// What was sent.
    pub ledger: PagesLedger,
    /// A round's end is not answered.
    pub round_open: bool,
    /// When the target was last heard of, or began to owe an answer.
    pub heard: u64,
}

impl PagesOut {
    /// A stream for `pages` pages.
    pub fn new(conn: ConnId, pages: u64) -> Self {
        Self {
            conn: Some(conn),
            jobs: VecDeque::new(),
            frame: None,
            unreported: 0,
            sums: PageSums::new(pages),
            ledger: PagesLedger::new(pages),
            round_open: false,
            heard: 0,
        }
    }

    /// The connection is gone: nothing is under way any more.
    pub fn away(&mut self) -> Option<ConnId> {
        self.jobs.clear();
        self.frame = None;
        self.conn.take()
    }

    /// Takes back what is not among the first `frames` frames, and goes on over another connection; gives those pages, and the bytes
    /// that were sent for batches that were never reported.
    pub fn go_on(&mut self, conn: ConnId, frames: u64) -> Result<(PageSet, u64), Impossible> {
        let lost = self.ledger.roll_back(frames)?;
        self.conn = Some(conn);
        self.round_open = false;
        Ok((lost, std::mem::take(&mut self.unreported)))
    }
}

/// The stream at the target.
pub struct PagesIn {
    /// Checksums of what is in guest memory.
    pub sums: PageSums,
    /// Frames that arrived.
    pub frames: u64,
    /// Pages in them.
    pub counts: PageCounts,
    damaged: BTreeSet<u64>,
}

impl PagesIn {
    /// For `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self {
            sums: PageSums::new(pages),
            frames: 0,
            counts: PageCounts::default(),
            damaged: BTreeSet::new(),
        }
    }
}

fn listed(ranges: &[PageRange]) -> VecDeque<u64> {
    ranges.iter().flat_map(|range| range.first..range.first + range.count).collect()
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

impl World {
    fn pages_out(&mut self, pid: Pid) -> Option<&mut PagesOut> {
        self.process(pid)?.source.as_mut()?.pages.as_mut()
    }

    /// Sends pages.
    pub fn send_pages(&mut self, pid: Pid, ranges: &[PageRange]) {
        let Some(stream) = self.pages_out(pid) else { return };
        stream.ledger.queue(ranges);
        stream.jobs.push_back(Job::Pages(listed(ranges), 0));
        self.pack(pid);
    }

    /// Sends the end of a round.
    pub fn end_round(&mut self, pid: Pid, round: u32) {
        let Some(stream) = self.pages_out(pid) else { return };
        stream.jobs.push_back(Job::RoundEnd(round));
        self.pack(pid);
    }

    /// Goes on with the stream's jobs until a frame waits for its contents.
    fn pack(&mut self, pid: Pid) {
        loop {
            let now = self.now;
            let delay = self.dice.turns.range(1..60);
            let Some(Process { machine: Some(machine), source: Some(mv), .. }) = self.process(pid) else {
                return;
            };
            let Some(stream) = &mut mv.pages else { return };
            let Some(conn) = stream.conn else { return };
            if stream.frame.is_some() {
                return;
            }
            match stream.jobs.front_mut() {
                None => return,
                Some(Job::RoundEnd(round)) => {
                    let round = *round;
                    stream.jobs.pop_front();
                    (stream.round_open, stream.heard) = (true, now);
                    if let Ok(bytes) = control::encode(&SourceMsg::RoundEnd { round })
                        && !self.send(conn, 0, Packet::Frame { bytes, data: Vec::new() })
                    {
                        return self.post_source(pid, source::Event::LinkLost("the page stream".into()));
                    }
                }
                Some(Job::Pages(pages, zeroes)) => {
                    let mut head = PagesHead::default();
                    while head.has_room()
                        && let Some(page) = pages.pop_front()
                    {
                        let content = machine.ram[page as usize];
                        stream.sums.set(page, content);
                        if content == 0 {
                            *zeroes += 1;
                            head.push(page, None);
                        } else {
                            head.push(page, Some(content));
                        }
                    }
                    if head.runs.is_empty() {
                        let zero_pages = *zeroes;
                        let bytes = std::mem::take(&mut stream.unreported);
                        stream.jobs.pop_front();
                        self.post_source(pid, source::Event::BatchSent { bytes, zero_pages });
                        continue;
                    }
                    stream.frame = Some(head);
                    return self.after(delay, Happening::PageFrame(pid));
                }
            }
        }
    }

    /// The contents of a frame are taken and sent; the next is packed once they have left.
    pub fn page_frame(&mut self, pid: Pid) {
        let now = self.now;
        let Some(Process { machine: Some(machine), source: Some(mv), .. }) = self.process(pid) else {
            return;
        };
        let Some(stream) = &mut mv.pages else { return };
        let Some(head) = stream.frame.take() else { return self.pack(pid) };
        let data: Vec<u64> = head
            .runs
            .iter()
            .filter(|run| !run.zero)
            .flat_map(|run| run.range.first..run.range.first + run.range.count)
            .map(|page| machine.ram[page as usize])
            .collect();
        let Ok(bytes) = head.encode() else {
            return self.violate("equal_at_switch", "a page frame that cannot be sent");
        };
        let Some(conn) = stream.conn else { return };
        if stream.ledger.unacked() == 0 {
            stream.heard = now;
        }
        stream.ledger.sent(&head);
        stream.unreported += bytes.len() as u64 + head.data_bytes();
        if !self.send(conn, 0, Packet::Frame { bytes, data }) {
            return self.post_source(pid, source::Event::LinkLost("the page stream".into()));
        }
        // The socket takes no more until this has left.
        let left = self.net.sent_by(conn, 0);
        self.at(left, Happening::PageFrame(pid));
    }

    /// A frame arrives on a page stream.
    pub fn pages_arrive(&mut self, pid: Pid, conn: ConnId, header: Header, head: &[u8], data: &[u64]) {
        let failed = |world: &mut Self, why: &str| world.post_target(pid, target::Event::Failed(why.into()));
        let Some(Process { target: Some(mv), .. }) = self.process(pid) else { return };
        match header.kind {
            Kind::Pages => {
                let Ok(head) = PagesHead::decode(head, header.data_len, mv.ram.len() as u64) else {
                    return failed(self, "a page frame makes no sense");
                };
                let (mut sums, mut data) = (head.sums.iter(), data.iter());
                for run in &head.runs {
                    for page in run.range.first..run.range.first + run.range.count {
                        if run.zero {
                            mv.pages.damaged.remove(&page);
                            if mv.pages.sums.get(page) != 0 {
                                mv.ram[page as usize] = 0;
                                mv.pages.sums.set(page, 0);
                            }
                            continue;
                        }
                        let (Some(sent), Some(found)) = (sums.next(), data.next()) else { return };
                        mv.ram[page as usize] = *found;
                        // A page of zeroes that was not zero when its checksum was taken has a checksum all the same.
                        mv.pages.sums.set(page, (*found).max(1));
                        if found == sent {
                            mv.pages.damaged.remove(&page);
                        } else {
                            mv.pages.damaged.insert(page);
                        }
                    }
                }
                mv.pages.counts.add(&head);
                mv.pages.frames += 1;
                let frames = mv.pages.frames;
                self.tell_on(pid, conn, &TargetMsg::PagesAck { frames });
            }
            Kind::Control => {
                let Ok(SourceMsg::RoundEnd { round }) = control::decode(head) else {
                    return failed(self, "a message that does not belong on a page stream");
                };
                // They stay noted: the source may have to ask again over another connection.
                let damaged = ranges(&mv.pages.damaged);
                self.tell_on(pid, conn, &TargetMsg::RoundAck { round, damaged });
            }
            _ => failed(self, "blocks on a page stream"),
        }
    }

    fn tell_on(&mut self, pid: Pid, conn: ConnId, message: &TargetMsg) {
        if let Ok(bytes) = control::encode(message)
            && !self.send(conn, 1, Packet::Frame { bytes, data: Vec::new() })
        {
            self.post_target(pid, target::Event::LinkLost("the page stream".into()));
        }
    }

    /// A message of the target on the page stream.
    pub fn pages_answered(&mut self, pid: Pid, message: TargetMsg) {
        let now = self.now;
        let Some(stream) = self.pages_out(pid) else { return };
        stream.heard = now;
        match message {
            TargetMsg::PagesAck { frames } => {
                if let Err(error) = stream.ledger.acked(frames) {
                    self.post_source(pid, source::Event::Failed(error.to_string()));
                }
            }
            message => {
                stream.round_open = false;
                self.post_source(pid, source::Event::Target(message));
            }
        }
    }
}
