//! Carrying a plan out: moves begun in its order, a few at once, each looked at anew before it begins, followed to its end, and begun
//! again where what stopped it may have passed.
//!
//! What is known is only what the agents say now (see [`next`], which decides); so it does not matter who began a move, or which agent was
//! away meanwhile. Never enters: making plans.

use std::time::Duration;

use tokio::time::Instant;

use super::observed::{arriving_at, cluster, locate};
use super::plan_file::Limits;
use super::report::{Figures, Outcome, VmReport};
use crate::api::placement::ClusterInventory;
use crate::api::types::{MoveAnswer, MoveProgress, MoveRequest, VmState};
use crate::client::{Client, ClientError};
use crate::placement::cluster::Goal;
use crate::placement::plan::{PlacementError, Plan, PlannedMove};

/// How often is looked.
const TICK: Duration = Duration::from_millis(200);
/// A move that nobody answers for is looked for among the VMs after this time.
const UNANSWERED: Duration = Duration::from_secs(3);
/// Times a move is begun.
const ATTEMPTS: u32 = 5;
/// Times that agents may refuse a move. Once is not enough: they may speak of what has just passed.
const REFUSALS: u32 = 2;
/// How long a host may take to let go of what it has given away. One that does not is told of by `vmove ls` and `vmove recover`.
const LET_GO: Duration = Duration::from_secs(30);
/// How long nothing at all may happen before what is left is given up.
const PATIENCE: Duration = Duration::from_mins(2);

/// What is to be done about a VM, by what the agents say now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// It is where it should be.
    There,
    /// It is on another host.
    Elsewhere(String),
    /// It is on the move, whoever began that.
    Follow(String),
    /// Its move may begin.
    Begin,
    /// Something that may pass.
    Wait(String),
    /// It does not fit any more.
    NoRoom(Vec<String>),
    /// It cannot be moved.
    Refuse(String),
}

/// Decides about one step of a plan.
pub fn next(step: &PlannedMove, inventory: &ClusterInventory, limits: &Limits) -> Next {
    let away = |host: &String| inventory.unreachable.get(host).map(|why| format!("host {host}: {why}"));
    let Some(found) = locate(inventory, &step.vm) else {
        // Its owner may be the host that does not answer.
        if let Some(why) = away(&step.from).or_else(|| away(&step.to)) {
            return Next::Wait(why);
        }
        if let Some(there) = arriving_at(inventory, &step.vm) {
            return Next::Wait(format!("host {} waits for word of the move that brought it", there.host));
        }
        return match inventory.unreachable.iter().next() {
            Some((host, why)) => Next::Wait(format!("host {host}: {why}")),
            None => Next::Refuse("there is no such VM any more".to_owned()),
        };
    };
    let summary = &found.vm.vm.summary;
    if found.host == step.to {
        return Next::There;
    }
    if found.host != step.from {
        return Next::Elsewhere(found.host.to_owned());
    }
    match (summary.state, &summary.move_id) {
        (VmState::Running, _) => {}
        (VmState::Moving, Some(id)) => return Next::Follow(id.clone()),
        (VmState::Moving, None) => return Next::Wait("the end of its move is being settled".to_owned()),
        _ => return Next::Refuse("it does not run, and only a running VM can be moved".to_owned()),
    }
    if let Some(why) = away(&step.to) {
        return Next::Wait(why);
    }
    let alone = Plan { moves: vec![step.clone()], at_once: 1, ..Plan::default() };
    let request = limits.request(Goal::Balance { max_moves: 1 });
    match alone.check(&cluster(&without_remains(step, inventory), limits), &request) {
        Ok(()) => Next::Begin,
        Err(PlacementError::Impossible(reasons)) => Next::NoRoom(of_one(&step.vm, &reasons)),
        Err(error) => Next::Wait(error.to_string()),
    }
}

/// The same without what an attempt that came to nothing has left of the VM at its target: the next one takes its place.
fn without_remains(step: &PlannedMove, inventory: &ClusterInventory) -> ClusterInventory {
    let mut inventory = inventory.clone();
    for there in inventory.hosts.iter_mut().filter(|there| there.host.name == step.to) {
        there.vms.retain(|vm| vm.vm.summary.name != step.vm);
    }
    inventory
}

