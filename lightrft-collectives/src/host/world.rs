//! A world of processes: connections to all other ranks, and the watcher behind them

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Transport;
use super::exchange::Links;
use super::fate::Alarm;
use super::watcher::{Shared, Watcher};
use super::wire::{Cause, Hello, Purpose};
use crate::error::{Error, Result};
use crate::operation::{Call, digest};
use crate::store::{Store, StoreServer};

/// What each rank publishes in the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Card {
    pub(super) address: SocketAddr,
    /// Equal for ranks that can share memory; see [`host_identity`].
    pub(super) host: String,
    pub(super) pid: u32,
}

/// One rank's place among the processes of a job. Shared by its groups; the last to go says goodbye.
#[derive(Debug)]
pub(super) struct World {
    pub(super) shared: Arc<Shared>,
    pub(super) cards: Vec<Card>,
    pub(super) transport: Transport,
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
    pub(crate) transport: Transport,
    pub(crate) server: Option<StoreServer>,
}

/// The name of this kernel and process namespace: ranks with the same one can open each other's memory files.
fn host_identity() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let uid = rustix::process::getuid().as_raw();
    format!("{}/{}/{uid}", boot.trim(), namespace.display())
}

/// An id for a group that all its members derive from its name, which is unique in a world.
pub(super) fn group_id(name: &str) -> u64 {
    digest(name.bytes().map(usize::from))
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let doing = doing.into();
    |source| Error::Io { doing, source: Arc::new(source) }
}

impl World {
    /// Meets all other ranks through the store and opens a control connection to each.
    pub(super) fn join(join: Join<'_>) -> Result<Arc<World>> {
        let begin = Instant::now();
        let Join { store, prefix, rank, world_size, .. } = join;
        let rest = || join.timeout.saturating_sub(begin.elapsed());
        let own = SocketAddr::new(join.interface, 0);
        let listener = TcpListener::bind(own)
            .map_err(|source| Error::Bind { address: own, source: Arc::new(source) })?;
        let address = listener.local_addr().map_err(io_error("read the address of a listener"))?;

        let nonce_key = format!("{prefix}/nonce");
        if rank == 0 {
            store.set(&nonce_key, &random().to_le_bytes())?;
        }
        let bytes = store.get(&nonce_key, rest())?;
        let nonce = u64::from_le_bytes(bytes.as_slice().try_into().map_err(|_| Error::Protocol {
            rank: 0,
            got: format!("a nonce of {} bytes", bytes.len()),
            expected: "8".into(),
        })?);

        let shared = Shared::new(rank, world_size, nonce).map_err(io_error("make an event descriptor"))?;
        Watcher::start(shared.clone(), listener, world_size).map_err(io_error("start the watcher"))?;
        // From here on a failure drops this world, which ends the watcher.
        let mut world = World { shared, cards: Vec::new(), transport: join.transport, _server: join.server };

        let card = Card { address, host: host_identity(), pid: std::process::id() };
        let key = |rank: usize| format!("{prefix}/rank/{rank}");
        let bytes = rmp_serde::to_vec_named(&card).unwrap_or_default();
        store.set(&key(rank), &bytes)?;
        for peer in 0..world_size {
            let bytes = store.get(&key(peer), rest())?;
            world.cards.push(rmp_serde::from_slice(&bytes).map_err(|e| Error::Protocol {
                rank: peer,
                got: format!("a card of {} bytes ({e})", bytes.len()),
                expected: "address, host and pid of a rank".into(),
            })?);
        }
        let everyone: Vec<usize> = (0..world_size).collect();
        for (peer, stream) in
            world.connect(Purpose::Control, "world", &everyone, rest())?.into_iter().enumerate()
        {
            if let Some(stream) = stream {
                stream.set_nodelay(true).map_err(io_error("set a socket option"))?;
                world.shared.watch(peer, stream).map_err(io_error("set a socket option"))?;
            }
        }
        Ok(Arc::new(world))
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
        let alarm = self.shared.fate.alarm(id).map_err(io_error("make an event descriptor"))?;
        let streams = self.connect(Purpose::Data(id), name, ranks, timeout)?;
        let links = Links::new(id, streams).map_err(io_error("set a socket option"))?;
        Ok((links, alarm))
    }

    /// A connection to each other rank in `ranks` (of the world), by place in the list: to those before this rank by
    /// connecting, to those after it by waiting for theirs.
    fn connect(
        &self,
        purpose: Purpose,
        group: &str,
        ranks: &[usize],
        timeout: Duration,
    ) -> Result<Vec<Option<TcpStream>>> {
        let begin = Instant::now();
        let hello = Hello { nonce: self.shared.nonce, purpose, from: self.rank() }.encode();
        let mut after_me = false;
        let mut streams = Vec::with_capacity(ranks.len());
        for &peer in ranks {
            if peer == self.rank() {
                after_me = true;
                streams.push(None);
                continue;
            }
            let rest = timeout.saturating_sub(begin.elapsed());
            let stream = if after_me {
                self.await_connection(purpose, peer, rest)
            } else {
                let address = self.cards[peer].address;
                let connected = TcpStream::connect_timeout(&address, rest.max(Duration::from_millis(1)));
                connected.and_then(|mut s| s.write_all(&hello).map(|()| s)).ok()
            };
            let Some(stream) = stream else {
                return Err(self.not_connected(purpose, group, peer, timeout));
            };
            streams.push(Some(stream));
        }
        Ok(streams)
    }

    /// Waits in short turns, so that a rank that died is not waited for.
    fn await_connection(&self, purpose: Purpose, peer: usize, timeout: Duration) -> Option<TcpStream> {
        let begin = Instant::now();
        loop {
            let rest = timeout.saturating_sub(begin.elapsed());
            let taken = self.shared.take(purpose, peer, rest.min(Duration::from_millis(50)));
            if taken.is_some() || rest.is_zero() || self.shared.fate.cause(0).is_some() {
                return taken;
            }
        }
    }

    fn not_connected(&self, purpose: Purpose, group: &str, peer: usize, waited: Duration) -> Error {
        let id = if let Purpose::Data(id) = purpose { id } else { 0 };
        let cause = self.shared.fate.await_cause(id, peer, Duration::from_secs(1));
        cause.unwrap_or(Cause::Timeout { waited, missing: vec![peer] }).error(Call::Subgroup, group)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.shared.leave();
    }
}

/// A number that another job does not have: the standard library seeds each hasher from the system's entropy.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}
