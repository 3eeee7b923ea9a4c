//! Faults that ranks make on purpose in the midst of a schedule, and what the others must be told

use std::fmt;

use lightrft_collectives::{Error, Loss, ReduceOp};

use super::random::Random;
use super::schedule::{Call, DTYPES, Kind, Schedule};

/// What the culprit does instead of the call that the others make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another operation.
    OtherCall,
    /// The same on another element type.
    OtherDtype,
    /// More elements.
    OtherCount,
    /// Another reduce operation.
    OtherOp,
    /// Another root.
    OtherRoot,
    /// The next call first.
    Swapped,
    /// The next call, leaving this one out.
    Skipped,
    /// Nothing, until the others have given it up.
    Absent,
    /// Its process is stopped at a random moment.
    Stopped,
    /// It drops its communicators.
    Left,
}

impl Fault {
    pub(crate) const MISMATCHES: [Fault; 7] = [
        Fault::OtherCall,
        Fault::OtherDtype,
        Fault::OtherCount,
        Fault::OtherOp,
        Fault::OtherRoot,
        Fault::Swapped,
        Fault::Skipped,
    ];

    /// By its position here, through the environment.
    pub(crate) const ALL: [Fault; 10] = [
        Fault::OtherCall,
        Fault::OtherDtype,
        Fault::OtherCount,
        Fault::OtherOp,
        Fault::OtherRoot,
        Fault::Swapped,
        Fault::Skipped,
        Fault::Absent,
        Fault::Stopped,
        Fault::Left,
    ];

    /// Whether the group is given up at the deadline, with nobody lost.
    pub(crate) fn is_silence(self) -> bool {
        matches!(self, Fault::Absent | Fault::Stopped)
    }
}

/// Who does what, from the first call after the healthy part on.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) fault: Fault,
    /// The family whose group goes wrong, and that group.
    pub(crate) family: usize,
    pub(crate) line: Vec<usize>,
    /// Its rank in the world.
    pub(crate) culprit: usize,
    /// What the members are to call, in turns, until they have their error.
    pub(crate) calls: [Call; 2],
    /// What the culprit calls.
    pub(crate) instead: [Call; 2],
    /// A random number, for the moment.
    pub(crate) moment: u64,
}

impl Plan {
    /// Draws a fault of this kind for the groups that `schedule` has made; equal on all ranks.
    pub(crate) fn draw(fault: Fault, schedule: &mut Schedule) -> Plan {
        let family = schedule.any_company();
        let lines = schedule.family(family).lines.clone();
        let line = schedule.random.pick(&lines).clone();
        let culprit = *schedule.random.pick(&line);
        let size = line.len();
        let first = loop {
            let call = schedule.collective(size);
            // Counts that come from a hash may be the same for another `count`.
            let hashed = matches!(call.kind, Kind::AllGatherCounts | Kind::AllToAllV);
            if fits(fault, call.kind) && !hashed {
                break call;
            }
        };
        let second = loop {
            let call = schedule.collective(size);
            if to_others(call.kind) != to_others(first.kind) {
                break call;
            }
        };
        let instead = match fault {
            Fault::Swapped => [second, first],
            Fault::Skipped => [second, second],
            Fault::Absent | Fault::Stopped | Fault::Left => [first, second],
            _ => [change(first, fault, size, &mut schedule.random), second],
        };
        let moment = schedule.random.next();
        Plan { fault, family, line, culprit, calls: [first, second], instead, moment }
    }

    /// Whether this is what every member, the culprit among them, must be told.
    pub(crate) fn is_told_by(&self, error: &Error) -> bool {
        match error {
            Error::Mismatch { rank, mine, other, theirs, .. } => {
                let culprit_at_fault = *rank == self.culprit || *other == self.culprit;
                Fault::MISMATCHES.contains(&self.fault) && culprit_at_fault && rank != other && mine != theirs
            }
            Error::Timeout { missing, .. } => self.fault.is_silence() && missing == &[self.culprit],
            Error::PeerLost { rank, how, .. } => {
                self.fault == Fault::Left && *rank == self.culprit && *how == Loss::Left
            }
            _ => false,
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { fault, line, culprit, calls, instead, .. } = self;
        write!(f, "{fault:?} of rank {culprit} in {line:?}, {:?} and not {:?}", instead[0], calls[0])
    }
}

fn fits(fault: Fault, kind: Kind) -> bool {
    match fault {
        Fault::OtherDtype | Fault::OtherCount => kind.has_data(),
        Fault::OtherOp => kind.reduces(),
        Fault::OtherRoot => kind.has_root(),
        _ => true,
    }
}

/// The kind as the other ranks see it: whether a rank works in place is its own affair.
fn to_others(kind: Kind) -> Kind {
    match kind {
        Kind::AllReduceInto => Kind::AllReduce,
        Kind::ReduceScatterInPlace => Kind::ReduceScatter,
        Kind::AllGatherInPlace => Kind::AllGather,
        kind => kind,
    }
}

fn change(call: Call, fault: Fault, size: usize, random: &mut Random) -> Call {
    let mut other = call;
    let is_another = |other: &Call| match fault {
        Fault::OtherCall => other.kind.is_one_collective() && to_others(other.kind) != to_others(call.kind),
        _ => *other != call,
    };
    while !is_another(&other) {
        match fault {
            Fault::OtherDtype => other.dtype = *random.pick(&DTYPES),
            Fault::OtherCount => other.count = call.count + 1 + random.below(1000),
            Fault::OtherOp => other.op = *random.pick(&ReduceOp::ALL),
            Fault::OtherRoot => other.root = random.below(size),
            _ => other.kind = *random.pick(&Kind::ALL),
        }
        if !other.op.allows(other.dtype) {
            other = call;
        }
    }
    other
}

/// What of a verdict must be equal on all ranks: all but the call in flight and the waiting time, which each has of its own.
pub(crate) fn verdict(error: &Error) -> String {
    match error {
        Error::Timeout { group, missing, .. } => format!("on `{group}`, {missing:?} missing"),
        Error::PeerLost { rank, how, .. } => format!("rank {rank} {how}"),
        other => other.to_string(),
    }
}
