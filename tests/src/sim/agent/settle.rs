//! What is done with a VM whose process has ended, as `cli::agent::settle` does it: the failure table (`vmove_mirror::recovery`, the
//! very function) carried out, and the words that decide it.
//!
//! Never enters: the table itself.

use std::collections::BTreeSet;

use vmove_compute::migrate::VmJournal;
use vmove_mirror::{
    journal::{DiskAt, Journal, MoveId, Record, Standing, Verdict},
    recovery::{Holding, PeerAnswer, Question, Row, Settlement, holding, question, settle},
    target,
};
use vmove_storage::{OwnerState, journal_file};

use super::{
    super::{HostId, Pid, host::Start, marks::Mark, mutations::Mutation, world::World},
    BUSY_INTERVAL, Busy, LAST_GAP, Task, number,
    rpc::{Answer, Ask, SHORT, Then},
};

impl World {
    /// One attempt to bring a VM without a process to what the failure table says.
    pub fn settle_once(&mut self, host: HostId, gap: u64) {
        let it = &mut self.hosts[host];
        if it.agent.busy.is_some() {
            return self.agent_later(host, BUSY_INTERVAL, Task::Settle { gap });
        }
        if it.dir.is_none() || it.process.is_some() {
            return;
        }
        let Some(journal) = self.agent_reads(host) else {
            return self.agent_later(host, gap, Task::Settle { gap: (gap * 2).min(LAST_GAP) });
        };
        let (other, asked) = match question(&journal) {
            None => return self.carry_out(host, &journal, PeerAnswer::NotAsked, gap),
            Some(Question::Verdict { host, move_id }) => (host, Ask::Verdict { move_id: move_id.clone() }),
            Some(Question::Holding { host, move_id }) => (host, Ask::Holding { move_id: move_id.clone() }),
        };
        let Some(other) = number(other) else { return };
        let left = match journal.standing() {
            // The VM may have gone on from there.
            Standing::Committed { .. } => {
                (0..self.hosts.len()).filter(|third| *third != host && *third != other).collect()
            }
            _ => Vec::new(),
        };
        self.hosts[host].agent.busy = Some(Busy::Settling);
        self.ask(host, other, asked, SHORT, Then::Settle { left, gap });
    }

    /// Another host has said what was asked, or could not be asked.
    pub fn settle_answered(&mut self, host: HostId, answer: Option<Answer>, mut left: Vec<HostId>, gap: u64) {
        let owned = matches!(answer, Some(Answer::Holds(Holding::Owner { .. })));
        if let Some(next) = left.pop().filter(|_| !owned)
            && let Some(Standing::Committed { move_id, .. }) = self.stands(host)
        {
            return self.ask(host, next, Ask::Holding { move_id }, SHORT, Then::Settle { left, gap });
        }
        let it = &mut self.hosts[host];
        it.agent.busy = None;
        if it.dir.is_none() || it.process.is_some() {
            return;
        }
        let Some(journal) = self.agent_reads(host) else {
            return self.agent_later(host, gap, Task::Settle { gap: (gap * 2).min(LAST_GAP) });
        };
        let answer = match answer {
            Some(Answer::Word(verdict)) => PeerAnswer::Said(verdict),
            Some(Answer::Holds(holding)) => PeerAnswer::Holds(holding),
            _ => PeerAnswer::Unreachable,
        };
        self.carry_out(host, &journal, answer, gap);
    }

