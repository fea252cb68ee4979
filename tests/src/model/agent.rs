//! The steps of agents and of the user: settling a VM without a process, answering for it, starting it, taking its ownership.
//!
//! What is decided is decided by `vmove_mirror::{journal, recovery}`. Never enters: live processes.

use vmove_mirror::journal::{Record, Standing, Verdict};
use vmove_mirror::recovery::{PeerAnswer, Settlement, settle};

use super::{Host, HostId, Move, Ownership, Packet, Process, Word, World, generation, id, index};

/// What a host that is back asks before it starts a VM that its journal says is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// Nobody.
    Journal,
    /// Whoever can be reached.
    Reachable,
    /// The targets of all its aborted moves, until each has said that it holds nothing.
    Confirmed,
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

/// How the user takes ownership at a prepared target.
#[derive(Debug, Clone, Copy)]
pub struct TakeOver {
    /// Only while the source is down; else whenever the user likes.
    pub source_down: bool,
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
        };
        world.packets.insert(Packet::Said(index, word));
        true
    }

    /// What the failure table says before the other side was asked.
    pub(super) fn settle(&self, world: &mut World, host: HostId) -> bool {
        let here = world.host_mut(host);
        let standing = here.journal.standing().clone();
        match settle(&standing, PeerAnswer::Unreachable) {
            // Starting is a step of its own; so is asking whether the VM has arrived.
            Settlement::Startable | Settlement::Fenced => false,
            Settlement::Ask => {
                let Standing::Incoming { move_id, .. } = &standing else { return false };
                world.packets.insert(Packet::Ask(index(move_id)))
            }
            settlement => self.carry_out(here, &standing, settlement),
        }
    }

    /// What the failure table says, the source's word in hand.
    pub(super) fn settle_by(&self, world: &mut World, host: HostId, asked: Move, word: Word) -> bool {
        let here = world.host_mut(host);
        let standing = here.journal.standing().clone();
        let Standing::Incoming { move_id, prepared: true, .. } = &standing else { return false };
        if index(move_id) != asked {
            return false;
        }
        let settlement = settle(&standing, PeerAnswer::Said(word.into()));
        self.carry_out(here, &standing, settlement)
    }

    /// One step of a settlement; a crash may come before the next.
    fn carry_out(&self, here: &mut Host, standing: &Standing, settlement: Settlement) -> bool {
        let aborted = |move_id| Record::Aborted { move_id };
        match (settlement, standing) {
            (Settlement::AbortThenStartable, Standing::Moving { move_id, .. })
            | (Settlement::AbortThenDiscard, Standing::Incoming { move_id, .. }) => {
                self.append(here, &aborted(move_id.clone()))
            }
            (Settlement::OwnThenBoot, Standing::Incoming { generation, .. }) => {
                self.append(here, &Record::Owner { generation: *generation, disks: vec![] })
            }
            (Settlement::Discard, _) => {
                forget(here);
                true
            }
            _ => false,
        }
    }

    /// A VM that has left: whoever owns it at the generation it left with, or has since, confirms that.
    pub(super) fn confirm_gone(&self, world: &mut World, host: HostId, other: HostId) -> bool {
        let there = world.host(other);
        let owns = !there.down
            && matches!(
                there.journal.standing(),
                Standing::Owner { .. } | Standing::Moving { .. } | Standing::Committed { .. }
            );
        let reached = generation(there.journal.standing());
        let here = world.host_mut(host);
        let Standing::Committed { move_id, generation, .. } = here.journal.standing().clone() else {
            return false;
        };
        owns && reached >= generation && self.append(here, &Record::Released { move_id })
    }

    /// Starts the VM where its journal says it is this host's.
    pub(super) fn start(&self, world: &mut World, host: HostId) -> bool {
        let here = world.host(host);
        let standing = here.journal.standing();
        let settled = settle(standing, PeerAnswer::Unreachable) == Settlement::Startable;
        let fenced = match self.take_over.map(|take_over| take_over.fence) {
            None | Some(Fence::Journal) => false,
            Some(Fence::Reachable) => world
                .hosts
                .iter()
                .any(|other| !other.down && generation(other.journal.standing()) > generation(standing)),
            Some(Fence::Confirmed) => !here.unconfirmed.is_empty(),
        };
        if !settled || fenced || here.down || here.process.is_some() {
            return false;
        }
        world.host_mut(host).process = Some(Process::Runs);
        true
    }

    /// `vmove recover --take-ownership` at a prepared target; its process, if it has one, ends.
    pub(super) fn take_ownership(&self, world: &mut World, host: HostId) -> bool {
        let Some(take_over) = self.take_over else { return false };
        let Standing::Incoming { move_id, generation, prepared: true, .. } =
            world.host(host).journal.standing().clone()
        else {
            return false;
        };
        let source = world.ordered(index(&move_id)).from;
        let rest = (0u8..).zip(&world.hosts).filter(|(other, _)| *other != host && *other != source);
        let owns = |there: &Host| {
            matches!(
                there.journal.standing(),
                Standing::Owner { .. } | Standing::Moving { .. } | Standing::Committed { .. }
            )
        };
        let holds = |there: &Host| !matches!(there.journal.standing(), Standing::Nothing);
        let free = rest.into_iter().all(|(_, there)| match take_over.others {
            Others::NotAsked => true,
            Others::Reachable => there.down || !owns(there),
            Others::OwnNothing => !there.down && !owns(there),
            Others::HoldNothing => !there.down && !holds(there),
        });
        if !free || take_over.source_down && !world.host(source).down {
            return false;
        }
        world.moves[index(&move_id) as usize].taken = take_over.remembers;
        world.host_mut(host).process = None;
        self.append(world.host_mut(host), &Record::Owner { generation, disks: vec![] })
    }
}

