//! The watcher: one thread per world that accepts connections and notices who died
//!
//! The kernel closes a process's sockets when it ends, however it ends. So a control connection that closes
//! without a goodbye is a death. A rank that learns of a death passes it on before it does anything else; whoever
//! later sees *its* connection close has therefore already heard who died first.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::fate::Fate;
use super::hello::{Gate, Purpose, Strangers};
use super::wire::{Cause, Note};
use crate::acceptor::Acceptor;
use crate::error::Loss;

/// What the watcher and the callers of one rank share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rank: usize,
    pub(super) nonce: u64,
    pub(super) fate: Fate,
    controls: Mutex<Vec<Option<Arc<TcpStream>>>>,
    arrived: Mutex<HashMap<(Purpose, usize), TcpStream>>,
    arrival: Condvar,
    wake: OwnedFd,
    state: Mutex<State>,
    /// Held while a failure is declared: one after the other.
    declaring: Mutex<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Stopping,
}

impl Shared {
    pub(super) fn new(rank: usize, world: usize, nonce: u64) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Shared {
            rank,
            nonce,
            fate: Fate::default(),
            controls: Mutex::new((0..world).map(|_| None).collect()),
            arrived: Mutex::default(),
            arrival: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            state: Mutex::new(State::Running),
            declaring: Mutex::default(),
        }))
    }

    fn controls(&self) -> MutexGuard<'_, Vec<Option<Arc<TcpStream>>>> {
        self.controls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Hands the control connection to `rank` to the watcher.
    pub(super) fn watch(&self, rank: usize, stream: TcpStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.controls()[rank] = Some(Arc::new(stream));
        self.wake();
        Ok(())
    }

    /// Takes the connection that `rank` opened for `purpose`; `None` at the end of `timeout`.
    pub(super) fn take(&self, purpose: Purpose, rank: usize, timeout: Duration) -> Option<TcpStream> {
        let arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        let absent = |arrived: &mut HashMap<_, _>| !arrived.contains_key(&(purpose, rank));
        let waited = self.arrival.wait_timeout_while(arrived, timeout, absent);
        waited.unwrap_or_else(PoisonError::into_inner).0.remove(&(purpose, rank))
    }

    /// Tells every rank; one that cannot take a few bytes now is not waited for.
    pub(super) fn tell_all(&self, note: &Note) {
        let bytes = note.encode();
        for control in self.controls().iter().flatten() {
            let _ = (&**control).write_all(&bytes);
        }
    }

    /// If a failure is news, passes it on and then records it. In this order: a caller that reads the record may
    /// leave, or end this process, and the others must hear the cause before they see that.
    pub(super) fn declare(&self, group: Option<u64>, cause: Cause) {
        let _one_at_a_time = self.declaring.lock().unwrap_or_else(PoisonError::into_inner);
        if self.fate.is_news(group) {
            tracing::warn!(rank = self.rank, ?cause, "a group is dead");
            self.tell_all(&Note::Failed { group, cause: cause.clone() });
            self.fate.record(group, cause);
        }
    }

    /// Says goodbye and lets the watcher end. Does not wait.
    pub(super) fn leave(&self) {
        self.tell_all(&Note::Goodbye);
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::Stopping;
        self.wake();
    }

    fn is_stopping(&self) -> bool {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) == State::Stopping
    }
}

/// The thread's own state.
pub(super) struct Watcher {
    shared: Arc<Shared>,
    acceptor: Acceptor,
    strangers: Strangers,
    /// Notes not yet whole, by rank.
    inputs: Vec<Vec<u8>>,
    closed: Vec<bool>,
}

impl Watcher {
    pub(super) fn start(
        shared: Arc<Shared>,
        listener: TcpListener,
        world: usize,
        gate: Gate,
    ) -> io::Result<()> {
        let watcher = Watcher {
            shared,
            acceptor: Acceptor::new(Arc::new(listener))?,
            strangers: Strangers::new(gate),
            inputs: vec![Vec::new(); world],
            closed: vec![false; world],
        };
        std::thread::Builder::new().name("lightrft-watcher".into()).spawn(move || watcher.run()).map(drop)
    }

    fn run(mut self) {
        while !self.shared.is_stopping() {
            let controls: Vec<(usize, Arc<TcpStream>)> = {
                let controls = self.shared.controls();
                let open = controls.iter().enumerate().filter(|(rank, _)| !self.closed[*rank]);
                open.filter_map(|(rank, control)| Some((rank, control.clone()?))).collect()
            };
            let mut fds = vec![
                PollFd::from_borrowed_fd(self.shared.wake.as_fd(), PollFlags::IN),
                self.acceptor.poll_fd(),
            ];
            fds.extend(controls.iter().map(|(_, c)| PollFd::from_borrowed_fd(c.as_fd(), PollFlags::IN)));
            fds.extend(self.strangers.poll_fds());
            let timeout = self.acceptor.rest().or(self.strangers.patience());
            let timeout =
                timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
            if poll(&mut fds, timeout.as_ref()).is_err() {
                continue;
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if ready[0] {
                let _ = rustix::io::read(&self.shared.wake, &mut [0u8; 8]);
            }
            for ((rank, control), ready) in controls.iter().zip(&ready[2..]) {
                if *ready {
                    self.listen_to(*rank, control);
                }
            }
            self.greet_strangers();
            if ready[1] {
                self.acceptor.accept(|stream| self.strangers.add(stream));
            }
        }
    }

    /// Hands over the connections that have said hello.
    fn greet_strangers(&mut self) {
        let shared = &self.shared;
        self.strangers.greet(|hello, stream| {
            let mut arrived = shared.arrived.lock().unwrap_or_else(PoisonError::into_inner);
            arrived.insert((hello.purpose, hello.from), stream);
            shared.arrival.notify_all();
        });
    }

    /// Reads the notes of a rank, and its death.
    fn listen_to(&mut self, rank: usize, mut control: &TcpStream) {
        let mut buffer = [0; 4096];
        let open = loop {
            match control.read(&mut buffer) {
                Ok(0) => break false,
                Ok(n) => self.inputs[rank].extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break true,
                Err(_) => break false,
            }
        };
        let mut open = open;
        loop {
            match Note::decode(&self.inputs[rank]) {
                Ok(None) => break,
                Ok(Some((note, n))) => {
                    self.inputs[rank].drain(..n);
                    match note {
                        Note::Goodbye => self.shared.fate.record_goodbye(rank, None),
                        Note::LeftGroup { group } => self.shared.fate.record_goodbye(rank, Some(group)),
                        Note::Failed { group, cause } => self.shared.declare(group, cause),
                    }
                }
                Err(()) => {
                    open = false;
                    break;
                }
            }
        }
        if !open {
            self.closed[rank] = true;
            if !self.shared.fate.has_left(rank, 0) {
                self.shared.declare(None, Cause::Lost { rank, how: Loss::Died });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_here_learns_of_a_death_before_the_others_are_told() {
        let shared = Shared::new(0, 2, 0).unwrap();
        let alarm = shared.fate.alarm(7).unwrap();
        std::thread::scope(|scope| {
            // While this is held, the others cannot be told.
            let controls = shared.controls();
            scope.spawn(|| shared.declare(None, Cause::Lost { rank: 1, how: Loss::Died }));
            let rings = PollFd::new(alarm.fd(), PollFlags::IN);
            let pause = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            assert_eq!(poll(&mut [rings], Some(&pause)), Ok(0));
            assert!(shared.fate.cause(7).is_none());
            drop(controls);
        });
        assert!(alarm.is_rung() && shared.fate.cause(7).is_some());
    }
}
