//! Whether a server is gone, found out after a call that failed as calls of dying servers do.

use std::thread;
use std::time::Duration;

use super::error::ServerError;
use super::process::ServerProcess;

/// How long one look at a server's health may take.
pub(crate) const PROBE: Duration = Duration::from_secs(5);

/// How often one is looked at that does not answer: it may have a bad time.
const PROBES: usize = 3;

/// How long one that nobody here has started is left alone between two looks: a refused connection is quick to say so.
const PAUSE: Duration = Duration::from_millis(500);

/// How long a server that seems to have died may take to end.
const LAST_BREATH: Duration = Duration::from_secs(10);

/// A call's error, and whether the server is gone. One that was started here, neither answers nor ends is ended: nobody
/// would ask it anything again, and it would keep its memory.
pub(crate) fn autopsy(
    error: ServerError,
    process: Option<&mut ServerProcess>,
    answers: impl Fn(Duration) -> bool,
) -> (ServerError, bool) {
    let pause = if process.is_none() { PAUSE } else { Duration::ZERO };
    let lives = |look| {
        if look > 0 {
            thread::sleep(pause);
        }
        answers(PROBE)
    };
    if !error.may_be_the_end() || (0..PROBES).any(lives) {
        return (error, false);
    }
    let Some(process) = process else { return (error.gone(), true) };
    match process.ends_within(LAST_BREATH) {
        Err(ended) => (ended, true),
        Ok(()) => {
            tracing::warn!(%error, "the server neither answers nor ends: ending it");
            process.stop();
            (error.gone(), true)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::{fs, io};

    use super::super::error::Call;
    use super::super::process::ServerCommand;
    use super::*;

    fn lost() -> ServerError {
        let call = Call { engine: "test", method: "POST", path: "/x".to_owned() };
        ServerError::Connection { call, source: io::ErrorKind::ConnectionReset.into() }
    }

    fn server(script: &str) -> ServerProcess {
        let mut command = ServerCommand::new("test", "sh");
        command.arg("-c").arg(script);
        ServerProcess::start(&command).unwrap()
    }

    #[test]
    fn a_server_that_answers_late_lives() {
        let asked = Cell::new(0);
        let third = |_| {
            asked.set(asked.get() + 1);
            asked.get() == 3
        };
        assert!(!autopsy(lost(), None, third).1);
        let (error, gone) = autopsy(lost(), None, |_| false);
        assert!(gone && matches!(error, ServerError::Gone { .. }), "{error}");
    }

    #[test]
    fn a_server_that_ended_tells_how_and_one_that_hangs_is_ended() {
        let mut ended = server("echo last words; exit 3");
        let (error, gone) = autopsy(lost(), Some(&mut ended), |_| false);
        assert!(gone && error.to_string().contains("last words"), "{error}");
        // The log of a failure is kept.
        fs::remove_file(ended.log()).unwrap();
        let mut hangs = server("sleep 600");
        hangs.alive().unwrap();
        let (error, gone) = autopsy(lost(), Some(&mut hangs), |_| false);
        assert!(gone && matches!(error, ServerError::Gone { .. }), "{error}");
        assert!(hangs.alive().is_err(), "it was ended");
        fs::remove_file(hangs.log()).unwrap();
    }
}
