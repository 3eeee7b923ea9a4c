//! A world of processes: connections to all other ranks, and the watcher behind them

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use super::exchange::Links;
use super::fate::Alarm;
use super::hello::{Gate, Purpose};
use super::note::{Cause, Lateness};
use super::patience::Patience;
use super::shm::Cores;
use super::verdict::SETTLE;
use super::watcher::{Place, Shared, Watcher};
use super::{Group, Transport};
use crate::auth::{Token, random};
use crate::error::{Error, Loss, Result};
use crate::flight;
use crate::flight::memory::Read;
use crate::live::LiveGroups;
use crate::operation::{Call, digest};
use crate::store::{Store, StoreServer};

/// The longest deadline.
const LONGEST: Duration = Duration::from_secs(1 << 31);

/// What each rank publishes in the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Card {
    pub(super) address: SocketAddr,
    /// Equal for ranks that can share memory; see [`host_identity`].
    pub(super) host: String,
    pub(super) pid: u32,
    /// The machine's name, for people.
    pub(super) node: String,
    /// The descriptor of the rank's flight recorder.
    pub(super) flight: i32,
    /// The words of its [`Cores`].
    pub(super) cores: Vec<u64>,
}

/// One rank's place among the processes of a job. Shared by its groups; the last to go says goodbye.
#[derive(Debug)]
pub(super) struct World {
    pub(super) shared: Arc<Shared>,
    pub(super) cards: Vec<Card>,
    pub(super) transport: Transport,
    /// How long a call waits before it says for whom.
    pub(super) patience: Duration,
    gate: Gate,
    /// The groups of this rank that others may share.
    pub(super) live: LiveGroups<Group>,
    /// Served by rank 0, unless an agent does, until it leaves.
    _server: Option<StoreServer>,
}

/// How a world is to be joined.
pub(crate) struct Join<'a> {
    pub(crate) store: &'a dyn Store,
    /// In front of all keys, so that restarts of a job on one store do not meet.
    pub(crate) prefix: String,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// The interface that leads to the other ranks; nothing else is listened on.
    pub(crate) interface: IpAddr,
    pub(crate) timeout: Duration,
    /// How long a call waits before it says for whom.
    pub(crate) patience: Duration,
    pub(crate) transport: Transport,
    pub(crate) server: Option<StoreServer>,
    /// What the ranks prove to each other.
    pub(crate) token: Option<Token>,
}

/// Ranks with different values of this variable are taken to be on different machines, wherever they are: for trying
/// out on one machine what runs on several, and for containers that must not share memory.
const HOST_ID: &str = "LIGHTRFT_HOST_ID";

/// The name of this kernel and process namespace: ranks with the same one can open each other's memory files. With
/// [`HOST_ID`] in front, if that is set.
fn host_identity() -> String {
    let id = std::env::var(HOST_ID).unwrap_or_default();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let uid = rustix::process::getuid().as_raw();
    format!("{id}/{}/{}/{uid}", boot.trim(), namespace.display())
}

/// The machine's name.
pub(crate) fn node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// How long the members of a group may take to agree on why it is dead.
pub(super) const AGREEMENT: Duration = Duration::from_secs(5);

/// The id of the world's group while it is being joined; no other group has it.
const JOINING: u64 = 0;

/// How long data may be unacknowledged, or a connection of another machine silent, before it is broken.
const UNACKNOWLEDGED: Duration = Duration::from_secs(5);

/// Lets the kernel break a connection to another machine that is gone without a word.
fn expect_answers(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED.as_millis() as u32)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(2))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

/// An id for a group that all its members derive from its name, which is unique in a world.
pub(super) fn group_id(name: &str) -> u64 {
    digest(name.bytes().map(usize::from))
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let doing = doing.into();
    |source| Error::Io { doing, source: Arc::new(source) }
}

