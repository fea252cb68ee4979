//! The user: orders moves, tries again when one has failed, starts a VM that has stopped.
//!
//! Lives here: what somebody with the command line does. Never enters: what the agents make of it.

use vmove_mirror::{
    journal::{DiskAt, MoveId, Record, Standing, TAKE_OVER_STEP},
    recovery::{Question, question},
    target,
};

use super::{
    HostId,
    agent::{moves::Draft, number},
    process::{Run, source::Order},
    world::{Happening, World},
};

/// How often the user looks.
const LOOK: u64 = 20_000;
/// How often a failed move is ordered again.
const TRIES: u32 = 3;

/// The user's doings.
#[derive(Debug, Default)]
pub struct User {
    /// Moves still wanted.
    pub wanted: u32,
    /// Orders given so far, for names.
    pub orders: u32,
    /// The move under way.
    pub current: Option<MoveId>,
    /// Tries of the current wish.
    pub tries: u32,
    /// How the last move ended: committed or not, and why.
    pub last: Option<(bool, String)>,
    /// Moves that were committed.
    pub committed: u32,
    /// When the current order was given.
    since: u64,
    /// Takes the VM over where that is possible.
    pub takes_over: bool,
    /// Has done so.
    pub took_over: bool,
}

impl User {
    /// One who wants some moves.
    pub fn wanting(moves: u32) -> Self {
        Self { wanted: moves, ..Self::default() }
    }

    /// Wants some moves now, whatever was before.
    pub fn wants(&mut self, moves: u32) {
        (self.wanted, self.tries, self.current, self.last) = (moves, 0, None, None);
    }
}

impl World {
    /// The user looks and does what is next.
    pub fn user_acts(&mut self) {
        self.after(if self.user.wanted > 0 { LOOK } else { 10 * LOOK }, Happening::User);
        if self.user.takes_over {
            self.take_over();
        }
        for host in 0..self.hosts.len() {
            let it = &self.hosts[host];
            if self.user.took_over && it.agent.up && it.agent.busy.is_none() && it.process.is_none() {
                self.discard_lost(host);
            }
        }
        self.start_what_has_stopped();
        let now = self.now;
        let running = self.hosts.iter().position(|host| {
            host.process.as_ref().is_some_and(|process| {
                process.run == Run::Running && process.source.is_none() && process.machine.is_some()
            })
        });
        if self.user.current.is_some() {
            // A move whose process has died is nobody's any more, once agents have settled it.
            let works = |host: &super::host::Host| {
                host.agent.busy.is_some()
                    || host.process.as_ref().is_some_and(|process| process.source.is_some())
            };
            let idle = running.is_some() && !self.hosts.iter().any(works);
            if idle && now > self.user.since + 100_000 {
                self.user.current = None;
            }
            return;
        }
        let Some(host) = running.filter(|_| self.user.wanted > 0) else { return };
        if self.user.tries >= TRIES {
            self.user.wanted -= 1;
            self.user.tries = 0;
            return;
        }
        self.order_one(host);
    }

    fn start_what_has_stopped(&mut self) {
        if self.hosts.iter().any(|host| host.process.is_some()) {
            return;
        }
        for host in 0..self.hosts.len() {
            let it = &self.hosts[host];
            let Some(dir) = it.dir.as_ref().filter(|_| it.agent.up && it.agent.busy.is_none()) else {
                continue;
            };
            if matches!(dir.look().standing(), Standing::Owner { .. }) {
                self.note(|| format!("host {host}: the user starts the VM"));
                return self.agent_starts_vm(host);
            }
        }
    }

