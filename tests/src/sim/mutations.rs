//! Rules that are broken on purpose, to see that the checkers notice: the tests of the tests.
//!
//! Each is broken where the rule lives or, for rules inside `vmove_mirror`, by falsifying what goes in or comes out of the engine:
//! the product has no switch for it. Never enters: any run that is not asked for it.

/// A broken rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// "Aborted" is answered before it is journalled.
    AnswerBeforeAborting,
    /// The source goes on to its commit without the record on disk.
    CommitUnjournalled,
    /// An agent acts on the journal of a dead process as it reads, synced or not.
    BelieveUnsynced,
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
    /// A flush on the block stream does not wait for the operations before it.
    FlushBeforeIdle,
    /// Pages that arrive damaged are not sent again.
    IgnoreDamage,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::AnswerBeforeAborting,
        Self::CommitUnjournalled,
        Self::BelieveUnsynced,
        Self::ResumeWhenUnknown,
        Self::OwnOnLinkLost,
        Self::ForgetDirty,
        Self::WritePastMirror,
        Self::TrustFailedBlocks,
        Self::PrepareUnflushed,
        Self::FlushBeforeIdle,
        Self::IgnoreDamage,
    ];
}
