//! Requests under way, and a handle by which another thread aborts, pauses and resumes them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{Flight, Http};
use crate::{Event, Result};

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
        self.flight.is_busy()
    }

    /// Ends the requests of the call that is under way, if one is: its completions have the tokens drawn so far, and
    /// those that had not begun have none. Returns when all have ended; those that are frozen do once the server goes on.
    ///
    /// # Errors
    /// [`ServerError::Timeout`](crate::ServerError::Timeout) if that took longer than `within`; the server's own.
    pub fn abort(&self, within: Duration) -> Result<()> {
        self.flight.abort(within, |rids, left| self.give_up(rids, left))
    }

    /// Freezes all requests of the server, also those to come, until [`resume`](Self::resume). They keep what they have of
    /// the cache. An update that commits, and a wake, have it go on too.
    ///
    /// # Errors
    /// [`Error::Refused`](crate::Error::Refused) while the engine sleeps, is stale or in the midst of an update: its server
    /// is paused then. The server's own.
    pub fn pause(&self, within: Duration) -> Result<()> {
        self.post(Event::Pause, "/pause_generation", &json!({"mode": "in_place"}), within)
    }

    /// Lets the server go on.
    ///
    /// # Errors
    /// [`Error::Refused`](crate::Error::Refused) while the engine sleeps, is stale or in the midst of an update: the server
    /// would draw from weights that are not there, or die. The server's own.
    pub fn resume(&self, within: Duration) -> Result<()> {
        self.post(Event::Resume, "/continue_generation", &json!({}), within)
    }

    fn post(&self, event: Event, path: &str, body: &Value, within: Duration) -> Result<()> {
        let _turn = self.flight.turn(event)?;
        self.http.post(path, body, within)?;
        Ok(())
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
