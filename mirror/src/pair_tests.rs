//! Both engines stepped against each other in virtual time, with a cut, a failed journal or a cancel at any event.

use std::collections::VecDeque;

use proptest::prelude::*;

use crate::{
    block::State as DiskState,
    committed::{Committed, CommittedAction, CommittedEvent},
    journal::{Journal, MoveId, Record, Standing, Verdict},
    pages::{PageRange, PageSet},
    source::{self, Source, SourcePlan},
    target::{self, Target, TargetPlan},
    wire::control::{DiskSetup, Proof, SourceMsg, TargetMsg},
};

const PAGES: u64 = 10_000;

#[derive(Debug)]
enum Next {
    Source(source::Event),
    Committed(CommittedEvent),
    Target(target::Event),
}

enum SourceSide {
    Moving(Box<Source>),
    Committed(Box<Committed>),
}

/// What goes wrong, at which event.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    Cut(usize),
    Cancel(usize),
    SourceJournal(usize),
    TargetJournal(usize),
    /// The audit digests differ.
    Damage,
}

struct World {
    source: SourceSide,
    target: Target,
    source_journal: Journal,
    target_journal: Journal,
    queue: VecDeque<Next>,
    now: u64,
    events: usize,
    fault: Fault,
    linked: bool,
    source_runs: bool,
    target_runs: bool,
    /// Dirty pages the guest makes in successive rounds.
    dirty: Vec<u64>,
    damaged: Vec<PageRange>,
    source_end: Option<String>,
    target_ended: bool,
    target_refused: Option<String>,
    retired: bool,
}

fn disks() -> Vec<DiskSetup> {
    vec![DiskSetup { name: "vda".into(), virtual_bytes: 1 << 30 }]
}

