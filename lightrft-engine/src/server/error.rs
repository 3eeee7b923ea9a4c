//! What can go wrong with an inference server: its process, the connection to it, its replies.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// The longest text of a server that an error repeats, in bytes.
const LONGEST_MESSAGE: usize = 1200;

/// One HTTP call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    /// Which engine was called.
    pub engine: &'static str,
    /// `GET` or `POST`.
    pub method: &'static str,
    /// The path, with its query. Neither the server's address nor the key stands in it.
    pub path: String,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.engine, self.method, self.path)
    }
}

/// Why an inference server did not do what it was asked. No key and no request is repeated in any of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The server's address is not one.
    #[error("server address `{address}`: {reason}")]
    Address {
        /// As it was given.
        address: String,
        /// What was expected.
        reason: &'static str,
    },
    /// The server answered that it cannot or will not.
    #[error("{call}: status {status}: {message}")]
    Status {
        /// What was called.
        call: Call,
        /// HTTP's status code, of 300 or more.
        status: u16,
        /// The server's own words, cut where they are long.
        message: String,
    },
    /// No whole reply came in time. The server may still be at work.
    #[error(
        "{call}: no reply within {within:?}: give it longer (a control call by the driver's `control_within`), or see in \
         the server's log what it is at"
    )]
    Timeout {
        /// What was called.
        call: Call,
        /// How long was waited.
        within: Duration,
    },
    /// The connection could not be made, or ended before the whole reply was there.
    #[error("{call}: {source}")]
    Connection {
        /// What was called.
        call: Call,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The call was given up because another of the same batch had failed, or somebody cancelled it.
    #[error("{call}: given up")]
    Interrupted {
        /// What was called.
        call: Call,
    },
    /// The reply is longer than anything expected of this call.
    #[error("{call}: a reply of more than {limit} bytes")]
    ReplyTooLong {
        /// What was called.
        call: Call,
        /// The longest reply that is taken, in bytes.
        limit: u64,
    },
    /// The reply is not what this call answers with.
    #[error("{call}: {what}")]
    Reply {
        /// What was called.
        call: Call,
        /// What was wrong with it, and how it begins.
        what: String,
    },
    /// The server's program could not be started.
    #[error("cannot start {engine} with `{program}`: {source}")]
    Start {
        /// Which engine.
        engine: &'static str,
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The server's process has ended.
    #[error("{engine} has ended: {status}; its log {} ends:\n{last_lines}", log.display())]
    Exited {
        /// Which engine.
        engine: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// Its whole output.
        log: PathBuf,
        /// The end of its output.
        last_lines: String,
    },
    /// The server no longer answers; it is one that somebody else started, so nothing more is known of it.
    #[error("the server is gone: {source}")]
    Gone {
        /// How it was found.
        #[source]
        source: Box<ServerError>,
    },
    /// A call failed after which nobody can tell what the server has done, and it dies of a wrong guess.
    #[error(
        "{source}: whether it was done is not known, and the server dies of a wrong guess; start it anew"
    )]
    InDoubt {
        /// How the call failed.
        #[source]
        source: Box<ServerError>,
    },
    /// Memory that a server gave back when it was put to sleep did not come back.
    #[error(
        "{source}: the server could not be woken; if its GPU is out of memory, free some (the trainer's, or another \
         process's), then {then}"
    )]
    Wake {
        /// What the server said, or how it ended.
        #[source]
        source: Box<ServerError>,
        /// What to do then.
        then: &'static str,
    },
    /// The server runs but did not become ready in time.
    #[error(
        "{engine} was not ready after {waited:?}: raise `ready_within` if it was still loading; its log {} \
         ends:\n{last_lines}",
        log.display()
    )]
    NotReady {
        /// Which engine.
        engine: &'static str,
        /// How long was waited.
        waited: Duration,
        /// Its whole output.
        log: PathBuf,
        /// The end of its output.
        last_lines: String,
    },
}

impl ServerError {
    /// Whether the server said that it did nothing.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            ServerError::Status { status, .. } => (400..500).contains(status),
            ServerError::Wake { source, .. } => source.is_refusal(),
            _ => false,
        }
    }

    /// Whether the server may be gone: a probe of its health tells.
    pub(crate) fn may_be_the_end(&self) -> bool {
        match self {
            ServerError::Status { status, .. } => *status >= 500,
            ServerError::Connection { .. } | ServerError::Exited { .. } | ServerError::Timeout { .. } => true,
            ServerError::Wake { source, .. } => source.may_be_the_end(),
            _ => false,
        }
    }

    /// Whether the server is known to be gone.
    pub(crate) fn is_the_end(&self) -> bool {
        match self {
            ServerError::Exited { .. } | ServerError::Gone { .. } | ServerError::InDoubt { .. } => true,
            ServerError::Wake { source, .. } => source.is_the_end(),
            _ => false,
        }
    }

    /// The error of a call after which the server no longer answered.
    pub(crate) fn gone(self) -> Self {
        if self.is_the_end() { self } else { ServerError::Gone { source: Box::new(self) } }
    }

    /// Removes the log of a server that is started once more, unless it is the caller's own.
    pub(crate) fn discard_log(&self, callers: Option<&Path>) {
        if let (ServerError::Exited { log, .. }, None) = (self, callers) {
            let _ = fs::remove_file(log);
        }
    }

    /// Whether a server ended because somebody else had its port.
    pub(crate) fn is_of_a_taken_port(&self) -> bool {
        matches!(self, ServerError::Exited { last_lines, .. }
            if last_lines.to_lowercase().contains("address already in use"))
    }
}

/// A server's text, fit to stand in an error: without control characters, and cut in its middle where it is long.
pub(crate) fn shortened(text: &str) -> String {
    let clean = |text: &str| -> String {
        text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
    };
    let text = text.trim();
    if text.len() <= LONGEST_MESSAGE {
        return clean(text);
    }
    let half = LONGEST_MESSAGE / 2;
    let head = text.floor_char_boundary(half);
    let tail = text.ceil_char_boundary(text.len() - half);
    format!("{} [... {} bytes ...] {}", clean(&text[..head]), tail - head, clean(&text[tail..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_keeps_its_beginning_and_its_end() {
        let long = format!("begin{}end", "ü".repeat(5000));
        let short = shortened(&long);
        assert!(short.len() < LONGEST_MESSAGE + 64 && short.starts_with("begin") && short.ends_with("end"));
        assert_eq!(shortened(" a\u{1b}[31mb\n"), "a [31mb");
    }
}
