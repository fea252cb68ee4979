//! A pair of hosts with one VM that goes through case after case.
//!
//! Lives here: holding a move, dealing the blow, seeing what comes of it, moving again. Never enters: what is expected (cases).

use std::process::{Child, Stdio};

use vmove::api::types::{MoveProgress, VmState};
use vmove_compute::process::protocol::{Reply, Request, RunState};
use vmove_storage::{OwnerState, Stamp};
use vmove_tests::cluster::{Cluster, DATASTORES};
use vmove_tests::console::Console;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::images;
use vmove_tests::processes::kill_hard;
use vmove_tests::runners::{self, Watch};
use vmove_tests::wait::{until, until_ok};

use crate::PROGRAM;
use crate::cases::{Blow, Case, Kind, Outcome, Stage};

/// A pair of hosts with one VM, between two cases.
pub struct World {
    cluster: Cluster,
    console: Console,
    watch: Watch,
    /// The host that has the VM.
    at: &'static str,
    /// The datastore its disk lies in.
    store: &'static str,
    /// The command that is making the target the owner.
    recover: Option<Child>,
}

impl World {
    pub fn new() -> Self {
        let cluster = Cluster::start_with_relay(PROGRAM, &["a", "b"], &[]);
        let spec = Spec {
            memory_mib: 32,
            disk_mib: 32,
            words: "vmove.fill_mib=4 vmove.ram_mib=4 vmove.ram_rate=500 vmove.disk_mib=4 vmove.disk_rate=200 vmove.flush_ms=40 \
                    vmove.heartbeat_ms=40"
                .to_owned(),
            ..Spec::default()
        };
        let console = cluster.boot("a", &spec);
        let watch = Watch::start(&cluster, VM);
        Self { cluster, console, watch, at: "a", store: DATASTORES[0], recover: None }
    }

