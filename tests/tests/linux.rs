//! A Linux guest and its users: what they see of moves between hosts with networks of their own, and of the end of a host.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use vmove::api::types::VmState;
use vmove_tests::clients::{Announcements, EchoedStream, Ping, Program, Ssh, download};
use vmove_tests::cluster::Cluster;
use vmove_tests::console::Console;
use vmove_tests::guest::VM;
use vmove_tests::netns::{BRIDGE, CLIENT, Lan};
use vmove_tests::wait::until;
use vmove_tests::{kvm, linux};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmove-under-test");
const ANNOUNCEMENTS: &str = env!("CARGO_BIN_EXE_announcements");
/// The guest's addresses.
const IP: &str = "10.77.0.100";
const MAC: &str = "52:54:00:00:00:64";
/// Between two requests of `ping`, ms.
const PING_INTERVAL_MS: f64 = 200.0;
/// What the host's slowness may explain beside what was measured before the move: here other tests and an emulated kernel share 2 cores.
const NET: Duration = Duration::from_secs(3);

/// Held for writing while a guest's view of time is looked at, which others would disturb; for reading while one boots, or does what
/// takes as long as it takes.
static QUIET: RwLock<()> = RwLock::new(());

/// Runs what may be done beside other guests.
fn beside_others<T>(act: impl FnOnce() -> T) -> T {
    let _guard = QUIET.read().unwrap_or_else(PoisonError::into_inner);
    act()
}

/// Seconds since 1970 by the host's clock.
fn now() -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64()
}

/// How far the guest's wall clock is behind the host's, by the word of its shell: at least and at most, seconds.
fn lag(console: &Console) -> (f64, f64) {
    let said = |lines: &[String]| -> Vec<f64> {
        lines.iter().filter_map(|line| line.trim_end().strip_prefix("wall=")?.parse().ok()).collect()
    };
    let seen = console.wait("its lines", |lines| Some(said(lines).len()));
    let asked = now();
    console.type_in(b"date +wall=%s\n");
    let wall = console.wait("the guest's wall clock", |lines| said(lines).get(seen).copied());
    // It says whole seconds, and read its clock at some time between the question and now.
    (asked - wall - 1.0, now() - wall)
}

/// Sets the guest's wall clock, as its NTP client would. A Linux kernel counts timer ticks before it has found its clock, and one that
/// is emulated, and so slow that ticks are lost, comes out of its boot some seconds behind.
fn set_clock(console: &Console) {
    let (mut least, mut most) = lag(console);
    println!("wall clock {least:.1} to {most:.1} s behind after the boot");
    while least > 1.0 || most < -1.0 || most - least > 3.0 {
        console
            .type_in(format!("date -s @$(($(date +%s) + {}))\n", (least.midpoint(most)).round()).as_bytes());
        (least, most) = lag(console);
    }
}

/// The guest's wall clock is the host's, but for what was left by [`set_clock`].
fn assert_clock_right(console: &Console) {
    let (least, most) = lag(console);
    println!("wall clock {least:.1} to {most:.1} s behind");
    let net = NET.as_secs_f64();
    assert!(least <= net && most >= -net, "the wall clock is {least:.1} to {most:.1} s behind");
}

/// A move that ends well; asserts what `ping` makes of it.
fn relocate(cluster: &Cluster, ping: &Ping, from: &str, words: &[&str]) -> f64 {
    let lost = ping.lost();
    let report = cluster.relocate(from, words);
    ping.goes_on();
    let lost = ping.lost() - lost;
    println!(
        "{from} {words:?}: {:.0} ms, pause {:.1} ms, {} MiB of RAM sent, {lost} pings lost",
        report.total_ms,
        report.downtime_ms,
        report.memory.sent_bytes >> 20
    );
    // One request falls into the pause; a pause of several intervals swallows as many.
    assert!(lost <= 1 + (report.downtime_ms / PING_INTERVAL_MS) as usize, "{lost} lost: {report:?}");
    report.downtime_ms
}

