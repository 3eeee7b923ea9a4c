//! How ranks find each other: the variables that torchrun and our launcher set

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::host::{Join, Transport, join};
use crate::single::Single;
use crate::store::{StoreServer, TcpStore};

/// How long ranks wait for each other to start, unless told otherwise: as torch's store.
const JOIN_TIMEOUT: Duration = Duration::from_secs(300);

/// The largest world: every rank is connected to every other, and a port has 16 bits.
const MAX_WORLD: usize = 1 << 16;

/// Who this process is among the ranks of a job, and where they meet.
///
/// ```
/// use lightrft_collectives::Rendezvous;
///
/// // Without any variable a program is a world of one rank.
/// let alone = Rendezvous::from_variables(|_| None)?.init()?;
/// assert_eq!((alone.rank(), alone.world_size()), (0, 1));
/// # Ok::<_, lightrft_collectives::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rendezvous {
    rank: usize,
    world_size: usize,
    local_rank: usize,
    local_world_size: usize,
    /// Where the store is; none for a program that runs alone.
    master: Option<(String, u16)>,
    agent_store: bool,
    prefix: String,
    timeout: Duration,
    join_timeout: Duration,
    transport: Transport,
}

/// Reads variables, naming each that is missing or malformed.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn text(&self, variable: &'static str, expected: &str) -> Result<String> {
        let value = (self.0)(variable).filter(|value| !value.is_empty());
        value.ok_or_else(|| wrong(variable, "not set".into(), expected))
    }

    fn number(&self, variable: &'static str, expected: &str, fits: impl Fn(usize) -> bool) -> Result<usize> {
        let text = self.text(variable, expected)?;
        let number = text.trim().parse().ok().filter(|n| fits(*n));
        number.ok_or_else(|| wrong(variable, format!("`{text}`"), expected))
    }

    fn is_set(&self, variable: &str) -> bool {
        (self.0)(variable).is_some()
    }
}

fn wrong(variable: &'static str, got: String, expected: &str) -> Error {
    Error::Environment { variable, got, expected: expected.into() }
}

impl Rendezvous {
    /// Reads `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` and, under
    /// torchrun, `TORCHELASTIC_USE_AGENT_STORE`, `TORCHELASTIC_RUN_ID` and `TORCHELASTIC_RESTART_COUNT`.
    ///
    /// With neither `RANK` nor `WORLD_SIZE` set, the world is this process alone. `LOCAL_RANK` and
    /// `LOCAL_WORLD_SIZE` may be missing; all ranks are then taken to be on this machine.
    ///
    /// # Errors
    /// [`Error::Environment`] naming the variable that is missing, malformed or out of range.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As [`from_env`](Rendezvous::from_env), from variables given by `variable`.
    ///
    /// # Errors
    /// As [`from_env`](Rendezvous::from_env).
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variables = Variables(&variable);
        let mut rendezvous = Rendezvous {
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            master: None,
            agent_store: false,
            prefix: String::new(),
            timeout: crate::DEFAULT_TIMEOUT,
            join_timeout: JOIN_TIMEOUT,
            transport: Transport::Auto,
        };
        if !variables.is_set("RANK") && !variables.is_set("WORLD_SIZE") {
            return Ok(rendezvous);
        }
        let world = variables
            .number("WORLD_SIZE", "a number of ranks from 1 to 65536", |n| (1..=MAX_WORLD).contains(&n))?;
        let rank =
            variables.number("RANK", &format!("a number less than WORLD_SIZE ({world})"), |n| n < world)?;
        let mut local = (rank, world);
        if variables.is_set("LOCAL_WORLD_SIZE") {
            let expected = format!("a number from 1 to WORLD_SIZE ({world})");
            local.1 = variables.number("LOCAL_WORLD_SIZE", &expected, |n| (1..=world).contains(&n))?;
        }
        if variables.is_set("LOCAL_RANK") {
            let expected = format!("a number less than LOCAL_WORLD_SIZE ({})", local.1);
            local.0 = variables.number("LOCAL_RANK", &expected, |n| n < local.1)?;
        } else {
            local.0 = rank % local.1;
        }
        (rendezvous.rank, rendezvous.world_size) = (rank, world);
        (rendezvous.local_rank, rendezvous.local_world_size) = local;
        if world > 1 {
            let address = variables.text("MASTER_ADDR", "the address of rank 0's machine")?;
            let in_range = |n| (1..=usize::from(u16::MAX)).contains(&n);
            let port = variables.number("MASTER_PORT", "a port from 1 to 65535", in_range)?;
            rendezvous.master = Some((address, port as u16));
        }
        let agent = variable("TORCHELASTIC_USE_AGENT_STORE");
        rendezvous.agent_store = agent.is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let part = |name| variable(name).unwrap_or_else(|| "0".into());
        rendezvous.prefix =
            format!("lightrft/{}/{}", part("TORCHELASTIC_RUN_ID"), part("TORCHELASTIC_RESTART_COUNT"));
        Ok(rendezvous)
    }

    /// This process's rank in the world.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks in the world.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// This process's rank among those of its machine; usually the ordinal of its GPU.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// Number of ranks on this machine.
    pub fn local_world_size(&self) -> usize {
        self.local_world_size
    }

    /// Sets how long a call may wait for a slow rank; 60 minutes by default.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Rendezvous { timeout, ..self }
    }

    /// Sets how long ranks wait for each other to start; 5 minutes by default.
    #[must_use]
    pub fn join_timeout(self, join_timeout: Duration) -> Self {
        Rendezvous { join_timeout, ..self }
    }

    /// Sets how the ranks of each group exchange data. The same on all ranks.
    #[must_use]
    pub fn transport(self, transport: Transport) -> Self {
        Rendezvous { transport, ..self }
    }

    /// Meets the other ranks and returns the group of all of them.
    ///
    /// Rank 0 serves the store at `MASTER_ADDR:MASTER_PORT`, unless torchrun's agent does. All listeners are bound to the
    /// interface that leads there. Drop the communicator before the process ends: that says goodbye,
    /// and an end without a goodbye counts as a death.
    ///
    /// # Errors
    /// [`Error::Bind`] if the store's port is taken, [`Error::Store`] or [`Error::StoreTimeout`] if ranks do not
    /// meet in time, [`Error::PeerLost`] if one dies meanwhile.
    pub fn init(&self) -> Result<Arc<dyn Communicator>> {
        let Some((host, port)) = &self.master else { return Ok(Single::world()) };
        let server = if self.rank == 0 && !self.agent_store {
            Some(StoreServer::bind(resolve(host, *port)?)?)
        } else {
            None
        };
        let store = TcpStore::connect(host, *port, self.join_timeout)?;
        let request = Join {
            store: &store,
            prefix: self.prefix.clone(),
            rank: self.rank,
            world_size: self.world_size,
            interface: store.local_address().ip(),
            timeout: self.join_timeout,
            transport: self.transport,
            server,
        };
        join(request, self.timeout)
    }
}

/// The address to listen on; IPv4 first where a name has both, as most clients try it first.
fn resolve(host: &str, port: u16) -> Result<SocketAddr> {
    let expected = "the address of rank 0's machine";
    let unknown = |e: std::io::Error| wrong("MASTER_ADDR", format!("`{host}` ({e})"), expected);
    let mut addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(unknown)?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.first().copied().ok_or_else(|| wrong("MASTER_ADDR", format!("`{host}`"), expected))
}
