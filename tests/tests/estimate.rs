//! `vmove estimate`: what it foresees for guests of different loads, beside what their moves then take.

use vmove::api::estimate::{Converges, Estimate, Range};
use vmove::api::types::{MoveProgress, MoveReport};
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
/// So slow that the machine's own noise is small beside it, and that the last guest is too quick for it.
const CAP: &str = "--bandwidth=80MiB/s";

/// Pages stamped a second, within how many MiB; blocks written a second.
struct Load {
    ram_rate: u32,
    ram_mib: u32,
    disk_rate: u32,
}

fn spec(load: &Load) -> Spec {
    let Load { ram_rate, ram_mib, disk_rate } = load;
    Spec {
        memory_mib: 192,
        disk_mib: 96,
        words: format!(
            "vmove.fill_mib=112 vmove.ram_mib={ram_mib} vmove.ram_rate={ram_rate} vmove.disk_mib=48 vmove.disk_rate={disk_rate} \
             vmove.flush_ms=100 vmove.heartbeat_ms=100"
        ),
        ..Spec::default()
    }
}

fn sent(report: &MoveReport) -> f64 {
    let disks: u64 = report.disks.iter().map(|disk| disk.copied_bytes + disk.mirrored_bytes).sum();
    (report.memory.sent_bytes + disks) as f64
}

/// Prints a figure beside its range, and says whether it lies within.
fn within(what: &str, range: Range, real: f64) -> bool {
    let inside = (range.low..=range.high).contains(&real);
    println!(
        "  {what}: foreseen {:.0} to {:.0}, was {real:.0}{}",
        range.low,
        range.high,
        if inside { "" } else { " (outside)" }
    );
    inside
}

#[test]
fn what_is_foreseen_holds_and_what_cannot_converge_is_called_so() {
    if !kvm::usable("estimate") {
        return;
    }
    let loads = [
        Load { ram_rate: 0, ram_mib: 4, disk_rate: 0 },
        Load { ram_rate: 500, ram_mib: 16, disk_rate: 100 },
        Load { ram_rate: 3_000, ram_mib: 32, disk_rate: 200 },
        Load { ram_rate: 8_000, ram_mib: 64, disk_rate: 300 },
        // Faster than the cap lets through, and over more than a pause can take.
        Load { ram_rate: 60_000, ram_mib: 96, disk_rate: 100 },
    ];
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    let mut held = 0;
    for (number, load) in loads.iter().enumerate() {
        let before = cluster.boot("a", &spec(load));
        let to = ["--host", "b", "--datastore", "bulk", CAP];
        let estimate: Estimate =
            cluster.vmove("a", &[&["estimate", VM, "--json", "--watch", "2s"], &to[..]].concat()).json();
        println!("guest {number}: {:?}, {:?}", estimate.converges, estimate.measured);
        before.goes_on();
        let foreseen = &estimate.predicted;
        if number == loads.len() - 1 {
            assert_eq!(estimate.converges, Converges::No, "{estimate:?}");
            assert!(!estimate.advice.is_empty());
            let id = cluster.begin_move("a", &to);
            let ended = until("the move being given up", || {
                let progress: MoveProgress = cluster.vmove("a", &["status", &id, "--json"]).json();
                progress.report
            });
            assert!(ended.reason.as_ref().is_some_and(|why| why.contains("does not converge")), "{ended:?}");
            held += usize::from(within("time, ms", foreseen.total_ms, ended.total_ms));
            before.check();
            cluster.stop_clean("a");
            continue;
        }
        assert_ne!(estimate.converges, Converges::No, "{estimate:?}");
        let report = cluster.relocate("a", &to);
        assert_eq!(report.predicted.as_ref(), Some(foreseen), "the report shows what was foreseen");
        let all = [
            within("time, ms", foreseen.total_ms, report.total_ms),
            within("pause, ms", foreseen.downtime_ms, report.downtime_ms),
            within("bytes", foreseen.bytes, sent(&report)),
        ];
        held += usize::from(all.iter().all(|inside| *inside));
        cluster.console("b").check();
        cluster.stop_clean("b");
        cluster.vmove("b", &["rm", VM]).ok();
        cluster.until_clean("a");
    }
    assert!(held >= 4, "{held} of {} estimates held", loads.len());
}
