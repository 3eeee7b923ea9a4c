//! The first bytes on a connection: what it is for and who opens it; and those who have not said so yet
//!
//! The watcher reads hellos between two polls, so nothing here waits.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::wire::{MAGIC, pack, unpack};

/// A connection that does not say hello within this time is closed.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Connections that have not said hello yet; more are closed at once.
const MAX_STRANGERS: usize = 1024;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    /// Notes between two ranks of the world; open as long as both live.
    Control,
    /// Frames of the group with this id.
    Data(u64),
}

impl Purpose {
    /// The group that fails if there is no such connection; 0, which is no group's id, while the world is joined.
    pub(super) fn group(self) -> u64 {
        if let Purpose::Data(group) = self { group } else { 0 }
    }
}

/// The first bytes on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    /// The world's random number: a connection of another job, or of none, does not know it.
    pub(super) nonce: u64,
    pub(super) purpose: Purpose,
    /// The connecting rank of the world.
    pub(super) from: usize,
}

pub(super) const HELLO_BYTES: usize = 40;

impl Hello {
    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let (kind, group) = match self.purpose {
            Purpose::Control => (1, 0),
            Purpose::Data(group) => (2, group),
        };
        pack([MAGIC, self.nonce, kind, group, self.from as u64])
    }

    /// `None` if this is no hello of the world with this nonce.
    pub(super) fn decode(bytes: &[u8; HELLO_BYTES], nonce: u64) -> Option<Self> {
        let [magic, theirs, kind, group, from] = unpack(bytes);
        let purpose = match kind {
            1 => Purpose::Control,
            2 => Purpose::Data(group),
            _ => return None,
        };
        (magic == MAGIC && theirs == nonce).then_some(Hello { nonce, purpose, from: from as usize })
    }
}

/// An accepted connection that has not said hello.
#[derive(Debug)]
struct Stranger {
    stream: TcpStream,
    since: Instant,
    hello: [u8; HELLO_BYTES],
    got: usize,
}

/// All accepted connections that have not said hello.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    all: Vec<Stranger>,
}

impl Strangers {
    /// Takes a connection in; it is closed at once where there are too many.
    pub(super) fn add(&mut self, stream: TcpStream) {
        if self.all.len() < MAX_STRANGERS && stream.set_nonblocking(true).is_ok() {
            let since = Instant::now();
            self.all.push(Stranger { stream, since, hello: [0; HELLO_BYTES], got: 0 });
        }
    }

    /// What to poll for.
    pub(super) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.all.iter().map(|s| PollFd::from_borrowed_fd(s.stream.as_fd(), PollFlags::IN))
    }

    /// The longest that a poll may take: somebody's time may be up.
    pub(super) fn patience(&self) -> Option<Duration> {
        (!self.all.is_empty()).then_some(Duration::from_secs(1))
    }

    /// Reads what has come and gives `take` each connection whose hello is whole and of this world. Whoever says
    /// something else, or nothing for too long, is cut off; nobody else notices.
    pub(super) fn greet(&mut self, nonce: u64, world: usize, mut take: impl FnMut(Hello, TcpStream)) {
        let mut waiting = Vec::new();
        for mut stranger in std::mem::take(&mut self.all) {
            match stranger.stream.read(&mut stranger.hello[stranger.got..]) {
                Ok(0) => continue,
                Ok(n) => stranger.got += n,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => continue,
            }
            if stranger.got < HELLO_BYTES {
                if stranger.since.elapsed() < HELLO_TIME {
                    waiting.push(stranger);
                }
                continue;
            }
            if let Some(hello) = Hello::decode(&stranger.hello, nonce)
                && hello.from < world
            {
                take(hello, stranger.stream);
            }
        }
        self.all = waiting;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hellos_survive_and_a_foreign_nonce_is_refused(nonce: u64, other: u64, group: u64, from in 0usize..1 << 20) {
            let hello = Hello { nonce, purpose: Purpose::Data(group), from };
            prop_assert_eq!(Hello::decode(&hello.encode(), nonce), Some(hello));
            prop_assert_eq!(Hello::decode(&hello.encode(), other).is_some(), nonce == other);
        }
    }
}
