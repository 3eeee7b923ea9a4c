//! The watcher: one thread per world that accepts connections and notices who died
//!
//! The kernel closes a process's sockets when it ends, however it ends. So a control connection that closes without a
//! goodbye is a death. A child that was forked may hold the connection open: of a rank of this machine the kernel tells
//! its end in any case, by a descriptor of its process. A rank of another machine is lost, too, when it gives no sign of
//! life ([`pulse`](super::pulse)). What follows from a loss is agreed on in [`verdict`](super::verdict).

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::control::{Control, Room, Sent};
use super::fate::Fate;
use super::hello::{Gate, Purpose, Strangers};
use super::ledger::{Ledgers, Told};
use super::note::Note;
use super::pulse::{Pulse, RHYTHM, Rhythm};
use super::verdict::Court;
use super::vigil::{Accounts, Condition};
use crate::acceptor::Acceptor;
use crate::error::Loss;
use crate::flight::memory::Read;
use crate::flight::recorder::Recorder;
use crate::flight::{DIRECTORY, Flight, Status};

/// How long the last notes of a process that has ended may take to come; on one machine they are there already.
const LAST_WORDS: Duration = Duration::from_millis(10);

/// Where a rank is, as seen from this one.
#[derive(Debug)]
pub(super) enum Place {
    /// On this machine: its process, and a descriptor that tells the end of it, where the kernel has such.
    Here(u32, Option<OwnedFd>),
    /// On another machine.
    Elsewhere,
}

/// Another rank, as the watcher sees it.
#[derive(Debug)]
pub(super) struct Peer {
    control: Control,
    place: Place,
}

/// What the watcher and the callers of one rank share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) nonce: u64,
    pub(super) fate: Fate,
    pub(super) court: Mutex<Court>,
    ledgers: Mutex<Ledgers>,
    pub(super) recorder: Recorder,
    /// The recorders of the other ranks of this machine.
    flights: OnceLock<Vec<Option<Read>>>,
    /// Where to write what the recorders hold when a group fails.
    pub(super) directory: Option<PathBuf>,
    /// What is still to be written there.
    pub(super) accounts: Accounts,
    /// For threads that outlive a call.
    pub(super) own: Weak<Shared>,
    /// The last answers to questions of what ranks do, and when they came.
    answers: Mutex<HashMap<usize, (Instant, Status)>>,
    peers: Mutex<Vec<Option<Arc<Peer>>>>,
    arrived: Mutex<HashMap<(Purpose, usize), TcpStream>>,
    arrival: Condvar,
    wake: OwnedFd,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Stopping,
}

