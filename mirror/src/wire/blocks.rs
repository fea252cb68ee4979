//! Frames of block operations on one disk, and their acknowledgements.
//!
//! Head of an operation: `seq u64 | op u32 | zero u32 | offset u64 | len u64 | sum u64`. Acknowledgement: `seq u64 | status u32 | error u32`.

use super::{Reader, WireError, frame};

/// Largest write, bytes.
pub const MAX_WRITE: u64 = 1 << 20;

/// What is done to the target's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOp {
    /// Write the data that follows (`len` bytes, checksum `sum`).
    Write {
        /// Checksum of the data.
        sum: u64,
    },
    /// Make the range read as zeroes, keeping it allocated where the source did.
    Zero,
    /// Make the range a hole that reads as zeroes.
    Discard,
    /// Everything before it is on stable storage when this is acknowledged; no range.
    Flush,
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHead {
    /// Number on this disk's stream, from 1, without gaps; goes on over new connections. Acknowledgements name it.
    pub seq: u64,
    /// What to do.
    pub op: BlockOp,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl BlockHead {
    /// Bytes of data that follow.
    pub fn data_bytes(&self) -> u64 {
        if matches!(self.op, BlockOp::Write { .. }) { self.len } else { 0 }
    }

    /// Header and head bytes; the data must follow.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let (op, sum) = match self.op {
            BlockOp::Write { sum } => (1u32, sum),
            BlockOp::Zero => (2, 0),
            BlockOp::Discard => (3, 0),
            BlockOp::Flush => (4, 0),
        };
        let mut head = Vec::with_capacity(40);
        head.extend(self.seq.to_le_bytes());
        head.extend(op.to_le_bytes());
        head.extend([0; 4]);
        head.extend(self.offset.to_le_bytes());
        head.extend(self.len.to_le_bytes());
        head.extend(sum.to_le_bytes());
        frame::encode(frame::Kind::Block, &head, self.data_bytes() as u32)
    }

    /// Reads an operation on a disk of `disk_bytes`, with `data_len` bytes of data announced.
    pub fn decode(head: &[u8], data_len: u32, disk_bytes: u64) -> Result<Self, WireError> {
        let mut reader = Reader(head);
        let (seq, op, reserved) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let (offset, len, sum) = (reader.u64()?, reader.u64()?, reader.u64()?);
        reader.end()?;
        let op = match op {
            1 => BlockOp::Write { sum },
            2 => BlockOp::Zero,
            3 => BlockOp::Discard,
            4 => BlockOp::Flush,
            value => return Err(WireError::Unknown { what: "block operation", value: value.into() }),
        };
        let out = Self { seq, op, offset, len };
        let inside = offset.checked_add(len).is_some_and(|end| end <= disk_bytes);
        let ranged = op != BlockOp::Flush;
        if reserved != 0 || !inside || ranged != (len > 0) || offset % 512 != 0 || len % 512 != 0 {
            return Err(WireError::Malformed("block operation: range outside the disk or not in sectors"));
        }
        if out.data_bytes() > MAX_WRITE || out.data_bytes() != u64::from(data_len) {
            return Err(WireError::Malformed("block operation: length and data disagree"));
        }
        Ok(out)
    }
}

/// Acknowledgement of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockAck {
    /// Which operation.
    pub seq: u64,
    /// A failed operation leaves its range undefined on the target.
    pub result: Result<(), Failure>,
}

/// Why a block operation was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// The target system's error number (errno(3)); 0 = it is none of the system's.
    pub error: u32,
}

impl Failure {
    /// Largest error number: Linux returns them as the last 4095 values of a machine word.
    pub const MAX: u32 = 4095;
}

impl BlockAck {
    /// The whole frame.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut head = Vec::with_capacity(16);
        head.extend(self.seq.to_le_bytes());
        let (status, error) = self.result.map_or_else(|failure| (1u32, failure.error), |()| (0, 0));
        head.extend(status.to_le_bytes());
        head.extend(error.to_le_bytes());
        frame::encode(frame::Kind::BlockAck, &head, 0)
    }

    /// Reads an acknowledgement.
    pub fn decode(head: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader(head);
        let (seq, status, error) = (reader.u64()?, reader.u32()?, reader.u32()?);
        reader.end()?;
        match (status, error) {
            (0, 0) => Ok(Self { seq, result: Ok(()) }),
            (1, ..=Failure::MAX) => Ok(Self { seq, result: Err(Failure { error }) }),
            (0 | 1, error) => Err(WireError::Unknown { what: "error number", value: error.into() }),
            (status, _) => Err(WireError::Unknown { what: "block status", value: status.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reread(head: BlockHead, disk: u64) -> Result<BlockHead, WireError> {
        let frame = head.encode().unwrap();
        BlockHead::decode(&frame[24..], head.data_bytes() as u32, disk)
    }

    #[test]
    fn ranges_are_checked() {
        let write = BlockHead { seq: 1, op: BlockOp::Write { sum: 9 }, offset: 512, len: 4096 };
        assert_eq!(reread(write, 8192), Ok(write));
        assert!(reread(write, 4096).is_err());
        assert!(reread(BlockHead { offset: 511, ..write }, 8192).is_err());
        assert!(reread(BlockHead { op: BlockOp::Discard, len: 0, ..write }, 8192).is_err());
        assert!(reread(BlockHead { offset: u64::MAX - 511, ..write }, 8192).is_err());
        let flush = BlockHead { seq: 2, op: BlockOp::Flush, offset: 0, len: 0 };
        assert_eq!(reread(flush, 8192), Ok(flush));
        let discard = BlockHead { seq: 2, op: BlockOp::Discard, offset: 0, len: 1 << 40 };
        assert_eq!(reread(discard, 1 << 40), Ok(discard));
    }

    #[test]
    fn failures_arrive_with_their_number() {
        for result in
            [Ok(()), Err(Failure { error: 0 }), Err(Failure { error: 28 }), Err(Failure { error: 4095 })]
        {
            let ack = BlockAck { seq: 7, result };
            assert_eq!(BlockAck::decode(&ack.encode().unwrap()[24..]), Ok(ack));
        }
        let bad = BlockAck { seq: 7, result: Err(Failure { error: 4096 }) };
        assert!(BlockAck::decode(&bad.encode().unwrap()[24..]).is_err());
        let mut odd = BlockAck { seq: 7, result: Ok(()) }.encode().unwrap()[24..].to_vec();
        odd[12] = 1;
        assert!(BlockAck::decode(&odd).is_err(), "an error number without a failure");
    }

    proptest! {
        #[test]
        fn decode_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..60), data_len: u32) {
            let _ = BlockHead::decode(&bytes, data_len, 1 << 30);
            let _ = BlockAck::decode(&bytes);
        }
    }
}
