//! Prints what tells the network namespace it runs in where a MAC address is, one line a frame and interface it passes: `rarp MAC` for a
//! reverse ARP request (RFC 903), `garp MAC` for an ARP frame in which the sender asks for itself. First of all `listening`; and for each
//! byte of its input `so far`, when all that had come by then is printed. It ends with its input.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

fn main() -> io::Result<()> {
    // All frames of all interfaces: it is bound to none.
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    let mut frames = File::from(socket);
    let mut out = io::stdout();
    writeln!(out, "listening")?;
    let mut frame = [0; 2048];
    let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    loop {
        let mut ready = [&frames, &input].map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN));
        poll(&mut ready, PollTimeout::NONE)?;
        // Frames first: the answer comes behind them.
        if ready[0].any().unwrap_or(false) {
            let length = frames.read(&mut frame)?;
            if let Some(line) = announcement(&frame[..length]) {
                writeln!(out, "{line}")?;
            }
        } else if input.read(&mut [0])? == 0 {
            return Ok(());
        } else {
            writeln!(out, "so far")?;
        }
    }
}

/// What a frame announces, if it does.
fn announcement(frame: &[u8]) -> Option<String> {
    let kind = match frame.get(12..14)? {
        [0x80, 0x35] => "rarp",
        // Sender and target of an ARP frame for IPv4 (RFC 826).
        [0x08, 0x06] if frame.get(28..32)? == frame.get(38..42)? => "garp",
        _ => return None,
    };
    let mac: Vec<String> = frame[6..12].iter().map(|octet| format!("{octet:02x}")).collect();
    Some(format!("{kind} {}", mac.join(":")))
}
