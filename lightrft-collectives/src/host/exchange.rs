//! One step of a call: a frame to and from peers, all at once, on non-blocking sockets
//!
//! Everyone may send before anyone receives: what cannot be written yet waits while what has come is read. So no
//! pattern of sizes can lock two ranks against each other. The calling thread does all of it; how it waits when
//! nothing moves is [`patience`](super::patience)'s matter.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

use super::fate::Alarm;
use super::patience::{Next, Patience};
use super::vigil::Vigil;
use super::wire::{HEADER_BYTES, Header};
use crate::operation::Signature;

/// What the kernel may hold of each direction of a connection: enough to keep both sides busy, little enough that
/// what one side writes is still in a cache when the other reads it.
const SOCKET_BUFFER: usize = 1 << 20;

/// The most that is moved on one connection before the next has its turn.
const TURN: usize = 1 << 20;

/// What one step sends and receives, by peer (a rank of the group). A frame is a stream of bytes whose length both
/// sides know beforehand; its bytes may become known, and find room, only as others arrive.
pub(super) trait Step {
    /// Bytes for `peer`; `None` if it gets no frame.
    fn send_len(&self, peer: usize) -> Option<usize>;

    /// Bytes from `peer`; `None` if it sends no frame.
    fn recv_len(&self, peer: usize) -> Option<usize>;

    /// The bytes for `peer` from byte `at` of its frame on, as many as are known and lie together.
    fn outgoing(&mut self, peer: usize, at: usize) -> &[u8];

    /// Where the bytes from `peer` go from byte `at` of its frame on, as far as there is room in one place.
    fn incoming(&mut self, peer: usize, at: usize) -> &mut [u8];

    /// All bytes of `peer`'s frame before `at` have come.
    fn arrived(&mut self, peer: usize, at: usize) {
        let _ = (peer, at);
    }
}

/// What a call watches while it waits.
#[derive(Clone, Copy)]
pub(super) struct Wait<'a> {
    pub(super) alarm: &'a Alarm,
    pub(super) vigil: &'a Vigil<'a>,
    /// How long nothing may move.
    pub(super) timeout: Duration,
}

/// Why a step failed. Ranks are those of the group.
#[derive(Debug)]
pub(super) enum Fault {
    /// The connection to a rank is gone.
    Lost(usize),
    /// The group's alarm was rung.
    Alarm,
    /// A rank made another call; `None` if its words are no call at all.
    Mismatch(usize, Option<Signature>),
    /// Two ranks, by rank in the group, made calls that do not fit together; every rank has found the same two.
    Disagree { one: (usize, Signature), other: (usize, Signature) },
    /// Nothing moved for this long; `missing` were waited for, `come` were heard of.
    Deadline { waited: Duration, missing: Vec<usize>, come: Vec<usize> },
    /// The system refused something.
    System(io::Error),
}

/// The data connections of a group, by rank in the group.
#[derive(Debug)]
pub(super) struct Links {
    group: u64,
    rank: usize,
    lanes: Vec<Option<Lane>>,
    patience: Patience,
}

/// A connection and how far the running step has come on it. Counts of bytes include the header.
#[derive(Debug)]
struct Lane {
    peer: usize,
    stream: TcpStream,
    /// Frames so far, each way.
    frames_sent: u64,
    frames_received: u64,
    head: [u8; HEADER_BYTES],
    sent: usize,
    to_send: usize,
    their_head: [u8; HEADER_BYTES],
    received: usize,
    to_receive: usize,
    /// A header has come that is not the expected one.
    mismatch: bool,
}

/// Bytes moved, or `None` if the socket is full or empty.
fn moved(result: io::Result<usize>, peer: usize) -> Result<Option<usize>, Fault> {
    match result {
        Ok(0) => Err(Fault::Lost(peer)),
        Ok(n) => Ok(Some(n)),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) if e.kind() == ErrorKind::Interrupted => Ok(None),
        Err(_) => Err(Fault::Lost(peer)),
    }
}

