//! Users of a guest: programs in a network namespace, and what they see.
//!
//! Lives here: ping, what announces addresses, SSH sessions, streams that the guest echoes, downloads. Never enters: the guest's own view.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::linux::LinuxGuest;
use crate::netns::Namespace;
use crate::wait::until;

type Lines = Arc<Mutex<Vec<String>>>;

/// A program and the lines it has printed. Dropping it ends it.
#[derive(Debug)]
pub struct Program {
    process: Child,
    lines: Lines,
    /// What it had to complain of.
    errors: Lines,
    reader: Option<JoinHandle<()>>,
}

fn read_lines(output: impl Read + Send + 'static) -> (Lines, JoinHandle<()>) {
    let lines = Lines::default();
    let seen = Arc::clone(&lines);
    let reader = thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    });
    (lines, reader)
}

impl Program {
    /// Starts a program. Nobody types to it, but its standard input stays open.
    pub fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let (lines, reader) = read_lines(process.stdout.take().unwrap());
        let (errors, _) = read_lines(process.stderr.take().unwrap());
        Self { process, lines, errors, reader: Some(reader) }
    }

    /// Types to it.
    pub fn type_in(&mut self, keys: &[u8]) {
        self.process.stdin.as_mut().unwrap().write_all(keys).unwrap();
    }

    /// All complete lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for so many further lines; gives all.
    pub fn goes_on(&mut self, further: usize) -> Vec<String> {
        let enough = self.lines().len() + further;
        until(&format!("{further} further lines of {}", self.process.id()), || {
            if let Some(status) = self.process.try_wait().unwrap() {
                panic!("the program ended ({status}): {:?}, {:?}", self.lines(), self.errors);
            }
            let lines = self.lines();
            (lines.len() >= enough).then_some(lines)
        })
    }

    /// Waits for its end, which must be a success; gives what it printed.
    pub fn finish(mut self) -> Vec<String> {
        let status = until("the end of a program", || self.process.try_wait().unwrap());
        // It has ended with the program's output.
        self.reader.take().map(JoinHandle::join).transpose().unwrap();
        assert!(status.success(), "{status}: {:?}, {:?}", self.lines(), self.errors);
        self.lines()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if thread::panicking() {
            let tail = |lines: Vec<String>| lines[lines.len().saturating_sub(20)..].join("\n");
            let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone();
            eprintln!("--- program {}\n{}\n{}", self.process.id(), tail(self.lines()), tail(errors));
        }
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A `ping -i 0.2` that runs.
#[derive(Debug)]
pub struct Ping {
    program: Program,
}

impl Ping {
    /// Pings an address from a namespace.
    pub fn start(from: &Namespace, address: &str) -> Self {
        Self { program: Program::start(from.command("ping").args(["-n", "-i", "0.2", address])) }
    }

    /// Numbers of the requests that were answered; that none was twice is asserted.
    fn answered(&self) -> Vec<usize> {
        let answer = |line: &String| {
            // "64 bytes from 10.77.0.100: icmp_seq=7 ttl=64 time=2.1 ms"; an error names a number, too.
            let rest = line.contains("bytes from").then(|| line.split("icmp_seq=").nth(1))??;
            assert!(!line.contains("DUP"), "{line}");
            rest.split(' ').next()?.parse().ok()
        };
        self.program.lines().iter().filter_map(answer).collect()
    }

    /// Waits until some more requests were answered.
    pub fn goes_on(&self) {
        let before = self.answered().len();
        until("more answers to ping", || (self.answered().len() >= before + 5).then_some(()));
    }

    /// Requests before the last answer that were not answered themselves.
    pub fn lost(&self) -> usize {
        let answered = self.answered();
        answered.iter().max().map_or(0, |last| last - answered.len())
    }
}

/// Announcements of MAC addresses in a namespace, as they are heard.
#[derive(Debug)]
pub struct Announcements {
    program: Program,
}

impl Announcements {
    /// Listens from now on; `program` is `announcements` of this package.
    pub fn start(program: &str, at: &Namespace) -> Self {
        let mut program = Program::start(&mut at.command(program));
        program.goes_on(1);
        Self { program }
    }

    /// How often an address was announced in this way, `rarp` or `garp`, up to now; a frame counts on each interface that it passes.
    pub fn heard(&mut self, way: &str, mac: &str) -> usize {
        let answers = |lines: &[String]| lines.iter().filter(|line| *line == "so far").count();
        let before = answers(&self.program.lines());
        self.program.type_in(b"?");
        let lines = until("all announcements so far", || {
            let lines = self.program.lines();
            (answers(&lines) > before).then_some(lines)
        });
        let wanted = format!("{way} {mac}");
        lines.iter().filter(|line| **line == wanted).count()
    }

    /// Waits until an address is announced in this way.
    pub fn hears(&mut self, way: &str, mac: &str) {
        until(&format!("{way} of {mac}"), || (self.heard(way, mac) > 0).then_some(()));
    }
}

/// Logins at the Linux guest.
#[derive(Debug)]
pub struct Ssh<'a> {
    from: &'a Namespace,
    address: String,
    key: PathBuf,
}

impl<'a> Ssh<'a> {
    /// Logins from a namespace at an address.
    pub fn new(from: &'a Namespace, address: &str) -> Self {
        Self { from, address: address.to_owned(), key: LinuxGuest::get().key.clone() }
    }

