//! The threads of a step.

use rayon::prelude::*;

/// Who computes.
#[derive(Debug, Default)]
pub(in super::super) enum Team {
    /// The rayon pool that the caller runs in, by default the global one: as many threads as it has.
    #[default]
    Ambient,
    /// A pool of the engine's own.
    Own(rayon::ThreadPool),
    /// The calling thread alone.
    Caller,
}

/// Multiply-adds below which waking another thread costs more than it saves.
const WORTH_SHARING: usize = 1 << 18;

impl Team {
    /// Runs `f` where [`Team::each`] reaches its threads without crossing from another pool every time.
    pub(in super::super) fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match self {
            // Of one thread, the caller is as good as the pool's.
            Team::Ambient if rayon::current_num_threads() > 1 => {
                // A scope runs on the pool that the caller belongs to, the global one if none.
                rayon::scope(|_| f())
            }
            Team::Own(pool) => pool.install(f),
            Team::Ambient | Team::Caller => f(),
        }
    }

    /// Threads that share the work of a step.
    pub(in super::super) fn threads(&self) -> usize {
        match self {
            Team::Ambient => rayon::current_num_threads(),
            Team::Own(pool) => pool.current_num_threads(),
            Team::Caller => 1,
        }
    }

    /// Does every job, `work` multiply-adds in all, with something of each thread's own made by `own`.
    pub(in super::super) fn each<J: Send, O: Send>(
        &self,
        work: usize,
        jobs: Vec<J>,
        own: impl Fn() -> O + Sync + Send,
        f: impl Fn(&mut O, J) + Sync + Send,
    ) {
        if work < WORTH_SHARING || self.threads() == 1 {
            let mut own = own();
            jobs.into_iter().for_each(|job| f(&mut own, job));
        } else {
            // Pieces small enough that a thread which was held up leaves little to wait for.
            let most = (jobs.len() / (8 * self.threads())).max(1);
            jobs.into_par_iter().with_max_len(most).for_each_init(own, f);
        }
    }
}
