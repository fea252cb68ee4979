//! What the agents say, as the planner wants it. VMs on their way take room at both ends.
//!
//! Never enters: asking the agents.

use std::collections::{BTreeMap, BTreeSet};

use super::plan_file::Limits;
use crate::agent::plan::{memory_need, room_for};
use crate::api::placement::{ClusterInventory, HostInventory, InventoryVm};
use crate::api::types::{HostInfo, VmState};
use crate::placement::cluster::{Cluster, Datastore, Disk, Host, Vm};

/// Where a VM is.
#[derive(Debug, Clone, Copy)]
pub struct Located<'a> {
    /// The host that has it.
    pub host: &'a str,
    /// What that says.
    pub vm: &'a InventoryVm,
}

/// The host that has a VM; none if none does, or the owner is not decided.
pub fn locate<'a>(inventory: &'a ClusterInventory, name: &str) -> Option<Located<'a>> {
    all(inventory)
        .filter(|found| found.vm.vm.summary.name == name && owns(found.vm))
        // While a move ends both hosts may say that they have it.
        .max_by_key(|found| found.vm.vm.summary.generation)
}

/// The host at which a VM arrives, or waits for the word of the one it left.
pub fn arriving_at<'a>(inventory: &'a ClusterInventory, name: &str) -> Option<Located<'a>> {
    all(inventory).find(|found| found.vm.vm.summary.name == name && arrives(found.vm))
}

/// VMs of a host, those that arrive included.
pub fn on_host<'a>(inventory: &'a ClusterInventory, host: &str) -> Vec<Located<'a>> {
    let here = all(inventory).filter(|found| found.host == host);
    here.filter(|found| {
        let owner = locate(inventory, &found.vm.vm.summary.name);
        match found.vm.vm.summary.state {
            VmState::Incoming => true,
            // What a move has left behind, for a moment, when the other host has it.
            VmState::Undecided => owner.is_none(),
            _ => owner.is_some_and(|owner| owner.host == host),
        }
    })
    .collect()
}

fn all(inventory: &ClusterInventory) -> impl Iterator<Item = Located<'_>> {
    inventory
        .hosts
        .iter()
        .flat_map(|there| there.vms.iter().map(|vm| Located { host: there.host.name.as_str(), vm }))
}

fn owns(vm: &InventoryVm) -> bool {
    !arrives(vm) && vm.vm.summary.state != VmState::Lost
}

fn arrives(vm: &InventoryVm) -> bool {
    matches!(vm.vm.summary.state, VmState::Incoming | VmState::Undecided)
}

/// The cluster for the planner. Hosts that did not answer are not in it.
pub fn cluster(inventory: &ClusterInventory, limits: &Limits) -> Cluster {
    let mut owners: BTreeMap<&str, Located<'_>> = BTreeMap::new();
    for found in all(inventory).filter(|found| owns(found.vm)) {
        let best = owners.entry(found.vm.vm.summary.name.as_str()).or_insert(found);
        if found.vm.vm.summary.generation > best.vm.vm.summary.generation {
            *best = found;
        }
    }
    let mut cluster = Cluster::default();
    for there in &inventory.hosts {
        let own: Vec<&InventoryVm> =
            owners.values().filter(|found| found.host == there.host.name).map(|found| found.vm).collect();
        cluster.hosts.push(host(there, &own, &owners, limits));
        cluster.vms.extend(own.iter().map(|found| vm(found, &there.host)));
    }
    cluster
}

