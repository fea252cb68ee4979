//! `vmove console`: the terminal becomes the VM's serial console.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;

use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::CommandError;
use crate::client::Client;

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
    /// Passes bytes both ways until Ctrl-], a signal, or the end of the VM here.
    pub async fn run(&self, client: &Client) -> Result<(), CommandError> {
        let stream = client.console(&self.vm).await?;
        let (mut from_vm, mut to_vm) = tokio::io::split(stream);
        let mut hangup = signal(SignalKind::hangup())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let raw = RawTerminal::enter()?;
        if raw.is_some() {
            eprint!("Connected to {}. Escape with Ctrl-].\r\n", self.vm);
        }
        let mut keys = keyboard();
        let mut keys_open = true;
        let mut buffer = vec![0; 16 << 10];
        let ended = loop {
            tokio::select! {
                read = from_vm.read(&mut buffer) => match read {
                    Ok(0) => break "the console was closed: the VM has stopped or moved",
                    Ok(n) => write_out(&buffer[..n])?,
                    Err(_) => break "the connection to the console broke",
                },
                typed = keys.recv(), if keys_open => match typed {
                    // The end of a piped input is not the end of the VM's output.
                    None => keys_open = false,
                    Some(bytes) => {
                        let end = if raw.is_some() { bytes.iter().position(|b| *b == ESCAPE) } else { None };
                        let send = &bytes[..end.unwrap_or(bytes.len())];
                        if to_vm.write_all(send).await.is_err() {
                            break "the connection to the console broke";
                        }
                        if end.is_some() {
                            break "left";
                        }
                    }
                },
                _ = hangup.recv() => break "left",
                _ = terminate.recv() => break "left",
                _ = interrupt.recv() => break "left",
            }
        };
        drop(raw);
        eprintln!("\nvmove: {}: {ended}", self.vm);
        Ok(())
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
