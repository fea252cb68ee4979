//! The limits a plan keeps to, and a plan as a file. People edit such files: everything in one is checked before it is believed.
//!
//! Never enters: whether the plan fits the cluster (`placement` checks that).

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::placement::cluster::{Goal, Request};
use crate::placement::plan::Plan;

/// Version of the file.
const VERSION: u32 = 1;
/// Longest file that is read, bytes.
const MAX_BYTES: u64 = 64 << 20;
/// Most moves at once.
pub const MAX_PARALLEL: usize = 64;
/// Most vCPUs for each CPU of a host.
pub const MAX_VCPUS_PER_CPU: u32 = 64;

/// Limits of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Most moves at once.
    pub parallel: usize,
    /// Bytes a second for all moves together; none: what the links carry.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// What a host's link is taken to carry, bytes a second.
    pub link: u64,
    /// vCPUs a host may carry for each of its CPUs.
    pub vcpus_per_cpu: u32,
}

impl Limits {
    /// The request to empty a host; none in `to`: to all others.
    pub fn evacuate(&self, host: &str, to: &[String]) -> Request {
        let hosts = BTreeSet::from([host.to_owned()]);
        self.request(Goal::Evacuate { hosts, to: to.iter().cloned().collect() })
    }

    /// A request with these limits.
    pub fn request(&self, goal: Goal) -> Request {
        // Agents do not hand over an image in a shared datastore.
        Request { goal, parallel: self.parallel, bandwidth: self.bandwidth, shared_in_place: false }
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_PARALLEL).contains(&self.parallel) {
            return Err(format!("parallel is {}; it must be 1 to {MAX_PARALLEL}", self.parallel));
        }
        if !(1..=MAX_VCPUS_PER_CPU).contains(&self.vcpus_per_cpu) {
            return Err(format!(
                "vcpus_per_cpu is {}; it must be 1 to {MAX_VCPUS_PER_CPU}",
                self.vcpus_per_cpu
            ));
        }
        if self.bandwidth == Some(0) || self.link == 0 {
            return Err("a rate of 0 would never end".to_owned());
        }
        Ok(())
    }
}

/// A saved plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFile {
    /// Version of the file.
    pub version: u32,
    /// The host it empties.
    pub host: String,
    /// What it was made with, and is carried out with.
    pub limits: Limits,
    /// The plan.
    pub plan: Plan,
}

impl PlanFile {
    /// A plan to be saved.
    pub fn new(host: &str, limits: &Limits, plan: &Plan) -> Self {
        Self { version: VERSION, host: host.to_owned(), limits: limits.clone(), plan: plan.clone() }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// In words.
    pub fn save(&self, path: &Path) -> Result<(), String> {
        let text = serde_json::to_string_pretty(self).map_err(|error| error.to_string())?;
        crate::identity::files::write_private(path, &(text + "\n")).map_err(|error| error.to_string())
    }

    /// Reads one.
    ///
    /// # Errors
    /// In words: not to be read, no plan, or one that says something that cannot be.
    pub fn load(path: &Path) -> Result<Self, String> {
        let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let file = std::fs::File::open(path).map_err(|error| at(&error))?;
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(|error| at(&error))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(at(&format!("longer than {MAX_BYTES} bytes")));
        }
        Self::parse(&text).map_err(|error| at(&error))
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let this: Self = serde_json::from_slice(text).map_err(|error| format!("this is no plan: {error}"))?;
        if this.version != VERSION {
            return Err(format!("version {} of a plan; this program reads {VERSION}", this.version));
        }
        this.limits.check()?;
        if let Some(step) = this.plan.moves.iter().find(|step| step.from != this.host) {
            let (vm, from, host) = (&step.vm, &step.from, &this.host);
            return Err(format!("the plan empties host {host}, and moves VM {vm:?} from {from}"));
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::super::observed::tests::limits;
    use super::*;
    use crate::placement::plan::PlannedMove;

    fn saved() -> PlanFile {
        let step = PlannedMove {
            vm: "web".into(),
            from: "a".into(),
            to: "b".into(),
            disks: std::collections::BTreeMap::new(),
            disk_bytes: 0,
            memory_bytes: 0,
            seconds: 1.0,
            downtime_ms: 20,
        };
        let plan = Plan { moves: vec![step], at_once: 1, seconds: 1.0, blocked: Vec::new() };
        PlanFile::new("a", &limits(), &plan)
    }

    #[test]
    fn what_is_saved_is_read_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan.json");
        saved().save(&path).unwrap();
        assert_eq!(PlanFile::load(&path).unwrap(), saved());
        let refused = |change: &dyn Fn(&mut PlanFile)| {
            let mut file = saved();
            change(&mut file);
            PlanFile::parse(&serde_json::to_vec(&file).unwrap()).unwrap_err()
        };
        assert!(refused(&|file| file.version = 9).contains("version 9"));
        assert!(refused(&|file| file.limits.parallel = 0).contains("parallel is 0"));
        assert!(refused(&|file| file.limits.vcpus_per_cpu = 1000).contains("1000"));
        assert!(refused(&|file| file.limits.bandwidth = Some(0)).contains("rate of 0"));
        assert!(refused(&|file| file.plan.moves[0].from = "z".into()).contains("from z"));
        assert!(PlanFile::parse(b"{}").unwrap_err().contains("no plan"));
        assert!(PlanFile::load(&dir.path().join("none")).unwrap_err().contains("none"));
    }
}