impl Shared {
    pub(super) fn new(rank: usize, world: usize, nonce: u64) -> io::Result<Arc<Self>> {
        let recorder = Recorder::new(nonce, rank, world)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new_cyclic(|own| Shared {
            rank,
            world,
            nonce,
            fate: Fate::default(),
            court: Mutex::default(),
            ledgers: Mutex::default(),
            recorder,
            flights: OnceLock::new(),
            directory: std::env::var_os(DIRECTORY).filter(|name| !name.is_empty()).map(PathBuf::from),
            accounts: Accounts::default(),
            own: own.clone(),
            answers: Mutex::default(),
            peers: Mutex::new((0..world).map(|_| None).collect()),
            arrived: Mutex::default(),
            arrival: Condvar::new(),
            wake,
            state: Mutex::new(State::Running),
        }))
    }

    /// What is compared here of the calls made beside groups.
    pub(super) fn ledgers(&self) -> MutexGuard<'_, Ledgers> {
        self.ledgers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn peers(&self) -> MutexGuard<'_, Vec<Option<Arc<Peer>>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the watcher's thread look at what there is to do.
    pub(super) fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Hands the control connection to `rank` to the watcher.
    pub(super) fn watch(&self, rank: usize, stream: TcpStream, place: Place) -> io::Result<()> {
        let control = Control::new(stream)?;
        self.peers()[rank] = Some(Arc::new(Peer { control, place }));
        self.wake();
        Ok(())
    }

    /// Whether there is, or was, a control connection to a rank.
    pub(super) fn is_watched(&self, rank: usize) -> bool {
        rank == self.rank || self.peers().get(rank).is_none_or(Option::is_some)
    }

    /// Whether a rank is known to be stopped, which only one of this machine can be.
    pub(super) fn is_stopped(&self, rank: usize) -> bool {
        let peer = self.peers().get(rank).cloned().flatten();
        peer.is_some_and(|peer| match peer.place {
            Place::Here(pid, _) => Condition::of(pid) == Condition::Stopped,
            Place::Elsewhere => false,
        })
    }

    /// Keeps the recorders of the other ranks of this machine, by rank. Once.
    pub(super) fn keep_flights(&self, flights: Vec<Option<Read>>) {
        let _ = self.flights.set(flights);
    }

    /// What a rank's recorder holds: this rank's, or another's of this machine, also after its death.
    pub(super) fn flight(&self, rank: usize) -> Option<Flight> {
        if rank == self.rank {
            return Flight::of(self.recorder.words());
        }
        self.flights.get()?.get(rank)?.as_ref().and_then(Flight::of).filter(|flight| flight.job == self.nonce)
    }

    /// A rank's answer, if it came after `asked`.
    pub(super) fn answer(&self, rank: usize, asked: Instant) -> Option<Status> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(&rank).filter(|(came, _)| *came >= asked).map(|(_, status)| status.clone())
    }

    /// Takes the connection that `rank` opened for `purpose`; `None` at the end of `timeout`.
    pub(super) fn take(&self, purpose: Purpose, rank: usize, timeout: Duration) -> Option<TcpStream> {
        let arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        let absent = |arrived: &mut HashMap<_, _>| !arrived.contains_key(&(purpose, rank));
        let waited = self.arrival.wait_timeout_while(arrived, timeout, absent);
        waited.unwrap_or_else(PoisonError::into_inner).0.remove(&(purpose, rank))
    }

    /// Tells every rank; does not wait.
    pub(super) fn tell_all(&self, note: &Note) {
        self.tell(0..self.world, note);
    }

    /// Tells these ranks of the world, but for this one; does not wait.
    pub(super) fn tell(&self, ranks: impl IntoIterator<Item = usize>, note: &Note) {
        let bytes = note.encode();
        let room = if matches!(note, Note::Calls { .. }) { Room::Half } else { Room::All };
        let peers = self.peers();
        let others = ranks.into_iter().filter(|rank| *rank != self.rank);
        for peer in others.filter_map(|rank| peers.get(rank)?.as_ref()) {
            if peer.control.send(&bytes, room) == Sent::Later {
                self.wake();
            }
        }
    }

    /// Whether the thread has been woken and has not looked yet.
    #[cfg(test)]
    pub(super) fn is_woken(&self) -> bool {
        rustix::io::read(&self.wake, &mut [0u8; 8]).is_ok()
    }

    /// Says goodbye and lets the watcher end. Does not wait.
    pub(super) fn leave(&self) {
        let lost = self.fate.first_loss().filter(|lost| *lost != self.rank);
        self.tell_all(&lost.map_or(Note::Goodbye, |lost| Note::GoodbyeAfter { lost }));
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::Stopping;
        self.wake();
    }

    fn is_stopping(&self) -> bool {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) == State::Stopping
    }
}

/// What the thread keeps of a rank.
#[derive(Debug, Default)]
struct Hearing {
    /// Notes not yet whole.
    input: Vec<u8>,
    /// Its control connection is closed.
    closed: bool,
    /// When its process ended.
    ended: Option<Instant>,
}

/// The thread's own state.
pub(super) struct Watcher {
    shared: Arc<Shared>,
    acceptor: Acceptor,
    strangers: Strangers,
    pulse: Pulse,
    hearing: Vec<Hearing>,
}

impl Watcher {
    pub(super) fn start(shared: Arc<Shared>, listener: TcpListener, gate: Gate) -> io::Result<()> {
        Watcher::start_with(RHYTHM, shared, listener, gate)
    }

    fn start_with(rhythm: Rhythm, shared: Arc<Shared>, listener: TcpListener, gate: Gate) -> io::Result<()> {
        let world = shared.world;
        let watcher = Watcher {
            shared,
            acceptor: Acceptor::new(Arc::new(listener))?,
            strangers: Strangers::new(gate),
            pulse: Pulse::new(rhythm, world),
            hearing: (0..world).map(|_| Hearing::default()).collect(),
        };
        std::thread::Builder::new().name("lightrft-watcher".into()).spawn(move || watcher.run()).map(drop)
    }

