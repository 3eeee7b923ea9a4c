//! What has gone wrong in this world, and the alarms that tell whoever waits

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::note::Cause;
use crate::error::Loss;

/// Rung once, when its group dies; stays readable, so that a poll sees it at any time.
#[derive(Debug)]
pub(super) struct Alarm {
    rung: AtomicBool,
    fd: OwnedFd,
}

impl Alarm {
    fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Alarm { rung: AtomicBool::new(false), fd })
    }

    pub(super) fn is_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    fn ring(&self) {
        self.rung.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }
}

/// A group that this rank is in.
#[derive(Debug)]
struct Membership {
    ranks: Vec<usize>,
    alarm: Weak<Alarm>,
    /// Who had been lost when this rank entered it: nothing here follows from that.
    bygone: BTreeSet<usize>,
}

#[derive(Debug, Default)]
struct Inner {
    groups: HashMap<u64, Membership>,
    /// Why a group is dead, by the agreement of its members. Of groups that this rank is in, or is about to make.
    verdicts: HashMap<u64, Cause>,
    /// Ranks that died, which kills every group that they are in.
    lost: BTreeMap<usize, Loss>,
    /// Ranks that others have declared lost. This rank's own connection to such a one may still bring its last words.
    reported: BTreeMap<usize, Loss>,
    /// Ranks that said goodbye, which kills a group only when somebody waits for them.
    left: HashSet<usize>,
    /// Ranks that dropped their end of a group.
    left_group: HashSet<(usize, u64)>,
    /// Of ranks that said goodbye, whom they had been told to have lost.
    reasons: HashMap<usize, usize>,
    /// The rank that the first verdict of a loss was about.
    first_loss: Option<usize>,
}

impl Inner {
    fn has_left(&self, rank: usize, group: u64) -> bool {
        self.left.contains(&rank) || self.left_group.contains(&(rank, group))
    }

    /// The other member of `group` because of whose loss `rank`, which left, may have done so.
    fn reason(&self, rank: usize, group: u64) -> Option<usize> {
        let members = &self.groups.get(&group)?.ranks;
        self.reasons.get(&rank).copied().filter(|reason| members.contains(reason) && *reason != rank)
    }
}

/// The failures of a world, as this rank knows them. Ranks are those of the world.
#[derive(Debug, Default)]
pub(super) struct Fate {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Fate {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a group and returns its alarm; rung at once if the group is already dead: others may have been faster in
    /// making it.
    pub(super) fn enter(&self, group: u64, ranks: &[usize]) -> io::Result<Arc<Alarm>> {
        let alarm = Arc::new(Alarm::new()?);
        let mut inner = self.lock();
        let bygone = inner.lost.keys().chain(inner.reported.keys()).copied().collect();
        let membership = Membership { ranks: ranks.to_vec(), alarm: Arc::downgrade(&alarm), bygone };
        inner.groups.insert(group, membership);
        if inner.verdicts.contains_key(&group) {
            alarm.ring();
        }
        Ok(alarm)
    }

    /// Forgets a group that this rank has left.
    pub(super) fn leave(&self, group: u64) {
        let mut inner = self.lock();
        inner.groups.remove(&group);
        inner.verdicts.remove(&group);
        inner.left_group.retain(|(_, of)| *of != group);
    }

    /// Records that a rank died, if that is new.
    pub(super) fn record_loss(&self, rank: usize, how: Loss) -> bool {
        let mut inner = self.lock();
        let is_new = !inner.lost.contains_key(&rank);
        inner.lost.entry(rank).or_insert(how);
        drop(inner);
        self.changed.notify_all();
        is_new
    }

    /// Records that another rank has declared `rank` lost, if that is news.
    pub(super) fn record_report(&self, rank: usize, how: Loss) -> bool {
        let mut inner = self.lock();
        if inner.lost.contains_key(&rank) || inner.reported.contains_key(&rank) {
            return false;
        }
        inner.reported.insert(rank, how);
        true
    }

    /// How `rank`, which is not in `group` any more, is to be called lost: where another rank of the world was lost since the
    /// group was made, that came first.
    fn departure(&self, rank: usize, group: u64) -> Loss {
        let inner = self.lock();
        let none = BTreeSet::new();
        let bygone = inner.groups.get(&group).map_or(&none, |of| &of.bygone);
        let mut lost = inner.lost.keys().chain(inner.reported.keys()).copied();
        match lost.find(|lost| *lost != rank && !bygone.contains(lost)) {
            Some(lost) => Loss::LeftAfter { lost },
            None => Loss::Left,
        }
    }

    /// The groups that this rank shares with `rank` and that are not known to be dead, with their members.
    pub(super) fn groups_with(&self, rank: usize) -> Vec<(u64, Vec<usize>)> {
        let inner = self.lock();
        let shared = inner.groups.iter().filter(|(_, of)| of.ranks.contains(&rank));
        let live = shared.filter(|(group, _)| !inner.verdicts.contains_key(group));
        live.map(|(group, of)| (*group, of.ranks.clone())).collect()
    }

    /// The first of these ranks that died, by this rank's own knowledge or by another's word, and how.
    pub(super) fn loss_among(&self, ranks: &[usize]) -> Option<(usize, Loss)> {
        let inner = self.lock();
        let known = inner.lost.iter().chain(&inner.reported).find(|(rank, _)| ranks.contains(rank));
        known.map(|(rank, how)| (*rank, *how))
    }

