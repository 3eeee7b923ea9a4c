//! N ranks of a program on this machine, started together and stopped together
//!
//! ```no_run
//! use lightrft_collectives::launch::Launcher;
//!
//! let outcome = Launcher::new("./train").arg("--steps").arg("100").ranks(2).run()?;
//! std::process::exit(outcome.exit_code());
//! # Ok::<_, lightrft_collectives::Error>(())
//! ```

mod child;
mod output;
mod signals;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

pub use self::output::Output;
use self::output::Printer;
use self::signals::Signals;
use crate::error::{Error, Result};
use crate::store::StoreServer;

/// Starts ranks with the variables that [`Rendezvous`](crate::Rendezvous) and torch read.
///
/// The launcher serves the store itself, as torchrun's agent does: the port is taken before any rank starts, so
/// no other program can come between. If a rank fails, the others have the grace period to report and end; then
/// they get SIGTERM, and after another grace period SIGKILL. SIGINT and SIGTERM are passed on to all ranks. If
/// the launcher itself is killed, the ranks are too.
#[derive(Clone, Debug)]
pub struct Launcher {
    program: OsString,
    args: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    ranks: usize,
    grace: Duration,
    output: Output,
}

/// The first rank that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Its rank.
    pub rank: usize,
    /// How its process ended: an exit code or a signal.
    pub status: ExitStatus,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The first failure in time; none if all ranks ended with code 0.
    pub failure: Option<Failure>,
    /// Each rank's status.
    pub statuses: Vec<ExitStatus>,
    /// The signal that the launcher was sent and passed on, if any.
    pub signal: Option<i32>,
}

impl Outcome {
    /// Whether all ranks ended with code 0.
    pub fn is_success(&self) -> bool {
        self.failure.is_none()
    }

    /// What a program that stands for the job should exit with: 0, the code of the first failure, or, as shells
    /// do, 128 and its signal's number.
    pub fn exit_code(&self) -> i32 {
        let Some(Failure { status, .. }) = self.failure else { return 0 };
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.failure {
            None => write!(f, "{} ranks ended well", self.statuses.len()),
            Some(Failure { rank, status }) => write!(f, "rank {rank} failed first: {status}"),
        }
    }
}

enum Event {
    /// A rank's process has ended and can be reaped.
    Ended(usize),
    Signal(i32),
}

/// The longest grace period, a century: time without end is no point in time.
const LONGEST_GRACE: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// How hard the remaining ranks have been told to end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    /// Until then they may end by themselves.
    Grace(Instant),
    /// SIGTERM was sent; until then they may end.
    Terminated(Instant),
    Killed,
}

impl Launcher {
    /// One rank of `program`, a path or a name to look up in `PATH`.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Launcher {
            program: program.as_ref().into(),
            args: Vec::new(),
            variables: Vec::new(),
            ranks: 1,
            grace: Duration::from_secs(5),
            output: Output::Prefixed,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().into()));
        self
    }

    /// Sets a variable of all ranks' environment, beside those inherited from this process.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.variables.push((name.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Sets the number of ranks; at least 1.
    #[must_use]
    pub fn ranks(self, ranks: usize) -> Self {
        Launcher { ranks: ranks.max(1), ..self }
    }

    /// Sets how long ranks may take to end by themselves after the first failure or a signal; 5 s by default.
    #[must_use]
    pub fn grace(self, grace: Duration) -> Self {
        Launcher { grace: grace.min(LONGEST_GRACE), ..self }
    }

    /// Sets what becomes of the ranks' output.
    #[must_use]
    pub fn output(self, output: Output) -> Self {
        Launcher { output, ..self }
    }

    /// Runs all ranks to their end.
    ///
    /// # Errors
    /// [`Error::Io`] if a rank cannot be started; those already started are killed. A rank that fails is no
    /// error here but part of the [`Outcome`].
    pub fn run(&self) -> Result<Outcome> {
        let server = StoreServer::bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let (events, received) = mpsc::channel();
        let signals = {
            let events = events.clone();
            Signals::forward(move |signal| drop(events.send(Event::Signal(signal))))
        }
        .map_err(|source| Error::Io { doing: "catch signals".into(), source: Arc::new(source) })?;
        let printer = Printer::new(self.output);
        let mut ranks = Ranks { children: Vec::new(), statuses: vec![None; self.ranks], failure: None };
        for rank in 0..self.ranks {
            let failed = |source| {
                let doing = format!("start rank {rank} of {}", self.program.display());
                Error::Io { doing, source: Arc::new(source) }
            };
            let mut child = self.spawn(rank, server.address().port()).map_err(failed)?;
            let (out, err, pid) = (child.stdout.take(), child.stderr.take(), Pid::from_child(&child));
            // From here on a failure kills it with the others.
            ranks.children.push(child);
            printer.follow(rank, out, err).map_err(failed)?;
            announce_end(rank, pid, events.clone()).map_err(failed)?;
        }
        let signal = ranks.supervise(&received, self.grace);
        printer.finish(Duration::from_secs(1));
        drop(signals);
        let statuses = ranks.statuses.iter().flatten().copied().collect();
        Ok(Outcome { failure: ranks.failure, statuses, signal })
    }

    fn spawn(&self, rank: usize, port: u16) -> std::io::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.variables.iter().map(|(name, value)| (name, value)));
        for (name, value) in [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", self.ranks),
            ("LOCAL_WORLD_SIZE", self.ranks),
            ("MASTER_PORT", port.into()),
        ] {
            command.env(name, value.to_string());
        }
        command.env("MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string());
        // The store is ours: rank 0 shall not serve one. A run id of an outer torchrun is none of this job's.
        command.env("TORCHELASTIC_USE_AGENT_STORE", "True");
        command.env_remove("TORCHELASTIC_RUN_ID").env_remove("TORCHELASTIC_RESTART_COUNT");
        command.stdin(Stdio::null());
        if self.output == Output::Inherited {
            command.stdout(Stdio::inherit()).stderr(Stdio::inherit());
        } else {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        child::spawn(&mut command)
    }
}

