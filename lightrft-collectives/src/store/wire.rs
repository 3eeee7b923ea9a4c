//! The bytes of torch's TCPStore: requests parsed and written, with every length bounded
//!
//! Integers are little-endian; a string is a `u64` length and its bytes; a request is one byte of opcode and its
//! fields, with no length in front.

use std::io;

/// What a client says first, after the opcode VALIDATE.
pub(super) const MAGIC: u32 = 0x3C85_F7CE;

/// Bytes of VALIDATE and its magic.
pub(super) const HELLO_BYTES: usize = 5;

/// Bytes of a ping: the opcode and a number.
pub(super) const PING_BYTES: usize = 5;

/// Limits of torch's server.
pub(super) const MAX_KEY: usize = 8 << 10;
pub(super) const MAX_VALUE: usize = 8 << 20;
pub(super) const MAX_KEYS: usize = 128 << 10;

/// The longest reply; only a list of keys, or of long values, could be answered by a longer one.
pub(super) const MAX_REPLY: usize = 256 << 20;

pub(super) const VALIDATE: u8 = 0x00;
pub(super) const SET: u8 = 0x01;
pub(super) const COMPARE_SET: u8 = 0x02;
pub(super) const GET: u8 = 0x03;
pub(super) const ADD: u8 = 0x04;
pub(super) const CHECK: u8 = 0x05;
pub(super) const WAIT: u8 = 0x06;
pub(super) const NUM_KEYS: u8 = 0x07;
pub(super) const DELETE: u8 = 0x08;
pub(super) const APPEND: u8 = 0x09;
pub(super) const MULTI_GET: u8 = 0x0a;
pub(super) const MULTI_SET: u8 = 0x0b;
pub(super) const CANCEL_WAIT: u8 = 0x0c;
pub(super) const PING: u8 = 0x0d;
pub(super) const QUEUE_PUSH: u8 = 0x0e;
pub(super) const QUEUE_POP: u8 = 0x0f;
pub(super) const QUEUE_LEN: u8 = 0x10;
pub(super) const LIST_KEYS: u8 = 0x11;
pub(super) const BARRIER: u8 = 0x12;

/// A request as the server sees it, borrowed from the connection's buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request<'a> {
    Validate(u32),
    Set(&'a [u8], &'a [u8]),
    CompareSet(&'a [u8], &'a [u8], &'a [u8]),
    Get(&'a [u8]),
    Add(&'a [u8], i64),
    Check(Vec<&'a [u8]>),
    Wait(Vec<&'a [u8]>),
    NumKeys,
    Delete(&'a [u8]),
    Append(&'a [u8], &'a [u8]),
    MultiGet(Vec<&'a [u8]>),
    MultiSet(Vec<(&'a [u8], &'a [u8])>),
    CancelWait,
    Ping(u32),
    QueuePush(&'a [u8], &'a [u8]),
    QueuePop(&'a [u8]),
    QueueLen(&'a [u8]),
    ListKeys,
    Barrier(&'a [u8], i64),
}

/// Why no request could be taken from a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// More bytes must come.
    Incomplete,
    /// This is not the protocol, or a length is over its limit.
    Malformed,
}

struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Stop> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(Stop::Incomplete)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(Stop::Incomplete)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn string(&mut self, limit: usize) -> Result<&'a [u8], Stop> {
        let n = u64::from_le_bytes(self.array()?);
        if n > limit as u64 { Err(Stop::Malformed) } else { self.take(n as usize) }
    }

    fn key(&mut self) -> Result<&'a [u8], Stop> {
        self.string(MAX_KEY)
    }

    fn value(&mut self) -> Result<&'a [u8], Stop> {
        self.string(MAX_VALUE)
    }

    fn i64(&mut self) -> Result<i64, Stop> {
        self.array().map(i64::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_le_bytes)
    }

    fn list<T>(&mut self, mut one: impl FnMut(&mut Self) -> Result<T, Stop>) -> Result<Vec<T>, Stop> {
        let n = u64::from_le_bytes(self.array()?);
        if n > MAX_KEYS as u64 {
            return Err(Stop::Malformed);
        }
        (0..n).map(|_| one(self)).collect()
    }
}

/// The first request in `bytes`, and its length.
pub(super) fn parse(bytes: &[u8]) -> Result<(Request<'_>, usize), Stop> {
    let mut c = Cursor { rest: bytes };
    let [opcode] = c.array()?;
    let request = match opcode {
        VALIDATE => Request::Validate(c.u32()?),
        SET => Request::Set(c.key()?, c.value()?),
        COMPARE_SET => Request::CompareSet(c.key()?, c.value()?, c.value()?),
        GET => Request::Get(c.key()?),
        ADD => Request::Add(c.key()?, c.i64()?),
        CHECK => Request::Check(c.list(Cursor::key)?),
        WAIT => Request::Wait(c.list(Cursor::key)?),
        NUM_KEYS => Request::NumKeys,
        DELETE => Request::Delete(c.key()?),
        APPEND => Request::Append(c.key()?, c.value()?),
        MULTI_GET => Request::MultiGet(c.list(Cursor::key)?),
        MULTI_SET => Request::MultiSet(c.list(|c| Ok((c.key()?, c.value()?)))?),
        CANCEL_WAIT => Request::CancelWait,
        PING => Request::Ping(c.u32()?),
        QUEUE_PUSH => Request::QueuePush(c.key()?, c.value()?),
        QUEUE_POP => Request::QueuePop(c.key()?),
        QUEUE_LEN => Request::QueueLen(c.key()?),
        LIST_KEYS => Request::ListKeys,
        BARRIER => Request::Barrier(c.key()?, c.i64()?),
        _ => return Err(Stop::Malformed),
    };
    Ok((request, bytes.len() - c.rest.len()))
}

/// Appends a string.
pub(super) fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// A request with its strings.
pub(super) fn request(opcode: u8, strings: &[&[u8]]) -> Vec<u8> {
    let mut out = vec![opcode];
    for string in strings {
        put_string(&mut out, string);
    }
    out
}

/// A request with a list of keys.
pub(super) fn list_request(opcode: u8, keys: &[Vec<u8>]) -> Vec<u8> {
    let mut out = vec![opcode];
    out.extend_from_slice(&(keys.len() as u64).to_le_bytes());
    for key in keys {
        put_string(&mut out, key);
    }
    out
}

/// A ping, which torch's clients send with their process id.
pub(super) fn ping() -> [u8; PING_BYTES] {
    let [a, b, c, d] = std::process::id().to_le_bytes();
    [PING, a, b, c, d]
}

/// Refuses what no server of this protocol would take.
pub(super) fn check_length(what: &str, got: usize, limit: usize) -> io::Result<()> {
    if got <= limit {
        return Ok(());
    }
    let text = format!("a {what} of length {got}, expected at most {limit}");
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_are_bounded_before_anything_is_kept() {
        for opcode in [SET, GET, WAIT, MULTI_SET] {
            let mut bytes = vec![opcode];
            bytes.extend_from_slice(&u64::MAX.to_le_bytes());
            assert_eq!(parse(&bytes).map(drop), Err(Stop::Malformed), "opcode {opcode}");
        }
    }

    proptest! {
        #[test]
        fn a_request_cut_short_is_incomplete(key: Vec<u8>, value: Vec<u8>, cut in 0usize..1000) {
            let bytes = request(SET, &[&key, &value]);
            prop_assert_eq!(parse(&bytes), Ok((Request::Set(&key, &value), bytes.len())));
            prop_assert_eq!(parse(&bytes[..cut % bytes.len()]).map(drop), Err(Stop::Incomplete));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