impl Lane {
    fn new(peer: usize, stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        // Wishes: the kernel grants what its limits allow.
        let _ = sockopt::set_socket_send_buffer_size(&stream, SOCKET_BUFFER);
        let _ = sockopt::set_socket_recv_buffer_size(&stream, SOCKET_BUFFER);
        Ok(Lane {
            peer,
            stream,
            frames_sent: 0,
            frames_received: 0,
            head: [0; HEADER_BYTES],
            sent: 0,
            to_send: 0,
            their_head: [0; HEADER_BYTES],
            received: 0,
            to_receive: 0,
            mismatch: false,
        })
    }

    fn begin(&mut self, group: u64, signature: [u64; 3], send: Option<usize>, recv: Option<usize>) {
        (self.sent, self.to_send) = (0, send.map_or(0, |n| HEADER_BYTES + n));
        (self.received, self.to_receive) = (0, recv.map_or(0, |n| HEADER_BYTES + n));
        if let Some(length) = send {
            let sequence = self.frames_sent;
            self.frames_sent += 1;
            self.head = Header { group, sequence, signature, length: length as u64 }.encode();
        }
    }

    fn is_open(&self) -> bool {
        self.sent < self.to_send || self.received < self.to_receive
    }

    /// Writes what can be written now; whether anything could.
    fn push(&mut self, step: &mut impl Step) -> Result<bool, Fault> {
        let before = self.sent;
        while self.sent < self.to_send && self.sent - before < TURN {
            let wanted;
            let result = match self.sent.checked_sub(HEADER_BYTES) {
                // The header travels with what follows: one call, one packet.
                None => {
                    let (head, body) = (&self.head[self.sent..], step.outgoing(self.peer, 0));
                    wanted = head.len() + body.len();
                    if body.is_empty() {
                        self.stream.write(head)
                    } else {
                        self.stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)])
                    }
                }
                Some(at) => {
                    let body = step.outgoing(self.peer, at);
                    wanted = body.len();
                    if body.is_empty() {
                        break;
                    }
                    self.stream.write(body)
                }
            };
            let Some(n) = moved(result, self.peer)? else { break };
            self.sent += n;
            if n < wanted {
                break;
            }
        }
        Ok(self.sent > before)
    }

    /// Reads what has come; whether anything has.
    fn pull(&mut self, step: &mut impl Step, group: u64, expected: [u64; 3]) -> Result<bool, Fault> {
        let before = self.received;
        while self.received < self.to_receive && self.received - before < TURN && !self.mismatch {
            let wanted;
            let result = match self.received.checked_sub(HEADER_BYTES) {
                // What follows comes with the header. If that is of another call, the step fails, whatever was
                // written where the result belongs.
                None => {
                    let (head, body) = (&mut self.their_head[self.received..], step.incoming(self.peer, 0));
                    wanted = head.len() + body.len();
                    if body.is_empty() {
                        self.stream.read(head)
                    } else {
                        self.stream.read_vectored(&mut [IoSliceMut::new(head), IoSliceMut::new(body)])
                    }
                }
                Some(at) => {
                    let body = step.incoming(self.peer, at);
                    wanted = body.len();
                    if body.is_empty() {
                        break;
                    }
                    self.stream.read(body)
                }
            };
            let Some(n) = moved(result, self.peer)? else { break };
            let had_head = self.received >= HEADER_BYTES;
            self.received += n;
            if self.received >= HEADER_BYTES {
                if !had_head {
                    self.verify(group, expected);
                }
                if !self.mismatch {
                    step.arrived(self.peer, self.received - HEADER_BYTES);
                }
            }
            if n < wanted {
                break;
            }
        }
        Ok(self.received > before)
    }

    fn verify(&mut self, group: u64, expected: [u64; 3]) {
        let (sequence, length) = (self.frames_received, (self.to_receive - HEADER_BYTES) as u64);
        self.frames_received += 1;
        let wanted = Header { group, sequence, signature: expected, length };
        self.mismatch = Header::decode(&self.their_head) != Some(wanted);
    }

    /// The signature that came instead of the expected one, if it is one.
    fn theirs(&self) -> Option<Signature> {
        Signature::decode(Header::decode(&self.their_head)?.signature)
    }
}

impl Links {
    /// `streams` are the connections to the other members, by rank in the group.
    pub(super) fn new(
        group: u64,
        rank: usize,
        streams: Vec<Option<TcpStream>>,
        patience: Patience,
    ) -> io::Result<Self> {
        let lanes = streams.into_iter().enumerate();
        let lanes = lanes.map(|(peer, stream)| stream.map(|stream| Lane::new(peer, stream)).transpose());
        Ok(Links { group, rank, lanes: lanes.collect::<io::Result<_>>()?, patience })
    }

