//! Requests under way, and a handle by which another thread aborts, pauses and resumes them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::server::{Flight, Http};
use crate::{Result, ServerError};

/// What the server puts in front of a request's id.
const PREFIX: &str = "generate-tokens-";

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
    /// those that had not begun have none. Returns when all have ended.
    ///
    /// # Errors
    /// [`ServerError::Timeout`] if that took longer than `within`; the server's own.
    pub fn abort(&self, within: Duration) -> Result<()> {
        self.flight.abort(within, |ids, left| {
            let ids: Vec<String> = ids.iter().map(|id| format!("{PREFIX}{id}")).collect();
            self.http.post("/abort_requests", &json!({"request_ids": ids}), left)?;
            Ok(())
        })
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
