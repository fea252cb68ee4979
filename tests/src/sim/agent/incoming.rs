//! Receiving a VM, as `cli::agent::incoming` does: judging the offer, starting the process that awaits the source, taking it back.
//!
//! Never enters: what to do after a crash (settle).

use vmove_mirror::journal::{DiskAt, MoveId, Standing};

use super::{
    super::{
        HostId, Pid,
        host::{Launch, Start, VmDir},
        process::Run,
        world::World,
    },
    Busy, FIRST_GAP, Task,
    rpc::{Answer, Ask, SHORT, Then},
};

/// An accepted offer that is not started within this time is forgotten.
const PATIENCE: u64 = 300_000_000;
/// How long an awaiting process may take to end when its move is off.
const CANCEL_DEADLINE: u64 = 5_000_000;

/// An accepted offer.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// The move.
    pub move_id: MoveId,
    from: HostId,
    generation: u64,
    disks: Vec<DiskAt>,
}

impl World {
    /// Judges an offer; one that is accepted makes the VM's directory and reserves its name.
    pub fn receive_offer(
        &mut self,
        from: HostId,
        here: HostId,
        move_id: MoveId,
        generation: u64,
        disks: Vec<DiskAt>,
    ) -> Answer {
        let it = &self.hosts[here];
        if it.agent.busy.is_some() {
            return Answer::No("busy".into());
        }
        if it.dir.is_some() {
            return Answer::No("the VM, or what is left of it, is here".into());
        }
        if let Some(blocker) = self.occupied(here, &disks, generation) {
            return Answer::No(blocker);
        }
        let it = &mut self.hosts[here];
        it.dir = Some(VmDir::default());
        it.agent.busy = Some(Busy::Arriving);
        it.agent.accepted = Some(Accepted { move_id: move_id.clone(), from, generation, disks });
        self.agent_later(here, PATIENCE, Task::ForgetOffer { move_id });
        Answer::Yes
    }

    /// Starts the process that awaits the source.
    pub fn start_incoming(&mut self, from: HostId, here: HostId, move_id: &MoveId) -> Answer {
        let ticket = self.stamp();
        let agent = &mut self.hosts[here].agent;
        let Some(arrival) = agent.accepted.take_if(|a| a.move_id == *move_id && a.from == from) else {
            return Answer::No("no such move is arriving here".into());
        };
        agent.busy = None;
        self.make_room(here, &arrival.disks);
        if let Some(dir) = &mut self.hosts[here].dir {
            dir.launch = Some(Launch {
                generation: arrival.generation,
                disks: arrival.disks,
                start: Start::Incoming { move_id: move_id.clone(), from },
            });
        }
        let mut secret = [0; 16];
        secret[..8].copy_from_slice(&ticket.to_le_bytes());
        match self.start_process(here, secret) {
            Ok(pid) => {
                self.agent_later(here, 1_000, Task::FollowArrival { pid, gap: FIRST_GAP });
                Answer::Listening { pid, ticket: secret }
            }
            Err(why) => {
                self.agent_later(here, 1_000, Task::Settle { gap: FIRST_GAP });
                Answer::No(why)
            }
        }
    }

    /// Forgets an accepted offer.
    pub fn forget_offer(&mut self, here: HostId) {
        let agent = &mut self.hosts[here].agent;
        agent.accepted = None;
        agent.busy = None;
        self.agent_later(here, 1, Task::Settle { gap: FIRST_GAP });
    }

    /// Takes back what a move made here, unless the source alone may decide on it.
    pub fn discard_incoming(&mut self, from: HostId, here: HostId, move_id: &MoveId) -> Answer {
        let it = &self.hosts[here];
        if it.agent.accepted.as_ref().is_some_and(|a| a.move_id == *move_id && a.from == from) {
            self.forget_offer(here);
            return Answer::Yes;
        }
        let arriving = Start::Incoming { move_id: move_id.clone(), from };
        if !it.dir.as_ref().is_some_and(|dir| dir.launch.as_ref().is_some_and(|l| l.start == arriving)) {
            return Answer::No("no such move is arriving here".into());
        }
        let Some(process) = &it.process else {
            self.agent_later(here, 1, Task::Settle { gap: FIRST_GAP });
            return Answer::Yes;
        };
        let undecided = process.target.as_ref().is_some_and(|mv| mv.undecided);
        if undecided || process.run != Run::Incoming {
            return Answer::No("only its source's word ends it".into());
        }
        let pid = process.pid;
        self.cancel_process(pid);
        self.agent_later(here, CANCEL_DEADLINE, Task::EndArrival { pid });
        Answer::Yes
    }

    /// A process that was told to end had its time.
    pub fn end_arrival_late(&mut self, here: HostId, pid: Pid) {
        let it = &self.hosts[here];
        let Some(process) = it.process.as_ref().filter(|process| process.pid == pid) else { return };
        let undecided = process.target.as_ref().is_none_or(|mv| mv.undecided);
        let Some(dir) = &it.dir else { return };
        let ours =
            matches!(dir.look().standing(), Standing::Nothing | Standing::Incoming { prepared: false, .. });
        if ours && !undecided && process.run == Run::Incoming {
            self.kill(pid, "its move is off and it does not end");
        }
    }

    /// Follows a VM that arrives until it runs here or is gone, and fetches the source's word when the process cannot hear it.
    pub fn follow_arrival(&mut self, here: HostId, pid: Pid, gap: u64) {
        let Some(process) = self.hosts[here].process.as_ref().filter(|process| process.pid == pid) else {
            return;
        };
        let Some(mv) = &process.target else { return };
        if !mv.undecided {
            return self.agent_later(here, super::ARRIVAL_INTERVAL, Task::FollowArrival { pid, gap });
        }
        let (move_id, from) = (mv.move_id.clone(), mv.from);
        let gap = (gap * 2).min(super::LAST_GAP);
        self.ask(here, from, Ask::Verdict { move_id: move_id.clone() }, SHORT, Then::Tell { pid, move_id });
        self.agent_later(here, gap, Task::FollowArrival { pid, gap });
    }
}
