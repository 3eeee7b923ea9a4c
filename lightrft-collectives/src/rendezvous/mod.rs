//! How ranks find each other: who a process is, where all meet, and what they prove to each other

mod mpi;
mod place;
mod slurm;
mod url;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use self::place::{Place, Variables};
use self::url::Told;
use crate::auth::{TOKEN_VARIABLE, Token};
use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::host::{Join, Transport, join};
use crate::single::Single;
use crate::site;
use crate::store::{StoreServer, TcpStore};

pub use self::place::Source;

/// How long ranks wait for each other to start, unless told otherwise: as torch's store.
const JOIN_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a call waits before it says for whom, unless told otherwise.
const REPORT_AFTER: Duration = Duration::from_secs(10);

/// The variable that says that whoever reaches the ranks is one of them.
const TRUST_VARIABLE: &str = "LIGHTRFT_TRUST_NETWORK";

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
///
/// # Who may take part
///
/// Rank 0's store and all ranks listen on the interface through which they meet, and on no other. Ranks that meet beyond this
/// machine must have a [`token`](Rendezvous::token), or the user's word that the network may be trusted
/// ([`trust_network`](Rendezvous::trust_network)); else [`init`](Rendezvous::init) is an error. With a token every
/// connection between ranks begins with a proof of it on both sides, also within a machine. What follows is not
/// encrypted.
///
/// The store speaks torch's protocol, which has no room for a token. It holds a number that tells jobs apart and where each
/// rank listens, sealed with the token so that nobody else can write it. Who reaches the store can still disturb a
/// job, though not take part in it; against that there is the [`strict_store`](Rendezvous::strict_store).
#[derive(Clone, Debug)]
pub struct Rendezvous {
    place: Place,
    timeout: Duration,
    join_timeout: Duration,
    report_after: Duration,
    transport: Transport,
    token: Option<Token>,
    trust: Trust,
    store: StoreMode,
}

/// What is known of those who can reach the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    Nothing,
    Network,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StoreMode {
    /// For torch's clients as well.
    Plain,
    Strict,
}

