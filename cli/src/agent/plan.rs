//! Deciding on a move before anything is touched: where each disk goes, and everything that stands in the way, at once.
//!
//! Pure functions of what the hosts say. Never enters: asking, files, processes.

use vmove_compute::process::protocol::{ImageShape, VmDefinition};

use crate::api::types::{
    DatastoreInfo, DiskAction, DiskPlacement, DiskPlan, MemoryAction, MovePlan, MoveRequest, Offer,
    PEER_VERSION, Place,
};

/// A target image may be this much larger than its source, plus [`SLACK`].
const GROWTH_PERCENT: u64 = 102;
/// Room beside an image for what the guest writes meanwhile, bytes.
const SLACK: u64 = 16 << 20;
/// Memory a VM process needs beside the guest's RAM, bytes.
const PROCESS_OVERHEAD: u64 = 64 << 20;

/// The VM as it is now, and its host.
#[derive(Debug, Clone)]
pub struct Here<'a> {
    /// This host.
    pub host: &'a str,
    /// The VM.
    pub definition: &'a VmDefinition,
    /// Its disks.
    pub disks: &'a [DiskPlacement],
    /// Their structure, in the same order.
    pub shapes: &'a [ImageShape],
    /// This host's datastores.
    pub stores: &'a [DatastoreInfo],
}

/// Words for a list, or "none".
pub fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// What a request wants for one disk: its own word, else the general one, else nothing.
fn wanted<'a>(request: &'a MoveRequest, disk: &str) -> Option<&'a str> {
    request.disks.get(disk).or(request.datastore.as_ref()).map(String::as_str)
}

/// Whether the request leaves this host.
pub fn leaves(request: &MoveRequest, host: &str) -> bool {
    request.host.as_deref().is_some_and(|to| to != host)
}

/// The plan of a move as far as this host can tell. For a move to another host, the disks' targets are those asked for; the other
/// host's answer completes it (see [`complete`]).
pub fn local_plan(request: &MoveRequest, here: &Here<'_>) -> MovePlan {
    let leaves = leaves(request, here.host);
    let to_host = if leaves { request.host.as_deref().unwrap_or(here.host) } else { here.host };
    let mut blockers = Vec::new();
    for name in request.disks.keys() {
        if !here.disks.iter().any(|disk| disk.name == *name) {
            blockers.push(format!(
                "VM {} has no disk {name:?} (it has: {})",
                here.definition.name,
                list(here.disks.iter().map(|disk| disk.name.as_str()))
            ));
        }
    }
    let mut disks = Vec::new();
    for (disk, shape) in here.disks.iter().zip(here.shapes) {
        let to = wanted(request, &disk.name).unwrap_or(&disk.datastore);
        let copy = leaves || to != disk.datastore;
        disks.push(DiskPlan {
            name: disk.name.clone(),
            action: if copy { DiskAction::Copy } else { DiskAction::Stay },
            from: Place { host: here.host.to_owned(), datastore: disk.datastore.clone() },
            to: Place { host: to_host.to_owned(), datastore: to.to_owned() },
            bytes: shape.allocated_bytes,
        });
    }
    if !leaves {
        stay_blockers(request, here, &disks, &mut blockers);
    }
    let place = |pick: fn(&DiskPlan) -> &Place, host: &str| Place {
        host: host.to_owned(),
        datastore: disks.first().map_or_else(String::new, |disk| pick(disk).datastore.clone()),
    };
    MovePlan {
        vm: here.definition.name.clone(),
        from: place(|disk| &disk.from, here.host),
        to: place(|disk| &disk.to, to_host),
        memory: if leaves { MemoryAction::Move } else { MemoryAction::Stay },
        disks,
        blockers,
    }
}

fn stay_blockers(request: &MoveRequest, here: &Here<'_>, disks: &[DiskPlan], blockers: &mut Vec<String>) {
    let mut unknown: Vec<&str> = Vec::new();
    let asked = request.datastore.iter().chain(request.disks.values());
    for name in asked {
        if !here.stores.iter().any(|store| store.name == *name) && !unknown.contains(&name.as_str()) {
            unknown.push(name);
        }
    }
    for name in &unknown {
        blockers.push(format!(
            "host {} has no datastore {name:?} (it has: {})",
            here.host,
            list(here.stores.iter().map(|store| store.name.as_str()))
        ));
    }
    let moving: Vec<&DiskPlan> =
        disks.iter().filter(|disk| matches!(disk.action, DiskAction::Copy)).collect();
    if moving.is_empty() && blockers.is_empty() {
        blockers.push(if request.host.is_none() && request.datastore.is_none() && request.disks.is_empty() {
            "nothing to do: name a host (--host), a datastore (--datastore) or both".to_owned()
        } else {
            format!("nothing to do: VM {} and its disks are there already", here.definition.name)
        });
    }
    let needs = moving.iter().map(|disk| (disk.to.datastore.as_str(), disk.bytes));
    blockers.extend(space_blockers(here.host, here.stores, needs));
}

