//! The store's server: one thread, non-blocking sockets, any number of clients

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::table::Table;
use super::wire::{MAGIC, Request, Stop, parse, put_string};
use crate::error::{Error, Result};

/// Serves a store to this library's and torch's clients until dropped.
#[derive(Debug)]
pub struct StoreServer {
    address: SocketAddr,
    stop: Arc<OwnedFd>,
}

impl StoreServer {
    /// Listens on `address` and on nothing else; port 0 takes a free one.
    ///
    /// # Errors
    /// [`Error::Bind`] if the address cannot be listened on, for instance because the port is taken.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let failed = |source: io::Error| Error::Bind { address, source: Arc::new(source) };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = Arc::new(eventfd(0, flags).map_err(|e| failed(e.into()))?);
        let stopped = stop.clone();
        thread::Builder::new()
            .name("lightrft-store".into())
            .spawn(move || Serving::new(listener).run(&stopped))
            .map_err(failed)?;
        Ok(StoreServer { address, stop })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        // The thread ends by itself and closes its connections; nobody waits for it.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
    }
}

/// Bytes taken from one client before the others have their turn.
const TURN: usize = 16 << 20;

/// The longest request. Torch's limits on one key or value allow a request that no memory holds.
const MAX_REQUEST: usize = 256 << 20;

/// What a connection that got no reply yet waits for.
#[derive(Debug)]
enum Waiting {
    Keys(Vec<Vec<u8>>),
    Barrier(Vec<u8>, i64),
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
    validated: bool,
    waiting: Option<Waiting>,
    open: bool,
}

struct Serving {
    listener: TcpListener,
    connections: Vec<Connection>,
    table: Table,
}

impl Serving {
    fn new(listener: TcpListener) -> Self {
        Serving { listener, connections: Vec::new(), table: Table::default() }
    }

    fn run(mut self, stop: &OwnedFd) {
        loop {
            let mut fds = vec![
                PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
            ];
            fds.extend(self.connections.iter().map(|c| {
                let out = if c.output.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
                PollFd::from_borrowed_fd(c.stream.as_fd(), PollFlags::IN | out)
            }));
            // A signal interrupts the wait; the loop then simply looks again.
            let polled = poll(&mut fds, None);
            if polled.is_ok() && !fds[0].revents().is_empty() {
                return;
            }
            let ready: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            for (connection, ready) in self.connections.iter_mut().zip(&ready[1..]) {
                if *ready {
                    connection.receive();
                }
            }
            self.serve();
            for connection in &mut self.connections {
                connection.flush();
            }
            self.connections.retain(|c| c.open);
            if ready[0] {
                self.accept();
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_err() || stream.set_nodelay(true).is_err() {
                continue;
            }
            self.connections.push(Connection {
                stream,
                input: Vec::new(),
                output: Vec::new(),
                validated: false,
                waiting: None,
                open: true,
            });
        }
    }

    /// Answers all whole requests, then the waits that they fulfilled.
    fn serve(&mut self) {
        for connection in &mut self.connections {
            let input = std::mem::take(&mut connection.input);
            let mut rest = &input[..];
            while connection.open {
                match parse(rest) {
                    Ok((request, n)) => {
                        connection.answer(request, &mut self.table);
                        rest = &rest[n..];
                    }
                    Err(Stop::Incomplete) => {
                        connection.open &= rest.len() <= MAX_REQUEST;
                        break;
                    }
                    Err(Stop::Malformed) => connection.open = false,
                }
            }
            connection.input = rest.to_vec();
        }
        let mut arrived: HashMap<Vec<u8>, i64> = HashMap::new();
        for connection in &self.connections {
            if let Some(Waiting::Barrier(key, _)) = &connection.waiting {
                *arrived.entry(key.clone()).or_default() += 1;
            }
        }
        for connection in &mut self.connections {
            let fulfilled = match &connection.waiting {
                None => false,
                Some(Waiting::Keys(keys)) => self.table.has_all(keys),
                Some(Waiting::Barrier(key, world)) => arrived.get(key).is_some_and(|n| n >= world),
            };
            if fulfilled {
                connection.waiting = None;
                connection.output.push(0);
            }
        }
    }
}

impl Connection {
    fn receive(&mut self) {
        let mut buffer = [0u8; 64 << 10];
        // What is whole is served before more is taken, however fast a client sends.
        let enough = self.input.len() + TURN;
        while self.input.len() < enough {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.open = false,
                Ok(n) => {
                    self.input.extend_from_slice(&buffer[..n]);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.open = false,
            }
            return;
        }
    }

    fn flush(&mut self) {
        while self.open && !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.open = false,
            }
        }
    }

    fn answer(&mut self, request: Request<'_>, table: &mut Table) {
        // The first request must say that this is the protocol; anything else closes this connection only.
        if !self.validated {
            self.validated = request == Request::Validate(MAGIC);
            self.open = self.validated;
            return;
        }
        let out = &mut self.output;
        let number = |out: &mut Vec<u8>, n: i64| out.extend_from_slice(&n.to_le_bytes());
        match request {
            Request::Validate(magic) => self.open = magic == MAGIC,
            Request::Set(key, value) => table.set(key, value),
            Request::CompareSet(key, expected, desired) => {
                put_string(out, &table.compare_set(key, expected, desired));
            }
            Request::Get(key) => put_string(out, table.value(key).unwrap_or_default()),
            Request::Add(key, delta) => number(out, table.add(key, delta)),
            Request::Check(keys) => out.push(u8::from(!table.has_all(&keys))),
            Request::Wait(keys) => {
                self.waiting = Some(Waiting::Keys(keys.into_iter().map(<[u8]>::to_vec).collect()));
            }
            Request::NumKeys => number(out, table.len() as i64),
            Request::Delete(key) => number(out, i64::from(table.delete(key))),
            Request::Append(key, value) => table.append(key, value),
            Request::MultiGet(keys) => {
                for key in keys {
                    put_string(out, table.value(key).unwrap_or_default());
                }
            }
            Request::MultiSet(pairs) => {
                for (key, value) in pairs {
                    table.set(key, value);
                }
            }
            Request::CancelWait => {
                self.waiting = None;
                out.push(1);
            }
            Request::Ping(nonce) => out.extend_from_slice(&nonce.to_le_bytes()),
            Request::QueuePush(key, value) => table.queue_push(key, value),
            Request::QueuePop(key) => {
                number(out, table.queue_len(key) as i64);
                if let Some(value) = table.queue_pop(key) {
                    put_string(out, &value);
                }
            }
            Request::QueueLen(key) => number(out, table.queue_len(key) as i64),
            Request::ListKeys => {
                number(out, table.len() as i64);
                for key in table.keys() {
                    put_string(out, key);
                }
            }
            Request::Barrier(key, world) => self.waiting = Some(Waiting::Barrier(key.to_vec(), world)),
        }
    }
}
