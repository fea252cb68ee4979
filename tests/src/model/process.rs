//! The steps of a VM process: the guest, the source and the target, each step a record written or a message sent.
//!
//! Steps have the names of the engines' actions: `mirror/src/{source,committed,target}.rs`. Never enters: what an agent does.

use vmove_mirror::journal::{Record, Standing, Verdict};

use super::{HostId, Move, Ordered, Ownership, Packet, Step, Word, World, generation, id, name};

/// What the VM's process on a host is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    /// The guest runs.
    Runs,
    /// Source, ordered: `Moving` is not on disk yet; the guest runs.
    Ordered(Move),
    /// Source, setup to pre-copy: the guest runs.
    Leaving(Move),
    /// Source: the guest stands still, `Prepare` has been said.
    Preparing(Move),
    /// Source: "prepared" was heard, `Committed` is being written.
    Committing(Move),
    /// Source: `Aborted` is being written.
    Aborting(Move, Pause),
    /// Source, after the commit: waits for the target to run.
    Committed(Move),
    /// Target: `Incoming` is on disk, all is on its way.
    Arriving(Move),
    /// Target: all is here and proved, `Prepared` is being written.
    Proved(Move),
    /// Target: the source decides.
    Prepared(Move),
    /// Target: the source decides and cannot be heard.
    Undecided(Move),
    /// Target: `Owner` is being written.
    Owning(Move),
    /// Target: `Aborted` is being written.
    Discarding(Move),
}

/// Whether the guest stood still when the source gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pause {
    /// It runs.
    No,
    /// It stands still.
    Yes,
}

impl Process {
    /// Whether the guest runs in it.
    pub fn runs(self) -> bool {
        matches!(self, Self::Runs | Self::Ordered(_) | Self::Leaving(_) | Self::Aborting(_, Pause::No))
    }
}

impl Ownership {
    /// A message arrives, if anybody is there to hear it.
    pub(super) fn deliver(&self, world: &mut World, packet: Packet) -> bool {
        let (Packet::Offer(index)
        | Packet::Prepare(index, _)
        | Packet::Prepared(index)
        | Packet::Commit(index)
        | Packet::Abort(index)
        | Packet::Running(index)
        | Packet::Ask(index)
        | Packet::Said(index, _)) = packet;
        let ordered = world.ordered(index);
        let at = match packet {
            Packet::Prepared(_) | Packet::Running(_) | Packet::Ask(_) => ordered.from,
            _ => ordered.to,
        };
        if world.host(at).down {
            return false;
        }
        match (packet, world.host(at).process) {
            (Packet::Offer(_), None) => self.accept(world, at, index),
            (Packet::Ask(_), _) => self.answer(world, at, index),
            (Packet::Said(_, word), None) => self.settle_by(world, at, index, word.into()),
            (Packet::Prepare(_, version), Some(Process::Arriving(mine))) if mine == index => {
                let here = world.host_mut(at);
                here.disk = Some(version);
                here.process = Some(Process::Proved(index));
                if self.rule.says_prepared_early {
                    world.packets.insert(Packet::Prepared(index));
                }
                true
            }
            (Packet::Prepared(_), Some(Process::Preparing(mine))) if mine == index => {
                become_(world, at, Process::Committing(index))
            }
            // Told to commit in a phase where the engine would not listen: only the journal can refuse it.
            (Packet::Prepared(_), Some(process)) if self.rule.careless && process.runs() => {
                self.commit(world, at, index)
            }
            (
                Packet::Commit(_) | Packet::Said(_, Word::Committed),
                Some(Process::Prepared(mine) | Process::Undecided(mine)),
            ) if mine == index => become_(world, at, Process::Owning(index)),
            (
                Packet::Abort(_) | Packet::Said(_, Word::Aborted),
                Some(Process::Prepared(mine) | Process::Undecided(mine)),
            )
            | (Packet::Abort(_), Some(Process::Arriving(mine) | Process::Proved(mine)))
                if mine == index =>
            {
                become_(world, at, Process::Discarding(index))
            }
            (Packet::Running(_), Some(Process::Committed(mine))) if mine == index => {
                let here = world.host_mut(at);
                here.process = None;
                self.append(here, &Record::Released { move_id: id(index) })
            }
            _ => false,
        }
    }

