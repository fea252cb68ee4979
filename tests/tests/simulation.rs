//! The simulator over a range of seeds and all that were kept; rules broken on purpose are noticed.

use std::{fs, path::Path};

use serde::Deserialize;
use vmove_tests::sim::{
    Run,
    campaign::{campaign, direct},
    faults::Fault,
    marks::Mark,
    minimise::minimise,
    mutations::Mutation,
    run,
};

/// Seeds a run.
const SEEDS: u64 = 2_000;
/// The first of them. The same ones each time while a seed that breaks a promise is open (`fixtures/seeds/open`): chance must not decide
/// whether a change is good. `simulate` runs fresh ones.
const FIRST: u64 = 10_000;

/// A rule whose breaking no world here brings to light yet.
const NOT_SHOWN: [Mutation; 1] = [Mutation::BelieveUnsynced];

/// A seed that once broke a promise.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// What it found.
    found: String,
    seed: u64,
    /// The faults it takes; those that the seed plans, if there are none here.
    faults: Option<Vec<Fault>>,
}

/// No transition happens that is in no table, and no row of the failure table is used that cannot come up.
#[test]
fn seeds_break_no_promise_and_keep_to_the_tables() {
    println!("simulate --first {FIRST} --seeds {SEEDS}");
    let mut tally = campaign(FIRST, SEEDS, None, 3);
    assert!(
        tally.committed > SEEDS && tally.faults.len() > 15,
        "the worlds are too quiet: {:?}",
        tally.faults
    );
    direct(&mut tally);
    println!("{} worlds, {:.1} s", tally.worlds, tally.time.as_secs_f64());
    let failed: Vec<String> = tally
        .violations
        .iter()
        .map(|found| {
            let how = Run { faults: found.faults.clone(), ..Run::default() };
            let faults = minimise(found.seed, &how).map(|(faults, _)| faults);
            format!(
                "simulate --seed {}: {} is broken: {} (faults {faults:?})",
                found.seed, found.violation.checker, found.violation.what
            )
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let named = |marks: Vec<Mark>| marks.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(named(tally.marks.unlisted()), [""; 0], "these happened and are in no table");
    // Not asserted yet: that directed worlds reach every mark has not been seen. `simulate` fails if one was not hit.
    println!("in a table and not seen to happen: {:?}", named(tally.marks.missed()));
}

#[test]
fn kept_seeds_break_no_promise() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/seeds");
    let mut kept = 0;
    for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
        if entry.path().extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let Kept { found, seed, faults } =
            toml::from_str(&fs::read_to_string(entry.path()).unwrap()).unwrap();
        let outcome = run(seed, Run { faults, ..Run::default() });
        assert_eq!(outcome.violation, None, "{} is back: {found}", entry.path().display());
        kept += 1;
    }
    assert!(kept > 0);
}

#[test]
fn a_seed_gives_the_same_world_each_time() {
    for seed in 0..20 {
        let traced = || run(seed, Run { traced: true, ..Run::default() });
        let (one, other) = (traced(), traced());
        assert_eq!((one.trace, one.happened), (other.trace, other.happened), "seed {seed}");
    }
}

/// Tests of the tests: each rule, broken on purpose, is seen to be broken.
#[test]
fn broken_rules_are_noticed() {
    let mut unnoticed = Vec::new();
    for mutation in Mutation::ALL.into_iter().filter(|mutation| !NOT_SHOWN.contains(mutation)) {
        let noticed = mutation.provoked_by().find_map(|(seed, faults)| {
            let broken = |mutation| {
                run(seed, Run { faults: Some(faults.clone()), mutation, ..Run::default() }).violation
            };
            let violation = broken(Some(mutation))?;
            assert_eq!(broken(None), None, "seed {seed} breaks a promise without {mutation:?}");
            Some((seed, faults, violation))
        });
        match noticed {
            Some((seed, faults, violation)) => {
                println!("{mutation:?}: seed {seed}, {faults:?}: {}", violation.checker);
            }
            None => unnoticed.push(mutation),
        }
    }
    assert!(unnoticed.is_empty(), "nobody notices {unnoticed:?}");
}
