//! How processes on the same cores divide them between their engines.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::{env, fs, process, thread};

use lightrft_collectives::{Communicator, CommunicatorExt};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// A process, and the cores that it may run on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Place {
    /// The machine, this boot of it, and its cores that the process is bound to; `None` where that cannot be told.
    cores: Option<String>,
    process: u32,
}

impl Place {
    fn mine() -> Self {
        let read = |file| fs::read_to_string(file).ok();
        let bound = read("/proc/self/status").and_then(|status| {
            status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:").map(|list| list.trim().to_owned()))
        });
        // Containers on one machine have the boot in common, their own names, and limits that only they know.
        let of = [read("/proc/sys/kernel/random/boot_id"), read("/proc/sys/kernel/hostname"), bound];
        let cores = of.into_iter().collect::<Option<Vec<String>>>().map(|parts| parts.join(" "));
        Self { cores, process: process::id() }
    }
}

/// The cores of this process, and how many engines draw on them at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cores {
    count: usize,
    engines: usize,
    /// `RAYON_NUM_THREADS` is set: whoever set it has divided the cores already.
    bounded: bool,
}

impl Cores {
    /// Finds the processes on the same cores. *Collective.*
    pub(crate) fn share(world: &dyn Communicator, holds_engine: bool) -> Result<Self> {
        let mine = Place::mine();
        let all: Vec<Option<Place>> = world.all_gather_object(&holds_engine.then(|| mine.clone()))?;
        Ok(Self {
            count: thread::available_parallelism().map_or(1, NonZeroUsize::get),
            engines: beside(&mine, &all),
            bounded: env::var_os("RAYON_NUM_THREADS").is_some(),
        })
    }

    /// Threads for an engine of this process, `None` for the pool that the process has anyway. More threads than cores gain
    /// nothing, and every product waits for the last of its threads.
    pub(crate) fn engine_threads(self) -> Option<NonZeroUsize> {
        if self.bounded || self.engines < 2 {
            return None;
        }
        NonZeroUsize::new((self.count / self.engines).max(1))
    }
}

/// Processes with engines on the same cores as `mine`. The ranks of one process have one pool in common.
fn beside(mine: &Place, engines: &[Option<Place>]) -> usize {
    let here = engines.iter().flatten().filter(|place| place.cores.is_some() && place.cores == mine.cores);
    here.map(|place| place.process).collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightrft_collectives::local::World;

    fn place(cores: &str, process: u32) -> Place {
        Place { cores: Some(cores.to_owned()), process }
    }

    #[test]
    fn engines_in_processes_of_their_own_on_the_same_cores_are_counted() {
        let engines = [("a", 1), ("a", 2), ("b", 1), ("a", 1), ("a", 3)].map(|(c, p)| Some(place(c, p)));
        assert_eq!(beside(&place("a", 2), &engines), 3, "two of them are in one process");
        assert_eq!(beside(&place("b", 1), &engines), 1, "another machine, or other cores of it");
        assert_eq!(beside(&place("a", 2), &[None, Some(place("a", 2)), None]), 1, "others share its engine");
        let unknown = Place { cores: None, process: 1 };
        assert_eq!(beside(&unknown, &[Some(unknown.clone()), Some(Place { cores: None, process: 2 })]), 0);
    }

    #[test]
    fn engines_on_the_same_cores_divide_them() {
        let threads = |count, engines, bounded| {
            Cores { count, engines, bounded }.engine_threads().map(NonZeroUsize::get)
        };
        assert_eq!(threads(16, 1, false), None, "alone: the pool of the process");
        assert_eq!(threads(16, 4, false), Some(4));
        assert_eq!(threads(2, 5, false), Some(1), "never none");
        assert_eq!(threads(16, 4, true), None, "as RAYON_NUM_THREADS says");
    }

    #[test]
    fn ranks_that_are_threads_keep_the_pool_of_their_process() {
        let all = World::new(3).launch(|world| Cores::share(&*world, true)).unwrap();
        assert!(all.iter().all(|cores| cores.engines <= 1 && cores.engine_threads().is_none()), "{all:?}");
    }
}