impl World {
    /// Meets all other ranks through the store and opens a control connection to each.
    pub(super) fn join(join: Join<'_>) -> Result<Arc<World>> {
        let begin = Instant::now();
        let Join { store, prefix, rank, world_size, .. } = join;
        // What an earlier world of this job has left on the store is not taken for this one's: the n-th join of each
        // rank meets the n-th of the others.
        let joins = store.add(&format!("{prefix}/joins/{rank}"), 1)?;
        let prefix = format!("{prefix}/{joins}");
        let rest = || join.timeout.saturating_sub(begin.elapsed());
        let own = SocketAddr::new(join.interface, 0);
        let listener = TcpListener::bind(own)
            .map_err(|source| Error::Bind { address: own, source: Arc::new(source) })?;
        let address = listener.local_addr().map_err(io_error("read the address of a listener"))?;

        let nonce_key = format!("{prefix}/nonce");
        if rank == 0 {
            let nonce = random::<8>().map_err(io_error("make a random number"))?;
            store.set(&nonce_key, &nonce)?;
        }
        let bytes = store.get(&nonce_key, rest())?;
        let nonce = u64::from_le_bytes(bytes.as_slice().try_into().map_err(|_| Error::Protocol {
            rank: 0,
            got: format!("a nonce of {} bytes", bytes.len()),
            expected: "8".into(),
        })?);

        let shared = Shared::new(rank, world_size, nonce).map_err(io_error("make an event descriptor"))?;
        let gate = Gate::new(nonce, rank, world_size, join.token);
        Watcher::start(shared.clone(), listener, gate.clone()).map_err(io_error("start the watcher"))?;
        // From here on a failure drops this world, which ends the watcher.
        let (cards, live) = (Vec::new(), LiveGroups::default());
        let (transport, patience) = (join.transport, join.patience);
        let mut world = World { shared, cards, transport, patience, gate, live, _server: join.server };

        let (pid, flight) = (std::process::id(), world.shared.recorder.descriptor());
        let (host, cores) = (host_identity(), Cores::mine().to_words());
        let card = Card { address, host, pid, node: node_name(), flight, cores };
        let key = |rank: usize| format!("{prefix}/rank/{rank}");
        let bytes = rmp_serde::to_vec_named(&card).unwrap_or_default();
        store.set(&key(rank), &world.gate.sealed(&bytes))?;
        for peer in 0..world_size {
            let bytes = store.get(&key(peer), rest())?;
            let bytes = world.gate.unsealed(peer, &bytes)?;
            let card: Card = rmp_serde::from_slice(bytes).map_err(|e| Error::Protocol {
                rank: peer,
                got: format!("a card of {} bytes ({e})", bytes.len()),
                expected: "address, host, pid, node and flight of a rank".into(),
            })?;
            // Whoever could write to the store could else send this machine's ranks to another one.
            if join.interface.is_loopback() && !card.address.ip().is_loopback() {
                let got = format!("the address {}", card.address);
                let expected = "an address of this machine, as its own is".into();
                return Err(Error::Protocol { rank: peer, got, expected });
            }
            world.cards.push(card);
        }
        let everyone: Vec<usize> = (0..world_size).collect();
        let (places, flights) = everyone.iter().map(|rank| world.locate(*rank)).unzip();
        world.shared.keep_flights(flights);
        let mut places: Vec<Option<Place>> = places;
        let _joining =
            world.shared.fate.enter(JOINING, &everyone).map_err(io_error("make an event descriptor"))?;
        // Watched from the first moment: who dies now must not be waited for.
        world.connect(Purpose::Control, "world", &everyone, rest(), |peer, stream| {
            if !world.is_here(peer) {
                expect_answers(&stream)?;
            }
            world.shared.watch(peer, stream, places[peer].take().unwrap_or(Place::Elsewhere))
        })?;
        world.shared.fate.leave(JOINING);
        Ok(Arc::new(world))
    }

    /// Whether a rank is on this machine.
    pub(super) fn is_here(&self, rank: usize) -> bool {
        self.cards[rank].host == self.cards[self.rank()].host
    }

    /// How to see a rank's end, and its recorder. Before it connects: a rank that comes afterwards, with the nonce of
    /// this world, has lived all the time, so that its number was no other process's.
    fn locate(&self, rank: usize) -> (Option<Place>, Option<Read>) {
        if rank == self.rank() || !self.is_here(rank) {
            return (Some(Place::Elsewhere), None);
        }
        let card = &self.cards[rank];
        let pid = i32::try_from(card.pid).ok().and_then(Pid::from_raw);
        // Without a descriptor, the end of the connection tells.
        let process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let path = format!("/proc/{}/fd/{}", card.pid, card.flight);
        (Some(Place::Here(card.pid, process)), flight::open(path.as_ref()).ok())
    }

    pub(super) fn rank(&self) -> usize {
        self.shared.rank
    }

