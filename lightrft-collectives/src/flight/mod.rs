//! The flight recorder: what each rank does now, and its last calls, read from outside
//!
//! Every rank writes its last 1024 calls to memory that others can read: the other ranks of its machine, which keep it
//! when it dies, and any program of the same user, as long as it lives. Recording a call takes tens of nanoseconds and is
//! always on. A call is recorded with the place in the program where it was made, if it was made through
//! [`CommunicatorExt`](crate::CommunicatorExt) or a [`Queue`](crate::Queue). Calls on GPUs are recorded too, in a group of their
//! own.
//!
//! A job that hangs is asked with the command `lightrft-flight PID...`, or so:
//!
//! ```no_run
//! use lightrft_collectives::flight::{self, Flight};
//!
//! let flights: Vec<Flight> = [4711, 4712].into_iter().flat_map(flight::read).flatten().collect();
//! for line in flight::diagnose(&flights) {
//!     println!("{line}"); // rank 3 is missing at step 881 of `world/1`: it is in barrier() at step 12 of ...
//! }
//! # Ok::<_, lightrft_collectives::Error>(())
//! ```
//!
//! When a group fails, its ranks log the last calls of the rank that is to blame, and write all that they know to a file
//! in the folder `LIGHTRFT_FLIGHT_DIR`, if that variable is set.

mod diagnosis;
pub(crate) mod memory;
mod places;
mod raw;
pub(crate) mod recorder;

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::diagnosis::diagnose;
pub(crate) use self::diagnosis::{Known, cycle, describe};
use self::memory::{Read, Words};
use self::raw::{Raw, RawGroup, RawRecord};
use self::recorder::{FILE, Outcome, WORDS};
use crate::operation::Signature;

/// The variable that names the folder for files about failures.
pub const DIRECTORY: &str = "LIGHTRFT_FLIGHT_DIR";

/// What the recorder of one rank held at one moment. Displayed as a table of its last calls.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Flight {
    /// The rank in the world.
    pub rank: usize,
    /// Ranks in the world.
    pub world_size: usize,
    /// A number that only ranks of one job share.
    pub job: u64,
    /// The rank's process.
    pub pid: u32,
    /// The groups that the rank is in.
    pub groups: Vec<GroupState>,
    /// The last calls, in the order in which they began. Those that were being written are left out.
    pub records: Vec<Record>,
}

/// Where a rank is in one of its groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GroupState {
    /// A number derived from the name, equal on all members.
    pub id: u64,
    /// The group's name.
    pub name: String,
    /// Number of members.
    pub size: usize,
    /// Collective calls that the rank has begun.
    pub step: u64,
    /// The step of the first call that has not ended; `step` if all have. On a group of GPUs, whose calls are enqueued, it
    /// may lie far behind `step`.
    pub at: u64,
    /// Whether the rank is in a call on this group.
    pub busy: bool,
    /// The ranks of the world (the first 16) for which that call waits, if it has waited for a while.
    pub waiting_for: Vec<usize>,
}

/// One call of one rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Record {
    /// The group's name, or its number if it is not known any more.
    pub group: String,
    /// The group's number.
    pub group_id: u64,
    /// Collective calls that the rank had begun on the group, with this one.
    pub step: u64,
    /// The call; `None` if it was written by another version.
    pub call: Option<Signature>,
    /// The file and line of the program where it was made, if that is known.
    pub site: Option<String>,
    /// When it began, before now.
    pub begun: Duration,
    /// How it ended.
    pub state: State,
}

/// How a call stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum State {
    /// It has not returned.
    Running,
    /// It returned, this long before now.
    Done(Duration),
    /// It returned an error, this long before now.
    Failed(Duration),
}

/// A call under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Doing {
    /// The group's name.
    pub group: String,
    /// The group's number.
    pub group_id: u64,
    /// Collective calls that the rank had begun on the group, with this one.
    pub step: u64,
    /// The call; `None` if more than 1024 others were begun since.
    pub call: Option<Signature>,
    /// The file and line of the program where it was made, if that is known.
    pub site: Option<String>,
    /// How long it has taken.
    pub since: Option<Duration>,
    /// The ranks of the world for which it waits, if it has waited for a while.
    pub waiting_for: Vec<usize>,
}

/// What a rank does now. Displayed as the rest of a sentence: "is in barrier() at step 12 of `world` for 3 s".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// The calls that it is in: several, if its threads use several groups.
    pub doing: Vec<Doing>,
    /// The last call that it returned from.
    pub last: Option<Record>,
    /// The collective calls that it has begun on each of its groups, by the group's number.
    pub steps: Vec<(u64, u64)>,
}

/// Bytes per element, for display.
fn bytes(call: &Signature) -> Option<u64> {
    call.dtype.map(|dtype| call.count * crate::buffer::element_bytes(dtype) as u64)
}

/// Reads the recorders of a process: one for each world that it has joined and not left.
///
/// # Errors
/// If there is no such process or it is another user's. A process that is no rank gives an empty list.
pub fn read(pid: u32) -> io::Result<Vec<Flight>> {
    let mut flights = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // Descriptors come and go meanwhile.
        let named = std::fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().contains(FILE));
        if named && let Some(flight) = open(&path).ok().as_ref().and_then(Flight::of) {
            // A child that was forked, and did not start another program, still holds its parent's.
            flights.extend((flight.pid == pid).then_some(flight));
        }
    }
    Ok(flights)
}

/// Maps the recorder of another process.
pub(crate) fn open(path: &Path) -> io::Result<Read> {
    Read::open(path, WORDS)
}

fn duration(nanos: u64) -> Duration {
    Duration::from_nanos(nanos)
}

