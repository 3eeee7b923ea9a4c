//! Strict mode: before the first request, client and server prove to each other that they know the job's token
//!
//! Torch's protocol has no such thing. So the client's first byte is one that no request of it begins with: a
//! server of torch, or of ours in plain mode, closes the connection, and a strict one closes those of others.

use std::io;

use super::wire::MAGIC;
use crate::auth::{ANSWER_BYTES, CHALLENGE_BYTES, PROOF_BYTES, Token, random};

/// What a client says first, in place of torch's VALIDATE.
const PROVE: u8 = 0xA7;

/// Bytes of a client's opening: the opcode, the protocol's magic, a challenge.
const OPENING_BYTES: usize = 1 + size_of::<u32>() + CHALLENGE_BYTES;

/// A client's opening.
pub(super) fn opening() -> io::Result<[u8; OPENING_BYTES]> {
    let mut opening = [0; OPENING_BYTES];
    opening[0] = PROVE;
    opening[1..5].copy_from_slice(&MAGIC.to_le_bytes());
    opening[5..].copy_from_slice(&random::<CHALLENGE_BYTES>()?);
    Ok(opening)
}

/// The server's part with one client.
#[derive(Debug, Default)]
pub(super) struct Doorkeeper {
    asked: Option<([u8; OPENING_BYTES], [u8; ANSWER_BYTES])>,
}

/// What became of a client's bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// More bytes must come.
    Wait,
    /// So many bytes were its opening; it is to be sent this.
    Answer(usize, [u8; ANSWER_BYTES]),
    /// So many bytes were its proof; it may come in.
    Admit(usize),
    /// It does not know the token, or does not speak this protocol.
    Refuse,
}

impl Doorkeeper {
    /// Looks at the bytes that a client has sent and that were not dealt with yet.
    pub(super) fn look(&mut self, token: &Token, bytes: &[u8]) -> Verdict {
        let Some((opening, answer)) = &self.asked else {
            let mut expected = [0; 5];
            expected[0] = PROVE;
            expected[1..].copy_from_slice(&MAGIC.to_le_bytes());
            if !bytes.iter().zip(&expected).all(|(got, expected)| got == expected) {
                return Verdict::Refuse;
            }
            let Some((opening, _)) = bytes.split_first_chunk() else { return Verdict::Wait };
            let Ok(answer) = token.answer(opening) else { return Verdict::Refuse };
            self.asked = Some((*opening, answer));
            return Verdict::Answer(OPENING_BYTES, answer);
        };
        match bytes.get(..PROOF_BYTES) {
            None => Verdict::Wait,
            Some(proof) if token.admits(opening, answer, proof) => Verdict::Admit(PROOF_BYTES),
            Some(_) => Verdict::Refuse,
        }
    }
}
