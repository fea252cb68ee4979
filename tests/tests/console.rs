//! The console stays attached while the VM changes host: nothing of what the guest says is lost or doubled, keys are taken once and in
//! order, whatever dies on the way.
//!
//! The clients are `vmove console` itself, with pipes for a terminal.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmove::api::types::VmState;
use vmove_compute::process::protocol::{Reply, Request, RunState};
use vmove_tests::cluster::Cluster;
use vmove_tests::guest::{Spec, VM};
use vmove_tests::kvm;
use vmove_tests::wait::{LIMIT, until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");

/// Keys that the guest obeys are left out.
const KEYS: &[u8] = b"abdefhijklmnopqtuvwxyz";

/// A guest that says so many lines a second without a break.
fn talker(lines: u64) -> Spec {
    let spec = Spec::default();
    Spec { words: format!("{} vmove.talk={lines}", spec.words), ..spec }
}

/// What a client has printed: whole lines, and the beginning of the next.
#[derive(Default)]
struct Output {
    lines: Vec<String>,
    partial: Vec<u8>,
}

impl Output {
    fn take_in(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(part);
            if part.ends_with(b"\n") {
                self.lines.push(String::from_utf8_lossy(&self.partial).trim_end().to_owned());
                self.partial.clear();
            }
        }
    }
}

/// Sets its flag when it is dropped.
struct Set<'a>(&'a AtomicBool);

impl Drop for Set<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A running `vmove console`.
struct Client {
    process: Child,
    keys: Option<ChildStdin>,
    output: Arc<(Mutex<Output>, Condvar)>,
    notes: Arc<Mutex<String>>,
    typed: u64,
}

impl Client {
    fn attach(cluster: &Cluster, host: &str) -> Self {
        Self::start(cluster, host, true)
    }

    /// A client whose output nobody reads until [`Client::read`].
    fn attach_unread(cluster: &Cluster, host: &str) -> Self {
        Self::start(cluster, host, false)
    }

