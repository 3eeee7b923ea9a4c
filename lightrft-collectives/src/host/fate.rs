//! What has gone wrong in this world, and the alarms that tell whoever waits

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::wire::Cause;

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

#[derive(Debug, Default)]
struct Inner {
    /// The first loss of a rank. It holds for all groups: a training step cannot go on with some.
    lost: Option<Cause>,
    /// The first failure of each group.
    groups: HashMap<u64, Cause>,
    /// Ranks of the world that said goodbye.
    left: HashSet<usize>,
    /// Ranks that dropped their end of a group.
    left_group: HashSet<(usize, u64)>,
    alarms: Vec<(u64, Weak<Alarm>)>,
}

/// The failures of a world, as this rank knows them.
#[derive(Debug, Default)]
pub(super) struct Fate {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Fate {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An alarm for a group; rung at once if the group is already dead: others may have been faster in making it.
    pub(super) fn alarm(&self, group: u64) -> io::Result<Arc<Alarm>> {
        let alarm = Arc::new(Alarm::new()?);
        let mut inner = self.lock();
        inner.alarms.retain(|(_, alarm)| alarm.strong_count() > 0);
        inner.alarms.push((group, Arc::downgrade(&alarm)));
        if inner.lost.is_some() || inner.groups.contains_key(&group) {
            alarm.ring();
        }
        Ok(alarm)
    }

    /// Whether a failure of one group, or of the world, would be the first, which all others should hear of.
    pub(super) fn is_news(&self, group: Option<u64>) -> bool {
        let inner = self.lock();
        inner.lost.is_none() && group.is_none_or(|group| !inner.groups.contains_key(&group))
    }

    /// Records a failure of one group, or of the world.
    pub(super) fn record(&self, group: Option<u64>, cause: Cause) {
        let mut inner = self.lock();
        match group {
            None => inner.lost = Some(cause),
            Some(group) => drop(inner.groups.insert(group, cause)),
        }
        for (id, alarm) in &inner.alarms {
            if group.is_none_or(|group| group == *id)
                && let Some(alarm) = alarm.upgrade()
            {
                alarm.ring();
            }
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

    /// Why `group` is dead, if it is. A group's own failure comes first: it was there before the world's.
    pub(super) fn cause(&self, group: u64) -> Option<Cause> {
        let inner = self.lock();
        inner.groups.get(&group).or(inner.lost.as_ref()).cloned()
    }

    /// Whether `rank` has left the world or this group.
    pub(super) fn has_left(&self, rank: usize, group: u64) -> bool {
        let inner = self.lock();
        inner.left.contains(&rank) || inner.left_group.contains(&(rank, group))
    }

    /// As [`cause`](Fate::cause), waiting for one up to `timeout` unless `rank` is known to have left.
    pub(super) fn await_cause(&self, group: u64, rank: usize, timeout: Duration) -> Option<Cause> {
        let begin = Instant::now();
        loop {
            if let Some(cause) = self.cause(group) {
                return Some(cause);
            }
            let inner = self.lock();
            let rest = timeout.saturating_sub(begin.elapsed());
            if rest.is_zero() || inner.left.contains(&rank) || inner.left_group.contains(&(rank, group)) {
                return inner.groups.get(&group).or(inner.lost.as_ref()).cloned();
            }
            // A change between the two locks is seen on the next round, at most this much later.
            drop(self.changed.wait_timeout(inner, rest.min(Duration::from_millis(20))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_late_to_a_dead_group_hears_its_alarm() {
        let fate = Fate::default();
        fate.record(Some(7), Cause::Timeout { waited: Duration::ZERO, missing: vec![1] });
        assert!(fate.alarm(7).unwrap().is_rung());
        assert!(!fate.alarm(8).unwrap().is_rung());
    }
}
