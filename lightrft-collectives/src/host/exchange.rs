//! One step of a call: a frame to and from each peer, all at once, on non-blocking sockets
//!
//! Everyone may send before anyone receives: what cannot be written yet waits while what has come is read. So no
//! pattern of sizes can lock two ranks against each other.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::fate::Alarm;
use super::vigil::Vigil;
use super::wire::{HEADER_BYTES, Header};
use crate::operation::Signature;

/// The data connections of a group, by rank in the group.
#[derive(Debug)]
pub(super) struct Links {
    group: u64,
    streams: Vec<Option<TcpStream>>,
    sent: Vec<u64>,
    received: Vec<u64>,
}

/// What goes to and comes from one peer in a step.
pub(super) struct Traffic<'a> {
    /// Rank in the group.
    pub(super) peer: usize,
    pub(super) send: Option<&'a [u8]>,
    pub(super) recv: Option<&'a mut [u8]>,
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
    /// Nothing moved for this long, and these ranks were waited for.
    Deadline(Duration, Vec<usize>),
    /// The system refused something.
    System(io::Error),
}

struct Flight<'a> {
    peer: usize,
    head: [u8; HEADER_BYTES],
    send: Option<&'a [u8]>,
    sent: usize,
    their_head: [u8; HEADER_BYTES],
    recv: Option<&'a mut [u8]>,
    received: usize,
}

impl Flight<'_> {
    fn to_send(&self) -> bool {
        self.send.is_some_and(|body| self.sent < HEADER_BYTES + body.len())
    }

    fn to_receive(&self) -> bool {
        self.recv.as_ref().is_some_and(|body| self.received < HEADER_BYTES + body.len())
    }
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

impl Links {
    pub(super) fn new(group: u64, streams: Vec<Option<TcpStream>>) -> io::Result<Self> {
        for stream in streams.iter().flatten() {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
        }
        let world = streams.len();
        Ok(Links { group, streams, sent: vec![0; world], received: vec![0; world] })
    }

    /// Sends and receives one frame per entry of `traffic`; the peers' signatures must be `expected`.
    pub(super) fn exchange<'a>(
        &mut self,
        mine: Signature,
        expected: Signature,
        traffic: impl IntoIterator<Item = Traffic<'a>>,
        alarm: &Alarm,
        vigil: &Vigil<'_>,
        timeout: Duration,
    ) -> Result<(), Fault> {
        let (signature, expected) = (mine.encode(), expected.encode());
        let mut flights: Vec<Flight<'_>> = Vec::with_capacity(self.streams.len());
        for Traffic { peer, send, recv } in traffic {
            let length = send.map_or(0, <[u8]>::len) as u64;
            let head = Header { group: self.group, sequence: self.sent[peer], signature, length }.encode();
            self.sent[peer] += u64::from(send.is_some());
            let their_head = [0; HEADER_BYTES];
            flights.push(Flight { peer, head, send, sent: 0, their_head, recv, received: 0 });
        }
        let mut last_move = Instant::now();
        loop {
            let was_rung = alarm.is_rung();
            let mut any = false;
            let mut mismatch = None;
            for flight in &mut flights {
                while flight.to_send() && self.write(flight)? {
                    any = true;
                }
                while flight.to_receive() {
                    let before = flight.received;
                    if !self.read(flight)? {
                        break;
                    }
                    any = true;
                    if before < HEADER_BYTES && flight.received >= HEADER_BYTES {
                        let theirs = self.verify(flight, expected)?;
                        mismatch = mismatch.or(theirs.map(|theirs| (flight.peer, theirs)));
                        if mismatch.is_some() {
                            break;
                        }
                    }
                }
            }
            if let Some((peer, theirs)) = mismatch {
                return Err(Fault::Mismatch(peer, theirs));
            }
            if !flights.iter().any(|f| f.to_send() || f.to_receive()) {
                return Ok(());
            }
            if any {
                last_move = Instant::now();
            } else if was_rung {
                return Err(Fault::Alarm);
            } else {
                self.wait(&flights, alarm, vigil, timeout, last_move)?;
            }
        }
    }

    fn stream(&self, peer: usize) -> Result<&TcpStream, Fault> {
        self.streams[peer].as_ref().ok_or(Fault::Lost(peer))
    }

    fn write(&self, flight: &mut Flight<'_>) -> Result<bool, Fault> {
        let body = flight.send.unwrap_or_default();
        let head = flight.head.get(flight.sent..).unwrap_or_default();
        let body = &body[flight.sent.saturating_sub(HEADER_BYTES)..];
        let mut stream = self.stream(flight.peer)?;
        let n = moved(stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]), flight.peer)?;
        flight.sent += n.unwrap_or(0);
        Ok(n.is_some())
    }

    /// Reads into the header and, only after it was verified, into the body.
    fn read(&self, flight: &mut Flight<'_>) -> Result<bool, Fault> {
        let mut stream = self.stream(flight.peer)?;
        let target = match flight.received.checked_sub(HEADER_BYTES) {
            None => &mut flight.their_head[flight.received..],
            Some(done) => &mut flight.recv.as_deref_mut().unwrap_or_default()[done..],
        };
        let n = moved(stream.read_vectored(&mut [IoSliceMut::new(target)]), flight.peer)?;
        flight.received += n.unwrap_or(0);
        Ok(n.is_some())
    }

    /// `Some` if the peer made another call: its signature, if it is one.
    fn verify(
        &mut self,
        flight: &Flight<'_>,
        expected: [u64; 3],
    ) -> Result<Option<Option<Signature>>, Fault> {
        let length = flight.recv.as_ref().map_or(0, |body| body.len()) as u64;
        let sequence = self.received[flight.peer];
        self.received[flight.peer] += 1;
        let Some(header) = Header::decode(&flight.their_head) else { return Ok(Some(None)) };
        let wanted = Header { group: self.group, sequence, signature: expected, length };
        if header == wanted {
            return Ok(None);
        }
        Ok(Some(Signature::decode(header.signature)))
    }

    fn wait(
        &self,
        flights: &[Flight<'_>],
        alarm: &Alarm,
        vigil: &Vigil<'_>,
        timeout: Duration,
        last_move: Instant,
    ) -> Result<(), Fault> {
        let idle = last_move.elapsed();
        let rest = timeout.saturating_sub(idle);
        let unfinished = || flights.iter().filter(|f| f.to_send() || f.to_receive());
        if rest.is_zero() {
            return Err(Fault::Deadline(idle, unfinished().map(|f| f.peer).collect()));
        }
        let mut fds = vec![PollFd::from_borrowed_fd(alarm.fd().as_fd(), PollFlags::IN)];
        for flight in unfinished() {
            let mut events = PollFlags::empty();
            events.set(PollFlags::OUT, flight.to_send());
            events.set(PollFlags::IN, flight.to_receive());
            fds.push(PollFd::from_borrowed_fd(self.stream(flight.peer)?.as_fd(), events));
        }
        vigil.still_waiting(idle, || unfinished().map(|f| f.peer).collect());
        let rest = rest.min(vigil.longest_nap());
        let rest = Timespec { tv_sec: rest.as_secs() as i64, tv_nsec: rest.subsec_nanos().into() };
        match poll(&mut fds, Some(&rest)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(Fault::System(e.into())),
        }
    }
}