/// Datastores that have no room for what is to be put there. Unknown ones are somebody else's complaint.
fn space_blockers<'a>(
    host: &str,
    stores: &[DatastoreInfo],
    needs: impl Iterator<Item = (&'a str, u64)> + Clone,
) -> Vec<String> {
    let mut blockers = Vec::new();
    for store in stores {
        let here = needs.clone().filter(|(name, _)| *name == store.name);
        let need = here.fold(0u64, |sum, (_, bytes)| sum.saturating_add(room_for(bytes)));
        if need > store.free_bytes {
            blockers.push(format!(
                "datastore {} on host {host} has {} free, the disks need {}",
                store.name,
                mib(store.free_bytes),
                mib(need)
            ));
        }
    }
    blockers
}

/// Room a copy of an image must find in a datastore, bytes.
pub fn room_for(allocated_bytes: u64) -> u64 {
    (allocated_bytes / 100).saturating_mul(GROWTH_PERCENT).saturating_add(SLACK)
}

/// Memory a VM must find on a host, bytes.
pub fn memory_need(memory_mib: u64) -> u64 {
    memory_mib.saturating_mul(1 << 20).saturating_add(PROCESS_OVERHEAD)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// Why a host cannot run a VM: CPU features it lacks, memory it has not.
pub fn host_blockers(
    host: &str,
    definition: &VmDefinition,
    needed_features: &[String],
    offered_features: &[String],
    free_memory: u64,
) -> Vec<String> {
    let mut blockers = Vec::new();
    let missing: Vec<&str> = needed_features
        .iter()
        .filter(|feature| !offered_features.contains(feature))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        blockers.push(format!(
            "host {host} does not offer CPU features the guest has been given: {}",
            missing.join(" ")
        ));
    }
    let need = memory_need(definition.memory_mib);
    if need > free_memory {
        blockers.push(format!(
            "host {host} has {} of memory free, VM {} needs {}",
            mib(free_memory),
            definition.name,
            mib(need)
        ));
    }
    blockers
}

/// Two hosts whose clocks (ms since 1970) are more than `limit` ms apart: their certificates and logs could not be trusted to fit, and
/// the guest's time of day would jump. What it took to ask counts as difference, so the limit is generous.
pub fn clock_blocker(there: (&str, u64), here: (&str, u64), limit: u64) -> Option<String> {
    let apart = there.1.abs_diff(here.1);
    (apart > limit).then(|| {
        format!(
            "the clocks of hosts {} and {} are {:.1} s apart, {} allows {:.1} s (max_clock_skew_ms); set them right, as NTP does",
            there.0,
            here.0,
            apart as f64 / 1000.0,
            here.0,
            limit as f64 / 1000.0
        )
    })
}

/// What a host that is offered a VM knows about itself.
#[derive(Debug, Clone)]
pub struct There<'a> {
    /// Its name.
    pub host: &'a str,
    /// Its datastores, the default one first.
    pub stores: &'a [DatastoreInfo],
    /// CPU features it offers.
    pub features: &'a [String],
    /// Memory it has free, bytes.
    pub free_memory: u64,
    /// A VM of this name is here, in this state.
    pub taken: Option<&'a str>,
}

