//! The store's client: one connection, one request at a time

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Store, wire};
use crate::error::{Error, Result};

/// How long the server may take for a request that does not wait.
const REPLY: Duration = Duration::from_secs(30);

/// A [`Store`] behind a [`StoreServer`](super::StoreServer) or torch's TCPStore.
///
/// Keys get the `/` in front that torch's clients put there, so both see the same keys.
#[derive(Debug)]
pub struct TcpStore {
    address: String,
    stream: Mutex<TcpStream>,
    local: SocketAddr,
}

impl TcpStore {
    /// Connects to `host:port`, trying again until `timeout`: the server may not have started yet.
    ///
    /// # Errors
    /// [`Error::Store`] with the last failure.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let begin = Instant::now();
        let address = format!("{host}:{port}");
        let mut pause = Duration::from_millis(5);
        loop {
            let rest = timeout.saturating_sub(begin.elapsed());
            let failure = match Self::try_connect(host, port, rest.clamp(Duration::from_millis(100), REPLY)) {
                Ok((stream, local)) => return Ok(TcpStore { address, stream: Mutex::new(stream), local }),
                Err(failure) => failure,
            };
            if rest <= pause {
                return Err(Error::Store { store: address, doing: "connect", source: Arc::new(failure) });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    fn try_connect(host: &str, port: u16, timeout: Duration) -> io::Result<(TcpStream, SocketAddr)> {
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host, port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, timeout).and_then(|s| Self::greet(s, timeout)) {
                Ok(connected) => return Ok(connected),
                Err(e) => failure = e,
            }
        }
        Err(failure)
    }

    /// Says that this is the protocol, and has the server answer a ping.
    fn greet(mut stream: TcpStream, timeout: Duration) -> io::Result<(TcpStream, SocketAddr)> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(REPLY))?;
        let nonce = std::process::id().to_le_bytes();
        let mut hello = vec![wire::VALIDATE];
        hello.extend_from_slice(&wire::MAGIC.to_le_bytes());
        hello.push(wire::PING);
        hello.extend_from_slice(&nonce);
        stream.write_all(&hello)?;
        let mut echo = [0; 4];
        stream.read_exact(&mut echo)?;
        if echo != nonce {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the ping came back changed"));
        }
        let local = stream.local_addr()?;
        Ok((stream, local))
    }

    /// The address of this end: the interface that leads to the store.
    pub fn local_address(&self) -> SocketAddr {
        self.local
    }

    /// Sends a request and reads its reply while nobody else uses the connection.
    fn call<R>(
        &self,
        doing: &'static str,
        request: &[u8],
        reply: impl FnOnce(&mut TcpStream) -> io::Result<R>,
    ) -> Result<R> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let result = stream
            .set_read_timeout(Some(REPLY))
            .and_then(|()| stream.write_all(request))
            .and_then(|()| reply(&mut stream));
        result.map_err(|source| {
            // The reply may still come and would be taken for that of the next request.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            Error::Store { store: self.address.clone(), doing, source: Arc::new(source) }
        })
    }
}

fn key(key: &str) -> Vec<u8> {
    format!("/{key}").into_bytes()
}

fn keys(all: &[&str]) -> Vec<Vec<u8>> {
    all.iter().map(|k| key(k)).collect()
}

fn read_byte(stream: &mut TcpStream) -> io::Result<u8> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn read_i64(stream: &mut TcpStream) -> io::Result<i64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(i64::from_le_bytes(bytes))
}

fn read_string(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let n = read_i64(stream)? as u64;
    if !wire::is_value_length(n) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a value of {n} bytes")));
    }
    let mut bytes = vec![0; n as usize];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Store for TcpStore {
    fn set(&self, k: &str, value: &[u8]) -> Result<()> {
        self.call("set", &wire::request(wire::SET, &[&key(k), value]), |_| Ok(()))
    }

    fn get(&self, k: &str, timeout: Duration) -> Result<Vec<u8>> {
        self.wait(&[k], timeout)?;
        self.call("get", &wire::request(wire::GET, &[&key(k)]), read_string)
    }

    fn add(&self, k: &str, delta: i64) -> Result<i64> {
        let mut request = wire::request(wire::ADD, &[&key(k)]);
        request.extend_from_slice(&delta.to_le_bytes());
        self.call("add", &request, read_i64)
    }

    fn compare_set(&self, k: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        let request = wire::request(wire::COMPARE_SET, &[&key(k), expected, desired]);
        self.call("compare_set", &request, read_string)
    }

    fn append(&self, k: &str, value: &[u8]) -> Result<()> {
        self.call("append", &wire::request(wire::APPEND, &[&key(k), value]), |_| Ok(()))
    }

    fn wait(&self, all: &[&str], timeout: Duration) -> Result<()> {
        let done = self.call("wait", &wire::list_request(wire::WAIT, &keys(all)), |stream| {
            // A zero timeout would mean none to the socket.
            stream.set_read_timeout(Some(timeout.max(Duration::from_millis(1))))?;
            match read_byte(stream) {
                Ok(_) => return Ok(true),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e),
            }
            // The answer to the wait may still come before the answer to its end.
            stream.set_read_timeout(Some(REPLY))?;
            stream.write_all(&[wire::CANCEL_WAIT])?;
            let first = read_byte(stream)?;
            if first == 0 {
                read_byte(stream)?;
            }
            Ok(first == 0)
        })?;
        if done {
            return Ok(());
        }
        let keys = all.iter().map(ToString::to_string).collect();
        Err(Error::StoreTimeout { store: self.address.clone(), keys, waited: timeout })
    }

    fn check(&self, all: &[&str]) -> Result<bool> {
        self.call("check", &wire::list_request(wire::CHECK, &keys(all)), read_byte).map(|byte| byte == 0)
    }

    fn delete(&self, k: &str) -> Result<bool> {
        self.call("delete", &wire::request(wire::DELETE, &[&key(k)]), read_i64).map(|n| n == 1)
    }
}
