//! The side a VM reaches.
//!
//! ```text
//! Arriving -> Receiving -> Loading -> Proving -> Preparing -> Prepared -> Owning -> Running
//!   Arriving, Receiving: the connections lost -> Waiting -> back, when the source has called again
//!   before Prepared: an abort or a failure, a connection lost while Loading or later -> Discarding -> Discarded
//!   Prepared and the connection lost -> Undecided, until the source's word is known, or the operator takes the VM over
//! ```
//! Connections are lost and made all together, as at the source. The driver answers [`Action::Await`] with [`Event::Linked`] only when
//! nothing of the old ones can post an event or change memory or images any more: what it says has arrived then stays so. It gives the
//! source some time ([`Event::Failed`]) and no more: a source that has gone on alone need not be able to say so.
//! Lives here: what must be true before this side may say "prepared", own and run. Never enters: images, memory, KVM, asking agents.

mod phase;

use crate::{
    journal::{DiskAt, MoveId, Record, TAKE_OVER_STEP, Verdict},
    transition::Phased,
    wire::control::{Arrived, DiskSetup, Proof, SourceMsg, TargetMsg},
};

pub use phase::{Phase, Transition, Why, transitions};

/// What was agreed between the agents before the source connects.
#[derive(Debug, Clone)]
pub struct TargetPlan {
    /// The move.
    pub move_id: MoveId,
    /// Where the VM comes from.
    pub from_host: String,
    /// Generation after the commit.
    pub generation: u64,
    /// Pages of RAM.
    pub ram_pages: u64,
    /// Disks that are copied.
    pub disks: Vec<DiskSetup>,
    /// Images made for them.
    pub images: Vec<DiskAt>,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The record asked for is on disk.
    Journaled,
    /// It could not be written.
    JournalFailed(String),
    /// Images and memory are there.
    ImagesReady,
    /// The source has called in all roles, for the first time or again; no event of earlier connections comes after this.
    Linked(Arrived),
    /// The source spoke.
    Source(SourceMsg),
    /// The state has been loaded and its checks passed.
    Loaded,
    /// Disks are flushed and locked, and this is what is here.
    Proved {
        /// This side's proof.
        proof: Proof,
        /// Allocated bytes of each image.
        allocated: Vec<u64>,
        /// Microseconds spent on loading and proving.
        load_us: u64,
    },
    /// The guest runs.
    Resumed {
        /// Microseconds since the commit was known.
        resume_us: u64,
    },
    /// A connection is gone.
    LinkLost(String),
    /// Something failed here.
    Failed(String),
    /// The source's word, fetched by other means while undecided.
    Resolved(Verdict),
    /// The operator says that the source is gone for ever, and makes this host the owner without its word.
    TakeOver,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Append and sync; answer [`Event::Journaled`].
    Journal(Record),
    /// Make images with the source's structure, stamped as incoming; answer [`Event::ImagesReady`].
    MakeImages,
    /// End what is left of the connections, keep everything that has arrived, and let the source call again for some time; answer
    /// [`Event::Linked`] or [`Event::Failed`].
    Await,
    /// Send on the control connection.
    Tell(TargetMsg),
    /// Load the state (untrusted); answer [`Event::Loaded`].
    LoadState(Vec<u8>),
    /// Flush the disks, stamp them with the next generation, make this side's proof.
    Prove {
        /// Read everything again.
        audit: bool,
    },
    /// Find out, by other means, how the move went; answer [`Event::Resolved`].
    AskVerdict,
    /// The VM is ours: stamp the images as owned, run it and announce it.
    Run,
    /// Remove images and memory. Asked for only if the disk does not say `Prepared` without `Aborted` after it.
    Discard,
    /// Over.
    Finish {
        /// Why it did not come, or none if it runs here.
        refused: Option<String>,
    },
}

/// The engine of a move at its target.
#[derive(Debug)]
pub struct Target {
    plan: TargetPlan,
    phase: Phased<Phase, Why>,
    images_ready: bool,
    setup: bool,
    audit: bool,
    expected: Option<Proof>,
    loaded: bool,
    answer: Option<TargetMsg>,
    connected: bool,
    /// The source has not said anything on these connections yet.
    fresh: bool,
    /// What had arrived when they were made.
    arrived: Arrived,
    /// The phase in which the last ones were lost.
    lost_in: Phase,
    /// The disk may hold `Prepared`.
    may_say_prepared: bool,
    refused: Option<String>,
}

impl Target {
    /// An engine for `plan`, and the first things to do.
    pub fn start(plan: TargetPlan) -> (Self, Vec<Action>) {
        let incoming = Record::Incoming {
            move_id: plan.move_id.clone(),
            from_host: plan.from_host.clone(),
            generation: plan.generation,
            disks: plan.images.clone(),
        };
        let this = Self {
            plan,
            phase: Phased::new(Phase::Arriving),
            images_ready: false,
            setup: false,
            audit: false,
            expected: None,
            loaded: false,
            answer: None,
            connected: false,
            fresh: false,
            arrived: Arrived::default(),
            lost_in: Phase::Arriving,
            may_say_prepared: false,
            refused: None,
        };
        (this, vec![Action::Journal(incoming)])
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase.now()
    }