    fn start(cluster: &Cluster, host: &str, read: bool) -> Self {
        let mut command: Command = cluster.command();
        command.arg("--agent").arg(cluster.host(host).state.join("agent.sock")).args(["console", VM]);
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let notes: Arc<Mutex<String>> = Arc::default();
        let (mut errors, said) = (process.stderr.take().unwrap(), Arc::clone(&notes));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = errors.read(&mut buffer) {
                said.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        let keys = process.stdin.take();
        let mut this = Self { process, keys, output: Arc::default(), notes, typed: 0 };
        if read {
            this.read();
        }
        this
    }

    fn read(&mut self) {
        let (mut from, output) = (self.process.stdout.take().unwrap(), Arc::clone(&self.output));
        thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                output.0.lock().unwrap().take_in(&buffer[..n]);
                output.1.notify_all();
            }
        });
    }

    /// Types the next `count` keys of the row.
    fn type_in(&mut self, count: u64) {
        let keys: Vec<u8> = (self.typed..self.typed + count).map(key).collect();
        self.keys.as_mut().unwrap().write_all(&keys).unwrap();
        self.typed += count;
    }

    /// Waits until the whole lines so far are `enough`.
    fn lines_until<T>(&self, what: &str, enough: impl Fn(&[String]) -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        let mut output = self.output.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = enough(&output.lines) {
                return found;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "no {what}; last: {:?}; said: {}",
                &output.lines[output.lines.len().saturating_sub(5)..],
                self.notes()
            );
            output = self.output.1.wait_timeout(output, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All whole lines so far.
    fn lines(&self) -> Vec<String> {
        self.output.0.lock().unwrap_or_else(PoisonError::into_inner).lines.clone()
    }

    /// The number of the newest `talk` line.
    fn last_talk(&self) -> u64 {
        self.lines_until("talk", newest_talk)
    }

    /// Waits until the guest has said much more than it had when this was called.
    fn goes_on(&self) -> u64 {
        let last = self.last_talk();
        self.talked(last + 200);
        last
    }

    fn talked(&self, to: u64) {
        self.lines_until(&format!("talk of {to}"), |lines| newest_talk(lines).filter(|newest| *newest >= to));
    }

    /// Waits until the guest has answered so many keys.
    fn answered(&self, count: usize) {
        self.lines_until("answer to the keys", |lines| (keys_of(lines).len() >= count).then_some(()));
    }

    fn notes(&self) -> String {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn assert_nothing_missed(&self) {
        let notes = self.notes();
        assert!(!notes.contains("missed") && !notes.contains("anew") && !notes.contains("keys"), "{notes}");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn newest_talk(lines: &[String]) -> Option<u64> {
    lines.iter().rev().find_map(|line| number(line, "talk"))
}

fn key(number: u64) -> u8 {
    KEYS[(number % KEYS.len() as u64) as usize]
}

/// `n` of a line of this kind.
fn number(line: &str, kind: &str) -> Option<u64> {
    line.strip_prefix(kind)?.strip_prefix(" n=")?.split(' ').next()?.parse().ok()
}

/// Every line is whole and each number comes once, in order; a console begins in mid-line, so the first is left out.
fn assert_contiguous(lines: &[String]) {
    for kind in ["talk", "key"] {
        let numbers: Vec<u64> = lines[1..].iter().filter_map(|line| number(line, kind)).collect();
        for pair in numbers.windows(2) {
            assert_eq!(pair[0] + 1, pair[1], "{kind}");
        }
    }
    for line in &lines[1..] {
        let known = ["talk n=", "key n=", "hb seq=", "check ram_errors=0 disk_errors=0", "vmove-guest "];
        assert!(known.iter().any(|start| line.starts_with(start)), "a damaged line: {line:?}");
    }
}

/// The keys that the guest has taken, in order.
fn keys_of(lines: &[String]) -> Vec<u8> {
    let bytes =
        lines.iter().filter_map(|line| line.strip_prefix("key ")?.rsplit_once("byte=")?.1.parse().ok());
    bytes.collect()
}

#[test]
fn nothing_is_lost_or_doubled_while_the_vm_moves_there_and_back() {
    if !kvm::usable("nothing_is_lost_or_doubled_while_the_vm_moves_there_and_back") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b", "c"], &[]);
    // Twice as fast as a serial line of 115200 baud.
    let _booted = cluster.boot("a", &talker(1500));
    // One through the agent that has the VM at first, one through an agent that never has it; the input of that one ends at once, and
    // it watches on.
    let mut near = Client::attach(&cluster, "a");
    let mut far = Client::attach(&cluster, "c");
    drop(far.keys.take());
    let enough = AtomicBool::new(false);
    for n in 0..6 {
        let (from, to) = if n % 2 == 0 { ("a", "b") } else { ("b", "a") };
        near.goes_on();
        thread::scope(|scope| {
            // Also when the move fails: the test does not end before its thread does.
            let _done = Set(&enough);
            // In all phases of the move, the pause included.
            let (enough, near) = (&enough, &mut near);
            scope.spawn(move || {
                while !enough.load(Ordering::SeqCst) {
                    near.type_in(3);
                    thread::sleep(Duration::from_millis(20));
                }
            });
            let report = cluster.relocate(from, &["--host", to]);
            println!("move {n}: pause {} ms", report.downtime_ms);
        });
        enough.store(false, Ordering::SeqCst);
        near.goes_on();
    }
    let typed: Vec<u8> = (0..near.typed).map(key).collect();
    println!("{} keys typed, {} lines", typed.len(), near.last_talk());
    near.answered(typed.len());
    let last = near.goes_on();
    far.talked(last);
    for client in [&near, &far] {
        client.assert_nothing_missed();
        assert_contiguous(&client.lines());
        assert!(client.notes().contains("moved to host b"), "{}", client.notes());
    }
    assert_eq!(keys_of(&near.lines()), typed);
    cluster.vmove("a", &["stop", VM]).ok();
    for client in [&mut near, &mut far] {
        until("the client's end", || client.process.try_wait().unwrap()?.success().then_some(()));
        assert!(client.notes().contains("the VM has stopped"), "{}", client.notes());
    }
}

#[test]
fn keys_typed_in_the_pause_reach_the_guest_once_whether_it_stays_or_goes() {
    if !kvm::usable("keys_typed_in_the_pause_reach_the_guest_once_whether_it_stays_or_goes") {
        return;
    }
    // The state is saved and sent.
    let point = "source.tell-prepare";
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[point]);
    let _booted = cluster.boot("a", &talker(500));
    let mut client = Client::attach(&cluster, "a");
    client.goes_on();
    for (typed, goes) in [(7, false), (14, true)] {
        cluster.begin_move("a", &["--host", "b"]);
        cluster.stops.reached(point);
        client.type_in(7);
        if !goes {
            // Not by `vmove cancel`, which waits for the move's end.
            let cancelled = vmove_tests::runners::ask(&cluster.host("a").vm_dir(VM), &Request::Cancel);
            assert_eq!(cancelled, Some(Reply::Ok));
        }
        cluster.stops.release(point);
        cluster.until_state(if goes { "b" } else { "a" }, VmState::Running);
        client.answered(typed);
        client.goes_on();
        cluster.stops.hold(point);
    }
    client.assert_nothing_missed();
    let lines = client.lines();
    assert_contiguous(&lines);
    assert_eq!(keys_of(&lines), (0..14).map(key).collect::<Vec<u8>>());
}

#[test]
fn the_agent_of_the_old_host_dies_in_the_middle() {
    if !kvm::usable("the_agent_of_the_old_host_dies_in_the_middle") {
        return;
    }
    let point = "source.send-pages";
    let mut cluster = Cluster::start(PROGRAM, &["a", "b", "c"], &[point]);
    let _booted = cluster.boot("a", &talker(300));
    let mut near = Client::attach(&cluster, "a");
    let far = Client::attach(&cluster, "c");
    near.goes_on();
    far.goes_on();
    cluster.begin_move("a", &["--host", "b"]);
    cluster.stops.reached(point);
    cluster.kill_agent("a");
    // Typed to nobody, for now.
    near.type_in(5);
    cluster.stops.release(point);
    until("the VM running at b", || {
        let status = vmove_tests::runners::status(&cluster.host("b").vm_dir(VM))?;
        (status.state == RunState::Running).then_some(())
    });
    // The other client needs the old host no more.
    let seen = far.goes_on();
    cluster.restart_agent("a");
    near.talked(seen + 200);
    near.answered(5);
    for client in [&near, &far] {
        assert_contiguous(&client.lines());
    }
    far.assert_nothing_missed();
}

#[test]
fn a_watcher_that_does_not_read_is_told_what_it_missed() {
    if !kvm::usable("a_watcher_that_does_not_read_is_told_what_it_missed") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a"], &[]);
    let _booted = cluster.boot("a", &talker(1_000_000));
    let mut slow = Client::attach_unread(&cluster, "a");
    let quick = Client::attach(&cluster, "a");
    // More than the console keeps and all buffers on the way hold.
    for _ in 0..10 {
        quick.talked(quick.last_talk() + 10_000);
    }
    slow.read();
    until("word of what was missed", || slow.notes().contains("bytes of output were missed").then_some(()));
    slow.talked(quick.last_talk());
    for client in [&slow, &quick] {
        let numbers: Vec<u64> = client.lines()[1..].iter().filter_map(|line| number(line, "talk")).collect();
        let gaps = numbers.windows(2).filter(|pair| pair[0] + 1 != pair[1]).count();
        // A gap may make one line of two halves.
        assert!(gaps <= 2 * client.notes().matches("were missed").count(), "{gaps}: {}", client.notes());
    }
}
