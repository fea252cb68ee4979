//! The planner on generated clusters: it overfills nothing at any moment, is close to the best plan where that can be found, and says
//! everything that stands in the way.

use std::collections::{BTreeMap, BTreeSet};

use vmove::placement::cluster::{Cluster, Datastore, Disk, Goal, Host, Request, Vm};
use vmove::placement::plan;
use vmove::placement::plan::{PlacementError, Plan};
use vmove_tests::clusters::{self, Numbers};

fn evacuate(hosts: &[&str], shared_in_place: bool) -> Request {
    let hosts = hosts.iter().map(ToString::to_string).collect();
    Request {
        goal: Goal::Evacuate { hosts, to: BTreeSet::new() },
        parallel: 4,
        bandwidth: None,
        shared_in_place,
    }
}

fn host(name: &str, memory_mib: u64, free_bytes: u64) -> Host {
    Host {
        name: name.into(),
        vcpus: 16,
        memory_mib,
        datastores: vec![Datastore { name: "fast".into(), id: format!("id-{name}"), free_bytes }],
        maintenance: false,
        bandwidth: 100_000_000,
        cpu_features: BTreeSet::new(),
        networks: BTreeSet::new(),
        apart: BTreeSet::new(),
    }
}

fn vm(name: &str, host: &str, memory_mib: u64) -> Vm {
    let disk = Disk {
        name: "vda".into(),
        datastore: "fast".into(),
        allocated_bytes: 1_000_000_000,
        room_bytes: 1_000_000_000,
    };
    Vm {
        name: name.into(),
        host: host.into(),
        vcpus: 1,
        memory_mib,
        touched_bytes: memory_mib << 20,
        disks: vec![disk],
        stays: None,
        refused_by: BTreeMap::new(),
        apart: BTreeSet::new(),
        dirty_rate: 0,
        cpu_features: BTreeSet::new(),
        networks: BTreeSet::new(),
    }
}

#[test]
fn nothing_is_overfilled_at_any_moment() {
    for seed in 0..60 {
        let mut numbers = Numbers(seed);
        let hosts = 2 + numbers.below(30);
        let cluster = clusters::generate(hosts, numbers.below(hosts * 20), seed);
        for shared in [false, true] {
            let leave = &cluster.hosts[numbers.below(hosts) as usize].name;
            let mut request = evacuate(&[leave], shared);
            let plan_ = plan(&cluster, &request).unwrap();
            assert_eq!(clusters::overfilled(&cluster, &plan_, shared), [""; 0], "seed {seed}");
            plan_.check(&cluster, &request).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let there = cluster.vms.iter().filter(|vm| vm.host == *leave).count();
            assert_eq!(plan_.moves.len() + plan_.blocked.len(), there, "seed {seed}");
            assert!(plan_.blocked.iter().all(|blocked| !blocked.reasons.is_empty()), "seed {seed}");
            request.goal = Goal::Balance { max_moves: 40 };
            let even = plan(&cluster, &request).unwrap();
            assert_eq!(clusters::overfilled(&cluster, &even, shared), [""; 0], "seed {seed}");
            even.check(&cluster, &request).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        }
    }
}

/// All plans there are: VMs placed and seconds of the best, by trying everything. What fits and what it costs is worked out anew here.
struct Exhaustive<'a> {
    vms: Vec<&'a Vm>,
    hosts: Vec<&'a Host>,
    from: &'a Host,
    parallel: usize,
    placed: usize,
    seconds: f64,
}

/// A part of a plan.
#[derive(Clone, Default)]
struct Partial {
    memory: BTreeMap<usize, u64>,
    stored: BTreeMap<String, u64>,
    groups: BTreeSet<(usize, String)>,
    links: BTreeMap<usize, f64>,
    leaving: f64,
    alone: f64,
    longest: f64,
    at_once: usize,
    moves: usize,
}

