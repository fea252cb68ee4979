//! Two engines stepped against each other in virtual time. RAM is real here: a number a page, carried by frames that may be lost.

use std::collections::VecDeque;

use crate::{
    block::State as DiskState,
    committed::{Committed, CommittedAction, CommittedEvent},
    journal::{Journal, MoveId, Record, Verdict},
    ledger::{PageCounts, PagesLedger},
    pages::{PageRange, PageSet},
    source::{self, Source, SourcePlan},
    target::{self, Target, TargetPlan},
    wire::{
        control::{Arrived, Counters, DiskSetup, Proof, SourceMsg, TargetMsg},
        pages::PagesHead,
    },
};

pub const PAGES: u64 = 10_000;
pub const RESIDENT: u64 = 5000;
/// Pages a frame carries here.
const FRAME_PAGES: u64 = 500;
/// Pages that may be under way when a connection is lost: two batches.
pub const WINDOW: u64 = 2 * source::BATCH_PAGES;

#[derive(Debug)]
enum Next {
    Source(source::Event),
    Committed(CommittedEvent),
    Target(target::Event),
    /// Arrives on the connections of an epoch, or not at all.
    Wire(u32, Wire),
    /// New connections are made.
    Relink,
    /// They cannot be made.
    GiveUp,
    /// The target looks whether the source may still call.
    Patience,
}

#[derive(Debug)]
enum Wire {
    ToSource(TargetMsg),
    ToTarget(SourceMsg),
    Frame(PagesHead, Vec<u32>),
    RoundEnd(u32),
    FramesAcked(u64),
}

pub enum SourceSide {
    Moving(Box<Source>),
    Committed(Box<Committed>),
}

/// What goes wrong, at which event.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    None,
    /// The connections are lost, and can be made again.
    Cuts([usize; 3]),
    /// They are lost for good.
    CutForGood(usize),
    /// They are lost, and some events later the user gives up.
    CutThenCancel(usize, usize),
    Cancel(usize),
    SourceJournal(usize),
    TargetJournal(usize),
    /// The audit digests differ.
    Damage,
}

pub struct World {
    pub source: SourceSide,
    pub target: Target,
    pub source_journal: Journal,
    pub target_journal: Journal,
    queue: VecDeque<Next>,
    now: u64,
    pub events: usize,
    fault: Fault,
    linked: bool,
    epoch: u32,
    /// Connections lost while the source was past the pause, and before its commit.
    pub cut_in_the_pause: bool,
    source_ram: Vec<u32>,
    target_ram: Vec<u32>,
    ledger: PagesLedger,
    arrived: Arrived,
    counts: PageCounts,
    pub pages_sent: u64,
    pub turned_dirty: u64,
    pub source_runs: bool,
    pub target_runs: bool,
    /// Dirty pages the guest makes in successive rounds.
    dirty: Vec<u64>,
    damaged: Vec<PageRange>,
    pub source_end: Option<String>,
    pub target_ended: bool,
    pub target_refused: Option<String>,
    pub retired: bool,
}

fn disks() -> Vec<DiskSetup> {
    vec![DiskSetup { name: "vda".into(), virtual_bytes: 1 << 30 }]
}

pub fn run(fault: Fault, dirty: Vec<u64>, damaged: Vec<PageRange>) -> World {
    let move_id = MoveId::new("m").unwrap();
    let (source, actions) = Source::start(SourcePlan {
        move_id: move_id.clone(),
        to_host: Some("b".into()),
        generation: 2,
        ram_pages: Some(PAGES),
        disks: disks(),
        disks_after: vec![],
        max_downtime: 50_000,
        audit: true,
    });
    let (target, target_actions) = Target::start(TargetPlan {
        move_id,
        from_host: "a".into(),
        generation: 2,
        ram_pages: PAGES,
        disks: disks(),
        images: vec![],
    });
    let mut source_journal = Journal::default();
    source_journal.append(&Record::Owner { generation: 1, disks: vec![] }).unwrap();
    let mut world = World {
        source: SourceSide::Moving(Box::new(source)),
        target,
        source_journal,
        target_journal: Journal::default(),
        queue: VecDeque::new(),
        now: 0,
        events: 0,
        fault,
        linked: true,
        epoch: 1,
        cut_in_the_pause: false,
        source_ram: (0..PAGES).map(|page| u32::from(page < RESIDENT)).collect(),
        target_ram: vec![0; PAGES as usize],
        ledger: PagesLedger::new(PAGES),
        arrived: Arrived::default(),
        counts: PageCounts::default(),
        pages_sent: 0,
        turned_dirty: 0,
        source_runs: true,
        target_runs: false,
        dirty,
        damaged,
        source_end: None,
        target_ended: false,
        target_refused: None,
        retired: false,
    };
    world.source_actions(actions);
    world.target_actions(target_actions);
    world.go();
    world
}