    /// Takes one step: sends and receives one frame per peer that `step` names; the peers' signatures must be
    /// `expected`.
    pub(super) fn exchange(
        &mut self,
        mine: Signature,
        expected: Signature,
        step: &mut impl Step,
        wait: Wait<'_>,
    ) -> Result<(), Fault> {
        let (signature, expected) = (mine.encode(), expected.encode());
        let group = self.group;
        for lane in self.lanes.iter_mut().flatten() {
            lane.begin(group, signature, step.send_len(lane.peer), step.recv_len(lane.peer));
        }
        let mut patience = self.patience;
        loop {
            let was_rung = wait.alarm.is_rung();
            let (mut any, mut open, mut mismatch) = (false, false, None);
            // From the next rank on, around: not all begin with the same one.
            let (before, after) = self.lanes.split_at_mut(self.rank);
            for lane in after.iter_mut().chain(before).flatten() {
                any |= lane.push(step)?;
                any |= lane.pull(step, group, expected)?;
                open |= lane.is_open();
                if lane.mismatch && mismatch.is_none() {
                    mismatch = Some((lane.peer, lane.theirs()));
                }
            }
            if let Some((peer, theirs)) = mismatch {
                return Err(Fault::Mismatch(peer, theirs));
            }
            if !open {
                return Ok(());
            }
            if any {
                patience = self.patience;
            } else if was_rung {
                return Err(Fault::Alarm);
            } else if let Next::Sleep(idle) = patience.pause() {
                self.sleep(wait, idle, step)?;
            }
        }
    }

    /// Waits for the sockets, having been idle since `idle`.
    fn sleep(&mut self, wait: Wait<'_>, idle: Instant, step: &mut impl Step) -> Result<(), Fault> {
        let idle = idle.elapsed();
        let rest = wait.timeout.saturating_sub(idle);
        if rest.is_zero() {
            return Err(Fault::Deadline { waited: idle, missing: self.missing(), come: self.come() });
        }
        // Only who sleeps pays for this list: it is small beside being woken.
        let mut fds = vec![PollFd::from_borrowed_fd(wait.alarm.fd().as_fd(), PollFlags::IN)];
        for lane in self.lanes.iter().flatten() {
            let (at, from) =
                (lane.sent.saturating_sub(HEADER_BYTES), lane.received.saturating_sub(HEADER_BYTES));
            let sends = lane.sent < lane.to_send
                && (lane.sent < HEADER_BYTES || !step.outgoing(lane.peer, at).is_empty());
            let receives = lane.received < lane.to_receive
                && (lane.received < HEADER_BYTES || !step.incoming(lane.peer, from).is_empty());
            let mut events = PollFlags::empty();
            events.set(PollFlags::OUT, sends);
            events.set(PollFlags::IN, receives);
            if !events.is_empty() {
                fds.push(PollFd::from_borrowed_fd(lane.stream.as_fd(), events));
            }
        }
        wait.vigil.still_waiting(idle, || self.missing());
        let rest = rest.min(wait.vigil.longest_nap());
        let rest = Timespec { tv_sec: rest.as_secs() as i64, tv_nsec: rest.subsec_nanos().into() };
        match poll(&mut fds, Some(&rest)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(Fault::System(e.into())),
        }
    }

    /// Who has shown that it makes this call, with the header of a frame.
    fn come(&self) -> Vec<usize> {
        let shown = |lane: &&Lane| lane.to_receive > 0 && lane.received >= HEADER_BYTES && !lane.mismatch;
        self.lanes.iter().flatten().filter(shown).map(|lane| lane.peer).collect()
    }

    /// Who has not come: the ranks without a header, or, if all have come, those that have not finished.
    fn missing(&self) -> Vec<usize> {
        let open = || self.lanes.iter().flatten().filter(|lane| lane.is_open());
        let absent = open().filter(|lane| lane.received < HEADER_BYTES && lane.to_receive > 0);
        let absent: Vec<usize> = absent.map(|lane| lane.peer).collect();
        if absent.is_empty() { open().map(|lane| lane.peer).collect() } else { absent }
    }
}
