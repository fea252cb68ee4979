//! What fits where: the cluster by number, what is free of it, and what a choice takes.
//!
//! Room that a VM leaves behind is never counted: so a plan fits at every moment, in whatever order its moves end.
//! Never enters: which choice is the best.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::cluster::{Cluster, Request};
use super::plan::PlacementError;

/// Ways to spread a VM's disks over the datastores of one host that are looked at.
const MAX_SPREADS: usize = 16;

/// A VM on its way to a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The VM, by its number.
    pub vm: usize,
    /// The host it goes to.
    pub host: usize,
    /// Datastore of each disk, by its number on that host.
    pub stores: Vec<usize>,
    /// Bytes of disks that are copied.
    pub copied: u64,
}

/// The cluster by number.
#[derive(Debug)]
pub struct Index<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// What is wanted.
    pub request: &'a Request,
    hosts: HashMap<&'a str, usize>,
    vms: HashMap<&'a str, usize>,
    /// Host of each VM.
    homes: Vec<usize>,
    /// Storage of each host's datastores, by number: the same on two hosts if they share it.
    storage: Vec<Vec<usize>>,
    /// Storage of each VM's disks.
    disks: Vec<Vec<usize>>,
    /// Free bytes of each storage.
    free: Vec<u64>,
    /// What VMs need and hosts offer, by number: most are alike.
    needs: Vec<usize>,
    offers: Vec<usize>,
    /// Whether an offer meets a need, by both numbers.
    meets: Vec<Vec<bool>>,
}

/// CPU features and networks.
type Wants<'a> = (&'a BTreeSet<String>, &'a BTreeSet<String>);

/// Numbers of equal things, and the things by their numbers.
fn numbered<'a>(all: impl Iterator<Item = Wants<'a>>) -> (Vec<usize>, Vec<Wants<'a>>) {
    let (mut known, mut things) = (HashMap::new(), Vec::new());
    let numbers = all.map(|thing| {
        *known.entry(thing).or_insert_with(|| {
            things.push(thing);
            things.len() - 1
        })
    });
    (numbers.collect(), things)
}

impl<'a> Index<'a> {
    /// Numbers a cluster; refuses names that are there twice or not at all.
    pub fn new(cluster: &'a Cluster, request: &'a Request) -> Result<Self, PlacementError> {
        let unknown = |what: String| PlacementError::Unknown(what);
        let (mut hosts, mut ids, mut free) = (HashMap::new(), HashMap::new(), Vec::new());
        let mut storage = Vec::new();
        for (number, host) in cluster.hosts.iter().enumerate() {
            if hosts.insert(host.name.as_str(), number).is_some() {
                return Err(unknown(format!("host {:?} is there twice", host.name)));
            }
            let mut own = Vec::new();
            for store in &host.datastores {
                let number = *ids.entry(store.id.as_str()).or_insert_with(|| {
                    free.push(store.free_bytes);
                    free.len() - 1
                });
                // Two hosts may have looked at different moments.
                free[number] = free[number].min(store.free_bytes);
                own.push(number);
            }
            storage.push(own);
        }
        let (mut vms, mut homes, mut disks) = (HashMap::new(), Vec::new(), Vec::new());
        for (number, vm) in cluster.vms.iter().enumerate() {
            if vms.insert(vm.name.as_str(), number).is_some() {
                return Err(unknown(format!("VM {:?} is there twice", vm.name)));
            }
            let home = *hosts.get(vm.host.as_str()).ok_or_else(|| {
                unknown(format!("VM {:?} is on host {:?}, which there is not", vm.name, vm.host))
            })?;
            let places = vm.disks.iter().map(|disk| {
                let stores = &cluster.hosts[home].datastores;
                let at = stores.iter().position(|store| store.name == disk.datastore).ok_or_else(|| {
                    unknown(format!(
                        "disk {:?} of VM {:?} is in datastore {:?}, which host {:?} has not",
                        disk.name, vm.name, disk.datastore, vm.host
                    ))
                })?;
                Ok(storage[home][at])
            });
            disks.push(places.collect::<Result<Vec<_>, PlacementError>>()?);
            homes.push(home);
        }
        let (needs, needed) = numbered(cluster.vms.iter().map(|vm| (&vm.cpu_features, &vm.networks)));
        let (offers, offered) =
            numbered(cluster.hosts.iter().map(|host| (&host.cpu_features, &host.networks)));
        let met =
            |need: &Wants<'_>, offer: &Wants<'_>| need.0.is_subset(offer.0) && need.1.is_subset(offer.1);
        let meets =
            needed.iter().map(|need| offered.iter().map(|offer| met(need, offer)).collect()).collect();
        Ok(Self { cluster, request, hosts, vms, homes, storage, disks, free, needs, offers, meets })
    }

