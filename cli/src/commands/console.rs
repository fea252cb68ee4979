//! `vmove console`: the terminal becomes the VM's serial console, wherever the VM goes.
//!
//! A serial line carries no window size, so a terminal that is resized changes nothing in the guest; the size is named at the
//! beginning, in the words with which the guest's shell can be told.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;

use nix::sys::termios::{self, SetArg, Termios};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::CommandError;
use crate::client::attachment::Seen;
use crate::client::{Client, Console, ConsoleEvent};

/// Ctrl-].
const ESCAPE: u8 = 0x1d;

/// Arguments of `vmove console`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct ConsoleArgs {
    /// The VM
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// Puts the terminal of standard input into raw mode and gives it back at the end, whatever the end is.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// None when standard input is no terminal.
    fn enter() -> Result<Option<Self>, CommandError> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(stdin.as_fd()).map_err(std::io::Error::from)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).map_err(std::io::Error::from)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // If the terminal is gone there is nothing to restore.
        let _ = termios::tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}

impl ConsoleArgs {
    /// Passes bytes both ways until Ctrl-], a signal, or the end of the VM. Stays attached while the VM changes host.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let mut console = Console::attach(client.clone(), &self.vm).await?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let raw = RawTerminal::enter()?;
        if raw.is_some() {
            say(&format!("connected to {}, escape with Ctrl-]{}", self.vm, size_hint()));
        }
        let to_vm = console.keys();
        let mut keys = keyboard();
        let mut keys_open = true;
        // Keys on their way to a guest that does not take them must not hold up its output.
        let mut sending: Option<Vec<u8>> = None;
        let ended = loop {
            tokio::select! {
                event = console.next() => match event {
                    Some(ConsoleEvent::Seen(Seen::Output(bytes))) => write_out(&bytes)?,
                    Some(ConsoleEvent::Seen(Seen::Ended(reason))) => break Ok(reason),
                    Some(ConsoleEvent::GivenUp(why)) => break Err(CommandError::failed(format!(
                        "the console of {} was not found again: {why}", self.vm
                    ))),
                    Some(event) => say(&note(&self.vm, &event)),
                    None => break Ok("the console has ended".to_owned()),
                },
                room = to_vm.reserve(), if sending.is_some() => {
                    if let (Ok(room), Some(keys)) = (room, sending.take()) {
                        room.send(keys);
                    }
                }
                typed = keys.recv(), if keys_open && sending.is_none() => match typed {
                    // The end of a piped input is not the end of the VM's output.
                    None => keys_open = false,
                    Some(bytes) => match bytes.iter().position(|key| *key == ESCAPE) {
                        Some(_) if raw.is_some() => break Ok("left".to_owned()),
                        _ => sending = Some(bytes),
                    },
                },
                _ = hangup.recv() => break Ok("left".to_owned()),
                _ = terminate.recv() => break Ok("left".to_owned()),
                _ = interrupt.recv() => break Ok("left".to_owned()),
            }
        };
        drop(raw);
        let why = ended?;
        eprintln!("\nvmove: {}: {why}", self.vm);
        Ok(())
    }
}

/// What is to be said about an event that is no output. Standard error, so that what the guest said stays whole in a file.
fn note(vm: &str, event: &ConsoleEvent) -> String {
    match event {
        ConsoleEvent::Seen(Seen::Missed(count)) => format!("{count} bytes of output were missed"),
        ConsoleEvent::Seen(Seen::Anew) => format!("{vm} was started anew"),
        ConsoleEvent::Seen(Seen::KeysLost(count)) => format!("{count} keys may not have been taken"),
        ConsoleEvent::Seen(Seen::Moved(host)) => format!("{vm} has moved to host {host}"),
        ConsoleEvent::Lost(why) => format!("lost the console ({why}); looking for it"),
        ConsoleEvent::Seen(Seen::Output(_) | Seen::Ended(_)) | ConsoleEvent::GivenUp(_) => String::new(),
    }
}

fn say(text: &str) {
    eprint!("\r\n[vmove: {text}]\r\n");
}

/// A serial line carries no window size: the guest has to be told, and the guest alone knows by whom.
fn size_hint() -> String {
    match ::console::Term::stdout().size_checked() {
        Some((rows, columns)) => format!(
            "; a serial line has no window size, `stty rows {rows} cols {columns}` sets it in a shell"
        ),
        None => String::new(),
    }
}

/// Bytes are written as they are: a console may send anything, not only UTF-8.
fn write_out(bytes: &[u8]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())
}

/// A thread that reads standard input. It ends with the program: a read of a terminal cannot be taken back.
fn keyboard() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut buffer = [0; 1024];
        while let Ok(n) = input.read(&mut buffer) {
            if n == 0 || sender.blocking_send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
