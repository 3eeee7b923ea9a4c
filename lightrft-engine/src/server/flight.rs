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
    /// Held by whoever pauses the server, or has it go on.
    #[cfg(feature = "vllm")]
    turn: Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Which call it is, or was: an abort means the one that it found, and none that comes after.
    call: u64,
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
        let mut state = self.state();
        *state = State { call: state.call + 1, running: true, ..State::default() };
    }

    /// Ends the call. Returns the requests that were sent and never answered.
    pub(crate) fn end(&self) -> BTreeSet<String> {
        let mut state = self.state();
        let call = state.call;
        std::mem::replace(&mut *state, State { call, ..State::default() }).ids
    }

    /// Until this is dropped nobody else pauses the server or has it go on, of those who ask here.
    #[cfg(feature = "vllm")]
    pub(crate) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
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
        let call = self.state().call;
        loop {
            let ids = {
                let mut state = self.state();
                if !state.running || state.call != call {
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn ids(id: &str) -> Vec<String> {
        vec![id.to_owned()]
    }

    #[test]
    fn an_abort_ends_the_call_that_it_found_and_not_the_next() {
        let flight = Flight::default();
        flight.begin();
        assert!(flight.takes_off(&ids("first")));
        let told = Cell::new(0);
        // The call ends while the server is told, and its thread begins another at once.
        let give_up = |given: &BTreeSet<String>, _| {
            assert!(given.contains("first") && given.len() == 1, "{given:?}");
            told.set(told.get() + 1);
            flight.end();
            flight.begin();
            assert!(flight.takes_off(&ids("second")));
            Ok(())
        };
        flight.abort(LONG, give_up).unwrap();
        assert_eq!(told.get(), 1);
        assert!(flight.takes_off(&ids("third")), "the second call goes on");
        assert_eq!(flight.end().into_iter().collect::<Vec<_>>(), ["second", "third"]);
    }

    #[test]
    fn nothing_of_an_aborted_call_takes_off_and_without_a_call_nothing_is_aborted() {
        let flight = Flight::default();
        flight.abort(LONG, |_, _| panic!("no call is under way")).unwrap();
        flight.begin();
        flight.abort(LONG, |_, _| panic!("nothing was sent")).unwrap();
        assert!(!flight.takes_off(&ids("late")) && !flight.is_busy());
        flight.end();
        flight.begin();
        assert!(flight.takes_off(&ids("next")));
    }
}
