//! Emptying hosts: the VMs that are hardest to place first, each where the links are through with it soonest.
//!
//! A VM that then finds no place may push another one to a second place. A few VMs and hosts are searched through (branch and bound).
//! Never enters: what fits, what it costs.

use std::collections::BTreeSet;

use super::cost::Load;
use super::plan::{Blocked, Plan};
use super::room::{Choice, Index, Room};

/// Largest problem that is searched through.
const SEARCHED_VMS: usize = 10;
const SEARCHED_HOSTS: usize = 16;
/// Steps of a search.
const SEARCH_STEPS: usize = 300_000;
/// Second places that are looked at to make room by moving another VM, for all VMs of a plan together.
const PUSHES: usize = 20_000;

/// The plan that empties the hosts `leave`; none in `to`: to all others.
pub fn plan(index: &Index<'_>, leave: &BTreeSet<usize>, to: &BTreeSet<usize>) -> Plan {
    let hosts = &index.cluster.hosts;
    let named: Vec<usize> = (0..hosts.len())
        .filter(|host| !leave.contains(host) && (to.is_empty() || to.contains(host)))
        .collect();
    let candidates: Vec<usize> = named.iter().copied().filter(|host| !hosts[*host].maintenance).collect();
    let mut vms: Vec<usize> =
        (0..index.cluster.vms.len()).filter(|vm| leave.contains(&index.home(*vm))).collect();
    // Large ones first: small ones fit into what is left.
    vms.sort_by_key(|vm| {
        let vm = &index.cluster.vms[*vm];
        let disks = vm.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.allocated_bytes));
        std::cmp::Reverse((vm.memory_mib.saturating_add(disks >> 20), vm.vcpus))
    });
    let (mut choices, mut unplaced) = greedy(index, &vms, &candidates);
    if vms.len() <= SEARCHED_VMS && candidates.len() <= SEARCHED_HOSTS {
        let found = Search::run(index, &vms, &candidates, &choices);
        unplaced = vms.iter().copied().filter(|vm| !found.iter().any(|choice| choice.vm == *vm)).collect();
        choices = found;
    }
    // The longest first: a short one at the end leaves no link idle for long.
    choices.sort_by_key(|choice| std::cmp::Reverse((index.predict(choice, 1).seconds * 1000.0) as u64));
    let mut room = Room::new(index);
    for choice in &choices {
        room.take(choice);
    }
    let blocked = unplaced
        .into_iter()
        .map(|vm| Blocked { vm: index.cluster.vms[vm].name.clone(), reasons: room.blockers(vm, &named) });
    let blocked = blocked.collect();
    Plan::of(index, &choices, blocked)
}

fn greedy(index: &Index<'_>, vms: &[usize], candidates: &[usize]) -> (Vec<Choice>, Vec<usize>) {
    let (mut room, mut load) = (Room::new(index), Load::new(index));
    let (mut choices, mut unplaced) = (Vec::new(), Vec::new());
    for vm in vms {
        let fitting = candidates.iter().filter_map(|host| room.first(*vm, *host));
        // Soonest through, then fewest bytes, then where most is free.
        let best = fitting.min_by(|one, other| {
            let key = |choice: &Choice| (choice.copied, std::cmp::Reverse(room.memory_mib(choice.host)));
            load.with(one).total_cmp(&load.with(other)).then(key(one).cmp(&key(other)))
        });
        match best {
            Some(choice) => {
                room.take(&choice);
                load.add(&choice);
                choices.push(choice);
            }
            None => unplaced.push(*vm),
        }
    }
    let mut pushes = PUSHES;
    unplaced.retain(|vm| !push(&mut room, &mut choices, *vm, candidates, &mut pushes));
    (choices, unplaced)
}

/// Places a VM where another one that was placed there finds a second place.
fn push(
    room: &mut Room<'_>,
    choices: &mut Vec<Choice>,
    vm: usize,
    candidates: &[usize],
    pushes: &mut usize,
) -> bool {
    for at in 0..choices.len() {
        if *pushes == 0 {
            return false;
        }
        let pushed = choices[at].clone();
        room.give_back(&pushed);
        if let Some(choice) = room.first(vm, pushed.host) {
            room.take(&choice);
            let left = *pushes;
            let others = candidates.iter().filter(|host| **host != pushed.host).take(left);
            let mut looked_at = others.inspect(|_| *pushes -= 1);
            if let Some(second) = looked_at.find_map(|host| room.first(pushed.vm, *host)) {
                room.take(&second);
                choices[at] = second;
                choices.push(choice);
                return true;
            }
            room.give_back(&choice);
        }
        room.take(&pushed);
    }
    false
}

/// A search through all choices, best ones first, that leaves out what cannot beat the best found.
struct Search<'a> {
    index: &'a Index<'a>,
    options: Vec<Vec<Choice>>,
    room: Room<'a>,
    chosen: Vec<Choice>,
    best: Vec<Choice>,
    best_seconds: f64,
    steps: usize,
}

impl<'a> Search<'a> {
    fn run(index: &'a Index<'a>, vms: &[usize], candidates: &[usize], start: &[Choice]) -> Vec<Choice> {
        let room = Room::new(index);
        let options = vms.iter().map(|vm| {
            let hosts = candidates.iter().filter(|host| room.carries(*vm, **host));
            let mut all: Vec<_> = hosts.flat_map(|host| index.spreads(*vm, *host)).collect();
            all.retain(|choice| room.stores(choice));
            all.sort_by_key(|choice| choice.copied);
            all
        });
        let mut search = Self {
            index,
            options: options.collect(),
            room: Room::new(index),
            chosen: Vec::new(),
            best: start.to_vec(),
            best_seconds: index.total_seconds(start, index.at_once(start)),
            steps: SEARCH_STEPS,
        };
        search.from(0, &Load::new(index));
        search.best
    }

    fn from(&mut self, vm: usize, load: &Load<'a>) {
        // What is left can all be placed, at best.
        let possible = self.chosen.len() + self.options.len() - vm;
        let at_best = load.seconds(self.index.request.parallel);
        let worse =
            possible < self.best.len() || (possible == self.best.len() && at_best >= self.best_seconds);
        if worse || self.steps == 0 {
            return;
        }
        self.steps -= 1;
        let Some(options) = self.options.get(vm).cloned() else {
            let seconds = self.index.total_seconds(&self.chosen, self.index.at_once(&self.chosen));
            if self.chosen.len() > self.best.len() || seconds < self.best_seconds {
                self.best.clone_from(&self.chosen);
                self.best_seconds = seconds;
            }
            return;
        };
        for choice in options {
            if self.room.carries(choice.vm, choice.host) && self.room.stores(&choice) {
                self.room.take(&choice);
                self.chosen.push(choice.clone());
                let mut with = load.clone();
                with.add(&choice);
                self.from(vm + 1, &with);
                self.chosen.pop();
                self.room.give_back(&choice);
            }
        }
        self.from(vm + 1, load);
    }
}
