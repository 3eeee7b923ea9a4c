//! The readers of bytes between ranks, for fuzz targets

use super::hello::{HELLO_BYTES, Hello};
use super::note::Note;
use super::wire::{HEADER_BYTES, Header};
use crate::operation::Signature;

/// The first bytes of a connection: what is taken for a hello is one.
pub fn hello(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<HELLO_BYTES>() else { return };
    if let Some(hello) = Hello::decode(bytes) {
        assert_eq!(hello.encode(), *bytes);
    }
}

/// What comes on a control connection, in one piece: every note that is taken ends within the bytes.
pub fn notes(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(Some((note, n))) = Note::decode(rest) {
        assert!((4..=rest.len()).contains(&n));
        // What was understood can be passed on, and is understood there.
        assert!(matches!(Note::decode(&note.encode()), Ok(Some(_))), "{note:?}");
        rest = &rest[n..];
    }
}

/// The header of a frame.
pub fn header(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else { return };
    if let Some(header) = Header::decode(bytes) {
        assert_eq!(header.encode(), *bytes);
        signature_words(header.signature);
    }
}

/// The words of a call.
pub fn signature(bytes: &[u8]) {
    let mut words = [0; 3];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    signature_words(words);
}

fn signature_words(words: [u64; 3]) {
    if let Some(signature) = Signature::decode(words) {
        assert_eq!(Signature::decode(signature.encode()), Some(signature));
        assert!(!signature.to_string().is_empty());
    }
}
