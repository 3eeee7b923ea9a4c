//! Blocking HTTP calls to one server: JSON in and out, each with its deadline, none with its key in a message.

use std::fmt;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::http::Uri;
use ureq::{Agent, SendBody};

use super::error::{Call, ServerError, shortened};
#[cfg(feature = "vllm")]
use super::scan::{self, Malformed, Scan};

/// A server's key, sent as a bearer token. It does not show in `Debug` output, logs or errors.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(Arc<str>);

impl ApiKey {
    /// A key as the server was given it.
    pub fn new(key: impl Into<String>) -> Self {
        Self(key.into().into())
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }

    /// The key as servers repeat it: as it stands in JSON, as Python prints it, and as it is.
    pub(crate) fn forms(&self) -> Vec<String> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let escaped = self.0.replace('\\', "\\\\");
        let mut forms = vec![escaped.replace('"', "\\\""), escaped.replace('\'', "\\'"), escaped];
        forms.push(self.0.to_string());
        forms.dedup();
        forms
    }

    /// `text` without the key, should a server have repeated it. Before a text is cut: of a key across the cut a part would
    /// be left.
    pub(crate) fn redact(&self, text: String) -> String {
        self.forms().iter().fold(text, |text, form| text.replace(form, "***"))
    }
}

/// An address without what could be a secret: a user's name and password before the host, a query or a fragment behind it.
pub(crate) fn without_secrets(address: &str) -> String {
    let host = address.rsplit('@').next().unwrap_or_default();
    host.split(['?', '#']).next().unwrap_or_default().to_owned()
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(***)")
    }
}

/// The longest reply that is read, in bytes, unless a caller says otherwise: 64 samples of 32k tokens with
/// log-probabilities are about 250 MB of JSON.
const REPLY_LIMIT: u64 = 1 << 30;

/// What an error looks at of a reply.
const MOST_OF_A_REPLY: usize = 1 << 20;

/// As many requests as anybody sends at once.
#[cfg(feature = "vllm")]
const MOST_IDLE: usize = 1024;

/// Servers close a connection that idled for 5 s; one that has idled this long is not used again.
const IDLE: Duration = Duration::from_secs(2);

/// A server that is called over HTTP.
pub(crate) struct Http {
    engine: &'static str,
    /// Scheme, host and port, without a slash at its end.
    base: String,
    key: Option<ApiKey>,
    reply_limit: u64,
    /// Connections that are kept for later calls.
    idle: usize,
    connections: Mutex<Connections>,
}

/// Replaced as a whole when the calls that use them are interrupted.
#[derive(Clone)]
struct Connections {
    agent: Agent,
    interrupted: Arc<AtomicBool>,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Http({} at {})", self.engine, self.base)
    }
}

/// A whole reply of status 200 to 299.
#[derive(Debug)]
pub(crate) struct Reply {
    call: Call,
    pub(crate) bytes: Vec<u8>,
    /// Taken out of what an error repeats of it.
    key: Option<ApiKey>,
}

impl Reply {
    /// These bytes, as if a server had sent them.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        Self { call: Call { engine: "test", method: "POST", path: "/test".to_owned() }, bytes, key: None }
    }

    /// The reply as JSON of a known shape.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, ServerError> {
        serde_json::from_slice(&self.bytes)
            .map_err(|error| self.unexpected(&format!("not the expected JSON: {error}")))
    }

    /// The reply as JSON, by a reader of its shape.
    #[cfg(feature = "vllm")]
    pub(crate) fn scan<T>(
        &self,
        read: impl FnOnce(&mut Scan<'_>) -> scan::Read<T>,
    ) -> Result<T, ServerError> {
        Scan::whole(&self.bytes, read).map_err(|Malformed { at, expected }| {
            self.unexpected(&format!("not the expected JSON: at byte {at} {expected} was expected"))
        })
    }

    /// The error that says what is wrong with this reply. Texts of the server may stand in `what`, whole.
    pub(crate) fn unexpected(&self, what: &str) -> ServerError {
        let clean = |text: String| match &self.key {
            Some(key) => key.redact(text),
            None => text,
        };
        let begin = &self.bytes[..self.bytes.len().min(MOST_OF_A_REPLY)];
        let begin = clean(String::from_utf8_lossy(begin).into_owned());
        let begin = shortened(&begin[..begin.floor_char_boundary(200)]);
        let what = shortened(&clean(what.to_owned()));
        ServerError::Reply { call: self.call.clone(), what: format!("{what}; the reply begins `{begin}`") }
    }
}

