//! One client of a store: what it has said, what it is to be told, what it waits for; no socket in it

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::strict::{Doorkeeper, Verdict};
use super::table::Table;
use super::wire::{HELLO_BYTES, MAGIC, MAX_REPLY, Request, Stop, parse, put_string};
use crate::auth::Token;

/// The longest request. Torch's limits on one key or value allow a request that no memory holds.
const MAX_REQUEST: usize = 256 << 20;

/// Bytes of replies from which on a client that does not read them gets no more answers, until it does.
const MAX_UNREAD: usize = 16 << 20;

/// A client that has not said hello, or proved the token, within this time is cut off.
pub(super) const HELLO_TIME: Duration = Duration::from_secs(5);

/// What a client that got no reply yet waits for.
#[derive(Debug)]
enum Waiting {
    Keys(Vec<Vec<u8>>),
    Barrier(Vec<u8>, i64),
}

/// A client that has not said hello.
#[derive(Debug)]
struct Stranger {
    since: Instant,
    doorkeeper: Doorkeeper,
}

#[derive(Debug)]
pub(super) struct Session {
    /// What has come and was not answered.
    pub(super) input: Vec<u8>,
    /// What is to be sent.
    pub(super) output: Vec<u8>,
    /// Whole requests may be left in `input`, because the replies to those before were not read.
    pub(super) held_back: bool,
    /// Not to be closed yet.
    pub(super) open: bool,
    /// Until it has said hello, and proved the token where one is asked for.
    stranger: Option<Stranger>,
    waiting: Option<Waiting>,
}

/// Answers all whole requests of all clients, then the waits that they fulfilled.
pub(super) fn serve<'a>(
    sessions: impl Iterator<Item = &'a mut Session>,
    table: &mut Table,
    token: Option<&Token>,
) {
    let mut sessions: Vec<_> = sessions.collect();
    for session in &mut sessions {
        session.answer_all(table, token);
    }
    let mut arrived: HashMap<Vec<u8>, i64> = HashMap::new();
    for session in &sessions {
        if let Some(Waiting::Barrier(key, _)) = &session.waiting {
            *arrived.entry(key.clone()).or_default() += 1;
        }
    }
    for session in sessions {
        let fulfilled = match &session.waiting {
            None => false,
            Some(Waiting::Keys(keys)) => table.has_all(keys),
            Some(Waiting::Barrier(key, world)) => arrived.get(key).is_some_and(|n| n >= world),
        };
        if fulfilled {
            session.waiting = None;
            session.output.push(0);
        }
    }
}

impl Session {
    pub(super) fn new() -> Self {
        Session {
            input: Vec::new(),
            output: Vec::new(),
            held_back: false,
            open: true,
            stranger: Some(Stranger { since: Instant::now(), doorkeeper: Doorkeeper::default() }),
            waiting: None,
        }
    }

    /// How much time it has left to say hello; `None` if it has.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.stranger.as_ref().map(|stranger| HELLO_TIME.saturating_sub(stranger.since.elapsed()))
    }

    fn answer_all(&mut self, table: &mut Table, token: Option<&Token>) {
        let mut input = std::mem::take(&mut self.input);
        let mut rest = &input[..];
        self.held_back = false;
        rest = &rest[self.introduce(rest, token)..];
        while self.open && self.stranger.is_none() {
            self.held_back = self.output.len() >= MAX_UNREAD;
            if self.held_back {
                break;
            }
            match parse(rest) {
                Ok((request, n)) => {
                    self.answer(request, table);
                    rest = &rest[n..];
                }
                Err(Stop::Incomplete) => {
                    self.open &= rest.len() <= MAX_REQUEST;
                    break;
                }
                Err(Stop::Malformed) => self.open = false,
            }
        }
        let done = input.len() - rest.len();
        drop(input.drain(..done));
        self.input = input;
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
            // What is there needs no waiting, even if the client's next word is that it gives up.
            Request::Wait(keys) if table.has_all(&keys) => out.push(0),
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
    use super::super::wire::{GET, MULTI_GET, SET, VALIDATE, list_request, request};
    use super::*;

    /// A client that has said hello and set `key` to a megabyte.
    fn one_client() -> (Session, Table) {
        let (mut session, mut table) = (Session::new(), Table::default());
        session.input.push(VALIDATE);
        session.input.extend_from_slice(&MAGIC.to_le_bytes());
        session.input.extend(request(SET, &[b"key", &[7; 1 << 20]]));
        session.answer_all(&mut table, None);
        assert!(session.open && session.input.is_empty());
        (session, table)
    }

    #[test]
    fn a_client_that_reads_no_replies_gets_no_more_of_them() {
        let (mut session, mut table) = one_client();
        session.input = request(GET, &[b"key"]).repeat(1000);
        let mut replies = 0;
        while !session.input.is_empty() {
            session.answer_all(&mut table, None);
            assert!(session.output.len() < MAX_UNREAD + (2 << 20), "{} bytes", session.output.len());
            // As if the client had read them.
            replies += session.output.len();
            session.output.clear();
        }
        assert_eq!(replies, 1000 * (8 + (1 << 20)), "every request is answered in the end");
    }

    #[test]
    fn a_request_whose_reply_no_memory_holds_ends_its_connection() {
        let (mut session, mut table) = one_client();
        session.input = list_request(MULTI_GET, &vec![b"key".to_vec(); 128 << 10]);
        session.answer_all(&mut table, None);
        assert!(!session.open);
    }

    #[test]
    fn a_value_too_long_to_be_read_again_is_not_appended() {
        let (mut session, mut table) = one_client();
        for _ in 0..7 {
            session.input = request(super::super::wire::APPEND, &[b"key", &[7; 1 << 20]]);
            session.answer_all(&mut table, None);
            assert!(session.open);
        }
        session.input = request(super::super::wire::APPEND, &[b"key", b"x"]);
        session.answer_all(&mut table, None);
        assert!(!session.open && table.value(b"key").unwrap().len() == 8 << 20);
    }

    #[test]
    fn who_has_not_said_hello_fills_no_memory() {
        for token in [None, Some(Token::new("0123456789abcdef").unwrap())] {
            let (mut session, mut table) = (Session::new(), Table::default());
            session.input = request(SET, &[b"key", &[7; 1 << 20]])[..1 << 19].to_vec();
            session.answer_all(&mut table, token.as_ref());
            assert!(!session.open);
        }
    }
}
