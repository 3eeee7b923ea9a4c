//! The job's token, and how both ends of a connection prove that they know it without sending it
//!
//! A challenge and its response in both directions, with HMAC-SHA256 (RFC 2104). Whoever connects sends an opening, which
//! says what it wants and ends with a challenge; who accepts answers with a challenge of its own and its proof; who
//! connects sends its proof, and may go on at once. Each proof is made over the opening, both challenges and the side
//! that makes it, so one proof serves neither for another connection nor for the other side.
//!
//! This proves who opened a connection. It does not encrypt what follows, nor protect it from someone who can change
//! packets on their way.

use std::fmt;
use std::io;

use hmac::{Hmac, KeyInit, Mac};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::Sha256;

use crate::error::{Error, Result};

/// The variable that holds the token.
pub(crate) const TOKEN_VARIABLE: &str = "LIGHTRFT_TOKEN";

/// The shortest token: whoever hears a proof can try tokens on it at leisure.
const SHORTEST: usize = 16;

/// Bytes of a challenge.
pub(crate) const CHALLENGE_BYTES: usize = 32;

/// Bytes of a proof: one SHA-256.
pub(crate) const PROOF_BYTES: usize = 32;

/// Bytes of the accepting side's answer: its challenge, then its proof.
pub(crate) const ANSWER_BYTES: usize = CHALLENGE_BYTES + PROOF_BYTES;

/// A secret that all ranks of a job share: who cannot prove to know it is not let in.
///
/// Make it at random for each job, for instance with `openssl rand -hex 32`, and hand it to all ranks in the variable
/// `LIGHTRFT_TOKEN`. It is never sent.
#[derive(Clone)]
pub struct Token {
    /// Keyed, with nothing read yet: the secret itself is not kept.
    keyed: Hmac<Sha256>,
}

