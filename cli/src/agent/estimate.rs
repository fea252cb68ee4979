//! Estimating a move, as the agent of the host that has the VM: plan, watch, probe, foresee; and remembering it for the move's report.
//!
//! Lives here: what is measured in which order. Never enters: the measuring itself (`probe`, the VM's process), the arithmetic.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use vmove_compute::process::measure::{LONGEST, Measurement};
use vmove_compute::process::protocol::{Reply, Request};
use vmove_mirror::Micros;
use vmove_mirror::predict::{
    Convergence, DirtyCurve, DiskLoad, Measured, MemoryLoad, Prediction, Span, predict,
};

use super::Agent;
use super::control;
use super::error::{ApiError, blocking};
use super::vmdir::VmDir;
use crate::api::estimate::{Converges, Estimate, EstimateRequest, MeasuredRates, Predicted, Range};
use crate::api::types::{DiskAction, MemoryAction, MoveAnswer, MovePlan, MoveRequest};
use crate::identity::files::write_private;
use crate::render::units;

/// The last estimate, in the VM's directory.
const FILE: &str = "estimate.json";
/// How long an estimate says something about a move.
const FRESH: Duration = Duration::from_mins(15);
/// How often a watch is looked at.
const INTERVAL: Duration = Duration::from_millis(50);
/// Shortest watch.
const SHORTEST: Duration = Duration::from_millis(500);
/// Of a probe's rate, what the streams of a move reach at least and at most, of 100: they read guest memory and images, sum them, and
/// share the processors with the guest; a probe has HTTP's framing.
const OF_PROBE: Span<u64> = Span { low: 40, high: 160 };
/// The same for a cap that is slower than the link.
const OF_CAP: Span<u64> = Span { low: 85, high: 105 };

/// An estimate as it is remembered.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    /// Seconds since 1970.
    made_at: u64,
    plan: MovePlan,
    max_downtime_ms: u64,
    bandwidth: Option<u64>,
    predicted: Predicted,
}

impl Agent {
    /// Estimates a move of a VM that runs on this host. Nothing of it is changed.
    pub async fn estimate(
        self: &Arc<Self>,
        name: &str,
        EstimateRequest { order, watch_ms }: EstimateRequest,
    ) -> Result<Estimate, ApiError> {
        let time = Duration::from_millis(watch_ms);
        if !(SHORTEST..=LONGEST).contains(&time) {
            return Err(ApiError::invalid(format!(
                "watch_ms is {watch_ms}; it must be {} to {}",
                SHORTEST.as_millis(),
                LONGEST.as_millis()
            )));
        }
        let plan = match self.move_vm(name, MoveRequest { dry_run: true, ..order.clone() }).await? {
            MoveAnswer::Plan(plan) => plan,
            MoveAnswer::Accepted(_) => return Err(ApiError::internal("a dry run has begun a move")),
        };
        if !plan.blockers.is_empty() {
            return Err(ApiError::blocked(format!("VM {name:?} cannot be moved so"), plan.blockers));
        }
        let vm = self.registry.vm(name)?;
        let seen = watch(&vm, name, time).await?;
        let way = self.way(&plan, order.bandwidth).await?;
        let measured = measured(&plan, &seen, &way);
        let foreseen = predict(&measured, order.max_downtime_ms.saturating_mul(1000));
        let estimate = Estimate {
            converges: match foreseen.convergence {
                Convergence::Yes => Converges::Yes,
                Convergence::Unsure => Converges::Unsure,
                Convergence::No => Converges::No,
            },
            predicted: in_report_units(&foreseen),
            rounds: (foreseen.rounds.low, foreseen.rounds.high),
            advice: advice(&foreseen, order.bandwidth),
            measured: rates(&seen, &measured, &way),
            plan,
        };
        let remembered = Remembered {
            made_at: now(),
            plan: estimate.plan.clone(),
            max_downtime_ms: order.max_downtime_ms,
            bandwidth: order.bandwidth,
            predicted: estimate.predicted.clone(),
        };
        let text = serde_json::to_string(&remembered)
            .map_err(|e| ApiError::internal(format!("cannot write the estimate: {e}")))?;
        let path = vm.path().join(FILE);
        blocking(move || Ok(write_private(&path, &text)?)).await?;
        Ok(estimate)
    }

    /// What gets through, for what the plan has to carry.
    async fn way(&self, plan: &MovePlan, cap: Option<u64>) -> Result<Way, ApiError> {
        let copied = plan.disks.iter().find(|disk| disk.action == DiskAction::Copy);
        let mut way = Way { cap, ..Way::default() };
        match plan.memory {
            MemoryAction::Move => {
                let host = &plan.to.host;
                way.round_trip = Some(self.round_trip(host).await?);
                way.link = Some(self.probe_peer(host, None).await?);
                if let Some(disk) = copied {
                    way.disk = Some(self.probe_peer(host, Some(&disk.to.datastore)).await?);
                }
            }
            MemoryAction::Stay => {
                if let Some(disk) = copied {
                    way.disk = Some(self.probe_store(&disk.to.datastore).await?);
                }
            }
        }
        Ok(way)
    }
}

