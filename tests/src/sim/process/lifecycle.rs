//! The VM process from start to end, as `compute::process::owner` is: booting, what agents ask of it, its images' stamps.
//!
//! Never enters: moves in progress.

use vmove_compute::migrate::VmJournal;
use vmove_mirror::{
    journal::{MoveId, Record, Standing, Verdict},
    source, target,
};
use vmove_storage::OwnerState;

use super::{
    super::{
        HostId, Pid,
        host::{Launch, Start},
        mutations::Mutation,
        storage::{Image, JournalFault},
        world::{Happening, World},
    },
    Process, Run,
    machine::Machine,
    source::Order,
};

impl World {
    /// Starts the VM process of a host; why not, if it ends at once.
    pub fn start_process(&mut self, host: HostId, ticket: [u8; 16]) -> Result<Pid, String> {
        let it = &mut self.hosts[host];
        let dir = it.dir.as_ref().ok_or("there is no VM")?;
        let Launch { generation, disks, start } = dir.launch.clone().ok_or("there is no launch file")?;
        if it.process.is_some() {
            return Err("a process is there already".into());
        }
        let journal = VmJournal::open_at(dir.journal.clone()).map_err(|e| e.to_string())?;
        let pid = self.next_pid;
        self.next_pid += 1;
        let run = if start == Start::Boot { Run::Running } else { Run::Incoming };
        let process = Process {
            pid,
            run,
            journal,
            machine: None,
            generation,
            disks,
            source: None,
            target: None,
            board: None,
        };
        it.process = Some(Box::new(process));
        self.note(|| format!("host {host}: process {pid} starts: {start:?}"));
        match start {
            Start::Boot => {
                if let Err(why) = self.boot(host, pid) {
                    self.process_ends(host, &why);
                    return Err(why);
                }
            }
            Start::Incoming { move_id, from } => self.begin_target(pid, move_id, from, ticket),
        }
        Ok(pid)
    }

    /// Makes sure that the journal gives this host the VM, ends what a crash left open, brings the stamps up to date, and boots.
    fn boot(&mut self, host: HostId, pid: Pid) -> Result<(), String> {
        let pages = self.shape.pages;
        let Some(process) = self.process(pid) else { return Err("gone".into()) };
        let appended = match process.journal.standing().clone() {
            Standing::Nothing => {
                let (generation, disks) = (process.generation, process.disks.clone());
                process.journal.append(&Record::Owner { generation, disks })
            }
            // The process that moved it died before the commit: it can never commit now.
            Standing::Moving { move_id, .. } => process.journal.append(&Record::Aborted { move_id }),
            Standing::Owner { .. } => Ok(()),
            other => return Err(format!("the VM may not be started here: {other:?}")),
        };
        let standing = process.journal.standing().clone();
        if self.journal_struck(host, pid) {
            return Err("ended".into());
        }
        appended.map_err(|e| e.to_string())?;
        let Standing::Owner { generation, disks } = standing else { return Err("not the owner".into()) };
        for at in &disks {
            let Some(image) = self.hosts[host].images.get_mut(&at.path) else {
                return Err(format!("the image {} is not there", at.path));
            };
            match image.stamp {
                Some((_, OwnerState::Stale)) => return Err(format!("{} is stale", at.path)),
                Some((newer, _)) if newer > generation => {
                    return Err(format!("{} is at generation {newer}", at.path));
                }
                _ => {}
            }
        }
        for at in &disks {
            if let Some(image) = self.hosts[host].images.get_mut(&at.path) {
                image.stamp = Some((generation, OwnerState::Owned));
            }
        }
        let Some(process) = self.process(pid) else { return Err("gone".into()) };
        process.generation = generation;
        process.disks.clone_from(&disks);
        process.machine = Some(Machine::new(pages, &disks));
        self.check_boot(host, &disks);
        self.resume_guest(pid);
        Ok(())
    }

    /// Generation a process knows.
    pub fn generation_of(&mut self, pid: Pid) -> u64 {
        self.process(pid).map_or(0, |process| process.generation)
    }

