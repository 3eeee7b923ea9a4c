//! The store's server: one thread, non-blocking sockets, any number of clients

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::session::{Session, serve};
use super::table::Table;
use crate::acceptor::Acceptor;
use crate::auth::Token;
use crate::error::{Error, Result};

/// Serves a store to this library's and torch's clients until dropped.
#[derive(Debug)]
pub struct StoreServer {
    address: SocketAddr,
    stop: Arc<OwnedFd>,
    listener: Arc<TcpListener>,
}

impl StoreServer {
    /// Listens on `address` and on nothing else; port 0 takes a free one.
    ///
    /// # Errors
    /// [`Error::Bind`] if the address cannot be listened on, for instance because the port is taken.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        Self::start(address, None)
    }

    /// As [`bind`](StoreServer::bind), in strict mode: only for clients of this library that prove that they know `token`
    /// ([`TcpStore::connect_strict`](super::TcpStore::connect_strict)). Torch's clients cannot.
    ///
    /// # Errors
    /// As [`bind`](StoreServer::bind).
    pub fn bind_strict(address: SocketAddr, token: &Token) -> Result<Self> {
        Self::start(address, Some(token.clone()))
    }

    fn start(address: SocketAddr, token: Option<Token>) -> Result<Self> {
        let failed = |source: io::Error| Error::Bind { address, source: Arc::new(source) };
        let listener = Arc::new(TcpListener::bind(address).map_err(failed)?);
        let acceptor = Acceptor::new(listener.clone()).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = Arc::new(eventfd(0, flags).map_err(|e| failed(e.into()))?);
        let stopped = stop.clone();
        thread::Builder::new()
            .name("lightrft-store".into())
            .spawn(move || Serving::new(acceptor, token).run(&stopped))
            .map_err(failed)?;
        Ok(StoreServer { address, stop, listener })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        // The thread ends by itself and closes its connections; nobody waits for it. The port is free at once.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
    }
}

/// Bytes taken from one client before the others have their turn.
const TURN: usize = 16 << 20;

/// Clients that have not said hello yet; more are cut off at once.
const MAX_STRANGERS: usize = 1024;

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    session: Session,
    /// The client says nothing more; what it said before counts.
    ended: bool,
}

struct Serving {
    acceptor: Acceptor,
    token: Option<Token>,
    connections: Vec<Connection>,
    table: Table,
}

impl Serving {
    fn new(acceptor: Acceptor, token: Option<Token>) -> Self {
        Serving { acceptor, token, connections: Vec::new(), table: Table::default() }
    }

    fn run(mut self, stop: &OwnedFd) {
        loop {
            let mut fds =
                vec![PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN), self.acceptor.poll_fd()];
            fds.extend(self.connections.iter().map(|c| {
                let mut events = PollFlags::empty();
                let held_back = c.session.held_back;
                events.set(PollFlags::IN, !held_back);
                events.set(PollFlags::OUT, held_back || !c.session.output.is_empty());
                PollFd::from_borrowed_fd(c.stream.as_fd(), events)
            }));
            let patience = self.connections.iter().filter_map(|c| c.session.patience()).min();
            let rest = [self.acceptor.rest(), patience].into_iter().flatten().min();
            let rest = rest
                .map(|rest| Timespec { tv_sec: rest.as_secs() as i64, tv_nsec: rest.subsec_nanos().into() });
            // A signal interrupts the wait; the loop then simply looks again.
            let polled = poll(&mut fds, rest.as_ref());
            if polled.is_ok() && !fds[0].revents().is_empty() {
                return;
            }
            let ready: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            for (connection, ready) in self.connections.iter_mut().zip(&ready[1..]) {
                if *ready && !connection.session.held_back {
                    connection.receive();
                }
            }
            let sessions = self.connections.iter_mut().map(|c| &mut c.session);
            serve(sessions, &mut self.table, self.token.as_ref());
            for connection in &mut self.connections {
                connection.flush();
            }
            self.connections.retain(|c| {
                let is_late = c.session.patience().is_some_and(|time| time.is_zero());
                c.session.open && !c.ended && !is_late
            });
            if ready[0] {
                self.accept();
            }
        }
    }

    fn accept(&mut self) {
        let mut strangers = self.connections.iter().filter(|c| c.session.patience().is_some()).count();
        let connections = &mut self.connections;
        self.acceptor.accept(|stream| {
            strangers += 1;
            if strangers > MAX_STRANGERS {
                return;
            }
            if stream.set_nonblocking(true).is_ok() && stream.set_nodelay(true).is_ok() {
                connections.push(Connection { stream, session: Session::new(), ended: false });
            }
        });
    }
}

impl Connection {
    fn receive(&mut self) {
        let mut buffer = [0u8; 64 << 10];
        // What is whole is served before more is taken, however fast a client sends.
        let enough = self.session.input.len() + TURN;
        while self.session.input.len() < enough {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(n) => {
                    self.session.input.extend_from_slice(&buffer[..n]);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.ended = true,
            }
            return;
        }
    }

    fn flush(&mut self) {
        while self.session.open && !self.session.output.is_empty() {
            match self.stream.write(&self.session.output) {
                Ok(n) => drop(self.session.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.session.open = false,
            }
        }
    }
}
