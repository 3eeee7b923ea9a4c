//! A client's connection to a store: bytes out and in, every wait within a deadline, every length bounded

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::strict;
use super::wire::{self, MAX_REPLY};
use crate::auth::{ANSWER_BYTES, Token};

/// The longest that a socket is told to wait: more does not fit its clock.
const LONGEST: Duration = Duration::from_secs(1 << 31);

/// A connection during one request: every wait on it ends at the deadline.
pub(super) struct Connection<S> {
    pub(super) stream: S,
    pub(super) deadline: Instant,
}

/// A stream whose reads and writes can be made to end.
pub(super) trait Stream: Read + Write {
    fn limit_read(&self, time: Duration) -> io::Result<()>;
    fn limit_write(&self, time: Duration) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn limit_read(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))
    }

    fn limit_write(&self, time: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(time))
    }
}

/// The end of `time` from now.
pub(super) fn after(time: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(time.min(LONGEST)).unwrap_or(now)
}

impl Connection<TcpStream> {
    pub(super) fn open(host: &str, port: u16, token: Option<&Token>, within: Duration) -> io::Result<Self> {
        let deadline = after(within);
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host, port).to_socket_addrs()? {
            let rest = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let greeted = TcpStream::connect_timeout(&address, rest).and_then(|stream| {
                stream.set_nodelay(true)?;
                let mut connection = Connection { stream, deadline };
                connection.greet(token)?;
                Ok(connection)
            });
            match greeted {
                Ok(connection) => return Ok(connection),
                Err(e) => failure = e,
            }
        }
        Err(failure)
    }
}

impl<S: Stream> Connection<S> {
    /// Says that this is the protocol, proves the token if there is one, and has the server answer a ping.
    pub(super) fn greet(&mut self, token: Option<&Token>) -> io::Result<()> {
        let mut hello = match token {
            None => [&[wire::VALIDATE][..], &wire::MAGIC.to_le_bytes()].concat(),
            Some(token) => {
                let opening = strict::opening()?;
                self.send(&opening)?;
                let answer = self.array::<ANSWER_BYTES>()?;
                let unproved =
                    || io::Error::new(io::ErrorKind::PermissionDenied, "the store does not know the token");
                token.respond(&opening, &answer).ok_or_else(unproved)?.to_vec()
            }
        };
        let ping = wire::ping();
        hello.extend_from_slice(&ping);
        self.send(&hello)?;
        self.pong(&ping)
    }

    fn rest(&self) -> io::Result<Duration> {
        let rest = self.deadline.saturating_duration_since(Instant::now());
        // A zero timeout would mean none to the socket.
        if rest.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(rest) }
    }

    pub(super) fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.limit_write(self.rest()?)?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if is_passing(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn receive(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.limit_read(self.rest()?)?;
            match self.stream.read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => bytes = &mut bytes[n..],
                Err(e) if is_passing(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn byte(&mut self) -> io::Result<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn i64(&mut self) -> io::Result<i64> {
        self.array().map(i64::from_le_bytes)
    }

    pub(super) fn count(&mut self) -> io::Result<usize> {
        let n = self.i64()?;
        usize::try_from(n).map_err(|_| invalid(format!("a count of {n}")))
    }

    pub(super) fn string(&mut self, limit: usize) -> io::Result<Vec<u8>> {
        let n = self.i64()? as u64;
        if n > limit as u64 {
            return Err(invalid(format!("a string of {n} bytes, at most {limit} can be")));
        }
        let mut bytes = vec![0; n as usize];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }

    /// Nothing is kept for a string that has not come: a count alone takes no memory.
    pub(super) fn strings(&mut self, n: usize, limit: usize) -> io::Result<Vec<Vec<u8>>> {
        let (mut strings, mut bytes) = (Vec::new(), 0);
        for _ in 0..n {
            let string = self.string(limit)?;
            bytes += string.len() + size_of::<u64>();
            if bytes > MAX_REPLY {
                return Err(invalid(format!("a reply of more than {MAX_REPLY} bytes")));
            }
            strings.push(string);
        }
        Ok(strings)
    }

    pub(super) fn pong(&mut self, ping: &[u8; wire::PING_BYTES]) -> io::Result<()> {
        let echo = self.array::<4>()?;
        if ping.ends_with(&echo) { Ok(()) } else { Err(invalid("a ping came back changed")) }
    }
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Whether to look at the clock and try again: a signal came, or the socket's own clock ran out, which may be coarser.
fn is_passing(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
