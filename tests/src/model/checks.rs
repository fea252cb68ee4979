//! What must hold in every reachable state, one property a function, and what must happen somewhere, or the model shows nothing.
//!
//! Never enters: steps.

use std::hash::{DefaultHasher, Hash, Hasher};

use stateright::{Model, Property};
use vmove_mirror::journal::Standing;

use super::process::goes_on;
use super::{Ownership, Process, Step, World};

/// At most one guest runs.
pub const ONE_RUNNER: &str = "at most one guest runs";
/// At most one journal says "mine".
pub const ONE_OWNER: &str = "at most one host owns the VM";
/// Who runs has every flushed write, and somebody has them while nobody runs.
pub const NOTHING_LOST: &str = "no flushed write is lost";
/// From here the VM comes to run at one place, with nothing left elsewhere.
pub const HEALS: &str = "the VM can run again, at one place, with nothing left elsewhere";

/// More fair steps than any state needs to come to rest.
const PATIENCE: usize = 100;

/// The properties of a model.
pub fn all(model: &Ownership) -> Vec<Property<Ownership>> {
    let mut properties = vec![
        Property::always(ONE_RUNNER, one_runner),
        Property::always(NOTHING_LOST, nothing_lost),
        Property::always(HEALS, heals),
        Property::sometimes("the VM runs at another host", |_, world: &World| {
            world.hosts[1..].iter().any(|host| host.process == Some(Process::Runs))
        }),
        Property::sometimes("a prepared target has lost its process", |_, world: &World| {
            world.hosts.iter().any(|host| {
                host.process.is_none()
                    && matches!(host.journal.standing(), Standing::Incoming { prepared: true, .. })
            })
        }),
    ];
    // Whoever takes ownership from a host that is away cannot tell it.
    if model.take_over.is_none() {
        properties.push(Property::always(ONE_OWNER, one_owner));
    }
    properties
}

fn one_runner(_: &Ownership, world: &World) -> bool {
    runners(world) <= 1
}

fn runners(world: &World) -> usize {
    world.hosts.iter().filter(|host| host.process.is_some_and(Process::runs)).count()
}

fn one_owner(_: &Ownership, world: &World) -> bool {
    let owns = |standing: &Standing| matches!(standing, Standing::Owner { .. } | Standing::Moving { .. });
    world.hosts.iter().filter(|host| owns(host.journal.standing())).count() <= 1
}

fn nothing_lost(_: &Ownership, world: &World) -> bool {
    let whole = |disk: Option<u8>| disk == Some(world.flushed);
    let mut runs = world.hosts.iter().filter(|host| host.process.is_some_and(Process::runs));
    runs.all(|host| whole(host.disk)) && world.hosts.iter().any(|host| whole(host.disk))
}

/// Follows one fair course without any further fault: every message arrives, every process goes on, agents settle, the user starts
/// what may be started. It must end at rest. Its states are states of the model, so each is looked at once.
fn heals(model: &Ownership, world: &World) -> bool {
    let mut course = vec![];
    let mut now = world.clone();
    loop {
        let mark = fingerprint(&now);
        if at_rest(&now) || model.healing.lock().is_ok_and(|known| known.contains(&mark)) {
            if let Ok(mut known) = model.healing.lock() {
                known.extend(course);
            }
            return true;
        }
        course.push(mark);
        match fair_step(model, &now) {
            Some(next) if course.len() < PATIENCE => now = next,
            _ => return false,
        }
    }
}

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

/// One guest runs undisturbed, and no other host holds anything.
fn at_rest(world: &World) -> bool {
    let mut running = 0;
    for host in &world.hosts {
        match (host.process, host.journal.standing()) {
            // An end that could not be written is made up for with the next move, or when the target asks.
            (Some(Process::Runs), Standing::Owner { .. } | Standing::Moving { .. }) => running += 1,
            (None, Standing::Nothing) if host.disk.is_none() => {}
            // Taken over: what it kept is for a person to look at.
            (None, Standing::Lost { .. }) => {}
            _ => return false,
        }
    }
    running == 1
}

fn fair_step(model: &Ownership, world: &World) -> Option<World> {
    let hosts = 0..model.scope.hosts;
    let try_all =
        |mut steps: Box<dyn Iterator<Item = Step> + '_>| steps.find_map(|step| model.next_state(world, step));
    let up = || hosts.clone().filter(|host| !world.host(*host).down);
    let idle = move || up().filter(|host| world.host(*host).process.is_none());
    try_all(Box::new(hosts.clone().filter(|host| world.host(*host).down).map(Step::Up)))
        .or_else(|| try_all(Box::new(world.packets.iter().map(|packet| Step::Deliver(*packet)))))
        .or_else(|| {
            let busy = hosts.clone().filter(|host| world.host(*host).process.is_some());
            try_all(Box::new(busy.map(|host| goes_on(world, host))))
        })
        .or_else(|| try_all(Box::new(hosts.clone().map(Step::Settle))))
        .or_else(|| try_all(Box::new(idle().map(Step::Start))))
}