/// A host: what is promised to VMs on their way is taken off what it has.
fn host(
    there: &HostInventory,
    own: &[&InventoryVm],
    owners: &BTreeMap<&str, Located<'_>>,
    limits: &Limits,
) -> Host {
    let info = &there.host;
    let mut vcpus = info.cpus.saturating_mul(limits.vcpus_per_cpu);
    let promised: u64 = own.iter().fold(0, |sum, vm| sum.saturating_add(needs_mib(vm)));
    // Neither more than there is, nor more than can be had now: something else may run there.
    let total = info.memory_bytes >> 20;
    let free = total.saturating_sub(promised).min(info.memory_free_bytes >> 20);
    let mut memory_mib = promised.saturating_add(free);
    let mut stores: Vec<Datastore> = info
        .datastores
        .iter()
        .map(|store| Datastore {
            name: store.name.clone(),
            id: store.id.clone(),
            free_bytes: store.free_bytes,
        })
        .collect();
    let mut apart = BTreeSet::new();
    for coming in there.vms.iter().filter(|vm| arrives(vm)) {
        let definition = &coming.vm.definition;
        vcpus = vcpus.saturating_sub(u32::from(definition.vcpus));
        memory_mib = memory_mib.saturating_sub(needs_mib(coming));
        apart.extend(definition.apart.iter().cloned());
        let source = owners.get(definition.name.as_str());
        for disk in &coming.vm.summary.disks {
            let bytes = |vm: &InventoryVm| vm.disk_bytes.get(&disk.name).copied().unwrap_or(0);
            let whole = room_for(source.map_or(0, |found| bytes(found.vm)));
            let rest = whole.saturating_sub(bytes(coming));
            if let Some(store) = stores.iter_mut().find(|store| store.name == disk.datastore) {
                store.free_bytes = store.free_bytes.saturating_sub(rest);
            }
        }
    }
    Host {
        name: info.name.clone(),
        vcpus,
        memory_mib,
        datastores: stores,
        maintenance: info.maintenance,
        bandwidth: limits.link,
        cpu_features: info.cpu_features.iter().cloned().collect(),
        networks: there.interfaces.iter().cloned().collect(),
        apart,
    }
}

fn needs_mib(vm: &InventoryVm) -> u64 {
    memory_need(vm.vm.definition.memory_mib).div_ceil(1 << 20)
}

