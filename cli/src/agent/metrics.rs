//! What an agent counts, as Prometheus reads it (OpenMetrics text).
//!
//! Lives here: names, units and kinds of the figures. Never enters: how they are come by.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::api::types::{DatastoreInfo, MoveProgress, VmState};

/// Upper ends of the pauses counted together, seconds.
const PAUSES: [f64; 10] = [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0];
/// Upper ends of the durations counted together, seconds.
const DURATIONS: [f64; 9] = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    outcome: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Kind {
    Memory,
    Disk,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByState {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByDatastore {
    datastore: String,
}

type Bytes = Gauge<u64, AtomicU64>;

/// The figures of one agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    moves: Family<ByOutcome, Counter>,
    sent: Family<ByKind, Counter>,
    reconnects: Counter,
    pauses: Histogram,
    durations: Histogram,
    going_on: Gauge,
    vms: Family<ByState, Gauge>,
    memory_free: Bytes,
    free: Family<ByDatastore, Bytes>,
    size: Family<ByDatastore, Bytes>,
}

/// What is looked at when the figures are read.
#[derive(Debug)]
pub struct Now<'a> {
    /// States of this host's VMs.
    pub vms: &'a [VmState],
    /// Moves that are led from here.
    pub moves: usize,
    /// RAM that can be had, bytes.
    pub memory_free_bytes: u64,
    /// This host's datastores.
    pub datastores: &'a [DatastoreInfo],
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("vmove")),
            moves: Family::default(),
            sent: Family::default(),
            reconnects: Counter::default(),
            pauses: Histogram::new(PAUSES),
            durations: Histogram::new(DURATIONS),
            going_on: Gauge::default(),
            vms: Family::default(),
            memory_free: Bytes::default(),
            free: Family::default(),
            size: Family::default(),
        };
        {
            let mut all = metrics.registry.lock().unwrap_or_else(PoisonError::into_inner);
            all.register("moves", "Moves led from this host that ended", metrics.moves.clone());
            all.register_with_unit(
                "move_sent",
                "Sent for the moves that ended",
                Unit::Bytes,
                metrics.sent.clone(),
            );
            all.register("move_reconnects", "Connections made anew in moves", metrics.reconnects.clone());
            all.register_with_unit(
                "move_downtime",
                "Pauses of completed moves",
                Unit::Seconds,
                metrics.pauses.clone(),
            );
            all.register_with_unit(
                "move_duration",
                "Completed moves, from the order to the end",
                Unit::Seconds,
                metrics.durations.clone(),
            );
            all.register("moves_going_on", "Moves led from this host now", metrics.going_on.clone());
            all.register("vms", "VMs of this host", metrics.vms.clone());
            all.register_with_unit(
                "memory_free",
                "RAM that can be had without swapping",
                Unit::Bytes,
                metrics.memory_free.clone(),
            );
            all.register_with_unit(
                "datastore_free",
                "Free in a datastore",
                Unit::Bytes,
                metrics.free.clone(),
            );
            all.register_with_unit(
                "datastore_size",
                "Size of a datastore",
                Unit::Bytes,
                metrics.size.clone(),
            );
        }
        metrics
    }
}

impl Metrics {
    /// A move has ended.
    pub fn ended(&self, last: &MoveProgress) {
        let outcome = last.report.as_ref().map_or("unknown", |report| report.outcome.as_str());
        self.moves.get_or_create(&ByOutcome { outcome: outcome.to_owned() }).inc();
        let Some(report) = &last.report else { return };
        let disks: u64 = report.disks.iter().map(|disk| disk.copied_bytes + disk.mirrored_bytes).sum();
        self.sent.get_or_create(&ByKind { kind: Kind::Memory }).inc_by(report.memory.sent_bytes);
        self.sent.get_or_create(&ByKind { kind: Kind::Disk }).inc_by(disks);
        self.reconnects.inc_by(report.reconnects.into());
        if report.outcome == "completed" {
            self.pauses.observe(report.downtime_ms / 1000.0);
            self.durations.observe(report.total_ms / 1000.0);
        }
    }

    /// All of it as text.
    ///
    /// # Errors
    /// The text cannot be written, which is a defect.
    pub fn text(&self, now: &Now<'_>) -> Result<String, std::fmt::Error> {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.going_on.set(now.moves as i64);
        self.memory_free.set(now.memory_free_bytes);
        // States and datastores that are no more must not stay.
        self.vms.clear();
        for state in now.vms {
            let state = super::vms::word(*state).to_owned();
            self.vms.get_or_create(&ByState { state }).inc();
        }
        self.free.clear();
        self.size.clear();
        for store in now.datastores {
            let label = ByDatastore { datastore: store.name.clone() };
            self.free.get_or_create(&label).set(store.free_bytes);
            self.size.get_or_create(&label).set(store.total_bytes);
        }
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_there_with_names_units_and_labels() {
        let metrics = Metrics::default();
        let progress: MoveProgress = serde_json::from_value(serde_json::json!({
            "move_id": "m", "phase": "completed", "elapsed_ms": 1, "disk_total_bytes": 0, "disk_done_bytes": 0, "ram_total_bytes": 0,
            "ram_done_bytes": 0, "round": 0, "rate": 0, "dirty_rate": 0, "left_ms": null, "error": null,
            "report": {
                "vm": "web", "from": {"host": "a", "datastore": "d"}, "to": {"host": "b", "datastore": "d"}, "outcome": "completed",
                "total_ms": 2500.0, "downtime_ms": 25.0, "reconnects": 2, "verified": true, "digest": "",
                "downtime": {"drain_ms": 0.0, "final_pages_ms": 0.0, "state_ms": 0.0, "commit_ms": 0.0, "resume_ms": 0.0},
                "memory": {"ram_bytes": 1, "sent_bytes": 1000, "rounds": 1, "zero_pages": 0, "skipped_bytes": 0, "stream_bytes_per_s": 1},
                "disks": [{"name": "vda", "virtual_bytes": 1, "allocated_bytes": 1, "copied_bytes": 70, "mirrored_bytes": 7}],
            },
        }))
        .unwrap();
        metrics.ended(&progress);
        let store = DatastoreInfo {
            name: "fast".into(),
            id: "i".into(),
            path: "/x".into(),
            total_bytes: 9,
            free_bytes: 4,
            default: true,
        };
        let vms = [VmState::Running, VmState::Running, VmState::Stopped];
        let now = Now { vms: &vms, moves: 1, memory_free_bytes: 5, datastores: std::slice::from_ref(&store) };
        for _ in 0..2 {
            let text = metrics.text(&now).unwrap();
            for line in [
                "vmove_moves_total{outcome=\"completed\"} 1",
                "vmove_move_sent_bytes_total{kind=\"Memory\"} 1000",
                "vmove_move_sent_bytes_total{kind=\"Disk\"} 77",
                "vmove_move_reconnects_total 2",
                "vmove_move_downtime_seconds_bucket{le=\"0.03\"} 1",
                "vmove_move_downtime_seconds_bucket{le=\"0.02\"} 0",
                "vmove_move_duration_seconds_count 1",
                "vmove_moves_going_on 1",
                "vmove_vms{state=\"running\"} 2",
                "vmove_datastore_free_bytes{datastore=\"fast\"} 4",
                "vmove_memory_free_bytes 5",
            ] {
                assert!(text.lines().any(|got| got == line), "{line:?} is not in\n{text}");
            }
        }
    }
}
