//! What was seen to happen: transitions of the state machines and rows of the failure table.
//!
//! Lives here: names of events, the sets that were hit. Never enters: what should happen.

use std::collections::BTreeMap;

use vmove_mirror::{
    block, committed,
    journal::{Standing, Verdict},
    recovery::{Holding, PeerAnswer},
    source, target,
    wire::control::{SourceMsg, TargetMsg},
};

/// Hits by name.
#[derive(Debug, Default, Clone)]
pub struct Marks {
    source: BTreeMap<(source::Phase, &'static str, source::Phase), u64>,
    target: BTreeMap<(u8, &'static str, u8), (target::Phase, target::Phase, u64)>,
    other: BTreeMap<String, u64>,
}

impl Marks {
    /// A step of the source's engine.
    pub fn source(&mut self, before: source::Phase, kind: &'static str, after: source::Phase) {
        if before != after {
            *self.source.entry((before, kind, after)).or_default() += 1;
        }
    }

    /// A step of the target's engine.
    pub fn target(&mut self, before: target::Phase, kind: &'static str, after: target::Phase) {
        if before != after {
            self.target.entry((before as u8, kind, after as u8)).or_insert((before, after, 0)).2 += 1;
        }
    }

    /// A step of a mirror.
    pub fn block(&mut self, before: block::State, kind: &'static str, after: block::State) {
        if before != after {
            *self.other.entry(format!("mirror {before:?} -{kind}-> {after:?}")).or_default() += 1;
        }
    }

    /// The commit.
    pub fn committed(&mut self) {
        *self.other.entry("source Committing -Journaled-> committed".into()).or_default() += 1;
    }

    /// A step after the commit that led to something.
    pub fn after(&mut self, kind: &'static str) {
        *self.other.entry(format!("committed -{kind}->")).or_default() += 1;
    }

    /// A row of the failure table was used.
    pub fn settled(&mut self, standing: &Standing, answer: PeerAnswer) {
        let row = format!("settle {} {}", standing_name(standing), answer_name(answer));
        *self.other.entry(row).or_default() += 1;
    }

    /// Adds those of another world.
    pub fn merge(&mut self, others: &Self) {
        for (mark, hits) in others.all() {
            *self.other.entry(mark).or_default() += hits;
        }
    }

    /// All marks that were hit, and how often.
    pub fn all(&self) -> BTreeMap<String, u64> {
        let mut out = self.other.clone();
        for ((before, kind, after), hits) in &self.source {
            *out.entry(format!("source {before:?} -{kind}-> {after:?}")).or_default() += hits;
        }
        for ((_, kind, _), (before, after, hits)) in &self.target {
            *out.entry(format!("target {before:?} -{kind}-> {after:?}")).or_default() += hits;
        }
        out
    }
}

/// A standing in a word.
pub fn standing_name(standing: &Standing) -> &'static str {
    match standing {
        Standing::Nothing => "Nothing",
        Standing::Owner { .. } => "Owner",
        Standing::Moving { .. } => "Moving",
        Standing::Incoming { prepared: false, .. } => "Incoming",
        Standing::Incoming { prepared: true, .. } => "Prepared",
        Standing::Committed { .. } => "Committed",
        Standing::Discarded { .. } => "Discarded",
        Standing::Released { .. } => "Released",
        Standing::Lost { .. } => "Lost",
    }
}

fn answer_name(answer: PeerAnswer) -> &'static str {
    match answer {
        PeerAnswer::Said(Verdict::Committed) => "said Committed",
        PeerAnswer::Said(Verdict::Aborted) => "said Aborted",
        PeerAnswer::Said(Verdict::Moving) => "said Moving",
        PeerAnswer::Said(Verdict::Unknown) => "said Unknown",
        PeerAnswer::Holds(Holding::Nothing) => "holds nothing",
        PeerAnswer::Holds(Holding::Arriving) => "holds an arrival",
        PeerAnswer::Holds(Holding::Prepared) => "is prepared",
        PeerAnswer::Holds(Holding::Owner { .. }) => "is owner",
        PeerAnswer::NotAsked => "not asked",
        PeerAnswer::Unreachable => "silent",
    }
}

