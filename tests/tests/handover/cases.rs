//! The cases: which point, which blow, and what must come of it.
//!
//! Lives here: the table, and that it leaves out no point. Never enters: carrying a case out (world).

use vmove_compute::migrate::stop_points;

/// How far a move has come when it is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The guest runs at the source.
    Copying,
    /// It is paused; nothing is decided.
    Paused,
    /// The target is prepared; only the source's word is missing.
    Prepared,
    /// The source has committed; the guest does not run yet.
    Committed,
    /// The guest runs at the target, whose images are not stamped as its own yet.
    Resumed,
    /// The target's part is done.
    Ended,
}

/// The points of a move to another host, in the order in which it meets them.
const POINTS: &[(&str, Stage)] = &[
    ("target.journal-incoming", Stage::Copying),
    ("target.make-images", Stage::Copying),
    ("source.journal-moving", Stage::Copying),
    ("source.connect", Stage::Copying),
    ("source.tell-setup", Stage::Copying),
    ("target.tell-ready", Stage::Copying),
    ("source.start-mirrors", Stage::Copying),
    ("source.start-logging", Stage::Copying),
    ("source.send-pages", Stage::Copying),
    ("source.end-round", Stage::Copying),
    ("source.collect-dirty", Stage::Copying),
    ("source.pause", Stage::Copying),
    ("source.drain-disks", Stage::Paused),
    ("source.save-state", Stage::Paused),
    ("source.tell-state", Stage::Paused),
    ("source.prove", Stage::Paused),
    ("target.load-state", Stage::Paused),
    ("source.tell-prepare", Stage::Paused),
    ("target.prove", Stage::Paused),
    ("target.journal-prepared", Stage::Paused),
    ("target.tell-prepared", Stage::Prepared),
    ("source.journal-committed", Stage::Prepared),
    ("source.tell-commit", Stage::Committed),
    ("target.journal-owner", Stage::Committed),
    ("target.run", Stage::Committed),
    ("target.tell-running", Stage::Resumed),
    ("target.finish", Stage::Resumed),
    ("source.journal-released", Stage::Ended),
    ("source.retire", Stage::Ended),
    ("source.finish-committed", Stage::Ended),
];

/// The points of making lost connections anew, when they are lost while memory is copied.
const RECONNECTING_POINTS: &[&str] =
    &["source.reconnect", "target.await", "source.tell-resume", "target.tell-resumed", "source.restore"];

/// The points of giving a move up, when it is cancelled in the pause.
const CANCELLED_POINTS: &[&str] = &[
    "source.tell-abort",
    "source.journal-aborted",
    "source.drop-mirrors",
    "source.stop-logging",
    "source.resume",
    "source.finish",
    "target.journal-aborted",
    "target.discard",
    "target.finish",
];

/// The points of a move to another datastore, and whether it is committed there.
const DATASTORE_POINTS: &[(&str, bool)] = &[
    ("source.journal-moving", false),
    ("source.connect", false),
    ("source.tell-setup", false),
    ("source.start-mirrors", false),
    ("source.pause", false),
    ("source.drain-disks", false),
    ("source.prove", false),
    ("source.tell-prepare", false),
    ("source.journal-owner", false),
    ("source.pivot", true),
    ("source.retire", true),
    ("source.finish-committed", true),
];

/// Where the link stays down as well, not only breaks.
const DOWN_POINTS: &[&str] = &[
    "source.start-mirrors",
    "source.send-pages",
    "source.save-state",
    "target.prove",
    "target.tell-prepared",
    "source.journal-committed",
    "source.tell-commit",
    "target.journal-owner",
    "target.tell-running",
];

/// What is done to a move that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    SourceVm,
    TargetVm,
    SourceAgent,
    TargetAgent,
    /// All connections between the two VM processes are reset; new ones are served.
    Link,
    /// They are reset, and new ones as well, until the outcome is there or the source calls in vain.
    LinkDown,
    /// The user gives the move up.
    Cancel,
}

