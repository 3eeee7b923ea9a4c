//! One verdict for all ranks: what a failure means for each group, agreed on by its members
//!
//! A failure is *declared* by whoever notices it: a watcher that a rank died, a caller that it met another call than its
//! own or that a deadline passed. Every member then says what it knows, in the rounds of an
//! [`agreement`](super::agreement), and all decide for the same [`Cause`]. Only then do the callers of that group hear of
//! it. So two deaths at one time, or a death that races with a deadline, give the same error everywhere.
//!
//! Promised is: all members that answer within [`PATIENCE`] return the same cause, whoever dies meanwhile. A member
//! that does not answer is not waited for longer, and one that is seen to be stopped not even that long; it is bound by what
//! the others decided when it goes on.

use std::collections::{BTreeSet, HashMap};
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::agreement::{Agreed, Agreement, Word};
use super::note::{Absent, Cause, Note, Said};
use super::watcher::Shared;
use crate::error::Loss;

/// How long one round of an agreement takes at most where all that live run. They answer at once, from their watchers.
pub(super) const SETTLE: Duration = Duration::from_millis(250);

/// How long a round may take. On a machine that is very busy a watcher may not run for a while, and a verdict without it
/// may not be the one that it comes to.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// How often it is looked whether those that do not answer are stopped.
const LOOK: Duration = Duration::from_millis(50);

/// An agreement under way, or done.
#[derive(Debug)]
struct Case<V> {
    members: Vec<usize>,
    agreement: Agreement<V>,
    /// When its present round began, while it is under way.
    round_since: Option<Instant>,
}

/// All agreements of a world that this rank has heard of.
#[derive(Debug, Default)]
pub(super) struct Court {
    verdicts: HashMap<u64, Case<Cause>>,
    rebuilds: HashMap<u64, Case<Absent>>,
}

impl<V: Agreed> Case<V> {
    fn new(shared: &Shared, group: u64, members: &[usize]) -> Self {
        let gone = |rank: &usize| shared.fate.is_lost(*rank) || shared.fate.has_left(*rank, group);
        let lost: Vec<usize> = members.iter().copied().filter(gone).collect();
        let agreement = Agreement::new(shared.rank, members.iter().copied(), lost);
        Case { members: members.to_vec(), agreement, round_since: None }
    }

    /// Tells the members what the agreement has to say, and notes the time.
    fn say(&mut self, shared: &Shared, group: u64, words: Vec<Word<V>>, note: impl Fn(Said<V>) -> Note) {
        if words.is_empty() {
            return;
        }
        self.round_since = self.agreement.decided().is_none().then(Instant::now);
        if self.round_since.is_some() {
            // It may be asleep for as long as nothing comes, and has a round to end now.
            shared.wake();
        }
        for word in words {
            let said = Said::new(group, self.members.clone(), word);
            shared.tell(self.members.iter().copied(), &note(said));
        }
    }

    /// Does `step` and says what follows; gives the decision when it has just been made.
    fn step(
        &mut self,
        shared: &Shared,
        group: u64,
        note: impl Fn(Said<V>) -> Note,
        step: impl FnOnce(&mut Agreement<V>) -> Vec<Word<V>>,
    ) -> Option<V> {
        let before = self.agreement.decided().is_some();
        let words = step(&mut self.agreement);
        self.say(shared, group, words, note);
        self.agreement.decided().filter(|_| !before).cloned()
    }
}

impl Shared {
    fn court(&self) -> MutexGuard<'_, Court> {
        self.court.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Declares that a group has failed. The first cause that this rank declares or hears of is its word on the matter.
    /// Returns at once; the verdict comes when the members agree.
    pub(super) fn declare(&self, group: u64, cause: Cause) {
        let Some(members) = self.fate.members(group) else { return };
        self.judge(&mut self.court(), group, &members, |agreement| agreement.propose(cause));
    }

