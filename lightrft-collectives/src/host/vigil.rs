//! A call that waits: who has not come, what do they do instead, and does anybody wait in a circle
//!
//! The call itself finds out, on its own thread, at the slow end of its waiting: from the recorders of the ranks of this
//! machine, which it can read whether or not they live, and by asking the watchers of the others.

use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fate::Alarm;
use super::note::{Cause, Lateness, Note};
use super::watcher::Shared;
use super::world::Card;
use crate::flight::recorder::{Ticket, is_step};
use crate::flight::{Known, Ranks, Short, Status, cycle, describe};
use crate::operation::Signature;
use crate::site;

/// How long a rank of another machine may take to say what it does.
const ANSWER: Duration = Duration::from_millis(300);

/// Ranks that are looked at for one report: those that are missing, those that they wait for, and so on.
const MOST: usize = 64;

/// How long a caller, or whoever leaves the world, waits for what is being written about a failure.
const WRITTEN: Duration = Duration::from_secs(1);

/// Calls of a lost rank that are logged.
const LAST_CALLS: usize = 5;

/// One call's watch over those it waits for.
pub(super) struct Vigil<'a> {
    pub(super) shared: &'a Shared,
    pub(super) cards: &'a [Card],
    pub(super) alarm: &'a Alarm,
    pub(super) group: &'a str,
    pub(super) id: u64,
    /// Ranks of the world, by rank in the group.
    pub(super) ranks: &'a [usize],
    pub(super) call: Signature,
    pub(super) step: u64,
    pub(super) ticket: Ticket,
    /// The first report is due after this time.
    patience: Duration,
    /// When something is to be done next, and when the next report is due.
    next: Cell<Duration>,
    report: Cell<Duration>,
}

/// What was found out about those that a call waits for.
struct Account {
    text: String,
    /// Two calls of one group that wait for each other.
    mismatch: Option<Cause>,
}

/// What is known of a rank's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    Lives,
    Stopped,
    Ended,
    /// It is on another machine, and has not answered.
    Silent,
}

/// What a call is, for its vigil.
pub(super) struct Subject<'a> {
    pub(super) group: &'a str,
    pub(super) id: u64,
    pub(super) ranks: &'a [usize],
    pub(super) call: Signature,
    pub(super) ticket: Ticket,
}