/// Shows that there is a token, never the token.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// A token with this secret, of at least 16 bytes.
    ///
    /// # Errors
    /// [`Error::Environment`] for a shorter secret: it could be guessed from a proof.
    pub fn new(secret: impl AsRef<[u8]>) -> Result<Self> {
        let secret = secret.as_ref();
        let refused = || Error::Environment {
            variable: TOKEN_VARIABLE,
            got: format!("{} bytes", secret.len()),
            expected: format!("a secret of at least {SHORTEST} bytes, the same on all ranks"),
        };
        if secret.len() < SHORTEST {
            return Err(refused());
        }
        let keyed = Hmac::new_from_slice(secret).map_err(|_| refused())?;
        Ok(Token { keyed })
    }

    /// The token in `LIGHTRFT_TOKEN`; `None` if the variable is not set, or empty.
    ///
    /// # Errors
    /// As [`new`](Token::new).
    pub fn from_env() -> Result<Option<Self>> {
        let set = std::env::var_os(TOKEN_VARIABLE).filter(|value| !value.is_empty());
        set.map(|value| Self::new(value.as_encoded_bytes())).transpose()
    }

    fn keyed(&self, side: Side, parts: [&[u8]; 2]) -> Hmac<Sha256> {
        let mut mac = self.keyed.clone();
        mac.update(&[side as u8]);
        for part in parts {
            // With the lengths, no two lists of parts read the same.
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    fn proof(&self, side: Side, parts: [&[u8]; 2]) -> [u8; PROOF_BYTES] {
        self.keyed(side, parts).finalize().into_bytes().into()
    }

    /// In a time that does not depend on the bytes.
    fn is_proof(&self, side: Side, parts: [&[u8]; 2], proof: &[u8]) -> bool {
        self.keyed(side, parts).verify_slice(proof).is_ok()
    }

    /// The accepting side: its answer to an opening, which ends with a challenge.
    pub(crate) fn answer(&self, opening: &[u8]) -> io::Result<[u8; ANSWER_BYTES]> {
        let mut answer = [0; ANSWER_BYTES];
        let (challenge, proof) = answer.split_at_mut(CHALLENGE_BYTES);
        challenge.copy_from_slice(&random::<CHALLENGE_BYTES>()?);
        proof.copy_from_slice(&self.proof(Side::Accepting, [opening, challenge]));
        Ok(answer)
    }

    /// The connecting side: its proof, or `None` if the answer to its opening does not prove the token.
    pub(crate) fn respond(&self, opening: &[u8], answer: &[u8; ANSWER_BYTES]) -> Option<[u8; PROOF_BYTES]> {
        let (challenge, proof) = answer.split_at(CHALLENGE_BYTES);
        let known = self.is_proof(Side::Accepting, [opening, challenge], proof);
        known.then(|| self.proof(Side::Connecting, [opening, challenge]))
    }

    /// The accepting side again: whether the connecting side has proved the token.
    pub(crate) fn admits(&self, opening: &[u8], answer: &[u8; ANSWER_BYTES], proof: &[u8]) -> bool {
        self.is_proof(Side::Connecting, [opening, &answer[..CHALLENGE_BYTES]], proof)
    }

    /// What shows that `text`, found in a public place under `label`, was put there by one who knows the token.
    pub(crate) fn seal(&self, label: &[u8], text: &[u8]) -> [u8; PROOF_BYTES] {
        self.proof(Side::Sealing, [label, text])
    }

    /// Whether `seal` is that of `text` under `label`.
    pub(crate) fn is_seal(&self, label: &[u8], text: &[u8], seal: &[u8]) -> bool {
        self.is_proof(Side::Sealing, [label, text], seal)
    }
}

/// Who makes a proof: no side's proof serves for another.
#[derive(Clone, Copy)]
enum Side {
    Accepting = 1,
    Connecting = 2,
    Sealing = 3,
}

/// Bytes that nobody can foretell.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // The system gives up to 256 bytes whole.
    let got = getrandom(&mut bytes[..], GetRandomFlags::empty())?;
    if got == N { Ok(bytes) } else { Err(io::Error::other("the system gave too few random bytes")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(secret: &str) -> Token {
        Token::new(secret).unwrap()
    }

    #[test]
    fn both_sides_convince_each_other_if_they_know_the_same_token() {
        let (connecting, accepting) = (token("0123456789abcdef"), token("0123456789abcdef"));
        let answer = accepting.answer(b"opening").unwrap();
        let proof = connecting.respond(b"opening", &answer).unwrap();
        assert!(accepting.admits(b"opening", &answer, &proof));
    }

    #[test]
    fn another_token_convinces_neither_side() {
        let (connecting, accepting) = (token("0123456789abcdef"), token("0123456789abcdeg"));
        let answer = accepting.answer(b"opening").unwrap();
        assert!(connecting.respond(b"opening", &answer).is_none());
        let other = connecting.answer(b"opening").unwrap();
        let proof = connecting.respond(b"opening", &other).unwrap();
        assert!(!accepting.admits(b"opening", &other, &proof));
    }

    #[test]
    fn a_proof_holds_for_one_opening_one_answer_and_one_side() {
        let token = token("0123456789abcdef");
        let answer = token.answer(b"opening").unwrap();
        let proof = token.respond(b"opening", &answer).unwrap();
        assert!(!token.admits(b"another", &answer, &proof));
        assert!(!token.admits(b"opening", &token.answer(b"opening").unwrap(), &proof), "a replay");
        assert!(token.respond(b"another", &answer).is_none());
        // What the accepting side has sent, sent back to it.
        assert!(!token.admits(b"opening", &answer, &answer[CHALLENGE_BYTES..]), "a reflection");
        assert!(!token.admits(b"opening", &answer, &proof[..31]) && !token.admits(b"opening", &answer, &[]));
        let mut bent = proof;
        bent[31] ^= 1;
        assert!(!token.admits(b"opening", &answer, &bent));
    }

    #[test]
    fn the_proof_is_hmac_sha256_as_anyone_computes_it() {
        // Python: hmac.new(b"0123456789abcdef", b"\x03" + struct.pack("<Q", 1) + b"l" + struct.pack("<Q", 4) + b"text",
        // "sha256").hexdigest()
        let seal = token("0123456789abcdef").seal(b"l", b"text");
        let text: String = seal.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(text, "90c353a5cff115de8f0bc46af9b46957d2277e27ea6cea7ed81711e92cef783d");
        assert!(token("0123456789abcdef").is_seal(b"l", b"text", &seal));
        assert!(!token("0123456789abcdef").is_seal(b"lt", b"ext", &seal));
    }

    #[test]
    fn a_token_is_long_and_does_not_show_itself() {
        assert!(matches!(Token::new("15 bytes long.."), Err(Error::Environment { .. })));
        assert_eq!(format!("{:?}", token("0123456789abcdef")), "Token(..)");
    }
}
