//! A model of the ownership rule, small enough that every state of it is visited.
//!
//! One VM, two or three hosts. Each host holds the real [`Journal`]: every record is a real one and goes through `admit`. Whom an agent
//! asks and what it does then is the real `recovery::{question, settle}`, what it answers the real `Journal::verdict` and
//! `recovery::holding`. So code and model cannot drift apart in what decides. Abstract are time (any step may come at any moment, or
//! never), the contents of disks (a version number), and the network: a message may be late, repeated, overtaken or lost, a connection
//! may end at any moment. Processes are named steps of the two engines: a step here is a record written or a message sent there.
//!
//! | module | what lives there |
//! |---|---|
//! | [`process`] | the steps of a VM process: guest, source, target |
//! | [`agent`] | the steps of agents and of the user: settling, answering, starting, taking ownership |
//! | [`checks`] | what must hold in every state |
//!
//! # What holds
//! With every fault there is, in every reachable state: at most one guest runs; at most one host's journal says "mine"; a guest that
//! runs has every write that was ever acknowledged as flushed, and so has some host's disk while none runs; and from there, once
//! hosts can talk, the VM comes to run at exactly one place with nothing left elsewhere. Each [`Rule`] broken alone is caught.
//!
//! # What makes `recover --take-ownership` safe
//! A prepared target whose source is gone may own the VM by the user's word only, and so may the source of an aborted move whose target
//! is gone. What makes that safe, and what does not:
//!
//! | way | two runners? |
//! |---|---|
//! | the other side is down; every third host answers and holds nothing; a source that aborted a move starts the VM only after that move's target has said that it holds nothing, and a target that took the VM over remembers that for ever | never |
//! | the source comes back and starts by its own journal alone | yes: `Moving` and even `Owner` after `Aborted` say "mine" |
//! | the source comes back and asks whom it can reach | yes: both hosts are up in turns and never meet |
//! | the source is not down, only out of reach | yes, at once: no rule at the target can help |
//! | the target forgets what it took once the VM has gone on from there | yes: "nothing of it here" is then true and misleads the source |
//! | a third host is not asked, or cannot be, or is only prepared | yes: the source may have gone on to it after it aborted the move to here |
//! | the source's user takes it while the target is down, after the target's user took it while the source was down | yes: "gone for ever" was wrong |
//!
//! What is lost even then: writes flushed at the source after it aborted the move and went on, if the target never heard of that. The
//! user must be told so.
//! Never enters: the engines themselves (the simulator runs those), bytes, real time.

pub mod agent;
pub mod checks;
pub mod process;

use std::collections::{BTreeSet, HashSet};
use std::sync::Mutex;

use stateright::{Model, Property};
use vmove_mirror::journal::{Journal, MoveId, Record, Standing, Verdict};

pub use agent::{Fence, Others, Side, TakeOver};
pub use process::Process;

/// Index of a host.
pub type HostId = u8;
/// Index of a move, in the order they were ordered.
pub type Move = u8;

/// The rule, and the ways to break it: with all of them false it is the product's.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rule {
    /// An agent says "aborted" of a move without having that on disk.
    pub answers_before_journal: bool,
    /// The source commits without having heard "prepared".
    pub commits_unprepared: bool,
    /// The target says "prepared" before that is on its disk.
    pub says_prepared_early: bool,
    /// A prepared target that cannot reach its source takes the VM.
    pub owns_unasked: bool,
    /// A prepared target that cannot reach its source discards the VM.
    pub discards_unasked: bool,
    /// A source that loses the target after the commit lets its guest go on.
    pub resumes_after_commit: bool,
    /// A source that loses the target after the commit removes everything, reports too.
    pub releases_unconfirmed: bool,
    /// The process minds its own phase no longer: it commits and aborts whenever it is told to, so only the journal stands between.
    pub careless: bool,
    /// The journal forgets its order: what it refuses is written all the same.
    pub forgets_order: bool,
}

/// How large the world is: hosts, and how often each thing happens at most.
#[derive(Debug, Clone, Copy)]
pub struct Scope {
    /// Hosts.
    pub hosts: u8,
    /// Moves ordered.
    pub moves: u8,
    /// Processes killed.
    pub kills: u8,
    /// Records that cannot be written.
    pub full_disks: u8,
    /// Writes that the guest flushes.
    pub writes: u8,
    /// Hosts that go down; they come back.
    pub outages: u8,
}

/// What is left of the [`Scope`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Left {
    /// Processes to be killed.
    pub kills: u8,
    /// Records not to be written.
    pub full_disks: u8,
    /// Writes to be flushed.
    pub writes: u8,
    /// Hosts to go down.
    pub outages: u8,
}