/// What is wrong with a plan that moves one VM, without the VM's name before it.
pub fn of_one(vm: &str, reasons: &[String]) -> Vec<String> {
    let name = format!("VM {vm:?}: ");
    reasons.iter().map(|reason| reason.strip_prefix(&name).unwrap_or(reason).to_owned()).collect()
}

/// How far a step is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Waiting,
    Moving { id: String, heard: Instant },
    Ended(Outcome),
}

#[derive(Debug)]
struct Step {
    planned: PlannedMove,
    state: State,
    not_before: Instant,
    attempts: u32,
    refusals: u32,
    move_id: Option<String>,
    real: Option<Figures>,
    reasons: Vec<String>,
}

/// Carries a plan out and says what came of each VM. Each event is told to `say`.
pub async fn drive(client: &Client, plan: &Plan, limits: &Limits, say: impl FnMut(String)) -> Vec<VmReport> {
    let now = Instant::now();
    let steps = plan.moves.iter().map(|planned| Step {
        planned: planned.clone(),
        state: State::Waiting,
        not_before: now,
        attempts: 0,
        refusals: 0,
        move_id: None,
        real: None,
        reasons: Vec::new(),
    });
    let at_once = plan.at_once.clamp(1, limits.parallel.max(1));
    let mut driver = Driver { client, limits, at_once, steps: steps.collect(), stirred: now, say };
    driver.run().await;
    driver.until_let_go().await;
    driver.steps.into_iter().map(Step::report).collect()
}

struct Driver<'a, S> {
    client: &'a Client,
    limits: &'a Limits,
    at_once: usize,
    steps: Vec<Step>,
    /// When something happened last.
    stirred: Instant,
    say: S,
}

