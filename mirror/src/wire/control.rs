//! Messages of the two engines, postcard in the head of a control frame. New variants and fields go to the end, under a new version.

use serde::{Deserialize, Serialize};

use super::{WireError, frame};
use crate::pages::PageRange;

/// A disk that is copied, as both sides must agree on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSetup {
    /// Its name.
    pub name: String,
    /// Virtual size, bytes.
    pub virtual_bytes: u64,
}

/// What was moved, as counted by one side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Pages with data.
    pub data_pages: u64,
    /// Pages sent as zero flags.
    pub zero_pages: u64,
    /// Block operations over all disks, flushes included.
    pub block_ops: u64,
    /// Bytes of block data.
    pub block_bytes: u64,
}

/// What both sides must agree on before the source commits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Counted by each side for itself.
    pub counters: Counters,
    /// Digest over checksums of RAM and the chains of the disks.
    pub digest: [u8; 32],
    /// Digest over the whole contents of RAM and disks, read again in the pause, if an audit was asked for.
    pub audit: Option<[u8; 32]>,
}

/// How far the target has got when it is called anew. Nothing of older connections is being applied any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrived {
    /// Whole frames of pages.
    pub frames: u64,
    /// Block operations of each copied disk, in the order of their connections.
    pub operations: Vec<u64>,
}

/// From the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceMsg {
    /// First message: what will come.
    Setup {
        /// Pages of RAM.
        ram_pages: u64,
        /// Copied disks, in the order of their connections.
        disks: Vec<DiskSetup>,
        /// Whether an audit will be made.
        audit: bool,
    },
    /// On a page stream: all pages of a round have been sent before this.
    RoundEnd {
        /// The round, from 1.
        round: u32,
    },
    /// The guest is paused and this is its state (encoded sections); everything before it has been sent.
    State(Vec<u8>),
    /// Prove, prepare and say so.
    Prepare(Proof),
    /// The source has committed: own and run the VM.
    Commit,
    /// The move is over, the source goes on.
    Abort {
        /// Why.
        reason: String,
    },
    /// First message on new connections, once the first ones had come as far as [`TargetMsg::Ready`]: say what has arrived.
    Resume,
}

/// From the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetMsg {
    /// Images and memory are there: begin.
    Ready,
    /// On a page stream: all pages before the end of this round are in guest memory, except the damaged ones.
    RoundAck {
        /// The round.
        round: u32,
        /// Pages whose checksum did not match what arrived; expected for pages the guest wrote meanwhile.
        damaged: Vec<PageRange>,
    },
    /// The state has been loaded and everything agrees; the decision is the source's alone now.
    Prepared {
        /// The target's own proof, equal to the source's.
        proof: Proof,
        /// Allocated bytes of each image.
        allocated: Vec<u64>,
        /// Microseconds spent on loading and checking.
        load_us: u64,
    },
    /// Not prepared and never will be.
    Refused {
        /// Why.
        reason: String,
    },
    /// The VM runs at the target.
    Running {
        /// Microseconds from the commit's arrival to the guest's first instruction.
        resume_us: u64,
    },
    /// To [`SourceMsg::Resume`].
    Resumed(Arrived),
    /// On a page stream: so many frames of pages have arrived on it in this move, on all its connections.
    PagesAck {
        /// How many.
        frames: u64,
    },
}

/// Header and head of a control frame.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let head = postcard::to_stdvec(message).map_err(|_| WireError::Malformed("control message"))?;
    frame::encode(frame::Kind::Control, &head, 0)
}

/// Reads a control message; left-over bytes are an error.
pub fn decode<'a, T: Deserialize<'a>>(head: &'a [u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(head) {
        Ok((message, [])) => Ok(message),
        _ => Err(WireError::Malformed("control message")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn round_trip_and_left_over_bytes() {
        let message = SourceMsg::Setup {
            ram_pages: 9,
            disks: vec![DiskSetup { name: "vda".into(), virtual_bytes: 1 << 31 }],
            audit: true,
        };
        let frame = encode(&message).unwrap();
        assert_eq!(decode::<SourceMsg>(&frame[24..]).unwrap(), message);
        let mut long = frame[24..].to_vec();
        long.push(0);
        assert!(decode::<SourceMsg>(&long).is_err());
    }

    proptest! {
        #[test]
        fn decode_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode::<SourceMsg>(&bytes);
            let _ = decode::<TargetMsg>(&bytes);
        }
    }
}
