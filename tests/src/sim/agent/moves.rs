//! Leading a move, as `cli::agent::moves` does: offer, start of the target, order; then following it.
//!
//! Never enters: what to do after a crash (settle).

use vmove_mirror::journal::{DiskAt, MoveId, Standing};
use vmove_storage::OwnerState;

use super::{
    super::{HostId, Pid, process::source::Order, world::World},
    Busy, Task,
    rpc::{Answer, Ask, LONG, Then},
};

/// How often a move is looked at.
const FOLLOW_INTERVAL: u64 = 100_000;

/// A move in the making.
#[derive(Debug, Clone)]
pub struct Draft {
    /// The process of the VM.
    pub pid: Pid,
    /// Target host; none for a datastore-only move.
    pub to: Option<HostId>,
    /// The order but for where the target listens.
    pub order: Order,
}

impl World {
    /// Begins a move; why not, if it is refused at once.
    pub fn begin_move(&mut self, host: HostId, draft: Draft) -> Result<(), String> {
        let agent = &mut self.hosts[host].agent;
        if !agent.up {
            return Err("the agent does not answer".into());
        }
        if agent.busy.is_some() {
            return Err("busy".into());
        }
        let generation = self.generation_of(draft.pid) + 1;
        let places: Vec<DiskAt> = draft.order.copies.iter().map(|(_, at)| at.clone()).collect();
        self.hosts[host].agent.busy = Some(Busy::Moving);
        if let Some(to) = draft.to {
            let offer = Ask::Offer { move_id: draft.order.move_id.clone(), generation, disks: places };
            self.ask(host, to, offer, LONG, Then::Offered(Box::new(draft)));
            return Ok(());
        }
        if let Some(blocker) = self.occupied(host, &places, generation) {
            self.hosts[host].agent.busy = None;
            return Err(blocker);
        }
        self.make_room(host, &places);
        self.order(host, draft, None)
    }

    /// The target has judged the offer.
    pub fn offered(&mut self, host: HostId, draft: Draft, answer: Option<Answer>) {
        let Some(to) = draft.to else { return };
        match answer {
            Some(Answer::Yes) => {
                let start = Ask::Start { move_id: draft.order.move_id.clone() };
                self.ask(host, to, start, LONG, Then::Started(Box::new(draft)));
            }
            Some(Answer::No(why)) => {
                self.hosts[host].agent.busy = None;
                self.move_refused(&draft.order.move_id, &why);
            }
            // It may have taken the offer: that is taken back once it comes to light there.
            _ => {
                self.hosts[host].agent.busy = None;
                self.discard_at(host, to, draft.order.move_id.clone());
                self.move_refused(&draft.order.move_id, "no answer to the offer");
            }
        }
    }

    /// The target's process has been started, or not.
    pub fn started(&mut self, host: HostId, draft: Draft, answer: Option<Answer>) {
        let Some(to) = draft.to else { return };
        let move_id = draft.order.move_id.clone();
        let ordered = match answer {
            Some(Answer::Listening { pid, ticket }) => self.order(host, draft, Some((to, pid, ticket))),
            Some(Answer::No(why)) => Err(why),
            _ => Err("no answer".into()),
        };
        if let Err(why) = ordered {
            self.hosts[host].agent.busy = None;
            self.discard_at(host, to, move_id.clone());
            self.move_refused(&move_id, &why);
        }
    }

    /// Gives the VM process its order. From here on it decides.
    fn order(
        &mut self,
        host: HostId,
        draft: Draft,
        to: Option<(HostId, Pid, [u8; 16])>,
    ) -> Result<(), String> {
        let Draft { pid, to: target, mut order } = draft;
        order.to = to;
        if let Some(dir) = &mut self.hosts[host].dir {
            dir.keep_source = order.keep_source;
        }
        let move_id = order.move_id.clone();
        let ordered = self.order_move(pid, order);
        if ordered.is_err() {
            self.hosts[host].agent.busy = None;
            return ordered;
        }
        self.agent_later(host, FOLLOW_INTERVAL, Task::FollowMove { move_id, to: target });
        Ok(())
    }

    /// Follows a move to its end, and has the target cleaned up if it was not committed.
    pub fn follow_move(&mut self, host: HostId, move_id: MoveId, to: Option<HostId>) {
        if let Some(process) = &self.hosts[host].process
            && process.source.is_some()
            && process.board.as_ref().is_some_and(|(id, end)| *id == move_id && end.is_none())
        {
            return self.agent_later(host, FOLLOW_INTERVAL, Task::FollowMove { move_id, to });
        }
        self.hosts[host].agent.busy = None;
        if let Some(to) = to
            && !self.is_committed(host, &move_id)
        {
            self.discard_at(host, to, move_id);
        }
    }

    /// Whether the move left this host for good, by the journal. A directory that is gone was released: committed.
    fn is_committed(&self, host: HostId, id: &MoveId) -> bool {
        let Some(dir) = &self.hosts[host].dir else { return true };
        match dir.look().standing() {
            Standing::Committed { move_id, .. } | Standing::Released { move_id } => move_id == id,
            // Undecided as yet: whoever settles it tells the target.
            Standing::Moving { move_id, .. } => move_id == id,
            _ => false,
        }
    }

    /// Has another host forget a move that was not committed. It would find that out itself, only later.
    pub fn discard_at(&mut self, host: HostId, to: HostId, move_id: MoveId) {
        self.ask(host, to, Ask::Discard { move_id }, LONG, Then::Nothing);
    }

    /// Directories for images to come, and the end of stale ones in their place.
    pub fn make_room(&mut self, host: HostId, places: &[DiskAt]) {
        let images = &mut self.hosts[host].images;
        for at in places {
            if images.get(&at.path).is_some_and(|i| matches!(i.stamp, Some((_, OwnerState::Stale)))) {
                images.remove(&at.path);
            }
        }
    }

    /// A file in the way of images to come: anything but the VM's own stale image of an earlier generation.
    pub fn occupied(&self, host: HostId, places: &[DiskAt], generation: u64) -> Option<String> {
        let images = &self.hosts[host].images;
        let blocks = |at: &&DiskAt| {
            let stale = |stamp| matches!(stamp, Some((old, OwnerState::Stale)) if old < generation);
            images.get(&at.path).is_some_and(|image| !stale(image.stamp))
        };
        places.iter().find(blocks).map(|at| format!("there is a file at {} already", at.path))
    }
}