/// An event of the source's engine in a word.
pub fn source_kind(event: &source::Event) -> &'static str {
    use source::Event as E;
    match event {
        E::Journaled => "Journaled",
        E::JournalFailed(_) => "JournalFailed",
        E::Connected => "Connected",
        E::GaveUp(_) => "GaveUp",
        E::Restored { .. } => "Restored",
        E::Target(TargetMsg::Resumed(_)) => "Resumed",
        E::Target(TargetMsg::PagesAck { .. }) => "PagesAck",
        E::Target(TargetMsg::Ready) => "Ready",
        E::Target(TargetMsg::RoundAck { .. }) => "RoundAck",
        E::Target(TargetMsg::Prepared { .. }) => "Prepared",
        E::Target(TargetMsg::Refused { .. }) => "Refused",
        E::Target(TargetMsg::Running { .. }) => "Running",
        E::Disk { state: block::State::Bulk, .. } => "Disk(Bulk)",
        E::Disk { state: block::State::Synced, .. } => "Disk(Synced)",
        E::Disk { state: block::State::Degraded, .. } => "Disk(Degraded)",
        E::Disk { state: block::State::Draining, .. } => "Disk(Draining)",
        E::Disk { state: block::State::Drained, .. } => "Disk(Drained)",
        E::Disk { state: block::State::Failed, .. } => "Disk(Failed)",
        E::LoggingStarted { .. } => "LoggingStarted",
        E::BatchSent { .. } => "BatchSent",
        E::Dirty(_) => "Dirty",
        E::Paused => "Paused",
        E::QueuesEmpty => "QueuesEmpty",
        E::StateSaved(_) => "StateSaved",
        E::Proved(_) => "Proved",
        E::LinkLost(_) => "LinkLost",
        E::Failed(_) => "Failed",
        E::Cancel => "Cancel",
    }
}

/// An event of the target's engine in a word.
pub fn target_kind(event: &target::Event) -> &'static str {
    use target::Event as E;
    match event {
        E::Journaled => "Journaled",
        E::JournalFailed(_) => "JournalFailed",
        E::ImagesReady => "ImagesReady",
        E::Linked(_) => "Linked",
        E::Source(SourceMsg::Resume) => "Resume",
        E::Source(SourceMsg::Setup { .. }) => "Setup",
        E::Source(SourceMsg::RoundEnd { .. }) => "RoundEnd",
        E::Source(SourceMsg::State(_)) => "State",
        E::Source(SourceMsg::Prepare(_)) => "Prepare",
        E::Source(SourceMsg::Commit) => "Commit",
        E::Source(SourceMsg::Abort { .. }) => "Abort",
        E::Loaded => "Loaded",
        E::Proved { .. } => "Proved",
        E::Resumed { .. } => "Resumed",
        E::LinkLost(_) => "LinkLost",
        E::Failed(_) => "Failed",
        E::Resolved(Verdict::Committed) => "Resolved(Committed)",
        E::Resolved(Verdict::Aborted) => "Resolved(Aborted)",
        E::Resolved(Verdict::Moving) => "Resolved(Moving)",
        E::Resolved(Verdict::Unknown) => "Resolved(Unknown)",
        E::TakeOver => "TakeOver",
    }
}

/// An event after the commit in a word.
pub fn committed_kind(event: &committed::CommittedEvent) -> &'static str {
    use committed::CommittedEvent as E;
    match event {
        E::Running { .. } => "Running",
        E::Pivoted => "Pivoted",
        E::LinkLost => "LinkLost",
        E::Journaled => "Journaled",
    }
}

/// An event of a mirror in a word.
pub fn block_kind(event: &block::Event) -> &'static str {
    use block::Event as E;
    match event {
        E::Allocated { .. } => "Allocated",
        E::Mapped => "Mapped",
        E::Guest { .. } => "Guest",
        E::LocalDone { .. } => "LocalDone",
        E::CopyRead { .. } => "CopyRead",
        E::CopyFailed { .. } => "CopyFailed",
        E::Acked { done: true, .. } => "Acked",
        E::Acked { done: false, .. } => "Failed",
        E::TargetAway => "TargetAway",
        E::TargetBack { .. } => "TargetBack",
        E::TargetLost => "TargetLost",
        E::Drain => "Drain",
    }
}
