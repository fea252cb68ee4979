//! Both engines against each other, with cuts, a failed journal or a cancel at any event.

mod source_alone;
mod target_alone;
mod world;

use proptest::prelude::*;

use crate::{
    journal::{MoveId, Standing},
    pages::PageRange,
    target,
};
use world::{Fault, RESIDENT, SourceSide, WINDOW, run};

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
    assert!(run(Fault::None, vec![4000, 4500], vec![]).events < EVENTS);
}

/// More events than a move has here.
const EVENTS: usize = 150;

/// Cuts the connections at every event of a move in turn: before the pause it completes all the same, and sends no more than an uncut
/// one and what was under way.
#[test]
fn a_connection_lost_before_the_pause_is_made_again() {
    let dirty = || vec![30, 3000, 4500];
    let uncut = run(Fault::None, dirty(), vec![]);
    let mut resumed = 0;
    for at in 1..uncut.events {
        let world = run(Fault::Cuts([at, 0, 0]), dirty(), vec![PageRange { first: 3, count: 2 }]);
        let SourceSide::Committed(committed) = &world.source else {
            assert!(world.cut_in_the_pause || at < 4, "cut at {at}: {:?}", world.source_end);
            continue;
        };
        resumed += committed.reconnects;
        assert!(world.target_runs && !world.cut_in_the_pause, "cut at {at}");
        let most = RESIDENT + world.turned_dirty + 2 + u64::from(committed.reconnects) * WINDOW;
        assert!(world.pages_sent <= most, "cut at {at}: {} of at most {most}", world.pages_sent);
    }
    assert!(resumed > 20, "{resumed}");
}

#[test]
fn a_connection_lost_while_nothing_is_under_way_costs_nothing() {
    let dirty = || vec![30, 3000];
    let uncut = run(Fault::None, dirty(), vec![]);
    // The target's word that it is ready: the mirrors have not begun.
    let cut = run(Fault::Cuts([9, 0, 0]), dirty(), vec![]);
    let SourceSide::Committed(committed) = &cut.source else { panic!("{:?}", cut.source_end) };
    assert_eq!((committed.reconnects, cut.pages_sent), (1, uncut.pages_sent));
}

#[test]
fn a_target_that_is_gone_for_good_is_given_up() {
    for at in 4..EVENTS {
        let world = run(Fault::CutForGood(at), vec![30, 4000], vec![]);
        assert!(world.source_runs != world.target_runs, "cut at {at}");
        if world.source_runs {
            let why = world.source_end.unwrap();
            assert!(why.contains("lost"), "{why}");
            assert!(world.target_ended && world.target_journal.standing() == &discarded());
        }
    }
}

#[test]
fn a_cancel_while_reconnecting_leaves_nothing() {
    for at in 4..40 {
        for later in 1..12 {
            let world = run(Fault::CutThenCancel(at, later), vec![30, 4000], vec![]);
            assert!(world.source_runs != world.target_runs, "cut at {at}, cancelled {later} later");
            if world.source_runs {
                assert!(world.target_ended && world.target_journal.standing() == &discarded());
                assert!(matches!(world.source_journal.standing(), Standing::Owner { generation: 1, .. }));
            }
        }
    }
}

fn discarded() -> Standing {
    Standing::Discarded { move_id: MoveId::new("m").unwrap(), disks: vec![] }
}

proptest! {
    #[test]
    fn faults_anywhere_leave_exactly_one_runner(
        kind in 0u8..6,
        at in 0..EVENTS,
        more in (0..EVENTS, 0..EVENTS),
        dirty in proptest::collection::vec(0u64..5000, 0..4),
    ) {
        let fault = match kind {
            0 => Fault::Cuts([at, more.0, more.1]),
            1 => Fault::Cancel(at),
            4 => Fault::CutForGood(at),
            5 => Fault::CutThenCancel(at, more.0),
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
        if matches!(fault, Fault::Cuts(_)) && !world.cut_in_the_pause && at > 3 && more.0 > 3 && more.1 > 3 {
            prop_assert!(world.target_runs, "{:?}: {:?}", fault, world.source_end);
        }
    }
}