const BLOWS: [Blow; 7] = [
    Blow::SourceVm,
    Blow::TargetVm,
    Blow::SourceAgent,
    Blow::TargetAgent,
    Blow::Link,
    Blow::Cancel,
    Blow::LinkDown,
];

/// What must come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest goes on at the source as if nothing had been.
    StaysRunning,
    /// The guest is gone as in any crash; it can be started again at the source.
    StartableHere,
    /// The guest goes on at the target as if nothing had been.
    MovesOn,
    /// The target's agent starts it again from its disks.
    BootsThere,
    /// It ran at the target and is gone as in any crash; it can be started again there.
    StartableThere,
    /// The guest goes on as if nothing had been: at the target if its report says completed, else at the source.
    GoesOn,
}

/// Which move is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Host(Stage),
    /// One whose link was cut while memory was copied.
    Reconnecting,
    /// One whose link was cut when the source was about to commit: the target knows nothing and asks.
    Undecided,
    /// One that is cancelled in the pause.
    Cancelled,
    /// One that the target refuses in the pause.
    Refused,
    /// One whose source host was lost when the target was prepared; the target is being made the owner by the operator's word.
    TakenOver,
    /// To another datastore: whether it is committed at the point.
    Datastore(bool),
}

#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub kind: Kind,
    pub point: &'static str,
    pub blow: Blow,
}

impl Case {
    pub fn all() -> Vec<Self> {
        let host = POINTS.iter().map(|(point, stage)| (Kind::Host(*stage), *point));
        let reconnecting = RECONNECTING_POINTS.iter().map(|point| (Kind::Reconnecting, *point));
        let cancelled = CANCELLED_POINTS.iter().map(|point| (Kind::Cancelled, *point));
        let others = [
            (Kind::Undecided, "target.ask-verdict"),
            (Kind::Refused, "target.tell-refused"),
            (Kind::TakenOver, "target.journal-taken-over"),
        ];
        let datastore = DATASTORE_POINTS.iter().map(|(point, done)| (Kind::Datastore(*done), *point));
        let points = host.chain(reconnecting).chain(cancelled).chain(others).chain(datastore);
        points
            .flat_map(|(kind, point)| BLOWS.map(|blow| Self { kind, point, blow }))
            .filter(|case| case.can_be())
            .collect()
    }

    /// Whether there is anything to be hit.
    fn can_be(&self) -> bool {
        let down = self.blow != Blow::LinkDown || DOWN_POINTS.contains(&self.point);
        match self.kind {
            Kind::Host(_) => down,
            // No second host.
            Kind::Datastore(_) => matches!(self.blow, Blow::SourceVm | Blow::SourceAgent | Blow::Cancel),
            // The source and its link are gone already. Its agent comes back; that is the blow.
            Kind::TakenOver => {
                matches!(self.blow, Blow::SourceAgent | Blow::TargetVm | Blow::TargetAgent)
            }
            // At the source it has ended.
            Kind::Cancelled if self.point.starts_with("target.") => {
                !matches!(self.blow, Blow::Cancel | Blow::LinkDown)
            }
            _ => self.blow != Blow::LinkDown,
        }
    }