impl Http {
    /// A client of the server at `base`, such as `http://10.0.0.7:8000`; a path in it is put before every call's.
    pub(crate) fn new(engine: &'static str, base: &str, key: Option<ApiKey>) -> Result<Self, ServerError> {
        let wrong = |reason| Err(ServerError::Address { address: without_secrets(base), reason });
        let base = base.trim_end_matches('/');
        let Ok(uri) = base.parse::<Uri>() else { return wrong("expected something like http://host:8000") };
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
            return wrong("expected http:// or https:// and a host");
        }
        if uri.authority().is_some_and(|a| a.as_str().contains('@')) {
            return wrong("a user's name does not belong there; give the key as an ApiKey");
        }
        if uri.query().is_some() {
            return wrong("a query does not belong there");
        }
        if key.as_ref().is_some_and(|k| k.expose().chars().any(|c| !c.is_ascii_graphic())) {
            return wrong("the key for it may consist of visible ASCII characters only");
        }
        let connections = Mutex::new(Connections::to(&uri, 0));
        Ok(Self { engine, base: base.to_owned(), key, reply_limit: REPLY_LIMIT, idle: 0, connections })
    }

    /// The same client, which takes no reply of more than `bytes`.
    #[cfg(test)]
    pub(crate) fn with_reply_limit(mut self, bytes: u64) -> Self {
        self.reply_limit = bytes;
        self
    }

    /// The same client, which uses a connection again for a later call: for many calls that seldom fail.
    ///
    /// Python's servers close a connection after an error of status 500, and do not say so in that reply. A call that
    /// comes at once on the same connection then fails for no reason of its own.
    #[cfg(feature = "vllm")]
    pub(crate) fn reusing_connections(mut self) -> Self {
        self.idle = MOST_IDLE;
        *self.connections() = self.fresh();
        self
    }

    fn fresh(&self) -> Connections {
        Connections::to(&self.base.parse().unwrap_or_default(), self.idle)
    }

    /// Scheme, host and port.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// `GET path`, whole within `within`.
    pub(crate) fn get(&self, path: &str, within: Duration) -> Result<Reply, ServerError> {
        self.call(&self.batch().connections, "GET", path, None, within)
    }

    /// `POST path` with JSON that lies in pieces, which are not put together first: for bodies of the size of weights.
    #[cfg(feature = "sglang")]
    pub(crate) fn post_pieces(
        &self,
        path: &str,
        pieces: &[&[u8]],
        within: Duration,
    ) -> Result<Reply, ServerError> {
        self.call(&self.batch().connections, "POST", path, Some(pieces), within)
    }

    /// `POST path` with `body` as JSON, whole within `within`.
    pub(crate) fn post(
        &self,
        path: &str,
        body: &impl Serialize,
        within: Duration,
    ) -> Result<Reply, ServerError> {
        self.batch().post(path, body, within)
    }

    /// Calls that can be ended together.
    pub(crate) fn batch(&self) -> Batch<'_> {
        Batch { http: self, connections: self.connections().clone() }
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(
        &self,
        Connections { agent, interrupted }: &Connections,
        method: &'static str,
        path: &str,
        body: Option<&[&[u8]]>,
        within: Duration,
    ) -> Result<Reply, ServerError> {
        let call = Call { engine: self.engine, method, path: path.to_owned() };
        if within.is_zero() {
            return Err(ServerError::Timeout { call, within });
        }
        let url = format!("{}{path}", self.base);
        let bearer = self.key.as_ref().map(|key| format!("Bearer {}", key.expose()));
        let sent = match body {
            None => {
                let mut request = agent.get(&url).config().timeout_global(Some(within)).build();
                if let Some(bearer) = &bearer {
                    request = request.header("Authorization", bearer);
                }
                request.call()
            }
            Some(body) => {
                let mut request = agent.post(&url).config().timeout_global(Some(within)).build();
                if let Some(bearer) = &bearer {
                    request = request.header("Authorization", bearer);
                }
                let request = request.header("Content-Type", "application/json");
                match body {
                    [whole] => request.send(*whole),
                    pieces => {
                        // Else it would be sent in chunks, which not every server takes.
                        let length = pieces.iter().map(|piece| piece.len()).sum::<usize>();
                        let mut pieces = Pieces(pieces, 0);
                        let request = request.header("Content-Length", length.to_string());
                        request.send(SendBody::from_reader(&mut pieces))
                    }
                }
            }
        };
        let failed = |error: ureq::Error| match error {
            ureq::Error::Timeout(_) => ServerError::Timeout { call: call.clone(), within },
            _ if interrupted.load(Ordering::SeqCst) => ServerError::Interrupted { call: call.clone() },
            error => ServerError::Connection { call: call.clone(), source: error.into_io() },
        };
        let mut response = sent.map_err(failed)?;
        let status = response.status().as_u16();
        let mut bytes = Vec::new();
        let limit = self.reply_limit.saturating_add(1);
        let announced = response.body().content_length().unwrap_or(0);
        if announced > self.reply_limit {
            return Err(ServerError::ReplyTooLong { call, limit: self.reply_limit });
        }
        // What was announced is set aside at once, as far as a liar could make us regret it.
        bytes.reserve(announced.min(1 << 24) as usize);
        let read = response.body_mut().as_reader().take(limit).read_to_end(&mut bytes);
        read.map_err(|error| failed(error.into()))?;
        if bytes.len() as u64 > self.reply_limit {
            return Err(ServerError::ReplyTooLong { call, limit: self.reply_limit });
        }
        if (200..300).contains(&status) {
            return Ok(Reply { call, bytes, key: self.key.clone() });
        }
        let message = message_in(&bytes, self.key.as_ref());
        Err(ServerError::Status { call, status, message })
    }
}