    fn carry_out(&mut self, host: HostId, journal: &Journal, answer: PeerAnswer, gap: u64) {
        let standing = journal.standing();
        let settlement = settle(standing, answer);
        self.marks.hit(Mark::Settled(Row::of(journal, answer)));
        self.note(|| {
            let Row { here, heard } = Row::of(journal, answer);
            format!("host {host}: settles {here:?}, heard {heard:?}: {settlement:?}")
        });
        let soon = Task::Settle { gap };
        let record = match (settlement, standing, journal.open_ends().first(), answer) {
            (Settlement::Abort, Standing::Moving { .. }, ..) => {
                let delay = if self.abort_source(host, standing) { 1 } else { gap };
                return self.agent_later(host, delay, soon);
            }
            (Settlement::Clear, _, Some(end), _) => Some(Record::Cleared { move_id: end.move_id.clone() }),
            (Settlement::Lose, _, Some(end), PeerAnswer::Holds(Holding::Owner { generation })) => {
                Some(Record::Lost { move_id: end.move_id.clone(), host: end.host.clone(), generation })
            }
            (Settlement::OwnThenBoot, Standing::Incoming { generation, disks, .. }, ..) => {
                Some(Record::Owner { generation: *generation, disks: disks.clone() })
            }
            (Settlement::AbortThenDiscard, Standing::Incoming { move_id, .. }, ..) => {
                Some(Record::Aborted { move_id: move_id.clone() })
            }
            (Settlement::ReleaseThenDiscard, Standing::Committed { move_id, .. }, ..) => {
                Some(Record::Released { move_id: move_id.clone() })
            }
            _ => None,
        };
        if let Some(record) = record
            && !self.agent_appends(host, &record)
        {
            return self.agent_later(host, gap, Task::Settle { gap: (gap * 2).min(LAST_GAP) });
        }
        match settlement {
            Settlement::Startable => {
                self.clear_left_behind(host, standing);
                if self.never_ran(host, standing) {
                    self.agent_boots(host);
                }
            }
            Settlement::Abort | Settlement::Clear | Settlement::Lose => self.agent_later(host, 1, soon),
            Settlement::OwnThenBoot => self.agent_boots(host),
            Settlement::AbortThenDiscard | Settlement::ReleaseThenDiscard | Settlement::Discard => {
                self.discard(host);
            }
            Settlement::Keep => {}
            Settlement::Fenced | Settlement::Ask => {
                self.agent_later(host, gap, Task::Settle { gap: (gap * 2).min(LAST_GAP) });
            }
        }
    }

    /// Starts a VM that has stopped, as its user wishes, once it is settled.
    pub fn agent_starts_vm(&mut self, host: HostId) {
        let Some(journal) = self.agent_reads(host) else { return };
        if !journal.open_ends().is_empty() {
            // It is being asked whether the VM was taken over.
            return;
        }
        self.clear_left_behind(host, journal.standing());
        self.agent_boots(host);
    }

    /// A source whose process died before the commit: the move is off, the VM can be started again.
    fn abort_source(&mut self, host: HostId, standing: &Standing) -> bool {
        let Standing::Moving { move_id, to_host, .. } = standing else { return true };
        if let Some(dir) = &mut self.hosts[host].dir {
            // Nobody else tells how the move ended.
            dir.reports.entry(move_id.clone()).or_insert(false);
        }
        if !self.agent_appends(host, &Record::Aborted { move_id: move_id.clone() }) {
            return false;
        }
        if let Some(to) = to_host.as_deref().and_then(number) {
            self.discard_at(host, to, move_id.clone());
        }
        true
    }

    /// Reads the journal of a VM without a process: what the process wrote and did not sync is made durable first, or this fails.
    fn agent_reads(&mut self, host: HostId) -> Option<Journal> {
        let dir = self.hosts[host].dir.as_ref()?;
        if self.mutation == Some(Mutation::BelieveUnsynced) {
            return Some(dir.look());
        }
        let fold = VmJournal::open_at(dir.journal.clone()).map(|journal| journal.fold().clone());
        if dir.journal.struck().is_some() {
            self.agent_dies(host);
            self.after(1_000_000, super::super::world::Happening::Back(host));
            return None;
        }
        fold.ok()
    }

    /// Appends a record with nobody else at the journal.
    pub fn agent_appends(&mut self, host: HostId, record: &Record) -> bool {
        let Some(dir) = &self.hosts[host].dir else { return false };
        let appended =
            VmJournal::open_at(dir.journal.clone()).map(|mut journal| journal.append(record).is_ok());
        if dir.journal.struck().is_some() {
            // The agent has no process of its own to lose here: it dies.
            self.agent_dies(host);
            self.after(1_000_000, super::super::world::Happening::Back(host));
            return false;
        }
        appended.unwrap_or(false)
    }

    fn stands(&self, host: HostId) -> Option<Standing> {
        Some(self.hosts[host].dir.as_ref()?.look().standing().clone())
    }