impl World {
    fn go(&mut self) {
        while let Some(next) = self.queue.pop_front() {
            self.events += 1;
            assert!(self.events < 10_000, "it does not end");
            self.now += 1_000;
            match self.fault {
                Fault::Cuts(at) if at.contains(&self.events) => self.cut(),
                Fault::CutForGood(at) | Fault::CutThenCancel(at, _) if at == self.events => self.cut(),
                Fault::CutThenCancel(at, later) if at + later == self.events => {
                    self.queue.push_back(Next::Source(source::Event::Cancel));
                }
                Fault::Cancel(at) if at == self.events => {
                    self.queue.push_back(Next::Source(source::Event::Cancel));
                }
                _ => {}
            }
            match next {
                Next::Wire(epoch, wire) if self.linked && epoch == self.epoch => self.arrive(wire),
                Next::Wire(..) => {}
                Next::Relink => self.relink(),
                Next::GiveUp => self.for_source(source::Event::GaveUp("nobody there".into())),
                Next::Patience if self.target.phase() > target::Phase::Waiting => {}
                Next::Patience if self.source_end.is_some() => {
                    self.queue.push_back(Next::Target(target::Event::Failed("nobody calls".into())));
                }
                Next::Patience => self.queue.push_back(Next::Patience),
                Next::Source(event) => {
                    if let SourceSide::Moving(source) = &mut self.source {
                        let paused =
                            (source::Phase::Pausing..source::Phase::Committing).contains(&source.phase());
                        self.cut_in_the_pause |= paused && matches!(event, source::Event::LinkLost(_));
                        let actions = source.step(self.now, event);
                        self.source_actions(actions);
                    }
                }
                Next::Committed(event) => {
                    if let SourceSide::Committed(committed) = &mut self.source {
                        let actions = committed.step(self.now, event);
                        self.committed_actions(actions);
                    }
                }
                Next::Target(event) => {
                    let actions = self.target.step(event);
                    self.target_actions(actions);
                }
            }
            assert!(!(self.source_runs && self.target_runs), "two runners");
        }
    }

    fn for_source(&mut self, event: source::Event) {
        self.queue.push_back(Next::Source(event));
    }

    fn send(&mut self, wire: Wire) {
        if self.linked {
            self.queue.push_back(Next::Wire(self.epoch, wire));
        }
    }

    fn cut(&mut self) {
        self.linked = false;
        self.queue.push_back(Next::Source(source::Event::LinkLost("cut".into())));
        self.queue.push_back(Next::Committed(CommittedEvent::LinkLost));
        self.queue.push_back(Next::Target(target::Event::LinkLost("cut".into())));
    }

    /// What drivers do once nothing of the old connections is left: only what they had already posted can still come.
    fn relink(&mut self) {
        if self.source_end.is_some() {
            return;
        }
        if self.target_ended {
            return self.for_source(source::Event::GaveUp("nobody listens".into()));
        }
        self.epoch += 1;
        self.linked = true;
        let arrived = self.arrived.clone();
        // The target may not have noticed that the old ones are gone.
        let actions = self.target.step(target::Event::LinkLost("called anew".into()));
        self.target_actions(actions);
        self.queue.push_back(Next::Target(target::Event::Linked(arrived)));
        self.for_source(source::Event::Connected);
    }

    fn arrive(&mut self, wire: Wire) {
        match wire {
            Wire::ToSource(message) => self.for_source(source::Event::Target(message)),
            Wire::ToTarget(message) => self.queue.push_back(Next::Target(target::Event::Source(message))),
            Wire::Frame(head, values) => {
                let pages = head.runs.iter().flat_map(|r| r.range.first..r.range.first + r.range.count);
                for (page, value) in pages.zip(values) {
                    self.target_ram[page as usize] = value;
                }
                self.counts.add(&head);
                self.arrived.frames += 1;
                self.send(Wire::FramesAcked(self.arrived.frames));
            }
            Wire::RoundEnd(round) => {
                let damaged = std::mem::take(&mut self.damaged);
                self.send(Wire::ToSource(TargetMsg::RoundAck { round, damaged }));
            }
            Wire::FramesAcked(frames) => self.ledger.acked(frames).unwrap(),
        }
    }