    /// How the phase has changed in the last step.
    pub fn went(&self) -> &[Transition] {
        self.phase.went()
    }

    /// The one place where the phase changes.
    fn go(&mut self, why: Why, to: Phase) {
        self.phase.go(why, to, transitions());
    }

    /// Takes an event; gives what is to be done.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.phase.begin_step();
        match (self.phase(), event) {
            (Phase::Discarded, _) => {}
            (Phase::Discarding, Event::Journaled) => {
                out.push(Action::Discard);
                self.discarded(Why::Journaled, &mut out);
            }
            (Phase::Discarding, Event::JournalFailed(_)) => {
                // Whoever reads `Prepared` must find the images: the agent settles it.
                if !self.may_say_prepared {
                    out.push(Action::Discard);
                }
                self.discarded(Why::NotJournaled, &mut out);
            }
            (Phase::Discarding, _) => {}

            // From here on the VM is this host's: nothing but its own end can stop it.
            (Phase::Owning, Event::Journaled) => {
                self.go(Why::Journaled, Phase::Running);
                out.push(Action::Run);
            }
            // Not owned on disk: it may not run. The agent reads `Prepared` and settles it later.
            (Phase::Owning, Event::JournalFailed(why)) => {
                self.go(Why::NotJournaled, Phase::Undecided);
                out.push(Action::Finish { refused: Some(format!("ownership cannot be journalled: {why}")) });
            }
            (Phase::Running, Event::Resumed { resume_us }) => {
                if self.connected {
                    out.push(Action::Tell(TargetMsg::Running { resume_us }));
                }
                out.push(Action::Finish { refused: None });
            }
            (Phase::Owning | Phase::Running, _) => {}

            // The control connection may well bring the source's word after a data connection was lost.
            (
                Phase::Prepared | Phase::Undecided,
                Event::Source(SourceMsg::Commit) | Event::Resolved(Verdict::Committed),
            ) => self.own(&mut out),
            (Phase::Prepared | Phase::Undecided, Event::Source(SourceMsg::Abort { reason })) => {
                self.discard(Why::Aborted, format!("the source gave up: {reason}"), &mut out);
            }
            (Phase::Undecided, Event::Resolved(Verdict::Aborted)) => {
                self.discard(Why::Aborted, "the source has aborted".into(), &mut out);
            }
            // A failed send proves nothing: only the source's word ends this.
            (Phase::Prepared, Event::LinkLost(_)) => self.doubt(Why::LinkLost, &mut out),
            (Phase::Prepared, Event::Failed(_)) => self.doubt(Why::Failed, &mut out),
            (Phase::Prepared | Phase::Undecided, Event::Resolved(Verdict::Moving | Verdict::Unknown)) => {
                out.push(Action::AskVerdict);
            }
            (Phase::Prepared | Phase::Undecided, Event::TakeOver) => self.take_over(&mut out),
            (Phase::Prepared | Phase::Undecided, _) => {}

            (Phase::Arriving | Phase::Receiving, Event::LinkLost(_)) if self.connected => {
                self.connected = false;
                self.lost_in = self.phase();
                // A source that has not heard that this side is ready says again what will come.
                self.setup = false;
                self.go(Why::LinkLost, Phase::Waiting);
                out.push(Action::Await);
            }
            (Phase::Arriving | Phase::Receiving | Phase::Waiting, Event::LinkLost(_)) => {}
            (Phase::Arriving | Phase::Waiting, Event::Linked(arrived)) if !self.connected => {
                if self.phase() == Phase::Waiting {
                    self.go(Why::Linked, self.lost_in);
                }
                self.connected = true;
                self.fresh = true;
                self.arrived = arrived;
            }
            (_, Event::LinkLost(why)) => {
                self.connected = false;
                self.discard(
                    Why::LinkLost,
                    format!("the connection to the source was lost: {why}"),
                    &mut out,
                );
            }
            (_, Event::Failed(why)) => self.refuse(Why::Failed, why, &mut out),
            (Phase::Arriving | Phase::Preparing, Event::JournalFailed(why)) => {
                let reason = format!("the target's journal cannot be written: {why}");
                self.refuse(Why::NotJournaled, reason, &mut out);
            }
            (_, Event::Source(SourceMsg::Abort { reason })) => {
                self.discard(Why::Aborted, format!("the source gave up: {reason}"), &mut out);
            }
            (Phase::Arriving | Phase::Waiting, Event::Journaled) => out.push(Action::MakeImages),
            (Phase::Arriving | Phase::Waiting, Event::ImagesReady) => {
                self.images_ready = true;
                self.begin(&mut out);
            }
            // Late words: the new connections have not been listened to yet.
            (Phase::Waiting, Event::Source(_)) => {}
            (
                Phase::Arriving | Phase::Receiving,
                Event::Source(SourceMsg::Setup { ram_pages, disks, audit }),
            ) if self.fresh => {
                self.fresh = false;
                if self.has_arrived() {
                    return self.refused(Why::Nonsense, "the source begins anew after it had begun", out);
                }
                if ram_pages != self.plan.ram_pages || disks != self.plan.disks {
                    return self.refused(Why::Nonsense, "RAM size or disks differ from what was agreed", out);
                }
                self.audit = audit;
                self.setup = true;
                self.begin(&mut out);
            }
            (Phase::Receiving, Event::Source(SourceMsg::Resume)) if self.fresh => {
                self.fresh = false;
                out.push(Action::Tell(TargetMsg::Resumed(self.arrived.clone())));
            }
            (Phase::Receiving, Event::Source(SourceMsg::State(bytes))) if !self.fresh => {
                self.go(Why::State, Phase::Loading);
                out.push(Action::LoadState(bytes));
            }
            (Phase::Loading, Event::Loaded) => {
                self.loaded = true;
                self.prove(&mut out);
            }
            (Phase::Loading, Event::Source(SourceMsg::Prepare(proof))) if self.expected.is_none() => {
                self.expected = Some(proof);
                self.prove(&mut out);
            }
            (Phase::Proving, Event::Proved { proof, allocated, load_us }) => {
                let expected = self.expected.unwrap_or_default();
                if proof.counters != expected.counters {
                    let text = format!(
                        "counters differ: sent {:?}, arrived {:?}",
                        expected.counters, proof.counters
                    );
                    return self.refused(Why::Differs, &text, out);
                }
                if proof != expected {
                    let what = if proof.digest == expected.digest { "audit digest" } else { "digest" };
                    let text = format!("{what} of RAM and disks differs from the source's");
                    return self.refused(Why::Differs, &text, out);
                }
                self.answer = Some(TargetMsg::Prepared { proof, allocated, load_us });
                self.go(Why::Proved, Phase::Preparing);
                self.may_say_prepared = true;
                out.push(Action::Journal(Record::Prepared { move_id: self.plan.move_id.clone() }));
            }
            (Phase::Preparing, Event::Journaled) => {
                self.go(Why::Journaled, Phase::Prepared);
                out.extend(self.answer.take().map(Action::Tell));
            }
            (_, Event::Source(_)) => return self.refused(Why::Nonsense, "a message came out of turn", out),
            (
                _,
                Event::Journaled
                | Event::JournalFailed(_)
                | Event::ImagesReady
                | Event::Linked(_)
                | Event::Loaded
                | Event::Proved { .. }
                | Event::Resumed { .. }
                | Event::Resolved(_)
                | Event::TakeOver,
            ) => {}
        }
        out
    }

    fn has_arrived(&self) -> bool {
        self.arrived.frames > 0 || self.arrived.operations.iter().any(|operations| *operations > 0)
    }

    fn begin(&mut self, out: &mut Vec<Action>) {
        if self.images_ready && self.setup {
            self.go(Why::Begun, Phase::Receiving);
            out.push(Action::Tell(TargetMsg::Ready));
        }
    }

    fn prove(&mut self, out: &mut Vec<Action>) {
        if self.loaded && self.expected.is_some() {
            self.go(Why::Loaded, Phase::Proving);
            out.push(Action::Prove { audit: self.audit });
        }
    }

    fn own(&mut self, out: &mut Vec<Action>) {
        self.go(Why::Committed, Phase::Owning);
        out.push(Action::Journal(Record::Owner {
            generation: self.plan.generation,
            disks: self.plan.images.clone(),
        }));
    }

    fn take_over(&mut self, out: &mut Vec<Action>) {
        // The plan's generation comes from a peer. One without room above it cannot be taken over; the source is still asked.
        let Some(generation) = self.plan.generation.checked_add(TAKE_OVER_STEP) else { return };
        self.go(Why::TakenOver, Phase::Owning);
        out.push(Action::Journal(Record::TakenOver {
            move_id: self.plan.move_id.clone(),
            generation,
            disks: self.plan.images.clone(),
        }));
    }

    /// The source decides, and cannot be heard.
    fn doubt(&mut self, why: Why, out: &mut Vec<Action>) {
        self.go(why, Phase::Undecided);
        out.push(Action::AskVerdict);
    }

    fn refused(&mut self, why: Why, reason: &str, mut out: Vec<Action>) -> Vec<Action> {
        self.refuse(why, reason.to_string(), &mut out);
        out
    }

    fn refuse(&mut self, why: Why, reason: String, out: &mut Vec<Action>) {
        if self.connected {
            out.push(Action::Tell(TargetMsg::Refused { reason: reason.clone() }));
        }
        self.discard(why, reason, out);
    }

    fn discard(&mut self, why: Why, reason: String, out: &mut Vec<Action>) {
        self.refused = Some(reason);
        self.go(why, Phase::Discarding);
        // Refused where `Incoming` is not on disk; that ends it as well.
        out.push(Action::Journal(Record::Aborted { move_id: self.plan.move_id.clone() }));
    }

    fn discarded(&mut self, why: Why, out: &mut Vec<Action>) {
        self.go(why, Phase::Discarded);
        out.push(Action::Finish { refused: self.refused.take() });
    }
}