/// Calls that can be ended together, from any thread.
pub(crate) struct Batch<'a> {
    http: &'a Http,
    connections: Connections,
}

impl Batch<'_> {
    /// As [`Http::post`].
    pub(crate) fn post(
        &self,
        path: &str,
        body: &impl Serialize,
        within: Duration,
    ) -> Result<Reply, ServerError> {
        let body = serde_json::to_vec(body).map_err(|error| ServerError::Connection {
            call: Call { engine: self.http.engine, method: "POST", path: path.to_owned() },
            source: error.into(),
        })?;
        self.http.call(&self.connections, "POST", path, Some(&[&body]), within)
    }

    /// Ends the batch's calls that are under way, and those that come after, with [`ServerError::Interrupted`]. Calls
    /// outside of it that began earlier may be ended with them, later ones are not concerned. A server gives up what
    /// nobody waits for any more.
    pub(crate) fn interrupt(&self) {
        self.connections.interrupted.store(true, Ordering::SeqCst);
        let mut connections = self.http.connections();
        if Arc::ptr_eq(&connections.interrupted, &self.connections.interrupted) {
            *connections = self.http.fresh();
        }
        drop(connections);
        self.connections.agent.clone().shutdown();
    }
}

/// Bytes that follow each other, and how far the first of them is read.
struct Pieces<'a>(&'a [&'a [u8]], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while let Some((piece, rest)) = self.0.split_first() {
            let left = piece.get(self.1..).unwrap_or_default();
            let taken = left.len().min(into.len());
            into[..taken].copy_from_slice(&left[..taken]);
            self.1 += taken;
            if taken > 0 || into.is_empty() {
                return Ok(taken);
            }
            (self.0, self.1) = (rest, 0);
        }
        Ok(0)
    }
}

