//! Who a process is among the ranks of a job, read from the variables that whoever started it has set

use super::{mpi, slurm, wrong};
use crate::error::Result;

/// The largest world: every rank is connected to every other, and a port has 16 bits.
const MAX_WORLD: usize = 1 << 16;

/// Where the ranks of one machine meet, unless they are told another place.
pub(super) const THIS_MACHINE: &str = "127.0.0.1";

/// Ports for jobs that name none: 10,000 of them, below those that Linux gives to outgoing connections.
const FIRST_PORT: u16 = 15_000;

/// Whose variables say who a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// Nobody's: the world is this process alone.
    Alone,
    /// `RANK`, `WORLD_SIZE` and the rest of torchrun's, which [`launch`](crate::launch) sets too; or a URL that says so.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// Slurm's `srun`.
    Slurm,
}

/// A process's place in its job.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) source: Source,
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) local_rank: usize,
    pub(super) local_world_size: usize,
    /// Where the store is; none for a program that runs alone.
    pub(super) master: Option<(String, u16)>,
    /// Unlike another job's, or another attempt's at this one.
    pub(super) job: String,
    /// Known to be so: where it is only likely, ranks of other machines may come.
    pub(super) is_one_machine: bool,
    /// The store is served by torchrun's agent, or by our launcher.
    pub(super) has_agent_store: bool,
}

/// Reads variables, naming each that is missing or malformed.
pub(super) struct Variables<'a>(pub(super) &'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    pub(super) fn get(&self, variable: &str) -> Option<String> {
        (self.0)(variable)
    }

    pub(super) fn is_set(&self, variable: &str) -> bool {
        self.get(variable).is_some()
    }

    /// The first of these variables that is set.
    pub(super) fn first(&self, variables: &[&'static str]) -> Option<&'static str> {
        variables.iter().copied().find(|variable| self.is_set(variable))
    }

    pub(super) fn text(&self, variable: &'static str, expected: &str) -> Result<String> {
        let value = self.get(variable).filter(|value| !value.is_empty());
        value.ok_or_else(|| wrong(variable, "not set".into(), expected))
    }

    fn number(&self, variable: &'static str, expected: &str, fits: impl Fn(usize) -> bool) -> Result<usize> {
        let text = self.text(variable, expected)?;
        let number = text.trim().parse().ok().filter(|n| fits(*n));
        number.ok_or_else(|| wrong(variable, format!("`{text}`"), expected))
    }

    /// Number of ranks in the world.
    pub(super) fn world(&self, variable: &'static str) -> Result<usize> {
        self.number(variable, "a number of ranks from 1 to 65536", |n| (1..=MAX_WORLD).contains(&n))
    }

    /// A number below `limit`, which `limit_name` has set.
    pub(super) fn below(&self, variable: &'static str, limit_name: &str, limit: usize) -> Result<usize> {
        self.number(variable, &format!("a number less than {limit_name} ({limit})"), |n| n < limit)
    }

    /// A number from 1 to `limit`, which `limit_name` has set.
    pub(super) fn up_to(&self, variable: &'static str, limit_name: &str, limit: usize) -> Result<usize> {
        let expected = format!("a number from 1 to {limit_name} ({limit})");
        self.number(variable, &expected, |n| (1..=limit).contains(&n))
    }

    /// `MASTER_ADDR` and `MASTER_PORT`, or what takes their place where they are not set.
    pub(super) fn master(
        &self,
        address: impl FnOnce() -> Result<Option<String>>,
        port: impl FnOnce() -> Option<u16>,
    ) -> Result<(String, u16)> {
        let known = if self.is_set("MASTER_ADDR") { None } else { address()? };
        let address = match known {
            Some(address) => address,
            None => self.text("MASTER_ADDR", "the address of rank 0's machine")?,
        };
        let known = if self.is_set("MASTER_PORT") { None } else { port() };
        let in_range = |n| (1..=usize::from(u16::MAX)).contains(&n);
        let port = match known {
            Some(port) => port,
            None => self.number("MASTER_PORT", "a port from 1 to 65535", in_range)? as u16,
        };
        Ok((address, port))
    }
}

/// A port that the ranks of a job agree on without being told: 15000 to 24999.
pub(super) fn port_of_job(number: u64) -> u16 {
    FIRST_PORT + (number % 10_000) as u16
}

impl Place {
    /// Of the sources that have set their variables the first counts: torchrun, Open MPI, Slurm. Each of them may have
    /// started the one before it.
    pub(super) fn of(variables: &Variables<'_>) -> Result<Self> {
        let mut place = if variables.is_set("RANK") || variables.is_set("WORLD_SIZE") {
            Self::torchrun(variables)?
        } else if mpi::is_set(variables) {
            mpi::place(variables)?
        } else if slurm::is_set(variables) {
            slurm::place(variables)?
        } else {
            Self::alone()
        };
        let agent = variables.get("TORCHELASTIC_USE_AGENT_STORE");
        // Of a torchrun further out where another has started the ranks.
        place.has_agent_store = place.source == Source::Torchrun
            && agent.is_some_and(|value| value.trim().eq_ignore_ascii_case("true"));
        Ok(place)
    }

    fn alone() -> Self {
        Place {
            source: Source::Alone,
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            master: None,
            job: String::new(),
            is_one_machine: true,
            has_agent_store: false,
        }
    }

    fn torchrun(variables: &Variables<'_>) -> Result<Self> {
        let world_size = variables.world("WORLD_SIZE")?;
        let rank = variables.below("RANK", "WORLD_SIZE", world_size)?;
        let is_told = variables.is_set("LOCAL_WORLD_SIZE");
        let local_world_size =
            if is_told { variables.up_to("LOCAL_WORLD_SIZE", "WORLD_SIZE", world_size)? } else { world_size };
        let local_rank = if variables.is_set("LOCAL_RANK") {
            variables.below("LOCAL_RANK", "LOCAL_WORLD_SIZE", local_world_size)?
        } else {
            rank % local_world_size
        };
        let master = if world_size > 1 { Some(variables.master(|| Ok(None), || None)?) } else { None };
        let part = |name| variables.get(name).unwrap_or_else(|| "0".into());
        Ok(Place {
            source: Source::Torchrun,
            rank,
            world_size,
            local_rank,
            local_world_size,
            master,
            job: format!("{}/{}", part("TORCHELASTIC_RUN_ID"), part("TORCHELASTIC_RESTART_COUNT")),
            is_one_machine: is_told && local_world_size == world_size,
            has_agent_store: false,
        })
    }
}
