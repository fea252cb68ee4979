//! A move's plan and its report in words.
//!
//! Lives here: text from `MovePlan` and `MoveReport`. Never enters: how they were got.

use std::fmt::Write as _;

use super::units;
use crate::api::estimate::{Converges, Estimate, Predicted, Range};
use crate::api::types::{DiskAction, MemoryAction, MovePlan, MoveReport, Place};

/// `host` or `host/datastore`.
pub fn place(place: &Place) -> String {
    if place.datastore.is_empty() {
        place.host.clone()
    } else {
        format!("{}/{}", place.host, place.datastore)
    }
}

/// What a dry run prints.
pub fn plan(plan: &MovePlan) -> String {
    let mut text = format!("{}: {} -> {}\n", plan.vm, place(&plan.from), place(&plan.to));
    let memory = match plan.memory {
        MemoryAction::Move => "moves to the other host",
        MemoryAction::Stay => "stays",
    };
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(text, "  memory {memory}");
    for disk in &plan.disks {
        let _ = match disk.action {
            DiskAction::Copy => writeln!(
                text,
                "  disk {}: {} copied, {} -> {}",
                disk.name,
                units::size(disk.bytes),
                place(&disk.from),
                place(&disk.to)
            ),
            DiskAction::Stay => writeln!(text, "  disk {} stays in {}", disk.name, place(&disk.from)),
        };
    }
    if plan.blockers.is_empty() {
        text.push_str("nothing stands in the way\n");
    }
    text
}

/// What is printed after a completed move.
pub fn report(report: &MoveReport) -> String {
    let mut text = format!(
        "{}: {} -> {}, {} in {}, paused for {}\n",
        report.vm,
        place(&report.from),
        place(&report.to),
        report.outcome,
        units::millis(report.total_ms),
        units::millis(report.downtime_ms),
    );
    let parts = &report.downtime;
    let _ = writeln!(
        text,
        "  pause: drain {:.1}, last pages {:.1}, state {:.1}, commit {:.1}, resume {:.1} ms",
        parts.drain_ms, parts.final_pages_ms, parts.state_ms, parts.commit_ms, parts.resume_ms
    );
    let memory = &report.memory;
    if memory.rounds > 0 {
        let _ = writeln!(
            text,
            "  memory: {} of {} sent in {} rounds, {} zero pages, {} never touched",
            units::size(memory.sent_bytes),
            units::size(memory.ram_bytes),
            memory.rounds,
            memory.zero_pages,
            units::size(memory.skipped_bytes)
        );
    }
    for disk in &report.disks {
        let _ = writeln!(
            text,
            "  disk {}: {} copied, {} mirrored, image takes {} of {}",
            disk.name,
            units::size(disk.copied_bytes),
            units::size(disk.mirrored_bytes),
            units::size(disk.allocated_bytes),
            units::size(disk.virtual_bytes)
        );
    }
    if report.reconnects > 0 {
        let _ = writeln!(text, "  link: lost and made again {} times", report.reconnects);
    }
    if report.verified {
        text.push_str("  verified: both sides agreed before the commit\n");
    }
    if let Some(predicted) = &report.predicted {
        let sent =
            memory.sent_bytes + report.disks.iter().map(|d| d.copied_bytes + d.mirrored_bytes).sum::<u64>();
        let _ = writeln!(
            text,
            "  estimated: time {} (was {}), pause {} (was {}), {} to send (were {})",
            times(predicted.total_ms),
            units::millis(report.total_ms),
            times(predicted.downtime_ms),
            units::millis(report.downtime_ms),
            sizes(predicted.bytes),
            units::size(sent)
        );
    }
    text
}

fn times(range: Range) -> String {
    format!("{} to {}", units::millis(range.low), units::millis(range.high))
}

fn sizes(range: Range) -> String {
    format!("{} to {}", units::size(range.low as u64), units::size(range.high as u64))
}

/// What `vmove estimate` prints.
pub fn estimate(estimate: &Estimate) -> String {
    let plan = &estimate.plan;
    let mut text = format!("{}: {} -> {}\n", plan.vm, place(&plan.from), place(&plan.to));
    let rates = &estimate.measured;
    // Writing to a String cannot fail, here and below.
    let _ = write!(text, "  watched for {}: ", units::millis(rates.watched_ms as f64));
    if plan.memory == MemoryAction::Move {
        let _ = write!(
            text,
            "{} of RAM in use, {} turning dirty; ",
            units::size(rates.ram_bytes),
            units::rate(rates.dirty_bytes_per_s)
        );
    }
    let _ = writeln!(text, "{} written to the disks", units::rate(rates.disk_write_bytes_per_s));
    if let Some(link) = rates.link_bytes_per_s {
        let turn = rates.round_trip_us.unwrap_or(0) as f64 / 1000.0;
        let _ = writeln!(text, "  link: {}, there and back in {turn:.2} ms", units::rate(link));
    }
    if let Some(disk) = rates.disk_bytes_per_s {
        let _ = writeln!(text, "  into the datastore: {}", units::rate(disk));
    }
    let Predicted { total_ms, downtime_ms, bytes } = &estimate.predicted;
    let _ = match estimate.converges {
        Converges::No => writeln!(
            text,
            "it will not converge: after {} it would be given up, the VM running where it is; a pause would have to last {}",
            times(*total_ms),
            times(*downtime_ms)
        ),
        sure => writeln!(
            text,
            "time {}, pause {}, {} to send, {} to {} rounds of memory{}",
            times(*total_ms),
            times(*downtime_ms),
            sizes(*bytes),
            estimate.rounds.0,
            estimate.rounds.1,
            if sure == Converges::Unsure { "; it may not converge" } else { "" }
        ),
    };
    for advice in &estimate.advice {
        let _ = writeln!(text, "  {advice}");
    }
    text
}
