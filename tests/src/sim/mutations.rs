//! Rules that are broken on purpose, to see that the checkers notice: the tests of the tests.
//!
//! Each is broken where the rule lives or, for rules inside `vmove_mirror`, by falsifying what goes in or comes out of the engine:
//! the product has no switch for it. Never enters: any run that is not asked for it.

use super::faults::{Fault, Kind, Place, Side, When};

/// Seeds, and actions to strike before, within which most broken rules must be noticed.
const SEEDS: u64 = 60;
const ACTIONS: u32 = 45;

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
    /// An agent acts upon records that it reads and nobody has synced, and says "committed" for one.
    BelieveUnsynced,
    /// A source says "aborted" of a move without having that on disk, and goes on with it.
    AbortUnjournalled,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::CommitUnjournalled,
        Self::ResumeWhenUnknown,
        Self::OwnOnLinkLost,
        Self::ForgetDirty,
        Self::WritePastMirror,
        Self::TrustFailedBlocks,
        Self::PrepareUnflushed,
        Self::BelieveUnsynced,
        Self::AbortUnjournalled,
    ];

    /// Worlds that bring it to light, by seed and faults: many more seeds would find it by chance.
    pub fn provoked_by(self) -> Box<dyn Iterator<Item = (u64, Vec<Fault>)>> {
        let (kind, side) = match self {
            Self::CommitUnjournalled => (Kind::KillProcess, Side::Source),
            Self::ResumeWhenUnknown => (Kind::JournalBroken, Side::Source),
            Self::OwnOnLinkLost => (Kind::Reset, Side::Target),
            Self::ForgetDirty | Self::WritePastMirror => (Kind::Cut, Side::Source),
            Self::TrustFailedBlocks => (Kind::ImageFails, Side::Target),
            Self::PrepareUnflushed => (Kind::PowerCut, Side::Target),
            Self::BelieveUnsynced => return Box::new(committed_and_the_record_lost()),
            Self::AbortUnjournalled => return Box::new(asked_while_prepared_is_on_its_way()),
        };
        Box::new((1..=SEEDS).flat_map(move |seed| {
            (0..ACTIONS).map(move |action| {
                let when = When::Before(side, action);
                (seed, vec![Fault { kind, when, place: Place::Acting, size: seed * 977 }])
            })
        }))
    }
}

/// The target says "prepared", and on the way that takes some time; meanwhile it is in trouble, cannot trust the connection and asks.
fn asked_while_prepared_is_on_its_way() -> impl Iterator<Item = (u64, Vec<Fault>)> {
    // The first target's seventh action is to say it.
    let fault = |kind, size| Fault { kind, when: When::Before(Side::Target, 6), place: Place::Acting, size };
    (3..=8).flat_map(move |seed| {
        // Until 0.6 s later, in steps of half a millisecond.
        (0..1_300)
            .map(move |step| (seed, vec![fault(Kind::OneWayCut, step * 12), fault(Kind::DriverFails, 0)]))
    })
}

/// The source's process dies between writing its commit and syncing it; the target hears of it all the same, from the source's agent, and
/// the source's power is cut before that agent has synced another record.
fn committed_and_the_record_lost() -> impl Iterator<Item = (u64, Vec<Fault>)> {
    (1..=8).flat_map(|seed| {
        (0..ACTIONS).flat_map(move |action| {
            let fault = move |kind, when, place| Fault { kind, when, place, size: seed * 977 };
            let dies = fault(Kind::DiesUnsynced, When::Before(Side::Source, action), Place::Acting);
            // The first target's last actions: to journal that the VM is its own, to run it, to be done.
            (7..=10).map(move |owns| {
                let cut = fault(Kind::PowerCut, When::Before(Side::Target, owns), Place::Other);
                (seed, vec![dies, cut])
            })
        })
    })
}
