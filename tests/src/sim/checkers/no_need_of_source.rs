//! After the commit nothing is needed from the source: while a host is gone, a VM that another one owns runs there.

use vmove_mirror::journal::Standing;

use super::super::{process::Run, world::World};

impl World {
    /// Looked at while hosts are gone and all others have had their time.
    pub fn check_no_need_of_source(&mut self) {
        for host in self.hosts.iter().filter(|host| !host.gone) {
            let Some(dir) = &host.dir else { continue };
            let journal = dir.look();
            // Before a start it is heard that no target of an aborted move was taken over.
            let owner =
                matches!(journal.standing(), Standing::Owner { .. }) && journal.open_ends().is_empty();
            let runs = host.process.as_ref().is_some_and(|process| process.run == Run::Running);
            if owner && !runs {
                let what = format!("host {} owns the VM and does not run it while others are gone", host.id);
                return self.violate("no_need_of_source", what);
            }
        }
    }
}
