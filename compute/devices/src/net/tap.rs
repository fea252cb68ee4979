//! A tap: the end of a virtual wire that a process holds.
//!
//! What lives here: making one and putting it into a bridge, using one that is there. What never enters: packets.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use super::sys::{self, Interface};
use super::{AttachError, Attachment, Backend, HEADER_BYTES, MacAddress, Offloads};

const TUN: &str = "/dev/net/tun";
/// Letters of the VM's name in the name of its tap: with `vm-`, `-` and four digits they make the 15 that Linux allows.
const OWNER_LETTERS: usize = 7;

/// A tap in the hands of this process. One that was made here vanishes when it is dropped.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    offloads: Offloads,
}

impl Tap {
    /// Attaches a guest's interface with the address `mac`. A tap that is made here is called after `owner` and numbered by
    /// the kernel, so that no two meet. With `join` it is put into its bridge and switched on.
    pub(super) fn open(
        attachment: &Attachment,
        owner: &str,
        mac: MacAddress,
        join: bool,
    ) -> Result<Self, AttachError> {
        attachment.look()?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN)
            .map_err(AttachError::NoTun)?;
        let (name, bridge) = match attachment {
            Attachment::Bridge(bridge) => (template(owner), Some(bridge)),
            Attachment::Tap(tap) => (tap.clone(), None),
        };
        let name = sys::attach(&file, &name).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => AttachError::InUse(name),
            _ => AttachError::io("attach to tap", &name)(source),
        })?;
        sys::set_header_bytes(&file, HEADER_BYTES)
            .map_err(AttachError::io("set the packet header of tap", &name))?;
        let mut tap = Self { file, name, offloads: Offloads::default() };
        tap.offloads = tap.find_offloads();
        tap.set_offloads(Offloads::default())
            .map_err(AttachError::io("set the offloads of tap", &tap.name))?;
        if let Some(bridge) = bridge.filter(|_| join) {
            tap.join(bridge, mac)?;
        }
        Ok(tap)
    }

    /// [`open`](Self::open) for a guest to use.
    pub fn attach(attachment: &Attachment, owner: &str, mac: MacAddress) -> Result<Self, AttachError> {
        Self::open(attachment, owner, mac, true)
    }

    /// Its name, as the host's tools show it.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn join(&self, bridge: &str, mac: MacAddress) -> Result<(), AttachError> {
        let here = |action| AttachError::io(action, &self.name);
        let tap = Interface::new(&self.name).map_err(here("look at tap"))?;
        let into = Interface::new(bridge).map_err(AttachError::io("look at bridge", bridge))?;
        // A bridge takes the least of its ports' sizes and, unless told otherwise, the least of their addresses: it must
        // not change its own for a guest's sake. The prefix is the highest there is.
        let mtu = into.mtu().map_err(AttachError::io("look at bridge", bridge))?;
        tap.set_mtu(mtu).map_err(here("set the MTU of tap"))?;
        tap.set_address(outer_address(mac)).map_err(here("set the address of tap"))?;
        let index = tap.index().map_err(here("look at tap"))?;
        into.add_port(index).map_err(AttachError::io("put a tap into bridge", bridge))?;
        tap.set_up().map_err(here("switch on tap"))
    }

    /// The largest set of offloads that the kernel takes.
    fn find_offloads(&mut self) -> Offloads {
        let all = Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true, udp: true };
        let tries = [all, Offloads { udp: false, ..all }, Offloads { checksum: true, ..Offloads::default() }];
        tries.into_iter().find(|offloads| self.set_offloads(*offloads).is_ok()).unwrap_or_default()
    }
}

impl Backend for Tap {
    fn file(&self) -> &File {
        &self.file
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let flag = |on: bool, flag| if on { flag } else { 0 };
        let flags = flag(offloads.checksum, libc::TUN_F_CSUM)
            | flag(offloads.tcp4, libc::TUN_F_TSO4)
            | flag(offloads.tcp6, libc::TUN_F_TSO6)
            | flag(offloads.ecn, libc::TUN_F_TSO_ECN)
            | flag(offloads.udp, libc::TUN_F_UFO);
        sys::set_offload(&self.file, flags)
    }
}

/// The name the kernel makes a tap's name from. Letters and digits of the owner's name only: others have a meaning to some
/// tools.
fn template(owner: &str) -> String {
    let letters: String = owner.chars().filter(char::is_ascii_alphanumeric).take(OWNER_LETTERS).collect();
    format!("vm-{letters}-%d")
}

/// The address of the tap itself, other than the guest's, which is behind it.
fn outer_address(mac: MacAddress) -> [u8; 6] {
    let mut octets = mac.octets();
    octets[0] = if octets[0] == 0xfe { 0xee } else { 0xfe };
    octets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_with_four_digits() {
        for (owner, name) in [("web", "vm-web-%d"), ("a.b_c-defghijkl", "vm-abcdefg-%d"), ("..", "vm--%d")] {
            assert_eq!(template(owner), name);
            assert!(template(owner).replace("%d", "9999").len() <= 15);
        }
    }

    #[test]
    fn the_tap_never_has_the_guests_address() {
        for first in [0x02, 0x52, 0xfe, 0xee] {
            let mac = MacAddress::new([first, 1, 2, 3, 4, 5]).unwrap();
            let outer = outer_address(mac);
            assert_ne!(outer, mac.octets());
            assert_eq!(outer[0] & 3, 2);
        }
    }
}
