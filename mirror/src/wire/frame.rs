//! The frame: `magic u16 | kind u16 | head_len u32 | data_len u32 | zero u32 | sum u64 | head | data`, little endian.
//!
//! `sum` is the checksum of the first 16 bytes and the head. Data has checksums of its own in the head (a page each, or one for a
//! block): guest pages may change while they are sent.

use super::WireError;

const MAGIC: u16 = 0x4d56; // "VM"

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A [`super::control`] message in the head.
    Control,
    /// Pages: see [`super::pages`].
    Pages,
    /// A block operation: see [`super::blocks`].
    Block,
    /// Its acknowledgement.
    BlockAck,
}

impl Kind {
    /// Largest head, bytes: saved state is the largest message.
    pub fn max_head(self) -> u32 {
        match self {
            Self::Control => 16 << 20,
            Self::Pages => 64 << 10,
            Self::Block | Self::BlockAck => 256,
        }
    }

    /// Largest data, bytes.
    pub fn max_data(self) -> u32 {
        match self {
            Self::Control | Self::BlockAck => 0,
            Self::Pages => 4 << 20,
            Self::Block => 2 << 20,
        }
    }
}

/// A frame's fixed part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it carries.
    pub kind: Kind,
    /// Bytes of the head.
    pub head_len: u32,
    /// Bytes of data behind the head.
    pub data_len: u32,
    sum: u64,
}

impl Header {
    /// Encoded length, bytes.
    pub const BYTES: usize = 24;

    /// Reads and checks the fixed part; nothing is allocated for lengths over their caps.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, WireError> {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        if half(0) != MAGIC || word(12) != 0 {
            return Err(WireError::BadMagic);
        }
        let kind = match half(2) {
            1 => Kind::Control,
            2 => Kind::Pages,
            3 => Kind::Block,
            4 => Kind::BlockAck,
            value => return Err(WireError::Unknown { what: "frame kind", value: value.into() }),
        };
        let (head_len, data_len) = (word(4), word(8));
        for (what, len, limit) in
            [("frame head", head_len, kind.max_head()), ("frame data", data_len, kind.max_data())]
        {
            if len > limit {
                return Err(WireError::TooLong { what, bytes: len.into(), limit: limit.into() });
            }
        }
        let sum = u64::from(word(16)) | u64::from(word(20)) << 32;
        Ok(Self { kind, head_len, data_len, sum })
    }

    /// Checks the head that followed.
    pub fn check(&self, head: &[u8]) -> Result<(), WireError> {
        let fixed = fixed(self.kind, self.head_len, self.data_len);
        if head.len() == self.head_len as usize && sum(&fixed, head) == self.sum {
            Ok(())
        } else {
            Err(WireError::Checksum("a frame head"))
        }
    }
}

/// Header and head of a frame, ready to be sent; `data_len` bytes of data must follow.
pub fn encode(kind: Kind, head: &[u8], data_len: u32) -> Result<Vec<u8>, WireError> {
    for (what, len, limit) in
        [("frame head", head.len() as u64, kind.max_head()), ("frame data", data_len.into(), kind.max_data())]
    {
        if len > limit.into() {
            return Err(WireError::TooLong { what, bytes: len, limit: limit.into() });
        }
    }
    let fixed = fixed(kind, head.len() as u32, data_len);
    let mut out = Vec::with_capacity(Header::BYTES + head.len());
    out.extend(fixed);
    out.extend(sum(&fixed, head).to_le_bytes());
    out.extend(head);
    Ok(out)
}

fn fixed(kind: Kind, head_len: u32, data_len: u32) -> [u8; 16] {
    let number: u16 = match kind {
        Kind::Control => 1,
        Kind::Pages => 2,
        Kind::Block => 3,
        Kind::BlockAck => 4,
    };
    let mut out = [0; 16];
    out[..2].copy_from_slice(&MAGIC.to_le_bytes());
    out[2..4].copy_from_slice(&number.to_le_bytes());
    out[4..8].copy_from_slice(&head_len.to_le_bytes());
    out[8..12].copy_from_slice(&data_len.to_le_bytes());
    out
}

fn sum(fixed: &[u8; 16], head: &[u8]) -> u64 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    digest.update(fixed);
    digest.update(head);
    digest.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header_of(bytes: &[u8]) -> Result<Header, WireError> {
        Header::decode(bytes[..Header::BYTES].try_into().unwrap())
    }

    #[test]
    fn oversized_frames_are_refused_on_both_sides() {
        assert!(encode(Kind::Block, &[0; 300], 0).is_err());
        assert!(encode(Kind::Pages, &[], (4 << 20) + 1).is_err());
        let mut bytes = encode(Kind::Pages, &[], 4 << 20).unwrap();
        bytes[8] = 1;
        assert!(matches!(header_of(&bytes), Err(WireError::TooLong { what: "frame data", .. })));
    }

    proptest! {
        #[test]
        fn one_flipped_bit_is_found(head in proptest::collection::vec(any::<u8>(), 0..100), bit in 0usize..992) {
            let good = encode(Kind::Control, &head, 0).unwrap();
            header_of(&good).unwrap().check(&good[Header::BYTES..]).unwrap();
            let bit = bit % (good.len() * 8);
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let found = header_of(&bad).and_then(|h| h.check(&bad[Header::BYTES..]));
            prop_assert!(found.is_err());
        }

        #[test]
        fn decode_never_panics(bytes: [u8; Header::BYTES]) {
            let _ = Header::decode(&bytes);
        }
    }
}