    /// A VM's number.
    pub fn vm(&self, name: &str) -> Option<usize> {
        self.vms.get(name).copied()
    }

    /// A host's number.
    pub fn host(&self, name: &str) -> Option<usize> {
        self.hosts.get(name).copied()
    }

    /// A host's name.
    pub fn host_name(&self, host: usize) -> &'a str {
        &self.cluster.hosts[host].name
    }

    /// The host that has a VM.
    pub fn home(&self, vm: usize) -> usize {
        self.homes[vm]
    }

    /// Whether a disk may go to that datastore, and how many bytes are copied for it.
    fn copied(&self, vm: usize, disk: usize, host: usize, store: usize) -> Option<u64> {
        if self.storage[host][store] != self.disks[vm][disk] {
            return Some(self.cluster.vms[vm].disks[disk].allocated_bytes);
        }
        // The same storage: nothing to copy, if it can be handed over.
        self.request.shared_in_place.then_some(0)
    }

    /// The choice that a plan names.
    pub fn choice(&self, vm: usize, to: &str, disks: &BTreeMap<String, String>) -> Result<Choice, String> {
        let host = self.host(to).ok_or_else(|| format!("there is no host {to:?}"))?;
        if host == self.home(vm) {
            return Err(format!("it is on host {to} already"));
        }
        let own: BTreeSet<&str> = self.cluster.vms[vm].disks.iter().map(|disk| disk.name.as_str()).collect();
        if let Some(name) = disks.keys().find(|name| !own.contains(name.as_str())) {
            return Err(format!("it has no disk {name:?}"));
        }
        let (mut stores, mut copied) = (Vec::new(), 0);
        for (number, disk) in self.cluster.vms[vm].disks.iter().enumerate() {
            let name = disks
                .get(&disk.name)
                .ok_or_else(|| format!("no datastore is named for disk {:?}", disk.name))?;
            let store = self.cluster.hosts[host]
                .datastores
                .iter()
                .position(|store| store.name == *name)
                .ok_or_else(|| format!("host {to} has no datastore {name:?}"))?;
            let bytes = self.copied(vm, number, host, store).ok_or_else(|| {
                format!("disk {:?} lies in datastore {name:?} already, which both hosts share", disk.name)
            })?;
            copied = u64::saturating_add(copied, bytes);
            stores.push(store);
        }
        Ok(Choice { vm, host, stores, copied })
    }

    /// All ways to put a VM's disks onto a host's datastores, those that copy least first. What is full is not looked at.
    pub fn spreads(&self, vm: usize, host: usize) -> Vec<Choice> {
        let names: Vec<_> =
            self.cluster.hosts[host].datastores.iter().map(|store| store.name.as_str()).collect();
        let mut partial = vec![(Vec::new(), 0u64)];
        for (number, disk) in self.cluster.vms[vm].disks.iter().enumerate() {
            let mut stores: Vec<_> = (0..names.len())
                .filter_map(|store| Some((self.copied(vm, number, host, store)?, store)))
                .collect();
            // The datastore of the same name before others, as a move without a word on it would take it.
            stores.sort_by_key(|(bytes, store)| (*bytes, names[*store] != disk.datastore));
            partial = partial
                .iter()
                .flat_map(|(chosen, copied)| {
                    stores.iter().map(move |(bytes, store)| {
                        let mut chosen: Vec<usize> = chosen.clone();
                        chosen.push(*store);
                        (chosen, copied.saturating_add(*bytes))
                    })
                })
                .take(MAX_SPREADS)
                .collect();
        }
        let mut choices: Vec<_> =
            partial.into_iter().map(|(stores, copied)| Choice { vm, host, stores, copied }).collect();
        choices.sort_by_key(|choice| choice.copied);
        choices
    }
}