    /// The offer of a move: `Incoming` is the target's first record.
    fn accept(&self, world: &mut World, at: HostId, index: Move) -> bool {
        let ordered = world.ordered(index);
        if ordered.accepted || world.host(at).disk.is_some() {
            return false;
        }
        let incoming = Record::Incoming {
            move_id: id(index),
            from_host: name(ordered.from),
            generation: ordered.generation,
            disks: vec![],
        };
        if !self.append(world.host_mut(at), &incoming) {
            return false;
        }
        world.moves[index as usize].accepted = true;
        become_(world, at, Process::Arriving(index))
    }

    /// The next thing the process does by itself.
    pub(super) fn go(&self, world: &mut World, host: HostId) -> bool {
        let Some(process) = world.host(host).process else { return false };
        match process {
            // The process is told once the target has accepted.
            Process::Ordered(index) if !world.ordered(index).accepted => false,
            Process::Ordered(index) => {
                let ordered = world.ordered(index);
                let (move_id, to_host) = (id(index), Some(name(ordered.to)));
                let here = world.host_mut(host);
                if !self.append(here, &Record::Moving { move_id, to_host, generation: ordered.generation }) {
                    // What an earlier move left open is ended first.
                    return self.end_dangling(world, host);
                }
                become_(world, host, Process::Leaving(index))
            }
            // Pause, drain, save, prove; then the target is told.
            Process::Leaving(index) => {
                let Some(version) = world.host(host).disk else { return false };
                world.packets.insert(Packet::Prepare(index, version));
                become_(world, host, Process::Preparing(index))
            }
            Process::Preparing(index) if self.rule.commits_unprepared => self.commit(world, host, index),
            Process::Committing(index) => self.commit(world, host, index),
            Process::Aborting(index, _) => {
                // Refused where `Moving` is not on disk; that ends it as well.
                let _ = self.append(world.host_mut(host), &Record::Aborted { move_id: id(index) });
                become_(world, host, Process::Runs)
            }
            Process::Proved(index) => {
                if !self.append(world.host_mut(host), &Record::Prepared { move_id: id(index) }) {
                    return become_(world, host, Process::Discarding(index));
                }
                world.packets.insert(Packet::Prepared(index));
                become_(world, host, Process::Prepared(index))
            }
            // The agent asks for a process that cannot hear its source.
            Process::Undecided(index) => world.packets.insert(Packet::Ask(index)),
            Process::Owning(index) => {
                let Standing::Incoming { generation, .. } = *world.host(host).journal.standing() else {
                    return false;
                };
                if !self.append(world.host_mut(host), &Record::Owner { generation, disks: vec![] }) {
                    return false;
                }
                world.packets.insert(Packet::Running(index));
                become_(world, host, Process::Runs)
            }
            Process::Discarding(index) => {
                let here = world.host_mut(host);
                let _ = self.append(here, &Record::Aborted { move_id: id(index) });
                here.disk = None;
                here.process = None;
                true
            }
            Process::Runs
            | Process::Preparing(_)
            | Process::Committed(_)
            | Process::Arriving(_)
            | Process::Prepared(_) => false,
        }
    }

    /// **The commit point.**
    fn commit(&self, world: &mut World, host: HostId, index: Move) -> bool {
        if !self.append(world.host_mut(host), &Record::Committed { move_id: id(index) }) {
            return false;
        }
        world.packets.insert(Packet::Commit(index));
        become_(world, host, Process::Committed(index))
    }

    /// The peer is gone, as far as this process can tell.
    pub(super) fn link_lost(&self, world: &mut World, host: HostId) -> bool {
        let Some(process) = world.host(host).process else { return false };
        match process {
            Process::Ordered(index) | Process::Leaving(index) => abort(world, host, index, Pause::No),
            Process::Preparing(index) => abort(world, host, index, Pause::Yes),
            Process::Committed(_) if self.rule.resumes_after_commit => become_(world, host, Process::Runs),
            // Told to give up in a phase that has no such action: only the journal can refuse it.
            Process::Committed(index)
                if self.rule.careless
                    && self.append(world.host_mut(host), &Record::Aborted { move_id: id(index) }) =>
            {
                become_(world, host, Process::Runs)
            }
            Process::Committed(index) => {
                let here = world.host_mut(host);
                here.process = None;
                if self.rule.releases_unconfirmed {
                    let _ = self.append(here, &Record::Released { move_id: id(index) });
                }
                true
            }
            Process::Arriving(index) | Process::Proved(index) => {
                become_(world, host, Process::Discarding(index))
            }
            Process::Prepared(index) if self.rule.owns_unasked => {
                become_(world, host, Process::Owning(index))
            }
            Process::Prepared(index) if self.rule.discards_unasked => {
                become_(world, host, Process::Discarding(index))
            }
            Process::Prepared(index) => become_(world, host, Process::Undecided(index)),
            _ => false,
        }
    }

