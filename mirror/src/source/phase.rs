//! Where a source may stand, and every change between that it may make: the table that the engine holds itself to.
//!
//! Lives here: names and the table. Never enters: what is done on the way.

use crate::transition::{self, Row};

/// Where the engine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Connecting; the target makes room.
    Setup,
    /// Disks are copied and mirrored.
    Mirror,
    /// Memory rounds, the guest running.
    PreCopy,
    /// The connections are lost and are being made anew.
    Reconnecting,
    /// They are there again; the target says what has arrived, and the streams go on from there.
    Resuming,
    /// Stopping the vCPUs.
    Pausing,
    /// Queues and mirrors run empty.
    Draining,
    /// The state is saved.
    Saving,
    /// The last pages are sent.
    FinalPages,
    /// Digests are made.
    Proving,
    /// The target checks and prepares.
    Preparing,
    /// The commit record is being written: no way back but its failure.
    Committing,
    /// Giving up: the abort record is being written.
    Aborting,
    /// Over; the VM runs here.
    Aborted,
}

impl Phase {
    /// The phase as reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Mirror => "mirror",
            Self::PreCopy => "pre-copy",
            Self::Reconnecting | Self::Resuming => "reconnecting",
            Self::Aborting | Self::Aborted => "aborted",
            _ => "switchover",
        }
    }
}

/// Why a source changes its phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// The target has made room.
    Ready,
    /// All disks are in sync.
    Synced,
    /// So little memory is dirty that it fits the allowed downtime.
    FewLeft,
    /// The vCPUs stand still.
    Paused,
    /// Nothing of the guest is in flight, every mirror has ended.
    Drained,
    /// The state is there.
    Saved,
    /// The last pages have arrived whole.
    Arrived,
    /// This side's proof is made.
    Proved,
    /// The target has the same and is prepared.
    Prepared,
    /// The record is on disk.
    Journaled,
    /// It is not.
    NotJournaled,
    /// A connection is gone.
    LinkLost,
    /// They were lost once more after a hundred times.
    LinkTooBad,
    /// They are there again.
    Connected,
    /// They could not be made again.
    GaveUp,
    /// What had not arrived is taken back.
    Restored,
    /// Memory turns dirty faster than it can be sent.
    Stalled,
    /// A page arrives damaged again and again.
    Damaged,
    /// Something failed here, or on the way to the target's disks.
    Failed,
    /// The target refuses.
    Refused,
    /// The target said what it had not been asked, or what cannot be.
    Nonsense,
    /// The target's proof is not this side's.
    Differs,
    /// The user gives up.
    Cancelled,
}

/// A change of phase.
pub type Transition = transition::Transition<Phase, Why>;

const BEFORE_THE_COMMIT: &[Phase] = {
    use Phase as P;
    &[
        P::Setup,
        P::Mirror,
        P::PreCopy,
        P::Reconnecting,
        P::Resuming,
        P::Pausing,
        P::Draining,
        P::Saving,
        P::FinalPages,
        P::Proving,
        P::Preparing,
    ]
};

const TABLE: &[Row<Phase, Why>] = {
    use Phase as P;
    &[
        (&[P::Setup], Why::Ready, P::Mirror),
        (&[P::Mirror], Why::Synced, P::PreCopy),
        // Memory stays.
        (&[P::Mirror], Why::Synced, P::Pausing),
        (&[P::PreCopy], Why::FewLeft, P::Pausing),
        (&[P::Pausing], Why::Paused, P::Draining),
        (&[P::Draining], Why::Drained, P::Saving),
        // Memory stays.
        (&[P::Draining], Why::Drained, P::Proving),
        (&[P::Saving], Why::Saved, P::FinalPages),
        (&[P::FinalPages], Why::Arrived, P::Proving),
        (&[P::Proving], Why::Proved, P::Preparing),
        (&[P::Preparing], Why::Prepared, P::Committing),
        // Before the pause a lost connection is no failure.
        (&[P::Setup, P::Mirror, P::PreCopy, P::Resuming], Why::LinkLost, P::Reconnecting),
        (&[P::Reconnecting], Why::Connected, P::Setup),
        (&[P::Reconnecting], Why::Connected, P::Resuming),
        (&[P::Resuming], Why::Restored, P::Mirror),
        (&[P::Resuming], Why::Restored, P::PreCopy),
        (&[P::Reconnecting], Why::GaveUp, P::Aborting),
        (&[P::Reconnecting], Why::LinkTooBad, P::Aborting),
        // In the pause it is; so it is where there is nothing yet, or never, to be made anew.
        (
            &[
                P::Setup,
                P::Mirror,
                P::Pausing,
                P::Draining,
                P::Saving,
                P::FinalPages,
                P::Proving,
                P::Preparing,
            ],
            Why::LinkLost,
            P::Aborting,
        ),
        (&[P::Setup, P::Committing], Why::NotJournaled, P::Aborting),
        (&[P::PreCopy], Why::Stalled, P::Aborting),
        (&[P::FinalPages], Why::Damaged, P::Aborting),
        (&[P::Preparing], Why::Differs, P::Aborting),
        (BEFORE_THE_COMMIT, Why::Failed, P::Aborting),
        (BEFORE_THE_COMMIT, Why::Refused, P::Aborting),
        (BEFORE_THE_COMMIT, Why::Cancelled, P::Aborting),
        (
            &[
                P::Setup,
                P::Mirror,
                P::PreCopy,
                P::Resuming,
                P::Pausing,
                P::Draining,
                P::Saving,
                P::FinalPages,
                P::Proving,
                P::Preparing,
            ],
            Why::Nonsense,
            P::Aborting,
        ),
        (&[P::Aborting], Why::Journaled, P::Aborted),
        // Refused where `Moving` is not on disk, or written at the next chance.
        (&[P::Aborting], Why::NotJournaled, P::Aborted),
    ]
};

/// Every change of phase that a source may make.
pub fn transitions() -> impl Iterator<Item = Transition> {
    transition::all(TABLE)
}