    pub fn expected(self) -> Outcome {
        let cut = matches!(self.blow, Blow::Link | Blow::LinkDown);
        match (self.kind, self.blow) {
            (Kind::Host(stage), _) if cut => match (stage, self.point) {
                // The pause may have been decided on before the loss was heard of.
                (Stage::Copying, "source.collect-dirty") => Outcome::GoesOn,
                // The source may be calling for the first time: that is not tried again.
                (Stage::Copying, "target.journal-incoming" | "target.make-images") => Outcome::GoesOn,
                (Stage::Copying, "source.pause") => Outcome::StaysRunning,
                // Before the pause it is no failure, after the commit none that matters.
                (Stage::Copying, _) | (Stage::Prepared, "source.journal-committed") => Outcome::MovesOn,
                (Stage::Paused | Stage::Prepared, _) => Outcome::StaysRunning,
                (Stage::Committed | Stage::Resumed | Stage::Ended, _) => Outcome::MovesOn,
            },
            // It has heard that the target is prepared: from there it commits, whatever becomes of the target.
            (Kind::Host(_), Blow::TargetVm) if self.point == "source.journal-committed" => {
                Outcome::BootsThere
            }
            (_, Blow::Cancel) => {
                if self.is_given_up() {
                    Outcome::StaysRunning
                } else {
                    Outcome::MovesOn
                }
            }
            (Kind::Undecided, Blow::TargetVm) => Outcome::BootsThere,
            (Kind::Host(stage), Blow::SourceVm) if stage < Stage::Committed => Outcome::StartableHere,
            (Kind::Host(stage), Blow::TargetVm) if stage < Stage::Committed => Outcome::StaysRunning,
            (Kind::Host(Stage::Ended), Blow::TargetVm) => Outcome::StartableThere,
            (Kind::Host(_), Blow::TargetVm) => Outcome::BootsThere,
            (Kind::Host(_), _) => Outcome::MovesOn,
            (
                Kind::Reconnecting
                | Kind::Undecided
                | Kind::Cancelled
                | Kind::Refused
                | Kind::Datastore(false),
                Blow::SourceVm,
            ) => Outcome::StartableHere,
            (Kind::Reconnecting, Blow::TargetVm) => Outcome::StaysRunning,
            (Kind::Reconnecting | Kind::Undecided, _) => Outcome::MovesOn,
            (Kind::Cancelled | Kind::Refused, _) => Outcome::StaysRunning,
            (Kind::TakenOver, Blow::TargetVm) => Outcome::BootsThere,
            (Kind::TakenOver, _) => Outcome::MovesOn,
            (Kind::Datastore(false), _) => Outcome::MovesOn,
            (Kind::Datastore(true), Blow::SourceVm) => Outcome::StartableThere,
            (Kind::Datastore(true), _) => Outcome::MovesOn,
        }
    }

    /// Whether a move that is cancelled at its point is given up. One that is about to commit is not: its record may be on disk.
    pub fn is_given_up(self) -> bool {
        match self.kind {
            Kind::Host(stage) => stage < Stage::Committed && self.point != "source.journal-committed",
            Kind::Datastore(committed) => !committed && self.point != "source.journal-owner",
            Kind::Reconnecting | Kind::Cancelled | Kind::Refused => true,
            Kind::Undecided | Kind::TakenOver => false,
        }
    }

    /// The disks change their datastore, and the host does not.
    pub fn stays_on_host(self) -> bool {
        matches!(self.kind, Kind::Datastore(_))
    }

    /// What the table of results begins with.
    pub fn line(self) -> String {
        let kind = match self.kind {
            Kind::Host(_) => "host",
            Kind::Reconnecting => "reconnects",
            Kind::Undecided => "undecided",
            Kind::Cancelled => "cancelled",
            Kind::Refused => "refused",
            Kind::TakenOver => "taken over",
            Kind::Datastore(_) => "datastore",
        };
        format!("{kind:<10}  {:<25}  {:<11}", self.point, format!("{:?}", self.blow))
    }
}

/// Points of the product at which no case stops.
pub fn points_without_a_case() -> Vec<&'static str> {
    let cases = Case::all();
    stop_points::POINTS.into_iter().filter(|point| !cases.iter().any(|case| case.point == *point)).collect()
}

#[test]
fn every_named_point_has_its_cases() {
    assert!(points_without_a_case().is_empty(), "no case stops at {:?}", points_without_a_case());
    for (point, _) in POINTS {
        let blows: Vec<Blow> = Case::all().iter().filter(|c| c.point == *point).map(|c| c.blow).collect();
        assert!(BLOWS[..6].iter().all(|blow| blows.contains(blow)), "{point}: {blows:?}");
    }
}
