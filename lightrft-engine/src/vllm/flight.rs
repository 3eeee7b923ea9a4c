//! Requests under way, and a handle by which another thread aborts, pauses and resumes them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::server::{Flight, Http};
use crate::{Event, Result, ServerError};

/// What the server puts in front of a request's id.
const PREFIX: &str = "generate-tokens-";

/// How long a server may take to go on that was paused for a moment, whatever is left of the caller's time.
const RESUMES_WITHIN: Duration = Duration::from_secs(10);

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
    /// those that had not begun have none. Returns when all have ended. A server without a route for single requests
    /// (vLLM 0.23) ends those of its other clients too.
    ///
    /// # Errors
    /// [`ServerError::Timeout`] if that took longer than `within`; the server's own.
    pub fn abort(&self, within: Duration) -> Result<()> {
        self.flight.abort(within, |ids, left| {
            let named: Vec<String> = ids.iter().map(|id| format!("{PREFIX}{id}")).collect();
            match self.http.post("/abort_requests", &json!({"request_ids": named}), left) {
                // Older ones only end all of their requests at once.
                Err(ServerError::Status { status: 404 | 405, .. }) => {
                    // Neither the engine's own pause, of an update that comes next, nor its next call must fall between
                    // these.
                    let Ok(_turn) = self.flight.turn(Event::Resume) else { return Ok(()) };
                    if !self.flight.waits_for(ids) {
                        return Ok(());
                    }
                    let paused = self.http.post("/pause?mode=abort&clear_cache=false", &json!({}), left);
                    // Also after a pause without a reply, which may come to pass yet.
                    let resumed = self.http.post("/resume", &json!({}), RESUMES_WITHIN);
                    self.flight.leave_paused(paused.is_err() || resumed.is_err());
                    paused.and(resumed)?;
                    Ok(())
                }
                result => Ok(result.map(drop)?),
            }
        })
    }

    /// Freezes all requests of the server, also those to come, until [`resume`](Self::resume). An update that commits, and
    /// a wake, have it go on too.
    ///
    /// # Errors
    /// [`Error::Refused`](crate::Error::Refused) while the engine sleeps, is stale or in the midst of an update: its server
    /// is paused then. The server's own.
    pub fn pause(&self, within: Duration) -> Result<()> {
        self.post(Event::Pause, "/pause?mode=keep", within)
    }

    /// Lets the server go on.
    ///
    /// # Errors
    /// [`Error::Refused`](crate::Error::Refused) while the engine sleeps, is stale or in the midst of an update: the server
    /// would draw from weights that are not there, or die. The server's own.
    pub fn resume(&self, within: Duration) -> Result<()> {
        self.post(Event::Resume, "/resume", within)
    }

    fn post(&self, event: Event, path: &str, within: Duration) -> Result<()> {
        let _turn = self.flight.turn(event)?;
        self.http.post(path, &json!({}), within)?;
        Ok(())
    }
}
