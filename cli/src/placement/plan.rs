//! A plan: what moves where, in which order, and what cannot; and the check of a plan that people may have edited.
//!
//! Never enters: how a plan is found.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::cluster::{Cluster, Request};
use super::room::{Choice, Index, Room};

/// Longest plan file that is read, bytes.
const MAX_BYTES: usize = 64 << 20;

/// An ordered plan. Moves start in this order, at most `at_once` together; nothing in it waits for room that another move frees, so it
/// fits whatever takes longer than predicted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The moves.
    pub moves: Vec<PlannedMove>,
    /// Moves at once.
    pub at_once: usize,
    /// Predicted seconds for all of it.
    pub seconds: f64,
    /// VMs that should move and cannot.
    pub blocked: Vec<Blocked>,
}

/// One move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedMove {
    /// The VM.
    pub vm: String,
    /// Where it is.
    pub from: String,
    /// Where it goes.
    pub to: String,
    /// Datastore there of each of its disks, by the disk's name.
    pub disks: BTreeMap<String, String>,
    /// Predicted bytes of disks that are copied.
    pub disk_bytes: u64,
    /// Predicted bytes of RAM that are sent.
    pub memory_bytes: u64,
    /// Predicted seconds.
    pub seconds: f64,
    /// Predicted downtime, ms.
    pub downtime_ms: u64,
}

/// A VM that cannot move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blocked {
    /// The VM.
    pub vm: String,
    /// Everything that stands in the way.
    pub reasons: Vec<String>,
}

/// Why a plan or a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The file is no plan.
    #[error("this is no plan: {0}")]
    Malformed(String),
    /// It names what is not there, or names it twice.
    #[error("{0}")]
    Unknown(String),
    /// It cannot be carried out; everything that is wrong with it.
    #[error("the plan cannot be carried out: {}", .0.join("; "))]
    Impossible(Vec<String>),
}

impl Plan {
    /// Reads a plan file.
    pub fn from_json(bytes: &[u8]) -> Result<Self, PlacementError> {
        if bytes.len() > MAX_BYTES {
            return Err(PlacementError::Malformed(format!("it is longer than {MAX_BYTES} bytes")));
        }
        serde_json::from_slice(bytes).map_err(|error| PlacementError::Malformed(error.to_string()))
    }

    /// Checks a plan against the cluster as it is now: every move possible, and nothing overfilled at any time. Finds everything that
    /// is wrong.
    pub fn check(&self, cluster: &Cluster, request: &Request) -> Result<(), PlacementError> {
        self.choices(&Index::new(cluster, request)?).map(|_| ())
    }

    /// The same moves with predictions for the cluster as it is now, whatever the file says of them.
    ///
    /// # Errors
    /// As [`Plan::check`].
    pub fn predicted(&self, cluster: &Cluster, request: &Request) -> Result<Self, PlacementError> {
        let index = Index::new(cluster, request)?;
        Ok(Self::of(&index, &self.choices(&index)?, self.blocked.clone()))
    }

    fn choices(&self, index: &Index<'_>) -> Result<Vec<Choice>, PlacementError> {
        let mut room = Room::new(index);
        let (mut wrong, mut moved) = (Vec::new(), BTreeSet::new());
        let (mut choices, request) = (Vec::new(), index.request);
        if self.at_once == 0 || self.at_once > request.parallel.max(1) {
            wrong.push(format!(
                "{} moves at once; it must be 1 to {}",
                self.at_once,
                request.parallel.max(1)
            ));
        }
        for step in &self.moves {
            let mut refuse = |why: String| wrong.push(format!("VM {:?}: {why}", step.vm));
            let Some(vm) = index.vm(&step.vm) else {
                refuse("there is no such VM".into());
                continue;
            };
            if !moved.insert(vm) {
                refuse("it is moved twice".into());
                continue;
            }
            if index.host_name(index.home(vm)) != step.from {
                refuse(format!("it is on host {}, not on {}", index.host_name(index.home(vm)), step.from));
                continue;
            }
            match index.choice(vm, &step.to, &step.disks) {
                Err(why) => refuse(why),
                Ok(choice) => {
                    let reasons = room.against(&choice);
                    if reasons.is_empty() {
                        room.take(&choice);
                        choices.push(choice);
                    }
                    reasons.into_iter().for_each(refuse);
                }
            }
        }
        if wrong.is_empty() { Ok(choices) } else { Err(PlacementError::Impossible(wrong)) }
    }

    /// A plan of these choices, in this order.
    pub(super) fn of(index: &Index<'_>, choices: &[Choice], blocked: Vec<Blocked>) -> Self {
        let at_once = index.at_once(choices);
        let moves: Vec<_> = choices
            .iter()
            .map(|choice| {
                let vm = &index.cluster.vms[choice.vm];
                let host = &index.cluster.hosts[choice.host];
                let named = vm.disks.iter().zip(&choice.stores);
                let prediction = index.predict(choice, at_once);
                PlannedMove {
                    vm: vm.name.clone(),
                    from: vm.host.clone(),
                    to: host.name.clone(),
                    disks: named
                        .map(|(disk, store)| (disk.name.clone(), host.datastores[*store].name.clone()))
                        .collect(),
                    disk_bytes: choice.copied,
                    memory_bytes: prediction.memory_bytes,
                    seconds: prediction.seconds,
                    downtime_ms: prediction.downtime_ms,
                }
            })
            .collect();
        Self { moves, at_once, seconds: index.total_seconds(choices, at_once), blocked }
    }
}
