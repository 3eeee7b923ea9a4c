//! Which requests of a call are on their way, so that another thread can end them, and where their engine stands, so that
//! it cannot have the server go on at the wrong time.

use std::collections::BTreeSet;
#[cfg(feature = "vllm")]
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Error, Event, Refusal, Result, ServerError, State};

/// Requests of one engine that have been sent and not answered, by their ids.
#[derive(Debug)]
pub(crate) struct Flight {
    sent: Mutex<Sent>,
    /// Where the engine stands, or will once a call is done by which its server is paused. Held by anybody else who pauses
    /// the server or has it go on.
    stands: Mutex<State>,
    /// Somebody else paused the server for a moment and could not have it go on.
    #[cfg(feature = "vllm")]
    left_paused: AtomicBool,
}

#[derive(Debug, Default)]
struct Sent {
    /// Which call it is, or was: an abort means the one that it found, and none that comes after.
    call: u64,
    /// A call of `generate` is under way.
    running: bool,
    /// Somebody aborted it.
    aborted: bool,
    ids: BTreeSet<String>,
}

impl Flight {
    /// Of an engine that stands there.
    pub(crate) fn new(stands: State) -> Self {
        Self {
            sent: Mutex::default(),
            stands: Mutex::new(stands),
            #[cfg(feature = "vllm")]
            left_paused: AtomicBool::new(false),
        }
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call begins, once nobody is having the server pause or go on.
    pub(crate) fn begin(&self) {
        let _turn = self.stands.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sent = self.sent();
        *sent = Sent { call: sent.call + 1, running: true, ..Sent::default() };
    }

    /// Ends the call. Returns the requests that were sent and never answered.
    pub(crate) fn end(&self) -> BTreeSet<String> {
        let mut sent = self.sent();
        let call = sent.call;
        std::mem::replace(&mut *sent, Sent { call, ..Sent::default() }).ids
    }

    /// The engine's turn: it stands there now, or is about to. To be told before it pauses its server, and after it had it
    /// go on. Waits for somebody else who has begun to.
    pub(crate) fn stand(&self, state: State) {
        *self.stands.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Somebody else's turn to pause the server or to have it go on: until this is dropped neither the engine nor anybody
    /// who asks here does.
    ///
    /// # Errors
    /// [`Refusal`] if the engine stands where that must not be.
    pub(crate) fn turn(&self, event: Event) -> Result<MutexGuard<'_, State>, Refusal> {
        let stands = self.stands.lock().unwrap_or_else(PoisonError::into_inner);
        stands.after(event).map(|_| stands)
    }

    /// Notes that requests are sent; false if they must not be, since the call was aborted.
    pub(crate) fn takes_off(&self, ids: &[String]) -> bool {
        let mut sent = self.sent();
        if !sent.aborted {
            sent.ids.extend(ids.iter().cloned());
        }
        !sent.aborted
    }

    pub(crate) fn lands(&self, ids: &[String]) {
        let mut sent = self.sent();
        ids.iter().for_each(|id| {
            sent.ids.remove(id);
        });
    }

    /// Whether one of these has been sent and not answered.
    #[cfg(feature = "vllm")]
    pub(crate) fn waits_for(&self, ids: &BTreeSet<String>) -> bool {
        !self.sent().ids.is_disjoint(ids)
    }

    /// Notes whether a server that was paused may have been left so.
    #[cfg(feature = "vllm")]
    pub(crate) fn leave_paused(&self, perhaps: bool) {
        self.left_paused.store(perhaps, Ordering::Relaxed);
    }

    /// Whether that is so. Who asks sees to it.
    #[cfg(feature = "vllm")]
    pub(crate) fn take_paused(&self) -> bool {
        self.left_paused.swap(false, Ordering::Relaxed)
    }

    /// Whether requests have been sent and not answered.
    pub(crate) fn is_busy(&self) -> bool {
        !self.sent().ids.is_empty()
    }

    /// Aborts the call that is under way, if one is: nothing of it takes off any more, and `give_up` tells the server
    /// which requests nobody waits for, within what is left of `within`, until all have landed.
    pub(crate) fn abort(
        &self,
        within: Duration,
        give_up: impl Fn(&BTreeSet<String>, Duration) -> Result<()>,
    ) -> Result<()> {
        let start = Instant::now();
        let call = self.sent().call;
        loop {
            let ids = {
                let mut sent = self.sent();
                if !sent.running || sent.call != call {
                    return Ok(());
                }
                sent.aborted = true;
                sent.ids.clone()
            };
            if ids.is_empty() {
                return Ok(());
            }
            // Again and again: a request that was just sent may not be known to the server yet.
            give_up(&ids, within.saturating_sub(start.elapsed())).map_err(|error| match error {
                // What was left of it says nothing to the caller.
                Error::Server(error) => match *error {
                    ServerError::Timeout { call, .. } => ServerError::Timeout { call, within }.into(),
                    error => error.into(),
                },
                error => error,
            })?;
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
        let flight = Flight::new(State::READY);
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
    fn an_abort_that_takes_too_long_says_how_long_it_was_given() {
        let flight = Flight::new(State::READY);
        flight.begin();
        assert!(flight.takes_off(&ids("stubborn")));
        let within = Duration::from_millis(30);
        let give_up = |_: &BTreeSet<String>, left: Duration| match left.is_zero() {
            false => Ok(()),
            true => {
                let call = crate::Call { engine: "test", method: "POST", path: "/abort".to_owned() };
                Err(ServerError::Timeout { call, within: left }.into())
            }
        };
        let error = flight.abort(within, give_up).unwrap_err();
        assert!(error.to_string().contains("30ms"), "{error}");
    }

    #[test]
    fn nothing_of_an_aborted_call_takes_off_and_without_a_call_nothing_is_aborted() {
        let flight = Flight::new(State::READY);
        flight.abort(LONG, |_, _| panic!("no call is under way")).unwrap();
        flight.begin();
        flight.abort(LONG, |_, _| panic!("nothing was sent")).unwrap();
        assert!(!flight.takes_off(&ids("late")) && !flight.is_busy());
        flight.end();
        flight.begin();
        assert!(flight.takes_off(&ids("next")));
    }

    #[test]
    fn nobody_else_has_a_turn_while_the_engine_is_not_ready() {
        let flight = Flight::new(State::READY);
        drop(flight.turn(Event::Pause).unwrap());
        let elsewhere = [State::EMPTY, State::READY.after(Event::BeginUpdate).unwrap(), State::Dead];
        for state in elsewhere {
            flight.stand(state);
            let refusal = flight.turn(Event::Resume).unwrap_err();
            assert_eq!((refusal.state, refusal.event), (state, Event::Resume));
        }
        flight.stand(State::READY);
        let turn = flight.turn(Event::Resume).unwrap();
        thread::scope(|scope| {
            let engine = scope.spawn(|| flight.stand(State::Dead));
            thread::sleep(Duration::from_millis(50));
            assert!(!engine.is_finished(), "it waits for whoever has begun");
            drop(turn);
        });
        flight.turn(Event::Pause).unwrap_err();
    }
}
