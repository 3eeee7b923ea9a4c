//! Bytes between the processes of a world: numbers, and the header of a frame
//!
//! Integers are little-endian. Every length that comes from a peer is bounded before anything is allocated.

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
    }
}