    /// The data connections of a group, by rank in the group, and its alarm.
    pub(super) fn links(
        &self,
        name: &str,
        ranks: &[usize],
        timeout: Duration,
    ) -> Result<(Links, Arc<Alarm>)> {
        let id = group_id(name);
        let fate = &self.shared.fate;
        let alarm = fate.enter(id, ranks).map_err(io_error("make an event descriptor"))?;
        self.shared.examine(id, ranks);
        let mut streams: Vec<Option<TcpStream>> = ranks.iter().map(|_| None).collect();
        let connected = self.connect(Purpose::Data(id), name, ranks, timeout, |place, stream| {
            if !self.is_here(ranks[place]) {
                expect_answers(&stream)?;
            }
            streams[place] = Some(stream);
            Ok(())
        });
        let here: Vec<usize> = ranks.iter().copied().filter(|rank| self.is_here(*rank)).collect();
        let cores: Vec<Cores> = here.iter().map(|rank| Cores::from_words(&self.cards[*rank].cores)).collect();
        let patience = Patience::new(here.len(), Cores::of_all(&cores));
        let place = ranks.iter().position(|rank| *rank == self.rank()).unwrap_or_default();
        let link = |()| Links::new(id, place, streams, patience).map_err(io_error("set a socket option"));
        match connected.and_then(link) {
            Ok(links) => Ok((links, alarm)),
            Err(error) => {
                fate.leave(id);
                Err(error)
            }
        }
    }

    /// Gives `take` a connection to each other rank in `ranks` (of the world), by place in the list: to those before this
    /// rank by connecting, to those after it by waiting for theirs.
    fn connect(
        &self,
        purpose: Purpose,
        group: &str,
        ranks: &[usize],
        timeout: Duration,
        mut take: impl FnMut(usize, TcpStream) -> io::Result<()>,
    ) -> Result<()> {
        let begin = Instant::now();
        let mut after_me = false;
        for (place, &peer) in ranks.iter().enumerate() {
            if peer == self.rank() {
                after_me = true;
                continue;
            }
            let rest = timeout.saturating_sub(begin.elapsed());
            let stream = if after_me {
                self.await_connection(purpose, peer, rest)
            } else {
                self.open_connection(purpose, peer, rest)
            };
            let taken = stream.and_then(|stream| take(place, stream));
            taken.map_err(|failure| self.not_connected(purpose, (group, ranks), peer, timeout, failure))?;
        }
        Ok(())
    }

