//! What of the host a guest's interface is attached to, and whether that can be had.
//!
//! What never enters: packets, VMs. Everything is asked by system calls that answer for this process's network namespace;
//! `/sys` may show another one's devices.

use std::fmt;
use std::io;

use super::sys::Interface;
use super::{MacAddress, Tap};

/// What of the host an interface is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// A tap of its own, put into this bridge, and gone with the process.
    Bridge(String),
    /// This tap, which somebody else has made and looks after.
    Tap(String),
}

/// Why an interface cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// `/dev/net/tun` cannot be opened.
    #[error("/dev/net/tun cannot be opened ({0}); load the module tun and let this user write to the device")]
    NoTun(io::Error),
    /// This process may not make or use a tap.
    #[error(
        "no permission to make a tap or to use it: CAP_NET_ADMIN is needed, or a tap that belongs to this user"
    )]
    Permission,
    /// There is no such interface.
    #[error("there is no {0}")]
    Missing(Attachment),
    /// The interface is of another kind.
    #[error("{name} is no {wanted} (its driver is {driver:?})")]
    Kind {
        /// The interface.
        name: String,
        /// What it should be.
        wanted: &'static str,
        /// What it is.
        driver: String,
    },
    /// The interface is switched off.
    #[error("{0} is down")]
    Down(Attachment),
    /// Another process has the tap.
    #[error("tap {0} is in use")]
    InUse(String),
    /// Another call failed.
    #[error("cannot {action} {name}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which interface.
        name: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl AttachError {
    pub(super) fn io(action: &'static str, name: &str) -> impl FnOnce(io::Error) -> Self {
        let name = name.to_owned();
        move |source| match source.raw_os_error() {
            Some(libc::EPERM) => Self::Permission,
            _ => Self::Io { action, name, source },
        }
    }
}

impl Attachment {
    /// Whether a guest's interface could be attached to it now. Leaves nothing changed.
    pub fn check(&self) -> Result<(), AttachError> {
        // The tap goes with its last owner, here.
        Tap::open(self, PROBE, MacAddress::local([0; 6]), false).map(drop)
    }

    /// The bridge or tap is there, is what it should be, and is switched on.
    pub(super) fn look(&self) -> Result<(), AttachError> {
        let (name, wanted, of_kind): (_, _, fn(&str, &str) -> bool) = match self {
            Self::Bridge(name) => (name, "bridge", |driver, _| driver == "bridge"),
            Self::Tap(name) => (name, "tap", |driver, bus| driver == "tun" && bus == "tap"),
        };
        let look = |source: io::Error| match source.raw_os_error() {
            Some(libc::ENODEV) => AttachError::Missing(self.clone()),
            _ => AttachError::io("look at", name)(source),
        };
        let interface = Interface::new(name).map_err(look)?;
        interface.index().map_err(look)?;
        // Interfaces without a driver to tell of are of no kind that is wanted.
        let (driver, bus) = interface.driver().unwrap_or_default();
        if !of_kind(&driver, &bus) {
            return Err(AttachError::Kind { name: name.clone(), wanted, driver });
        }
        if interface.is_up().map_err(look)? { Ok(()) } else { Err(AttachError::Down(self.clone())) }
    }
}

/// Owner of the taps made only to see whether one can be made.
const PROBE: &str = "probe";

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge(name) => write!(f, "bridge {name}"),
            Self::Tap(name) => write!(f, "tap {name}"),
        }
    }
}
