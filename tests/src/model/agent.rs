//! The steps of agents and of the user: settling a VM without a process, answering for it, starting it, taking its ownership.
//!
//! What is decided is decided by `vmove_mirror::{journal, recovery}`. Never enters: live processes.

use vmove_mirror::journal::{Record, Standing, TAKE_OVER_STEP, Verdict};
use vmove_mirror::recovery::{Holding, PeerAnswer, Question, Settlement, holding, question, settle};

use super::process::say_reported;
use super::{Host, HostId, Move, Ownership, Packet, Process, Word, World, generation, id, index};

/// What a host that is back asks before it starts a VM that its journal says is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// Nobody.
    Journal,
    /// Whoever can be reached.
    Reachable,
    /// The targets of all its aborted moves, until each has said that it holds nothing: the product's way.
    Targets,
}

/// What the user's agent asks of hosts other than the source before it takes ownership.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Nothing.
    NotAsked,
    /// Those that are up must not own the VM.
    Reachable,
    /// All must be up and not own it.
    OwnNothing,
    /// All must be up and hold nothing of it.
    HoldNothing,
}

/// Where the user takes ownership.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// At a prepared target whose source is gone.
    Target,
    /// At the source of an aborted move whose target is gone.
    Source,
    /// Wherever the other one is gone at the moment.
    Either,
}

/// How the user takes ownership.
#[derive(Debug, Clone, Copy)]
pub struct TakeOver {
    /// Where.
    pub side: Side,
    /// Only while the other side is down; else whenever the user likes.
    pub other_down: bool,
    /// What is asked of the rest.
    pub others: Others,
    /// Whether the taker remembers for ever what it took.
    pub remembers: bool,
    /// What a source that is back asks.
    pub fence: Fence,
}

impl Ownership {
    /// Asked how a move from here went.
    pub(super) fn answer(&self, world: &mut World, host: HostId, index: Move) -> bool {
        let here = world.host(host);
        let verdict = here.journal.verdict(&id(index));
        if self.rule.answers_before_journal && verdict == Verdict::Moving {
            return world.packets.insert(Packet::Said(index, Word::Aborted));
        }
        if let Some(process) = here.process {
            return self.answer_alive(world, host, process, index);
        }
        let word = match verdict {
            Verdict::Committed => Word::Committed,
            Verdict::Aborted => Word::Aborted,
            Verdict::Moving => {
                if !self.append(world.host_mut(host), &Record::Aborted { move_id: id(index) }) {
                    return false;
                }
                Word::Aborted
            }
            Verdict::Unknown => return say_reported(world, index),
        };
        world.packets.insert(Packet::Said(index, word));
        true
    }

    /// What the failure table says, after asking what the journal has to ask. Beside a guest that runs only aborted moves are closed.
    pub(super) fn settle(&self, world: &mut World, host: HostId) -> bool {
        let here = world.host(host);
        let standing = here.journal.standing().clone();
        let closes = here.process == Some(Process::Runs) && matches!(standing, Standing::Owner { .. });
        if here.process.is_some() && !closes {
            return false;
        }
        let (asked, answer) = match question(&here.journal) {
            None => (None, PeerAnswer::NotAsked),
            // Asked by a message: the answer may be late.
            Some(Question::Verdict { move_id, .. }) => {
                return world.packets.insert(Packet::Ask(index(move_id)));
            }
            Some(Question::Holding { move_id, .. }) => {
                (Some(index(move_id)), self.ask_holding(world, host, index(move_id)))
            }
        };
        match settle(&standing, answer) {
            Settlement::Clear | Settlement::Ask => {}
            _ if closes => return false,
            _ => {}
        }
        self.carry_out(world, host, asked, answer)
    }

    /// What the target of a move from here holds of the VM: at once, since what it once does not hold by this move it never will.
    fn ask_holding(&self, world: &World, host: HostId, asked: Move) -> PeerAnswer {
        let ordered = world.ordered(asked);
        let there = world.host(ordered.to);
        let left = match world.host(host).journal.standing() {
            Standing::Committed { generation, .. } => Some(*generation),
            _ => None,
        };
        // The VM may have gone on from there: then it is further.
        let further = |other: &Host| {
            !other.down
                && matches!(holding(other.journal.standing()), Holding::Owner { generation } if Some(generation) > left)
        };
        if let Some(generation) = left
            && world.hosts.iter().any(further)
        {
            return PeerAnswer::Holds(Holding::Owner { generation });
        }
        match (there.down, holding(there.journal.standing()), ordered.taken) {
            (true, ..) => PeerAnswer::Unreachable,
            (_, Holding::Nothing, Some(generation)) if self.take_over.is_some_and(|how| how.remembers) => {
                PeerAnswer::Holds(Holding::Owner { generation })
            }
            (_, held, _) => PeerAnswer::Holds(held),
        }
    }

