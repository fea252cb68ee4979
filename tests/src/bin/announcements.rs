//! Prints what tells the network namespace it runs in where a MAC address is, one line a frame and interface it passes: `rarp MAC` for a
//! reverse ARP request (RFC 903), `garp MAC` for an ARP frame in which the sender asks for itself. First of all `listening`.

use std::fs::File;
use std::io::{self, Read, Write};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

fn main() -> io::Result<()> {
    // All frames of all interfaces: it is bound to none.
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    let mut frames = File::from(socket);
    let mut out = io::stdout();
    writeln!(out, "listening")?;
    let mut frame = [0; 2048];
    loop {
        let length = frames.read(&mut frame)?;
        if let Some(line) = announcement(&frame[..length]) {
            writeln!(out, "{line}")?;
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
