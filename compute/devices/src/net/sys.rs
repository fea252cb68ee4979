//! System calls on taps and interfaces that the standard library has not.
//!
//! All unsafe code of the network is here. No crate in use has these calls: `nix` and `libc` stop at the numbers, and the
//! tun crates know neither packet headers (`IFF_VNET_HDR`) nor bridges. What never enters: when they are made.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::ptr;

use crate::virtio::GuestSlice;

/// `SIOCBRADDIF` and `ETHTOOL_GDRVINFO` (linux/sockios.h, linux/ethtool.h).
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const ETHTOOL_GDRVINFO: u32 = 3;

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [libc::c_char; 32],
    version: [libc::c_char; 32],
    firmware: [libc::c_char; 32],
    bus: [libc::c_char; 32],
    rom: [libc::c_char; 32],
    reserved: [libc::c_char; 12],
    counts: [u32; 5],
}

/// Makes the tap that `name` says, or attaches to it; a `%d` in the name becomes the first free number. Gives the name.
/// Packets carry a virtio header and nothing else.
pub fn attach(tun: &File, name: &str) -> io::Result<String> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    control(tun, libc::TUNSETIFF, &mut request)?;
    Ok(text(&request.ifr_name))
}

/// How many bytes a packet's header has.
pub fn set_header_bytes(tap: &File, bytes: usize) -> io::Result<()> {
    control(tap, libc::TUNSETVNETHDRSZ, &mut (bytes as libc::c_int))
}

/// What the packets read may leave to the reader (`TUN_F_*`).
pub fn set_offload(tap: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: this request takes its argument by value and touches no memory of this process.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

/// An interface of this process's network namespace.
pub struct Interface<'a> {
    name: &'a str,
    socket: UnixDatagram,
}

impl<'a> Interface<'a> {
    /// Names it; whether it is there shows with the first question.
    pub fn new(name: &'a str) -> io::Result<Self> {
        // Any socket takes the calls for interfaces.
        Ok(Self { name, socket: UnixDatagram::unbound()? })
    }

    /// Its index; fails with `ENODEV` if it is not there.
    pub fn index(&self) -> io::Result<i32> {
        let mut request = self.request()?;
        self.ask(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: the call has filled in this member; an integer has no invalid values.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// The kernel's driver and the kind of device: "bridge", or "tun" with "tap".
    pub fn driver(&self) -> io::Result<(String, String)> {
        // SAFETY: integers and arrays of integers may be all zero.
        let mut info: DriverInfo = unsafe { mem::zeroed() };
        info.command = ETHTOOL_GDRVINFO;
        let mut request = self.request()?;
        request.ifr_ifru.ifru_data = ptr::from_mut(&mut info).cast();
        // The kernel writes a whole `DriverInfo` where `ifru_data` points; it outlives the call.
        self.ask(libc::SIOCETHTOOL, &mut request)?;
        Ok((text(&info.driver), text(&info.bus)))
    }

    /// Whether it is switched on.
    pub fn is_up(&self) -> io::Result<bool> {
        Ok(i32::from(self.flags()?) & libc::IFF_UP != 0)
    }

    /// Switches it on.
    pub fn set_up(&self) -> io::Result<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_flags = self.flags()? | libc::IFF_UP as libc::c_short;
        self.ask(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Bytes of its largest packet.
    pub fn mtu(&self) -> io::Result<i32> {
        let mut request = self.request()?;
        self.ask(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the call has filled in this member; an integer has no invalid values.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    /// Sets it.
    pub fn set_mtu(&self, mtu: i32) -> io::Result<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_mtu = mtu;
        self.ask(libc::SIOCSIFMTU, &mut request)
    }

    /// Sets its own hardware address.
    pub fn set_address(&self, octets: [u8; 6]) -> io::Result<()> {
        let mut data = [0; 14];
        for (place, octet) in data.iter_mut().zip(octets) {
            *place = octet as libc::c_char;
        }
        let mut request = self.request()?;
        request.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
        self.ask(libc::SIOCSIFHWADDR, &mut request)
    }

    /// Makes interface `port` one of the ports of this bridge.
    pub fn add_port(&self, port: i32) -> io::Result<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_ifindex = port;
        self.ask(SIOCBRADDIF, &mut request)
    }

    fn flags(&self) -> io::Result<libc::c_short> {
        let mut request = self.request()?;
        self.ask(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the call has filled in this member; an integer has no invalid values.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    fn request(&self) -> io::Result<libc::ifreq> {
        request(self.name)
    }

    fn ask(&self, call: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        control(&self.socket, call as libc::Ioctl, request)
    }
}

/// Sends one packet that lies in pieces of guest memory. Gives the bytes taken.
pub fn send(file: &File, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard()).collect();
    let pieces: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
        .collect();
    // More than `int` can count is refused by the kernel as more than IOV_MAX is.
    let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: each piece is guest memory that the guards keep mapped until after the call, which only reads it; the guest
    // may write it meanwhile, and then sends what it wrote.
    let sent = unsafe { libc::writev(file.as_raw_fd(), pieces.as_ptr(), count) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// A request about the interface `name`, all else zero.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: a C struct of integers, arrays of integers and a pointer, all of which may be zero.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "this cannot be an interface's name"));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    Ok(request)
}

/// Makes a call whose argument is a `T` that the kernel reads and writes as a whole.
fn control<T>(file: &impl AsRawFd, call: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: all callers are in this file and pair each call with the type it is defined with; the argument is live and
    // exclusively borrowed.
    check(unsafe { libc::ioctl(file.as_raw_fd(), call, ptr::from_mut(argument)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The text in a C array, up to its first zero.
fn text(array: &[libc::c_char]) -> String {
    let bytes: Vec<u8> = array.iter().map(|byte| *byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(
        |_| String::from_utf8_lossy(&bytes).into_owned(),
        |text| text.to_string_lossy().into_owned(),
    )
}
