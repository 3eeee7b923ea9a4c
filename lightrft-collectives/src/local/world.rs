//! Runs a function once per rank, each on its own thread

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::Local;
use super::board::{Board, Fates};
use crate::communicator::Communicator;
use crate::error::{Error, Loss, Result};
use crate::queue::message;
use crate::single::Single;

/// A world whose ranks are threads of this process.
#[derive(Clone, Debug)]
pub struct World {
    ranks: usize,
    timeout: Duration,
}

impl World {
    /// A world of `ranks` ranks (at least one) with LightRFT's 60 minutes as the deadline of every wait.
    pub fn new(ranks: usize) -> Self {
        World { ranks: ranks.max(1), timeout: crate::DEFAULT_TIMEOUT }
    }

    /// Sets the deadline of every wait.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        World { timeout, ..self }
    }

    /// Runs `rank_main` on `ranks` ranks and returns their values in rank order.
    ///
    /// # Errors
    /// That of the rank that failed first. A rank that fails or panics poisons the groups that it is in, so the others end
    /// too, unless they [rebuild](Communicator::rebuild) those without it.
    pub fn run<T: Send>(
        ranks: usize,
        rank_main: impl Fn(Arc<dyn Communicator>) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        World::new(ranks).launch(rank_main)
    }

    /// As [`World::run`], with this world's settings and the caller's own error type.
    ///
    /// # Errors
    /// That of the rank that failed first.
    pub fn launch<T: Send, E: From<Error> + Send>(
        &self,
        rank_main: impl Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
    ) -> Result<Vec<T>, E> {
        let board =
            Board::new("world".into(), (0..self.ranks).collect(), self.timeout, Arc::new(Fates::default()));
        let (ended, ends) = mpsc::channel();
        thread::scope(|scope| {
            for rank in 0..self.ranks {
                let (board, ended, rank_main) = (board.clone(), ended.clone(), &rank_main);
                let single = self.ranks == 1;
                let (lost, unstarted) = (board.clone(), ended.clone());
                let started = thread::Builder::new().spawn_scoped(scope, move || {
                    let comm: Arc<dyn Communicator> = match single {
                        true => Single::world(),
                        false => Local::new(board.clone(), rank, Arc::default()),
                    };
                    let result = catch_unwind(AssertUnwindSafe(|| rank_main(comm))).unwrap_or_else(|panic| {
                        Err(Error::Panicked { rank, message: message(&*panic) }.into())
                    });
                    // The result goes first: whoever fails because of this rank comes after it.
                    let how = if result.is_ok() { Loss::Left } else { Loss::Failed };
                    let _ = ended.send((rank, result));
                    board.lose(rank, how);
                });
                if let Err(source) = started {
                    let doing = format!("start the thread of rank {rank}");
                    let _ = unstarted.send((rank, Err(Error::Io { doing, source: Arc::new(source) }.into())));
                    // Those that run already must not wait for it.
                    lost.lose(rank, Loss::Failed);
                    break;
                }
            }
        });
        drop(ended);
        let mut values: Vec<Option<T>> = (0..self.ranks).map(|_| None).collect();
        for (rank, result) in ends {
            values[rank] = Some(result?);
        }
        // Every rank sends exactly one result before its thread ends, so none is missing here.
        Ok(values.into_iter().flatten().collect())
    }
}
