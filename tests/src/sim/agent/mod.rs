//! A simulated agent: what `cli::agent` does around a move and after a crash, without its files, sockets and API.
//!
//! | module | stands for |
//! |---|---|
//! | [`moves`] | leading a move |
//! | [`incoming`] | receiving a VM |
//! | [`settle`] | the failure table carried out, the words that decide it |
//! | [`rpc`] | letters between agents, which may be lost |

pub mod incoming;
pub mod moves;
pub mod rpc;
pub mod settle;

use std::collections::BTreeMap;

use vmove_mirror::journal::{MoveId, Standing};

use super::{
    HostId, Pid,
    host::Start,
    process::Run,
    world::{Happening, World},
};

/// First gap between two questions; it doubles.
pub const FIRST_GAP: u64 = 250_000;
/// Largest gap between two questions.
pub const LAST_GAP: u64 = 15_000_000;
/// How often an arriving VM is looked at.
const ARRIVAL_INTERVAL: u64 = 300_000;
/// How often a VM that somebody else works on is tried again.
pub const BUSY_INTERVAL: u64 = 100_000;

/// What a VM is reserved for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// It moves.
    Moving,
    /// It is being settled.
    Settling,
    /// It is to arrive.
    Arriving,
}

/// Something an agent does later.
#[derive(Debug, Clone)]
pub enum Task {
    /// Bring a VM without a process to what the failure table says.
    Settle {
        /// Gap before the next try.
        gap: u64,
    },
    /// Look how far a move is.
    FollowMove {
        /// The move.
        move_id: MoveId,
        /// Where to.
        to: Option<HostId>,
    },
    /// Look how far an arrival is.
    FollowArrival {
        /// The process.
        pid: Pid,
        /// Gap before the next question.
        gap: u64,
    },
    /// An awaiting process had its time to end.
    EndArrival {
        /// The process.
        pid: Pid,
    },
    /// An accepted offer was not started in time.
    ForgetOffer {
        /// The move.
        move_id: MoveId,
    },
}

/// An agent.
#[derive(Debug, Default)]
pub struct Agent {
    /// It lives.
    pub up: bool,
    /// Counts its lives.
    pub epoch: u32,
    /// What the VM is reserved for.
    pub busy: Option<Busy>,
    /// An accepted offer that is not started yet.
    pub accepted: Option<incoming::Accepted>,
    /// Questions that await an answer.
    pub waiting: BTreeMap<u64, rpc::Then>,
}

impl World {
    /// Has the agent of a host do something later, if it still lives then.
    pub fn agent_later(&mut self, host: HostId, delay: u64, task: Task) {
        let epoch = self.hosts[host].agent.epoch;
        self.after(delay, Happening::Agent { host, epoch, task });
    }

    /// An agent's task is due.
    pub fn agent_task(&mut self, host: HostId, epoch: u32, task: Task) {
        let agent = &self.hosts[host].agent;
        if !agent.up || agent.epoch != epoch {
            return;
        }
        match task {
            Task::Settle { gap } => self.settle_once(host, gap),
            Task::FollowMove { move_id, to } => self.follow_move(host, move_id, to),
            Task::FollowArrival { pid, gap } => self.follow_arrival(host, pid, gap),
            Task::EndArrival { pid } => self.end_arrival_late(host, pid),
            Task::ForgetOffer { move_id } => {
                if self.hosts[host].agent.accepted.as_ref().is_some_and(|a| a.move_id == move_id) {
                    self.forget_offer(host);
                }
            }
        }
    }

    /// An agent dies.
    pub fn agent_dies(&mut self, host: HostId) {
        let agent = &mut self.hosts[host].agent;
        *agent = Agent { up: false, epoch: agent.epoch + 1, ..Agent::default() };
    }

    /// An agent starts: processes of an earlier one are followed, a VM without one is settled.
    pub fn agent_starts(&mut self, host: HostId) {
        let it = &mut self.hosts[host];
        it.agent.up = true;
        let Some(dir) = &it.dir else { return };
        let to = match dir.look().standing() {
            Standing::Moving { to_host, .. } => to_host.as_deref().and_then(number),
            _ => None,
        };
        match it.process.as_deref() {
            None => self.agent_later(host, 1_000, Task::Settle { gap: FIRST_GAP }),
            Some(process) if process.run == Run::Incoming => {
                let pid = process.pid;
                self.agent_later(host, 1_000, Task::FollowArrival { pid, gap: FIRST_GAP });
            }
            Some(process) => {
                if process.source.is_some()
                    && let Some((move_id, None)) = process.board.clone()
                {
                    it.agent.busy = Some(Busy::Moving);
                    self.agent_later(host, 1_000, Task::FollowMove { move_id, to });
                }
            }
        }
    }

    /// A VM process has ended: its agent notices.
    pub fn agent_sees_end(&mut self, host: HostId) {
        if self.hosts[host].agent.up {
            let delay = self.dice.turns.range(100..5_000);
            self.agent_later(host, delay, Task::Settle { gap: FIRST_GAP });
        }
    }

    /// Boots the VM of a host from its disks.
    pub fn agent_boots(&mut self, host: HostId) {
        if let Some(launch) = self.hosts[host].dir.as_mut().and_then(|dir| dir.launch.as_mut()) {
            launch.start = Start::Boot;
        }
        if let Err(why) = self.start_process(host, [0; 16]) {
            self.note(|| format!("host {host}: the VM does not start: {why}"));
        }
    }
}

/// The number in a host's name.
pub fn number(name: &str) -> Option<HostId> {
    name.strip_prefix('h')?.parse().ok()
}