    /// Declares that a rank of the world is lost, which is the failure of every group that it is in.
    pub(super) fn declare_lost(&self, rank: usize, how: Loss) {
        let mut court = self.court();
        if !self.fate.record_loss(rank, how) {
            return;
        }
        tracing::warn!(rank = self.rank, lost = rank, %how, "a rank is lost");
        self.lose(&mut court, rank, None);
        for (group, members) in self.fate.groups_with(rank) {
            let cause = Cause::Lost { rank, how };
            self.judge(&mut court, group, &members, |agreement| agreement.propose(cause));
        }
    }

    /// Another rank has declared a rank of the world lost: that is the failure of every group that it is in, before
    /// whatever may follow from it, such as that others leave. Nobody is taken for dead on another's word, though: the
    /// agreements must first hear what the rank itself said last.
    fn hear_of_loss(&self, rank: usize, how: Loss) {
        let mut court = self.court();
        if rank == self.rank || !self.fate.record_report(rank, how) {
            return;
        }
        for (group, members) in self.fate.groups_with(rank) {
            let cause = Cause::Lost { rank, how };
            self.judge(&mut court, group, &members, |agreement| agreement.propose(cause));
        }
    }

    /// A group was entered: it may have failed before.
    pub(super) fn examine(&self, group: u64, members: &[usize]) {
        if let Some((rank, how)) = self.fate.loss_among(members) {
            self.declare(group, Cause::Lost { rank, how });
        }
    }

    pub(super) fn hear_goodbye(&self, rank: usize, group: Option<u64>) {
        let mut court = self.court();
        self.fate.record_goodbye(rank, group);
        self.lose(&mut court, rank, group);
    }

    /// A rank takes no part any more, in this group or in any.
    fn lose(&self, court: &mut Court, rank: usize, group: Option<u64>) {
        let groups = |of: Vec<u64>| of.into_iter().filter(move |id| group.is_none_or(|group| group == *id));
        for id in groups(court.verdicts.keys().copied().collect()) {
            self.judge(court, id, &[], |agreement| agreement.lose(rank));
        }
        for id in groups(court.rebuilds.keys().copied().collect()) {
            self.gather(court, id, &[], |agreement| agreement.lose(rank));
        }
    }

    pub(super) fn hear_verdict(&self, from: usize, said: Said<Cause>) {
        if !self.is_plausible(from, said.group, &said.members) {
            return;
        }
        let (group, members) = (said.group, said.members.clone());
        let mut mine = said.value.clone();
        if let Cause::Lost { rank, how: how @ (Loss::Died | Loss::Silent) } = mine {
            if how == Loss::Died && !self.is_watched(rank) {
                // It died before it connected to this rank, which would wait for it.
                self.declare_lost(rank, how);
            } else {
                self.hear_of_loss(rank, how);
            }
        }
        if let Cause::Timeout(late) = &mut mine
            && late.step > 0
            && (self.recorder.step_of(group) >= late.step || self.recorder.is_in_call_on(group))
        {
            // It has come, or it waits in an earlier call, for the one that is at fault.
            late.present.insert(self.rank);
        }
        self.judge(&mut self.court(), group, &members, |agreement| {
            let word = said.word();
            let mut words = match word {
                Word::Round(..) => agreement.propose(mine),
                Word::Decided(_) => Vec::new(),
            };
            words.extend(agreement.hear(from, word));
            words
        });
    }

    pub(super) fn hear_rebuild(&self, from: usize, said: Said<Absent>) {
        if self.is_plausible(from, said.group, &said.members) {
            let (group, members) = (said.group, said.members.clone());
            let heard = |agreement: &mut Agreement<Absent>| agreement.hear(from, said.word());
            self.gather(&mut self.court(), group, &members, heard);
        }
    }

