//! A contender: the ranks of one implementation, kept alive for the whole bench and idle between orders
//!
//! Idle ranks wait for the next order in the kernel, so that they take no time from the contender being measured. Each
//! wait here has a deadline, and ranks under a real-time priority have a limit of the kernel besides, since ranks that
//! spin at such a priority stop everybody else on the machine.

use std::error::Error;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lightrft_collectives::launch::{Launcher, Outcome};
use rustix::process::{Pid, Signal, kill_process};

use crate::failure::Fault;

/// How long ranks may take to start: torch alone takes seconds, four at a time on two cores.
const START: Duration = Duration::from_secs(60);

/// How long one order may take.
const ORDER: Duration = Duration::from_secs(10);

/// How long ranks may take to end when asked to.
const END: Duration = Duration::from_secs(5);

/// Processor time, in microseconds, that a rank of real-time priority may use without ever waiting in the kernel.
const SPIN_LIMIT: &str = "15000000";

/// Whether the bench was told to end by a signal, which launchers pass on to the ranks.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether the bench was told to end by a signal. Known once a contender has been dropped.
pub(crate) fn was_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// How ranks are scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// `SCHED_RR`: nothing else on the machine preempts a rank.
    Rr,
    /// As any program.
    Normal,
}

impl Priority {
    /// What stands before a rank's program.
    fn prefix(self) -> Vec<String> {
        match self {
            Priority::Normal => Vec::new(),
            Priority::Rr => {
                let limit = format!("--rttime={SPIN_LIMIT}:{SPIN_LIMIT}");
                ["prlimit".into(), limit, "chrt".into(), "-r".into(), "10".into()].into()
            }
        }
    }

    /// Whether this process may take it.
    pub(crate) fn is_permitted(self) -> bool {
        let mut words = self.prefix();
        words.push("true".into());
        let quiet = std::process::Stdio::null;
        let tried = std::process::Command::new(&words[0]).args(&words[1..]).stderr(quiet()).status();
        tried.is_ok_and(|status| status.success())
    }
}

/// Whether each rank's calling thread is pinned to core `rank % cores`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pin {
    /// Where the contender is not slower for it.
    Best,
    Cores,
    None,
}

/// How ranks are started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conditions {
    pub(crate) priority: Priority,
    pub(crate) pin: Pin,
}

/// The program of a contender's ranks.
#[derive(Clone)]
pub(crate) struct Program {
    /// As in the table.
    pub(crate) label: &'static str,
    /// The program and its arguments.
    pub(crate) words: Vec<String>,
    /// Whether it starts the ranks by itself, as mpirun does.
    pub(crate) starts_ranks: bool,
    /// Whether it is no slower with its ranks on cores of their own.
    pub(crate) likes_pins: bool,
}

/// The time of one order, or that there is no such operation here.
pub(crate) enum Answer {
    /// Nanoseconds of each iteration: the maximum over ranks.
    Times(Vec<u64>),
    Unsupported,
}

/// Running ranks.
pub(crate) struct Contender {
    pub(crate) label: &'static str,
    /// Of the library, as it tells itself.
    pub(crate) version: String,
    ranks: Vec<Connection>,
    /// Whether an order failed: its ranks may never end by themselves.
    broken: bool,
    launcher: Option<JoinHandle<lightrft_collectives::Result<Outcome>>>,
}

struct Connection {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    pid: Option<Pid>,
}