    /// Makes an image, stamped as incoming. What an earlier attempt of this VM left behind is rubbish; anything else is somebody's.
    pub fn make_image(
        &mut self,
        host: HostId,
        path: &str,
        sectors: usize,
        generation: u64,
    ) -> Result<(), String> {
        let it = &mut self.hosts[host];
        if let Some((found, OwnerState::Incoming | OwnerState::Stale)) =
            it.images.get(path).and_then(|i| i.stamp)
            && found <= generation
        {
            it.images.remove(path);
        }
        if it.images.contains_key(path) {
            return Err(format!("make image {path}: it exists"));
        }
        if std::mem::take(&mut it.disk_full) {
            return Err(format!("make image {path}: no space left"));
        }
        it.images.insert(path.to_owned(), Image::new(sectors, Some((generation, OwnerState::Incoming))));
        Ok(())
    }

    /// Removes images made for an arrival that does not come; one that anybody else stamped is not touched.
    pub fn discard_images(&mut self, host: HostId, paths: &[String], generation: u64) {
        for path in paths {
            let stamp = self.hosts[host].images.get(path).and_then(|image| image.stamp);
            if stamp == Some((generation, OwnerState::Incoming)) {
                self.hosts[host].images.remove(path);
            }
        }
    }

    /// A fault at the journal that ends the process or the host is carried out; whether one was.
    pub fn journal_struck(&mut self, host: HostId, pid: Pid) -> bool {
        let struck = self.hosts[host].dir.as_ref().and_then(|dir| dir.journal.struck());
        match struck {
            Some(JournalFault::DiesUnsynced) => {
                self.kill(pid, "killed between a record's write and its sync");
            }
            Some(JournalFault::DiesThenPowerCut) => {
                self.kill(pid, "killed between a record's write and its sync");
                let later = self.dice.disk.range(1_000..3_000_000);
                self.after(later, Happening::PowerCut(host));
            }
            Some(JournalFault::PowerCut) => self.power_cut(host, Some(3_000_000)),
            _ => return false,
        }
        true
    }

    /// A move has ended without a commit; the VM is here.
    pub fn move_stayed(&mut self, pid: Pid, host: HostId, reason: String) {
        let Some(process) = self.process(pid) else { return };
        let Some(mv) = process.source.take() else { return };
        process.board = Some((mv.order.move_id.clone(), Some(reason.clone())));
        self.note(|| format!("host {host}: the move has ended, the VM stays: {reason}"));
        self.check_runs_on(pid);
        self.move_ended(&mv.order.move_id, false, &reason);
    }

    /// An agent orders a move.
    pub fn order_move(&mut self, pid: Pid, order: Order) -> Result<(), String> {
        let Some(process) = self.process(pid) else { return Err("the process is gone".into()) };
        if process.source.is_some() {
            return Err("the VM is on the move already".into());
        }
        if process.machine.is_none() || process.run != Run::Running {
            return Err("the VM does not run here".into());
        }
        self.end_dangling(pid)?;
        self.begin_source(pid, order);
        Ok(())
    }

    /// A move whose end could not be journalled is over all the same; its record is made up for.
    fn end_dangling(&mut self, pid: Pid) -> Result<(), String> {
        let Some(host) = self.host_of(pid) else { return Err("gone".into()) };
        let Some(process) = self.process(pid) else { return Err("gone".into()) };
        let Standing::Moving { move_id, .. } = process.journal.standing().clone() else { return Ok(()) };
        let appended = process.journal.append(&Record::Aborted { move_id });
        if self.journal_struck(host, pid) {
            return Err("gone".into());
        }
        appended.map_err(|e| e.to_string())
    }

    /// The source's word on a move, as its process gives it; a target that asks cannot hear it, so the move is given up.
    pub fn process_verdict(&mut self, pid: Pid, id: &MoveId) -> Verdict {
        let hasty = self.mutation == Some(Mutation::AbortUnjournalled);
        let Some(process) = self.process(pid) else { return Verdict::Moving };
        let answer = process.journal.fold().verdict(id);
        if answer == Verdict::Moving && hasty {
            return Verdict::Aborted;
        }
        if answer == Verdict::Moving {
            if process.source.is_some() {
                self.post_source(pid, source::Event::LinkLost("the target has asked how it ended".into()));
            } else if self.end_dangling(pid).is_ok() {
                return Verdict::Aborted;
            }
        }
        answer
    }

    /// The user, or an agent, gives a move up at this process.
    pub fn cancel_process(&mut self, pid: Pid) {
        match self.process(pid) {
            Some(Process { source: Some(_), .. }) => self.post_source(pid, source::Event::Cancel),
            Some(Process { target: Some(_), .. }) => {
                self.post_target(pid, target::Event::Failed("cancelled".into()));
            }
            _ => {}
        }
    }
}