    /// Whether this can be a word of a member to a member.
    fn is_plausible(&self, from: usize, group: u64, members: &[usize]) -> bool {
        let known = self.fate.members(group).is_none_or(|known| known == members);
        known
            && members.contains(&from)
            && members.contains(&self.rank)
            && members.iter().all(|rank| *rank < self.world)
    }

    /// Takes a step towards the verdict on a group and, if that is the last, records it. In this order: a caller that
    /// reads the record may leave, or end this process, and the others must hear the cause before they see that.
    fn judge(
        &self,
        court: &mut Court,
        group: u64,
        members: &[usize],
        step: impl FnOnce(&mut Agreement<Cause>) -> Vec<Word<Cause>>,
    ) {
        let case = court.verdicts.entry(group).or_insert_with(|| Case::new(self, group, members));
        if let Some(cause) = case.step(self, group, Note::Verdict, step) {
            tracing::warn!(rank = self.rank, ?cause, "a group is dead");
            // Those that are waiting for the verdict may wait for the account, too, but the watcher does not.
            self.accounts.add(cause.clone());
            self.fate.record_verdict(group, cause);
            self.start_writing();
        }
    }

    /// Takes a step towards knowing who is left of a group.
    fn gather(
        &self,
        court: &mut Court,
        group: u64,
        members: &[usize],
        step: impl FnOnce(&mut Agreement<Absent>) -> Vec<Word<Absent>>,
    ) {
        let case = court.rebuilds.entry(group).or_insert_with(|| Case::new(self, group, members));
        if case.step(self, group, Note::Rebuild, step).is_some() {
            self.fate.announce_change();
        }
    }

    /// When the court must [sit](Shared::court_sits) again.
    pub(super) fn court_rest(&self, now: Instant) -> Option<Duration> {
        let court = self.court();
        let since = court.verdicts.values().filter_map(|case| case.round_since).min()?;
        let rest = (since + SETTLE).saturating_duration_since(now);
        Some(if rest.is_zero() { LOOK } else { rest })
    }

    /// Goes on without those who have not answered in time.
    pub(super) fn court_sits(&self, now: Instant) {
        let mut court = self.court();
        let late = |case: &Case<Cause>| {
            let waited = case.round_since.map(|since| now.saturating_duration_since(since));
            waited.is_some_and(|waited| {
                let stopped = || case.agreement.silent().into_iter().all(|rank| self.is_stopped(rank));
                waited >= PATIENCE || waited >= SETTLE && stopped()
            })
        };
        let all: Vec<u64> =
            court.verdicts.iter().filter(|(_, case)| late(case)).map(|(group, _)| *group).collect();
        for group in all {
            self.judge(&mut court, group, &[], Agreement::give_up_on);
        }
    }