    fn send_pages(&mut self, ranges: &[PageRange]) {
        self.ledger.queue(ranges);
        let pages: Vec<u64> = ranges.iter().flat_map(|r| r.first..r.first + r.count).collect();
        for pages in pages.chunks(FRAME_PAGES as usize) {
            let mut head = PagesHead::default();
            for page in pages {
                let value = self.source_ram[*page as usize];
                head.push(*page, (value > 0).then_some(value.into()));
            }
            let values = pages.iter().map(|page| self.source_ram[*page as usize]).collect();
            // A stream whose connection is gone stops here.
            if !self.linked {
                return;
            }
            self.ledger.sent(&head);
            self.pages_sent += pages.len() as u64;
            self.send(Wire::Frame(head, values));
        }
        self.for_source(source::Event::BatchSent { bytes: pages.len() as u64 * 4096, zero_pages: 0 });
    }

    fn source_actions(&mut self, actions: Vec<source::Action>) {
        for action in actions {
            use source::{Action as A, Event as E};
            match action {
                A::Journal(record) => {
                    if self.fault == Fault::SourceJournal(self.events) {
                        self.for_source(E::JournalFailed("disk full".into()));
                        continue;
                    }
                    if let Err(refused) = self.source_journal.append(&record) {
                        // Only the abort of a move that never was on disk.
                        assert!(matches!(record, Record::Aborted { .. }), "{refused}");
                        self.for_source(E::JournalFailed(refused.to_string()));
                        continue;
                    }
                    if matches!(record, Record::Committed { .. }) {
                        let SourceSide::Moving(source) = &self.source else { unreachable!() };
                        assert_eq!(source.phase(), source::Phase::Committing);
                        let placeholder = Source::start(source.plan().clone()).0;
                        let SourceSide::Moving(source) =
                            std::mem::replace(&mut self.source, SourceSide::Moving(Box::new(placeholder)))
                        else {
                            unreachable!()
                        };
                        let (committed, actions) = source.committed(self.now);
                        self.source = SourceSide::Committed(Box::new(committed));
                        return self.committed_actions(actions);
                    }
                    self.for_source(E::Journaled);
                }
                A::Connect => {
                    if self.linked {
                        self.queue.push_back(Next::Target(target::Event::Linked(Arrived::default())));
                        self.for_source(E::Connected);
                    } else {
                        self.for_source(E::LinkLost("refused".into()));
                    }
                }
                A::Reconnect => {
                    self.linked = false;
                    self.for_source(E::Disk { index: 0, state: DiskState::Degraded });
                    self.queue.push_back(match self.fault {
                        Fault::CutForGood(_) => Next::GiveUp,
                        _ => Next::Relink,
                    });
                }
                A::Restore(arrived) => {
                    let lost = self.ledger.roll_back(arrived.frames).unwrap();
                    self.for_source(E::Restored { lost, bytes: 0 });
                    self.for_source(E::Disk { index: 0, state: DiskState::Synced });
                }
                A::Tell(message) => self.send(Wire::ToTarget(message)),
                A::StartMirrors => self.for_source(E::Disk { index: 0, state: DiskState::Synced }),
                A::StartLogging => {
                    let mut resident = PageSet::empty(PAGES);
                    resident.insert(PageRange { first: 0, count: RESIDENT });
                    self.for_source(E::LoggingStarted { resident });
                }
                A::SendPages(ranges) => self.send_pages(&ranges),
                A::EndRound(round) => self.send(Wire::RoundEnd(round)),
                A::CollectDirty => {
                    let mut set = PageSet::empty(PAGES);
                    if let count @ 1.. = self.dirty.pop().unwrap_or(0) {
                        set.insert(PageRange { first: 7, count });
                        self.turned_dirty += count;
                        // Every other one of them now holds something else.
                        for page in (7..7 + count).step_by(2) {
                            self.source_ram[page as usize] += 1;
                        }
                    }
                    self.for_source(E::Dirty(set));
                }
                A::Pause => {
                    self.source_runs = false;
                    self.for_source(E::Paused);
                }
                A::DrainDisks => {
                    self.for_source(E::QueuesEmpty);
                    self.for_source(E::Disk { index: 0, state: DiskState::Drained });
                }
                A::SaveState => self.for_source(E::StateSaved(vec![1, 2, 3])),
                A::Prove => self.for_source(E::Proved(proof(self.ledger.counts(), &self.source_ram))),
                A::DropMirrors | A::StopLogging => {}
                A::Resume => self.source_runs = true,
                A::Finish { reason, .. } => {
                    self.source_end = Some(reason);
                    // The driver closes its connections, or never made them and the agents tell the target.
                    self.linked = false;
                    self.queue.push_back(Next::Target(target::Event::LinkLost("closed".into())));
                    self.queue.push_back(Next::Patience);
                }
            }
        }
    }