impl Flight {
    /// What is in a recorder now; `None` if it is none of this version.
    pub(crate) fn of(words: &impl Words) -> Option<Self> {
        raw::read(words).map(Self::from_raw)
    }

    fn from_raw(raw: Raw) -> Self {
        let name = |id: u64| {
            let known = raw.groups.iter().find(|group| group.id == id);
            known.map_or_else(|| format!("#{id:016x}"), |group| group.name.clone())
        };
        let record = |record: &RawRecord| Record {
            group: name(record.group),
            group_id: record.group,
            step: record.step,
            call: record.signature,
            site: record.place.checked_sub(1).and_then(|place| raw.places.get(place).cloned()),
            begun: duration(record.begun),
            state: match record.ended {
                None => State::Running,
                Some((ago, Outcome::Done)) => State::Done(duration(ago)),
                Some((ago, Outcome::Failed)) => State::Failed(duration(ago)),
            },
        };
        let group = |group: &RawGroup| GroupState {
            id: group.id,
            name: group.name.clone(),
            size: group.size,
            step: group.step,
            at: group.at,
            busy: group.running.is_some(),
            waiting_for: group.waits_for.clone(),
        };
        Flight {
            rank: raw.rank,
            world_size: raw.world,
            job: raw.nonce,
            pid: raw.pid,
            groups: raw.groups.iter().map(group).collect(),
            records: raw.records.iter().map(record).collect(),
        }
    }

    /// What the rank does now.
    pub fn status(&self) -> Status {
        let doing = self.groups.iter().filter(|group| group.busy).map(|group| {
            let running = |record: &&Record| {
                record.group_id == group.id && record.step == group.at && record.state == State::Running
            };
            // Of enqueued calls the first is under way, the others wait behind it.
            let record = self.records.iter().find(running);
            Doing {
                group: group.name.clone(),
                group_id: group.id,
                step: group.at,
                call: record.and_then(|record| record.call),
                site: record.and_then(|record| record.site.clone()),
                since: record.map(|record| record.begun),
                waiting_for: group.waiting_for.clone(),
            }
        });
        let ended = |record: &&Record| record.state != State::Running;
        let when = |record: &&Record| match record.state {
            State::Done(ago) | State::Failed(ago) => ago,
            State::Running => Duration::MAX,
        };
        Status {
            doing: doing.collect(),
            last: self.records.iter().filter(ended).min_by_key(when).cloned(),
            steps: self.groups.iter().map(|group| (group.id, group.step)).collect(),
        }
    }
}

/// A duration as people read it.
pub(crate) struct Short(pub(crate) Duration);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs_f64() {
            s if s >= 1.0 => write!(f, "{s:.1} s"),
            s if s >= 1e-3 => write!(f, "{:.1} ms", s * 1e3),
            s => write!(f, "{:.1} us", s * 1e6),
        }
    }
}

/// A list of ranks as people read it.
pub(crate) struct Ranks<'a>(pub(crate) &'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shown, rest) = self.0.split_at(self.0.len().min(16));
        f.write_str(if self.0.len() == 1 { "rank " } else { "ranks " })?;
        for (place, rank) in shown.iter().enumerate() {
            write!(f, "{}{rank}", if place == 0 { "" } else { ", " })?;
        }
        if rest.is_empty() { Ok(()) } else { write!(f, " and {} more", rest.len()) }
    }
}

/// A place in the program as people read it.
struct At<'a>(Option<&'a str>);

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |site| write!(f, " ({site})"))
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.call {
            Some(call) => write!(f, "{call}")?,
            None => write!(f, "a call")?,
        }
        write!(f, " at step {} of `{}`{}", self.step, self.group, At(self.site.as_deref()))?;
        if let Some(since) = self.since {
            write!(f, " for {}", Short(since))?;
        }
        if !self.waiting_for.is_empty() {
            write!(f, ", waiting for {}", Ranks(&self.waiting_for))?;
        }
        Ok(())
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.call {
            Some(call) => write!(f, "{call}")?,
            None => write!(f, "a call")?,
        }
        write!(f, " at step {} of `{}`{}", self.step, self.group, At(self.site.as_deref()))?;
        match self.state {
            State::Running => write!(f, ", running for {}", Short(self.begun)),
            State::Done(ago) => write!(f, ", ended {} ago", Short(ago)),
            State::Failed(ago) => write!(f, ", failed {} ago", Short(ago)),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.doing[..], &self.last) {
            ([], None) => f.write_str("has made no call"),
            ([], Some(last)) => write!(f, "is in no call; its last: {last}"),
            (doing, _) => {
                for (place, one) in doing.iter().enumerate() {
                    write!(f, "{}{one}", if place == 0 { "is in " } else { " and in " })?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rank {} of {} (pid {}) {}", self.rank, self.world_size, self.pid, self.status())?;
        for record in &self.records {
            write!(f, "  -{:<9}", Short(record.begun).to_string())?;
            match record.state {
                State::Running => write!(f, " running  ")?,
                State::Done(ago) => {
                    write!(f, " {:<9}", Short(record.begun.saturating_sub(ago)).to_string())?;
                }
                State::Failed(_) => write!(f, " failed   ")?,
            }
            write!(f, " {:<16} {:>6} ", record.group, record.step)?;
            match &record.call {
                Some(call) => match bytes(call) {
                    Some(bytes) => write!(f, "{call}, {bytes} bytes")?,
                    None => write!(f, "{call}")?,
                },
                None => write!(f, "?")?,
            }
            writeln!(f, "{}", At(record.site.as_deref()))?;
        }
        Ok(())
    }
}