impl Process {
    /// Whether it carries out this move.
    fn is_of(self, index: Move) -> bool {
        match self {
            Self::Runs => false,
            Self::Ordered(mine)
            | Self::Leaving(mine)
            | Self::Preparing(mine)
            | Self::Committing(mine)
            | Self::Aborting(mine, _)
            | Self::Committed(mine)
            | Self::Arriving(mine)
            | Self::Proved(mine)
            | Self::Prepared(mine)
            | Self::Undecided(mine)
            | Self::Owning(mine)
            | Self::Discarding(mine) => mine == index,
        }
    }
}

/// A source's agent takes back an arrival: granted unless the target is prepared or further, and for ever.
pub(super) fn take_back(world: &mut World, host: HostId, index: Move) -> bool {
    let ordered = world.ordered(index);
    let over = !matches!(world.host(host).journal.standing(),
        Standing::Moving { move_id, .. } if super::index(move_id) == index);
    let there = world.host(ordered.to);
    let about = matches!(there.journal.standing(),
        Standing::Incoming { move_id, .. } if super::index(move_id) == index);
    let later = generation(there.journal.standing()) > generation(world.host(host).journal.standing());
    if !over || ordered.taken || there.down || about || later || there.process.is_some_and(|p| p.is_of(index))
    {
        return false;
    }
    world.moves[index as usize].heard = true;
    world.host_mut(host).unconfirmed.remove(&index)
}

/// A host whose VM was taken over while it was away learns of that. Its images are put aside.
pub(super) fn yield_to(world: &mut World, host: HostId, other: HostId) -> bool {
    let (here, there) = (world.host(host).journal.standing(), world.host(other).journal.standing());
    let owned = |standing: &Standing| matches!(standing, Standing::Owner { .. } | Standing::Moving { .. });
    let mine = generation(here);
    let owns_later = owned(there) && generation(there) > mine;
    let took = world.moves.iter().any(|ordered| {
        ordered.taken && (ordered.from, ordered.to) == (host, other) && ordered.generation > mine
    });
    if world.host(other).down || !owned(here) || !(owns_later || took) {
        return false;
    }
    forget(world.host_mut(host));
    true
}

/// Nothing of the VM is left on a host, its journal included.
fn forget(here: &mut Host) {
    here.journal = Default::default();
    here.disk = None;
    here.unconfirmed.clear();
}