/// What is free.
#[derive(Debug, Clone)]
pub struct Room<'a> {
    index: &'a Index<'a>,
    vcpus: Vec<u32>,
    memory_mib: Vec<u64>,
    storage: Vec<u64>,
    /// Groups with a VM on a host, or on its way there.
    apart: HashSet<(usize, &'a str)>,
}

impl<'a> Room<'a> {
    /// What is free now.
    pub fn new(index: &'a Index<'a>) -> Self {
        let hosts = &index.cluster.hosts;
        let mut room = Self {
            index,
            vcpus: hosts.iter().map(|host| host.vcpus).collect(),
            memory_mib: hosts.iter().map(|host| host.memory_mib).collect(),
            storage: index.free.clone(),
            apart: HashSet::new(),
        };
        for (number, host) in hosts.iter().enumerate() {
            room.apart.extend(host.apart.iter().map(|group| (number, group.as_str())));
        }
        for (number, vm) in index.cluster.vms.iter().enumerate() {
            let home = index.home(number);
            room.vcpus[home] = room.vcpus[home].saturating_sub(vm.vcpus);
            room.memory_mib[home] = room.memory_mib[home].saturating_sub(vm.memory_mib);
            room.apart.extend(vm.apart.iter().map(|group| (home, group.as_str())));
        }
        room
    }

    /// Free RAM of a host, MiB.
    pub fn memory_mib(&self, host: usize) -> u64 {
        self.memory_mib[host]
    }

    /// Whether a VM itself can be on a host, its disks left out.
    pub fn carries(&self, vm: usize, host: usize) -> bool {
        let (it, there) = (&self.index.cluster.vms[vm], &self.index.cluster.hosts[host]);
        it.stays.is_none()
            && (it.refused_by.is_empty() || !it.refused_by.contains_key(&there.name))
            && !there.maintenance
            && host != self.index.home(vm)
            && it.memory_mib <= self.memory_mib[host]
            && it.vcpus <= self.vcpus[host]
            && self.index.meets[self.index.needs[vm]][self.index.offers[host]]
            && !it.apart.iter().any(|group| self.apart.contains(&(host, group.as_str())))
            && self.index.converges(vm, host)
    }

    /// Bytes that a choice takes of each storage.
    fn taken(&self, choice: &Choice) -> Vec<(usize, u64)> {
        let mut taken: Vec<(usize, u64)> = Vec::new();
        for (number, store) in choice.stores.iter().enumerate() {
            let storage = self.index.storage[choice.host][*store];
            let stays = storage == self.index.disks[choice.vm][number];
            let bytes = if stays { 0 } else { self.index.cluster.vms[choice.vm].disks[number].room_bytes };
            match taken.iter_mut().find(|(known, _)| *known == storage) {
                Some((_, sum)) => *sum = sum.saturating_add(bytes),
                None => taken.push((storage, bytes)),
            }
        }
        taken
    }

    /// Whether the datastores of a choice have room for it.
    pub fn stores(&self, choice: &Choice) -> bool {
        self.taken(choice).iter().all(|(storage, bytes)| *bytes <= self.storage[*storage])
    }

    /// Takes what a choice needs, which must fit.
    pub fn take(&mut self, choice: &Choice) {
        let vm = &self.index.cluster.vms[choice.vm];
        self.vcpus[choice.host] -= vm.vcpus;
        self.memory_mib[choice.host] -= vm.memory_mib;
        for (storage, bytes) in self.taken(choice) {
            self.storage[storage] -= bytes;
        }
        self.apart.extend(vm.apart.iter().map(|group| (choice.host, group.as_str())));
    }

    /// Gives back what [`Room::take`] took.
    pub fn give_back(&mut self, choice: &Choice) {
        let vm = &self.index.cluster.vms[choice.vm];
        self.vcpus[choice.host] += vm.vcpus;
        self.memory_mib[choice.host] += vm.memory_mib;
        for (storage, bytes) in self.taken(choice) {
            self.storage[storage] += bytes;
        }
        for group in &vm.apart {
            self.apart.remove(&(choice.host, group.as_str()));
        }
    }