fn vm(found: &InventoryVm, host: &HostInfo) -> Vm {
    let (summary, definition) = (&found.vm.summary, &found.vm.definition);
    let mut stays = match summary.state {
        VmState::Running => None,
        VmState::Moving => Some(format!(
            "it is on the move already ({})",
            summary.move_id.as_deref().unwrap_or("its report comes")
        )),
        _ => {
            let why = summary.error.as_ref().map_or_else(String::new, |error| format!(" ({error})"));
            Some(format!("it does not run{why}, and only a running VM can be moved: start it, or remove it"))
        }
    };
    let mut disks = Vec::new();
    for disk in &summary.disks {
        if !host.datastores.iter().any(|store| store.name == disk.datastore) {
            let (name, store) = (&disk.name, &disk.datastore);
            stays =
                Some(format!("its disk {name} is in datastore {store}, which host {} has not", host.name));
            disks.clear();
            break;
        }
        let allocated_bytes = found.disk_bytes.get(&disk.name).copied().unwrap_or(0);
        disks.push(Disk {
            name: disk.name.clone(),
            datastore: disk.datastore.clone(),
            allocated_bytes,
            room_bytes: room_for(allocated_bytes),
        });
    }
    let networks =
        definition.networks.iter().filter_map(|network| network.bridge.clone().or(network.tap.clone()));
    Vm {
        name: summary.name.clone(),
        host: host.name.clone(),
        vcpus: definition.vcpus.into(),
        memory_mib: needs_mib(found),
        // Not more than its RAM: the rest is the process's own.
        touched_bytes: found
            .touched_bytes
            .unwrap_or(u64::MAX)
            .min(definition.memory_mib.saturating_mul(1 << 20)),
        disks,
        stays,
        refused_by: BTreeMap::new(),
        apart: definition.apart.iter().cloned().collect(),
        dirty_rate: 0,
        cpu_features: definition.cpu_features.iter().cloned().collect(),
        networks: networks.collect(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::api::placement::Maintenance;
    use crate::api::types::{DatastoreInfo, DiskPlacement, VmDefinition, VmDetail, VmSummary};

    pub fn host_of(name: &str, vms: Vec<InventoryVm>) -> HostInventory {
        let store = DatastoreInfo {
            name: "fast".into(),
            id: format!("id-{name}"),
            path: "/fast".into(),
            total_bytes: 1 << 40,
            free_bytes: 1 << 34,
            default: true,
        };
        let host = HostInfo {
            name: name.into(),
            version: "1".into(),
            peer_version: 1,
            address: "127.0.0.1:1".into(),
            cpus: 2,
            memory_bytes: 8 << 30,
            memory_free_bytes: 4 << 30,
            cpu_features: vec!["avx".into()],
            datastores: vec![store],
            maintenance: false,
        };
        HostInventory { host, interfaces: vec!["br0".into()], vms, maintenance: Maintenance::default() }
    }

    pub fn vm_of(name: &str, host: &str, state: VmState, generation: u64) -> InventoryVm {
        let disk = DiskPlacement { name: "vda".into(), datastore: "fast".into(), path: "/x".into() };
        let summary = VmSummary {
            name: name.into(),
            state,
            vcpus: 1,
            memory_mib: 1024,
            host: host.into(),
            disks: vec![disk],
            generation,
            move_id: (state == VmState::Moving).then(|| "m".to_owned()),
            error: None,
        };
        let definition = VmDefinition {
            name: name.into(),
            vcpus: 1,
            memory_mib: 1024,
            cmdline: String::new(),
            cpu_features: vec!["avx".into()],
            disks: Vec::new(),
            networks: Vec::new(),
            apart: vec!["db".into()],
        };
        let vm = VmDetail { summary, definition, pid: None };
        let disk_bytes = BTreeMap::from([("vda".to_owned(), 1 << 30)]);
        InventoryVm { vm, disk_bytes, touched_bytes: Some(100 << 20) }
    }

    pub fn limits() -> Limits {
        Limits { parallel: 4, bandwidth: None, link: 1_000_000_000, vcpus_per_cpu: 4 }
    }

    #[test]
    fn what_is_on_its_way_takes_room_at_both_ends() {
        let mut coming = vm_of("web", "b", VmState::Incoming, 2);
        coming.disk_bytes.insert("vda".into(), 1 << 29);
        let inventory = ClusterInventory {
            hosts: vec![
                host_of("a", vec![vm_of("web", "a", VmState::Moving, 1)]),
                host_of("b", vec![coming]),
            ],
            unreachable: BTreeMap::new(),
        };
        let cluster = cluster(&inventory, &limits());
        let (a, b) = (&cluster.hosts[0], &cluster.hosts[1]);
        // 4 GiB can be had, whatever is on paper; a has promised 1088 of what it has already.
        assert_eq!((a.memory_mib, b.memory_mib), (4096 + 1088, 4096 - 1088));
        assert_eq!((a.vcpus, b.vcpus), (8, 7));
        assert_eq!(b.datastores[0].free_bytes, (1 << 34) - (room_for(1 << 30) - (1 << 29)));
        assert!(b.apart.contains("db") && a.apart.is_empty());
        assert_eq!(cluster.vms.len(), 1);
        assert_eq!((cluster.vms[0].memory_mib, cluster.vms[0].touched_bytes), (1088, 100 << 20));
        assert!(cluster.vms[0].stays.as_ref().is_some_and(|why| why.contains("on the move")));
    }

    #[test]
    fn of_two_owners_the_later_one_has_it() {
        let inventory = ClusterInventory {
            hosts: vec![
                host_of("a", vec![vm_of("web", "a", VmState::Moving, 1)]),
                host_of("b", vec![vm_of("web", "b", VmState::Running, 2)]),
            ],
            unreachable: BTreeMap::new(),
        };
        assert_eq!(locate(&inventory, "web").unwrap().host, "b");
        assert!(on_host(&inventory, "a").is_empty());
        let cluster = cluster(&inventory, &limits());
        assert_eq!(cluster.vms.iter().map(|vm| vm.host.as_str()).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn a_vm_whose_datastore_is_gone_spoils_nothing_else() {
        let mut lost = vm_of("web", "a", VmState::Running, 1);
        lost.vm.summary.disks[0].datastore = "gone".into();
        let inventory = ClusterInventory {
            hosts: vec![
                host_of("a", vec![lost, vm_of("db", "a", VmState::Running, 1)]),
                host_of("b", vec![]),
            ],
            unreachable: BTreeMap::new(),
        };
        let cluster = cluster(&inventory, &limits());
        let planned = crate::placement::plan(&cluster, &limits().evacuate("a", &[])).unwrap();
        assert_eq!((planned.moves[0].vm.as_str(), planned.blocked[0].vm.as_str()), ("db", "web"));
    }
}