impl Connections {
    fn to(server: &Uri, idle: usize) -> Self {
        Self { agent: agent(is_loopback(server), idle), interrupted: Arc::default() }
    }
}

fn agent(loopback: bool, idle: usize) -> Agent {
    let mut settings = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .max_idle_connections(idle)
        .max_idle_connections_per_host(idle)
        .max_idle_age(IDLE)
        .input_buffer_size(64 << 10)
        .user_agent(concat!("lightrft-engine/", env!("CARGO_PKG_VERSION")));
    if loopback {
        // Whatever proxy the environment names, it does not stand between us and this machine.
        settings = settings.proxy(None);
    }
    settings.build().new_agent()
}

fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default();
    host == "localhost" || host == "[::1]" || host.starts_with("127.")
}

/// The server's words in the reply of an error, from the shapes that vLLM, SGLang and FastAPI give it, without the key.
pub(super) fn message_in(bytes: &[u8], key: Option<&ApiKey>) -> String {
    let clean = |text: String| {
        shortened(&match key {
            Some(key) => key.redact(text),
            None => text,
        })
    };
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(bytes) else {
        let text = clean(String::from_utf8_lossy(bytes).into_owned());
        return if text.is_empty() { "no message".to_owned() } else { text };
    };
    let words = ["/error/message", "/message", "/error", "/detail"];
    let found = words.iter().find_map(|place| value.pointer(place)).unwrap_or(&value);
    clean(found.as_str().map_or_else(|| found.to_string(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Serves one connection after another: reads a request, then does what `answer` does with the stream. Gives the
    /// server's address and the requests' bytes.
    fn serve(answer: impl Fn(&mut TcpStream) + Send + 'static) -> (String, mpsc::Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (requests, received) = mpsc::channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut head, mut length) = (String::new(), 0);
                while reader.read_line(&mut head).is_ok_and(|n| n > 2) {
                    let line = head.lines().last().unwrap_or_default().to_lowercase();
                    length = line.strip_prefix("content-length: ").map_or(length, |n| n.parse().unwrap());
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                if requests.send(head + &String::from_utf8(body).unwrap()).is_err() {
                    return;
                }
                answer(&mut stream);
            }
        });
        (address, received)
    }

    fn replying(bytes: &'static str) -> Http {
        let (address, received) = serve(move |stream| stream.write_all(bytes.as_bytes()).unwrap());
        std::mem::forget(received);
        Http::new("test", &address, Some(ApiKey::new("sesame"))).unwrap()
    }

    #[test]
    fn a_request_carries_its_body_and_its_key_and_nothing_shows_the_key() {
        let ok = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\n{\"a\": 1}";
        let (address, received) = serve(move |stream| stream.write_all(ok.as_bytes()).unwrap());
        let http = Http::new("test", &format!("{address}/base/"), Some(ApiKey::new("sesame"))).unwrap();
        let reply = http.post("/x?level=1", &serde_json::json!({"b": [1, 2]}), LONG).unwrap();
        assert_eq!(reply.json::<serde_json::Value>().unwrap(), serde_json::json!({"a": 1}));
        let request = received.recv().unwrap();
        assert!(request.starts_with("POST /base/x?level=1 HTTP/1.1\r\n"), "{request}");
        assert!(request.to_lowercase().contains("authorization: bearer sesame\r\n"), "{request}");
        assert!(request.ends_with("\r\n\r\n{\"b\":[1,2]}"), "{request}");
        assert!(!format!("{http:?} {:?}", ApiKey::new("sesame")).contains("sesame"));
        http.get("/y", LONG).unwrap();
        assert!(received.recv().unwrap().starts_with("GET /base/y HTTP/1.1\r\n"));
    }

    #[cfg(feature = "sglang")]
    #[test]
    fn a_body_in_pieces_arrives_as_one() {
        let ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        let (address, received) = serve(move |stream| stream.write_all(ok.as_bytes()).unwrap());
        let http = Http::new("test", &address, None).unwrap();
        let long = "x".repeat(300_000);
        let pieces = ["[\"", "", &long, "\",\"", &long, "\"]"];
        http.post_pieces("/x", &pieces.map(str::as_bytes), LONG).unwrap();
        let request = received.recv().unwrap();
        let (head, body) = request.split_once("\r\n\r\n").unwrap();
        assert!(head.to_lowercase().contains("content-length: 600007"), "{head}");
        assert!(!head.to_lowercase().contains("chunked"), "{head}");
        assert!(body == pieces.concat(), "{} bytes", body.len());
    }

    #[test]
    fn a_refusal_gives_the_servers_words_without_the_key() {
        let body = |text: &str| {
            format!("HTTP/1.1 401 No\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len())
        };
        for (text, words) in [
            (r#"{"error":{"message":"no sesame, no entry","code":401}}"#, "no ***, no entry"),
            (r#"{"object":"error","message":"malformed"}"#, "malformed"),
            (r#"{"error":"unknown field"}"#, "unknown field"),
            (r#"{"detail":"Not Found"}"#, "Not Found"),
            (r#"{"detail":[{"msg":"x"}]}"#, r#"[{"msg":"x"}]"#),
            ("<html>proxy</html>", "<html>proxy</html>"),
            ("", "no message"),
        ] {
            let http = replying(Box::leak(body(text).into_boxed_str()));
            let error = http.get("/x", LONG).unwrap_err();
            assert_eq!(error.to_string(), format!("test GET /x: status 401: {words}"));
        }
    }

    #[test]
    fn no_part_of_the_key_is_left_where_a_servers_text_is_cut() {
        // The whole of the key, all of its halves, and the key as JSON has it.
        let key = ApiKey::new("open\"sesame");
        let leaks = |text: &str| ["open", "sesame"].iter().any(|half| text.contains(half));
        for filler in (560..620).chain(170..210) {
            let long = format!("{}open\"sesame{}", "x".repeat(filler), "y".repeat(2000));
            let bytes = serde_json::json!({ "error": &long }).to_string().into_bytes();
            let message = message_in(&bytes, Some(&key));
            assert!(!leaks(&message), "{filler}: {message}");
            let message = message_in(long.as_bytes(), Some(&key));
            assert!(!leaks(&message), "{filler}: {message}");
            let reply = Reply { key: Some(key.clone()), ..Reply::of(bytes) };
            let error = reply.json::<Vec<u32>>().unwrap_err().to_string();
            assert!(!leaks(&error), "{filler}: {error}");
            let error = reply.unexpected(&long).to_string();
            assert!(!leaks(&error), "{filler}: {error}");
        }
        // What serde says repeats what it found.
        let reply = Reply { key: Some(key.clone()), ..Reply::of(br#"["open\"sesame"]"#.to_vec()) };
        let error = reply.json::<Vec<u32>>().unwrap_err().to_string();
        assert!(error.contains("invalid type") && !leaks(&error), "{error}");
    }

    #[test]
    fn what_is_no_whole_json_reply_is_an_error_that_names_the_call() {
        let half = replying("HTTP/1.1 200 OK\r\nContent-Length: 20\r\nConnection: close\r\n\r\n{\"a\":");
        let error = half.get("/x", LONG).unwrap_err();
        assert!(matches!(&error, ServerError::Connection { .. }), "{error:?}");
        assert!(error.to_string().starts_with("test GET /x: "), "{error}");
        let chunk = replying("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"a\"");
        assert!(matches!(chunk.get("/x", LONG), Err(ServerError::Connection { .. })));
        assert!(matches!(replying("").get("/x", LONG), Err(ServerError::Connection { .. })));
        assert!(matches!(replying("SSH-2.0\r\n\r\n").get("/x", LONG), Err(ServerError::Connection { .. })));
        let text = replying("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        let error = text.get("/x", LONG).unwrap().json::<Vec<u32>>().unwrap_err();
        assert!(
            matches!(&error, ServerError::Reply { .. }) && error.to_string().contains("`hello`"),
            "{error}"
        );
        let moved = replying("HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n");
        assert!(matches!(moved.get("/x", LONG), Err(ServerError::Status { status: 302, .. })));
    }

    #[test]
    fn a_reply_longer_than_the_limit_is_not_read() {
        let reply = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n123456789";
        assert_eq!(replying(reply).with_reply_limit(9).get("/x", LONG).unwrap().bytes, b"123456789");
        let error = replying(reply).with_reply_limit(8).get("/x", LONG).unwrap_err();
        assert!(matches!(error, ServerError::ReplyTooLong { limit: 8, .. }), "{error:?}");
        let open = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n123456789";
        let error = replying(open).with_reply_limit(8).get("/x", LONG).unwrap_err();
        assert!(matches!(error, ServerError::ReplyTooLong { limit: 8, .. }), "{error:?}");
    }

    #[test]
    fn a_silent_server_costs_the_deadline_and_no_more() {
        let (hold, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let (address, _received) = serve(move |stream| {
            // A drop every now and then is no reply either.
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1");
            let _ = held.lock().unwrap().recv();
        });
        let http = Http::new("test", &address, None).unwrap();
        let within = Duration::from_millis(100);
        let error = http.get("/x", within).unwrap_err();
        assert!(matches!(error, ServerError::Timeout { within: w, .. } if w == within), "{error:?}");
        assert!(error.to_string().contains("`control_within`"), "{error}");
        assert!(matches!(http.get("/x", Duration::ZERO), Err(ServerError::Timeout { .. })));
        drop(hold);
    }

    #[test]
    fn an_interrupted_call_ends_at_once_and_the_next_goes_through() {
        let (hold, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let (address, received) = serve(move |stream| {
            if held.lock().unwrap().recv().is_err() {
                let _ =
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        });
        let http = Http::new("test", &address, None).unwrap();
        let batch = http.batch();
        let body = serde_json::json!({});
        let interrupted = |error: &ServerError| matches!(error, ServerError::Interrupted { .. });
        thread::scope(|scope| {
            let call = scope.spawn(|| batch.post("/x", &body, LONG));
            received.recv().unwrap();
            batch.interrupt();
            let error = call.join().unwrap().unwrap_err();
            assert!(interrupted(&error), "{error:?}");
        });
        // One of the same batch that had not begun then, in another thread, must not begin now.
        let late = batch.post("/x", &body, LONG).unwrap_err();
        assert!(interrupted(&late), "{late:?}");
        drop(hold);
        http.get("/x", LONG).unwrap();
    }

    #[test]
    fn an_address_that_is_none_is_refused_and_no_password_repeated() {
        for address in
            ["", "10.0.0.1:8000", "ftp://a", "http://", "http://a b", "http://me:pw@host", "http://a/?b"]
        {
            let error = Http::new("test", address, None).unwrap_err();
            assert!(matches!(error, ServerError::Address { .. }), "{address}: {error:?}");
            assert!(!error.to_string().contains("pw"), "{error}");
        }
        assert!(Http::new("test", "http://a", Some(ApiKey::new("a\nb"))).is_err());
        assert!(Http::new("test", "https://[::1]:80/v", None).is_ok());
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = Http::new("test", &format!("http://{gone}"), None).unwrap().get("/x", LONG).unwrap_err();
        assert!(matches!(error, ServerError::Connection { .. }), "{error:?}");
    }
}