    /// The first choice of a VM on a host that fits.
    pub fn first(&self, vm: usize, host: usize) -> Option<Choice> {
        if !self.carries(vm, host) {
            return None;
        }
        self.index.spreads(vm, host).into_iter().find(|choice| self.stores(choice))
    }

    /// Everything that stands against a choice.
    pub fn against(&self, choice: &Choice) -> Vec<String> {
        let stays = self.index.cluster.vms[choice.vm].stays.clone();
        let mut reasons: Vec<String> = stays.into_iter().collect();
        reasons.extend(self.against_host(choice.vm, choice.host));
        reasons.extend(self.against_stores(choice));
        reasons
    }

    /// Datastores that have no room for a choice.
    fn against_stores(&self, choice: &Choice) -> Vec<String> {
        let mut reasons = Vec::new();
        let stores = &self.index.cluster.hosts[choice.host].datastores;
        for (storage, bytes) in self.taken(choice) {
            let free = self.storage[storage];
            if bytes > free {
                let named = self.index.storage[choice.host].iter().position(|number| *number == storage);
                let store = named.map_or("", |at| stores[at].name.as_str());
                let host = self.index.host_name(choice.host);
                reasons
                    .push(format!("host {host}: datastore {store} has {free} bytes free, it needs {bytes}"));
            }
        }
        reasons
    }

    /// Everything that stands against a VM on a host, its disks left out.
    fn against_host(&self, vm: usize, host: usize) -> Vec<String> {
        let (it, there) = (&self.index.cluster.vms[vm], &self.index.cluster.hosts[host]);
        let mut reasons = Vec::new();
        let mut say = |why: String| reasons.push(format!("host {}: {why}", there.name));
        if there.maintenance {
            say("it is in maintenance".into());
        }
        it.refused_by.get(&there.name).into_iter().flatten().cloned().for_each(&mut say);
        if it.memory_mib > self.memory_mib[host] {
            say(format!("{} MiB of RAM are free, it needs {}", self.memory_mib[host], it.memory_mib));
        }
        if it.vcpus > self.vcpus[host] {
            say(format!("{} vCPUs are free, it needs {}", self.vcpus[host], it.vcpus));
        }
        let missing = |needs: &BTreeSet<String>, has: &BTreeSet<String>| {
            needs.difference(has).map(String::as_str).collect::<Vec<_>>().join(", ")
        };
        if !it.cpu_features.is_subset(&there.cpu_features) {
            say(format!("it lacks CPU features: {}", missing(&it.cpu_features, &there.cpu_features)));
        }
        if !it.networks.is_subset(&there.networks) {
            say(format!("it lacks networks: {}", missing(&it.networks, &there.networks)));
        }
        for group in it.apart.iter().filter(|group| self.apart.contains(&(host, group.as_str()))) {
            say(format!("a VM of group {group} is there or on its way there"));
        }
        if !self.index.converges(vm, host) {
            let rate = self.index.rate(self.index.home(vm), host);
            say(format!("its RAM turns dirty at {} bytes/s, the link takes {rate}", it.dirty_rate));
        }
        reasons
    }

    /// Why a VM fits on none of these hosts: everything, host by host.
    pub fn blockers(&self, vm: usize, hosts: &[usize]) -> Vec<String> {
        if let Some(why) = &self.index.cluster.vms[vm].stays {
            return vec![why.clone()];
        }
        if hosts.is_empty() {
            return vec!["there is no host it could go to".into()];
        }
        let mut reasons = Vec::new();
        for host in hosts {
            let before = reasons.len();
            reasons.extend(self.against_host(vm, *host));
            let spreads = self.index.spreads(vm, *host);
            if spreads.is_empty() {
                let why = "no datastore there can take its disks: it has none, or shares the VM's";
                reasons.push(format!("host {}: {why}", self.index.host_name(*host)));
            } else if !spreads.iter().any(|choice| self.stores(choice)) {
                reasons.extend(self.against_stores(&spreads[0]));
            }
            if reasons.len() == before {
                reasons.push(format!(
                    "host {}: it fits alone, and not with the others",
                    self.index.host_name(*host)
                ));
            }
        }
        reasons
    }
}