/// A `timers` line of the witness.
fn timers(line: &str) -> HashMap<String, u64> {
    let words = line.strip_prefix("timers ").unwrap_or_else(|| panic!("{line}")).split(' ');
    let fields = words.filter_map(|word| word.split_once('='));
    fields.map(|(key, value)| (key.to_owned(), value.parse().unwrap())).collect()
}

/// How far the guest's wall clock is behind the host's, ms: the least over some reports, as these take time to get here.
fn behind(program: &mut Program) -> i128 {
    let lag = |program: &mut Program| {
        let report = timers(program.goes_on(1).last().unwrap());
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
        now as i128 - i128::from(report["wall_ms"])
    };
    (0..6).map(|_| lag(program)).min().unwrap()
}

/// A guest that does nothing but sleep, for 1 to 1000 ms, on 2 vCPUs.
fn timers_go_on(cluster: &Cluster, lan: &Lan, ssh: &Ssh<'_>, ping: &Ping) {
    set_clock(&cluster.console("a"));
    let mut program = ssh.start("exec witness timers");
    program.goes_on(2);
    let behind_before = behind(&mut program);
    let before: Vec<_> = program.lines()[1..].iter().map(|line| timers(line)).collect();
    let worst = |reports: &[HashMap<String, u64>], field: &str| {
        Duration::from_micros(reports.iter().map(|report| report[field]).max().unwrap())
    };
    let usual = worst(&before, "late_us").max(worst(&before, "due_us"));

    let mut announcements = Announcements::start(ANNOUNCEMENTS, lan.host(1));
    let downtime_ms = relocate(cluster, ping, "a", &["--host", "b", "--datastore", "bulk"]);
    // For the guest, and by the guest itself, which was asked to (GUEST_ANNOUNCE).
    announcements.hears("rarp", MAC);
    announcements.hears("garp", MAC);
    drop(announcements);
    let behind_after = behind(&mut program);
    let after: Vec<_> = program.lines()[1 + before.len()..].iter().map(|line| timers(line)).collect();
    let (late, due) = (worst(&after, "late_us"), worst(&after, "due_us"));
    println!(
        "timers: late by up to {usual:?} before the move, {late:?} through it, {due:?} overdue; wall clock {behind_before} ms behind before, {behind_after} ms after"
    );
    let allowed = usual * 2 + Duration::from_secs_f64(downtime_ms / 1000.0) + NET;
    assert!(
        late <= allowed,
        "a sleep was late by {late:?}, {usual:?} before the move, pause {downtime_ms} ms"
    );
    assert!(due <= allowed, "a timer was lost: a sleeper is overdue by {due:?}");
    let last = after.last().unwrap();
    assert_eq!(last["backwards"], 0, "CLOCK_MONOTONIC went backwards");
    assert!(last["sleeps"] > before.last().unwrap()["sleeps"]);
    let net = NET.as_millis() as i128;
    assert!((behind_after - behind_before).abs() <= net, "the wall clock is {behind_after} ms behind");
    assert_clock_right(&cluster.console("b"));
}

/// The numbers of a counting program: each once and in order.
fn assert_counted(lines: &[String]) {
    for (n, line) in lines.iter().enumerate() {
        assert_eq!(*line, format!("count n={n:08} abcdefghijklmnopqrstuvwxyz"));
    }
}

/// The guest's console by `vmove console`, from b on.
fn attached(cluster: &Cluster) -> Program {
    let mut command = cluster.command();
    command.arg("--agent").arg(cluster.host("b").state.join("agent.sock")).args(["console", VM]);
    Program::start(&mut command)
}

