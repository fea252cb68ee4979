//! The ownership rule, checked in every state of a small world; and the rule broken in one place at a time, which must be caught.

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};
use vmove_tests::model::checks::{HEALS, NOTHING_LOST, ONE_OWNER, ONE_RUNNER};
use vmove_tests::model::{Fence, Others, Ownership, Rule, Scope, Side, TakeOver};

/// Visits every state; fails with the shortest way to a state that must not be.
fn holds(what: &str, model: Ownership) {
    let began = Instant::now();
    let checker = model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!("{what}: {} states, {:.1} s", checker.unique_state_count(), began.elapsed().as_secs_f64());
    checker.assert_properties();
}

/// Looks for a state in which one of `expected` does not hold, and fails if there is none.
fn is_caught(what: &str, model: Ownership, expected: &[&'static str]) {
    let began = Instant::now();
    let found_any = HasDiscoveries::AnyOf(expected.iter().copied().collect());
    let checker = model.checker().threads(2).finish_when(found_any).spawn_bfs().join();
    let found = expected.iter().find_map(|name| Some((*name, checker.discovery(name)?)));
    let (states, seconds) = (checker.unique_state_count(), began.elapsed().as_secs_f64());
    let Some((name, path)) = found else {
        panic!("{what}: not caught in {states} states; found: {:?}", checker.discoveries().keys());
    };
    println!("{what}: caught after {states} states, {seconds:.1} s: not {name:?}");
    for step in path.into_actions() {
        println!("    {step:?}");
    }
}

const SMALL: Scope = Scope { hosts: 2, moves: 1, kills: 2, full_disks: 1, writes: 2, outages: 0 };

#[test]
fn two_hosts_one_move_every_fault() {
    holds("one move", Ownership::new(SMALL, Rule::default()));
}

#[test]
fn two_hosts_there_and_back() {
    let scope = Scope { moves: 2, writes: 1, ..SMALL };
    holds("two moves", Ownership::new(scope, Rule::default()));
}

#[test]
fn three_hosts_moving_on() {
    let scope = Scope { hosts: 3, moves: 2, kills: 1, full_disks: 0, writes: 1, outages: 0 };
    holds("three hosts", Ownership::new(scope, Rule::default()));
}

#[test]
fn the_journal_alone_stops_a_process_that_minds_no_phase() {
    // One that cannot be written cannot stop anything either.
    let scope = Scope { full_disks: 0, ..SMALL };
    holds("careless process", Ownership::new(scope, Rule { careless: true, ..Rule::default() }));
}

#[test]
fn each_rule_broken_alone_is_caught() {
    let rule = Rule::default();
    let lost: &[&'static str] = &[NOTHING_LOST];
    // The images are there, and nobody may start them.
    let stuck: &[&'static str] = &[HEALS];
    let twice: &[&'static str] = &[ONE_RUNNER, ONE_OWNER];
    for (what, rule, expected) in [
        ("aborted is said before it is journalled", Rule { answers_before_journal: true, ..rule }, lost),
        ("committed without prepared", Rule { commits_unprepared: true, ..rule }, stuck),
        ("prepared is said before it is journalled", Rule { says_prepared_early: true, ..rule }, stuck),
        ("owned without the source's word", Rule { owns_unasked: true, ..rule }, twice),
        ("discarded without the source's word", Rule { discards_unasked: true, ..rule }, stuck),
        ("resumed after the commit", Rule { resumes_after_commit: true, ..rule }, twice),
        ("removed before the target runs", Rule { releases_unconfirmed: true, ..rule }, stuck),
        ("the journal has no order", Rule { careless: true, forgets_order: true, ..rule }, twice),
    ] {
        is_caught(what, Ownership::new(SMALL, rule), expected);
    }
}

const AWAY: Scope = Scope { hosts: 2, moves: 1, kills: 1, full_disks: 0, writes: 1, outages: 2 };
const SAFE: TakeOver = TakeOver {
    side: Side::Target,
    other_down: true,
    others: Others::HoldNothing,
    remembers: true,
    fence: Fence::Targets,
};

#[test]
fn taking_ownership_makes_no_second_runner() {
    let scope = Scope { writes: 0, ..AWAY };
    holds("ownership taken, two hosts", Ownership::with_take_over(scope, SAFE));
    let scope = Scope { hosts: 3, moves: 2, kills: 0, writes: 0, ..AWAY };
    holds("ownership taken, three hosts", Ownership::with_take_over(scope, SAFE));
    let at_source = TakeOver { side: Side::Source, ..SAFE };
    holds("ownership taken at the source", Ownership::with_take_over(AWAY, at_source));
}

#[test]
fn taking_ownership_with_less_care_makes_two_runners() {
    let three = Scope { hosts: 3, moves: 2, kills: 0, writes: 0, outages: 1, ..AWAY };
    let two_away = Scope { outages: 2, ..three };
    for (what, scope, take_over) in [
        ("the source asks nobody", AWAY, TakeOver { fence: Fence::Journal, ..SAFE }),
        ("the source asks whom it reaches", AWAY, TakeOver { fence: Fence::Reachable, ..SAFE }),
        ("the source is not down", AWAY, TakeOver { other_down: false, ..SAFE }),
        ("what was taken is forgotten", three, TakeOver { remembers: false, ..SAFE }),
        ("others are not asked", three, TakeOver { others: Others::NotAsked, ..SAFE }),
        ("others are asked if they can be", two_away, TakeOver { others: Others::Reachable, ..SAFE }),
        ("both sides are taken in turns", AWAY, TakeOver { side: Side::Either, ..SAFE }),
        ("others may be prepared", three, TakeOver { others: Others::OwnNothing, ..SAFE }),
    ] {
        is_caught(what, Ownership::with_take_over(scope, take_over), &[ONE_RUNNER]);
    }
}

/// What no rule saves, and the command has to say.
#[test]
fn taking_ownership_may_lose_what_the_source_wrote_after_it_gave_up() {
    is_caught("writes after an abort", Ownership::with_take_over(AWAY, SAFE), &[NOTHING_LOST]);
}
