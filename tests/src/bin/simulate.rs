//! Runs the simulator: many seeds added up, or one with its trace.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
};

use clap::Parser;
use serde::Serialize;
use vmove_tests::sim::{
    Run,
    campaign::{Found, Tally, campaign, direct},
    faults::Kind,
    kept::Kept,
    marks,
    minimise::minimise,
    mutations::Mutation,
    run,
};

/// Worlds of hosts, agents, VM processes, guests, disks and links around the engine, each from one seed, all of them failing.
#[derive(Parser)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Run this one alone and print what happens, with as few faults as still break a promise, if one is broken.
    #[arg(long)]
    seed: Option<u64>,
    /// The same for a kept seed, with the faults that its file names (fixtures/seeds).
    #[arg(long, conflicts_with = "seed")]
    kept: Option<PathBuf>,
    /// Break a rule on purpose (a name as in the sources, for example ForgetDirty).
    #[arg(long, value_parser = mutation)]
    mutation: Option<Mutation>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Print every mark and how often it was hit.
    #[arg(long)]
    marks: bool,
}

fn mutation(name: &str) -> Result<Mutation, String> {
    let known = Mutation::ALL.iter().find(|mutation| format!("{mutation:?}") == name);
    known.copied().ok_or_else(|| format!("rules that can be broken: {:?}", Mutation::ALL))
}

#[derive(Serialize)]
struct Report {
    seeds: u64,
    violations: usize,
    seconds: f64,
    faults: BTreeMap<Kind, u64>,
    marks: MarkCount,
    failed_seeds: Vec<u64>,
}

#[derive(Serialize)]
struct MarkCount {
    hit: usize,
    total: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match (args.seed, &args.kept) {
        (Some(seed), _) => one(seed, &Run { mutation: args.mutation, ..Run::default() }),
        (None, Some(path)) => match Kept::read(path) {
            Ok(Kept { seed, faults, .. }) => {
                one(seed, &Run { faults, mutation: args.mutation, traced: false })
            }
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        },
        (None, None) => many(&args),
    }
}

fn one(seed: u64, how: &Run) -> ExitCode {
    let faults = minimise(seed, how).map(|(faults, _)| faults);
    let outcome =
        run(seed, Run { faults: faults.or_else(|| how.faults.clone()), traced: true, ..how.clone() });
    print!("{}", outcome.trace);
    for fault in &outcome.faults {
        println!("fault: {fault:?}");
    }
    match outcome.violation {
        Some(violation) => {
            println!("seed {seed}: {} is broken: {}", violation.checker, violation.what);
            let kept = Kept { found: violation.what, seed, faults: Some(outcome.faults) };
            println!("to keep it:\n{}", toml::to_string(&kept).unwrap_or_default());
            ExitCode::FAILURE
        }
        None => {
            println!("seed {seed}: every promise was kept over {} happenings", outcome.happened);
            ExitCode::SUCCESS
        }
    }
}

/// Violations are told at once: a million seeds take a while.
fn tell_new(tally: &Tally, told: &AtomicUsize) {
    let before = told.swap(tally.violations.len(), Ordering::Relaxed);
    for Found { seed, violation, .. } in tally.violations.iter().skip(before) {
        eprintln!("seed {seed}: {}: {}", violation.checker, violation.what);
    }
}

fn many(args: &Args) -> ExitCode {
    /// That many broken promises say enough.
    const ENOUGH: usize = 100;
    let told = AtomicUsize::new(0);
    let mut tally = campaign(args.first, args.seeds, args.mutation, |tally| {
        tell_new(tally, &told);
        tally.violations.len() >= ENOUGH
    });
    direct(&mut tally);
    let all = marks::all();
    if args.marks {
        for mark in &all {
            println!("{:>10}  {mark}", tally.marks.hits(*mark));
        }
    }
    let (missed, unlisted) = (tally.marks.missed(), tally.marks.unlisted());
    for mark in &missed {
        eprintln!("not hit: {mark}");
    }
    for mark in &unlisted {
        eprintln!("in no table: {mark}");
    }
    let report = Report {
        seeds: tally.worlds,
        violations: tally.violations.len(),
        seconds: tally.time.as_secs_f64(),
        marks: MarkCount { hit: all.len() - missed.len(), total: all.len() },
        faults: tally.faults,
        failed_seeds: tally.violations.iter().map(|found| found.seed).collect(),
    };
    if args.json {
        println!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        println!(
            "{} seeds in {:.1} s ({} happenings, {} moves committed), {} broke a promise",
            report.seeds, report.seconds, tally.happened, tally.committed, report.violations
        );
        for found in tally.violations.iter().take(20) {
            println!("seed {}: {}: {}", found.seed, found.violation.checker, found.violation.what);
            if let Some(faults) = &found.faults {
                println!("  with {faults:?}");
            }
        }
    }
    if report.violations == 0 && missed.is_empty() && unlisted.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