    /// Agrees with the other members on who does not come along into a new group. Whoever has not said within `timeout`
    /// that it comes does not.
    pub(super) fn agree_on_absent(
        &self,
        group: u64,
        members: &[usize],
        timeout: Duration,
    ) -> BTreeSet<usize> {
        let begin = Instant::now();
        self.gather(&mut self.court(), group, members, |agreement| agreement.propose(Absent::default()));
        loop {
            let decided =
                self.court().rebuilds.get(&group).and_then(|case| case.agreement.decided().cloned());
            if let Some(Absent(absent)) = decided {
                return absent;
            }
            let rest = timeout.saturating_sub(begin.elapsed());
            if rest.is_zero() {
                // Each round ends or loses a member: there is an end to it.
                self.fate.await_change(SETTLE);
                self.gather(&mut self.court(), group, members, Agreement::give_up_on);
            } else {
                // A change between the look and the wait is seen at most this much later.
                self.fate.await_change(rest.min(Duration::from_millis(20)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(rank: usize) -> Cause {
        Cause::Lost { rank, how: Loss::Died }
    }

    #[test]
    fn only_the_groups_of_a_lost_rank_die() {
        let shared = Shared::new(0, 3, 0).unwrap();
        let with = shared.fate.enter(7, &[0, 1]).unwrap();
        let without = shared.fate.enter(8, &[0, 2]).unwrap();
        shared.declare_lost(1, Loss::Died);
        assert!(with.is_rung() && !without.is_rung());
        assert_eq!((shared.fate.cause(7), shared.fate.cause(8)), (Some(lost(1)), None));
        // One that is made afterwards, too.
        let later = shared.fate.enter(9, &[1, 0]).unwrap();
        shared.examine(9, &[1, 0]);
        assert!(later.is_rung());
    }

    /// A control connection to `rank`, and its other end.
    fn connect(shared: &Shared, rank: usize) -> std::net::TcpStream {
        let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        shared
            .watch(rank, listener.accept().unwrap().0, super::super::watcher::Place::Here(1, None))
            .unwrap();
        theirs
    }

    /// Rank 2 has died and rank 1, which has seen it and left, was faster to say so than rank 2's connection to close.
    fn hear_of_a_death_and_a_departure() -> std::sync::Arc<Shared> {
        let shared = Shared::new(0, 3, 0).unwrap();
        let _connections = [connect(&shared, 1), connect(&shared, 2)];
        for (group, members) in [(6, &[0, 1, 2][..]), (7, &[0, 1, 2]), (8, &[0, 1])] {
            shared.fate.enter(group, members).unwrap();
        }
        shared.hear_verdict(1, Said::new(6, vec![0, 1, 2], Word::Decided(lost(2))));
        assert_eq!(shared.fate.cause(6), Some(lost(2)));
        shared.hear_goodbye(1, None);
        shared
    }

    #[test]
    fn a_rank_that_left_because_of_a_death_is_not_blamed_where_the_dead_one_was_a_member() {
        let shared = hear_of_a_death_and_a_departure();
        // What a call on that group finds: the connection to rank 1 is closed, and it has said goodbye.
        shared.declare(7, shared.fate.departed(1, 7, SETTLE));
        assert!(!shared.fate.is_lost(2), "its last words may be on the way");
        shared.declare_lost(2, Loss::Died);
        assert_eq!(shared.fate.cause(7), Some(lost(2)));
    }

    #[test]
    fn a_rank_that_left_because_of_a_death_is_said_to_elsewhere() {
        let shared = hear_of_a_death_and_a_departure();
        let left = |how| Cause::Lost { rank: 1, how };
        assert_eq!(shared.fate.departed(1, 8, SETTLE), left(Loss::LeftAfter { lost: 2 }));
        // A group that was made since then has nothing to do with it.
        shared.fate.enter(9, &[0, 1]).unwrap();
        assert_eq!(shared.fate.departed(1, 9, SETTLE), left(Loss::Left));
    }

    #[test]
    fn of_members_that_left_one_after_another_the_first_is_named() {
        let shared = Shared::new(0, 4, 0).unwrap();
        let _connections = [connect(&shared, 1), connect(&shared, 2), connect(&shared, 3)];
        shared.fate.enter(7, &[0, 1, 2]).unwrap();
        shared.fate.enter(8, &[0, 1, 3]).unwrap();
        // Rank 2 has left, to rank 1 in a group of theirs, which left then; this rank hears of rank 1 first.
        shared.fate.record_reason(1, 2);
        shared.hear_goodbye(1, None);
        let named = std::thread::scope(|scope| {
            let named = scope.spawn(|| shared.fate.departed(1, 7, Duration::from_secs(20)));
            shared.hear_goodbye(2, None);
            named.join().unwrap()
        });
        assert_eq!(named, Cause::Lost { rank: 2, how: Loss::Left });
        // Not where it was no member, nor where it still is one.
        assert_eq!(shared.fate.departed(1, 8, SETTLE), Cause::Lost { rank: 1, how: Loss::Left });
        shared.fate.record_reason(3, 0);
        shared.hear_goodbye(3, None);
        assert_eq!(shared.fate.departed(3, 8, SETTLE), Cause::Lost { rank: 3, how: Loss::Left });
    }

    #[test]
    fn a_death_that_another_rank_has_seen_is_known_to_groups_that_are_made_later() {
        let shared = hear_of_a_death_and_a_departure();
        shared.fate.enter(9, &[0, 2]).unwrap();
        shared.examine(9, &[0, 2]);
        // Too late: the cause is known.
        shared.declare(9, Cause::Lost { rank: 0, how: Loss::Failed });
        shared.declare_lost(2, Loss::Died);
        assert_eq!(shared.fate.cause(9), Some(lost(2)));
    }

    #[test]
    fn who_does_not_answer_is_not_waited_for() {
        let shared = Shared::new(0, 3, 0).unwrap();
        let alarm = shared.fate.enter(7, &[0, 1, 2]).unwrap();
        shared.declare_lost(1, Loss::Died);
        let now = Instant::now();
        assert!(!alarm.is_rung() && shared.court_rest(now).is_some_and(|rest| rest <= SETTLE));
        // Rank 2 is silent in one round.
        shared.court_sits(now + SETTLE);
        assert!(!alarm.is_rung() && shared.court_rest(now + SETTLE).is_some_and(|rest| rest <= LOOK));
        shared.court_sits(now + PATIENCE);
        assert_eq!(shared.fate.cause(7), Some(lost(1)));
        assert!(shared.court_rest(now).is_none());
    }

    #[test]
    fn the_watcher_is_woken_for_a_round_that_nobody_may_answer() {
        let shared = Shared::new(0, 2, 0).unwrap();
        shared.fate.enter(7, &[0, 1]).unwrap();
        assert!(!shared.is_woken());
        let mismatch = Cause::Lost { rank: 0, how: Loss::Failed };
        shared.declare(7, mismatch);
        assert!(shared.is_woken());
    }

    #[test]
    fn words_of_strangers_to_a_group_are_not_heard() {
        let shared = Shared::new(0, 4, 0).unwrap();
        shared.fate.enter(7, &[0, 1]).unwrap();
        let said = |members: &[usize]| Said::new(7, members.to_vec(), Word::Decided(lost(1)));
        for (from, members) in [(2, vec![0, 1]), (1, vec![0, 1, 2]), (1, vec![1, 2]), (1, vec![0, 1, 9])] {
            shared.hear_verdict(from, said(&members));
            assert_eq!(shared.fate.cause(7), None, "{from} of {members:?}");
        }
        shared.hear_verdict(1, said(&[0, 1]));
        assert_eq!(shared.fate.cause(7), Some(lost(1)));
    }

    #[test]
    fn a_member_says_of_itself_whether_it_has_come() {
        use super::super::note::Lateness;
        use crate::operation::{Call, Signature};
        let shared = Shared::new(0, 2, 0).unwrap();
        shared.fate.enter(7, &[0, 1]).unwrap();
        let slot = shared.recorder.enter(7, "world", 2);
        let barrier = Signature::bare(Call::Barrier).encode();
        for _ in 0..3 {
            shared.recorder.begin(slot, Call::Barrier, barrier, None);
        }
        for (group, step, absent) in [(7, 3, vec![0, 1]), (8, 4, vec![0])] {
            let late = Lateness {
                waited: Duration::from_secs(1),
                step,
                missing: [0].into(),
                present: [1].into(),
                reporter: 1,
                report: String::new(),
            };
            shared.fate.enter(group, &[0, 1]).unwrap();
            shared.hear_verdict(1, Said::new(group, vec![0, 1], Word::Round(1, Cause::Timeout(late))));
            let Some(Cause::Timeout(late)) = shared.fate.cause(group) else { panic!() };
            // If all say that they have come, the one that was not heard from is named.
            let expected = if group == 7 { vec![0] } else { absent };
            assert_eq!(late.absent(&[0, 1]), expected);
        }
    }
}