impl<'a> Vigil<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        cards: &'a [Card],
        alarm: &'a Alarm,
        patience: Duration,
        subject: Subject<'a>,
    ) -> Self {
        let Subject { group, id, ranks, call, ticket } = subject;
        let step = if is_step(call.call) { ticket.step() } else { 0 };
        let next = Cell::new(publish_every(patience));
        let report = Cell::new(patience);
        Vigil { shared, cards, alarm, group, id, ranks, call, step, ticket, patience, next, report }
    }

    /// The watch over those of a part of the group only: `ranks` of the world, which are from then on ranks 0, 1, ...
    pub(super) fn over(&self, ranks: &'a [usize]) -> Self {
        let (next, report) = (self.next.clone(), self.report.clone());
        Vigil { ranks, next, report, ..*self }
    }

    /// To be called now and then, at least once a second, while a call waits: how long it has, and for which ranks of the
    /// group.
    #[inline]
    pub(super) fn still_waiting(&self, waited: Duration, missing: impl FnOnce() -> Vec<usize>) {
        if waited >= self.next.get() {
            self.look(waited, &missing());
        }
    }

    /// The longest time between two calls of [`still_waiting`](Vigil::still_waiting).
    pub(super) fn longest_nap(&self) -> Duration {
        publish_every(self.patience)
    }

    fn look(&self, waited: Duration, missing: &[usize]) {
        self.next.set(waited + publish_every(self.patience));
        let missing = self.of_world(missing);
        self.shared.recorder.waits_for(self.ticket, &missing);
        if waited < self.report.get() {
            return;
        }
        self.report.set(waited * 2);
        let account = self.account(waited, &missing);
        tracing::warn!(rank = self.shared.rank, group = self.group, "{}", account.text);
        if let Some(cause) = account.mismatch {
            self.shared.declare(self.id, cause);
        }
    }

    fn of_world(&self, members: &[usize]) -> Vec<usize> {
        members.iter().filter_map(|member| self.ranks.get(*member).copied()).collect()
    }

    /// The cause that a deadline passed. Ranks are those of the group; `come` have been seen to make this call: they may be too
    /// slow to say so themselves before the others agree on who is missing.
    pub(super) fn lateness(&self, waited: Duration, missing: &[usize], come: &[usize]) -> Cause {
        let (missing, come) = (self.of_world(missing), self.of_world(come));
        self.shared.recorder.waits_for(self.ticket, &missing);
        let account = self.account(waited, &missing);
        account.mismatch.unwrap_or_else(|| {
            Cause::Timeout(Lateness {
                waited,
                step: self.step,
                missing: missing.into_iter().collect(),
                present: come.into_iter().chain([self.shared.rank]).collect(),
                reporter: self.shared.rank,
                report: account.text,
            })
        })
    }

    fn account(&self, waited: Duration, missing: &[usize]) -> Account {
        let known = self.inquire(missing);
        let mut text = format!("{} on `{}`", self.call, self.group);
        if self.step > 0 {
            let _ = write!(text, " at step {}", self.step);
        }
        if let Some(site) = site::current() {
            let _ = write!(text, " ({}:{})", site.file(), site.line());
        }
        let _ = write!(text, " has waited {} for {}", Short(waited), Ranks(missing));
        if self.step > 0 {
            let come: Vec<usize> =
                self.ranks.iter().copied().filter(|rank| !missing.contains(rank)).collect();
            let _ = write!(text, "; {} came", Ranks(&come));
        }
        for rank in missing.iter().take(8) {
            let _ = write!(text, "; {}", self.portrait(*rank, known.get(rank)));
        }
        let circle = cycle(&known, self.shared.rank);
        // A call that all make and a message between two, on one group, wait for each other for ever.
        let mismatch = circle.as_ref().and_then(|circle| {
            let [mine, theirs] = &circle[..] else { return None };
            let (rank, other, mine, theirs) = (mine.rank, theirs.rank, mine.call?, theirs.call?);
            let one_group = circle.iter().all(|edge| edge.group_id == self.id);
            let differ = is_step(mine.call) != is_step(theirs.call);
            let ordered =
                if rank < other { (rank, mine, other, theirs) } else { (other, theirs, rank, mine) };
            let (rank, mine, other, theirs) = ordered;
            (one_group && differ).then_some(Cause::Mismatch { rank, mine, other, theirs })
        });
        if let Some(circle) = circle {
            let _ = write!(text, "; {}", describe(&circle));
        }
        Account { text, mismatch }
    }

    /// A rank's process and what it does.
    fn portrait(&self, rank: usize, status: Option<&Status>) -> String {
        let mut text = format!("rank {rank}");
        if let Some(card) = self.cards.get(rank) {
            let _ = write!(text, " (pid {} on {})", card.pid, card.node);
        }
        match self.condition(rank, status) {
            Condition::Lives => {}
            Condition::Stopped => text.push_str(" is stopped and"),
            Condition::Ended => text.push_str(" has ended and"),
            Condition::Silent => text.push_str(" does not answer"),
        }
        if let Some(status) = status {
            let _ = write!(text, " {status}");
        }
        text
    }

    fn is_here(&self, rank: usize) -> bool {
        let host = |rank: usize| self.cards.get(rank).map(|card| &card.host);
        host(rank).is_some() && host(rank) == host(self.shared.rank)
    }

    fn condition(&self, rank: usize, status: Option<&Status>) -> Condition {
        if !self.is_here(rank) {
            return if status.is_some() { Condition::Lives } else { Condition::Silent };
        }
        Condition::of(self.cards.get(rank).map_or(0, |card| card.pid))
    }
}

impl Condition {
    /// Of a process of this machine.
    pub(super) fn of(pid: u32) -> Self {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return Condition::Ended };
        // The state comes after the program's name, which is in parentheses and may hold some itself.
        match stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()) {
            Some('T' | 't') => Condition::Stopped,
            Some('Z' | 'X') => Condition::Ended,
            _ => Condition::Lives,
        }
    }
}

impl Vigil<'_> {
    /// What the missing ranks do, and those that they wait for, and so on.
    fn inquire(&self, missing: &[usize]) -> Known {
        let mut known = Known::new();
        let mut asked: BTreeSet<usize> = BTreeSet::new();
        let mut open: Vec<usize> = missing.to_vec();
        open.push(self.shared.rank);
        while !open.is_empty() && asked.len() < MOST && !self.alarm.is_rung() {
            open.retain(|rank| asked.insert(*rank));
            let (here, elsewhere): (Vec<usize>, Vec<usize>) =
                open.drain(..).partition(|rank| *rank == self.shared.rank || self.is_here(*rank));
            known
                .extend(here.into_iter().filter_map(|rank| Some((rank, self.shared.flight(rank)?.status()))));
            known.extend(self.ask(&elsewhere));
            let waited_for =
                known.values().flat_map(|status| &status.doing).flat_map(|doing| &doing.waiting_for);
            open.extend(waited_for.copied().filter(|rank| !asked.contains(rank)));
        }
        known
    }

    /// Asks ranks of other machines what they do, and waits a little for their answers.
    fn ask(&self, ranks: &[usize]) -> Vec<(usize, Status)> {
        let asked = Instant::now();
        if !ranks.is_empty() {
            self.shared.tell(ranks.iter().copied(), &Note::Ask);
        }
        loop {
            let answers: Vec<(usize, Status)> =
                ranks.iter().filter_map(|rank| Some((*rank, self.shared.answer(*rank, asked)?))).collect();
            let rest = ANSWER.saturating_sub(asked.elapsed());
            if answers.len() == ranks.len() || rest.is_zero() || self.alarm.is_rung() {
                return answers;
            }
            self.shared.fate.await_change(rest.min(Duration::from_millis(20)));
        }
    }
}

