//! Rules that are broken on purpose, to see that the checkers notice: the tests of the tests.
//!
//! Each is broken where the rule lives or, for rules inside `vmove_mirror`, by falsifying what goes in or comes out of the engine:
//! the product has no switch for it. That "aborted" is journalled before it is said is the model's to show ([`crate::model`]): here it
//! would take a commit within microseconds of the question. Never enters: any run that is not asked for it.

use super::faults::{Kind, Side};

/// A broken rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The source goes on to its commit without the record on disk.
    CommitUnjournalled,
    /// The source resumes when the fate of its commit record is unknown.
    ResumeWhenUnknown,
    /// The target takes a lost connection for the source's commit.
    OwnOnLinkLost,
    /// Dirty pages are forgotten now and then.
    ForgetDirty,
    /// Some writes of the guest go past the mirror.
    WritePastMirror,
    /// A block operation that failed at the target counts as done.
    TrustFailedBlocks,
    /// The target says "prepared" without flushing its images.
    PrepareUnflushed,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::CommitUnjournalled,
        Self::ResumeWhenUnknown,
        Self::OwnOnLinkLost,
        Self::ForgetDirty,
        Self::WritePastMirror,
        Self::TrustFailedBlocks,
        Self::PrepareUnflushed,
    ];

    /// The fault that brings it to light, and before whose actions: many more seeds would find it by chance.
    pub fn provoked_by(self) -> (Kind, Side) {
        match self {
            Self::CommitUnjournalled => (Kind::KillProcess, Side::Source),
            Self::ResumeWhenUnknown => (Kind::JournalBroken, Side::Source),
            Self::OwnOnLinkLost => (Kind::Reset, Side::Target),
            Self::ForgetDirty | Self::WritePastMirror => (Kind::Cut, Side::Source),
            Self::TrustFailedBlocks => (Kind::ImageFails, Side::Target),
            Self::PrepareUnflushed => (Kind::PowerCut, Side::Target),
        }
    }
}
