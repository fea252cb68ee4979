//! The simulator: the very engine of `vmove-mirror`, the very journal and failure table, in a world of one thread, virtual time and
//! one seed. Hosts, agents, processes, guests, disks and links are simulated around it, and fail.
//!
//! | module | what lives there |
//! |---|---|
//! | [`world`] | the clock and who takes what is due |
//! | [`host`], [`storage`], [`net`] | power, disks, links |
//! | [`process`] | a VM process: the drivers of the engines, the machine, the guest |
//! | [`agent`], [`user`] | agents around a move and after a crash; the one who orders moves |
//! | [`faults`] | what may fail where, and what is promised then |
//! | [`checkers`] | the promises, one a file |
//! | [`campaign`], [`directed`] | many worlds; those that lead to what chance seldom does |
//! | [`kept`], [`minimise`] | seeds that broke a promise once; fewer faults for one that does |
//! | [`marks`], [`mutations`] | what was hit; rules broken on purpose |
//! | [`dice`] | chance |
//!
//! A world goes in stages: moves with faults; everything mended but hosts that are gone; they come back too; one more move that must
//! come through. Never enters: real time, threads, files, anything that differs between two runs of a seed.

pub mod agent;
pub mod campaign;
pub mod checkers;
pub mod dice;
pub mod directed;
pub mod faults;
pub mod host;
pub mod kept;
pub mod marks;
pub mod minimise;
pub mod mutations;
pub mod net;
pub mod process;
pub mod storage;
pub mod user;
pub mod world;

use std::collections::BTreeMap;

use vmove_mirror::journal::DiskAt;
use vmove_storage::OwnerState;

use dice::Dice;
use faults::{Fault, Kind};
use host::{Launch, Start, VmDir};
use mutations::Mutation;
use net::Net;
use storage::Image;
use user::User;
use world::{Happening, Shape, Violation, World};

/// Number of a host, from 0.
pub type HostId = usize;
/// Number of a process, never used again.
pub type Pid = u32;

const SECOND: u64 = 1_000_000;
/// How long the moves with faults may take.
const STORM: u64 = 300 * SECOND;
/// How long a mended world may take to come to rest: sockets, patience and questions all have their limits.
const REST: u64 = 400 * SECOND;
/// How long a move may take with nothing in its way.
const RETRY: u64 = 60 * SECOND;

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// The faults that were planned.
    pub faults: Vec<Fault>,
    /// How often each kind struck.
    pub struck: BTreeMap<Kind, u64>,
    /// The broken promise.
    pub violation: Option<Violation>,
    /// What was hit.
    pub marks: marks::Marks,
    /// What happened, line by line, if that was asked for.
    pub trace: String,
    /// Happenings.
    pub happened: u64,
    /// Moves that were committed.
    pub committed: u32,
    /// Virtual microseconds.
    pub time: u64,
}

/// How a seed is run.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// Faults instead of those that the seed plans.
    pub faults: Option<Vec<Fault>>,
    /// A rule to break.
    pub mutation: Option<Mutation>,
    /// Keep a trace.
    pub traced: bool,
}

/// Runs one world to its end.
pub fn run(seed: u64, how: Run) -> Outcome {
    let mut dice = Dice::new(seed, 1);
    let moves = dice.range(1..4);
    let faults = how.faults.unwrap_or_else(|| faults::plan(&mut Dice::new(seed, 2), moves));
    let shape = Shape {
        hosts: 2 + dice.index(3),
        pages: dice.pick(&[64, 200, 200, 600, 5000]),
        disks: (0..=dice.index(3)).map(|_| 4 + dice.index(90)).collect(),
        guest_pace: dice.pick(&[60, 200, 500]),
        guest_pages: dice.pick(&[1, 4, 40]),
        disk_delay: dice.pick(&[100, 400, 2_000]),
    };
    let net = Net::new(dice.pick(&[50, 200, 1_000]), dice.pick(&[50, 300, 2_000]));
    let user = User::wanting(moves as u32);
    let mut world = World::new(seed, shape, net, user, faults, how.traced);
    world.mutation = how.mutation;
    create(&mut world, &mut dice);
    world.plan_faults();
    story(&mut world);
    Outcome {
        faults: std::mem::take(&mut world.faults),
        struck: std::mem::take(&mut world.struck_kinds),
        violation: world.violation.take(),
        marks: std::mem::take(&mut world.marks),
        happened: world.happened,
        committed: world.user.committed,
        time: world.now,
        trace: world.take_trace(),
    }
}

/// One VM on host 0, started; its disks hold something.
fn create(world: &mut World, dice: &mut Dice) {
    let mut disks = Vec::new();
    for (index, size) in world.shape.disks.clone().into_iter().enumerate() {
        let at = DiskAt { name: format!("d{index}"), datastore: "s0".into(), path: format!("s0/d{index}") };
        let mut image = Image::new(size, Some((1, OwnerState::Owned)));
        for sector in 0..size {
            if dice.one_in(3) {
                let value = world.stamp();
                image.write(sector, value);
                world.checkers.flushed.found(index, sector, value);
            }
        }
        image.flush();
        world.hosts[0].images.insert(at.path.clone(), image);
        disks.push(at);
    }
    let launch = Launch { generation: 1, disks, start: Start::Boot };
    world.hosts[0].dir = Some(VmDir { launch: Some(launch), ..VmDir::default() });
    for host in 0..world.hosts.len() {
        world.hosts[host].agent.up = true;
    }
    if let Err(why) = world.start_process(0, [0; 16]) {
        world.violate("moves_end", format!("the VM does not start: {why}"));
    }
    world.after(5_000, Happening::User);
}

fn story(world: &mut World) {
    world.run(STORM, |world| world.user.wanted == 0 && world.user.current.is_none());
    world.heal();
    let end = world.now + REST;
    let settled = world.run(end, |world| world.settled() || world.waits_for().is_some());
    world.check_moves_end(settled);
    if world.hosts.iter().any(|host| host.gone) {
        let end = world.now + REST;
        world.run(end, |world| world.settled());
        world.check_no_need_of_source();
        world.bring_back();
        let end = world.now + REST;
        let settled = world.run(end, |world| world.settled());
        world.check_moves_end(settled);
    }
    let end = world.now + SECOND;
    world.run(end, |_| false);
    world.check_no_request_hangs();
    world.user.wants(1);
    let end = world.now + RETRY;
    let done =
        world.run(end, |world| world.user.wanted == 0 && world.user.current.is_none() && world.settled());
    world.check_retry(done);
    world.check_no_leftovers();
}

impl World {
    /// Nothing fails any more; what has failed is mended, except that hosts that are gone stay so.
    fn heal(&mut self) {
        self.note(|| "everything is mended".into());
        self.healed = true;
        self.flip = None;
        // Quiet enough for any link.
        (self.shape.guest_pace, self.shape.guest_pages) = (500, 1);
        self.net.heal();
        self.user.wanted = 0;
        self.user.current = None;
        for host in 0..self.hosts.len() {
            let it = &mut self.hosts[host];
            it.disk_trouble = None;
            it.disk_full = false;
            if let Some(dir) = &it.dir {
                dir.journal.mend();
            }
            self.host_back(host);
        }
    }

    /// Hosts that were gone come back.
    fn bring_back(&mut self) {
        for host in 0..self.hosts.len() {
            if std::mem::take(&mut self.hosts[host].gone) {
                self.host_back(host);
            }
        }
    }
}