impl Exhaustive<'_> {
    fn best(cluster: &Cluster, request: &Request, leave: &str) -> (usize, f64) {
        let goes = |host: &&Host| host.name != leave && !host.maintenance;
        let mut this = Exhaustive {
            vms: cluster.vms.iter().filter(|vm| vm.host == leave).collect(),
            hosts: cluster.hosts.iter().filter(goes).collect(),
            from: cluster.hosts.iter().find(|host| host.name == leave).unwrap(),
            parallel: request.parallel,
            placed: 0,
            seconds: f64::INFINITY,
        };
        this.try_all(0, &Partial { at_once: request.parallel, ..Partial::default() });
        (this.placed, this.seconds)
    }

    fn try_all(&mut self, at: usize, partial: &Partial) {
        if partial.moves + self.vms.len() - at < self.placed {
            return;
        }
        let Some(vm) = self.vms.get(at).copied() else {
            let at_once = partial.at_once.min(self.parallel).min(partial.moves).max(1) as f64;
            let links = partial.links.values().copied().fold(partial.leaving, f64::max);
            let rounds = (partial.moves as f64 / at_once).ceil();
            let seconds = links.max(partial.longest).max(partial.alone / at_once) + rounds;
            if partial.moves > self.placed || seconds < self.seconds {
                (self.placed, self.seconds) = (partial.moves, seconds);
            }
            return;
        };
        for number in 0..self.hosts.len() {
            for store in &self.hosts[number].datastores {
                if let Some(longer) = self.with(partial, vm, number, store) {
                    self.try_all(at + 1, &longer);
                }
            }
        }
        self.try_all(at + 1, partial);
    }

    /// A VM with one disk more; none if it does not fit.
    fn with(&self, partial: &Partial, vm: &Vm, number: usize, store: &Datastore) -> Option<Partial> {
        let (host, disk) = (self.hosts[number], &vm.disks[0]);
        let mut longer = partial.clone();
        let memory = longer.memory.entry(number).or_default();
        *memory += vm.memory_mib;
        let stored = longer.stored.entry(store.id.clone()).or_default();
        let old = self.from.datastores.iter().find(|store| store.name == disk.datastore).unwrap();
        let copied = if old.id == store.id { 0 } else { disk.allocated_bytes };
        *stored += if old.id == store.id { 0 } else { disk.room_bytes };
        let rate = host.bandwidth.min(self.from.bandwidth) as f64;
        let dirty = vm.dirty_rate as f64;
        let apart = vm.apart.iter().all(|group| longer.groups.insert((number, group.clone())));
        let fits = *memory <= host.memory_mib && *stored <= store.free_bytes && apart && dirty * 1.25 < rate;
        let bytes = vm.touched_bytes as f64 / (1.0 - dirty / rate) + copied as f64;
        *longer.links.entry(number).or_default() += bytes / host.bandwidth as f64;
        longer.leaving += bytes / self.from.bandwidth as f64;
        longer.alone += bytes / rate;
        longer.longest = longer.longest.max(bytes / rate);
        longer.moves += 1;
        if dirty > 0.0 {
            longer.at_once = longer.at_once.min((rate / (dirty * 1.25)) as usize);
        }
        fits.then_some(longer)
    }
}

#[test]
fn small_plans_are_within_a_tenth_of_the_best() {
    let (mut judged, mut worst) = (0, 1.0f64);
    for seed in 0..60 {
        let mut numbers = Numbers(seed);
        let count = 1 + numbers.below(8);
        // Everything is tried: fewer hosts where there are many VMs.
        let mut cluster = clusters::generate(if count > 5 { 3 } else { 4 }, 0, seed);
        for number in 0..count {
            let from = &cluster.hosts[0];
            let store = from.datastores[numbers.below(from.datastores.len() as u64) as usize].name.clone();
            let mut one = vm(&format!("vm{number}"), "host0", 2048 << numbers.below(5));
            one.disks[0].datastore = store;
            one.disks[0].allocated_bytes = (1 + numbers.below(300)) << 30;
            one.disks[0].room_bytes = one.disks[0].allocated_bytes;
            one.dirty_rate = numbers.below(10) * 1_000_000;
            one.apart = (numbers.below(4) == 0).then(|| "group".to_owned()).into_iter().collect();
            cluster.vms.push(one);
        }
        let request = evacuate(&["host0"], true);
        let found = plan(&cluster, &request).unwrap();
        let (placed, seconds) = Exhaustive::best(&cluster, &request, "host0");
        assert_eq!(found.moves.len(), placed, "seed {seed}: VMs placed");
        if placed > 0 {
            let ratio = found.seconds / seconds;
            assert!(ratio <= 1.1, "seed {seed}: {} s, the best takes {seconds} s", found.seconds);
            judged += 1;
            worst = worst.max(ratio);
        }
    }
    println!("{judged} small clusters; the worst plan takes {worst:.3} times as long as the best");
}