/// How often a waiting call says for whom it waits: often enough that all have before the first report.
fn publish_every(patience: Duration) -> Duration {
    (patience / 4).clamp(Duration::from_millis(1), Duration::from_secs(1))
}

/// What is still to be written about failures, in their order. A thread of its own writes it: a file system that hangs must not
/// hold up the watcher, which others would take for dead.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    due: Mutex<Due>,
    written: Condvar,
}

#[derive(Debug, Default)]
struct Due {
    causes: VecDeque<Cause>,
    /// Whether a thread writes.
    is_writing: bool,
}

impl Accounts {
    fn due(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one. Whoever does then [starts](Shared::start_writing) the writing.
    pub(super) fn add(&self, cause: Cause) {
        self.due().causes.push_back(cause);
    }

    /// Waits a little until all is written: whoever hears of a failure may end this process.
    pub(super) fn await_written(&self) {
        let is_due = |due: &mut Due| due.is_writing || !due.causes.is_empty();
        drop(self.written.wait_timeout_while(self.due(), WRITTEN, is_due));
    }

    /// The next, or the end of the writing.
    fn next(&self) -> Option<Cause> {
        let mut due = self.due();
        let next = due.causes.pop_front();
        if next.is_none() {
            due.is_writing = false;
            self.written.notify_all();
        }
        next
    }
}

impl Shared {
    /// Has a thread write what is due. Does not wait.
    pub(super) fn start_writing(&self) {
        let Some(shared) = self.own.upgrade() else { return };
        if std::mem::replace(&mut self.accounts.due().is_writing, true) {
            return;
        }
        let write = move || {
            while let Some(cause) = shared.accounts.next() {
                shared.keep_account(&cause);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("lightrft-account".into()).spawn(write) {
            tracing::warn!(%error, "no thread can be started to write what the flight recorder holds");
            self.accounts.due().causes.clear();
            self.accounts.next();
        }
    }

    /// Logs the last calls of a rank that is to blame for a group's death and, if a folder for that was named, writes
    /// down what the recorders hold.
    fn keep_account(&self, cause: &Cause) {
        let blamed = match cause {
            Cause::Lost { rank, .. } => vec![*rank],
            Cause::Mismatch { rank, other, .. } => vec![*rank, *other],
            Cause::Timeout(late) => late.missing.iter().copied().collect(),
        };
        let flights = || {
            let ranks: BTreeSet<usize> = blamed.iter().copied().chain([self.rank]).take(8).collect();
            ranks.into_iter().filter_map(|rank| self.flight(rank))
        };
        for flight in flights().filter(|flight| flight.rank != self.rank) {
            let last = flight.records.iter().rev().take(LAST_CALLS).map(ToString::to_string);
            let last = last.collect::<Vec<_>>().join("; ");
            tracing::warn!(rank = self.rank, of = flight.rank, "last calls, the latest first: {last}");
        }
        let Some(directory) = &self.directory else { return };
        let path = directory.join(format!("rank{}-pid{}.txt", self.rank, std::process::id()));
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(directory)?;
            // The first failure is the one that tells: others follow from it.
            let mut file = std::fs::File::create_new(&path)?;
            let flights: String = flights().map(|flight| format!("{flight}\n")).collect();
            std::io::Write::write_all(&mut file, format!("{cause:?}\n\n{flights}").as_bytes())
        };
        if let Err(error) = write()
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            tracing::warn!(%error, path = %path.display(), "cannot write what the flight recorder holds");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Loss;

    #[test]
    fn a_verdict_does_not_wait_for_what_is_written_about_it() {
        let shared = Shared::new(0, 2, 0).unwrap();
        let alarm = shared.fate.enter(7, &[0, 1]).unwrap();
        // As if a thread wrote to a file system that hangs.
        shared.accounts.due().is_writing = true;
        shared.declare_lost(1, Loss::Died);
        assert!(alarm.is_rung());
        let begin = Instant::now();
        shared.accounts.await_written();
        assert!(begin.elapsed() >= WRITTEN);
        assert_eq!(shared.accounts.due().causes.len(), 1);

        shared.accounts.due().is_writing = false;
        shared.start_writing();
        while shared.accounts.due().is_writing {
            shared.accounts.await_written();
        }
        assert!(shared.accounts.due().causes.is_empty());
    }
}