    fn run(mut self) {
        while !self.shared.is_stopping() {
            let peers: Vec<(usize, Arc<Peer>)> = {
                let peers = self.shared.peers();
                let open = peers.iter().enumerate().filter(|(rank, _)| !self.hearing[*rank].closed);
                open.filter_map(|(rank, peer)| Some((rank, peer.clone()?))).collect()
            };
            // From the first look at a peer on, before anything has come from it: perhaps nothing ever does.
            let now = Instant::now();
            for (rank, _) in peers.iter().filter(|(_, peer)| matches!(peer.place, Place::Elsewhere)) {
                if !self.shared.fate.is_lost(*rank) {
                    self.pulse.expect(*rank, now);
                }
            }
            let mut fds = vec![
                PollFd::from_borrowed_fd(self.shared.wake.as_fd(), PollFlags::IN),
                self.acceptor.poll_fd(),
            ];
            for (rank, peer) in &peers {
                let mut events = PollFlags::IN;
                events.set(PollFlags::OUT, peer.control.is_behind());
                fds.push(PollFd::from_borrowed_fd(peer.control.fd(), events));
                // A place is kept for those without a descriptor: the poll then looks at the waker once more.
                let (process, events) = match &peer.place {
                    Place::Here(_, Some(process)) if self.hearing[*rank].ended.is_none() => {
                        (process.as_fd(), PollFlags::IN)
                    }
                    _ => (self.shared.wake.as_fd(), PollFlags::empty()),
                };
                fds.push(PollFd::from_borrowed_fd(process, events));
            }
            fds.extend(self.strangers.poll_fds());
            let timeout = self.rest(Instant::now());
            let timeout =
                timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
            if poll(&mut fds, timeout.as_ref()).is_err() {
                continue;
            }
            let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
            drop(fds);
            if !ready[0].is_empty() {
                let _ = rustix::io::read(&self.shared.wake, &mut [0u8; 8]);
            }
            for ((rank, peer), ready) in peers.iter().zip(ready[2..].chunks_exact(2)) {
                self.attend(*rank, peer, ready[0], !ready[1].is_empty());
            }
            self.greet_strangers();
            if !ready[1].is_empty() {
                self.acceptor.accept(|stream| self.strangers.add(stream));
            }
            self.keep_time(Instant::now());
        }
    }

    /// How long a poll may take: until something is to be done that no descriptor tells.
    fn rest(&self, now: Instant) -> Option<Duration> {
        let ended = self.hearing.iter().filter(|hearing| !hearing.closed).filter_map(|h| h.ended).min();
        let last_words = ended.map(|ended| (ended + LAST_WORDS).saturating_duration_since(now));
        let all = [
            self.acceptor.rest(),
            self.strangers.patience(),
            self.pulse.rest(now),
            self.shared.court_rest(now),
            last_words,
        ];
        all.into_iter().flatten().min()
    }

    /// Does what is due, after everything that has come was heard.
    fn keep_time(&mut self, now: Instant) {
        if self.pulse.is_due(now) {
            let shared = &self.shared;
            let elsewhere = shared
                .peers()
                .iter()
                .enumerate()
                .filter_map(|(rank, peer)| matches!(peer.as_ref()?.place, Place::Elsewhere).then_some(rank))
                .collect::<Vec<_>>();
            shared.tell(elsewhere, &Note::Pulse);
        }
        for rank in self.pulse.silent(now) {
            self.pulse.forget(rank);
            self.shared.declare_lost(rank, Loss::Silent);
        }
        for rank in 0..self.hearing.len() {
            let hearing = &mut self.hearing[rank];
            if !hearing.closed && hearing.ended.is_some_and(|ended| now >= ended + LAST_WORDS) {
                // Somebody else holds its connection open.
                hearing.closed = true;
                self.lose(rank);
            }
        }
        self.shared.court_sits(now);
    }

    /// Hands over the connections that have said hello.
    fn greet_strangers(&mut self) {
        let shared = &self.shared;
        self.strangers.greet(|hello, stream| {
            let mut arrived = shared.arrived.lock().unwrap_or_else(PoisonError::into_inner);
            arrived.insert((hello.purpose, hello.from), stream);
            shared.arrival.notify_all();
        });
    }

    /// Sends and reads what is ready of one rank.
    fn attend(&mut self, rank: usize, peer: &Peer, ready: PollFlags, ended: bool) {
        if ready.contains(PollFlags::OUT) {
            peer.control.flush();
        }
        if ended {
            self.hearing[rank].ended.get_or_insert_with(Instant::now);
        }
        // What it said before it ended comes first.
        if ended || !(ready & !PollFlags::OUT).is_empty() {
            self.listen_to(rank, peer);
        }
    }

