//! What a client of the console and the VM process say to each other: frames of `length u32 LE | postcard`.
//!
//! ```text
//! client                                              VM process
//!   Attach(who, where it was)   --------------------->
//!                               <---------------------  Attached, then Output ...
//!   Keys(count, bytes)          --------------------->
//!                               <---------------------  Taken(count)
//!                               <---------------------  Moved(host) | Ended(why)
//! ```
//! Output has positions, keys have counts, both from the start of the guest's life (its *run*), both kept over moves: so whoever
//! attaches again, on whichever host, goes on where it was, and what it typed is taken once.
//! Lives here: messages, caps, framing. Never enters: sockets, what the bytes mean.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version of these messages; a client of another is refused.
pub const VERSION: u16 = 1;
/// Most bytes of output in one message.
pub const MAX_OUTPUT: usize = 16 << 10;
/// Most keys in one message.
pub const MAX_KEYS: usize = 4 << 10;
/// Longest frame, bytes: the largest message with what postcard adds.
const MAX_FRAME: usize = MAX_OUTPUT + 64;
/// Longest text in a message, bytes.
pub const MAX_TEXT: usize = 1024;

/// Tells clients apart; random.
pub type ClientId = [u8; 16];
/// Tells lives of a guest apart; random at every start, the same after a move.
pub type RunId = [u8; 16];

/// From a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientMsg {
    /// First message.
    Attach {
        /// [`VERSION`].
        version: u16,
        /// Who it is, the same when it comes again.
        client: ClientId,
        /// The run it has seen and the position from which it wants to go on; none: what is kept of the recent output.
        seen: Option<(RunId, u64)>,
    },
    /// Keys it types; only after [`ServerMsg::Attached`].
    Keys {
        /// How many it has typed before these.
        at: u64,
        /// At most [`MAX_KEYS`].
        bytes: Vec<u8>,
    },
}

/// From the VM process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerMsg {
    /// Answer to [`ClientMsg::Attach`], once the guest is here.
    Attached {
        /// The guest's run.
        run: RunId,
        /// Position of the first byte of output that follows.
        at: u64,
        /// Position of the next byte the guest says: what is before it has been said already.
        end: u64,
        /// Keys of this client that the guest's line has taken; none for a client that is not known here.
        taken: Option<u64>,
    },
    /// Output. A position beyond the end of the one before: bytes between were not kept for this slow client.
    Output {
        /// Position of the first byte.
        at: u64,
        /// At most [`MAX_OUTPUT`].
        bytes: Vec<u8>,
    },
    /// Keys taken so far.
    Taken {
        /// Their count.
        count: u64,
    },
    /// The VM runs on another host now; attach there. Last message.
    Moved {
        /// The host.
        host: String,
    },
    /// The VM has stopped. Last message.
    Ended {
        /// Why.
        reason: String,
    },
    /// The client is not served. Last message.
    Refused {
        /// Why.
        reason: String,
    },
    /// Nothing new; the connection lives.
    Alive,
}

/// Why bytes were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than any message of this version.
    #[error("a console message of {0} bytes; at most {MAX_FRAME} are allowed")]
    TooLong(usize),
    /// No message of this version.
    #[error("not a console message of this version")]
    Malformed,
}

/// A message as a frame.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; 4];
    frame = postcard::to_extend(message, frame).map_err(|_| WireError::Malformed)?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(WireError::TooLong(length));
    }
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(frame)
}

/// Takes messages out of bytes as they come. Never holds more than one frame and one push.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    at: usize,
}

impl Decoder {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.at);
        self.at = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message. An error is for ever: the stream is out of step.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, WireError> {
        let Some((length, rest)) = self.buffer[self.at..].split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_FRAME {
            return Err(WireError::TooLong(length));
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        match postcard::take_from_bytes(body) {
            Ok((message, [])) => {
                self.at += 4 + length;
                Ok(Some(message))
            }
            _ => Err(WireError::Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_largest_messages_fit_and_larger_ones_do_not() {
        encode(&ServerMsg::Output { at: u64::MAX, bytes: vec![7; MAX_OUTPUT] }).unwrap();
        encode(&ServerMsg::Ended { reason: "x".repeat(MAX_TEXT) }).unwrap();
        let long = ServerMsg::Output { at: 0, bytes: vec![7; MAX_FRAME] };
        assert!(matches!(encode(&long), Err(WireError::TooLong(_))));
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_le_bytes());
        assert!(matches!(decoder.take::<ServerMsg>(), Err(WireError::TooLong(_))));
    }

    #[test]
    fn left_over_bytes_in_a_frame_are_an_error() {
        let mut frame = encode(&ServerMsg::Alive).unwrap();
        frame.push(0);
        frame[0] += 1;
        let mut decoder = Decoder::default();
        decoder.push(&frame);
        assert_eq!(decoder.take::<ServerMsg>(), Err(WireError::Malformed));
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut(keys in proptest::collection::vec(any::<u8>(), 0..300), cut in 1usize..50) {
            let messages = [
                ClientMsg::Attach { version: 1, client: [1; 16], seen: Some(([2; 16], 77)) },
                ClientMsg::Keys { at: 5, bytes: keys },
            ];
            let bytes: Vec<u8> = messages.iter().flat_map(|m| encode(m).unwrap()).collect();
            let (mut decoder, mut got) = (Decoder::default(), Vec::new());
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                while let Some(message) = decoder.take::<ClientMsg>().unwrap() {
                    got.push(message);
                }
            }
            prop_assert_eq!(got, messages);
        }

        #[test]
        fn rubbish_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.take::<ServerMsg>() {}
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.take::<ClientMsg>() {}
        }
    }
}
