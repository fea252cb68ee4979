//! Every move ends, or waits with a named reason.

use std::fmt::Write;

use vmove_mirror::journal::Standing;

use super::super::{process::Run, world::World};

impl World {
    /// Whether nothing is left to do: one host runs the VM, none knows of a move.
    pub fn settled(&self) -> bool {
        let mut runners = 0;
        for host in self.hosts.iter().filter(|host| !host.gone) {
            if host.agent.busy.is_some() || host.agent.accepted.is_some() {
                return false;
            }
            match (&host.process, &host.dir) {
                (None, None) => {}
                (Some(process), _) => {
                    let runs = process.run == Run::Running
                        && process.source.is_none()
                        && process.target.is_none()
                        && process.machine.as_ref().is_some_and(|machine| machine.running);
                    if !runs {
                        return false;
                    }
                    runners += 1;
                }
                (None, Some(_)) => return false,
            }
        }
        runners == 1
    }

    /// Why nothing more happens though the world is not settled; none if nobody can say.
    pub fn waits_for(&self) -> Option<String> {
        let gone: Vec<usize> = self.hosts.iter().filter(|host| host.gone).map(|host| host.id).collect();
        for host in self.hosts.iter().filter(|host| !host.gone) {
            let Some(dir) = &host.dir else { continue };
            match dir.look().standing() {
                Standing::Incoming { prepared: true, from_host, .. }
                    if gone.iter().any(|g| *from_host == format!("h{g}")) =>
                {
                    return Some(format!("host {} awaits the word of {from_host}, which is gone", host.id));
                }
                Standing::Committed { to_host, .. } if gone.iter().any(|g| *to_host == format!("h{g}")) => {
                    return Some(format!("host {} has let the VM go to {to_host}, which is gone", host.id));
                }
                _ => {}
            }
        }
        for host in self.hosts.iter().filter(|host| !host.gone && host.process.is_none()) {
            let Some(dir) = &host.dir else { continue };
            if let Some(end) =
                dir.look().open_ends().iter().find(|end| gone.iter().any(|g| end.host == format!("h{g}")))
            {
                return Some(format!(
                    "host {} waits to hear that {} has not taken the VM over",
                    host.id, end.host
                ));
            }
        }
        let owner = |host: &&super::super::host::Host| {
            let dir = host.dir.as_ref();
            dir.is_some_and(|dir| {
                matches!(dir.look().standing(), Standing::Owner { .. } | Standing::Moving { .. })
            })
        };
        let left = |host: &&super::super::host::Host| {
            host.dir.as_ref().is_some_and(|dir| matches!(dir.look().standing(), Standing::Committed { .. }))
        };
        // It may have gone on from where it went.
        if let (Some(here), Some(there)) = (
            self.hosts.iter().filter(|host| !host.gone).find(left),
            self.hosts.iter().filter(|host| host.gone).find(owner),
        ) {
            return Some(format!("host {} has let the VM go, host {} has it and is gone", here.id, there.id));
        }
        // What may be all that is left of it.
        let matters = |host: &&super::super::host::Host| {
            host.dir.as_ref().is_some_and(|dir| {
                !matches!(
                    dir.look().standing(),
                    Standing::Nothing
                        | Standing::Discarded { .. }
                        | Standing::Released { .. }
                        | Standing::Incoming { prepared: false, .. }
                )
            })
        };
        let alive = self.hosts.iter().filter(|host| !host.gone).any(|host| host.dir.is_some());
        let first = self.hosts.iter().filter(|host| host.gone).find(matters)?;
        (!alive).then(|| format!("all hosts that have something of the VM are gone, such as {}", first.id))
    }

    /// Everything that can be settled must be.
    pub fn check_moves_end(&mut self, settled: bool) {
        if settled || self.waits_for().is_some() {
            return;
        }
        let mut what = String::from("it does not come to rest:");
        for host in &self.hosts {
            let standing = host.dir.as_ref().map(|dir| dir.look().standing().clone());
            let process = host.process.as_ref().map(|p| {
                let source = p.source.as_ref().map(|mv| match &mv.engine {
                    super::super::process::source::Engine::Moving(engine) => {
                        format!("source {:?} {:?}", engine.phase(), mv.blocked)
                    }
                    _ => "source committed".into(),
                });
                let target =
                    p.target.as_ref().map(|mv| format!("target {:?} {:?}", mv.engine.phase(), mv.blocked));
                format!("process {} {:?} {source:?} {target:?}", p.pid, p.run)
            });
            if standing.is_some() || process.is_some() || host.agent.busy.is_some() {
                let _ = write!(what, " [host {}: {standing:?}; {process:?}; {:?}]", host.id, host.agent.busy);
            }
        }
        self.violate("moves_end", what);
    }
}