/// Where each offered disk goes (none: nowhere), and everything that stands in the way.
pub fn receive(offer: &Offer, there: &There<'_>) -> (Vec<Option<String>>, Vec<String>) {
    let mut blockers = Vec::new();
    if offer.version != PEER_VERSION {
        blockers.push(format!(
            "host {} speaks version {PEER_VERSION} of the agents' agreement, host {} version {}; upgrade the older one",
            there.host, offer.from_host, offer.version
        ));
    }
    if let Some(state) = there.taken {
        blockers.push(format!("host {} has a VM {} already ({state})", there.host, offer.definition.name));
    }
    blockers.extend(host_blockers(
        there.host,
        &offer.definition,
        &offer.cpu_features,
        there.features,
        there.free_memory,
    ));
    let mut places = Vec::new();
    for (index, disk) in offer.disks.iter().enumerate() {
        let name = &disk.image.name;
        let by_name = |wanted: &str| there.stores.iter().find(|store| store.name == wanted);
        let old = offer.definition.disks.get(index).map_or("", |disk| disk.datastore.as_str());
        let found = match &disk.datastore {
            Some(wanted) => by_name(wanted),
            None => by_name(old).or(there.stores.first()),
        };
        match (found, &disk.datastore) {
            (Some(store), _) if store.id == disk.source_datastore_id => {
                // One directory seen by both: the image would be copied onto itself.
                blockers.push(format!(
                    "disk {name}: datastore {} of host {} is the one the disk lies in already, and handing over a shared image is not supported; name another with --datastore",
                    store.name, there.host
                ));
                places.push(None);
            }
            (Some(store), _) => places.push(Some(store.name.clone())),
            (None, Some(wanted)) => {
                blockers.push(format!(
                    "disk {name}: host {} has no datastore {wanted:?} (it has: {})",
                    there.host,
                    list(there.stores.iter().map(|store| store.name.as_str()))
                ));
                places.push(None);
            }
            (None, None) => {
                blockers.push(format!("disk {name}: host {} has no datastore at all", there.host));
                places.push(None);
            }
        }
    }
    let needs = offer
        .disks
        .iter()
        .zip(&places)
        .filter_map(|(disk, place)| Some((place.as_deref()?, disk.image.allocated_bytes)));
    blockers.extend(space_blockers(there.host, there.stores, needs));
    (places, blockers)
}

