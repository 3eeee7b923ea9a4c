//! The store's client: requests and their replies, each within a deadline

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::Store;
use super::connection::{Connection, after};
use super::wire::{self, MAX_KEY, MAX_KEYS, MAX_VALUE};
use crate::auth::Token;
use crate::error::{Error, Result};

/// How long the server may take for a request that does not wait.
const REPLY: Duration = Duration::from_secs(30);

/// Connections kept for later requests.
const SPARE: usize = 8;

/// A [`Store`] behind a [`StoreServer`](super::StoreServer) or torch's TCPStore.
///
/// Keys get the `/` in front that torch's clients put there, so both see the same keys. Threads may share a client: each
/// request has a connection to itself, so one that waits holds nobody up.
#[derive(Debug)]
pub struct TcpStore {
    host: String,
    port: u16,
    token: Option<Token>,
    spare: Mutex<Vec<TcpStream>>,
    local: SocketAddr,
}

impl TcpStore {
    /// Connects to `host:port`, trying again until `timeout`: the server may not have started yet.
    ///
    /// # Errors
    /// [`Error::Store`] with the last failure.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        Self::open(host, port, None, timeout)
    }

    /// As [`connect`](TcpStore::connect), to a server in strict mode: both sides prove that they know `token`.
    ///
    /// # Errors
    /// As [`connect`](TcpStore::connect), and [`Error::Token`] if the server does not know the token.
    pub fn connect_strict(host: &str, port: u16, token: &Token, timeout: Duration) -> Result<Self> {
        Self::open(host, port, Some(token.clone()), timeout)
    }

    fn open(host: &str, port: u16, token: Option<Token>, timeout: Duration) -> Result<Self> {
        let begin = Instant::now();
        let mut pause = Duration::from_millis(5);
        loop {
            let rest = timeout.saturating_sub(begin.elapsed());
            let within = rest.clamp(Duration::from_millis(100), REPLY);
            let failure = match Connection::open(host, port, token.as_ref(), within) {
                Ok(Connection { stream, .. }) => {
                    let host = host.to_owned();
                    let failed = store_error(format!("{host}:{port}"), "connect");
                    let local = stream.local_addr().map_err(failed)?;
                    return Ok(TcpStore { host, port, token, spare: Mutex::new(vec![stream]), local });
                }
                // It will know it no better next time.
                Err(failure) if failure.kind() == io::ErrorKind::PermissionDenied && token.is_some() => {
                    return Err(Error::Token { peer: format!("the store at {host}:{port}") });
                }
                Err(failure) => failure,
            };
            if rest <= pause {
                return Err(store_error(format!("{host}:{port}"), "connect")(failure));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    /// The address of this end: the interface that leads to the store.
    pub fn local_address(&self) -> SocketAddr {
        self.local
    }

    fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    fn spare(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request and reads its reply on a connection that nobody else uses meanwhile. One on which that failed is
    /// not used again: the reply may still come and would be taken for that of the next request.
    fn call<R>(
        &self,
        doing: &'static str,
        request: Result<Vec<u8>, io::Error>,
        reply: impl FnOnce(&mut Connection<TcpStream>) -> io::Result<R>,
    ) -> Result<R> {
        let exchange = || {
            let request = request?;
            let spare = self.spare().pop();
            let mut connection = match spare {
                Some(stream) => Connection { stream, deadline: after(REPLY) },
                None => Connection::open(&self.host, self.port, self.token.as_ref(), REPLY)?,
            };
            connection.send(&request)?;
            let result = reply(&mut connection)?;
            let mut spare = self.spare();
            if spare.len() < SPARE {
                spare.push(connection.stream);
            }
            Ok(result)
        };
        exchange().map_err(store_error(self.address(), doing))
    }

    /// A request that torch's protocol does not answer, and a ping, which the server answers after it: when this
    /// returns, the request has been done.
    fn tell(&self, doing: &'static str, request: io::Result<Vec<u8>>) -> Result<()> {
        let ping = wire::ping();
        let request = request.map(|mut request| {
            request.extend_from_slice(&ping);
            request
        });
        self.call(doing, request, |connection| connection.pong(&ping))
    }

    /// Sends a request whose answer, one byte, may take until `timeout`; whether it came.
    fn wait_for(&self, doing: &'static str, request: io::Result<Vec<u8>>, timeout: Duration) -> Result<bool> {
        self.call(doing, request, |connection| {
            connection.deadline = after(timeout);
            match connection.byte() {
                Ok(_) => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
                Err(e) => return Err(e),
            }
            // The answer to the wait may still come before the answer to its end.
            connection.deadline = after(REPLY);
            connection.send(&[wire::CANCEL_WAIT])?;
            let first = connection.byte()?;
            if first == 0 {
                connection.byte()?;
            }
            Ok(first == 0)
        })
    }

    fn timed_out<T>(&self, keys: &[&str], waited: Duration) -> Result<T> {
        let keys = keys.iter().map(ToString::to_string).collect();
        Err(Error::StoreTimeout { store: self.address(), keys, waited })
    }
}

fn store_error(store: String, doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Store { store, doing, source: Arc::new(source) }
}

/// A key as torch's clients write it.
fn key(key: &str) -> io::Result<Vec<u8>> {
    wire::check_length("key", key.len() + 1, MAX_KEY)?;
    Ok(format!("/{key}").into_bytes())
}

fn value(value: &[u8]) -> io::Result<&[u8]> {
    wire::check_length("value", value.len(), MAX_VALUE)?;
    Ok(value)
}

fn key_request(opcode: u8, k: &str) -> io::Result<Vec<u8>> {
    Ok(wire::request(opcode, &[&key(k)?]))
}

fn key_value_request(opcode: u8, k: &str, v: &[u8]) -> io::Result<Vec<u8>> {
    Ok(wire::request(opcode, &[&key(k)?, value(v)?]))
}

fn list_request(opcode: u8, keys: &[&str]) -> io::Result<Vec<u8>> {
    wire::check_length("list of keys", keys.len(), MAX_KEYS)?;
    Ok(wire::list_request(opcode, &keys.iter().map(|k| key(k)).collect::<io::Result<Vec<_>>>()?))
}

impl Store for TcpStore {
    fn set(&self, k: &str, v: &[u8]) -> Result<()> {
        self.tell("set", key_value_request(wire::SET, k, v))
    }

    fn get(&self, k: &str, timeout: Duration) -> Result<Vec<u8>> {
        self.wait(&[k], timeout)?;
        self.call("get", key_request(wire::GET, k), |c| c.string(MAX_VALUE))
    }

    fn add(&self, k: &str, delta: i64) -> Result<i64> {
        let request = key_request(wire::ADD, k).map(|mut request| {
            request.extend_from_slice(&delta.to_le_bytes());
            request
        });
        self.call("add", request, |c| c.i64())
    }

    fn compare_set(&self, k: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        let request = || Ok(wire::request(wire::COMPARE_SET, &[&key(k)?, value(expected)?, value(desired)?]));
        self.call("compare_set", request(), |c| c.string(MAX_VALUE))
    }

    fn append(&self, k: &str, v: &[u8]) -> Result<()> {
        self.tell("append", key_value_request(wire::APPEND, k, v))
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        if self.wait_for("wait", list_request(wire::WAIT, keys), timeout)? {
            return Ok(());
        }
        self.timed_out(keys, timeout)
    }

    fn check(&self, keys: &[&str]) -> Result<bool> {
        self.call("check", list_request(wire::CHECK, keys), |c| c.byte()).map(|byte| byte == 0)
    }

    fn delete(&self, k: &str) -> Result<bool> {
        self.call("delete", key_request(wire::DELETE, k), |c| c.i64()).map(|n| n == 1)
    }

    fn num_keys(&self) -> Result<usize> {
        self.call("num_keys", Ok(vec![wire::NUM_KEYS]), |c| c.count())
    }

    fn list_keys(&self) -> Result<Vec<String>> {
        let keys = self.call("list_keys", Ok(vec![wire::LIST_KEYS]), |c| {
            let n = c.count()?;
            c.strings(n, MAX_KEY)
        })?;
        // Keys without the `/` are no user's: torch's clients count themselves in one.
        let own = keys.iter().filter_map(|key| Some(String::from_utf8_lossy(key.strip_prefix(b"/")?).into()));
        let mut own: Vec<String> = own.collect();
        own.sort_unstable();
        Ok(own)
    }

    fn multi_get(&self, keys: &[&str], timeout: Duration) -> Result<Vec<Vec<u8>>> {
        self.wait(keys, timeout)?;
        self.call("multi_get", list_request(wire::MULTI_GET, keys), |c| c.strings(keys.len(), MAX_VALUE))
    }

    fn multi_set(&self, pairs: &[(&str, &[u8])]) -> Result<()> {
        let request = || {
            wire::check_length("list of keys", pairs.len(), MAX_KEYS)?;
            let mut request = vec![wire::MULTI_SET];
            request.extend_from_slice(&(pairs.len() as u64).to_le_bytes());
            for (k, v) in pairs {
                wire::put_string(&mut request, &key(k)?);
                wire::put_string(&mut request, value(v)?);
            }
            Ok(request)
        };
        self.tell("multi_set", request())
    }

    fn queue_push(&self, queue: &str, v: &[u8]) -> Result<()> {
        self.tell("queue_push", key_value_request(wire::QUEUE_PUSH, queue, v))
    }

    fn queue_pop(&self, queue: &str, timeout: Duration) -> Result<Vec<u8>> {
        let begin = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            let popped = self.call("queue_pop", key_request(wire::QUEUE_POP, queue), |c| {
                if c.count()? == 0 { Ok(None) } else { c.string(MAX_VALUE).map(Some) }
            })?;
            if let Some(value) = popped {
                return Ok(value);
            }
            let rest = timeout.saturating_sub(begin.elapsed());
            if rest.is_zero() || !self.wait_for("wait", list_request(wire::WAIT, &[queue]), rest)? {
                return self.timed_out(&[queue], timeout);
            }
            // Another may take the value first, again and again; and a key of this name ends the wait, too.
            thread::sleep(pause.min(timeout.saturating_sub(begin.elapsed())));
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn queue_len(&self, queue: &str) -> Result<usize> {
        self.call("queue_len", key_request(wire::QUEUE_LEN, queue), |c| c.count())
    }

    fn barrier(&self, name: &str, world_size: usize, timeout: Duration) -> Result<()> {
        let request = key_request(wire::BARRIER, name).map(|mut request| {
            request.extend_from_slice(&(world_size as u64).to_le_bytes());
            request
        });
        if self.wait_for("barrier", request, timeout)? {
            return Ok(());
        }
        self.timed_out(&[name], timeout)
    }
}
