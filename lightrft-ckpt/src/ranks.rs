//! Ranks as threads of one process, with the deadline and the poisoning that a real group has.

use std::error::Error as StdError;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::agreement::Agreement;

/// One rank of a group of threads.
#[derive(Debug)]
#[cfg_attr(not(feature = "testing"), allow(unreachable_pub))]
pub struct RankThread {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    round: Mutex<Round>,
    changed: Condvar,
    world_size: usize,
    deadline: Duration,
}

#[derive(Debug, Default)]
struct Round {
    /// What each rank has said in the round that is under way.
    said: Vec<Option<Vec<u8>>>,
    /// What all said in the round before, and how many rounds there were.
    heard: Arc<Vec<Vec<u8>>>,
    rounds: u64,
    /// The first rank that left, or that waited in vain.
    lost: Option<String>,
}

impl Shared {
    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agreement for RankThread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.shared.world_size
    }

    fn exchange(&self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Box<dyn StdError + Send + Sync>> {
        let until = Instant::now() + self.shared.deadline;
        let mut round = self.shared.round();
        // What a rank said that has given up waiting must not complete a later round.
        if let Some(lost) = &round.lost {
            return Err(lost.clone().into());
        }
        let this = round.rounds;
        round.said[self.rank] = Some(mine);
        if round.said.iter().all(Option::is_some) {
            let heard = round.said.iter_mut().filter_map(Option::take).collect();
            round.heard = Arc::new(heard);
            round.rounds += 1;
            self.shared.changed.notify_all();
        }
        while round.rounds == this {
            if let Some(lost) = &round.lost {
                return Err(lost.clone().into());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let lost = format!("rank {} waited {:?} for the others", self.rank, self.shared.deadline);
                round.lost = Some(lost.clone());
                self.shared.changed.notify_all();
                return Err(lost.into());
            }
            round = self.shared.changed.wait_timeout(round, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(round.heard.to_vec())
    }
}

impl Drop for RankThread {
    fn drop(&mut self) {
        // Whoever still waits for this rank waits in vain.
        let mut round = self.shared.round();
        round.lost.get_or_insert(format!("rank {} has left", self.rank));
        self.shared.changed.notify_all();
    }
}

/// Runs `each` on `world_size` threads, one per rank, and returns what they returned, in rank order. A rank whose
/// others do not come to an exchange within 20 seconds fails.
///
/// # Panics
/// When a rank panics, with its message.
#[cfg(feature = "testing")]
pub fn run_ranks<T: Send>(world_size: usize, each: impl Fn(RankThread) -> T + Sync) -> Vec<T> {
    match run_ranks_within(Duration::from_secs(20), world_size, each) {
        Ok(returned) => returned,
        Err(e) => std::panic::resume_unwind(Box::new(format!("no thread for a rank: {e}"))),
    }
}

/// As [`run_ranks`], with another deadline of every exchange.
///
/// # Errors
/// When a thread cannot be started; the ranks that were have ended then.
pub(crate) fn run_ranks_within<T: Send>(
    deadline: Duration,
    world_size: usize,
    each: impl Fn(RankThread) -> T + Sync,
) -> io::Result<Vec<T>> {
    let round = Round { said: vec![None; world_size], ..Round::default() };
    let shared = Arc::new(Shared { round: Mutex::new(round), changed: Condvar::new(), world_size, deadline });
    std::thread::scope(|scope| {
        let each = &each;
        let mut threads = Vec::new();
        let mut failed = None;
        for rank in 0..world_size {
            // A member that is dropped, as when its thread cannot be started, lets the others fail.
            let member = RankThread { rank, shared: shared.clone() };
            match thread::Builder::new().spawn_scoped(scope, move || each(member)) {
                Ok(thread) => threads.push(thread),
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        let joined = threads.into_iter().map(|thread| thread.join());
        let returned = joined.map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect();
        failed.map_or(Ok(returned), Err)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn after_a_rank_waited_in_vain_nobody_hears_anything() {
        let given_up = Barrier::new(2);
        let told = run_ranks_within(Duration::from_millis(10), 2, |group| {
            let early = (group.rank() == 0).then(|| group.exchange(vec![0]).is_err());
            given_up.wait();
            let late = group.exchange(vec![1]).map_err(|e| e.to_string());
            given_up.wait();
            (early, late)
        })
        .unwrap();
        assert_eq!(told[0].0, Some(true));
        for (_, late) in told {
            assert!(late.as_ref().is_err_and(|lost| lost.contains("rank 0 waited")), "{late:?}");
        }
    }
}