    fn other_host(&self) -> &'static str {
        if self.at == "a" { "b" } else { "a" }
    }

    fn other_store(&self) -> &'static str {
        if self.store == DATASTORES[0] { DATASTORES[1] } else { DATASTORES[0] }
    }

    /// Deals one blow, and sees that what must come of it comes.
    pub fn suffer(mut self, case: Case) -> Self {
        let (source, target) = (self.at, self.other_host());
        let store = if case.stays_on_host() { self.other_store() } else { self.store };
        let id = self.hold(case, target, store);
        let flushed = self.console.surely_flushed();
        assert!(flushed > 0, "nothing flushed yet");
        let last = self.console.heartbeats().last().unwrap().seq;
        if case.kind == Kind::TakenOver {
            self.take_over(case, source, target);
        } else {
            self.deal(case, source, target, &id);
        }
        let outcome = match case.expected() {
            Outcome::GoesOn if self.reported(source, &id) == "completed" => Outcome::MovesOn,
            Outcome::GoesOn => Outcome::StaysRunning,
            other => other,
        };
        self.see(case, outcome, target, store, last, flushed);
        if outcome == Outcome::MovesOn && case.blow != Blow::SourceVm && case.kind != Kind::TakenOver {
            assert_eq!(self.reported(source, &id), "completed");
        }
        if case.blow == Blow::Cancel && outcome == Outcome::StaysRunning && case.kind != Kind::Refused {
            assert_eq!(self.reported(source, &id), "cancelled");
        }
        self.cluster.relay().heal();
        self.again(case, outcome, target, store)
    }

    /// Deals the blow and lets go whoever is held.
    fn deal(&mut self, case: Case, source: &str, target: &str, id: &str) {
        match case.blow {
            Blow::SourceVm => kill_hard(self.cluster.vm_process(source, VM).unwrap()),
            Blow::TargetVm => {
                if case.kind == Kind::Host(Stage::Ended) {
                    self.until_owned(target);
                }
                // Given up already, it may have ended by itself.
                if let Some(pid) = self.cluster.vm_process(target, VM) {
                    kill_hard(pid);
                }
            }
            Blow::SourceAgent | Blow::TargetAgent => {
                let host = if case.blow == Blow::SourceAgent { source } else { target };
                self.cluster.kill_agent(host);
                let decided = matches!(case.kind, Kind::Host(stage) if stage >= Stage::Committed)
                    || case.kind == Kind::Datastore(true);
                // Before the commit the new agent finds the move under way; after it, only what has become of it.
                if decided {
                    self.cluster.stops.release(case.point);
                    self.until_runs(if case.stays_on_host() { source } else { target });
                }
                self.cluster.restart_agent(host);
            }
            Blow::Link => self.cluster.relay().cut(),
            Blow::LinkDown => self.cluster.relay().refuse(),
            Blow::Cancel => self.cancel(source),
        }
        self.cluster.stops.release_all();
        if case.blow == Blow::LinkDown && case.kind == Kind::Host(Stage::Copying) {
            until("the source calling in vain", || {
                let progress: MoveProgress = self.cluster.vmove(source, &["status", id, "--json"]).json();
                (progress.phase == "reconnecting").then_some(())
            });
            self.cluster.relay().heal();
        }
    }

    /// The target is being made the owner in place of a source that is gone: the blow, and what the source finds when it is back.
    fn take_over(&mut self, case: Case, source: &str, target: &str) {
        match case.blow {
            Blow::SourceAgent => self.cluster.restart_agent(source),
            Blow::TargetVm => kill_hard(self.cluster.vm_process(target, VM).unwrap()),
            _ => {
                self.cluster.kill_agent(target);
                self.cluster.restart_agent(target);
            }
        }
        self.cluster.stops.release_all();
        let told = self.recover.take().unwrap().wait().unwrap();
        match case.blow {
            Blow::TargetVm => {
                // It was killed before the word was on disk: it is still prepared, and has to be taken over once more.
                let words = ["recover", VM, "--take-ownership", "--yes"];
                let taken = until_ok(|| {
                    let answer = self.cluster.vmove(target, &words);
                    if answer.code == 0 { Ok(()) } else { Err(answer) }
                });
                taken.unwrap_or_else(|answer| panic!("{VM} cannot be taken over: {}", answer.stderr));
            }
            Blow::SourceAgent => assert!(told.success(), "{told}"),
            // Its question died with the agent.
            _ => {}
        }
        self.cluster.until_state(target, VmState::Running);
        if case.blow != Blow::SourceAgent {
            self.cluster.restart_agent(source);
        }
        self.cluster.until_state(target, VmState::Running);
        let discarded = until_ok(|| {
            let answer = self.cluster.vmove(source, &["recover", VM, "--discard", source, "--yes"]);
            if answer.code == 0 { Ok(()) } else { Err(answer) }
        });
        discarded.unwrap_or_else(|answer| panic!("{source} has not lost {VM}: {}", answer.stderr));
    }

    /// How a move ended, by its report, once there is one.
    fn reported(&self, host: &str, id: &str) -> String {
        until("the move's report", || {
            let answer = self.cluster.vmove(host, &["status", id, "--json"]);
            let progress: MoveProgress = serde_json::from_str(&answer.stdout).ok()?;
            Some(progress.report?.outcome)
        })
    }

    /// Begins the move and waits until it stands at the point.
    fn hold(&mut self, case: Case, target: &str, store: &str) -> String {
        let words = if case.stays_on_host() { ["--datastore", store] } else { ["--host", target] };
        let first = match case.kind {
            Kind::Cancelled | Kind::Refused => "source.drain-disks",
            Kind::Reconnecting => "source.send-pages",
            Kind::Undecided => "source.journal-committed",
            Kind::TakenOver => "target.tell-prepared",
            Kind::Host(_) | Kind::Datastore(_) => case.point,
        };
        let source = self.at;
        self.cluster.stops.hold(first);
        let id = self.cluster.begin_move(source, &words);
        self.cluster.stops.reached(first);
        if first == case.point {
            return id;
        }
        self.cluster.stops.hold(case.point);
        match case.kind {
            Kind::Cancelled => self.cancel(source),
            Kind::Refused => self.cancel(target),
            Kind::Reconnecting | Kind::Undecided => self.cluster.relay().cut(),
            Kind::TakenOver => {
                kill_hard(self.cluster.vm_process(source, VM).unwrap());
                self.cluster.kill_agent(source);
            }
            Kind::Host(_) | Kind::Datastore(_) => {}
        }
        // An undecided move's source is held as well: it has not committed yet.
        if case.kind != Kind::Undecided {
            self.cluster.stops.release(first);
        }
        if case.kind == Kind::TakenOver {
            self.cluster.until_state(target, VmState::Undecided);
            let mut recover = self.cluster.command();
            recover.arg("--agent").arg(self.cluster.host(target).state.join("agent.sock"));
            recover.args(["recover", VM, "--take-ownership", "--yes"]);
            self.recover = Some(recover.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        }
        self.cluster.stops.reached(case.point);
        id
    }

    /// Not by `vmove cancel`, which waits for the move's end.
    fn cancel(&self, host: &str) {
        let told = runners::ask(&self.cluster.host(host).vm_dir(VM), &Request::Cancel);
        assert_eq!(told, Some(Reply::Ok));
    }

    fn until_owned(&self, host: &str) {
        let image = self.cluster.image(host, self.store);
        until("the image being stamped as the target's own", || {
            let stamp = Stamp::read(&image).ok()??;
            (stamp.state == OwnerState::Owned).then_some(())
        });
    }

    fn until_runs(&self, host: &str) {
        until("the VM running", || {
            let status = runners::status(&self.cluster.host(host).vm_dir(VM))?;
            (status.state == RunState::Running && status.moving.is_none()).then_some(())
        });
    }

    /// Waits for the outcome; the guest runs then, and what it has is in order.
    fn see(
        &mut self,
        case: Case,
        outcome: Outcome,
        target: &'static str,
        store: &'static str,
        last: u64,
        flushed: u64,
    ) {
        match outcome {
            Outcome::StaysRunning | Outcome::StartableHere | Outcome::GoesOn => {}
            Outcome::MovesOn | Outcome::BootsThere | Outcome::StartableThere => {
                self.store = store;
                if !case.stays_on_host() {
                    self.at = target;
                }
            }
        }
        if matches!(outcome, Outcome::StartableHere | Outcome::StartableThere) {
            self.cluster.until_state(self.at, VmState::Stopped);
            self.cluster.start_again(self.at);
        }
        let there = self.cluster.until_state(self.at, VmState::Running);
        assert_eq!(there.summary.disks[0].datastore, self.store);
        let before = std::mem::replace(&mut self.console, self.cluster.console(self.at));
        match outcome {
            Outcome::StaysRunning | Outcome::MovesOn | Outcome::GoesOn => {
                self.console.heartbeat_after(last);
                assert_eq!(self.console.run(), before.run(), "started again");
            }
            Outcome::StartableHere | Outcome::BootsThere | Outcome::StartableThere => {
                let recovered = self.console.recovered();
                assert!(recovered >= flushed, "flushed up to {flushed}, found {recovered}");
            }
        }
        self.console.goes_on();
        self.console.check();
        self.cluster.until_clean(self.other_host());
        let elsewhere = self.cluster.host(self.at).datastore(self.other_store());
        until("nothing being left in the other datastore", || {
            images::files_below(&elsewhere).is_empty().then_some(())
        });
    }

    /// The same move again where it did not come about, with nothing cleaned up by hand.
    fn again(mut self, case: Case, outcome: Outcome, target: &'static str, store: &'static str) -> Self {
        if matches!(outcome, Outcome::MovesOn | Outcome::BootsThere | Outcome::StartableThere) {
            return self;
        }
        let words = if case.stays_on_host() { ["--datastore", store] } else { ["--host", target] };
        let last = self.console.heartbeats().last().unwrap().seq;
        self.cluster.relocate(self.at, &words);
        if !case.stays_on_host() {
            self.at = target;
            self.console = self.cluster.console(target);
        }
        self.store = store;
        self.console.heartbeat_after(last);
        self.console.check();
        self
    }

    /// One last move, and an image that QEMU finds in order.
    pub fn end(self) {
        let target = self.other_host();
        self.cluster.relocate(self.at, &["--host", target]);
        self.cluster.console(target).check();
        self.watch.finish();
        self.cluster.until_clean(self.at);
        self.cluster.stop_clean(target);
    }
}