fn run(fault: Fault, dirty: Vec<u64>, damaged: Vec<PageRange>) -> World {
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
                Fault::Cut(at) if at == self.events => {
                    self.linked = false;
                    self.queue.push_back(Next::Source(source::Event::LinkLost("cut".into())));
                    self.queue.push_back(Next::Committed(CommittedEvent::LinkLost));
                    self.queue.push_back(Next::Target(target::Event::LinkLost("cut".into())));
                }
                Fault::Cancel(at) if at == self.events => {
                    self.queue.push_back(Next::Source(source::Event::Cancel));
                }
                _ => {}
            }
            match next {
                Next::Source(event) => {
                    if let SourceSide::Moving(source) = &mut self.source {
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

    fn reply(&mut self, message: TargetMsg) {
        if self.linked {
            self.for_source(source::Event::Target(message));
        }
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
                        self.for_source(E::Connected);
                    } else {
                        self.for_source(E::LinkLost("refused".into()));
                    }
                }
                A::Tell(message) => {
                    if self.linked {
                        self.queue.push_back(Next::Target(target::Event::Source(message)));
                    }
                }
                A::StartMirrors => self.for_source(E::Disk { index: 0, state: DiskState::Synced }),
                A::StartLogging => {
                    let mut resident = PageSet::empty(PAGES);
                    resident.insert(PageRange { first: 0, count: 5000 });
                    self.for_source(E::LoggingStarted { resident });
                }
                A::SendPages(ranges) => {
                    let pages: u64 = ranges.iter().map(|r| r.count).sum();
                    self.for_source(E::BatchSent { bytes: pages * 4096, zero_pages: 0 });
                }
                A::EndRound(round) => {
                    let damaged = std::mem::take(&mut self.damaged);
                    self.reply(TargetMsg::RoundAck { round, damaged });
                }
                A::CollectDirty => {
                    let mut set = PageSet::empty(PAGES);
                    if let count @ 1.. = self.dirty.pop().unwrap_or(0) {
                        set.insert(PageRange { first: 7, count });
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
                A::Prove => self.for_source(E::Proved(Proof { audit: Some([1; 32]), ..Proof::default() })),
                A::DropMirrors | A::StopLogging => {}
                A::Resume => self.source_runs = true,
                A::Finish { reason, .. } => {
                    self.source_end = Some(reason);
                    // The driver closes its connections, or never made them and the agents tell the target.
                    self.linked = false;
                    self.queue.push_back(Next::Target(target::Event::LinkLost("closed".into())));
                }
            }
        }
    }

    fn committed_actions(&mut self, actions: Vec<CommittedAction>) {
        for action in actions {
            match action {
                CommittedAction::Tell(message) => {
                    if self.linked {
                        self.queue.push_back(Next::Target(target::Event::Source(message)));
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
                A::Tell(TargetMsg::Running { resume_us }) => {
                    if self.linked {
                        self.queue.push_back(Next::Committed(CommittedEvent::Running { resume_us }));
                    }
                    continue;
                }
                A::Tell(message) => {
                    self.reply(message);
                    continue;
                }
                A::LoadState(bytes) => {
                    assert_eq!(bytes, [1, 2, 3]);
                    E::Loaded
                }
                A::Prove { audit } => {
                    assert!(audit);
                    let audit = Some(if self.fault == Fault::Damage { [9; 32] } else { [1; 32] });
                    E::Proved { proof: Proof { audit, ..Proof::default() }, allocated: vec![0], load_us: 1 }
                }
                A::AskVerdict => {
                    // What the agents do: a source that has not committed is made to abort by being asked.
                    let id = MoveId::new("m").unwrap();
                    if self.source_journal.verdict(&id) == Verdict::Moving {
                        self.for_source(source::Event::LinkLost("asked".into()));
                        self.queue.push_back(Next::Target(E::Resolved(Verdict::Moving)));
                        continue;
                    }
                    E::Resolved(self.source_journal.verdict(&id))
                }
                A::Run => {
                    self.target_runs = true;
                    E::Resumed { resume_us: 5 }
                }
                A::Discard => {
                    assert!(!self.target_runs);
                    continue;
                }
                A::Finish { refused } => {
                    self.target_ended = true;
                    self.target_refused = refused;
                    continue;
                }
            };
            self.queue.push_back(Next::Target(answer));
        }
    }
}

#[test]
fn a_move_completes_with_damaged_pages_sent_again() {
    let world = run(Fault::None, vec![30, 4000, 4500], vec![PageRange { first: 3, count: 2 }]);
    assert!(world.target_runs && !world.source_runs && world.retired);
    assert!(world.target_ended && world.target_refused.is_none());
    assert!(matches!(world.target_journal.standing(), Standing::Owner { generation: 2, .. }));
    assert!(matches!(world.source_journal.standing(), Standing::Released { .. }));
}

#[test]
fn a_difference_found_by_the_audit_keeps_the_source() {
    let world = run(Fault::Damage, vec![30], vec![]);
    assert!(world.source_runs && !world.target_runs);
    assert!(world.source_end.unwrap().contains("audit digest"));
}

#[test]
fn without_faults_every_event_index_is_reached() {
    // The fault tests below draw indexes up to this many events: they must cover the whole move.
    assert!(run(Fault::None, vec![4000, 4500], vec![]).events < 60);
}

/// Steps a source to the acknowledgement of its first round.
fn source_in_precopy() -> Source {
    let (mut source, _) = Source::start(SourcePlan {
        move_id: MoveId::new("m").unwrap(),
        to_host: Some("b".into()),
        generation: 2,
        ram_pages: Some(PAGES),
        disks: vec![],
        disks_after: vec![],
        max_downtime: 50_000,
        audit: false,
    });
    source.step(1, source::Event::Journaled);
    source.step(2, source::Event::Connected);
    source.step(3, source::Event::Target(TargetMsg::Ready));
    let end = source.step(4, source::Event::LoggingStarted { resident: PageSet::empty(PAGES) });
    assert_eq!(end, [source::Action::EndRound(1)]);
    source
}

fn ack(damaged: Vec<PageRange>) -> source::Event {
    source::Event::Target(TargetMsg::RoundAck { round: 1, damaged })
}

#[test]
fn a_second_answer_to_one_round_ends_the_move() {
    let mut source = source_in_precopy();
    assert_eq!(source.step(5, ack(vec![])), [source::Action::CollectDirty]);
    source.step(6, ack(vec![]));
    assert_eq!(source.phase(), source::Phase::Aborting);
}

#[test]
fn damaged_pages_that_do_not_exist_end_the_move() {
    for range in [PageRange { first: PAGES, count: 1 }, PageRange { first: u64::MAX, count: 2 }] {
        let mut source = source_in_precopy();
        source.step(5, ack(vec![range]));
        assert_eq!(source.phase(), source::Phase::Aborting);
    }
    let mut source = source_in_precopy();
    source.step(5, ack(vec![PageRange { first: 0, count: PAGES }; 2]));
    assert_eq!(source.phase(), source::Phase::Aborting);
}

#[test]
fn a_cancel_before_the_first_record_is_read_leaves_no_move_standing() {
    let (mut source, _) = Source::start(source_in_precopy().plan().clone());
    let actions = source.step(1, source::Event::Cancel);
    assert!(matches!(actions[..], [source::Action::Journal(Record::Aborted { .. })]));
}

#[test]
fn a_target_hears_the_commit_after_a_data_connection_was_lost() {
    let (mut target, _) = Target::start(TargetPlan {
        move_id: MoveId::new("m").unwrap(),
        from_host: "a".into(),
        generation: 2,
        ram_pages: PAGES,
        disks: vec![],
        images: vec![],
    });
    use target::Event as E;
    let setup = SourceMsg::Setup { ram_pages: PAGES, disks: vec![], audit: false };
    let proved = E::Proved { proof: Proof::default(), allocated: vec![], load_us: 0 };
    for event in [
        E::Journaled,
        E::Source(setup),
        E::ImagesReady,
        E::Source(SourceMsg::State(vec![])),
        E::Source(SourceMsg::Prepare(Proof::default())),
        E::Loaded,
        proved,
        E::Journaled,
        E::LinkLost("a page stream".into()),
    ] {
        target.step(event);
    }
    assert_eq!(target.phase(), target::Phase::Undecided);
    target.step(E::Source(SourceMsg::Commit));
    target.step(E::Journaled);
    let told = target.step(E::Resumed { resume_us: 1 });
    assert!(told.contains(&target::Action::Tell(TargetMsg::Running { resume_us: 1 })));
}

proptest! {
    #[test]
    fn one_fault_anywhere_leaves_exactly_one_runner(kind in 0u8..4, at in 0usize..60, dirty in proptest::collection::vec(0u64..5000, 0..4)) {
        let fault = match kind {
            0 => Fault::Cut(at),
            1 => Fault::Cancel(at),
            2 => Fault::SourceJournal(at),
            _ => Fault::TargetJournal(at),
        };
        let world = run(fault, dirty, vec![]);
        let owner_unwritten = world.target.phase() == target::Phase::Undecided;
        // Only a target that cannot write its ownership down leaves nobody running: it waits for its disk to be mended.
        prop_assert!(world.source_runs != world.target_runs || owner_unwritten, "{:?}", fault);
        prop_assert!(!(world.source_runs && world.target_runs));
        prop_assert!(world.source_end.is_some() || owner_unwritten);
        if world.source_runs {
            // The source goes on as its owner, and the target holds nothing.
            prop_assert!(world.target_ended);
        }
    }
}
