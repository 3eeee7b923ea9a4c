//! A small HTTP server for tests: answers by a function, remembers what it was asked, and can misbehave.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::Value;

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: String,
    /// With its query.
    pub(crate) path: String,
    pub(crate) headers: String,
    pub(crate) body: Vec<u8>,
}

impl Asked {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// One line: method, path, body.
    pub(crate) fn line(&self) -> String {
        format!("{} {} {}", self.method, self.path, String::from_utf8_lossy(&self.body)).trim_end().to_owned()
    }
}

/// What to do with a request.
#[derive(Clone, Debug)]
#[allow(dead_code)]
pub(crate) enum Answer {
    Json(u16, Value),
    Text(u16, String),
    /// These bytes, and the connection's end.
    Raw(Vec<u8>),
    /// The connection's end, without a word.
    Close,
    /// Nothing, until the server goes or the client does.
    Hang,
}

/// What a server was asked so far.
pub(crate) type Log = Arc<Mutex<Vec<Asked>>>;

/// Serves until it is dropped.
pub(crate) struct HttpServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    log: Log,
}

impl HttpServer {
    pub(crate) fn new(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap(), answer)
    }

    pub(crate) fn on(
        listener: TcpListener,
        answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let (stop, log) = (Arc::new(AtomicBool::new(false)), Log::default());
        let (answer, stopped, asked) = (Arc::new(answer), stop.clone(), log.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (answer, stopped, asked) = (answer.clone(), stopped.clone(), asked.clone());
                let Ok(stream) = stream else { return };
                thread::spawn(move || converse(stream, &*answer, &stopped, &asked));
            }
        });
        Self { address, stop, log }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the listener, which then lets go of its port.
        let _ = TcpStream::connect(self.address);
    }
}

fn converse(mut stream: TcpStream, answer: &dyn Fn(&Asked) -> Answer, stopped: &AtomicBool, log: &Log) {
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(asked) = read(&mut reader) {
        if stopped.load(Ordering::SeqCst) {
            return;
        }
        log.lock().unwrap().push(asked.clone());
        let (status, kind, body) = match answer(&asked) {
            Answer::Json(status, value) => (status, "application/json", value.to_string().into_bytes()),
            Answer::Text(status, text) => (status, "text/plain", text.into_bytes()),
            Answer::Raw(bytes) => {
                let _ = stream.write_all(&bytes);
                return;
            }
            Answer::Close => return,
            Answer::Hang => {
                stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
                let mut byte = [0];
                // Zero bytes are the client's end.
                while !stopped.load(Ordering::SeqCst) && !matches!(stream.read(&mut byte), Ok(0)) {}
                return;
            }
        };
        let head =
            format!("HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n", body.len());
        if stream.write_all(&[head.as_bytes(), &body].concat()).is_err() {
            return;
        }
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Asked> {
    let mut headers = String::new();
    while reader.read_line(&mut headers).ok()? > 2 {}
    let mut words = headers.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let length = headers.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    Some(Asked { method, path, headers, body })
}