/// A message between two hosts. It stays on the network for ever: delivered late, often, or never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Packet {
    /// Source's agent: take this VM. Accepted once at most, since the target's process listens for one move.
    Offer(Move),
    /// Source: the guest stands still, this is all of it, with disks of this version.
    Prepare(Move, u8),
    /// Target: all is here, checked, flushed, and on my disk.
    Prepared(Move),
    /// Source: the VM is yours.
    Commit(Move),
    /// Source: it will not come.
    Abort(Move),
    /// Target: it runs here.
    Running(Move),
    /// Target: how did it go?
    Ask(Move),
    /// Source: so.
    Said(Move, Word),
}

/// A verdict, as a message carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Word {
    /// The target owns the VM.
    Committed,
    /// It never will by this move.
    Aborted,
}

impl From<Word> for Verdict {
    fn from(word: Word) -> Self {
        match word {
            Word::Committed => Self::Committed,
            Word::Aborted => Self::Aborted,
        }
    }
}

/// One host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Host {
    /// What is on its disk of who owns the VM.
    pub journal: Journal,
    /// The VM's process.
    pub process: Option<Process>,
    /// Version of the images here that are whole.
    pub disk: Option<u8>,
    /// It is switched off.
    pub down: bool,
}

/// A move that was ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ordered {
    /// Source.
    pub from: HostId,
    /// Target.
    pub to: HostId,
    /// Generation after the commit.
    pub generation: u64,
    /// The target has accepted the offer.
    pub accepted: bool,
    /// How it ended, in the report that the source keeps when nothing else of the VM is left there.
    pub reported: Option<Word>,
    /// The generation at which the target took ownership, as it remembers it when the VM has gone on from there.
    pub taken: Option<u64>,
}

/// All there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// The hosts.
    pub hosts: Vec<Host>,
    /// The moves.
    pub moves: Vec<Ordered>,
    /// Messages sent so far.
    pub packets: BTreeSet<Packet>,
    /// The newest version whose flush the guest was told of.
    pub flushed: u8,
    /// What may still go wrong.
    pub left: Left,
}

/// Something that may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// User: move the VM.
    Order(HostId, HostId),
    /// The network brings a message.
    Deliver(Packet),
    /// The process goes on by one record or message.
    Go(HostId),
    /// The same, and the record cannot be written.
    CannotWrite(HostId),
    /// The process gives up on its peer: a lost connection, a time-out, a cancel.
    LinkLost(HostId),
    /// The guest writes and flushes.
    Write(HostId),
    /// The process is killed.
    Kill(HostId),
    /// The host goes down.
    Down(HostId),
    /// The host comes back.
    Up(HostId),
    /// The agent asks what its journal has to ask, and carries out what the failure table says.
    Settle(HostId),
    /// User or agent: start the VM.
    Start(HostId),
    /// User: `recover --take-ownership`.
    TakeOwnership(HostId),
}

/// The model to be checked.
#[derive(Debug, Default)]
pub struct Ownership {
    /// How large.
    pub scope: Scope,
    /// Which rule.
    pub rule: Rule,
    /// Whether and how the user takes ownership.
    pub take_over: Option<TakeOver>,
    /// Fingerprints of states known to heal.
    healing: Mutex<HashSet<u64>>,
}

impl Default for Scope {
    fn default() -> Self {
        Self { hosts: 2, moves: 1, kills: 1, full_disks: 0, writes: 1, outages: 0 }
    }
}

impl Ownership {
    /// A model of this size under this rule.
    pub fn new(scope: Scope, rule: Rule) -> Self {
        Self { scope, rule, ..Self::default() }
    }

    /// A model in which the user may take ownership.
    pub fn with_take_over(scope: Scope, take_over: TakeOver) -> Self {
        Self { scope, take_over: Some(take_over), ..Self::default() }
    }

    /// Appends a record to a host's journal if it is admitted, or by force under the rule that forgets the order.
    fn append(&self, host: &mut Host, record: &Record) -> bool {
        if host.journal.admit(record).is_err() {
            return self.rule.forgets_order && force(&mut host.journal, record);
        }
        host.journal.append(record).is_ok()
    }
}

/// What a journal without order would hold: the record's meaning over whatever stood.
fn force(journal: &mut Journal, record: &Record) -> bool {
    let generation = match journal.standing() {
        Standing::Owner { generation, .. } | Standing::Moving { generation, .. } => *generation,
        Standing::Committed { generation, .. } => *generation - 1,
        _ => return false,
    };
    let Some(move_id) = record.move_id().cloned() else { return false };
    let mut forced = Journal::default();
    let to_host = Some(String::new());
    let before = [
        Record::Owner { generation, disks: vec![] },
        Record::Moving { move_id, to_host, generation: generation + 1 },
        record.clone(),
    ];
    let written = before.iter().all(|record| forced.append(record).is_ok());
    if written {
        *journal = forced;
    }
    written
}