/// What was foreseen of this very move, if an estimate was made shortly before.
pub(super) fn remembered(vm: &VmDir, plan: &MovePlan, request: &MoveRequest) -> Option<Predicted> {
    let text = std::fs::read(vm.path().join(FILE)).ok()?;
    let last: Remembered = serde_json::from_slice(&text).ok()?;
    let targets = |plan: &MovePlan| -> Vec<_> { plan.disks.iter().map(|disk| disk.to.clone()).collect() };
    let same = last.plan.from.host == plan.from.host
        && last.plan.to == plan.to
        && targets(&last.plan) == targets(plan)
        && last.max_downtime_ms == request.max_downtime_ms
        && last.bandwidth == request.bandwidth;
    (same && now().saturating_sub(last.made_at) <= FRESH.as_secs()).then_some(last.predicted)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// What gets through, bytes a second.
#[derive(Debug, Clone, Copy, Default)]
struct Way {
    round_trip: Option<Duration>,
    link: Option<u64>,
    disk: Option<u64>,
    cap: Option<u64>,
}

impl Way {
    /// What streams of a move reach where a probe has reached `probe`.
    fn span(&self, probe: Option<u64>) -> Span<u64> {
        let probe = probe.unwrap_or(1);
        // The rate is another agent's word: it may be anything.
        let share = |rate: u64, percent: u64| (rate / 100).saturating_mul(percent);
        let of =
            |rate: u64, span: Span<u64>| Span { low: share(rate, span.low), high: share(rate, span.high) };
        let free = of(probe, OF_PROBE);
        match self.cap {
            Some(cap) => {
                let capped = of(cap, OF_CAP);
                Span { low: free.low.min(capped.low), high: free.high.min(capped.high) }
            }
            None => free,
        }
    }
}

/// Has the VM's process watch its guest.
async fn watch(vm: &VmDir, name: &str, time: Duration) -> Result<Measurement, ApiError> {
    let failed = |why: String| ApiError::vm_process(format!("cannot measure VM {name:?}: {why}"));
    match control::ask(vm.path(), &Request::Measure { millis: time.as_millis() as u64 }).await {
        Ok(Reply::Ok) => {}
        Ok(other) => return Err(failed(control::unexpected(&other).to_string())),
        Err(error) => return Err(failed(error.to_string())),
    }
    tokio::time::sleep(time).await;
    loop {
        match control::ask(vm.path(), &Request::Measured).await {
            Ok(Reply::Measured(Some(seen))) => return Ok(*seen),
            Ok(Reply::Measured(None)) => tokio::time::sleep(INTERVAL).await,
            Ok(other) => return Err(failed(control::unexpected(&other).to_string())),
            Err(error) => return Err(failed(error.to_string())),
        }
    }
}

fn measured(plan: &MovePlan, seen: &Measurement, way: &Way) -> Measured {
    let zero_pages = seen.resident_pages * seen.zero_permille.min(1000) / 1000;
    let memory = (plan.memory == MemoryAction::Move).then(|| MemoryLoad {
        data_pages: seen.resident_pages - zero_pages,
        zero_pages,
        dirty: DirtyCurve::new(seen.dirty_points(), seen.ram_pages),
    });
    let written = |name: &str| seen.disks.iter().find(|(disk, _)| disk == name).map_or(0, |(_, rate)| *rate);
    let copied = plan.disks.iter().filter(|disk| disk.action == DiskAction::Copy);
    Measured {
        memory,
        disks: copied.map(|disk| DiskLoad { bytes: disk.bytes, write_rate: written(&disk.name) }).collect(),
        memory_link: way.span(way.link),
        disk_link: way.span(way.disk),
        round_trip: way.round_trip.unwrap_or_default().as_micros() as Micros,
        sync: Span { low: seen.sync_us.0 / 8, high: seen.sync_us.1 * 3 },
    }
}

fn in_report_units(foreseen: &Prediction) -> Predicted {
    let ms = |span: Span<Micros>| Range { low: span.low as f64 / 1000.0, high: span.high as f64 / 1000.0 };
    Predicted {
        total_ms: ms(foreseen.total),
        downtime_ms: ms(foreseen.downtime),
        bytes: Range { low: foreseen.bytes.low as f64, high: foreseen.bytes.high as f64 },
    }
}

fn advice(foreseen: &Prediction, cap: Option<u64>) -> Vec<String> {
    let mut advice = Vec::new();
    if let Some(needed) = foreseen.downtime_needed {
        let needed = units::millis(needed as f64 / 1000.0);
        advice.push(format!("allow a longer pause: --max-downtime of about {needed}"));
    }
    if let Some(needed) = foreseen.link_needed {
        let needed = units::rate(needed);
        advice.push(match cap {
            Some(_) => format!("raise --bandwidth: about {needed} is needed"),
            None => format!("use a faster link: about {needed} is needed"),
        });
    }
    if foreseen.convergence != Convergence::Yes {
        advice.push("let the guest write less, or move it when it does".to_owned());
    }
    advice
}

fn rates(seen: &Measurement, measured: &Measured, way: &Way) -> MeasuredRates {
    let per_second = |pages: u64, time: u64| {
        (u128::from(pages * vmove_mirror::PAGE_BYTES) * 1_000_000 / u128::from(time.max(1))) as u64
    };
    let data_pages = measured.memory.as_ref().map_or(0, |memory| memory.data_pages);
    MeasuredRates {
        watched_ms: seen.watched_ms,
        dirty_bytes_per_s: seen.dirty.last().map_or(0, |(time, _, most)| per_second(*most, *time)),
        ram_bytes: data_pages * vmove_mirror::PAGE_BYTES,
        disk_write_bytes_per_s: measured.disks.iter().map(|disk| disk.write_rate).sum(),
        link_bytes_per_s: way.link,
        disk_bytes_per_s: way.disk,
        round_trip_us: way.round_trip.map(|time| time.as_micros() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_that_cannot_be_is_no_panic() {
        for probe in [0, u64::MAX] {
            for cap in [None, Some(0), Some(u64::MAX)] {
                let span = Way { cap, ..Way::default() }.span(Some(probe));
                assert!(span.low <= span.high, "{span:?}");
            }
        }
    }
}
