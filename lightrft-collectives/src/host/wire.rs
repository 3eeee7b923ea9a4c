//! Bytes between the processes of a world: notes, and the header of a frame
//!
//! Integers are little-endian. Every length that comes from a peer is bounded before anything is allocated.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Loss};
use crate::operation::{Call, Signature};

/// First word of a hello and of a frame; the last byte is the version of this protocol.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"LRFTCOL\x02");

/// What precedes the payload of one rank for another in one step of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) group: u64,
    /// Frames sent before this one on the same connection.
    pub(super) sequence: u64,
    pub(super) signature: [u64; 3],
    /// Bytes that follow.
    pub(super) length: u64,
}

pub(super) const HEADER_BYTES: usize = 56;

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let [a, b, c] = self.signature;
        pack([MAGIC, self.group, self.sequence, a, b, c, self.length])
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let [magic, group, sequence, a, b, c, length] = unpack(bytes);
        (magic == MAGIC).then_some(Header { group, sequence, signature: [a, b, c], length })
    }
}

pub(super) fn pack<const WORDS: usize, const BYTES: usize>(words: [u64; WORDS]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

pub(super) fn unpack<const WORDS: usize, const BYTES: usize>(bytes: &[u8; BYTES]) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

/// Why a group is dead, as the ranks tell each other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Cause {
    /// A rank of the world is gone. Poisons every group.
    Lost { rank: usize, how: Loss },
    /// Two ranks made different calls. Poisons one group, as does the next.
    Mismatch { rank: usize, mine: Signature, other: usize, theirs: Signature },
    /// These ranks of the world had not come at the deadline.
    Timeout { waited: Duration, missing: Vec<usize> },
}

impl Cause {
    pub(super) fn error(&self, call: Call, group: &str) -> Error {
        let group = group.to_owned();
        match self.clone() {
            Cause::Lost { rank, how } => Error::PeerLost { call, group, rank, how },
            Cause::Mismatch { rank, mine, other, theirs } => {
                let (mine, theirs) = (Box::new(mine), Box::new(theirs));
                Error::Mismatch { group, rank, mine, other, theirs }
            }
            Cause::Timeout { waited, missing } => Error::Timeout { call, group, waited, missing },
        }
    }
}

/// A message on a control connection: a length as `u32` and MessagePack.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Note {
    /// The sender leaves the world in good order.
    Goodbye,
    /// The sender has dropped its end of one group.
    LeftGroup { group: u64 },
    /// A verdict on the world, or on one group.
    Failed { group: Option<u64>, cause: Cause },
}

/// Notes are small: the longest names the missing ranks of a large group.
const MAX_NOTE: usize = 1 << 20;

impl Note {
    pub(super) fn encode(&self) -> Vec<u8> {
        // These types hold numbers only, which MessagePack always can write.
        let body = rmp_serde::to_vec(self).unwrap_or_default();
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        bytes
    }

    /// The first note in `bytes` and its length; `Ok(None)` if more bytes must come, `Err` if this is no note.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<(Note, usize)>, ()> {
        let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_NOTE {
            return Err(());
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        rmp_serde::from_slice(body).map(|note| Some((note, 4 + length))).map_err(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_survive(group: u64, sequence: u64, signature: [u64; 3], length: u64) {
            let header = Header { group, sequence, signature, length };
            prop_assert_eq!(Header::decode(&header.encode()), Some(header));
        }

        #[test]
        fn notes_survive_and_garbage_does_not_panic(rank: usize, garbage: Vec<u8>) {
            let note = Note::Failed { group: Some(7), cause: Cause::Lost { rank, how: Loss::Died } };
            let bytes = note.encode();
            let decoded = Note::decode(&bytes);
            let survived =
                matches!(decoded, Ok(Some((Note::Failed { group: Some(7), cause: Cause::Lost { rank: r, .. } }, n))) if r == rank && n == bytes.len());
            prop_assert!(survived);
            prop_assert!(matches!(Note::decode(&bytes[..bytes.len() - 1]), Ok(None)));
            let _ = Note::decode(&garbage);
        }
    }
}