/// Puts the other host's answer into a plan.
pub fn complete(plan: &mut MovePlan, disks: &[DiskPlacement], blockers: Vec<String>) {
    for disk in &mut plan.disks {
        if let Some(placed) = disks.iter().find(|placed| placed.name == disk.name) {
            disk.to.datastore.clone_from(&placed.datastore);
        }
    }
    if let Some(first) = plan.disks.first() {
        plan.to.datastore.clone_from(&first.to.datastore);
    }
    plan.blockers.extend(blockers);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{DiskDefinition, DiskFormat, FileDigest, OfferedDisk};

    fn store(name: &str, free_mib: u64) -> DatastoreInfo {
        DatastoreInfo {
            name: name.into(),
            id: format!("id-{name}"),
            path: format!("/{name}").into(),
            total_bytes: 1 << 40,
            free_bytes: free_mib << 20,
            default: false,
        }
    }

    fn vm(disks: &[&str]) -> VmDefinition {
        VmDefinition {
            name: "web".into(),
            vcpus: 1,
            memory_mib: 512,
            cmdline: String::new(),
            cpu_features: vec!["avx2".into()],
            disks: disks
                .iter()
                .map(|name| DiskDefinition {
                    name: (*name).into(),
                    format: DiskFormat::Qcow2,
                    size_bytes: 1 << 30,
                    datastore: "fast".into(),
                    read_only: false,
                })
                .collect(),
            networks: Vec::new(),
            apart: Vec::new(),
        }
    }

    fn shape(name: &str, mib: u64) -> ImageShape {
        ImageShape {
            name: name.into(),
            format: DiskFormat::Qcow2,
            virtual_bytes: 1 << 30,
            cluster_bytes: 65536,
            allocated_bytes: mib << 20,
        }
    }

    fn plan_of(request: &MoveRequest) -> MovePlan {
        let definition = vm(&["vda", "vdb"]);
        let disks: Vec<DiskPlacement> = ["vda", "vdb"]
            .iter()
            .map(|name| DiskPlacement {
                name: (*name).into(),
                datastore: "fast".into(),
                path: format!("/fast/web/{name}.qcow2").into(),
            })
            .collect();
        let shapes = [shape("vda", 100), shape("vdb", 200)];
        let stores = [store("fast", 1000), store("bulk", 1000), store("small", 50)];
        let here =
            Here { host: "left", definition: &definition, disks: &disks, shapes: &shapes, stores: &stores };
        local_plan(request, &here)
    }

    #[test]
    fn a_datastore_move_copies_what_is_elsewhere() {
        let plan = plan_of(&MoveRequest {
            datastore: Some("bulk".into()),
            disks: [("vdb".to_owned(), "fast".to_owned())].into(),
            ..MoveRequest::default()
        });
        assert_eq!(plan.blockers, Vec::<String>::new());
        assert_eq!(plan.memory, MemoryAction::Stay);
        let actions: Vec<DiskAction> = plan.disks.iter().map(|disk| disk.action).collect();
        assert_eq!(actions, [DiskAction::Copy, DiskAction::Stay]);
        assert_eq!(plan.to, Place { host: "left".into(), datastore: "bulk".into() });
    }

    #[test]
    fn all_that_stands_in_the_way_is_said_at_once() {
        let plan = plan_of(&MoveRequest {
            datastore: Some("small".into()),
            disks: [("vdb".to_owned(), "none".to_owned()), ("vdz".to_owned(), "bulk".to_owned())].into(),
            ..MoveRequest::default()
        });
        assert_eq!(plan.blockers.len(), 3, "{:?}", plan.blockers);
        for (blocker, word) in plan.blockers.iter().zip(["vdz", "none", "small on host left has 50 MiB"]) {
            assert!(blocker.contains(word), "{blocker} lacks {word}");
        }
    }

    #[test]
    fn nothing_to_do_is_said() {
        assert!(plan_of(&MoveRequest::default()).blockers[0].contains("--host"));
        let there = MoveRequest { host: Some("left".into()), ..MoveRequest::default() };
        assert!(plan_of(&there).blockers[0].contains("already"));
    }

    fn offer() -> Offer {
        let offered = |name: &str, datastore: Option<&str>| OfferedDisk {
            image: shape(name, 100),
            source_datastore_id: "id-left".into(),
            datastore: datastore.map(Into::into),
        };
        Offer {
            version: PEER_VERSION,
            move_id: "m".into(),
            from_host: "left".into(),
            definition: vm(&["vda", "vdb"]),
            generation: 2,
            disks: vec![offered("vda", None), offered("vdb", Some("bulk"))],
            plain: false,
            cpu_features: vec!["avx2".into()],
            kernel: FileDigest { bytes: 1, blake3: String::new() },
            initrd: None,
            clock_ms: None,
            dry_run: false,
        }
    }

    #[test]
    fn disks_go_where_asked_else_to_the_same_name_else_to_the_default() {
        let features = ["avx2".to_owned()];
        let stores = [store("other", 1000), store("bulk", 1000), store("fast", 1000)];
        let mut there =
            There { host: "right", stores: &stores, features: &features, free_memory: 1 << 40, taken: None };
        let (places, blockers) = receive(&offer(), &there);
        assert_eq!(places, [Some("fast".to_owned()), Some("bulk".to_owned())]);
        assert!(blockers.is_empty(), "{blockers:?}");
        there.stores = &stores[..2];
        assert_eq!(receive(&offer(), &there).0[0].as_deref(), Some("other"));
    }

    #[test]
    fn clocks_may_differ_a_little_either_way() {
        for (there, here, said) in
            [(9_000, 4_000, false), (4_000, 9_000, false), (9_001, 4_000, true), (0, 60_000, true)]
        {
            let blocker = clock_blocker(("left", there), ("right", here), 5_000);
            assert_eq!(blocker.is_some(), said, "{there} {here}");
        }
        let blocker = clock_blocker(("left", 0), ("right", 60_000), 5_000).unwrap();
        assert!(blocker.contains("60.0 s apart") && blocker.contains("5.0 s"), "{blocker}");
    }

    #[test]
    fn a_target_names_every_blocker() {
        let mut shared = store("fast", 10);
        shared.id = "id-left".into();
        let stores = [shared];
        let there = There {
            host: "right",
            stores: &stores,
            features: &[],
            free_memory: 1 << 20,
            taken: Some("running"),
        };
        let offer = Offer { version: PEER_VERSION + 1, ..offer() };
        let (_, blockers) = receive(&offer, &there);
        let words =
            ["version", "already (running)", "avx2", "memory", "shared image", "no datastore \"bulk\""];
        assert_eq!(blockers.len(), words.len(), "{blockers:?}");
        for (blocker, word) in blockers.iter().zip(words) {
            assert!(blocker.contains(word), "{blocker} lacks {word}");
        }
    }
}
