//! Generated clusters for the planner, the same for the same seed; and the watch over a plan's execution.
//!
//! Never enters: the planner's own idea of what fits.

use std::collections::{BTreeMap, BTreeSet};

use vmove::placement::cluster::{Cluster, Datastore, Disk, Host, Vm};
use vmove::placement::plan::Plan;

/// A generator of numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The next number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit.max(1)
    }
}

const GIB: u64 = 1 << 30;

/// A cluster of so many hosts and VMs: hosts of three sizes with one to three datastores, some of them shared by four hosts; VMs of
/// many sizes, some of which must be apart.
pub fn generate(hosts: u64, vms: u64, seed: u64) -> Cluster {
    let mut numbers = Numbers(seed);
    let mut made = Vec::new();
    for number in 0..hosts {
        let size = 1 + numbers.below(3);
        let mut datastores: Vec<_> = (0..=numbers.below(2))
            .map(|store| Datastore {
                name: ["fast", "slow"][store as usize].into(),
                id: format!("h{number}-{store}"),
                free_bytes: (200 + numbers.below(1800)) * GIB,
            })
            .collect();
        if numbers.below(4) == 0 {
            let (name, id) = ("shared".into(), format!("shared-{}", number / 4));
            datastores.push(Datastore { name, id, free_bytes: 4000 * GIB });
        }
        let features = ["sse2", "avx", "avx2"].iter().take(2 + numbers.below(2) as usize);
        made.push(Host {
            name: format!("host{number}"),
            vcpus: 64 * size as u32,
            memory_mib: (64 << 10) * size,
            datastores,
            maintenance: numbers.below(50) == 0,
            bandwidth: [125, 312, 1250][numbers.below(3) as usize] * 1_000_000,
            cpu_features: features.map(ToString::to_string).collect(),
            networks: BTreeSet::from(["lan".to_owned()]),
            apart: BTreeSet::new(),
        });
    }
    let vms = (0..vms).map(|number| {
        let host = &made[numbers.below(hosts) as usize];
        let disks = (0..=numbers.below(2)).map(|disk| {
            let datastore =
                host.datastores[numbers.below(host.datastores.len() as u64) as usize].name.clone();
            let allocated_bytes = (1 + numbers.below(40)) * GIB;
            let room_bytes = allocated_bytes + (16 << 20);
            Disk { name: format!("vd{disk}"), datastore, allocated_bytes, room_bytes }
        });
        let disks = disks.collect();
        let memory_mib = 512 << numbers.below(5);
        Vm {
            name: format!("vm{number}"),
            host: host.name.clone(),
            vcpus: 1 << numbers.below(4),
            memory_mib,
            touched_bytes: memory_mib << 20,
            disks,
            refused_by: BTreeMap::new(),
            stays: (numbers.below(50) == 0).then(|| "it is stopped".to_owned()),
            apart: (numbers.below(10) == 0)
                .then(|| format!("group{}", numbers.below(20)))
                .into_iter()
                .collect(),
            dirty_rate: numbers.below(20) * 1_000_000,
            cpu_features: if numbers.below(3) == 0 { host.cpu_features.clone() } else { BTreeSet::new() },
            networks: BTreeSet::from(["lan".to_owned()]),
        }
    });
    let vms = vms.collect();
    Cluster { hosts: made, vms }
}

/// Hosts, datastores and groups that are overfilled at some moment of a plan, whenever its moves end: a VM takes room at its target
/// from the start of its move and gives its room at the source back only when all is over.
pub fn overfilled(cluster: &Cluster, plan: &Plan, shared_in_place: bool) -> Vec<String> {
    let hosts: BTreeMap<&str, &Host> = cluster.hosts.iter().map(|host| (host.name.as_str(), host)).collect();
    let vms: BTreeMap<&str, &Vm> = cluster.vms.iter().map(|vm| (vm.name.as_str(), vm)).collect();
    let store =
        |host: &str, name: &str| hosts[host].datastores.iter().find(|store| store.name == name).unwrap();
    let (mut memory, mut vcpus, mut bytes) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut groups: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut overfilled = Vec::new();
    let arrivals = plan.moves.iter().map(|step| (step.to.as_str(), vms[step.vm.as_str()]));
    let arriving: BTreeSet<&str> = plan.moves.iter().map(|step| step.to.as_str()).collect();
    let present = cluster.vms.iter().map(|vm| (vm.host.as_str(), vm));
    for (host, vm) in present.chain(arrivals) {
        *memory.entry(host).or_insert(0) += vm.memory_mib;
        *vcpus.entry(host).or_insert(0) += vm.vcpus;
        for group in &vm.apart {
            *groups.entry((host, group)).or_insert(0) += 1;
        }
    }
    for host in &arriving {
        // Only what came may have overfilled it: a host may have been so before.
        if memory[host] > hosts[host].memory_mib || vcpus[host] > hosts[host].vcpus {
            overfilled.push(format!("host {host}"));
        }
        if hosts[host].maintenance {
            overfilled.push(format!("host {host} in maintenance"));
        }
    }
    for step in &plan.moves {
        let vm = vms[step.vm.as_str()];
        if let Some(why) = &vm.stays {
            overfilled.push(format!("VM {} is moved: {why}", vm.name));
        }
        overfilled.extend(
            vm.apart
                .iter()
                .filter(|group| groups[&(step.to.as_str(), group.as_str())] > 1)
                .map(|group| format!("group {group} on host {}", step.to)),
        );
        for disk in &vm.disks {
            let (from, to) = (store(&vm.host, &disk.datastore), store(&step.to, &step.disks[&disk.name]));
            if from.id == to.id {
                if !shared_in_place {
                    overfilled.push(format!("disk {} of {} stays in a shared datastore", disk.name, vm.name));
                }
                continue;
            }
            let (taken, free) = bytes.entry(to.id.as_str()).or_insert((0, u64::MAX));
            *taken += disk.room_bytes;
            *free = (*free).min(to.free_bytes);
        }
    }
    overfilled.extend(
        bytes.iter().filter(|(_, (taken, free))| taken > free).map(|(id, _)| format!("datastore {id}")),
    );
    overfilled
}