impl<S: FnMut(String)> Driver<'_, S> {
    async fn run(&mut self) {
        loop {
            for at in 0..self.steps.len() {
                self.follow(at).await;
            }
            self.begin().await;
            let is = |step: &Step, moving: bool| match step.state {
                State::Waiting => !moving,
                State::Moving { .. } => moving,
                State::Ended(_) => false,
            };
            let moving = self.steps.iter().any(|step| is(step, true));
            if !moving && !self.steps.iter().any(|step| is(step, false)) {
                return;
            }
            if !moving && self.stirred.elapsed() >= PATIENCE {
                for at in 0..self.steps.len() {
                    if self.steps[at].state == State::Waiting {
                        self.end(at, Outcome::Unreachable);
                    }
                }
                return;
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// A host holds what it has given away for a moment longer: whoever empties it to switch it off waits for that too.
    async fn until_let_go(&self) {
        let end = Instant::now() + LET_GO;
        let has_left = |step: &&Step| matches!(step.state, State::Ended(outcome) if outcome.has_left());
        let left: Vec<&Step> = self.steps.iter().filter(has_left).collect();
        while !left.is_empty() && Instant::now() < end {
            match self.client.inventory().await {
                Ok(inventory) if !left.iter().any(|step| is_held(&step.planned, &inventory)) => return,
                _ => tokio::time::sleep(TICK).await,
            }
        }
    }

    /// Looks at a move that is under way.
    async fn follow(&mut self, at: usize) {
        let State::Moving { id, heard } = self.steps[at].state.clone() else { return };
        match self.client.move_progress(&id).await {
            Ok(progress) if has_ended(&progress) => self.ended(at, &progress),
            Ok(_) => {
                self.stirred = Instant::now();
                self.steps[at].state = State::Moving { id, heard: self.stirred };
            }
            Err(error) if heard.elapsed() >= UNANSWERED => {
                // Where its VM is says what has become of it.
                let step = &mut self.steps[at];
                step.reasons = vec![error.to_string()];
                step.state = State::Waiting;
            }
            Err(_) => {}
        }
    }

    fn ended(&mut self, at: usize, progress: &MoveProgress) {
        self.stirred = Instant::now();
        let report = progress.report.as_ref();
        let step = &mut self.steps[at];
        match report.map(|report| report.outcome.as_str()) {
            Some("completed") if report.is_some_and(|report| report.to.host == step.planned.to) => {
                step.real = report.map(Figures::from);
                self.end(at, Outcome::Moved);
            }
            // Somebody else's move, to another datastore or host.
            Some("completed") => step.state = State::Waiting,
            Some("cancelled") => self.end(at, Outcome::Cancelled),
            _ => {
                let why = report.and_then(|report| report.reason.clone()).or_else(|| progress.error.clone());
                let why = why.unwrap_or_else(|| "its move ended without a reason".to_owned());
                self.put_off(at, vec![why], self.steps[at].attempts >= ATTEMPTS, Outcome::Failed);
            }
        }
    }

    /// Begins what may begin now.
    async fn begin(&mut self) {
        let now = Instant::now();
        let ready = |step: &Step| step.state == State::Waiting && step.not_before <= now;
        if !self.steps.iter().any(ready) {
            return;
        }
        let inventory = match self.client.inventory().await {
            Ok(inventory) => inventory,
            Err(error) => {
                for step in self.steps.iter_mut().filter(|step| ready(step)) {
                    step.reasons = vec![error.to_string()];
                }
                return;
            }
        };
        for at in 0..self.steps.len() {
            let step = &self.steps[at];
            if !ready(step) {
                continue;
            }
            let known = step.move_id.clone();
            match next(&step.planned, &inventory, self.limits) {
                Next::There => self.arrived(at, known).await,
                Next::Elsewhere(host) => {
                    self.steps[at].reasons = vec![format!("it is on host {host}")];
                    self.end(at, Outcome::Elsewhere);
                }
                Next::Follow(id) => {
                    self.say_of(at, "is on the move already");
                    self.moving(at, id);
                }
                Next::Wait(why) => self.steps[at].reasons = vec![why],
                Next::NoRoom(reasons) => {
                    self.steps[at].reasons = reasons;
                    self.end(at, Outcome::NoRoom);
                }
                Next::Refuse(why) => {
                    self.steps[at].reasons = vec![why];
                    self.end(at, Outcome::Refused);
                }
                Next::Begin => {
                    let moving = |step: &&Step| matches!(step.state, State::Moving { .. });
                    if self.steps.iter().filter(moving).count() < self.at_once {
                        self.order(at).await;
                        // What was seen of the room for others is not so any more.
                        return;
                    }
                }
            }
        }
    }

    /// Orders a move.
    async fn order(&mut self, at: usize) {
        let step = &mut self.steps[at];
        let request = MoveRequest {
            host: Some(step.planned.to.clone()),
            disks: step.planned.disks.clone(),
            bandwidth: self.limits.bandwidth.map(|budget| (budget / self.at_once as u64).max(1)),
            ..MoveRequest::default()
        };
        step.attempts += 1;
        let error = match self.client.move_vm(&step.planned.vm, &request).await {
            Ok(MoveAnswer::Accepted(accepted)) => {
                self.say_of(at, "begins to move");
                self.moving(at, accepted.move_id);
                return;
            }
            Ok(MoveAnswer::Plan(_)) => return,
            Err(error) => error,
        };
        let step = &mut self.steps[at];
        let reasons = match &error {
            ClientError::Api { detail, .. } if !detail.blockers.is_empty() => detail.blockers.clone(),
            error => vec![error.to_string()],
        };
        // The request may have been heard all the same: what the agents say next decides, and it counts as an attempt.
        let passing = error.is_connection()
            || matches!(error.code(), Some("busy" | "peer_unreachable" | "not_found" | "undecided"));
        if !passing {
            step.refusals += 1;
        }
        let (refused, failed) = (step.refusals >= REFUSALS, step.attempts >= ATTEMPTS);
        let outcome = if refused { Outcome::Refused } else { Outcome::Failed };
        self.put_off(at, reasons, refused || failed, outcome);
    }

    /// Waits longer each time, or ends it.
    fn put_off(&mut self, at: usize, reasons: Vec<String>, last: bool, outcome: Outcome) {
        let step = &mut self.steps[at];
        step.reasons = reasons;
        if last {
            return self.end(at, outcome);
        }
        step.state = State::Waiting;
        step.not_before = Instant::now() + Duration::from_secs(1 << step.attempts.min(3));
        let why = format!("is tried again soon: {}", self.steps[at].reasons.join("; "));
        self.say_of(at, &why);
    }

    /// A VM is where it should be. Of a move of this run there may be a report.
    async fn arrived(&mut self, at: usize, id: Option<String>) {
        let Some(id) = id else { return self.end(at, Outcome::AlreadyThere) };
        if let Ok(progress) = self.client.move_progress(&id).await {
            self.steps[at].real = progress.report.as_ref().map(Figures::from);
        }
        self.end(at, Outcome::Moved);
    }

    fn moving(&mut self, at: usize, id: String) {
        self.stirred = Instant::now();
        let step = &mut self.steps[at];
        step.move_id = Some(id.clone());
        step.state = State::Moving { id, heard: self.stirred };
    }

    fn end(&mut self, at: usize, outcome: Outcome) {
        self.stirred = Instant::now();
        let step = &mut self.steps[at];
        step.state = State::Ended(outcome);
        if matches!(outcome, Outcome::Moved | Outcome::AlreadyThere) {
            step.reasons.clear();
        }
        let word = match outcome {
            Outcome::Moved => "has moved".to_owned(),
            Outcome::AlreadyThere => "is there already".to_owned(),
            Outcome::Cancelled => "stays: its move was given up".to_owned(),
            Outcome::Elsewhere => step.reasons.join("; "),
            _ => format!("stays: {}", step.reasons.join("; ")),
        };
        self.say_of(at, &word);
    }

    fn say_of(&mut self, at: usize, what: &str) {
        let step = &self.steps[at].planned;
        (self.say)(format!("{} ({} -> {}): {what}", step.vm, step.from, step.to));
    }
}

/// Whether the host that a VM came from still has something of it, or cannot say.
fn is_held(step: &PlannedMove, inventory: &ClusterInventory) -> bool {
    let from = inventory.hosts.iter().find(|there| there.host.name == step.from);
    inventory.unreachable.contains_key(&step.from)
        || from.is_some_and(|from| from.vms.iter().any(|held| held.vm.summary.name == step.vm))
}

impl Step {
    fn report(self) -> VmReport {
        let outcome = match self.state {
            State::Ended(outcome) => outcome,
            State::Waiting | State::Moving { .. } => Outcome::Unreachable,
        };
        VmReport {
            predicted: Figures::from(&self.planned),
            vm: self.planned.vm,
            from: self.planned.from,
            to: self.planned.to,
            outcome,
            attempts: self.attempts,
            move_id: self.move_id,
            real: self.real,
            reasons: self.reasons,
        }
    }
}

fn has_ended(progress: &MoveProgress) -> bool {
    progress.report.is_some() || progress.error.is_some()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::observed::tests::{host_of, limits, vm_of};
    use super::*;
    use crate::api::placement::{HostInventory, InventoryVm};

    fn step() -> PlannedMove {
        PlannedMove {
            vm: "web".into(),
            from: "a".into(),
            to: "b".into(),
            disks: BTreeMap::from([("vda".to_owned(), "fast".to_owned())]),
            disk_bytes: 0,
            memory_bytes: 0,
            seconds: 1.0,
            downtime_ms: 20,
        }
    }

    fn seen(a: Vec<InventoryVm>, b: Vec<InventoryVm>, away: &[&str]) -> ClusterInventory {
        let hosts = [host_of("a", a), host_of("b", b), host_of("c", vec![])];
        let there = |host: &HostInventory| !away.contains(&host.host.name.as_str());
        ClusterInventory {
            hosts: hosts.into_iter().filter(there).collect(),
            unreachable: away.iter().map(|host| ((*host).to_owned(), "no answer".to_owned())).collect(),
        }
    }

    fn decided(inventory: &ClusterInventory) -> Next {
        next(&step(), inventory, &limits())
    }

    #[test]
    fn what_the_agents_say_decides() {
        let web = |host: &str, state, generation| vec![vm_of("web", host, state, generation)];
        let running = web("a", VmState::Running, 1);
        assert_eq!(decided(&seen(running.clone(), vec![], &[])), Next::Begin);
        let moving = web("a", VmState::Moving, 1);
        let arriving = web("b", VmState::Incoming, 2);
        assert_eq!(decided(&seen(moving.clone(), arriving.clone(), &[])), Next::Follow("m".into()));
        // Both say they have it while the move ends.
        let arrived = web("b", VmState::Running, 2);
        assert_eq!(decided(&seen(moving, arrived.clone(), &[])), Next::There);
        assert_eq!(decided(&seen(vec![], arrived, &[])), Next::There);
        let mut elsewhere = seen(vec![], vec![], &[]);
        elsewhere.hosts[2].vms = web("c", VmState::Running, 3);
        assert_eq!(decided(&elsewhere), Next::Elsewhere("c".into()));
        assert!(matches!(decided(&seen(web("a", VmState::Stopped, 1), vec![], &[])), Next::Refuse(_)));
        assert!(matches!(decided(&seen(vec![], vec![], &[])), Next::Refuse(_)), "it is nowhere");
    }

    #[test]
    fn a_host_has_let_go_once_it_says_that_it_has_nothing_of_the_vm() {
        let held = |vms, unreachable: &[&str]| {
            let unreachable =
                unreachable.iter().map(|host| ((*host).to_owned(), "down".to_owned())).collect();
            let hosts = vec![host_of("a", vms), host_of("b", vec![vm_of("web", "b", VmState::Running, 2)])];
            is_held(&step(), &ClusterInventory { hosts, unreachable })
        };
        assert!(
            held(vec![vm_of("web", "a", VmState::Undecided, 2)], &[]),
            "it has left, and is not released"
        );
        assert!(!held(vec![vm_of("db", "a", VmState::Running, 1)], &[]));
        assert!(held(Vec::new(), &["a"]), "it cannot say");
        assert!(!held(Vec::new(), &["c"]));
    }

    #[test]
    fn what_an_attempt_has_left_is_not_in_the_way_of_the_next() {
        let running = vec![vm_of("web", "a", VmState::Running, 1)];
        let mut full = seen(running, vec![vm_of("web", "b", VmState::Incoming, 2)], &[]);
        full.hosts[1].host.memory_free_bytes = 1100 << 20;
        assert_eq!(decided(&full), Next::Begin);
    }

    #[test]
    fn who_does_not_answer_is_waited_for() {
        let running = vec![vm_of("web", "a", VmState::Running, 1)];
        let waits = |inventory: &ClusterInventory| matches!(decided(inventory), Next::Wait(_));
        assert!(waits(&seen(running, vec![], &["b"])));
        assert!(waits(&seen(vec![], vec![], &["a"])));
        assert!(waits(&seen(vec![], vec![], &["c"])), "it may be there");
        assert!(waits(&seen(vec![], vec![vm_of("web", "b", VmState::Undecided, 2)], &[])));
    }

    #[test]
    fn what_does_not_fit_any_more_is_not_begun() {
        let running = || vec![vm_of("web", "a", VmState::Running, 1)];
        let mut full = seen(running(), vec![], &[]);
        full.hosts[1].host.datastores[0].free_bytes = 1 << 20;
        full.hosts[1].host.memory_free_bytes = 1 << 20;
        full.hosts[1].host.maintenance = true;
        let Next::NoRoom(reasons) = decided(&full) else { panic!("{:?}", decided(&full)) };
        let all = reasons.join("\n");
        for part in ["maintenance", "RAM", "datastore fast"] {
            assert!(all.contains(part), "{part} in {all}");
        }
        // Nor what fits only beside another VM of its group.
        let apart = seen(running(), vec![vm_of("db", "b", VmState::Running, 1)], &[]);
        assert!(matches!(decided(&apart), Next::NoRoom(_)));
    }
}
