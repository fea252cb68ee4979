//! Plans the evacuation of a tenth of a generated cluster's hosts and says how long that took: `planner --hosts 1000 --vms 10000 --json`.

use std::time::Instant;

use vmove::placement::cluster::{Goal, Request};
use vmove::placement::plan;
use vmove_tests::clusters;

fn main() {
    let (mut hosts, mut vms, mut seed, mut json) = (1000, 10_000, 1, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|text| text.parse::<u64>().ok());
        let known = match word.as_str() {
            "--hosts" => number().map(|n| hosts = n),
            "--vms" => number().map(|n| vms = n),
            "--seed" => number().map(|n| seed = n),
            "--json" => {
                json = true;
                Some(())
            }
            _ => None,
        };
        if known.is_none() {
            eprintln!("usage: planner [--hosts N] [--vms N] [--seed N] [--json]");
            std::process::exit(2);
        }
    }
    let cluster = clusters::generate(hosts, vms, seed);
    let leave =
        cluster.hosts.iter().take((hosts as usize / 10).max(1)).map(|host| host.name.clone()).collect();
    let goal = Goal::Evacuate { hosts: leave, to: Default::default() };
    let request = Request { goal, parallel: 64, bandwidth: None, shared_in_place: true };
    let began = Instant::now();
    let plan = plan(&cluster, &request).expect("a cluster whose names are right");
    let ms = began.elapsed().as_millis();
    let (moves, unplaced) = (plan.moves.len(), plan.blocked.len());
    let overfilled = clusters::overfilled(&cluster, &plan, true).len();
    if json {
        let report =
            serde_json::json!({"ms": ms, "moves": moves, "overfilled": overfilled, "unplaced": unplaced});
        println!("{report}");
    } else {
        println!("{moves} moves planned in {ms} ms; {unplaced} VMs without a place, {overfilled} overfilled");
    }
    if overfilled > 0 {
        std::process::exit(1);
    }
}