    /// What this host holds of the VM, if its disk bears that out. That it was taken over here is never forgotten: a source that comes
    /// back must learn of it.
    pub fn holds(&mut self, here: HostId, id: &MoveId) -> Option<Holding> {
        let it = &self.hosts[here];
        let held = match (&it.dir, &it.process) {
            (None, _) => Holding::Nothing,
            (Some(_), None) => holding(self.agent_reads(here)?.standing()),
            (Some(dir), Some(_)) => {
                let journal = dir.look();
                // A sync beside a writer is as good as one of its own: both fail, or both write what is dirty.
                (self.mutation == Some(Mutation::BelieveUnsynced) || dir.journal.sync_beside())
                    .then(|| holding(journal.standing()))?
            }
        };
        let by_journal = self.records(here).into_iter().find_map(|record| match record {
            Record::TakenOver { move_id, generation, .. } if move_id == *id => Some(generation),
            _ => None,
        });
        Some(match (held, by_journal.or_else(|| self.hosts[here].taken.get(id).copied())) {
            (Holding::Nothing, Some(generation)) => Holding::Owner { generation },
            (held, _) => held,
        })
    }

    /// Removes what is here of a VM that is not this host's: images, directory. Reports of moves are kept.
    fn discard(&mut self, host: HostId) {
        let Some(dir) = &self.hosts[host].dir else { return };
        match dir.look().standing().clone() {
            Standing::Released { .. } => self.retire(host),
            Standing::Incoming { disks, .. } | Standing::Discarded { disks, .. } => {
                let arrived = self.records(host).into_iter().rev().find_map(|record| match record {
                    Record::Incoming { generation, .. } => Some(generation),
                    _ => None,
                });
                self.remove_arrived(host, arrived.unwrap_or(0), &disks);
            }
            _ => {
                let launch = dir.launch.clone();
                if let Some(launch) = launch.filter(|launch| matches!(launch.start, Start::Incoming { .. })) {
                    self.remove_arrived(host, launch.generation, &launch.disks);
                }
            }
        }
        self.forget(host);
    }

    fn forget(&mut self, host: HostId) {
        let records = self.records(host);
        let it = &mut self.hosts[host];
        if let Some(dir) = it.dir.take() {
            it.archive.extend(dir.reports);
        }
        let mut left = BTreeSet::new();
        for record in records {
            match record {
                Record::TakenOver { move_id, generation, .. } => drop(it.taken.insert(move_id, generation)),
                Record::Moving { move_id, .. } => drop(left.insert(move_id)),
                // Its process may have died between the record and the report.
                Record::Aborted { move_id } if left.contains(&move_id) => {
                    it.archive.entry(move_id).or_insert(false);
                }
                _ => {}
            }
        }
        self.note(|| format!("host {host}: nothing of the VM is left here"));
    }

    /// Removes what is kept of a VM that was taken over from this host, by its user's word (`vmove recover --discard`).
    pub fn discard_lost(&mut self, host: HostId) {
        let Some(dir) = &self.hosts[host].dir else { return };
        let Standing::Lost { disks, .. } = dir.look().standing().clone() else { return };
        for at in disks {
            self.hosts[host].images.remove(&at.path);
        }
        self.forget(host);
    }

    fn records(&self, host: HostId) -> Vec<Record> {
        let Some(dir) = &self.hosts[host].dir else { return Vec::new() };
        let bytes = journal_file::records(&dir.journal).unwrap_or_default();
        bytes.iter().filter_map(|bytes| Record::decode(bytes).ok()).collect()
    }

    fn remove_arrived(&mut self, host: HostId, generation: u64, disks: &[DiskAt]) {
        let images = &mut self.hosts[host].images;
        for at in disks {
            if matches!(images.get(&at.path).and_then(|i| i.stamp), Some((g, OwnerState::Incoming)) if g <= generation)
            {
                images.remove(&at.path);
            }
        }
    }

    /// Images of a VM that runs elsewhere: removed, or kept as stale if that was asked for.
    fn retire(&mut self, host: HostId) {
        let records = self.records(host);
        if let Some((generation, disks)) = records.iter().rev().find_map(Record::owned) {
            self.retire_disks(host, generation, disks);
        }
    }

