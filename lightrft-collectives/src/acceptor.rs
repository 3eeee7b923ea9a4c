//! A listener that rests when the system has no descriptor left for what knocks, instead of turning round at once

use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

/// How long a listener is left alone after a failure: it stays readable, and a poll would return at once.
const REST: Duration = Duration::from_millis(100);

/// A non-blocking listener in somebody's poll loop.
#[derive(Debug)]
pub(crate) struct Acceptor {
    listener: Arc<TcpListener>,
    rests_until: Option<Instant>,
}

impl Acceptor {
    pub(crate) fn new(listener: Arc<TcpListener>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Acceptor { listener, rests_until: None })
    }

    /// What to poll for.
    pub(crate) fn poll_fd(&self) -> PollFd<'_> {
        let events = if self.rest().is_some() { PollFlags::empty() } else { PollFlags::IN };
        PollFd::from_borrowed_fd(self.listener.as_fd(), events)
    }

    /// How long it rests from now, if it does: the longest that a poll may take.
    pub(crate) fn rest(&self) -> Option<Duration> {
        let rest = self.rests_until?.saturating_duration_since(Instant::now());
        (!rest.is_zero()).then_some(rest)
    }

    /// Takes all connections that wait.
    pub(crate) fn accept(&mut self, mut take: impl FnMut(TcpStream)) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => take(stream),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                // Of this connection or this call only.
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections");
                    self.rests_until = Some(Instant::now() + REST);
                    return;
                }
            }
        }
    }
}
