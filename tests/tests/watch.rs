//! Watching moves from outside: `vmove status` from any host, the event stream, the metrics.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use vmove::api::watch::{MoveList, WatchedMove};
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::wait::until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

/// `curl` on an agent's socket; ended when dropped.
struct Curl(Child);

impl Curl {
    fn start(cluster: &Cluster, host: &str, path: &str) -> Self {
        let mut command = Command::new("curl");
        command.args(["-sN", "--unix-socket"]).arg(cluster.host(host).state.join("agent.sock"));
        command.arg(format!("http://agent{path}")).stdin(Stdio::null()).stdout(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    /// Its lines as they come.
    fn lines(&mut self) -> impl Iterator<Item = String> {
        BufReader::new(self.0.stdout.take().unwrap()).lines().map_while(Result::ok)
    }
}

impl Drop for Curl {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_move_is_seen_from_every_host_in_the_stream_and_in_the_metrics() {
    if !kvm::usable("a_move_is_seen_from_every_host_in_the_stream_and_in_the_metrics") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    cluster.boot("a", &Spec::default());
    let none: MoveList = cluster.vmove("b", &["status", "--json"]).json();
    assert!(none.moves.is_empty() && none.unreachable.is_empty(), "{none:?}");
    cluster.vmove("a", &["status", "--watch"]).refused(2, &["terminal"]);

    let mut stream = Curl::start(&cluster, "a", "/v1/events");
    let id = cluster.begin_move("a", &["--host", "b", "--bandwidth", "16MiB/s"]);
    let seen = until("the move being seen from the other host", || {
        let list: MoveList = cluster.vmove("b", &["status", "--json"]).json();
        list.moves.into_iter().find(|seen| seen.progress.move_id == id)
    });
    assert_eq!((seen.vm.as_str(), seen.from_host.as_str(), seen.to_host.as_str()), (VM, "a", "b"));
    let table = cluster.vmove("b", &["status"]).ok();
    assert!(table.contains(VM) && table.contains("a > b"), "{table}");

    // The stream ends for us with the end of the move.
    let mut phases = Vec::new();
    for line in stream.lines() {
        let Some(data) = line.strip_prefix("data: ") else { continue };
        let event: WatchedMove = serde_json::from_str(data).unwrap();
        assert_eq!(event.progress.move_id, id);
        if phases.last() != Some(&event.progress.phase) {
            phases.push(event.progress.phase.clone());
        }
        if event.progress.report.is_some() {
            break;
        }
    }
    assert!(phases.iter().any(|phase| phase == "mirror"), "{phases:?}");
    assert_eq!(phases.last().map(String::as_str), Some("completed"), "{phases:?}");

    let metrics: Vec<String> = Curl::start(&cluster, "a", "/metrics").lines().collect();
    for line in [
        "vmove_moves_total{outcome=\"completed\"} 1",
        "vmove_move_downtime_seconds_count 1",
        "vmove_moves_going_on 0",
        "# EOF",
    ] {
        assert!(metrics.iter().any(|got| got == line), "{line:?} is not in {metrics:#?}");
    }
}