#[test]
fn everything_that_stands_in_the_way_is_said() {
    let mut cluster = Cluster {
        hosts: vec![host("a", 8192, 1 << 40), host("b", 1024, 1 << 40), host("c", 8192, 1000)],
        vms: vec![vm("web", "a", 4096)],
    };
    cluster.vms[0].networks.insert("dmz".into());
    let blocked = &plan(&cluster, &evacuate(&["a"], false)).unwrap().blocked[0];
    let all = blocked.reasons.join("\n");
    for part in [
        "host b: 1024 MiB of RAM",
        "host b: it lacks networks: dmz",
        "host c: it lacks networks",
        "host c: datastore fast",
    ] {
        assert!(all.contains(part), "{part:?} is missing in:\n{all}");
    }
}

#[test]
fn what_is_on_its_way_counts_and_what_cannot_move_stays() {
    let mut hosts = vec![host("a", 8192, 1 << 40), host("b", 8192, 1 << 40), host("c", 8192, 1 << 40)];
    hosts[1].apart.insert("db".into());
    let mut cluster = Cluster { hosts, vms: vec![vm("db1", "a", 512), vm("old", "a", 512)] };
    cluster.vms[0].apart.insert("db".into());
    cluster.vms[1].stays = Some("it is stopped".into());
    let planned = plan(&cluster, &evacuate(&["a"], false)).unwrap();
    assert_eq!(planned.moves.iter().map(|step| step.to.as_str()).collect::<Vec<_>>(), ["c"]);
    cluster.vms[0].refused_by.insert("c".into(), vec!["there is a file".into()]);
    let refused = plan(&cluster, &evacuate(&["a"], false)).unwrap();
    let said = refused.blocked.iter().flat_map(|vm| vm.reasons.clone()).collect::<Vec<_>>().join("\n");
    assert!(refused.moves.is_empty() && said.contains("host c: there is a file"), "{said}");
    cluster.vms[0].refused_by.clear();
    assert_eq!(planned.blocked[0].reasons, ["it is stopped"]);
    let mut edited = planned.clone();
    edited.moves[0].vm = "old".into();
    let refused = edited.check(&cluster, &evacuate(&["a"], false)).unwrap_err().to_string();
    assert!(refused.contains("it is stopped"), "{refused}");
}

#[test]
fn disks_in_a_shared_datastore_are_copied_least() {
    let mut hosts = vec![host("a", 8192, 1 << 40), host("b", 8192, 1 << 40), host("c", 8192, 1 << 40)];
    hosts[2].datastores[0].id = "id-a".into();
    let cluster = Cluster { hosts, vms: vec![vm("web", "a", 512)] };
    let planned = plan(&cluster, &evacuate(&["a"], true)).unwrap();
    assert_eq!((planned.moves[0].to.as_str(), planned.moves[0].disk_bytes), ("c", 0));
    // Where that cannot be handed over, the other host is the only one.
    let planned = plan(&cluster, &evacuate(&["a"], false)).unwrap();
    assert_eq!((planned.moves[0].to.as_str(), planned.moves[0].disk_bytes), ("b", 1_000_000_000));
}