/// The id that a move has in records.
fn id(index: Move) -> MoveId {
    MoveId::new(format!("m{index}")).expect("letters and digits")
}

/// The name a host has in records.
fn name(host: HostId) -> String {
    format!("h{host}")
}

/// The move that a record's id means.
fn index(id: &MoveId) -> Move {
    id.as_str()[1..].parse().expect("made by `id`")
}

/// The generation a host's journal speaks of.
fn generation(standing: &Standing) -> u64 {
    match standing {
        Standing::Owner { generation, .. }
        | Standing::Moving { generation, .. }
        | Standing::Incoming { generation, .. }
        | Standing::Committed { generation, .. } => *generation,
        Standing::Nothing
        | Standing::Discarded { .. }
        | Standing::Released { .. }
        | Standing::Lost { .. } => 0,
    }
}

impl World {
    /// The host.
    pub fn host(&self, host: HostId) -> &Host {
        &self.hosts[host as usize]
    }

    fn host_mut(&mut self, host: HostId) -> &mut Host {
        &mut self.hosts[host as usize]
    }

    fn ordered(&self, index: Move) -> Ordered {
        self.moves[index as usize]
    }
}

impl Model for Ownership {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let nothing = Host { journal: Journal::default(), process: None, disk: None, down: false };
        let mut hosts = vec![nothing; self.scope.hosts.into()];
        hosts[0].journal.append(&Record::Owner { generation: 1, disks: vec![] }).expect("the first record");
        hosts[0].process = Some(Process::Runs);
        hosts[0].disk = Some(0);
        let Scope { kills, full_disks, writes, outages, .. } = self.scope;
        let left = Left { kills, full_disks, writes, outages };
        vec![World { hosts, moves: vec![], packets: BTreeSet::new(), flushed: 0, left }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        steps.extend(world.packets.iter().map(|packet| Step::Deliver(*packet)));
        let hosts = 0..self.scope.hosts;
        for host in hosts.clone() {
            let here = world.host(host);
            if here.down {
                steps.push(Step::Up(host));
                continue;
            }
            if world.left.outages > 0 {
                steps.push(Step::Down(host));
            }
            match &here.process {
                Some(process) => {
                    if process.runs() && world.left.writes > 0 {
                        steps.push(Step::Write(host));
                    }
                    if *process == Process::Runs && world.moves.len() < self.scope.moves.into() {
                        let others = hosts.clone().filter(|other| *other != host);
                        steps.extend(others.map(|to| Step::Order(host, to)));
                    }
                    steps.push(Step::Go(host));
                    steps.push(Step::LinkLost(host));
                    if world.left.full_disks > 0 {
                        steps.push(Step::CannotWrite(host));
                    }
                    if world.left.kills > 0 {
                        steps.push(Step::Kill(host));
                    }
                }
                None => steps.push(Step::Start(host)),
            }
            steps.push(Step::Settle(host));
            if self.take_over.is_some() && matches!(here.process, None | Some(Process::Undecided(_))) {
                steps.push(Step::TakeOwnership(host));
            }
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        let possible = match step {
            Step::Order(from, to) => process::order(&mut next, from, to),
            Step::Deliver(packet) => self.deliver(&mut next, packet),
            Step::Go(host) => self.go(&mut next, host),
            Step::CannotWrite(host) => process::cannot_write(&mut next, host),
            Step::LinkLost(host) => self.link_lost(&mut next, host),
            Step::Write(host) => write(&mut next, host),
            Step::Kill(host) => kill(&mut next, host),
            Step::Down(host) => down(&mut next, host),
            Step::Up(host) => {
                next.host_mut(host).down = false;
                true
            }
            Step::Settle(host) => self.settle(&mut next, host),
            Step::Start(host) => self.start(&mut next, host),
            Step::TakeOwnership(host) => self.take_ownership(&mut next, host),
        };
        (possible && next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        checks::all(self)
    }
}

fn write(world: &mut World, host: HostId) -> bool {
    world.flushed += 1;
    world.left.writes -= 1;
    world.host_mut(host).disk = Some(world.flushed);
    true
}

fn kill(world: &mut World, host: HostId) -> bool {
    world.left.kills -= 1;
    world.host_mut(host).process = None;
    true
}

fn down(world: &mut World, host: HostId) -> bool {
    world.left.outages -= 1;
    let here = world.host_mut(host);
    here.process = None;
    here.down = true;
    true
}
