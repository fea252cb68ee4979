//! Evening out: from the fullest hosts to the emptiest, the move that helps the most first, until little is left to gain.
//!
//! A host is as full as the fuller of its RAM and its vCPUs. Never enters: what fits.

use super::plan::Plan;
use super::room::{Choice, Index, Room};

/// Hosts at either end that are looked at for one move.
const ENDS: usize = 24;
/// VMs of one host that are looked at for one move.
const LOOKED_AT: usize = 64;
/// Hosts this close to each other, in parts of their room, are even.
const EVEN: f64 = 0.05;

/// A plan that makes hosts more alike, by at most so many moves. Nobody is blocked: what cannot move stays.
pub fn plan(index: &Index<'_>, max_moves: usize) -> Plan {
    let mut room = Room::new(index);
    let mut use_of = Use::of(index);
    let mut choices: Vec<Choice> = Vec::new();
    let mut moved = vec![false; index.cluster.vms.len()];
    while choices.len() < max_moves {
        let Some(choice) = next(index, &room, &use_of, &moved) else { break };
        room.take(&choice);
        use_of.shift(index, &choice);
        moved[choice.vm] = true;
        choices.push(choice);
    }
    Plan::of(index, &choices, Vec::new())
}

/// The move that helps the most.
fn next(index: &Index<'_>, room: &Room<'_>, use_of: &Use, moved: &[bool]) -> Option<Choice> {
    let mut order: Vec<usize> = (0..index.cluster.hosts.len()).collect();
    order.sort_by(|one, other| use_of.fullness(index, *other).total_cmp(&use_of.fullness(index, *one)));
    let cold: Vec<usize> = order
        .iter()
        .rev()
        .copied()
        .filter(|host| !index.cluster.hosts[*host].maintenance)
        .take(ENDS)
        .collect();
    for hot in order.iter().take(ENDS) {
        let mut best: Option<(f64, Choice)> = None;
        for vm in use_of.vms[*hot].iter().filter(|vm| !moved[**vm]).take(LOOKED_AT) {
            for host in &cold {
                if use_of.fullness(index, *hot) - use_of.fullness(index, *host) < EVEN {
                    break;
                }
                let gain = use_of.gain(index, *vm, *host);
                if gain <= best.as_ref().map_or(1e-6, |(best, _)| *best) {
                    continue;
                }
                if let Some(choice) = room.first(*vm, *host) {
                    best = Some((gain, choice));
                }
            }
        }
        if let Some((_, choice)) = best {
            return Some(choice);
        }
    }
    None
}

/// What is used of each host, as it will be after the moves chosen so far.
struct Use {
    vcpus: Vec<u64>,
    memory_mib: Vec<u64>,
    vms: Vec<Vec<usize>>,
}

impl Use {
    fn of(index: &Index<'_>) -> Self {
        let hosts = index.cluster.hosts.len();
        let mut this =
            Self { vcpus: vec![0; hosts], memory_mib: vec![0; hosts], vms: vec![Vec::new(); hosts] };
        for (number, vm) in index.cluster.vms.iter().enumerate() {
            let home = index.home(number);
            this.vcpus[home] += u64::from(vm.vcpus);
            this.memory_mib[home] += vm.memory_mib;
            this.vms[home].push(number);
        }
        this
    }

    /// Parts of RAM and vCPUs used, with `vcpus` and `memory_mib` more or fewer.
    fn parts(&self, index: &Index<'_>, host: usize, vcpus: f64, memory_mib: f64) -> (f64, f64) {
        let there = &index.cluster.hosts[host];
        let part = |used: u64, change: f64, of: f64| (used as f64 + change) / of.max(1.0);
        (
            part(self.memory_mib[host], memory_mib, there.memory_mib as f64),
            part(self.vcpus[host], vcpus, f64::from(there.vcpus)),
        )
    }

    fn fullness(&self, index: &Index<'_>, host: usize) -> f64 {
        let (memory, vcpus) = self.parts(index, host, 0.0, 0.0);
        memory.max(vcpus)
    }

    /// By how much the sum of squares of what is used falls: the more even, the less it is.
    fn gain(&self, index: &Index<'_>, vm: usize, to: usize) -> f64 {
        let it = &index.cluster.vms[vm];
        let (vcpus, memory) = (f64::from(it.vcpus), it.memory_mib as f64);
        let squares = |host, sign: f64| {
            let (memory, vcpus) = self.parts(index, host, sign * vcpus, sign * memory);
            memory * memory + vcpus * vcpus
        };
        let from = index.home(vm);
        squares(from, 0.0) + squares(to, 0.0) - squares(from, -1.0) - squares(to, 1.0)
    }

    fn shift(&mut self, index: &Index<'_>, choice: &Choice) {
        let (vm, from) = (&index.cluster.vms[choice.vm], index.home(choice.vm));
        self.vcpus[from] -= u64::from(vm.vcpus);
        self.memory_mib[from] -= vm.memory_mib;
        self.vms[from].retain(|known| *known != choice.vm);
        self.vcpus[choice.host] += u64::from(vm.vcpus);
        self.memory_mib[choice.host] += vm.memory_mib;
    }
}
