//! The store's readers of foreign bytes, for fuzz targets

use std::io::{self, Read, Write};
use std::time::Duration;

use super::connection::{Connection, Stream, after};
use super::session::{Session, serve};
use super::table::Table;
use super::wire::{MAX_KEY, MAX_VALUE, PING_BYTES, parse};
use crate::auth::Token;

/// Clients of a server say these bytes: the first byte says whether the server is strict and how the rest is cut into
/// packets of two clients. However they are cut, the server lives, and what it says is bounded.
pub fn store_requests(bytes: &[u8]) {
    let Some((&cut, rest)) = bytes.split_first() else { return };
    let token = (cut & 1 == 1).then(|| Token::new("a token for the fuzzer").ok()).flatten();
    let mut sessions = [Session::new(), Session::new()];
    let mut table = Table::default();
    let packet = usize::from(cut >> 2) + 1;
    for (turn, packet) in rest.chunks(packet).enumerate() {
        let which = if cut & 2 == 2 { turn % 2 } else { 0 };
        sessions[which].input.extend_from_slice(packet);
        serve(sessions.iter_mut().filter(|s| s.open), &mut table, token.as_ref());
        for session in &mut sessions {
            assert!(session.output.len() < 1 << 26, "{} bytes of replies", session.output.len());
            session.output.clear();
        }
    }
    // A request that is taken is as long as its own bytes, and reads the same when nothing follows.
    if let Ok((request, n)) = parse(rest) {
        assert!(n <= rest.len() && parse(&rest[..n]) == Ok((request, n)));
    }
}

/// A server says these bytes to a client; the first byte says what the client has asked for.
pub fn store_replies(bytes: &[u8]) {
    let Some((&question, rest)) = bytes.split_first() else { return };
    let length = rest.len();
    let deadline = after(Duration::from_secs(60));
    let mut connection = Connection { stream: Script(rest), deadline };
    let mut ping = [0; PING_BYTES];
    ping[4] = question;
    let token = Token::new("a token for the fuzzer").ok();
    let _ = match question % 7 {
        0 => connection.greet(None),
        1 => connection.greet(token.as_ref()),
        2 => connection.byte().map(drop),
        3 => connection.pong(&ping),
        4 => connection.string(MAX_VALUE).map(|string| assert!(string.len() <= length)),
        5 => connection.count().and_then(|n| connection.strings(n, MAX_KEY)).map(drop),
        _ => connection.strings(usize::from(question), MAX_VALUE).map(drop),
    };
}

/// A server that has said all that it will ever say.
struct Script<'a>(&'a [u8]);

impl Read for Script<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Script<'_> {
    fn limit_read(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn limit_write(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }
}
