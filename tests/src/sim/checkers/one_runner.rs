//! At most one machine runs the VM at any instant.

use super::super::world::World;

impl World {
    /// Looked at whenever vCPUs are started: they only stop otherwise.
    pub fn check_one_runner(&mut self) {
        let runs = |host: &&super::super::host::Host| {
            host.process.as_ref().is_some_and(|p| p.machine.as_ref().is_some_and(|machine| machine.running))
        };
        let runners: Vec<usize> = self.hosts.iter().filter(runs).map(|host| host.id).collect();
        if runners.len() > 1 {
            self.violate("one_runner", format!("hosts {runners:?} run the VM at once"));
        }
    }
}