    /// A live process is asked how a move from here went: a target only asks when it cannot hear the source, so a move that has not
    /// committed is given up. What it then says, it says when asked again.
    pub(super) fn answer_alive(
        &self,
        world: &mut World,
        host: HostId,
        process: Process,
        index: Move,
    ) -> bool {
        match (world.host(host).journal.verdict(&id(index)), process) {
            (Verdict::Committed, _) => world.packets.insert(Packet::Said(index, Word::Committed)),
            (Verdict::Aborted, _) => world.packets.insert(Packet::Said(index, Word::Aborted)),
            (Verdict::Moving, Process::Leaving(mine)) if mine == index => {
                abort(world, host, index, Pause::No)
            }
            (Verdict::Moving, Process::Preparing(mine)) if mine == index => {
                abort(world, host, index, Pause::Yes)
            }
            (Verdict::Moving, Process::Runs) => {
                self.end_dangling(world, host) && world.packets.insert(Packet::Said(index, Word::Aborted))
            }
            (Verdict::Moving, _) => false,
            (Verdict::Unknown, _) => say_reported(world, index),
        }
    }

    /// A move that is over and whose end could not be written is ended now.
    fn end_dangling(&self, world: &mut World, host: HostId) -> bool {
        let here = world.host_mut(host);
        let Standing::Moving { move_id, .. } = here.journal.standing() else { return false };
        let aborted = Record::Aborted { move_id: move_id.clone() };
        self.append(here, &aborted)
    }
}

/// The user's order: the offer goes out, the process hears of it.
pub(super) fn order(world: &mut World, from: HostId, to: HostId) -> bool {
    let index = world.moves.len() as Move;
    let generation = generation(world.host(from).journal.standing()) + 1;
    world.moves.push(Ordered { from, to, generation, accepted: false, reported: None, taken: None });
    world.packets.insert(Packet::Offer(index));
    become_(world, from, Process::Ordered(index))
}

/// [`Ownership::go`], and its record cannot be written.
pub(super) fn cannot_write(world: &mut World, host: HostId) -> bool {
    let Some(process) = world.host(host).process else { return false };
    world.left.full_disks -= 1;
    match process {
        Process::Ordered(index) => abort(world, host, index, Pause::No),
        Process::Committing(index) => abort(world, host, index, Pause::Yes),
        Process::Aborting(..) => become_(world, host, Process::Runs),
        Process::Proved(index) => become_(world, host, Process::Discarding(index)),
        Process::Owning(_) => {
            world.host_mut(host).process = None;
            true
        }
        Process::Discarding(_) => {
            let here = world.host_mut(host);
            here.disk = None;
            here.process = None;
            true
        }
        _ => false,
    }
}

/// What the kept report says of a move that the journal does not know.
pub(super) fn say_reported(world: &mut World, index: Move) -> bool {
    world.ordered(index).reported.is_some_and(|word| world.packets.insert(Packet::Said(index, word)))
}

/// The source gives up: the target is told at once, the guest goes on once that is on disk.
fn abort(world: &mut World, host: HostId, index: Move, pause: Pause) -> bool {
    world.packets.insert(Packet::Abort(index));
    become_(world, host, Process::Aborting(index, pause))
}

fn become_(world: &mut World, host: HostId, process: Process) -> bool {
    world.host_mut(host).process = Some(process);
    true
}

/// What a process does next without any fault, when nothing is on its way to it.
pub(super) fn goes_on(world: &World, host: HostId) -> Step {
    match world.host(host).process {
        // The target has refused.
        Some(Process::Ordered(index)) if !world.ordered(index).accepted => Step::LinkLost(host),
        // The other side is not there, or it would have spoken.
        Some(Process::Preparing(_) | Process::Committed(_) | Process::Arriving(_) | Process::Prepared(_)) => {
            Step::LinkLost(host)
        }
        _ => Step::Go(host),
    }
}
