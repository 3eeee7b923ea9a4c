//! The first bytes on a connection: who opens it, to whom and what for, and that both know the job's token
//!
//! The connecting rank may wait for an answer, until a deadline. The accepting side is the watcher's thread, which reads
//! between two polls and never waits: it takes what has come, and cuts off who is too slow.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::wire::{MAGIC, pack, unpack};
use crate::auth::{ANSWER_BYTES, CHALLENGE_BYTES, PROOF_BYTES, Token, random};
use crate::error::{Error, Result};

/// A connection that does not say hello, and prove the token, within this time is closed.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Connections that have not said hello yet; more are closed at once.
const MAX_STRANGERS: usize = 1024;

/// How long a rank waits for an answer before it looks whether it still needs one.
const TURN: Duration = Duration::from_millis(50);

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    /// Notes between two ranks of the world; open as long as both live.
    Control,
    /// Frames of the group with this id.
    Data(u64),
}

impl Purpose {
    /// The group that fails if there is no such connection; 0, which is no group's id, while the world is joined.
    pub(super) fn group(self) -> u64 {
        if let Purpose::Data(group) = self { group } else { 0 }
    }
}

/// Whether the two sides prove a token to each other after the hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    Omitted = 0,
    Follows = 1,
}

/// The first bytes on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    /// The world's random number: a connection of another job, or of none, does not know it.
    pub(super) nonce: u64,
    pub(super) purpose: Purpose,
    /// The connecting rank of the world.
    pub(super) from: usize,
    /// The accepting rank of the world.
    pub(super) to: usize,
    pub(super) proof: Proof,
}

pub(super) const HELLO_BYTES: usize = 56;

/// Bytes of a hello and the challenge after it.
const OPENING_BYTES: usize = HELLO_BYTES + CHALLENGE_BYTES;

impl Hello {
    pub(super) fn encode(&self) -> [u8; HELLO_BYTES] {
        let (kind, group) = match self.purpose {
            Purpose::Control => (1, 0),
            Purpose::Data(group) => (2, group),
        };
        let proof = self.proof as u64;
        pack([MAGIC, self.nonce, kind, group, self.from as u64, self.to as u64, proof])
    }

    /// `None` if this is no hello of this protocol.
    pub(super) fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let [magic, nonce, kind, group, from, to, proof] = unpack(bytes);
        let purpose = match (kind, group) {
            (1, 0) => Purpose::Control,
            (2, group) => Purpose::Data(group),
            _ => return None,
        };
        let proof = match proof {
            0 => Proof::Omitted,
            1 => Proof::Follows,
            _ => return None,
        };
        let rank = |word: u64| usize::try_from(word).ok();
        (magic == MAGIC).then_some(Hello { nonce, purpose, from: rank(from)?, to: rank(to)?, proof })
    }
}

/// What lets a connection into one rank of a world, and one rank into the others.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    nonce: u64,
    rank: usize,
    world: usize,
    token: Option<Token>,
}

impl Gate {
    pub(super) fn new(nonce: u64, rank: usize, world: usize, token: Option<Token>) -> Self {
        Gate { nonce, rank, world, token }
    }

    fn proof(&self) -> Proof {
        if self.token.is_some() { Proof::Follows } else { Proof::Omitted }
    }

    /// Whether a connection that begins so is for this rank. The proof is still to be seen.
    fn expects(&self, hello: &Hello) -> bool {
        let from_another = hello.from < self.world && hello.from != self.rank;
        hello.nonce == self.nonce && hello.to == self.rank && from_another && hello.proof == self.proof()
    }

