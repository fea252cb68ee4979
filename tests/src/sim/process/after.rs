//! The source's driver after the commit, as `compute::migrate::source::after` is: it helps the target, retires its images, ends.
//!
//! Never enters: a way back.

use vmove_mirror::{
    block,
    committed::{CommittedAction, CommittedEvent},
    source::Event,
    wire::control::TargetMsg,
};
use vmove_storage::OwnerState;

use super::{
    super::{HostId, Pid, marks::Mark, world::World},
    Process, Run,
    machine::Gate,
    source::{Do, Engine},
};

/// How long the target may take to say that it runs (`RUNNING` of the driver).
const PATIENCE: u64 = 30_000_000;

impl World {
    /// The commit record is on disk.
    pub fn source_committed(&mut self, pid: Pid) {
        let now = self.now;
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        let Engine::Moving(engine) = std::mem::replace(&mut mv.engine, Engine::Between) else { return };
        let (committed, actions) = engine.committed(now);
        mv.engine = Engine::Committed(Box::new(committed));
        mv.committed_at = now;
        mv.todo = actions.into_iter().map(Do::After).collect();
        self.marks.hit(Mark::Committed);
        self.note(|| format!("process {pid}: COMMITTED"));
    }

    /// An event after the commit.
    pub fn after_event(&mut self, pid: Pid, event: Event) {
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        let event = match event {
            Event::Target(TargetMsg::Running { resume_us }) => CommittedEvent::Running { resume_us },
            // The data connections may end before the control connection has brought the last word.
            Event::LinkLost(_) if mv.control_lost => CommittedEvent::LinkLost,
            _ => return,
        };
        self.after_step(pid, event);
    }

    /// The target has had its time to say that it runs.
    pub fn after_patience(&mut self, pid: Pid) {
        let now = self.now;
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        if now > mv.committed_at + PATIENCE {
            self.after_step(pid, CommittedEvent::LinkLost);
            self.source_goes_on(pid);
        }
    }

    fn after_step(&mut self, pid: Pid, event: CommittedEvent) {
        let now = self.now;
        let kind = match &event {
            CommittedEvent::Running { .. } => "Running",
            CommittedEvent::Pivoted => "Pivoted",
            CommittedEvent::LinkLost => "LinkLost",
            CommittedEvent::Journaled => "Journaled",
        };
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        let Engine::Committed(committed) = &mut mv.engine else { return };
        let actions = committed.step(now, event);
        let some = !actions.is_empty();
        mv.todo.extend(actions.into_iter().map(Do::After));
        if some {
            self.marks.hit(Mark::After(kind));
        }
    }

    /// Does what is to be done after the commit.
    pub fn after_act(&mut self, pid: Pid, action: CommittedAction) {
        let Some(host) = self.host_of(pid) else { return };
        self.note(|| format!("process {pid}: committed source {action:?}"));
        match action {
            CommittedAction::Tell(message) => self.source_tells(pid, &message),
            CommittedAction::Pivot => self.pivot(pid, host),
            CommittedAction::Journal(record) => {
                let Some(process) = self.process(pid) else { return };
                // It only saves a later question.
                let _ = process.journal.append(&record);
                if !self.journal_struck(host, pid) {
                    self.after_step(pid, CommittedEvent::Journaled);
                }
            }
            CommittedAction::Retire => {
                if let Some(Process { source: Some(mv), .. }) = self.process(pid) {
                    mv.retire = true;
                }
            }
            CommittedAction::Finish { confirmed } => self.after_end(pid, host, confirmed),
        }
    }

    fn pivot(&mut self, pid: Pid, host: HostId) {
        let generation = self.generation_of(pid) + 1;
        let Some(Process { source: Some(mv), .. }) = self.process(pid) else { return };
        let copies = mv.order.copies.clone();
        for (disk, at) in copies {
            self.check_pivot(pid, disk, host, &at.path);
            self.mirror_step(pid, disk, block::Event::TargetLost);
            self.close_tap(pid, disk);
            self.gate(pid, disk, Gate::Pivot(at.clone()));
            if let Some(image) = self.hosts[host].images.get_mut(&at.path) {
                image.stamp = Some((generation, OwnerState::Owned));
            }
        }
        self.resume_guest(pid);
        self.after_step(pid, CommittedEvent::Pivoted);
    }

    fn after_end(&mut self, pid: Pid, host: HostId, confirmed: bool) {
        let Some(process) = self.process(pid) else { return };
        let old = process.disks.clone();
        let generation = process.generation;
        let Some(mv) = process.source.take() else { return };
        process.board = Some((mv.order.move_id.clone(), Some("committed".into())));
        let here = mv.order.to.is_none();
        if here {
            for (disk, at) in &mv.order.copies {
                process.disks[*disk] = at.clone();
            }
            process.generation += 1;
        } else {
            process.run = Run::Leaving;
        }
        if mv.retire {
            let left = |index: &usize| !here || mv.order.copies.iter().any(|(disk, _)| disk == index);
            for index in (0..old.len()).filter(left) {
                let path = &old[index].path;
                if !mv.order.keep_source {
                    self.hosts[host].images.remove(path);
                } else if let Some(image) = self.hosts[host].images.get_mut(path) {
                    image.stamp = Some((generation, OwnerState::Stale));
                }
            }
        }
        if let Some(conn) = mv.control {
            self.close(conn, 0);
        }
        for conn in mv.local.iter().filter_map(|arrival| arrival.conn) {
            self.close(conn, 1);
        }
        self.move_ended(&mv.order.move_id, true, "committed");
        if !here {
            self.process_ends(
                host,
                if confirmed { "the VM has left" } else { "the VM has left, unconfirmed" },
            );
        }
    }
}