    /// Makes a host the owner of a VM whose other host is gone for ever, as `vmove recover --take-ownership` does: only while every third
    /// host answers that it has nothing of the VM.
    fn take_over(&mut self) {
        let of = |wanted: fn(&super::host::Host) -> bool| -> Vec<HostId> {
            self.hosts.iter().filter(|host| wanted(host)).map(|host| host.id).collect()
        };
        let (gone, silent, held) = (
            of(|host| host.gone),
            of(|host| !host.gone && !host.agent.up),
            of(|host| !host.gone && host.dir.is_some()),
        );
        let ([gone], [], [here]) = (&gone[..], &silent[..], &held[..]) else { return };
        let it = &self.hosts[*here];
        let Some(dir) = it.dir.as_ref().filter(|_| it.agent.busy.is_none()) else { return };
        let journal = dir.look();
        let (generation, disks, arrived) = match journal.standing() {
            Standing::Incoming { generation, disks, prepared: true, .. } => {
                (*generation, disks.clone(), true)
            }
            Standing::Owner { generation, disks } => (*generation, disks.clone(), false),
            _ => return,
        };
        let Some(Question::Verdict { host, move_id } | Question::Holding { host, move_id }) =
            question(&journal)
        else {
            return;
        };
        let missing = disks.iter().any(|at| !it.images.contains_key(&at.path));
        if number(host) != Some(*gone) || missing {
            return;
        }
        let (here, move_id) = (*here, move_id.clone());
        let process = it.process.as_ref().map(|process| {
            let waits = |mv: &super::process::target::TargetMove| {
                matches!(mv.engine.phase(), target::Phase::Prepared | target::Phase::Undecided)
            };
            (process.pid, process.target.as_deref().is_some_and(waits))
        });
        if process.is_some_and(|(_, waits)| !waits) {
            return;
        }
        self.note(|| format!("USER takes the VM over on host {here}"));
        if arrived {
            self.check_taken_over(here, &move_id, &disks);
        }
        if let Some((pid, _)) = process {
            self.post_target(pid, target::Event::TakeOver);
        } else {
            let generation = generation + TAKE_OVER_STEP;
            if !self.agent_appends(here, &Record::TakenOver { move_id, generation, disks }) {
                return;
            }
            if arrived {
                self.agent_boots(here);
            }
        }
        (self.user.takes_over, self.user.took_over) = (false, true);
    }

    fn order_one(&mut self, host: HostId) {
        let Some(process) = self.hosts[host].process.as_ref() else { return };
        let (pid, disks, hosts) = (process.pid, process.disks.clone(), self.hosts.len());
        let dice = &mut self.dice.user;
        self.user.orders += 1;
        let Ok(move_id) = MoveId::new(format!("m{}", self.user.orders)) else { return };
        let local = dice.one_in(4);
        let to = (!local).then(|| (host + 1 + dice.index(hosts - 1)) % hosts);
        let store = dice.index(2);
        let mut copies: Vec<(usize, DiskAt)> = Vec::new();
        for (index, at) in disks.iter().enumerate() {
            if local && index > 0 && dice.one_in(3) {
                continue;
            }
            let datastore = match (local, at.datastore.as_str()) {
                (true, "s0") => "s1".to_string(),
                (true, _) => "s0".to_string(),
                (false, _) => format!("s{store}"),
            };
            let path = format!("{datastore}/{}", at.name);
            copies.push((index, DiskAt { name: at.name.clone(), datastore, path }));
        }
        let order = Order {
            move_id: move_id.clone(),
            to: None,
            copies,
            keep_source: dice.one_in(3),
            audit: dice.one_in(3),
            max_downtime: dice.pick(&[5_000, 20_000, 50_000, 300_000]),
        };
        self.user.current = Some(move_id.clone());
        self.user.since = self.now;
        self.user.tries += 1;
        self.note(|| format!("USER orders {move_id} from host {host} to {to:?}, copies {:?}", order.copies));
        if let Err(why) = self.begin_move(host, Draft { pid, to, order }) {
            self.move_refused(&move_id, &why);
        }
    }

    /// A move was refused before it began.
    pub fn move_refused(&mut self, move_id: &MoveId, why: &str) {
        self.note(|| format!("USER hears: {move_id} is refused: {why}"));
        if why == "busy" {
            // Nothing was tried.
            self.user.tries -= 1;
        }
        self.ended(move_id, false, why);
    }

    /// A move has ended; its process keeps a report of it.
    pub fn move_ended(&mut self, move_id: &MoveId, committed: bool, why: &str) {
        for host in &mut self.hosts {
            let its = |p: &super::process::Process| p.board.as_ref().is_some_and(|(id, _)| id == move_id);
            if host.process.as_deref().is_some_and(its)
                && let Some(dir) = &mut host.dir
            {
                dir.reports.insert(move_id.clone(), committed);
            }
        }
        self.ended(move_id, committed, why);
    }

    fn ended(&mut self, move_id: &MoveId, committed: bool, why: &str) {
        if self.user.current.as_ref() != Some(move_id) {
            return;
        }
        self.user.current = None;
        self.user.last = Some((committed, why.to_owned()));
        if committed {
            self.user.committed += 1;
            self.user.wanted = self.user.wanted.saturating_sub(1);
            self.user.tries = 0;
        }
    }
}