#[test]
fn at_once_leaves_each_move_enough_to_converge() {
    let mut cluster = Cluster {
        hosts: vec![host("a", 8192, 1 << 40), host("b", 8192, 1 << 40)],
        vms: (0..4).map(|number| vm(&format!("vm{number}"), "a", 512)).collect(),
    };
    let request = evacuate(&["a"], false);
    assert_eq!(plan(&cluster, &request).unwrap().at_once, 4);
    cluster.vms[1].dirty_rate = 30_000_000;
    assert_eq!(plan(&cluster, &request).unwrap().at_once, 2, "a share of 100 MB/s must be over 37.5");
    let budget = Request { bandwidth: Some(35_000_000), ..request };
    let planned = plan(&cluster, &budget).unwrap();
    assert_eq!(planned.blocked[0].vm, "vm1");
    assert!(planned.blocked[0].reasons[0].contains("turns dirty"), "{:?}", planned.blocked);
}

#[test]
fn balancing_evens_out() {
    let cluster = Cluster {
        hosts: vec![host("a", 8192, 1 << 40), host("b", 8192, 1 << 40)],
        vms: (0..8).map(|number| vm(&format!("vm{number}"), "a", 512)).collect(),
    };
    let request = Request { goal: Goal::Balance { max_moves: 100 }, ..evacuate(&[], false) };
    assert_eq!(plan(&cluster, &request).unwrap().moves.len(), 4);
    let request = Request { goal: Goal::Balance { max_moves: 3 }, ..request };
    assert_eq!(plan(&cluster, &request).unwrap().moves.len(), 3);
}

#[test]
fn a_plan_that_was_edited_to_something_impossible_is_refused_with_all_that_is_wrong() {
    let cluster = Cluster {
        hosts: vec![host("a", 8192, 1 << 40), host("b", 1024, 1 << 40)],
        vms: vec![vm("web", "a", 1024), vm("db", "a", 1024)],
    };
    let request = evacuate(&["a"], false);
    let good = plan(&cluster, &request).unwrap();
    let text = serde_json::to_vec(&good).unwrap();
    let read = Plan::from_json(&text).unwrap();
    assert_eq!(read, good);
    read.check(&cluster, &request).unwrap();
    let refused = |change: &dyn Fn(&mut Plan)| {
        let mut plan = good.clone();
        change(&mut plan);
        plan.check(&cluster, &request).unwrap_err().to_string()
    };
    assert!(refused(&|plan| plan.moves[0].to = "z".into()).contains("no host \"z\""));
    assert!(refused(&|plan| plan.moves[0].vm = "z".into()).contains("no such VM"));
    assert!(refused(&|plan| plan.moves[0].disks.clear()).contains("no datastore is named"));
    assert!(refused(&|plan| plan.at_once = 0).contains("0 moves at once"));
    let both = refused(&|plan| {
        let mut again = plan.moves[0].clone();
        again.vm = if again.vm == "web" { "db".into() } else { "web".into() };
        again.from = "b".into();
        plan.moves.push(again.clone());
        again.from = "a".into();
        again.vm = plan.moves[0].vm.clone();
        plan.moves.push(again);
    });
    assert!(both.contains("not on b") && both.contains("moved twice"), "{both}");
    assert!(matches!(Plan::from_json(b"{\"moves\": 3}"), Err(PlacementError::Malformed(_))));
    assert!(
        Plan::from_json(b"{\"moves\": [], \"at_once\": 1, \"seconds\": 1, \"blocked\": [], \"x\": 1}")
            .is_err()
    );
}

#[test]
fn names_that_are_not_there_are_refused() {
    let mut cluster = Cluster { hosts: vec![host("a", 8192, 1)], vms: vec![vm("web", "a", 1)] };
    assert!(plan(&cluster, &evacuate(&["z"], false)).is_err());
    cluster.vms[0].host = "z".into();
    assert!(plan(&cluster, &evacuate(&["a"], false)).is_err());
    cluster.vms[0] = vm("web", "a", 1);
    cluster.vms.push(vm("web", "a", 1));
    assert!(plan(&cluster, &evacuate(&["a"], false)).is_err());
}
