//! After any failure before the commit the source runs on as if nothing had happened, and no request of the guest hangs.

use vmove_mirror::Micros;

use super::super::{
    Pid,
    process::{Process, machine::Request},
    world::{Violation, World},
};

/// Longest a request may take, microseconds: the stall limit, or the longest pause a driver bears, and the way back.
const LONGEST: Micros = 640_000_000;

/// Looks at each request of the guest.
#[derive(Debug)]
pub struct RunsOn;

impl RunsOn {
    /// A request is complete.
    pub fn completed(&self, request: &Request, now: Micros) -> Option<Violation> {
        (now > request.since + LONGEST).then(|| Violation {
            checker: "runs_on",
            what: format!("a request of the guest took {} s", (now - request.since) / 1_000_000),
            at: now,
        })
    }
}

impl World {
    /// A move has ended without a commit.
    pub fn check_runs_on(&mut self, pid: Pid) {
        let Some(process) = self.process(pid) else { return };
        let Process { machine: Some(machine), .. } = process else {
            return self.violate("runs_on", "the machine is gone though the move was not committed");
        };
        let fault = if !machine.running {
            Some("the guest stands still after its move has ended")
        } else if machine.log.is_some() {
            Some("dirty pages are still logged after the move")
        } else if machine.disks.iter().any(|disk| disk.tap.is_some() || !disk.gates.is_empty()) {
            Some("a mirror is still on a disk after the move")
        } else {
            None
        };
        if let Some(fault) = fault {
            self.violate("runs_on", fault);
        }
    }

    /// Looked at when everything has come to rest.
    pub fn check_no_request_hangs(&mut self) {
        let now = self.now;
        let hangs = self
            .hosts
            .iter()
            .filter_map(|host| host.process.as_ref()?.machine.as_ref())
            .any(|machine| machine.requests.values().any(|request| now > request.since + 5_000_000));
        if hangs {
            self.violate("runs_on", "a request of the guest hangs");
        }
    }
}
