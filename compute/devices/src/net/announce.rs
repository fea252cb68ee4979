//! Telling a network where a MAC address is now: the frame, and when it is sent.
//!
//! What lives here: a reverse ARP request as QEMU and other hypervisors send it after a migration: every switch on the
//! way learns the address from it and nobody answers. What never enters: who sends it.

use std::time::Duration;

use super::{HEADER_BYTES, MacAddress};

/// Frames sent after one another; one may be lost.
pub const ROUNDS: u32 = 5;
/// Before the second frame, and what each later wait is longer.
const FIRST_GAP: Duration = Duration::from_millis(50);
const GROWTH: Duration = Duration::from_millis(100);

/// How long to wait after frame `round` (0 the first) for the next one; none after the last.
pub fn gap_after(round: u32) -> Option<Duration> {
    (round + 1 < ROUNDS).then(|| FIRST_GAP + GROWTH * round)
}

/// Bytes of the shortest Ethernet frame without its checksum.
const FRAME_BYTES: usize = 60;

/// A reverse ARP request for `mac` from `mac` to everybody (RFC 903), behind an empty virtio header.
pub fn frame(mac: MacAddress) -> [u8; HEADER_BYTES + FRAME_BYTES] {
    let mac = mac.octets();
    let parts: [&[u8]; 9] = [
        &[0xff; 6],
        &mac,
        &[0x80, 0x35],             // reverse ARP
        &[0, 1, 8, 0, 6, 4, 0, 3], // Ethernet, IPv4, lengths, request reverse
        &mac,
        &[0; 4],
        &mac,
        &[0; 4],
        &[0; FRAME_BYTES - 42],
    ];
    let mut frame = [0; HEADER_BYTES + FRAME_BYTES];
    frame[HEADER_BYTES..].copy_from_slice(&parts.concat());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_a_broadcast_from_the_address() {
        let mac: MacAddress = "02:00:00:00:00:07".parse().unwrap();
        let frame = frame(mac);
        assert_eq!(frame[..12], [0; 12]);
        assert_eq!(frame[12..18], [0xff; 6]);
        assert_eq!(frame[18..24], mac.octets());
        assert_eq!(frame[24..26], [0x80, 0x35]);
        assert_eq!(frame[34..40], mac.octets());
        assert_eq!(frame[44..50], mac.octets());
    }

    #[test]
    fn gaps_grow_and_end() {
        let gaps: Vec<_> = (0..).map_while(gap_after).map(|gap| gap.as_millis()).collect();
        assert_eq!(gaps, [50, 150, 250, 350]);
    }
}
