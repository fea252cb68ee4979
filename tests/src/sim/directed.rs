//! Worlds that lead to what chance seldom does: one fault before each action, another one soon after it, and hosts whose journals are
//! set up by hand.
//!
//! Lives here: which worlds those are. Never enters: what they find.

use vmove_compute::migrate::VmJournal;
use vmove_mirror::journal::{DiskAt, MoveId, Record, Standing};

use super::{
    agent::{FIRST_GAP, Task},
    faults::{Fault, Kind, Place, Side, When},
    host::VmDir,
    marks::Marks,
    net::Net,
    user::User,
    world::{Shape, Violation, World},
};

/// Actions of a source, and of a target, before which faults strike: those of the first move, or of the first two.
const SOURCE_ACTIONS: u32 = 45;
const TARGET_ACTIONS: u32 = 18;
/// Seeds that are gone through at most.
const SEEDS: u64 = 4;

fn before(side: Side, action: u32, kind: Kind, size: u64) -> Fault {
    Fault { kind, when: When::Before(side, action), place: Place::Acting, size }
}

/// Faults of the worlds of one seed.
fn scripts() -> Vec<Vec<Fault>> {
    let mut scripts = Vec::new();
    let actions = || {
        let of = |side, count| (0..count).map(move |action| (side, action));
        of(Side::Source, SOURCE_ACTIONS).chain(of(Side::Target, TARGET_ACTIONS))
    };
    let singles = [Kind::Cancel, Kind::Reset, Kind::ImageFails, Kind::JournalFull, Kind::JournalBroken]
        .map(|kind| (kind, 0))
        .into_iter()
        .chain((0..2).map(|size| (Kind::DriverFails, size)))
        .chain((0..6).map(|size| (Kind::Nonsense, size)));
    for (kind, size) in singles {
        scripts.extend(actions().map(|(side, action)| vec![before(side, action, kind, size)]));
    }
    // A source that says what it should not before the target has heard anything of it.
    for (action, size) in (0..8).flat_map(|action| (0..6).map(move |size| (action, size))) {
        scripts
            .push(vec![Fault { place: Place::Other, ..before(Side::Source, action, Kind::Nonsense, size) }]);
    }
    // While connections are made anew.
    for (side, action) in actions() {
        for later in 1..4 {
            for (kind, size) in
                [(Kind::Cancel, 0), (Kind::DriverFails, 0), (Kind::Nonsense, 0), (Kind::Nonsense, 1)]
            {
                let second = before(side, action + later, kind, size);
                scripts.push(vec![before(side, action, Kind::Reset, 0), second]);
            }
        }
    }
    // The source goes for long, at any action of the target too, and the VM is taken over.
    let take_over = Fault { kind: Kind::TakeOver, when: When::At(0), place: Place::Acting, size: 0 };
    for (side, action) in actions() {
        let place = if side == Side::Source { Place::Acting } else { Place::Other };
        let gone = Fault { place, ..before(side, action, Kind::PowerGone, 0) };
        scripts.push(vec![gone, take_over]);
    }
    // A link that never holds; one that damages whatever passes.
    scripts.push((8..420).map(|action| before(Side::Source, action, Kind::Reset, 0)).collect());
    scripts.push((0..90).map(|action| before(Side::Source, action, Kind::DamagedPage, 0)).collect());
    scripts
}

/// How many directed worlds there are.
pub fn count() -> u64 {
    SEEDS * scripts().len() as u64
}

/// Seed and faults of each of them.
pub fn worlds() -> impl Fn(u64) -> (u64, Vec<Fault>) {
    let scripts = scripts();
    move |index| {
        let per_seed = scripts.len() as u64;
        (1 + index / per_seed, scripts[(index % per_seed) as usize].clone())
    }
}

fn id() -> Option<MoveId> {
    MoveId::new("m").ok()
}

fn disks() -> Vec<DiskAt> {
    vec![DiskAt { name: "d0".into(), datastore: "s0".into(), path: "s0/d0".into() }]
}

/// What host 0 makes of its journal when host 1 has the other one, or has no power: marks, and what is wrong about its standing then.
fn left_alone(
    here: &[Record],
    there: Option<&[Record]>,
    stands: fn(&Standing) -> bool,
) -> (Marks, Option<Violation>) {
    let shape =
        Shape { hosts: 2, pages: 64, disks: vec![4], guest_pace: 500, guest_pages: 1, disk_delay: 100 };
    let mut world = World::new(0, shape, Net::new(1000, 100), User::default(), Vec::new(), false);
    for (host, records) in [Some(here), there].into_iter().enumerate() {
        let Some(records) = records else { continue };
        world.hosts[host].agent.up = true;
        if records.is_empty() {
            continue;
        }
        let dir = VmDir::default();
        if let Ok(mut journal) = VmJournal::open_at(dir.journal.clone()) {
            for record in records {
                if let Err(error) = journal.append(record) {
                    world.violate("directed", error.to_string());
                }
            }
        }
        world.hosts[host].dir = Some(dir);
    }
    world.agent_later(0, 1, Task::Settle { gap: FIRST_GAP });
    world.run(5_000_000, |_| false);
    let standing = world.hosts[0].dir.as_ref().map(|dir| dir.look().standing().clone());
    if !standing.as_ref().is_some_and(stands) {
        world.violate("directed", format!("a host that hears what helps nobody stands at {standing:?}"));
    }
    (std::mem::take(&mut world.marks), world.violation.take())
}

/// Rows of the failure table that speak of hosts that are gone, or whose disks were lost or given to another VM: what would be the only
/// copy is kept.
pub fn strangers() -> Vec<(Marks, Option<Violation>)> {
    let Some(id) = id() else { return Vec::new() };
    let owner = || Record::Owner { generation: 1, disks: disks() };
    let moving = || Record::Moving { move_id: id.clone(), to_host: Some("h1".into()), generation: 2 };
    let incoming =
        || Record::Incoming { move_id: id.clone(), from_host: "h1".into(), generation: 2, disks: disks() };
    let prepared = || Record::Prepared { move_id: id.clone() };
    let committed = || Record::Committed { move_id: id.clone() };
    let aborted = Record::Aborted { move_id: id.clone() };
    let waits = |s: &Standing| matches!(s, Standing::Incoming { prepared: true, .. });
    let left = |s: &Standing| matches!(s, Standing::Committed { .. });
    vec![
        // The source is gone, or its journal is lost.
        left_alone(&[incoming(), prepared()], None, waits),
        left_alone(&[incoming(), prepared()], Some(&[]), waits),
        // Another VM has the name there.
        left_alone(&[owner(), moving(), aborted], Some(&[owner()]), |s| matches!(s, Standing::Owner { .. })),
        left_alone(&[owner(), moving(), committed()], Some(&[owner()]), left),
        // The target's disk is as it was before it said that it was prepared.
        left_alone(&[owner(), moving(), committed()], Some(&[incoming()]), left),
    ]
}
