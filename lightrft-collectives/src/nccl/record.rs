//! The last calls that were enqueued on a communicator, and how far they came: what to look at when it has failed

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::operation::Signature;

/// Calls that are kept.
const KEPT: usize = 64;

/// A call that was enqueued. Displayed as `#12 all_reduce(sum, F32, 8 elements), enqueued 1.2s ago, outstanding`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Enqueued {
    /// Its number among the group's launches on this rank, from 0: ranks in step have made the same calls with the
    /// same numbers.
    pub sequence: u64,
    /// The call; the first, if several were fused.
    pub call: Signature,
    /// Number of calls in the same launch.
    pub fused: usize,
    /// Time since it was enqueued.
    pub age: Duration,
    /// How far it came.
    pub state: EnqueuedState,
}

/// How far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EnqueuedState {
    /// The stream has not come to its end.
    Outstanding,
    /// The stream has passed it.
    Done,
    /// It went into a graph, whose launches nobody watches.
    Captured,
    /// It was outstanding when the communicator failed.
    Abandoned,
}

impl fmt::Display for Enqueued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} {}", self.sequence, self.call)?;
        if self.fused > 1 {
            write!(f, " and {} more", self.fused - 1)?;
        }
        let state = match self.state {
            EnqueuedState::Outstanding => "outstanding",
            EnqueuedState::Done => "done",
            EnqueuedState::Captured => "captured",
            EnqueuedState::Abandoned => "abandoned",
        };
        write!(f, ", enqueued {:.1?} ago, {state}", self.age)
    }
}

#[derive(Debug)]
struct Entry {
    call: Signature,
    fused: usize,
    at: Instant,
    state: EnqueuedState,
}

/// The last calls of one communicator.
#[derive(Debug, Default)]
pub(super) struct Record(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    /// The number of the first that is kept.
    first: u64,
    kept: VecDeque<Entry>,
}

impl Record {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a call down and gives it its number.
    pub(super) fn push(&self, call: Signature, fused: usize, state: EnqueuedState) -> u64 {
        let mut entries = self.lock();
        if entries.kept.len() == KEPT {
            entries.kept.pop_front();
            entries.first += 1;
        }
        entries.kept.push_back(Entry { call, fused, at: Instant::now(), state });
        entries.first + entries.kept.len() as u64 - 1
    }

    /// The stream has passed this call.
    pub(super) fn done(&self, sequence: u64) {
        let mut entries = self.lock();
        let index = sequence.checked_sub(entries.first);
        if let Some(entry) = index.and_then(|index| entries.kept.get_mut(index as usize)) {
            entry.state = EnqueuedState::Done;
        }
    }

    /// Nobody waits any more for what is outstanding.
    pub(super) fn abandon(&self) {
        for entry in &mut self.lock().kept {
            if entry.state == EnqueuedState::Outstanding {
                entry.state = EnqueuedState::Abandoned;
            }
        }
    }

    /// What is kept, the last call last.
    pub(super) fn read(&self) -> Vec<Enqueued> {
        let entries = self.lock();
        let numbered = entries.kept.iter().zip(entries.first..);
        numbered
            .map(|(entry, sequence)| {
                let Entry { call, fused, at, state } = *entry;
                Enqueued { sequence, call, fused, age: at.elapsed(), state }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::Call;

    #[test]
    fn the_last_calls_are_kept_with_their_numbers_and_how_far_they_came() {
        let record = Record::default();
        let call = Signature::bare(Call::Barrier);
        for sequence in 0..100 {
            assert_eq!(record.push(call, 1, EnqueuedState::Outstanding), sequence);
        }
        // One that is not kept any more, and two that are.
        for sequence in [3, 36, 40] {
            record.done(sequence);
        }
        record.abandon();
        let kept = record.read();
        assert_eq!(kept.len(), KEPT);
        assert_eq!((kept[0].sequence, kept[63].sequence), (36, 99));
        let done = |e: &&Enqueued| e.state == EnqueuedState::Done;
        assert_eq!(kept.iter().filter(done).map(|e| e.sequence).collect::<Vec<_>>(), [36, 40]);
        assert!(kept.iter().all(|e| e.state != EnqueuedState::Outstanding));
    }
}
