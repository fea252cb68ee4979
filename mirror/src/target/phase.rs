//! Where a target may stand, and every change between that it may make: the table that the engine holds itself to.
//!
//! Lives here: names and the table. Never enters: what is done on the way.

use crate::transition::{self, Row};

/// Where the engine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Images are being made; the source has not said what will come.
    Arriving,
    /// Pages and blocks arrive.
    Receiving,
    /// The connections are lost; what has arrived is kept, and the source is expected to call again.
    Waiting,
    /// The state is being loaded.
    Loading,
    /// Disks are flushed, locked and stamped, digests made.
    Proving,
    /// The `Prepared` record is being written.
    Preparing,
    /// The source decides.
    Prepared,
    /// The source decides, and cannot be heard.
    Undecided,
    /// The `Owner` record is being written.
    Owning,
    /// The VM is this host's and runs.
    Running,
    /// The `Aborted` record is being written.
    Discarding,
    /// Nothing of the VM runs here.
    Discarded,
}

/// Why a target changes its phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// The images are there, and the source has said what will come.
    Begun,
    /// The source's state has come.
    State,
    /// It is loaded, and the source's proof is there.
    Loaded,
    /// This side's proof is made, and is the source's.
    Proved,
    /// The record is on disk.
    Journaled,
    /// It is not.
    NotJournaled,
    /// The source has committed.
    Committed,
    /// The source has aborted, or gives up.
    Aborted,
    /// The operator makes this host the owner.
    TakenOver,
    /// A connection is gone.
    LinkLost,
    /// The source has called again.
    Linked,
    /// Something failed here.
    Failed,
    /// The source said what is out of turn, or cannot be.
    Nonsense,
    /// The source's proof is not this side's.
    Differs,
}

/// A change of phase.
pub type Transition = transition::Transition<Phase, Why>;

const TABLE: &[Row<Phase, Why>] = {
    use Phase as P;
    &[
        // Receiving: the source has not heard that this side is ready, and says again what will come.
        (&[P::Arriving, P::Receiving], Why::Begun, P::Receiving),
        (&[P::Receiving], Why::State, P::Loading),
        (&[P::Loading], Why::Loaded, P::Proving),
        (&[P::Proving], Why::Proved, P::Preparing),
        (&[P::Preparing], Why::Journaled, P::Prepared),
        (&[P::Prepared, P::Undecided], Why::Committed, P::Owning),
        (&[P::Prepared, P::Undecided], Why::TakenOver, P::Owning),
        (&[P::Owning], Why::Journaled, P::Running),
        // The VM may not run; the agent settles it later.
        (&[P::Owning], Why::NotJournaled, P::Undecided),
        // A failed send proves nothing: only the source's word ends this.
        (&[P::Prepared], Why::LinkLost, P::Undecided),
        (&[P::Prepared], Why::Failed, P::Undecided),
        (&[P::Prepared, P::Undecided], Why::Aborted, P::Discarding),
        // Before the guest's pause a lost connection is no failure, after it it is.
        (&[P::Arriving, P::Receiving], Why::LinkLost, P::Waiting),
        (&[P::Waiting], Why::Linked, P::Arriving),
        (&[P::Waiting], Why::Linked, P::Receiving),
        (&[P::Loading, P::Proving, P::Preparing], Why::LinkLost, P::Discarding),
        (
            &[P::Arriving, P::Receiving, P::Waiting, P::Loading, P::Proving, P::Preparing],
            Why::Failed,
            P::Discarding,
        ),
        (
            &[P::Arriving, P::Receiving, P::Waiting, P::Loading, P::Proving, P::Preparing],
            Why::Aborted,
            P::Discarding,
        ),
        (&[P::Arriving, P::Receiving, P::Loading, P::Proving, P::Preparing], Why::Nonsense, P::Discarding),
        (&[P::Proving], Why::Differs, P::Discarding),
        (&[P::Arriving, P::Preparing], Why::NotJournaled, P::Discarding),
        (&[P::Discarding], Why::Journaled, P::Discarded),
        // Refused where `Incoming` is not on disk, or written by the agent, which then removes the images.
        (&[P::Discarding], Why::NotJournaled, P::Discarded),
    ]
};

/// Every change of phase that a target may make.
pub fn transitions() -> impl Iterator<Item = Transition> {
    transition::all(TABLE)
}
