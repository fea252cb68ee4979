//! The first bytes of every connection: who calls, in which role, with which versions and which one-time ticket.
//!
//! Fixed layouts, pinned byte by byte by a test: they must stay readable by every version.

use super::WireError;

/// Protocol versions, one line each on what changed.
///
/// 1: first version.
/// 2: connections are numbered, page frames acknowledged, block operations counted, so that a move goes on after its connections were
/// lost. A side that does not count along cannot be gone on with, and version 1 was never released, so it is not spoken any more.
pub const VERSION: u16 = 2;
/// Oldest version still spoken.
pub const MIN_VERSION: u16 = 2;

const MAGIC: [u8; 6] = *b"VMOVE\0";

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Messages of the two engines.
    Control,
    /// Page stream number `i`.
    Pages(u8),
    /// Block stream of disk number `i` of the plan's copied disks.
    Disk(u8),
}

/// First message of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version the caller speaks.
    pub min_version: u16,
    /// Newest version the caller speaks.
    pub max_version: u16,
    /// The connection's role.
    pub role: Role,
    /// One-time secret the target gave to the source through the agents.
    pub ticket: [u8; 16],
    /// Which set of connections of the move this one belongs to, from 1; the source makes a new set when it has lost one. A target
    /// takes none that is older than one it has seen, so that a late connection is never taken for a new one.
    pub epoch: u32,
}

impl Hello {
    /// Encoded length, bytes.
    pub const BYTES: usize = 32;

    /// With this build's versions.
    pub fn new(role: Role, ticket: [u8; 16], epoch: u32) -> Self {
        Self { min_version: MIN_VERSION, max_version: VERSION, role, ticket, epoch }
    }

    /// `magic 6 | min u16 | max u16 | role u8 | index u8 | ticket 16 | epoch u32`, little endian.
    ///
    /// Version 1 had zeroes in place of the epoch.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..6].copy_from_slice(&MAGIC);
        out[6..8].copy_from_slice(&self.min_version.to_le_bytes());
        out[8..10].copy_from_slice(&self.max_version.to_le_bytes());
        (out[10], out[11]) = match self.role {
            Role::Control => (0, 0),
            Role::Pages(i) => (1, i),
            Role::Disk(i) => (2, i),
        };
        out[12..28].copy_from_slice(&self.ticket);
        out[28..].copy_from_slice(&self.epoch.to_le_bytes());
        out
    }

    /// Reads a hello of any version.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, WireError> {
        if bytes[..6] != MAGIC {
            return Err(WireError::BadMagic);
        }
        let role = match (bytes[10], bytes[11]) {
            (0, 0) => Role::Control,
            (1, i) => Role::Pages(i),
            (2, i) => Role::Disk(i),
            (role, _) => return Err(WireError::Unknown { what: "connection role", value: role.into() }),
        };
        let mut ticket = [0; 16];
        ticket.copy_from_slice(&bytes[12..28]);
        Ok(Self {
            min_version: u16::from_le_bytes([bytes[6], bytes[7]]),
            max_version: u16::from_le_bytes([bytes[8], bytes[9]]),
            role,
            ticket,
            epoch: u32::from_le_bytes([bytes[28], bytes[29], bytes[30], bytes[31]]),
        })
    }

    /// The newest version both sides speak.
    pub fn negotiate(&self) -> Result<u16, WireError> {
        let version = self.max_version.min(VERSION);
        if version < MIN_VERSION || version < self.min_version {
            return Err(WireError::NoCommonVersion {
                ours_min: MIN_VERSION,
                ours_max: VERSION,
                theirs_min: self.min_version,
                theirs_max: self.max_version,
            });
        }
        Ok(version)
    }
}

/// The target's answer to a [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HelloAnswer {
    /// Go on, in this version.
    Accepted(u16),
    /// No common version; the target's own range.
    NoCommonVersion(u16, u16),
    /// Ticket unknown or used.
    BadTicket,
    /// That role is not expected (any more), or belongs to an older set of connections.
    BadRole,
}

impl HelloAnswer {
    /// Encoded length, bytes.
    pub const BYTES: usize = 16;

    /// `magic 6 | status u16 | a u16 | b u16 | zero 4`, little endian.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let (status, a, b) = match self {
            Self::Accepted(version) => (0u16, version, 0),
            Self::NoCommonVersion(min, max) => (1, min, max),
            Self::BadTicket => (2, 0, 0),
            Self::BadRole => (3, 0, 0),
        };
        let mut out = [0; Self::BYTES];
        out[..6].copy_from_slice(&MAGIC);
        out[6..8].copy_from_slice(&status.to_le_bytes());
        out[8..10].copy_from_slice(&a.to_le_bytes());
        out[10..12].copy_from_slice(&b.to_le_bytes());
        out
    }

    /// The agreed version, or why there is none.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<u16, WireError> {
        if bytes[..6] != MAGIC {
            return Err(WireError::BadMagic);
        }
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        match word(6) {
            0 if (MIN_VERSION..=VERSION).contains(&word(8)) => Ok(word(8)),
            0 => Err(WireError::Unknown { what: "protocol version", value: word(8).into() }),
            1 => Err(WireError::NoCommonVersion {
                ours_min: MIN_VERSION,
                ours_max: VERSION,
                theirs_min: word(8),
                theirs_max: word(10),
            }),
            2 => Err(WireError::Refused("it does not know the ticket (used, expired or of another move)")),
            3 => Err(WireError::Refused("it does not expect a connection in this role")),
            status => Err(WireError::Unknown { what: "hello status", value: status.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_bytes_are_pinned() {
        let hello = Hello {
            min_version: 1,
            max_version: 2,
            role: Role::Disk(3),
            ticket: [7; 16],
            epoch: 0x0403_0201,
        };
        let mut want = b"VMOVE\0\x01\0\x02\0\x02\x03".to_vec();
        want.extend([7; 16]);
        want.extend([1, 2, 3, 4]);
        assert_eq!(hello.encode().to_vec(), want);
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
        assert_eq!(HelloAnswer::Accepted(1).encode().to_vec(), b"VMOVE\0\0\0\x01\0\0\0\0\0\0\0".to_vec());
    }

    #[test]
    fn strangers_and_other_versions_are_named() {
        let mut bytes = Hello::new(Role::Control, [0; 16], 1).encode();
        bytes[0] = b'X';
        assert_eq!(Hello::decode(&bytes), Err(WireError::BadMagic));
        let newer = Hello { min_version: 9, max_version: 12, role: Role::Control, ticket: [0; 16], epoch: 1 };
        assert!(matches!(newer.negotiate(), Err(WireError::NoCommonVersion { theirs_min: 9, .. })));
        let overlapping = Hello { min_version: 1, max_version: 12, ..newer };
        assert_eq!(overlapping.negotiate(), Ok(VERSION));
        let older = Hello { min_version: 1, max_version: 1, ..newer };
        assert!(matches!(older.negotiate(), Err(WireError::NoCommonVersion { theirs_max: 1, .. })));
        let refused = HelloAnswer::NoCommonVersion(4, 5).encode();
        assert!(matches!(
            HelloAnswer::decode(&refused),
            Err(WireError::NoCommonVersion { theirs_min: 4, .. })
        ));
        assert!(HelloAnswer::decode(&HelloAnswer::BadTicket.encode()).is_err());
        assert!(HelloAnswer::decode(&HelloAnswer::Accepted(77).encode()).is_err());
    }
}
