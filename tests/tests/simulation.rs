//! The simulator over fresh seeds and all that were kept; rules broken on purpose are noticed.

use std::{fs, path::Path};

use vmove_tests::sim::{
    Run,
    campaign::{campaign, direct},
    kept::Kept,
    marks::Mark,
    minimise::minimise,
    mutations::Mutation,
    run,
};

/// Fresh seeds a run.
const SEEDS: u64 = 2_000;

/// Every row of the engines' tables of transitions and of the failure table is gone through, and nothing happens that is in no table.
#[test]
fn seeds_break_no_promise_and_keep_to_the_tables() {
    let first = fastrand::u64(..1 << 40);
    println!("simulate --first {first} --seeds {SEEDS}");
    let mut tally = campaign(first, SEEDS, None, |tally| tally.violations.len() >= 3);
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
    assert_eq!(named(tally.marks.missed()), [""; 0], "these are in a table and did not happen");
}

#[test]
fn kept_seeds_break_no_promise() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/seeds");
    let mut kept = 0;
    for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
        let Kept { found, seed, faults } = Kept::read(&entry.path()).unwrap();
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
    for mutation in Mutation::ALL {
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