    /// Says hello on a connection that this rank has opened to rank `to`, and proves the token where there is one: one round
    /// trip, which ends at `deadline` or when `given_up` says that nobody needs it any more.
    ///
    /// # Errors
    /// `ConnectionReset` if the other side closes, `PermissionDenied` if it does not know the token.
    pub(super) fn introduce(
        &self,
        stream: &mut TcpStream,
        purpose: Purpose,
        to: usize,
        deadline: Instant,
        given_up: impl Fn() -> bool,
    ) -> io::Result<()> {
        let hello = Hello { nonce: self.nonce, purpose, from: self.rank, to, proof: self.proof() }.encode();
        let Some(token) = &self.token else { return stream.write_all(&hello) };
        let mut opening = [0; OPENING_BYTES];
        opening[..HELLO_BYTES].copy_from_slice(&hello);
        opening[HELLO_BYTES..].copy_from_slice(&random::<CHALLENGE_BYTES>()?);
        stream.write_all(&opening)?;
        let mut answer = [0; ANSWER_BYTES];
        let mut got = 0;
        while got < ANSWER_BYTES {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() || given_up() {
                return Err(ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(rest.min(TURN)))?;
            match stream.read(&mut answer[got..]) {
                Ok(0) => return Err(ErrorKind::ConnectionReset.into()),
                Ok(n) => got += n,
                Err(e) if is_passing(&e) || e.kind() == ErrorKind::TimedOut => {}
                Err(e) => return Err(e),
            }
        }
        stream.set_read_timeout(None)?;
        let unproved = || io::Error::new(ErrorKind::PermissionDenied, "it does not know the job's token");
        stream.write_all(&token.respond(&opening, &answer).ok_or_else(unproved)?)
    }

    fn seal_label(&self, rank: usize) -> [u8; 16] {
        pack([self.nonce, rank as u64])
    }

    /// What this rank publishes in the store, which anyone may write to: sealed where there is a token.
    pub(super) fn sealed(&self, card: &[u8]) -> Vec<u8> {
        match &self.token {
            None => [&[Proof::Omitted as u8], card].concat(),
            Some(token) => {
                let seal = token.seal(&self.seal_label(self.rank), card);
                [&[Proof::Follows as u8], card, &seal].concat()
            }
        }
    }

    /// What `rank` has published.
    ///
    /// # Errors
    /// [`Error::Token`] if the seal is not by one who knows the token, or if only one of the two ranks has a token.
    pub(super) fn unsealed<'a>(&self, rank: usize, sealed: &'a [u8]) -> Result<&'a [u8]> {
        let card = sealed.split_first().and_then(|(first, rest)| match &self.token {
            None => (*first == Proof::Omitted as u8).then_some(rest),
            Some(token) => {
                let (text, seal) = rest.split_last_chunk::<PROOF_BYTES>()?;
                let known = token.is_seal(&self.seal_label(rank), text, seal);
                (*first == Proof::Follows as u8 && known).then_some(text)
            }
        });
        card.ok_or_else(|| Error::Token { peer: format!("rank {rank}") })
    }
}

