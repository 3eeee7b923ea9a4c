//! Requests under way, and a handle by which another thread aborts them.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Result;
use crate::server::Http;

/// Prompts of one engine that have been sent and not answered.
#[derive(Debug, Default)]
pub(super) struct Flight {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// A call of `generate` is under way.
    running: bool,
    /// Somebody aborted it.
    aborted: bool,
    rids: BTreeSet<String>,
}

impl Flight {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self) {
        *self.state() = State { running: true, ..State::default() };
    }

    /// Ends the call. Returns the prompts that were sent and never answered.
    pub(super) fn end(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.state()).rids
    }

    /// Notes that prompts are sent; false if they must not be, since the call was aborted.
    pub(super) fn takes_off(&self, rids: &[String]) -> bool {
        let mut state = self.state();
        if !state.aborted {
            state.rids.extend(rids.iter().cloned());
        }
        !state.aborted
    }

    pub(super) fn lands(&self, rids: &[String]) {
        let mut state = self.state();
        rids.iter().for_each(|rid| {
            state.rids.remove(rid);
        });
    }
}

/// The start of a call's request ids, different for every call of every process on the machine.
pub(super) fn call_id() -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (pid, call) = (std::process::id(), CALLS.fetch_add(1, Ordering::Relaxed));
    format!("lightrft-{pid}-{:x}-{call}", now.as_micros())
}

/// The requests of an engine, for another thread than the one that waits for them.
#[derive(Clone, Debug)]
pub struct Requests {
    flight: Arc<Flight>,
    http: Arc<Http>,
}

impl Requests {
    pub(super) fn new(flight: Arc<Flight>, http: Http) -> Self {
        Self { flight, http: Arc::new(http) }
    }

    /// Whether requests have been sent and not answered.
    pub fn is_busy(&self) -> bool {
        !self.flight.state().rids.is_empty()
    }

    /// Ends the requests of the call that is under way, if one is: its completions have the tokens drawn so far, and
    /// those that had not begun have none. Returns when all have ended.
    ///
    /// # Errors
    /// [`ServerError::Timeout`](crate::ServerError::Timeout) if that took longer than `within`; the server's own.
    pub fn abort(&self, within: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let rids = {
                let mut state = self.flight.state();
                if !state.running {
                    return Ok(());
                }
                state.aborted = true;
                state.rids.clone()
            };
            if rids.is_empty() {
                return Ok(());
            }
            // Again and again: a prompt that was just sent may not be known to the server yet.
            self.give_up(&rids, within.saturating_sub(start.elapsed()))?;
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Tells the server that nobody waits for these any more. It would notice by itself, some seconds later.
    pub(super) fn give_up(&self, rids: &BTreeSet<String>, within: Duration) -> Result<()> {
        let start = Instant::now();
        for rid in rids {
            let left = within.saturating_sub(start.elapsed());
            self.http.post("/abort_request", &json!({"rid": rid}), left)?;
        }
        Ok(())
    }
}