/// An SSH session, a stream both ways and a program on the console through 5 moves, from b.
fn sessions_live_on(cluster: &Cluster, lan: &Lan, ssh: &Ssh<'_>, ping: &Ping) {
    let mut counter = ssh.start("exec witness count 200");
    let stream = EchoedStream::start(lan.switch(), IP, 7);
    let mut console = attached(cluster);
    cluster.console("b").type_in(b"witness count 200\n");
    let counted = |lines: &[String]| -> Vec<String> {
        // Before the first number stand the boot and the echo of the command.
        let ours = lines.iter().map(|line| line.trim_end()).skip_while(|line| !line.starts_with("count n="));
        ours.map(str::to_owned).collect()
    };
    until("numbers on the console", || (counted(&console.lines()).len() > 5).then_some(()));
    counter.goes_on(5);
    stream.goes_on();
    for n in 0..5 {
        let (from, to) = if n % 2 == 0 { ("b", "a") } else { ("a", "b") };
        relocate(cluster, ping, from, &["--host", to]);
        counter.goes_on(5);
        console.goes_on(5);
        stream.goes_on();
    }
    let bytes = stream.finish();
    let lines = counter.goes_on(1);
    assert_counted(&lines);
    let on_console = counted(&console.goes_on(1));
    assert_counted(&on_console);
    cluster.console("a").type_in(b"\x03");
    println!(
        "in order: SSH {} lines, console {} lines, TCP {bytes} bytes there and back",
        lines.len(),
        on_console.len()
    );
}