    fn command(&self, words: &str) -> Command {
        let mut command = self.from.command("ssh");
        // The server may start after the network does.
        command.args(["-o", "ConnectionAttempts=60"]);
        // Nothing of the user's own; the guest's key is made anew with its disk.
        command.args(["-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]);
        command.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i"]);
        command.arg(&self.key).arg(format!("root@{}", self.address)).arg(words);
        command
    }

    /// Starts a command in a session of its own.
    pub fn start(&self, words: &str) -> Program {
        Program::start(&mut self.command(words))
    }

    /// Runs a command to its end; gives what it printed.
    pub fn run(&self, words: &str) -> String {
        self.start(words).finish().join("\n")
    }
}

/// The byte at an offset of a stream in which no two stretches are alike.
fn stamp(offset: u64) -> u8 {
    // splitmix64 (Steele, Lea, Flood 2014) of the number of the 8 bytes it lies in.
    let mut word = (offset / 8).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (word ^ word >> 31).to_le_bytes()[(offset % 8) as usize]
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    back: AtomicU64,
    enough: AtomicBool,
    wrong: Mutex<Option<String>>,
}

/// A TCP connection on which a stamped stream goes to a guest that sends it back.
#[derive(Debug)]
pub struct EchoedStream {
    relay: Child,
    counts: Arc<Counts>,
    /// Gives back what it writes to.
    sender: Option<JoinHandle<ChildStdin>>,
}

impl EchoedStream {
    /// Connects to an echo server.
    pub fn start(from: &Namespace, address: &str, port: u16) -> Self {
        let script = format!("exec 3<>/dev/tcp/{address}/{port}; cat <&3 & exec cat >&3");
        let mut command = from.command("bash");
        command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut relay = command.spawn().unwrap();
        let counts = Arc::<Counts>::default();
        let (mut out, sending) = (relay.stdin.take().unwrap(), Arc::clone(&counts));
        let sender = thread::spawn(move || {
            while !sending.enough.load(Ordering::SeqCst) {
                let at = sending.sent.load(Ordering::SeqCst);
                let bytes: Vec<u8> = (at..at + 512).map(stamp).collect();
                if let Err(error) = out.write_all(&bytes) {
                    sending.note(format!("sending ended at {at}: {error}"));
                    break;
                }
                sending.sent.fetch_add(bytes.len() as u64, Ordering::SeqCst);
                // A guest whose kernel is emulated takes some hundred packets a second.
                thread::sleep(Duration::from_millis(50));
            }
            out
        });
        let (mut input, receiving) = (relay.stdout.take().unwrap(), Arc::clone(&counts));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = input.read(&mut buffer) {
                let at = receiving.back.load(Ordering::SeqCst);
                if let Some((offset, byte)) = (at..).zip(&buffer[..n]).find(|(at, byte)| **byte != stamp(*at))
                {
                    receiving.note(format!("byte {offset} came back as {byte:#x}"));
                    return;
                }
                receiving.back.fetch_add(n as u64, Ordering::SeqCst);
            }
            receiving.note("the connection ended".to_owned());
        });
        Self { relay, counts, sender: Some(sender) }
    }

    fn back(&self) -> u64 {
        if let Some(wrong) = &*self.counts.wrong.lock().unwrap_or_else(PoisonError::into_inner) {
            panic!("the echoed stream: {wrong}");
        }
        self.counts.back.load(Ordering::SeqCst)
    }

    /// Waits until some more has come back.
    pub fn goes_on(&self) {
        let enough = self.back() + (2 << 10);
        until("more of the echoed stream", || (self.back() >= enough).then_some(()));
    }

    /// Waits until all that was sent has come back; gives the number of bytes.
    pub fn finish(mut self) -> u64 {
        self.counts.enough.store(true, Ordering::SeqCst);
        // Held open to the end: closing it would close the connection.
        let _open = self.sender.take().map(|sender| sender.join().unwrap());
        until("the rest of the echoed stream", || {
            (self.back() == self.counts.sent.load(Ordering::SeqCst)).then_some(self.back())
        })
    }
}

impl Counts {
    /// Notes what is wrong first. What comes after all is back is no fault.
    fn note(&self, what: String) {
        let all_back = self.enough.load(Ordering::SeqCst)
            && self.back.load(Ordering::SeqCst) == self.sent.load(Ordering::SeqCst);
        if !all_back {
            self.wrong.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
        }
    }
}

impl Drop for EchoedStream {
    fn drop(&mut self) {
        self.counts.enough.store(true, Ordering::SeqCst);
        // It may have ended already.
        let _ = self.relay.kill();
        let _ = self.relay.wait();
    }
}

/// A download by HTTP into a file.
pub fn download(from: &Namespace, url: &str, to: &Path, bytes_per_s: u32) -> Program {
    let mut command = from.command("curl");
    command.args(["-sS", "--limit-rate", &bytes_per_s.to_string(), "-o"]).arg(to).arg(url);
    Program::start(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_stretches_are_alike() {
        let bytes: Vec<u8> = (0..1 << 16).map(stamp).collect();
        let mut words: Vec<&[u8]> = bytes.chunks_exact(8).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), bytes.len() / 8);
        assert_ne!(bytes[..64], bytes[1..65]);
    }

    #[test]
    fn a_program_that_fails_is_noticed() {
        let program = Program::start(Command::new("sh").args(["-c", "echo a; echo b; exit 3"]));
        assert!(thread::spawn(move || program.finish()).join().is_err());
        let lines = Program::start(Command::new("sh").args(["-c", "echo a; echo b"])).finish();
        assert_eq!(lines, ["a", "b"]);
    }
}
