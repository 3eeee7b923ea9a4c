//! Which requests of a call are on their way, so that another thread can end them.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;

/// Requests of one engine that have been sent and not answered, by their ids.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// A call of `generate` is under way.
    running: bool,
    /// Somebody aborted it.
    aborted: bool,
    ids: BTreeSet<String>,
}

impl Flight {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self) {
        *self.state() = State { running: true, ..State::default() };
    }

    /// Ends the call. Returns the requests that were sent and never answered.
    pub(crate) fn end(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.state()).ids
    }

    /// Notes that requests are sent; false if they must not be, since the call was aborted.
    pub(crate) fn takes_off(&self, ids: &[String]) -> bool {
        let mut state = self.state();
        if !state.aborted {
            state.ids.extend(ids.iter().cloned());
        }
        !state.aborted
    }

    pub(crate) fn lands(&self, ids: &[String]) {
        let mut state = self.state();
        ids.iter().for_each(|id| {
            state.ids.remove(id);
        });
    }

    /// Whether requests have been sent and not answered.
    pub(crate) fn is_busy(&self) -> bool {
        !self.state().ids.is_empty()
    }

    /// Aborts the call that is under way, if one is: nothing of it takes off any more, and `give_up` tells the server
    /// which requests nobody waits for, within what is left of `within`, until all have landed.
    pub(crate) fn abort(
        &self,
        within: Duration,
        give_up: impl Fn(&BTreeSet<String>, Duration) -> Result<()>,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let ids = {
                let mut state = self.state();
                if !state.running {
                    return Ok(());
                }
                state.aborted = true;
                state.ids.clone()
            };
            if ids.is_empty() {
                return Ok(());
            }
            // Again and again: a request that was just sent may not be known to the server yet.
            give_up(&ids, within.saturating_sub(start.elapsed()))?;
            thread::sleep(Duration::from_millis(20));
        }
    }
}
