//! A source that is told what no honest target says, or what comes late.

use super::world::PAGES;
use crate::{
    journal::{MoveId, Record},
    pages::{PageRange, PageSet},
    source::{self, Source, SourcePlan},
    wire::control::{Arrived, SourceMsg, TargetMsg},
};

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
fn late_words_of_lost_connections_change_nothing() {
    let mut source = source_in_precopy();
    let reconnect = source.step(5, source::Event::LinkLost("cut".into()));
    assert_eq!(reconnect, [source::Action::Reconnect]);
    assert_eq!(source.phase().name(), "reconnecting");
    let late = [
        ack(vec![]),
        source::Event::LinkLost("cut as well".into()),
        source::Event::Target(TargetMsg::Resumed(Arrived::default())),
        source::Event::BatchSent { bytes: 1, zero_pages: 0 },
    ];
    for event in late {
        assert_eq!(source.step(6, event), []);
    }
    assert_eq!(source.step(7, source::Event::Connected), [source::Action::Tell(SourceMsg::Resume)]);
    let arrived = Arrived { frames: 4, operations: vec![] };
    let told = source::Event::Target(TargetMsg::Resumed(arrived.clone()));
    assert_eq!(source.step(8, told), [source::Action::Restore(arrived)]);
    // The end of the round may not have arrived, or its answer: it is sent again, and one answer is taken.
    let mut lost = PageSet::empty(PAGES);
    assert_eq!(
        source.step(9, source::Event::Restored { lost: lost.clone(), bytes: 0 }),
        [source::Action::EndRound(1)]
    );
    assert_eq!(source.step(10, ack(vec![])), [source::Action::CollectDirty]);

    // Lost again while the dirty pages are being collected; what was sent and has not arrived goes first.
    source.step(11, source::Event::LinkLost("cut".into()));
    let mut dirty = PageSet::empty(PAGES);
    dirty.insert(PageRange { first: 0, count: 3 });
    assert_eq!(source.step(12, source::Event::Dirty(dirty)), []);
    source.step(13, source::Event::Connected);
    source.step(14, source::Event::Target(TargetMsg::Resumed(Arrived::default())));
    lost.insert(PageRange { first: 3, count: 2 });
    let send = source.step(15, source::Event::Restored { lost, bytes: 0 });
    assert_eq!(send, [source::Action::SendPages(vec![PageRange { first: 0, count: 5 }])]);
    assert_eq!((source.phase(), source.reconnects()), (source::Phase::PreCopy, 2));
}

#[test]
fn a_target_that_resumes_out_of_turn_ends_the_move() {
    let mut source = source_in_precopy();
    let told = || source::Event::Target(TargetMsg::Resumed(Arrived::default()));
    source.step(5, told());
    assert_eq!(source.phase(), source::Phase::Aborting);
    let mut source = source_in_precopy();
    source.step(5, source::Event::LinkLost("cut".into()));
    source.step(6, source::Event::Connected);
    source.step(7, told());
    source.step(8, told());
    assert_eq!(source.phase(), source::Phase::Aborting);
}

#[test]
fn a_link_that_drops_again_and_again_is_given_up() {
    let mut source = source_in_precopy();
    let mut now = 5;
    while source.phase() != source::Phase::Aborting {
        now += 1;
        source.step(now, source::Event::LinkLost("cut".into()));
        source.step(now, source::Event::Connected);
        assert!(now < 1000);
    }
    assert_eq!(source.reconnects(), 100);
}