    /// Connects in turns, so that a rank whose machine is gone is not waited for once that is known.
    fn open_connection(&self, purpose: Purpose, peer: usize, timeout: Duration) -> io::Result<TcpStream> {
        let (deadline, address) = (deadline(timeout), &self.cards[peer].address);
        let given_up = || self.shared.fate.cause(purpose.group()).is_some();
        loop {
            let rest = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let turn = rest.min(Duration::from_secs(1));
            match TcpStream::connect_timeout(address, turn) {
                Ok(mut stream) => {
                    // Whatever is wrong is said by the caller, which asks why.
                    self.gate.introduce(&mut stream, purpose, peer, deadline, given_up)?;
                    return Ok(stream);
                }
                Err(e) if e.kind() == io::ErrorKind::TimedOut && turn < rest && !given_up() => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Waits in short turns, so that a rank that died, or left, is not waited for.
    fn await_connection(&self, purpose: Purpose, peer: usize, timeout: Duration) -> io::Result<TcpStream> {
        let (begin, id) = (Instant::now(), purpose.group());
        loop {
            let rest = timeout.saturating_sub(begin.elapsed());
            // Looked at before the connection: one that was opened before its rank left counts.
            let left = self.shared.fate.has_left(peer, id);
            let turn = Duration::from_millis(if left { 200 } else { 50 });
            if let Some(stream) = self.shared.take(purpose, peer, rest.min(turn)) {
                return Ok(stream);
            }
            if left || rest.is_zero() || self.shared.fate.cause(id).is_some() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Why there is no connection to `peer`, told to the others, who may wait for this rank.
    fn not_connected(
        &self,
        purpose: Purpose,
        (group, ranks): (&str, &[usize]),
        peer: usize,
        waited: Duration,
        failure: io::Error,
    ) -> Error {
        use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, TimedOut, WouldBlock};
        let (id, fate, call) = (purpose.group(), &self.shared.fate, Call::Subgroup);
        let error = |cause: Cause| cause.error(call, group, ranks, &self.cards);
        if let Some(cause) = fate.await_cause(id, peer, Duration::from_secs(1)) {
            return error(cause);
        }
        let cause = match failure.kind() {
            _ if fate.has_left(peer, id) => fate.departed(peer, id, SETTLE),
            // A rank listens for as long as it is in the world.
            ConnectionRefused | ConnectionReset | BrokenPipe => {
                self.shared.declare_lost(peer, Loss::Died);
                Cause::Lost { rank: peer, how: Loss::Died }
            }
            TimedOut | WouldBlock => Cause::Timeout(Lateness {
                waited,
                step: 0,
                missing: [peer].into(),
                present: [self.rank()].into(),
                reporter: self.rank(),
                report: "it has not connected".into(),
            }),
            // It is this rank that cannot, for want of descriptors for instance.
            _ => {
                let cause = Cause::Lost { rank: self.rank(), how: Loss::Failed };
                self.shared.declare(id, cause);
                return io_error(format!("connect `{group}` to rank {peer}"))(failure);
            }
        };
        self.shared.declare(id, cause.clone());
        error(fate.await_agreement(id, AGREEMENT).unwrap_or(cause))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.shared.leave();
        self.shared.accounts.await_written();
    }
}

/// The end of `timeout`; one that is beyond the clock's range is as good as never.
fn deadline(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout.min(LONGEST)).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::thread;

    use super::*;
    use crate::store::MemoryStore;

    const LIMIT: Duration = Duration::from_secs(30);

    fn join(store: &MemoryStore, rank: usize, world_size: usize) -> Result<Arc<World>> {
        World::join(Join {
            store,
            prefix: "test".into(),
            rank,
            world_size,
            interface: Ipv4Addr::LOCALHOST.into(),
            timeout: LIMIT,
            patience: LIMIT,
            transport: Transport::Tcp,
            server: None,
            token: None,
        })
    }

    #[test]
    fn a_rank_that_dies_while_all_join_is_named_by_those_who_wait_for_it() {
        let store = &MemoryStore::new();
        let begin = Instant::now();
        thread::scope(|scope| {
            let survivors = [0, 1].map(|rank| {
                scope.spawn(move || join(store, rank, 3)?.links("world", &[0, 1, 2], LIMIT).map(drop))
            });
            // The last rank gets as far as its first connection.
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let (address, text) = (listener.local_addr().unwrap(), String::new);
            let card = Card { address, host: text(), pid: 1, node: text(), flight: -1, cores: Vec::new() };
            let nonce = store.get("test/1/nonce", LIMIT).unwrap();
            let nonce = u64::from_le_bytes(nonce.try_into().unwrap());
            let gate = Gate::new(nonce, 2, 3, None);
            let card = gate.sealed(&rmp_serde::to_vec_named(&card).unwrap());
            store.set("test/1/rank/2", &card).unwrap();
            let card = store.get("test/1/rank/0", LIMIT).unwrap();
            let card: Card = rmp_serde::from_slice(gate.unsealed(0, &card).unwrap()).unwrap();
            let mut control = TcpStream::connect(card.address).unwrap();
            gate.introduce(&mut control, Purpose::Control, 0, Instant::now() + LIMIT, || false).unwrap();
            drop(control);
            for survivor in survivors {
                let result = survivor.join().unwrap();
                assert!(
                    matches!(result, Err(Error::PeerLost { rank: 2, how: Loss::Died, .. })),
                    "{result:?}"
                );
            }
        });
        assert!(begin.elapsed() < LIMIT / 3, "{:?}", begin.elapsed());
    }

    #[test]
    fn a_rank_that_left_is_not_waited_for_by_those_who_make_a_group_with_it() {
        let store = &MemoryStore::new();
        let begin = Instant::now();
        thread::scope(|scope| {
            scope.spawn(move || join(store, 1, 2).map(drop).unwrap());
            let result = join(store, 0, 2).unwrap().links("world/0", &[0, 1], LIMIT).map(drop);
            assert!(matches!(result, Err(Error::PeerLost { rank: 1, how: Loss::Left, .. })), "{result:?}");
        });
        assert!(begin.elapsed() < LIMIT / 3, "{:?}", begin.elapsed());
    }

    #[test]
    fn a_connection_that_this_rank_cannot_open_is_not_blamed_on_its_peer() {
        let store = &MemoryStore::new();
        let mut worlds: Vec<_> = thread::scope(|scope| {
            let ranks = [0, 1].map(|rank| scope.spawn(move || join(store, rank, 2).unwrap()));
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        // The system refuses to connect to a broadcast address.
        let world = Arc::get_mut(&mut worlds[1]).unwrap();
        world.cards[0].address = (Ipv4Addr::BROADCAST, 1).into();
        let begin = Instant::now();
        thread::scope(|scope| {
            let other = scope.spawn(|| worlds[0].links("world/0", &[0, 1], LIMIT).map(drop));
            let result = worlds[1].links("world/0", &[0, 1], LIMIT).map(drop);
            assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
            let result = other.join().unwrap();
            let named = matches!(result, Err(Error::PeerLost { rank: 1, how: Loss::Failed, .. }));
            assert!(named, "{result:?}");
        });
        assert!(begin.elapsed() < LIMIT / 3, "{:?}", begin.elapsed());
    }
}