/// Nothing has come yet, or a signal came first.
fn is_passing(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// An accepted connection that has not said hello, or not proved the token.
#[derive(Debug)]
struct Stranger {
    stream: TcpStream,
    since: Instant,
    /// Its hello, then its challenge where a token is asked for.
    opening: [u8; OPENING_BYTES],
    /// What it was answered: its proof comes next.
    answered: Option<(Hello, [u8; ANSWER_BYTES])>,
    proof: [u8; PROOF_BYTES],
    /// Bytes of the opening, or of the proof, that have come.
    got: usize,
}

/// What became of a stranger.
enum Step {
    Waits,
    Enters(Hello),
    Goes,
}

impl Stranger {
    /// Reads what has come, and not a byte more than belongs to the hello: frames may follow.
    fn step(&mut self, gate: &Gate) -> Step {
        let opening_bytes = if gate.token.is_some() { OPENING_BYTES } else { HELLO_BYTES };
        loop {
            let wanted = match self.answered {
                None => &mut self.opening[self.got..opening_bytes],
                Some(_) => &mut self.proof[self.got..],
            };
            let whole = match self.stream.read(wanted) {
                Ok(0) => return Step::Goes,
                Ok(n) => {
                    let whole = n == wanted.len();
                    self.got += n;
                    whole
                }
                Err(e) if is_passing(&e) => return Step::Waits,
                Err(_) => return Step::Goes,
            };
            if !whole {
                continue;
            }
            match (&gate.token, &self.answered) {
                (None, _) => return self.hello(gate).map_or(Step::Goes, Step::Enters),
                (Some(token), None) => {
                    let Some(hello) = self.hello(gate) else { return Step::Goes };
                    let Ok(answer) = token.answer(&self.opening) else { return Step::Goes };
                    // The first bytes on a connection fit into its buffer.
                    if !matches!(self.stream.write(&answer), Ok(ANSWER_BYTES)) {
                        return Step::Goes;
                    }
                    (self.answered, self.got) = (Some((hello, answer)), 0);
                }
                (Some(token), Some((hello, answer))) => {
                    if token.admits(&self.opening, answer, &self.proof) {
                        return Step::Enters(*hello);
                    }
                    tracing::warn!(
                        rank = hello.from,
                        "a connection in the name of this rank did not prove the token"
                    );
                    return Step::Goes;
                }
            }
        }
    }

    fn hello(&self, gate: &Gate) -> Option<Hello> {
        let hello = Hello::decode(self.opening.first_chunk()?)?;
        gate.expects(&hello).then_some(hello)
    }
}

/// All accepted connections that have not said hello.
#[derive(Debug)]
pub(super) struct Strangers {
    gate: Gate,
    all: Vec<Stranger>,
}

impl Strangers {
    pub(super) fn new(gate: Gate) -> Self {
        Strangers { gate, all: Vec::new() }
    }

    /// Takes a connection in; it is closed at once where there are too many.
    pub(super) fn add(&mut self, stream: TcpStream) {
        if self.all.len() < MAX_STRANGERS && stream.set_nonblocking(true).is_ok() {
            self.all.push(Stranger {
                stream,
                since: Instant::now(),
                opening: [0; OPENING_BYTES],
                answered: None,
                proof: [0; PROOF_BYTES],
                got: 0,
            });
        }
    }

    /// What to poll for.
    pub(super) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.all.iter().map(|s| PollFd::from_borrowed_fd(s.stream.as_fd(), PollFlags::IN))
    }

    /// The longest that a poll may take: somebody's time may be up.
    pub(super) fn patience(&self) -> Option<Duration> {
        (!self.all.is_empty()).then_some(Duration::from_secs(1))
    }

    /// Reads what has come and gives `take` each connection that belongs to this world. Whoever says something else, or
    /// nothing for too long, is cut off; nobody else notices.
    pub(super) fn greet(&mut self, mut take: impl FnMut(Hello, TcpStream)) {
        let mut waiting = Vec::new();
        for mut stranger in std::mem::take(&mut self.all) {
            match stranger.step(&self.gate) {
                Step::Enters(hello) => take(hello, stranger.stream),
                Step::Waits if stranger.since.elapsed() < HELLO_TIME => waiting.push(stranger),
                Step::Waits | Step::Goes => {}
            }
        }
        self.all = waiting;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    use super::*;
    use proptest::prelude::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn gate(rank: usize, secret: Option<&str>) -> Gate {
        Gate::new(7, rank, 3, secret.map(|secret| Token::new(secret).unwrap()))
    }

    const SECRET: Option<&str> = Some("the token of this job");

    /// A listener's strangers with one connection, and the other end of it.
    fn knock(gate: Gate) -> (Strangers, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut strangers = Strangers::new(gate);
        strangers.add(listener.accept().unwrap().0);
        (strangers, stream)
    }

    /// Greets until the one stranger has come in or was cut off.
    fn outcome(strangers: &mut Strangers) -> Option<(Hello, TcpStream)> {
        let mut entered = None;
        let begin = Instant::now();
        while !strangers.all.is_empty() {
            assert!(begin.elapsed() < LIMIT);
            let mut fds: Vec<_> = strangers.poll_fds().collect();
            let turn = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let _ = rustix::event::poll(&mut fds, Some(&turn));
            drop(fds);
            strangers.greet(|hello, stream| entered = Some((hello, stream)));
        }
        entered
    }

    /// What becomes of a connection from a rank with one gate to a rank with another: on both sides.
    fn meet(from: &Gate, to: usize, at: Gate) -> (io::Result<()>, Option<Hello>) {
        let (mut strangers, mut stream) = knock(at);
        thread::scope(|scope| {
            let deadline = Instant::now() + LIMIT;
            let said = scope.spawn(move || {
                let said = from.introduce(&mut stream, Purpose::Data(9), to, deadline, || false);
                said.and_then(|()| stream.write_all(b"frame"))
            });
            let entered = outcome(&mut strangers);
            let hello = entered.map(|(hello, mut stream)| {
                stream.set_nonblocking(false).unwrap();
                let mut frame = [0; 5];
                stream.read_exact(&mut frame).unwrap();
                assert_eq!(&frame, b"frame", "what follows the hello is left for others");
                hello
            });
            (said.join().unwrap(), hello)
        })
    }

    #[test]
    fn ranks_with_one_token_or_none_meet() {
        for secret in [None, SECRET] {
            let (said, entered) = meet(&gate(2, secret), 0, gate(0, secret));
            said.unwrap();
            let hello = entered.unwrap();
            assert_eq!((hello.from, hello.to, hello.purpose), (2, 0, Purpose::Data(9)));
        }
    }

    #[test]
    fn a_rank_with_another_token_is_refused_and_knows_why() {
        let (said, entered) = meet(&gate(2, Some("the token of another job")), 0, gate(0, SECRET));
        assert!(entered.is_none());
        assert_eq!(said.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_token_is_asked_for_by_those_who_have_one_and_only_by_them() {
        assert!(meet(&gate(2, None), 0, gate(0, SECRET)).1.is_none());
        let (said, entered) = meet(&gate(2, SECRET), 0, gate(0, None));
        assert!(entered.is_none());
        assert_eq!(said.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_hello_for_another_rank_world_or_by_no_rank_is_refused() {
        assert!(meet(&gate(2, SECRET), 1, gate(0, SECRET)).1.is_none(), "another rank");
        assert!(meet(&gate(3, SECRET), 0, gate(0, SECRET)).1.is_none(), "no rank of this world");
        assert!(meet(&gate(0, SECRET), 0, gate(0, SECRET)).1.is_none(), "the rank itself");
        let another = Gate::new(8, 2, 3, Some(Token::new("the token of this job").unwrap()));
        assert!(meet(&another, 0, gate(0, SECRET)).1.is_none(), "another world");
    }

    #[test]
    fn a_proof_that_was_overheard_opens_no_second_connection() {
        let (mut strangers, stream) = knock(gate(0, SECRET));
        // Between the rank and the listener, everything is written down.
        let between = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = between.local_addr().unwrap();
        let overheard = thread::scope(|scope| {
            scope.spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                let deadline = Instant::now() + LIMIT;
                gate(2, SECRET).introduce(&mut stream, Purpose::Control, 0, deadline, || false).unwrap();
            });
            let relay = scope.spawn(move || {
                let (mut rank, mut listener) = (between.accept().unwrap().0, stream);
                let (mut opening, mut answer, mut proof) =
                    ([0; OPENING_BYTES], [0; ANSWER_BYTES], [0; PROOF_BYTES]);
                rank.read_exact(&mut opening).unwrap();
                listener.write_all(&opening).unwrap();
                listener.read_exact(&mut answer).unwrap();
                rank.write_all(&answer).unwrap();
                rank.read_exact(&mut proof).unwrap();
                listener.write_all(&proof).unwrap();
                (opening, answer, proof)
            });
            assert!(outcome(&mut strangers).is_some());
            relay.join().unwrap()
        });
        let (opening, first_answer, proof) = overheard;
        // The overheard proof, the listener's own, and none at all.
        for attempt in 0..3 {
            let (mut strangers, mut stream) = knock(gate(0, SECRET));
            let replay = thread::spawn(move || {
                stream.write_all(&opening).unwrap();
                let mut answer = [0; ANSWER_BYTES];
                stream.read_exact(&mut answer).unwrap();
                assert_ne!(answer, first_answer);
                let proof = match attempt {
                    0 => proof,
                    1 => *answer.last_chunk().unwrap(),
                    _ => [0; PROOF_BYTES],
                };
                stream.write_all(&proof).unwrap();
            });
            assert!(outcome(&mut strangers).is_none(), "attempt {attempt}");
            replay.join().unwrap();
        }
    }

    #[test]
    fn who_stops_half_way_is_cut_off_in_time() {
        for bytes in [0, 1, HELLO_BYTES, OPENING_BYTES] {
            let (mut strangers, mut stream) = knock(gate(0, SECRET));
            let hello = Hello { nonce: 7, purpose: Purpose::Control, from: 1, to: 0, proof: Proof::Follows };
            let opening = [&hello.encode()[..], &[1; CHALLENGE_BYTES]].concat();
            stream.write_all(&opening[..bytes]).unwrap();
            // As if it had been here for long.
            let long_ago = Instant::now().checked_sub(HELLO_TIME).unwrap();
            strangers.all[0].since = long_ago;
            assert!(outcome(&mut strangers).is_none(), "{bytes} bytes");
        }
    }

    #[test]
    fn who_waits_for_an_answer_gives_up_at_the_deadline_or_when_told() {
        let (_strangers, mut stream) = knock(gate(0, SECRET));
        let gate = gate(2, SECRET);
        let mut introduce = |time, given_up: bool| {
            gate.introduce(&mut stream, Purpose::Control, 0, Instant::now() + time, || given_up)
        };
        assert_eq!(introduce(Duration::from_millis(100), false).unwrap_err().kind(), ErrorKind::TimedOut);
        let begin = Instant::now();
        assert_eq!(introduce(LIMIT, true).unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(begin.elapsed() < LIMIT / 2);
    }

    #[test]
    fn a_card_is_believed_only_under_the_seal_of_its_rank_and_world() {
        let card = gate(1, SECRET).sealed(b"card");
        assert_eq!(gate(0, SECRET).unsealed(1, &card).unwrap(), b"card");
        let another_world = Gate::new(8, 0, 3, Some(Token::new("the token of this job").unwrap()));
        for (reader, rank, card) in [
            (gate(0, SECRET), 2, &card[..]),
            (another_world, 1, &card[..]),
            (gate(0, Some("the token of another job")), 1, &card[..]),
            (gate(0, SECRET), 1, &card[..5]),
            (gate(0, SECRET), 1, b""),
            (gate(0, SECRET), 1, b"\0card"),
            (gate(0, None), 1, &card[..]),
        ] {
            assert!(matches!(reader.unsealed(rank, card), Err(Error::Token { .. })));
        }
        assert_eq!(gate(0, None).unsealed(1, &gate(1, None).sealed(b"card")).unwrap(), b"card");
    }

    proptest! {
        #[test]
        fn hellos_survive(nonce: u64, group: u64, from: usize, to: usize, follows: bool) {
            let proof = if follows { Proof::Follows } else { Proof::Omitted };
            for purpose in [Purpose::Control, Purpose::Data(group)] {
                let hello = Hello { nonce, purpose, from, to, proof };
                prop_assert_eq!(Hello::decode(&hello.encode()), Some(hello));
            }
        }

        #[test]
        fn what_decodes_as_a_hello_is_one(words: [u64; 6]) {
            let [a, b, c, d, e, f] = words;
            let bytes = pack([MAGIC, a, b % 4, c, d, e, f % 4]);
            if let Some(hello) = Hello::decode(&bytes) {
                prop_assert_eq!(hello.encode(), bytes);
            }
        }
    }
}