impl Rendezvous {
    /// Reads who this process is from the environment.
    ///
    /// Three kinds of launchers are known. If several have set their variables, the first in this list counts, as each of
    /// them may have been started by the next:
    ///
    /// | launcher | rank and world | local rank and world |
    /// |---|---|---|
    /// | torchrun, [`Launcher`] | `RANK`, `WORLD_SIZE` | `LOCAL_RANK`, `LOCAL_WORLD_SIZE` |
    /// | Open MPI | `OMPI_COMM_WORLD_RANK`, `…_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK`, `…_LOCAL_SIZE` |
    /// | Slurm | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` or `SLURM_NTASKS` | `SLURM_LOCALID`, `SLURM_STEP_TASKS_PER_NODE` at `SLURM_NODEID`, or `SLURM_NTASKS_PER_NODE` |
    ///
    /// With none, the world is this process alone; so is a batch script of Slurm, which is no task of a step. Torchrun's
    /// local variables may be missing; all ranks are then taken to be on this machine.
    ///
    /// All meet at `MASTER_ADDR` and `MASTER_PORT`. Under torchrun and [`Launcher`] these must be set, and the store there
    /// is theirs if `TORCHELASTIC_USE_AGENT_STORE` is `True`. Under the others they may be missing:
    /// - the address is then 127.0.0.1 if all ranks are on one machine; else, under Slurm, the first host of
    ///   `SLURM_STEP_NODELIST` or `SLURM_JOB_NODELIST`, and under Open MPI 4, the machine of `mpirun`
    ///   (`OMPI_MCA_orte_hnp_uri`), which must then be rank 0's. Later versions do not tell; set `MASTER_ADDR`;
    /// - the port is 15000 plus the last four digits of `SLURM_JOB_ID`, as in PyTorch Lightning, or a number below 25000
    ///   made from the name of Open MPI's job. Steps that run side by side in one Slurm job need `MASTER_PORT`.
    ///
    /// `LIGHTRFT_TOKEN` holds the job's token, and `LIGHTRFT_TRUST_NETWORK=1` says that there need be none.
    ///
    /// [`Launcher`]: crate::launch::Launcher
    ///
    /// # Errors
    /// [`Error::Environment`] naming the variable that is missing, malformed, out of range, or contradicts another.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As [`from_env`](Rendezvous::from_env), from variables given by `variable`.
    ///
    /// # Errors
    /// As [`from_env`](Rendezvous::from_env).
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let place = Place::of(&Variables(&variable))?;
        let secret = variable(TOKEN_VARIABLE).filter(|secret| !secret.is_empty());
        let trust = match variable(TRUST_VARIABLE).as_deref().map(str::trim) {
            None | Some("" | "0") => Trust::Nothing,
            Some("1") => Trust::Network,
            Some(other) => return Err(wrong(TRUST_VARIABLE, format!("`{other}`"), "0 or 1")),
        };
        Ok(Rendezvous {
            place,
            timeout: crate::DEFAULT_TIMEOUT,
            join_timeout: JOIN_TIMEOUT,
            report_after: REPORT_AFTER,
            transport: Transport::Auto,
            token: secret.map(Token::new).transpose()?,
            trust,
            store: StoreMode::Plain,
        })
    }

    /// Reads a URL as torch's `init_process_group` takes it: `env://`, which is [`from_env`](Rendezvous::from_env), or
    /// `tcp://host:port`, where rank 0 serves the store. Either may say `?rank=0&world_size=2`. What a URL says takes the
    /// place of `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`; the environment says the rest.
    ///
    /// # Errors
    /// [`Error::Url`] for another URL, and those of [`from_env`](Rendezvous::from_env).
    pub fn from_url(url: &str) -> Result<Self> {
        Self::told(&Told::by(url, None)?)
    }

    /// As [`from_url`](Rendezvous::from_url), with the rank and the number of ranks beside the URL. If the URL has them
    /// too, they must be the same.
    ///
    /// # Errors
    /// As [`from_url`](Rendezvous::from_url).
    pub fn from_url_as(url: &str, rank: usize, world_size: usize) -> Result<Self> {
        Self::told(&Told::by(url, Some((rank, world_size)))?)
    }

    fn told(told: &Told) -> Result<Self> {
        Self::from_variables(|name| told.variable(name).or_else(|| std::env::var(name).ok()))
    }

    /// Whose variables said who this process is.
    pub fn source(&self) -> Source {
        self.place.source
    }

    /// This process's rank in the world.
    pub fn rank(&self) -> usize {
        self.place.rank
    }

    /// Number of ranks in the world.
    pub fn world_size(&self) -> usize {
        self.place.world_size
    }

    /// This process's rank among those of its machine; usually the ordinal of its GPU.
    pub fn local_rank(&self) -> usize {
        self.place.local_rank
    }

    /// Number of ranks on this machine.
    pub fn local_world_size(&self) -> usize {
        self.place.local_world_size
    }

    /// Host and port where the ranks meet; `None` for a program that runs alone.
    pub fn master(&self) -> Option<(&str, u16)> {
        self.place.master.as_ref().map(|(host, port)| (host.as_str(), *port))
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

    /// Sets how long a call waits for others before it logs who has not come and what they do instead; 10 s by default. It
    /// does so again after twice that time, and so on.
    #[must_use]
    pub fn report_after(self, report_after: Duration) -> Self {
        Rendezvous { report_after, ..self }
    }

    /// Sets how the ranks of each group exchange data. The same on all ranks.
    #[must_use]
    pub fn transport(self, transport: Transport) -> Self {
        Rendezvous { transport, ..self }
    }

    /// Sets what ranks prove to each other, in place of `LIGHTRFT_TOKEN`. The same on all ranks.
    #[must_use]
    pub fn token(self, token: Token) -> Self {
        Rendezvous { token: Some(token), ..self }
    }

    /// Says that nobody can reach the ranks' network who must not take part, as `LIGHTRFT_TRUST_NETWORK=1` does. A token is
    /// then not needed; if there is one, it is asked for all the same.
    #[must_use]
    pub fn trust_network(self) -> Self {
        Rendezvous { trust: Trust::Network, ..self }
    }

    /// Has rank 0's store ask for the token too, before the first request. Torch's clients can then not use it, and it
    /// cannot be torchrun's. The same on all ranks.
    #[must_use]
    pub fn strict_store(self) -> Self {
        Rendezvous { store: StoreMode::Strict, ..self }
    }

    /// Meets the other ranks and returns the group of all of them.
    ///
    /// Rank 0 serves the store at `MASTER_ADDR:MASTER_PORT`, unless torchrun's agent does. All listeners are bound to the
    /// interface that leads there. Drop the communicator before the process ends: that says goodbye,
    /// and an end without a goodbye counts as a death.
    ///
    /// # Errors
    /// [`Error::Bind`] if the store's port is taken, [`Error::Store`] or [`Error::StoreTimeout`] if ranks do not
    /// meet in time, [`Error::PeerLost`] if one dies meanwhile. [`Error::Environment`] naming `LIGHTRFT_TOKEN` if ranks
    /// would meet beyond this machine without a token, [`Error::Token`] if one has another token.
    #[track_caller]
    pub fn init(&self) -> Result<Arc<dyn Communicator>> {
        let _site = site::mark();
        let Some((host, port)) = &self.place.master else { return Ok(Single::world()) };
        let strict = match (self.store, &self.token) {
            (StoreMode::Plain, _) => None,
            (StoreMode::Strict, Some(token)) => Some(token),
            (StoreMode::Strict, None) => {
                return Err(wrong(
                    TOKEN_VARIABLE,
                    "not set".into(),
                    "a token, for a strict store asks for one",
                ));
            }
        };
        let agent_store = self.place.has_agent_store;
        if strict.is_some() && agent_store {
            let expected = "False: the launcher's store speaks torch's protocol and asks for no token";
            return Err(wrong("TORCHELASTIC_USE_AGENT_STORE", "True".into(), expected));
        }
        let server = if self.place.rank == 0 && !agent_store {
            let address = resolve(host, *port)?;
            self.check_exposure(address.ip())?;
            Some(match strict {
                None => StoreServer::bind(address)?,
                Some(token) => StoreServer::bind_strict(address, token)?,
            })
        } else {
            None
        };
        let store = match strict {
            None => TcpStore::connect(host, *port, self.join_timeout)?,
            Some(token) => TcpStore::connect_strict(host, *port, token, self.join_timeout)?,
        };
        let interface = match store.local_address().ip().to_canonical() {
            // Torchrun names its machine also to those who need not leave it.
            _ if self.place.is_one_machine && agent_store => IpAddr::V4(Ipv4Addr::LOCALHOST),
            interface => interface,
        };
        self.check_exposure(interface)?;
        let request = Join {
            store: &store,
            prefix: format!("lightrft/{}", self.place.job),
            rank: self.place.rank,
            world_size: self.place.world_size,
            interface,
            timeout: self.join_timeout,
            patience: self.report_after,
            transport: self.transport,
            server,
            token: self.token.clone(),
        };
        join(request, self.timeout)
    }

    /// Beyond this machine a token is asked for.
    fn check_exposure(&self, interface: IpAddr) -> Result<()> {
        let is_safe = interface.to_canonical().is_loopback();
        if is_safe || self.token.is_some() || self.trust == Trust::Network {
            return Ok(());
        }
        let expected = format!(
            "the same secret on all ranks, for they meet at {interface}, beyond this machine (make one with `openssl rand \
             -hex 32`); or {TRUST_VARIABLE}=1 where nobody else can reach that address"
        );
        Err(wrong(TOKEN_VARIABLE, "not set".into(), &expected))
    }
}

fn wrong(variable: &'static str, got: String, expected: &str) -> Error {
    Error::Environment { variable, got, expected: expected.into() }
}

/// The address to listen on; IPv4 first where a name has both, as most clients try it first.
fn resolve(host: &str, port: u16) -> Result<SocketAddr> {
    let expected = "the address of rank 0's machine";
    let unknown = |e: std::io::Error| wrong("MASTER_ADDR", format!("`{host}` ({e})"), expected);
    let mut addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(unknown)?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.first().copied().ok_or_else(|| wrong("MASTER_ADDR", format!("`{host}`"), expected))
}
