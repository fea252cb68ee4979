//! What the fixture guest says on its console (`fixtures/guest/README.md`), and typing to it.
//!
//! A [`Console`] follows one VM process; after a move attach to the new one, which knows what was said before. It also judges: an
//! `error` line of the guest, or a count of errors above zero, fails the test that waits.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use vmove::client::attachment::{Attachment, Seen};
use vmove_compute::process::console::wire::{self, Decoder, RunId};

use crate::wait::{LIMIT, until};

/// One `hb` line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Its number, from 1 at boot.
    pub seq: u64,
    /// Largest pause since the one before, us.
    pub gap_us: u64,
    /// Last disk write that a completed flush covered.
    pub flushed_seq: u64,
}

/// One `check` line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Pages of RAM looked at.
    pub pages: u64,
    /// Blocks of the disk looked at.
    pub blocks: u64,
}

#[derive(Debug, Default)]
struct Log {
    lines: Vec<String>,
    partial: Vec<u8>,
    /// None for a plain serial line, which has no messages.
    attachment: Option<Attachment>,
    ended: bool,
}

type Shared = Arc<(Mutex<Log>, Condvar)>;

/// The console of one VM process.
#[derive(Debug)]
pub struct Console {
    shared: Shared,
    typing: UnixStream,
}

impl Console {
    /// Attaches to the console socket of a VM process; gives it with all that it keeps of what was said before.
    pub fn attach(socket: &Path) -> Self {
        until("a console that greets", || {
            let typing = UnixStream::connect(socket).ok()?;
            let mut attachment = Attachment::new(uuid::Uuid::new_v4().into_bytes());
            (&typing).write_all(&wire::encode(&attachment.connect()).unwrap()).ok()?;
            let console = Self::follow(typing, Some(attachment));
            let mut log = lock(&console.shared.0);
            while !log.ended && !log.attachment.as_ref().is_some_and(Attachment::has_caught_up) {
                log = console.shared.1.wait(log).unwrap_or_else(PoisonError::into_inner);
            }
            // A process that was just ending has closed the connection; the next one has the VM.
            let greeted = log.attachment.as_ref().is_some_and(Attachment::has_caught_up);
            drop(log);
            greeted.then_some(console)
        })
    }

    /// Attaches to a serial line without messages, such as QEMU's.
    pub fn attach_plain(socket: &Path) -> Self {
        Self::follow(until("a line to attach to", || UnixStream::connect(socket).ok()), None)
    }

    fn follow(typing: UnixStream, attachment: Option<Attachment>) -> Self {
        let plain = attachment.is_none();
        let shared = Arc::new((Mutex::new(Log { attachment, ..Log::default() }), Condvar::new()));
        let (from, log) = (typing.try_clone().unwrap(), Arc::clone(&shared));
        thread::spawn(move || {
            // How it ended is of no interest: the other side has hung up, or this one.
            let _ = if plain { read_plain(from, &log) } else { read_messages(from, &log) };
            lock(&log.0).ended = true;
            log.1.notify_all();
        });
        Self { shared, typing }
    }

    /// Types to the guest.
    pub fn type_in(&self, keys: &[u8]) {
        let mut log = lock(&self.shared.0);
        let Some(attachment) = &mut log.attachment else {
            return (&self.typing).write_all(keys).unwrap();
        };
        attachment.type_in(keys);
        while let Some(message) = attachment.next_keys() {
            (&self.typing).write_all(&wire::encode(&message).unwrap()).unwrap();
        }
    }

    /// The guest's run: another one after it was started again, the same after a move.
    pub fn run(&self) -> RunId {
        lock(&self.shared.0).attachment.as_ref().and_then(Attachment::run).expect("it has greeted")
    }

