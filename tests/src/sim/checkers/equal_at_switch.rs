//! RAM and disks are equal when the other side takes over: what the source held when it began its commit is what the target runs.

use std::collections::BTreeMap;

use vmove_mirror::journal::{DiskAt, MoveId, Standing, TAKE_OVER_STEP};

use super::super::{HostId, Pid, process::Process, storage::read_as, world::World};

/// What a source held.
#[derive(Debug)]
struct Switch {
    /// It had begun to commit, not only to prove.
    committing: bool,
    ram: Vec<u64>,
    disks: Vec<Vec<u64>>,
}

/// What sources held when they began to commit, by move.
#[derive(Debug, Default)]
pub struct Switches(BTreeMap<MoveId, Switch>);

fn readable(contents: Vec<u64>) -> Vec<u64> {
    contents.into_iter().map(read_as).collect()
}

impl World {
    /// A source has made its proof, or begins its commit: nothing of the guest changes any more.
    pub fn remember_switch(&mut self, pid: Pid, committing: bool) {
        let count = self.shape.disks.len();
        let disks = (0..count).filter_map(|disk| self.disk_contents(pid, disk)).map(readable).collect();
        let Some(Process { machine: Some(machine), source: Some(mv), .. }) = self.process(pid) else {
            return;
        };
        let quiet = machine.quiet() && !machine.running;
        let switch = Switch { committing, ram: machine.ram.clone(), disks };
        let id = mv.order.move_id.clone();
        self.checkers.switch.0.insert(id, switch);
        if !quiet {
            self.violate("equal_at_switch", "the source proves or commits while its guest is not at rest");
        }
    }

    /// A target is about to run what arrived.
    pub fn check_switch(&mut self, pid: Pid, host: HostId) {
        let Some(Process { target: Some(mv), disks, journal, .. }) = self.process(pid) else { return };
        let taken_over =
            matches!(journal.standing(), Standing::Owner { generation, .. } if *generation >= TAKE_OVER_STEP);
        let (id, ram, disks) = (mv.move_id.clone(), mv.ram.clone(), disks.clone());
        let switch = self.checkers.switch.0.get(&id).filter(|switch| switch.committing || taken_over);
        let Some(switch) = switch else {
            return self.violate("equal_at_switch", "the target runs what its source never began to commit");
        };
        let mut faults = Vec::new();
        if let Some(page) = switch.ram.iter().zip(&ram).position(|(a, b)| a != b) {
            faults.push(format!("page {page} differs: {} left, {} arrived", switch.ram[page], ram[page]));
        }
        for (index, (left, at)) in switch.disks.iter().zip(&disks).enumerate() {
            let Some(image) = self.hosts[host].images.get(&at.path) else {
                faults.push(format!("image {} is not there", at.path));
                continue;
            };
            let arrived = readable(image.contents());
            if let Some(sector) = left.iter().zip(&arrived).position(|(a, b)| a != b) {
                faults.push(format!(
                    "disk {index} sector {sector} differs: {} left, {} arrived",
                    left[sector], arrived[sector]
                ));
            }
        }
        if !faults.is_empty() {
            self.violate("equal_at_switch", faults.join("; "));
        }
    }

    /// A VM is taken over where it was prepared: its disks are those that its source had when it made its proof. What the source may have
    /// done since is lost, which is what the operator was told.
    pub fn check_taken_over(&mut self, host: HostId, id: &MoveId, disks: &[DiskAt]) {
        let Some(switch) = self.checkers.switch.0.get(id) else {
            return self.violate("equal_at_switch", "what is taken over was never proved by its source");
        };
        let mut fault = None;
        for (index, (left, at)) in switch.disks.iter().zip(disks).enumerate() {
            let Some(image) = self.hosts[host].images.get(&at.path) else { continue };
            let arrived = readable(image.contents());
            if *left != arrived {
                fault = Some(format!("disk {index} that is taken over is not as it was at the switch"));
            }
            self.checkers.flushed.taken_over(index, &arrived);
        }
        if let Some(fault) = fault {
            self.violate("equal_at_switch", fault);
        }
    }

    /// A guest is about to be given a new image in the place of its old one.
    pub fn check_pivot(&mut self, pid: Pid, disk: usize, host: HostId, path: &str) {
        let (Some(old), Some(new)) = (self.disk_contents(pid, disk), self.hosts[host].images.get(path))
        else {
            return self.violate("equal_at_switch", format!("an image of disk {disk} is not there"));
        };
        if readable(old) != readable(new.contents()) {
            self.violate("equal_at_switch", format!("the new image of disk {disk} differs from the old one"));
        }
    }
}