/// Sends an event when the child has ended, leaving it to be reaped: until then its pid is nobody else's, so that a
/// signal to it cannot hit a stranger.
fn announce_end(rank: usize, pid: Pid, events: Sender<Event>) -> std::io::Result<()> {
    let wait = move || {
        while let Err(rustix::io::Errno::INTR) =
            waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
        {}
        let _ = events.send(Event::Ended(rank));
    };
    thread::Builder::new().name(format!("lightrft-rank-{rank}")).spawn(wait).map(drop)
}

struct Ranks {
    children: Vec<Child>,
    statuses: Vec<Option<ExitStatus>>,
    failure: Option<Failure>,
}

impl Ranks {
    /// Waits for all ranks to end, helping where one has failed or a signal came. Returns that signal.
    fn supervise(&mut self, events: &Receiver<Event>, grace: Duration) -> Option<i32> {
        let mut stage = Stage::Running;
        let mut signal = None;
        while self.statuses.iter().any(Option::is_none) {
            let event = match stage {
                Stage::Running | Stage::Killed => events.recv().ok(),
                Stage::Grace(until) | Stage::Terminated(until) => {
                    match events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                        Ok(event) => Some(event),
                        Err(RecvTimeoutError::Timeout) => {
                            let terminate = matches!(stage, Stage::Grace(_));
                            self.signal(if terminate { Signal::TERM } else { Signal::KILL });
                            stage = match terminate {
                                true => Stage::Terminated(Instant::now() + grace),
                                false => Stage::Killed,
                            };
                            continue;
                        }
                        Err(RecvTimeoutError::Disconnected) => None,
                    }
                }
            };
            match event {
                Some(Event::Ended(rank)) => self.reap(rank),
                Some(Event::Signal(number)) => {
                    signal = Some(number);
                    self.signal(if number == signals::INTERRUPT { Signal::INT } else { Signal::TERM });
                    // A second signal does not put off the end that the first has set.
                    if matches!(stage, Stage::Running | Stage::Grace(_)) {
                        stage = Stage::Terminated(Instant::now() + grace);
                    }
                }
                None => break,
            }
            if self.failure.is_some() && stage == Stage::Running {
                stage = Stage::Grace(Instant::now() + grace);
            }
        }
        signal
    }

    fn reap(&mut self, rank: usize) {
        let Ok(status) = self.children[rank].wait() else { return };
        self.statuses[rank] = Some(status);
        if !status.success() {
            self.failure.get_or_insert(Failure { rank, status });
        }
    }

    /// Signals the process groups of all ranks that have not been reaped, with what they started.
    fn signal(&self, signal: Signal) {
        for (child, status) in self.children.iter().zip(&self.statuses) {
            if status.is_none() {
                let _ = kill_process_group(Pid::from_child(child), signal);
            }
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        // Reached with living children only if a later one could not be started.
        self.signal(Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    /// Signals as events, not real ones: those that arrive after the end would end this process.
    #[test]
    fn signals_that_keep_coming_do_not_put_off_the_end() {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' INT TERM; echo deaf; while :; do sleep 1; done"]).stdout(Stdio::piped());
        let mut child = child::spawn(&mut command).unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "deaf\n");
        let pid = Pid::from_child(&child);
        let mut ranks = Ranks { children: vec![child], statuses: vec![None], failure: None };
        let (events, received) = mpsc::channel();
        announce_end(0, pid, events.clone()).unwrap();
        let signal = thread::scope(|scope| {
            scope.spawn(move || {
                while events.send(Event::Signal(signals::INTERRUPT)).is_ok() {
                    thread::sleep(Duration::from_millis(20));
                }
            });
            let begin = Instant::now();
            let signal = ranks.supervise(&received, Duration::from_millis(200));
            drop(received);
            assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
            signal
        });
        assert_eq!(signal, Some(signals::INTERRUPT));
        let outcome = Outcome { failure: ranks.failure, statuses: Vec::new(), signal };
        assert_eq!(outcome.exit_code(), 128 + 9);
    }
}