    /// Waits until `find` sees what it looks for in the complete lines so far.
    pub fn wait<T>(&self, what: &str, mut find: impl FnMut(&[String]) -> Option<T>) -> T {
        let end = Instant::now() + LIMIT;
        let mut log = lock(&self.shared.0);
        loop {
            judge(&log.lines);
            if let Some(found) = find(&log.lines) {
                return found;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !log.ended && !left.is_zero(),
                "no {what} on the console (ended: {}):\n{}",
                log.ended,
                tail(&log)
            );
            log = self.shared.1.wait_timeout(log, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All heartbeats so far.
    pub fn heartbeats(&self) -> Vec<Heartbeat> {
        let log = lock(&self.shared.0);
        judge(&log.lines);
        log.lines.iter().filter_map(|line| heartbeat(line)).collect()
    }

    /// The newest heartbeat with a number above `seq`, once there is one.
    pub fn heartbeat_after(&self, seq: u64) -> Heartbeat {
        self.wait(&format!("heartbeat after {seq}"), |lines| {
            lines.iter().rev().find_map(|line| heartbeat(line)).filter(|newest| newest.seq > seq)
        })
    }

    /// Two heartbeats that are not here yet: the guest goes on. Gives the last one.
    pub fn goes_on(&self) -> Heartbeat {
        let now = self.heartbeats().last().map_or(0, |last| last.seq);
        self.heartbeat_after(now + 1)
    }

    /// What a start from these disks must recover at least: writes that the guest has seen flushed, and has said so in its
    /// superblock. It does that after each flush and before the next, so a later flush stands for all but the last number seen.
    pub fn surely_flushed(&self) -> u64 {
        let heartbeats = self.heartbeats();
        let newest = heartbeats.last().map_or(0, |last| last.flushed_seq);
        heartbeats.iter().map(|one| one.flushed_seq).filter(|seq| *seq < newest).max().unwrap_or(0)
    }

    /// The number up to which a guest that was started again found its disk in order, once it has said so.
    pub fn recovered(&self) -> u64 {
        self.wait("word of the recovery", |lines| {
            let fields = lines.iter().find_map(|line| fields(line, "recovered"))?;
            assert_eq!(fields["errors"], 0, "the guest found flushed writes lost: {fields:?}");
            Some(fields["flushed_seq"])
        })
    }

    /// Has the guest look at all its RAM and disk now. That it is in order is asserted.
    pub fn check(&self) -> Check {
        let seen = self.wait("its lines", |lines| Some(lines.len()));
        self.type_in(b"c");
        let check = self.wait("check", |lines| {
            let fields = lines[seen..].iter().find_map(|line| fields(line, "check"))?;
            Some(Check { pages: fields["checked_pages"], blocks: fields["checked_blocks"] })
        });
        assert!(check.pages > 0 && check.blocks > 0, "{check:?}");
        check
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Ends the reading thread; the other end may be gone already.
        let _ = self.typing.shutdown(std::net::Shutdown::Both);
    }
}

impl Log {
    fn take_in(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    }
}

fn read_plain(mut from: UnixStream, shared: &Shared) -> std::io::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        lock(&shared.0).take_in(&buffer[..n]);
        shared.1.notify_all();
    }
}

fn read_messages(mut from: UnixStream, shared: &Shared) -> std::io::Result<()> {
    let mut buffer = [0; 16 << 10];
    let mut decoder = Decoder::default();
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        decoder.push(&buffer[..n]);
        let mut log = lock(&shared.0);
        while let Some(message) = decoder.take().map_err(std::io::Error::other)? {
            let Some(attachment) = &mut log.attachment else { return Ok(()) };
            for seen in attachment.receive(message).map_err(std::io::Error::other)? {
                match seen {
                    Seen::Output(bytes) => log.take_in(&bytes),
                    // A line broken in the middle is not to be put together with another.
                    Seen::Missed(_) => log.partial.clear(),
                    _ => {}
                }
            }
        }
        drop(log);
        shared.1.notify_all();
    }
}

fn lock(log: &Mutex<Log>) -> std::sync::MutexGuard<'_, Log> {
    // A failed assertion under the lock must not hide behind this one.
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tail(log: &Log) -> String {
    log.lines[log.lines.len().saturating_sub(15)..].join("\n")
}

fn judge(lines: &[String]) {
    let counted = |line: &str| {
        ["ram_errors", "disk_errors"].iter().any(|key| {
            let value = line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            value.is_some_and(|value| value != "0")
        })
    };
    // With its blank: after a move a console begins in mid-line, perhaps with `errors=0`.
    if let Some(line) = lines.iter().find(|line| line.starts_with("error ") || counted(line)) {
        panic!("the guest says: {line}");
    }
}

fn heartbeat(line: &str) -> Option<Heartbeat> {
    let fields = fields(line, "hb")?;
    // The last field of the line stands for its completeness: a console may begin in mid-line.
    fields.get("irqs")?;
    let get = |key: &str| fields.get(key).copied();
    Some(Heartbeat { seq: get("seq")?, gap_us: get("gap_us")?, flushed_seq: get("flushed_seq")? })
}

/// Numbers of a line of the given kind.
fn fields(line: &str, kind: &str) -> Option<HashMap<String, u64>> {
    let rest = line.strip_prefix(kind)?.strip_prefix(' ')?;
    let pairs = rest.split(' ').filter_map(|word| word.split_once('='));
    Some(pairs.filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HB: &str = "hb seq=7 up_ms=1 gap_us=2300 max_gap_us=9 ram_errors=0 disk_errors=0 checked_pages=1 checked_blocks=1 \
                      written_pages=1 written_blocks=1 flushed_seq=55 irqs=1";

    #[test]
    fn lines_are_understood() {
        assert_eq!(heartbeat(HB), Some(Heartbeat { seq: 7, gap_us: 2300, flushed_seq: 55 }));
        assert_eq!(heartbeat(HB.strip_suffix(" irqs=1").unwrap()), None);
        assert_eq!(fields("recovered flushed_seq=9 errors=0", "recovered").unwrap()["flushed_seq"], 9);
        let mut log = Log::default();
        log.take_in(b"a\nb");
        log.take_in(b"c\r\n");
        assert_eq!(log.lines, ["a", "bc"]);
    }

    #[test]
    fn a_guest_with_errors_fails_the_test() {
        judge(&[HB.to_owned()]);
        for bad in
            [HB.replace("disk_errors=0", "disk_errors=1"), "error io op=Read block=3 status=1".to_owned()]
        {
            assert!(std::panic::catch_unwind(|| judge(&[bad])).is_err());
        }
    }
}