    fn committed_actions(&mut self, actions: Vec<CommittedAction>) {
        for action in actions {
            match action {
                CommittedAction::Tell(message) => {
                    if self.linked {
                        self.send(Wire::ToTarget(message));
                    } else {
                        self.queue.push_back(Next::Committed(CommittedEvent::LinkLost));
                    }
                }
                CommittedAction::Journal(record) => {
                    self.source_journal.append(&record).unwrap();
                    self.queue.push_back(Next::Committed(CommittedEvent::Journaled));
                }
                CommittedAction::Retire => self.retired = true,
                CommittedAction::Pivot => unreachable!("memory moves here"),
                CommittedAction::Finish { confirmed } => {
                    assert_eq!(confirmed, self.retired);
                    self.source_end = Some("committed".into());
                }
            }
        }
    }

    fn target_actions(&mut self, actions: Vec<target::Action>) {
        for action in actions {
            use target::{Action as A, Event as E};
            let answer = match action {
                A::Journal(record) => {
                    if self.fault == Fault::TargetJournal(self.events) {
                        E::JournalFailed("disk full".into())
                    } else if let Err(refused) = self.target_journal.append(&record) {
                        assert!(matches!(record, Record::Aborted { .. }), "{refused}");
                        E::JournalFailed(refused.to_string())
                    } else {
                        E::Journaled
                    }
                }
                A::MakeImages => E::ImagesReady,
                A::Await => {
                    self.queue.push_back(Next::Patience);
                    continue;
                }
                A::Tell(TargetMsg::Running { resume_us }) => {
                    if self.linked {
                        self.queue.push_back(Next::Committed(CommittedEvent::Running { resume_us }));
                    }
                    continue;
                }
                A::Tell(message) => {
                    self.send(Wire::ToSource(message));
                    continue;
                }
                A::LoadState(bytes) => {
                    assert_eq!(bytes, [1, 2, 3]);
                    E::Loaded
                }
                A::Prove { audit } => {
                    assert!(audit);
                    let audit = Some(if self.fault == Fault::Damage { [9; 32] } else { [1; 32] });
                    let proof = Proof { audit, ..proof(self.counts, &self.target_ram) };
                    E::Proved { proof, allocated: vec![0], load_us: 1 }
                }
                A::AskVerdict => {
                    // What the agents do: a source that has not committed is made to abort by being asked.
                    let id = MoveId::new("m").unwrap();
                    if self.source_journal.verdict(&id) == Verdict::Moving {
                        self.for_source(source::Event::Failed("asked".into()));
                        self.queue.push_back(Next::Target(E::Resolved(Verdict::Moving)));
                        continue;
                    }
                    E::Resolved(self.source_journal.verdict(&id))
                }
                A::Run => {
                    assert_eq!(self.source_ram, self.target_ram, "RAM at the switch");
                    self.target_runs = true;
                    E::Resumed { resume_us: 5 }
                }
                A::Discard => {
                    assert!(!self.target_runs);
                    continue;
                }
                A::Finish { refused } => {
                    self.target_ended = true;
                    if refused.is_some() {
                        // Its process ends, and its connections with it.
                        self.linked = false;
                        self.for_source(source::Event::LinkLost("the target has ended".into()));
                    }
                    self.target_refused = refused;
                    continue;
                }
            };
            self.queue.push_back(Next::Target(answer));
        }
    }
}

fn proof(counts: PageCounts, ram: &[u32]) -> Proof {
    let bytes: Vec<u8> = ram.iter().flat_map(|value| value.to_le_bytes()).collect();
    Proof {
        counters: Counters { data_pages: counts.data, zero_pages: counts.zero, ..Counters::default() },
        digest: *blake3::hash(&bytes).as_bytes(),
        audit: Some([1; 32]),
    }
}
