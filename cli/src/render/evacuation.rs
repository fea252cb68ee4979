//! Plans and reports of evacuations in words.

use std::fmt::Write as _;

use super::table::{Align, Table};
use super::units;
use crate::evacuation::report::EvacuationReport;
use crate::placement::plan::{Blocked, Plan};

/// A plan: what moves in which order, and what cannot.
pub fn plan(title: &str, plan: &Plan) -> String {
    let mut text = format!(
        "{title}: {} to move, at most {} at once, about {}\n",
        vms(plan.moves.len()),
        plan.at_once,
        seconds(plan.seconds)
    );
    if !plan.moves.is_empty() {
        let mut table = Table::new(&[
            ("", Align::Right),
            ("VM", Align::Left),
            ("FROM", Align::Left),
            ("TO", Align::Left),
            ("DATASTORES", Align::Left),
            ("DISKS", Align::Right),
            ("RAM", Align::Right),
            ("TIME", Align::Right),
            ("DOWNTIME", Align::Right),
        ]);
        for (number, step) in plan.moves.iter().enumerate() {
            let disks: Vec<String> =
                step.disks.iter().map(|(disk, store)| format!("{disk} on {store}")).collect();
            table.row([
                (number + 1).to_string(),
                step.vm.clone(),
                step.from.clone(),
                step.to.clone(),
                disks.join(", "),
                units::size(step.disk_bytes),
                units::size(step.memory_bytes),
                seconds(step.seconds),
                units::millis(step.downtime_ms as f64),
            ]);
        }
        text += &table.render();
        text += "Times are for guests at rest; one that writes takes longer.\n";
    }
    text + &stays("cannot move", &plan.blocked)
}

/// A report: what came of each VM, and what stays.
pub fn report(report: &EvacuationReport) -> String {
    let mut table = Table::new(&[
        ("VM", Align::Left),
        ("FROM", Align::Left),
        ("TO", Align::Left),
        ("OUTCOME", Align::Left),
        ("TRIES", Align::Right),
        ("TIME", Align::Right),
        ("DOWNTIME", Align::Right),
        ("SENT", Align::Right),
    ]);
    for vm in &report.vms {
        let real = |show: &dyn Fn(crate::evacuation::report::Figures) -> String| {
            vm.real.map(show).unwrap_or_default()
        };
        table.row([
            vm.vm.clone(),
            vm.from.clone(),
            vm.to.clone(),
            serde_json::to_value(vm.outcome)
                .ok()
                .and_then(|word| Some(word.as_str()?.replace('_', " ")))
                .unwrap_or_default(),
            vm.attempts.to_string(),
            real(&|figures| seconds(figures.seconds)),
            real(&|figures| units::millis(figures.downtime_ms)),
            real(&|figures| units::size(figures.bytes)),
        ]);
    }
    let totals = &report.totals;
    let mut text = if report.vms.is_empty() { String::new() } else { table.render() };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{} of {} moved in {} ({} predicted), {} sent, longest downtime {}",
        totals.moved,
        vms(totals.vms),
        seconds(totals.seconds),
        seconds(totals.predicted_seconds),
        units::size(totals.bytes),
        units::millis(totals.longest_downtime_ms)
    );
    text
}

/// VMs that stay, with all reasons.
fn stays(title: &str, blocked: &[Blocked]) -> String {
    let mut text = String::new();
    for vm in blocked {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} {title}:", vm.vm);
        for reason in &vm.reasons {
            let _ = writeln!(text, "  - {reason}");
        }
    }
    text
}

fn vms(count: usize) -> String {
    if count == 1 { "1 VM".to_owned() } else { format!("{count} VMs") }
}

fn seconds(seconds: f64) -> String {
    units::millis(seconds * 1000.0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::evacuation::report::{Figures, Outcome, VmReport};
    use crate::placement::plan::PlannedMove;

    fn step() -> PlannedMove {
        PlannedMove {
            vm: "web".into(),
            from: "a".into(),
            to: "b".into(),
            disks: BTreeMap::from([("vda".to_owned(), "fast".to_owned())]),
            disk_bytes: 1 << 20,
            memory_bytes: 1 << 20,
            seconds: 2.0,
            downtime_ms: 20,
        }
    }

    #[test]
    fn everything_of_a_plan_is_said() {
        let blocked = Blocked { vm: "old".into(), reasons: vec!["it does not run".into()] };
        let planned = Plan { moves: vec![step()], at_once: 1, seconds: 2.0, blocked: vec![blocked] };
        let text = plan("Empty host a", &planned);
        for part in ["1 VM to move", "web", "vda on fast", "old cannot move:\n  - it does not run"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_report_adds_up() {
        let vm = |outcome, real| VmReport {
            vm: "web".into(),
            from: "a".into(),
            to: "b".into(),
            outcome,
            attempts: 1,
            move_id: None,
            predicted: Figures::default(),
            real,
            reasons: Vec::new(),
        };
        let real = Figures { seconds: 1.0, downtime_ms: 30.0, bytes: 1 << 20 };
        let vms = vec![
            vm(Outcome::Moved, Some(real)),
            vm(Outcome::Moved, Some(real)),
            vm(Outcome::AlreadyThere, None),
        ];
        let made = EvacuationReport::new("a", vms, Vec::new(), 3.0, 2.0);
        assert_eq!((made.totals.moved, made.totals.bytes, made.totals.attempts), (2, 2 << 20, 3));
        assert!(made.complete);
        let text = report(&made);
        assert!(text.contains("2 of 3 VMs moved") && text.contains("already there"), "{text}");
    }
}