impl Contender {
    /// Starts the ranks and waits until all have said hello.
    pub(crate) fn start(
        program: &Program,
        ranks: usize,
        conditions: Conditions,
        folder: &Path,
    ) -> Result<Self, Box<dyn Error>> {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let path = folder.join(format!("socket-{}", STARTED.fetch_add(1, Ordering::Relaxed)));
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        let mut words = conditions.priority.prefix();
        words.extend(program.words.iter().map(|word| word.replace("RANKS", &ranks.to_string())));
        let pin = match conditions.pin {
            Pin::Cores => "cores",
            Pin::Best if program.likes_pins => "cores",
            Pin::Best | Pin::None => "none",
        };
        let launcher = Launcher::new(&words[0])
            .args(&words[1..])
            .env("LIGHTRFT_BENCH_SOCKET", &path)
            .env("LIGHTRFT_BENCH_PIN", OsStr::new(pin))
            .ranks(if program.starts_ranks { 1 } else { ranks })
            .grace(Duration::from_secs(1));
        let launcher = thread::Builder::new().name(program.label.into()).spawn(move || launcher.run())?;
        let (label, version) = (program.label, String::new());
        let mut contender =
            Contender { label, version, ranks: Vec::new(), broken: false, launcher: Some(launcher) };
        let mut greeted: Vec<(usize, Connection)> = Vec::new();
        let until = Instant::now() + START;
        while greeted.len() < ranks {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    let (connection, rank, version) = Connection::greet(stream)?;
                    contender.version = version;
                    greeted.push((rank, connection));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let ended = contender.launcher.as_ref().is_none_or(JoinHandle::is_finished);
                    if ended || Instant::now() > until {
                        let why = if ended { "ended" } else { "did not start in time" };
                        return Err(format!("{label}: ranks {why}, {} of {ranks} came", greeted.len()).into());
                    }
                    thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(e.into()),
            }
        }
        greeted.sort_by_key(|(rank, _)| *rank);
        contender.ranks = greeted.into_iter().map(|(_, connection)| connection).collect();
        Ok(contender)
    }

    /// Gives all ranks an order and waits for their times.
    pub(crate) fn obey(&mut self, order: &str) -> Result<Answer, Box<dyn Error>> {
        let answer = self.try_obey(order);
        self.broken |= answer.is_err();
        answer.map_err(|error| format!("{}: `{order}`: {error}", self.label).into())
    }

    fn try_obey(&mut self, order: &str) -> Result<Answer, Box<dyn Error>> {
        let until = Instant::now() + ORDER;
        for rank in &mut self.ranks {
            rank.stream.write_all(format!("{order}\n").as_bytes())?;
        }
        let mut slowest: Vec<u64> = Vec::new();
        for (number, rank) in self.ranks.iter_mut().enumerate() {
            let line = rank.line(until).map_err(|e| format!("rank {number}: {e}"))?;
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("ok") => {}
                // All ranks say so, or none: the others' answers are still to be read.
                Some("unsupported") => continue,
                _ => return Err(format!("rank {number} said `{line}`").into()),
            }
            let times: Vec<u64> = words.map(str::parse).collect::<Result<_, _>>()?;
            slowest.resize(times.len(), 0);
            slowest.iter_mut().zip(times).for_each(|(slowest, time)| *slowest = time.max(*slowest));
        }
        Ok(if slowest.is_empty() { Answer::Unsupported } else { Answer::Times(slowest) })
    }

    /// Lets all ranks call again and again, lets the last one fail, and waits until those who must be told have been: the time
    /// to the last of them, and whether all of them named the one at fault.
    pub(crate) fn suffer(mut self, fault: Fault) -> Result<(Duration, bool), Box<dyn Error>> {
        let victim = self.ranks.len() - 1;
        let order = if fault == Fault::Mismatch { fault.name() } else { "failure" };
        for rank in &mut self.ranks {
            writeln!(rank.stream, "{order} f32 0 0 0")?;
        }
        // In the midst of calls: they are at work long before.
        thread::sleep(Duration::from_millis(200));
        let begin = Instant::now();
        let pid = self.ranks[victim].pid.ok_or("no process id")?;
        match fault {
            Fault::Kill => kill_process(pid, Signal::KILL)?,
            Fault::Silence => kill_process(pid, Signal::STOP)?,
            Fault::Mismatch => {}
        }
        let told = if fault == Fault::Mismatch { victim + 1 } else { victim };
        let (mut last, mut named) = (Duration::ZERO, true);
        for rank in &mut self.ranks[..told] {
            let line = rank.line(begin + ORDER)?;
            let words: Vec<&str> = line.splitn(3, ' ').collect();
            let ["lost", who, what] = words[..] else { return Err(format!("no loss: `{line}`").into()) };
            named &= who == victim.to_string();
            last = match fault {
                Fault::Mismatch => last.max(Duration::from_nanos(what.parse()?)),
                Fault::Kill | Fault::Silence => begin.elapsed(),
            };
        }
        if fault == Fault::Silence {
            // It would not end by itself.
            kill_process(pid, Signal::KILL)?;
        }
        Ok((last, named))
    }

    /// Ends ranks that do not end by themselves.
    fn kill(&self) {
        for pid in self.ranks.iter().filter_map(|rank| rank.pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        let Some(launcher) = self.launcher.take() else { return };
        // The end of its orders is a rank's sign to leave.
        for rank in &self.ranks {
            let _ = rank.stream.shutdown(std::net::Shutdown::Both);
        }
        let begin = Instant::now();
        let mut killed = false;
        while !launcher.is_finished() && begin.elapsed() < 2 * END {
            if !killed && (self.broken || begin.elapsed() > END) {
                eprintln!("{}: killing the ranks, which do not end", self.label);
                self.kill();
                killed = true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        if !launcher.is_finished() {
            return;
        }
        match launcher.join() {
            Ok(Ok(outcome)) if outcome.signal.is_some() => INTERRUPTED.store(true, Ordering::Relaxed),
            Ok(Err(error)) => eprintln!("{}: {error}", self.label),
            _ => {}
        }
    }
}

impl Connection {
    /// Reads `hello RANK PID VERSION`.
    fn greet(stream: UnixStream) -> Result<(Self, usize, String), Box<dyn Error>> {
        let lines = BufReader::new(stream.try_clone()?);
        let mut connection = Connection { stream, lines, pid: None };
        let line = connection.line(Instant::now() + ORDER)?;
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        let ["hello", rank, pid, version] = words[..] else {
            return Err(format!("no hello: `{line}`").into());
        };
        connection.pid = Pid::from_raw(pid.parse()?);
        Ok((connection, rank.parse()?, version.trim().into()))
    }

    fn line(&mut self, until: Instant) -> io::Result<String> {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(left))?;
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended")),
            Ok(_) => Ok(line.trim_end().into()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {ORDER:?}")))
            }
            Err(e) => Err(e),
        }
    }
}
