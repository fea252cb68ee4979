//! RAM and disks are equal when the other side takes over: what the source held when it began its commit is what the target runs.

use std::collections::BTreeMap;

use vmove_mirror::journal::MoveId;

use super::super::{HostId, Pid, process::Process, storage::read_as, world::World};

/// What a source held.
#[derive(Debug)]
struct Switch {
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
    /// A source begins its commit: nothing of the guest changes any more.
    pub fn remember_switch(&mut self, pid: Pid) {
        let count = self.shape.disks.len();
        let disks = (0..count).filter_map(|disk| self.disk_contents(pid, disk)).map(readable).collect();
        let Some(Process { machine: Some(machine), source: Some(mv), .. }) = self.process(pid) else {
            return;
        };
        let quiet = machine.quiet() && !machine.running;
        let switch = Switch { ram: machine.ram.clone(), disks };
        let id = mv.order.move_id.clone();
        self.checkers.switch.0.insert(id, switch);
        if !quiet {
            self.violate("equal_at_switch", "the source commits while its guest is not at rest");
        }
    }

    /// A target is about to run what arrived.
    pub fn check_switch(&mut self, pid: Pid, host: HostId) {
        let Some(Process { target: Some(mv), disks, .. }) = self.process(pid) else { return };
        let (id, ram, disks) = (mv.move_id.clone(), mv.ram.clone(), disks.clone());
        let Some(switch) = self.checkers.switch.0.get(&id) else {
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