    /// Ends what moves of a VM of this host left in its datastores, when their process, or the agent that settled them, died before it
    /// could: images that were to be the VM's, and those it had before.
    fn clear_left_behind(&mut self, host: HostId, standing: &Standing) {
        let Standing::Owner { generation: current, disks } = standing else { return };
        for (generation, had) in self.records(host).iter().filter_map(Record::owned) {
            if generation < *current {
                let mut left = had.to_vec();
                left.retain(|old| disks.iter().all(|at| at.path != old.path));
                self.retire_disks(host, generation, &left);
            }
        }
        self.hosts[host].images.retain(|path, image| {
            !matches!(image.stamp, Some((_, OwnerState::Incoming))) || disks.iter().any(|at| at.path == *path)
        });
    }

    fn retire_disks(&mut self, host: HostId, generation: u64, disks: &[DiskAt]) {
        let it = &mut self.hosts[host];
        let keep = it.dir.as_ref().is_some_and(|dir| dir.keep_source);
        for at in disks {
            let Some((found, OwnerState::Owned)) = it.images.get(&at.path).and_then(|image| image.stamp)
            else {
                continue;
            };
            if found > generation {
                continue;
            }
            if !keep {
                it.images.remove(&at.path);
            } else if let Some(image) = it.images.get_mut(&at.path) {
                image.stamp = Some((found, OwnerState::Stale));
            }
        }
    }

    /// Whether a VM came here by a committed move and its process died before the guest went on.
    fn never_ran(&self, host: HostId, standing: &Standing) -> bool {
        let (it, Standing::Owner { generation, disks }) = (&self.hosts[host], standing) else { return false };
        let incoming = |dir: &super::super::host::VmDir| {
            dir.launch.as_ref().is_some_and(|launch| matches!(launch.start, Start::Incoming { .. }))
        };
        it.dir.as_ref().is_some_and(incoming)
            && disks.iter().any(|at| {
                // A take-over has raised the generation meanwhile.
                let stamp = it.images.get(&at.path).and_then(|i| i.stamp);
                matches!(stamp, Some((arrived, OwnerState::Incoming)) if arrived <= *generation)
            })
    }

    /// How a move from here went, for the host that asks.
    pub fn verdict(&mut self, from: HostId, here: HostId, id: &MoveId) -> Verdict {
        let it = &self.hosts[here];
        let fold = it.dir.as_ref().map_or_else(Journal::default, super::super::host::VmDir::look);
        if let Standing::Moving { move_id, to_host, .. } = fold.standing()
            && move_id == id
            && to_host.as_deref().and_then(number) != Some(from)
        {
            return Verdict::Moving;
        }
        if let Some(process) = &it.process {
            let pid = process.pid;
            return match self.process_verdict(pid, id) {
                // The VM has been away and is back since, with a journal that begins then.
                Verdict::Unknown => self.archived_verdict(here, id),
                verdict => verdict,
            };
        }
        match fold.verdict(id) {
            // This is never taken back: it must rest on what is on disk.
            Verdict::Committed if self.agent_reads(here).is_some() => Verdict::Committed,
            Verdict::Committed => Verdict::Moving,
            Verdict::Moving => {
                if self.agent_appends(here, &Record::Aborted { move_id: id.clone() }) {
                    self.agent_later(here, 1, Task::Settle { gap: super::FIRST_GAP });
                    Verdict::Aborted
                } else {
                    Verdict::Moving
                }
            }
            Verdict::Aborted => Verdict::Aborted,
            Verdict::Unknown => self.archived_verdict(here, id),
        }
    }

    /// The word on a move that the journal knows nothing of: the VM's directory has gone since, its reports were kept.
    fn archived_verdict(&self, here: HostId, id: &MoveId) -> Verdict {
        match self.hosts[here].archive.get(id) {
            Some(true) => Verdict::Committed,
            Some(false) => Verdict::Aborted,
            None => Verdict::Unknown,
        }
    }

    /// The source's word for a process that cannot hear it.
    pub fn word_fetched(&mut self, host: HostId, pid: Pid, id: &MoveId, answer: Option<Answer>) {
        let Some(Answer::Word(verdict @ (Verdict::Committed | Verdict::Aborted))) = answer else { return };
        let Some(process) = self.hosts[host].process.as_ref().filter(|process| process.pid == pid) else {
            return;
        };
        if process.target.as_ref().is_some_and(|mv| mv.move_id == *id) {
            self.post_target(pid, target::Event::Resolved(verdict));
        }
    }
}