    /// What the failure table says, the source's word in hand.
    pub(super) fn settle_by(&self, world: &mut World, host: HostId, asked: Move, word: Verdict) -> bool {
        let standing = world.host(host).journal.standing();
        let ours =
            matches!(standing, Standing::Incoming { move_id, prepared: true, .. } if index(move_id) == asked);
        ours && self.carry_out(world, host, None, PeerAnswer::Said(word))
    }

    /// One step of a settlement; a crash may come before the next.
    fn carry_out(&self, world: &mut World, host: HostId, asked: Option<Move>, answer: PeerAnswer) -> bool {
        let standing = world.host(host).journal.standing().clone();
        let record = match (settle(&standing, answer), &standing) {
            (Settlement::Abort, Standing::Moving { move_id, .. })
            | (Settlement::AbortThenDiscard, Standing::Incoming { move_id, .. }) => {
                Record::Aborted { move_id: move_id.clone() }
            }
            (Settlement::ReleaseThenDiscard, Standing::Committed { move_id, .. }) => {
                Record::Released { move_id: move_id.clone() }
            }
            (Settlement::OwnThenBoot, Standing::Incoming { generation, .. }) => {
                Record::Owner { generation: *generation, disks: vec![] }
            }
            (Settlement::Clear, _) => {
                let Some(asked) = asked else { return false };
                Record::Cleared { move_id: id(asked) }
            }
            (Settlement::Lose, _) => {
                let (Some(asked), PeerAnswer::Holds(Holding::Owner { generation })) = (asked, answer) else {
                    return false;
                };
                Record::Lost { move_id: id(asked), host: String::new(), generation }
            }
            (Settlement::Discard, _) => {
                forget(world, host, !self.rule.releases_unconfirmed);
                return true;
            }
            // Starting is a step of its own; the rest waits.
            _ => return false,
        };
        self.append(world.host_mut(host), &record)
    }

    /// Starts the VM where its journal says it is this host's.
    pub(super) fn start(&self, world: &mut World, host: HostId) -> bool {
        let here = world.host(host);
        let standing = here.journal.standing();
        let settled = settle(standing, PeerAnswer::NotAsked) == Settlement::Startable;
        let fenced = match self.take_over.map(|take_over| take_over.fence) {
            Some(Fence::Journal) => false,
            Some(Fence::Reachable) => world
                .hosts
                .iter()
                .any(|other| !other.down && generation(other.journal.standing()) > generation(standing)),
            None | Some(Fence::Targets) => question(&here.journal).is_some(),
        };
        if !settled || fenced || here.down || here.process.is_some() {
            return false;
        }
        world.host_mut(host).process = Some(Process::Runs);
        true
    }

    /// `vmove recover --take-ownership`; an arrival's process, if it has one, ends.
    pub(super) fn take_ownership(&self, world: &mut World, host: HostId) -> bool {
        let Some(how) = self.take_over else { return false };
        let here = world.host(host);
        let (move_id, generation, arrived) = match (here.journal.standing(), here.journal.open_ends()) {
            (Standing::Incoming { move_id, generation, prepared: true, .. }, _)
                if how.side != Side::Source =>
            {
                (move_id.clone(), *generation, true)
            }
            (Standing::Owner { generation, .. }, [end, ..]) if how.side != Side::Target => {
                (end.move_id.clone(), *generation, false)
            }
            _ => return false,
        };
        let ordered = world.ordered(index(&move_id));
        let gone = if arrived { ordered.from } else { ordered.to };
        let rest = (0u8..).zip(&world.hosts).filter(|(other, _)| *other != host && *other != gone);
        let owns = |there: &Host| matches!(holding(there.journal.standing()), Holding::Owner { .. });
        let holds = |there: &Host| !matches!(there.journal.standing(), Standing::Nothing);
        let free = rest.into_iter().all(|(_, there)| match how.others {
            Others::NotAsked => true,
            Others::Reachable => there.down || !owns(there),
            Others::OwnNothing => !there.down && !owns(there),
            Others::HoldNothing => !there.down && !holds(there),
        });
        if !free || how.other_down && !world.host(gone).down {
            return false;
        }
        let generation = generation + TAKE_OVER_STEP;
        if arrived {
            world.moves[index(&move_id) as usize].taken = Some(generation);
        }
        let here = world.host_mut(host);
        here.process = None;
        self.append(here, &Record::TakenOver { move_id, generation, disks: vec![] })
    }
}

/// Nothing of the VM is left on a host, its journal included; reports of moves that ended here are kept.
fn forget(world: &mut World, host: HostId, keep_reports: bool) {
    for at in 0..world.moves.len() {
        let reported = match world.host(host).journal.verdict(&id(at as Move)) {
            Verdict::Committed => Some(Word::Committed),
            Verdict::Aborted => Some(Word::Aborted),
            Verdict::Moving | Verdict::Unknown => None,
        };
        if keep_reports && world.moves[at].from == host && reported.is_some() {
            world.moves[at].reported = reported;
        }
    }
    let here = world.host_mut(host);
    here.journal = Default::default();
    here.disk = None;
}
