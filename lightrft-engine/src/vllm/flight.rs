//! Requests under way, and a handle by which another thread aborts, pauses and resumes them.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::server::Http;
use crate::{Result, ServerError};

/// What the server puts in front of a request's id.
const PREFIX: &str = "generate-tokens-";

/// The requests of one engine that have been sent and not answered.
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
    ids: BTreeSet<String>,
}

impl Flight {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self) {
        *self.state() = State { running: true, ..State::default() };
    }

    pub(super) fn end(&self) {
        *self.state() = State::default();
    }

    /// Notes that a request is sent; false if it must not be, since the call was aborted.
    pub(super) fn takes_off(&self, id: &str) -> bool {
        let mut state = self.state();
        !state.aborted && state.ids.insert(id.to_owned())
    }

    pub(super) fn lands(&self, id: &str) {
        self.state().ids.remove(id);
    }
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
        !self.flight.state().ids.is_empty()
    }

    /// Ends the requests of the call that is under way, if one is: its completions have the tokens drawn so far, and
    /// those that had not begun have none. Returns when all have ended.
    ///
    /// # Errors
    /// [`ServerError::Timeout`] if that took longer than `within`; the server's own.
    pub fn abort(&self, within: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let ids: Vec<String> = {
                let mut state = self.flight.state();
                if !state.running {
                    return Ok(());
                }
                state.aborted = true;
                state.ids.iter().map(|id| format!("{PREFIX}{id}")).collect()
            };
            if ids.is_empty() {
                return Ok(());
            }
            // Again and again: a request that was just sent may not be known to the server yet.
            self.http.post(
                "/abort_requests",
                &json!({"request_ids": ids}),
                within.saturating_sub(start.elapsed()),
            )?;
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Freezes all requests of the server, also those to come, until [`resume`](Self::resume).
    ///
    /// # Errors
    /// The server's own.
    pub fn pause(&self, within: Duration) -> Result<()> {
        self.post("/pause?mode=keep", within)
    }

    /// Lets the server go on.
    ///
    /// # Errors
    /// The server's own.
    pub fn resume(&self, within: Duration) -> Result<()> {
        self.post("/resume", within)
    }

    fn post(&self, path: &str, within: Duration) -> Result<(), crate::Error> {
        self.http.post(path, &json!({}), within).map(drop).map_err(|error: ServerError| error.into())
    }
}