    pub(super) fn is_lost(&self, rank: usize) -> bool {
        self.lock().lost.contains_key(&rank)
    }

    /// The members of a group that this rank is in.
    pub(super) fn members(&self, group: u64) -> Option<Vec<usize>> {
        self.lock().groups.get(&group).map(|of| of.ranks.clone())
    }

    /// Records why a group is dead, and rings its alarm.
    pub(super) fn record_verdict(&self, group: u64, cause: Cause) {
        let mut inner = self.lock();
        if let Cause::Lost { rank, .. } = cause {
            inner.first_loss.get_or_insert(rank);
        }
        inner.verdicts.entry(group).or_insert(cause);
        if let Some(alarm) = inner.groups.get(&group).and_then(|of| of.alarm.upgrade()) {
            alarm.ring();
        }
        self.changed.notify_all();
    }

    pub(super) fn record_goodbye(&self, rank: usize, group: Option<u64>) {
        let mut inner = self.lock();
        match group {
            None => inner.left.insert(rank),
            Some(group) => inner.left_group.insert((rank, group)),
        };
        self.changed.notify_all();
    }

    /// Why `group` is dead, if it is.
    pub(super) fn cause(&self, group: u64) -> Option<Cause> {
        self.lock().verdicts.get(&group).cloned()
    }

    /// Whether `rank` has left the world or this group.
    pub(super) fn has_left(&self, rank: usize, group: u64) -> bool {
        self.lock().has_left(rank, group)
    }

    /// The rank that the first verdict of a loss was about, if there was one.
    pub(super) fn first_loss(&self) -> Option<usize> {
        self.lock().first_loss
    }

    /// Records that `rank`, which is about to say goodbye, had been told that it lost `reason`.
    pub(super) fn record_reason(&self, rank: usize, reason: usize) {
        self.lock().reasons.entry(rank).or_insert(reason);
    }

    /// The failure of `group` that it is that `rank` is not in it any more: where that rank left because another member
    /// had, the other one's departure. Waits up to `timeout` for word of that.
    pub(super) fn departed(&self, rank: usize, group: u64, timeout: Duration) -> Cause {
        let mut first = rank;
        let mut passed = BTreeSet::from([rank]);
        loop {
            let Some(reason) = self.lock().reason(first, group) else { break };
            let heard = |inner: &Inner| inner.has_left(reason, group) || inner.lost.contains_key(&reason);
            if let Some(verdict) = self.await_verdict(group, timeout, heard) {
                return verdict;
            }
            if !self.has_left(reason, group) || !passed.insert(reason) {
                break;
            }
            first = reason;
        }
        Cause::Lost { rank: first, how: self.departure(first, group) }
    }

    /// As [`cause`](Fate::cause), waiting for one up to `timeout`, unless `rank` is known to have left.
    pub(super) fn await_cause(&self, group: u64, rank: usize, timeout: Duration) -> Option<Cause> {
        self.await_verdict(group, timeout, |inner| inner.has_left(rank, group))
    }

    /// Waits up to `timeout` for the verdict on a group that has failed.
    pub(super) fn await_agreement(&self, group: u64, timeout: Duration) -> Option<Cause> {
        self.await_verdict(group, timeout, |_| false)
    }

    fn await_verdict(
        &self,
        group: u64,
        timeout: Duration,
        in_vain: impl Fn(&Inner) -> bool,
    ) -> Option<Cause> {
        let begin = Instant::now();
        let mut inner = self.lock();
        loop {
            let rest = timeout.saturating_sub(begin.elapsed());
            let verdict = inner.verdicts.get(&group).cloned();
            if verdict.is_some() || rest.is_zero() || in_vain(&inner) {
                return verdict;
            }
            inner = self.changed.wait_timeout(inner, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits up to `timeout` until something has changed.
    pub(super) fn await_change(&self, timeout: Duration) {
        drop(self.changed.wait_timeout(self.lock(), timeout));
    }

    /// Wakes whoever [waits for a change](Fate::await_change).
    pub(super) fn announce_change(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_late_to_a_dead_group_hears_its_alarm() {
        let fate = Fate::default();
        fate.record_verdict(7, Cause::Lost { rank: 1, how: Loss::Failed });
        assert!(fate.enter(7, &[0, 1]).unwrap().is_rung());
        assert!(!fate.enter(8, &[0, 1]).unwrap().is_rung());
    }

    #[test]
    fn a_loss_concerns_the_groups_that_the_rank_is_in() {
        let fate = Fate::default();
        let alarms = [(7, vec![0, 1]), (8, vec![0, 2]), (9, vec![0, 1, 2])]
            .map(|(group, ranks)| fate.enter(group, &ranks).unwrap());
        assert!(fate.record_loss(1, Loss::Died) && !fate.record_loss(1, Loss::Silent));
        let mut groups: Vec<u64> = fate.groups_with(1).into_iter().map(|(group, _)| group).collect();
        groups.sort_unstable();
        assert_eq!(groups, [7, 9]);
        assert_eq!(fate.loss_among(&[0, 1]), Some((1, Loss::Died)));
        assert_eq!(fate.loss_among(&[0, 2]), None);
        assert!(alarms.iter().all(|alarm| !alarm.is_rung()));
    }
}
