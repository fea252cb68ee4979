//! Runs the simulator: many seeds added up, or one with its trace.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, process::ExitCode};

use clap::Parser;
use serde::Serialize;
use vmove_tests::sim::{
    Run,
    campaign::{campaign, direct},
    faults::Kind,
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
    match args.seed {
        Some(seed) => one(seed, args.mutation),
        None => many(&args),
    }
}

fn one(seed: u64, mutation: Option<Mutation>) -> ExitCode {
    let how = Run { mutation, ..Run::default() };
    let (faults, outcome) = match minimise(seed, &how) {
        Some((faults, _)) => {
            let again = run(seed, Run { faults: Some(faults.clone()), traced: true, ..how });
            (faults, again)
        }
        None => {
            let outcome = run(seed, Run { traced: true, ..how });
            (outcome.faults.clone(), outcome)
        }
    };
    print!("{}", outcome.trace);
    for fault in &faults {
        println!("fault: {fault:?}");
    }
    match outcome.violation {
        Some(violation) => {
            println!("seed {seed}: {} is broken: {}", violation.checker, violation.what);
            ExitCode::FAILURE
        }
        None => {
            println!("seed {seed}: every promise was kept over {} happenings", outcome.happened);
            ExitCode::SUCCESS
        }
    }
}

fn many(args: &Args) -> ExitCode {
    let mut tally = campaign(args.first, args.seeds, args.mutation, 100);
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