fn sha256(file: &Path) -> String {
    let sum = Command::new("sha256sum").arg(file).output().unwrap();
    String::from_utf8(sum.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

/// A download and a file written with fsync through a move from a to b; gives the digest of the file, which is left alone afterwards.
fn files_stay_whole(cluster: &Cluster, lan: &Lan, ssh: &Ssh<'_>, ping: &Ping) -> String {
    let mut writer = ssh.start("exec witness write /data");
    let blob = cluster.path().join("blob");
    let client = download(lan.switch(), &format!("http://{IP}/blob"), &blob, 200_000);
    let downloaded = || blob.metadata().map_or(0, |file| file.len());
    until("the beginning of the download", || (downloaded() > 0).then_some(()));
    writer.goes_on(2);
    let before = downloaded();
    relocate(cluster, ping, "a", &["--host", "b", "--datastore", "bulk"]);
    let after = downloaded();
    let lines = writer.goes_on(2);
    drop(writer);
    client.finish();
    println!("HTTP: {before} bytes before the move, {after} after it, {} in the end", downloaded());
    assert!(before < downloaded(), "the download was over before the move");
    let sums = ssh.run("sha256sum /www/blob; killall witness; sleep 1; witness check /data; sha256sum /data");
    let mut sums = sums.lines();
    let sum = |line: Option<&str>| line.and_then(|line| line.split(' ').next()).unwrap().to_owned();
    assert_eq!(sha256(&blob), sum(sums.next()), "what was downloaded");
    let checked: usize = sums.next().unwrap().strip_prefix("check blocks=").unwrap().parse().unwrap();
    println!("fsync: {} blocks said to be on the disk, {checked} in order", lines.len());
    assert!(checked >= lines.len());
    sum(sums.next())
}

#[test]
fn users_of_a_linux_guest_notice_nothing_of_moves() {
    const TEST: &str = "users_of_a_linux_guest_notice_nothing_of_moves";
    if !kvm::usable(TEST) {
        return;
    }
    let Some(mut lan) = Lan::new(TEST, 2) else { return };
    let cluster = Cluster::start_on(&lan, PROGRAM, &["a", "b"], &[]);
    let words = format!("ip={IP}::{CLIENT}:255.255.255.0:guest:eth0:off");
    cluster.create_linux("a", 2, &words, &["--net", &format!("bridge={BRIDGE},mac={MAC}")]).ok();
    beside_others(|| {
        cluster.vmove("a", &["start", VM]).ok();
        linux::booted(&cluster.console("a"), 0);
    });
    let quiet = QUIET.write().unwrap_or_else(PoisonError::into_inner);
    let ping = Ping::start(lan.switch(), IP);
    ping.goes_on();

    let ssh = Ssh::new(lan.switch(), IP);
    // What the guest's kernel has to say if something goes wrong.
    let witness = attached(&cluster);
    timers_go_on(&cluster, &lan, &ssh, &ping);
    sessions_live_on(&cluster, &lan, &ssh, &ping);
    let data = files_stay_whole(&cluster, &lan, &ssh, &ping);
    let mut counter = ssh.start("exec witness count 200");
    counter.goes_on(5);
    drop((ssh, witness));

    // The host it came from is switched off.
    let lost = ping.lost();
    lan.destroy(0);
    ping.goes_on();
    ping.goes_on();
    assert_eq!(ping.lost(), lost);
    assert_counted(&counter.goes_on(20));
    drop((counter, quiet));

    // Rebooted from inside, stopped by its power button.
    let console = cluster.console("b");
    let ssh = Ssh::new(lan.switch(), IP);
    let seen = console.wait("its lines", |lines| Some(lines.len()));
    // Later, so that the session ends before the network does.
    ssh.run("(sleep 1; reboot) > /dev/null 2>&1 &");
    linux::booted(&console, seen);
    ping.goes_on();
    assert!(ssh.run("sha256sum /data").starts_with(&data), "the file is another after the reboot");
    cluster.vmove("b", &["stop", VM]).ok();
    let image = cluster.until_state("b", VmState::Stopped).summary.disks[0].path.clone();
    let file_system = linux::file_system_of(&image, cluster.path());
    assert_eq!(sha256(&linux::file_of(&file_system, "/data", cluster.path())), data);
}

#[test]
fn a_linux_guest_on_the_move_or_restored_goes_on_and_switches_itself_off_cleanly() {
    if !kvm::usable("a_linux_guest_on_the_move_or_restored_goes_on_and_switches_itself_off_cleanly") {
        return;
    }
    let cluster = Cluster::start(PROGRAM, &["a", "b"], &[]);
    cluster.create_linux("a", 1, "", &[]).ok();
    beside_others(|| {
        cluster.vmove("a", &["start", VM]).ok();
        linux::booted(&cluster.console("a"), 0);
    });
    beside_others(|| switched_off_from_inside(&cluster));
}

/// A guest that writes goes from a to b by a move, on from a checkpoint, and switches itself off.
fn switched_off_from_inside(cluster: &Cluster) {
    let synced = |lines: &[String]| lines.iter().filter(|line| line.starts_with("synced n=")).count();
    let goes_on = |console: &Console| {
        let so_far = console.wait("its lines", |lines| Some(synced(lines)));
        console.wait("further blocks on the disk", |lines| (synced(lines) > so_far + 3).then_some(()));
    };
    let console = cluster.console("a");
    set_clock(&console);
    console.type_in(b"witness write /file &\n");
    goes_on(&console);
    cluster.relocate("a", &["--host", "b", "--datastore", "bulk"]);
    let console = cluster.console("b");
    goes_on(&console);

    cluster.vmove("b", &["checkpoint", VM, "one", "--stop"]).ok();
    let began = Instant::now();
    cluster.until_state("b", VmState::Stopped);
    // Long enough to tell a clock that has stood still from one that is right.
    thread::sleep((NET * 3).saturating_sub(began.elapsed()));
    cluster.vmove("b", &["restore", VM, "one"]).ok();
    let console = cluster.console("b");
    goes_on(&console);
    assert_clock_right(&console);

    console.type_in(b"kill %1; wait; witness check /file; poweroff\n");
    let newest = |line: &String| line.strip_prefix("synced n=")?.parse::<u64>().ok();
    let (synced, checked): (u64, u64) = console.wait("the check of the file", |lines| {
        let checked = lines.iter().find_map(|line| line.strip_prefix("check blocks=")?.parse().ok())?;
        Some((lines.iter().filter_map(newest).max()?, checked))
    });
    assert!(
        checked > synced,
        "{checked} blocks are in order, the last one said to be on the disk is {synced}"
    );
    let vm = cluster.until_state("b", VmState::Stopped);
    linux::file_system_of(&vm.summary.disks[0].path, cluster.path());
}