    /// Reads the notes of a rank, and its death.
    fn listen_to(&mut self, rank: usize, peer: &Peer) {
        let hearing = &mut self.hearing[rank];
        let before = hearing.input.len();
        let mut open = peer.control.receive(&mut hearing.input);
        if hearing.input.len() > before {
            self.pulse.hear(rank, Instant::now());
        }
        let mut input = std::mem::take(&mut hearing.input);
        let mut done = 0;
        loop {
            match Note::decode(&input[done..]) {
                Ok(None) => break,
                Ok(Some((note, n))) => {
                    done += n;
                    self.hear(rank, note);
                }
                Err(()) => {
                    open = false;
                    break;
                }
            }
        }
        input.drain(..done);
        self.hearing[rank].input = input;
        if !open {
            self.hearing[rank].closed = true;
            self.lose(rank);
        }
    }

    fn hear(&self, rank: usize, note: Note) {
        let shared = &self.shared;
        match note {
            Note::Goodbye => shared.hear_goodbye(rank, None),
            Note::GoodbyeAfter { lost } => {
                shared.fate.record_reason(rank, lost);
                shared.hear_goodbye(rank, None);
            }
            Note::LeftGroup { group } => shared.hear_goodbye(rank, Some(group)),
            Note::Pulse => {}
            Note::Verdict(said) => shared.hear_verdict(rank, said),
            Note::Rebuild(said) => shared.hear_rebuild(rank, said),
            Note::Ask => {
                if let Some(flight) = shared.flight(shared.rank) {
                    shared.tell([rank], &Note::Status(flight.status()));
                }
            }
            Note::Calls { group, line, first, calls } => {
                shared.hear_calls(rank, group, (line, first), calls.into_iter().map(Told::from));
            }
            Note::Status(status) => {
                let mut answers = shared.answers.lock().unwrap_or_else(PoisonError::into_inner);
                answers.insert(rank, (Instant::now(), status));
                drop(answers);
                shared.fate.announce_change();
            }
        }
    }

    /// The connection to a rank is gone, or its process is.
    fn lose(&mut self, rank: usize) {
        self.pulse.forget(rank);
        if !self.shared.fate.has_left(rank, 0) {
            self.shared.declare_lost(rank, Loss::Died);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::host::note::Cause;

    #[test]
    fn a_rank_elsewhere_from_which_nothing_has_ever_come_is_lost_in_time() {
        let (shared, rhythm) = (
            Shared::new(0, 2, 0).unwrap(),
            Rhythm { every: Duration::from_millis(100), silence: Duration::from_millis(350) },
        );
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let gate = Gate::new(0, 0, 2, None);
        Watcher::start_with(rhythm, shared.clone(), listener, gate).unwrap();
        shared.fate.enter(7, &[0, 1]).unwrap();
        // A connection of no rank, for a way to it.
        let beside = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let _silent = TcpStream::connect(beside.local_addr().unwrap()).unwrap();
        // Let the watcher come to rest with nobody to listen for. Nothing tells that it has; if it has not, less is tested.
        std::thread::sleep(Duration::from_millis(50));
        shared.watch(1, beside.accept().unwrap().0, Place::Elsewhere).unwrap();
        let cause = shared.fate.await_agreement(7, Duration::from_secs(20));
        assert_eq!(cause, Some(Cause::Lost { rank: 1, how: Loss::Silent }));
        shared.leave();
    }

    #[test]
    fn nobody_here_learns_of_a_death_before_the_others_are_told() {
        let shared = Shared::new(0, 2, 0).unwrap();
        let alarm = shared.fate.enter(7, &[0, 1]).unwrap();
        std::thread::scope(|scope| {
            // While this is held, the others cannot be told.
            let peers = shared.peers();
            scope.spawn(|| shared.declare_lost(1, Loss::Died));
            let rings = PollFd::new(alarm.fd(), PollFlags::IN);
            let pause = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            assert_eq!(poll(&mut [rings], Some(&pause)), Ok(0));
            assert!(shared.fate.cause(7).is_none());
            drop(peers);
        });
        assert!(alarm.is_rung());
        assert_eq!(shared.fate.cause(7), Some(Cause::Lost { rank: 1, how: Loss::Died }));
    }
}
