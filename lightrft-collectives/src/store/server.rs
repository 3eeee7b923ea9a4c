//! The store's server: one thread, non-blocking sockets, any number of clients

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::strict::{Doorkeeper, Verdict};
use super::table::Table;
use super::wire::{HELLO_BYTES, MAGIC, MAX_REPLY, Request, Stop, parse, put_string};
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

/// The longest request. Torch's limits on one key or value allow a request that no memory holds.
const MAX_REQUEST: usize = 256 << 20;

/// Bytes of replies from which on a client that does not read them gets no more answers, until it does.
const MAX_UNREAD: usize = 16 << 20;

/// A client that has not said hello, or proved the token, within this time is cut off.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Clients that have not said hello yet; more are cut off at once.
const MAX_STRANGERS: usize = 1024;

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
    /// Until it has said hello, and proved the token where one is asked for.
    stranger: Option<Stranger>,
    waiting: Option<Waiting>,
    /// Whole requests may be left in `input`, because the replies to those before were not read.
    held_back: bool,
    /// The client says nothing more; what it said before counts.
    ended: bool,
    open: bool,
}

/// A client that has not said hello.
#[derive(Debug)]
struct Stranger {
    since: Instant,
    doorkeeper: Doorkeeper,
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
                events.set(PollFlags::IN, !c.held_back);
                events.set(PollFlags::OUT, c.held_back || !c.output.is_empty());
                PollFd::from_borrowed_fd(c.stream.as_fd(), events)
            }));
            let patience = self.strangers().min().map(|since| HELLO_TIME.saturating_sub(since.elapsed()));
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
                if *ready && !connection.held_back {
                    connection.receive();
                }
            }
            self.serve();
            for connection in &mut self.connections {
                connection.flush();
            }
            let is_late = |s: &Stranger| s.since.elapsed() >= HELLO_TIME;
            self.connections.retain(|c| c.open && !c.ended && !c.stranger.as_ref().is_some_and(is_late));
            if ready[0] {
                self.accept();
            }
        }
    }

    /// Since when each stranger has been there.
    fn strangers(&self) -> impl Iterator<Item = Instant> {
        self.connections.iter().filter_map(|c| c.stranger.as_ref().map(|s| s.since))
    }

    fn accept(&mut self) {
        let mut strangers = self.strangers().count();
        let connections = &mut self.connections;
        self.acceptor.accept(|stream| {
            strangers += 1;
            if strangers > MAX_STRANGERS {
                return;
            }
            if stream.set_nonblocking(true).is_ok() && stream.set_nodelay(true).is_ok() {
                connections.push(Connection::new(stream));
            }
        });
    }

    /// Answers all whole requests, then the waits that they fulfilled.
    fn serve(&mut self) {
        for connection in &mut self.connections {
            let mut input = std::mem::take(&mut connection.input);
            let mut rest = &input[..];
            connection.held_back = false;
            rest = &rest[connection.introduce(rest, self.token.as_ref())..];
            while connection.open && connection.stranger.is_none() {
                connection.held_back = connection.output.len() >= MAX_UNREAD;
                if connection.held_back {
                    break;
                }
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
            let done = input.len() - rest.len();
            drop(input.drain(..done));
            connection.input = input;
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
    fn new(stream: TcpStream) -> Self {
        Connection {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            stranger: Some(Stranger { since: Instant::now(), doorkeeper: Doorkeeper::default() }),
            waiting: None,
            held_back: false,
            ended: false,
            open: true,
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0u8; 64 << 10];
        // What is whole is served before more is taken, however fast a client sends.
        let enough = self.input.len() + TURN;
        while self.input.len() < enough {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(n) => {
                    self.input.extend_from_slice(&buffer[..n]);
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
        while self.open && !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.open = false,
            }
        }
    }

    /// Deals with the first bytes of a client: they must say that this is the protocol, and prove the token where there is
    /// one. Anything else closes this connection only. Returns how many bytes that took.
    fn introduce(&mut self, bytes: &[u8], token: Option<&Token>) -> usize {
        let mut taken = 0;
        while let Some(stranger) = &mut self.stranger {
            let rest = &bytes[taken..];
            let verdict = match token {
                Some(token) => stranger.doorkeeper.look(token, rest),
                None => match parse(&rest[..rest.len().min(HELLO_BYTES)]) {
                    Ok((Request::Validate(MAGIC), n)) => Verdict::Admit(n),
                    // Who has not said hello has nothing longer to say.
                    Err(Stop::Incomplete) if rest.len() < HELLO_BYTES => Verdict::Wait,
                    _ => Verdict::Refuse,
                },
            };
            match verdict {
                Verdict::Wait => break,
                Verdict::Answer(n, answer) => {
                    self.output.extend_from_slice(&answer);
                    taken += n;
                }
                Verdict::Admit(n) => {
                    self.stranger = None;
                    taken += n;
                }
                Verdict::Refuse => {
                    self.open = false;
                    break;
                }
            }
        }
        taken
    }

    fn answer(&mut self, request: Request<'_>, table: &mut Table) {
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
            // A value that no client could read is not kept.
            Request::Append(key, value) => self.open = table.append(key, value),
            Request::MultiGet(keys) => {
                let values = keys.into_iter().map(|key| table.value(key).unwrap_or_default());
                let mut length = out.len();
                for value in values {
                    length += value.len() + size_of::<u64>();
                    if length > MAX_UNREAD + MAX_REPLY {
                        self.open = false;
                        return;
                    }
                    put_string(out, value);
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::wire::{GET, MULTI_GET, SET, VALIDATE, list_request, request};
    use super::*;

    /// A server with one client that has said hello and set `key` to a megabyte, and that client's end.
    fn one_client() -> (Serving, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut connection = Connection::new(listener.accept().unwrap().0);
        connection.input.push(VALIDATE);
        connection.input.extend_from_slice(&MAGIC.to_le_bytes());
        connection.input.extend(request(SET, &[b"key", &[7; 1 << 20]]));
        let mut serving = Serving::new(Acceptor::new(Arc::new(listener)).unwrap(), None);
        serving.connections.push(connection);
        serving.serve();
        assert!(serving.connections[0].open && serving.connections[0].input.is_empty());
        (serving, client)
    }

    #[test]
    fn a_client_that_reads_no_replies_gets_no_more_of_them() {
        let (mut serving, _client) = one_client();
        serving.connections[0].input = request(GET, &[b"key"]).repeat(1000);
        let mut replies = 0;
        while !serving.connections[0].input.is_empty() {
            serving.serve();
            let connection = &mut serving.connections[0];
            assert!(connection.output.len() < MAX_UNREAD + (2 << 20), "{} bytes", connection.output.len());
            // As if the client had read them.
            replies += connection.output.len();
            connection.output.clear();
        }
        assert_eq!(replies, 1000 * (8 + (1 << 20)), "every request is answered in the end");
    }

    #[test]
    fn a_request_whose_reply_no_memory_holds_ends_its_connection() {
        let (mut serving, _client) = one_client();
        serving.connections[0].input = list_request(MULTI_GET, &vec![b"key".to_vec(); 128 << 10]);
        serving.serve();
        assert!(!serving.connections[0].open);
    }

    #[test]
    fn who_has_not_said_hello_fills_no_memory() {
        let (mut serving, _client) = one_client();
        serving.connections[0].stranger =
            Some(Stranger { since: Instant::now(), doorkeeper: Doorkeeper::default() });
        serving.connections[0].input = request(SET, &[b"key", &[7; 1 << 20]])[..1 << 19].to_vec();
        serving.serve();
        assert!(!serving.connections[0].open);
    }
}
