//! How an NCCL communicator begins and ends, each within a deadline
//!
//! Making one takes two steps. The ranks meet in a communicator that does not block, so that a rank that does not come is
//! given up at the deadline; from that they split the one that blocks, on which calls are made. The first is kept, for groups to be
//! split from later; one that was itself split off gets such a *root* when it is first needed.
#![allow(unsafe_code)]

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use super::comm::{Comm, Life, lock};
use super::cuda::Gpu;
use super::raw::{self, Calls, CommHandle, Config, Fault, UniqueId};
use super::watchdog;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::operation::{Call, digest};

impl Comm {
    /// Makes the communicator of all members of `host`, which all call this with the same `id`.
    pub(super) fn init(
        nccl: &'static raw::Nccl,
        gpu: &Arc<Gpu>,
        host: &Arc<dyn Communicator>,
        id: UniqueId,
        limit: Duration,
    ) -> Result<Arc<Comm>> {
        let begin = Instant::now();
        let comm = Comm::new(nccl, gpu, host, digest(id.0.map(usize::from)));
        let rooted = comm.take_root(&**host, id, begin, limit);
        let made = rooted.and_then(|root| comm.split_handle(root, 0, host.rank(), begin, limit));
        comm.begin(made)
    }

    /// Meets the other members of `host` in a communicator that does not block.
    fn take_root(
        &self,
        host: &dyn Communicator,
        id: UniqueId,
        begin: Instant,
        limit: Duration,
    ) -> Result<CommHandle> {
        let _current = self.gpu.enter()?;
        let mut config = Config::new(Calls::Return);
        let (root, progress) = self.nccl.init(host.world_size(), id, host.rank(), &mut config);
        let _ = self.root.set(root);
        self.settle(root, progress, Call::Subgroup, begin, limit)?;
        Ok(root)
    }

    /// Splits a communicator that blocks from `root`. The caller holds the lock, or is the only one to know of this one. 0 for
    /// [`raw::NO_COLOUR`].
    fn split_handle(
        &self,
        root: CommHandle,
        colour: i32,
        key: usize,
        begin: Instant,
        limit: Duration,
    ) -> Result<CommHandle> {
        let _current = self.gpu.enter()?;
        // Leaked if NCCL fails: it may still write there.
        let new = Box::into_raw(Box::new(0));
        let mut config = Config::new(Calls::Block);
        // SAFETY: live, and ours (this function's contract); `new` is freed below only when the root has settled.
        let asked = unsafe { self.nccl.split(root, colour, key, new, &mut config) };
        self.settle(root, self.progress_of(root, asked), Call::Subgroup, begin, limit)?;
        // SAFETY: made above from a box, and NCCL is done with it.
        Ok(*unsafe { Box::from_raw(new) })
    }

    /// Makes a communicator of some members: of those that give a `group` on the host. All members of this one call it with
    /// the same `colour`, and with an `id` to meet anew, the same too, if this one [needs a root](Comm::needs_root).
    pub(super) fn split(
        &self,
        host: &dyn Communicator,
        colour: i32,
        group: Option<&Arc<dyn Communicator>>,
        id: Option<UniqueId>,
        limit: Duration,
    ) -> Result<Option<Arc<Comm>>> {
        let begin = Instant::now();
        // What NCCL does for a split is not to wait behind calls that may be stuck.
        while self.is_busy() {
            if begin.elapsed() > limit {
                return Err(watchdog::fail(self, self.late(Call::Subgroup, begin.elapsed())));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        let life = self.enter(Call::Subgroup)?;
        let root = match (self.root.get(), id) {
            (Some(root), _) => Ok(*root),
            (None, Some(id)) => self.take_root(host, id, begin, limit),
            (None, None) => Err(self.rootless()),
        };
        let (mine, key) = group.map_or((raw::NO_COLOUR, 0), |group| (colour, group.rank()));
        let made = root.and_then(|root| self.split_handle(root, mine, key, begin, limit));
        let made = made.map_err(|error| watchdog::fail(self, error))?;
        drop(life);
        let Some(group) = group else { return Ok(None) };
        let id = digest([self.id as usize, colour as usize]);
        let comm = Comm::new(self.nccl, &self.gpu, group, id);
        comm.begin(Ok(made)).map(Some)
    }

    /// Whether groups can be split off only when the members have met anew: the same on all of them.
    pub(super) fn needs_root(&self) -> bool {
        self.root.get().is_none()
    }

    fn rootless(&self) -> crate::error::Error {
        let message = "the members have no communicator to split from".into();
        self.error(Call::Subgroup, Fault { code: 5, message })
    }

    /// Takes the handle that was made, and puts the communicator under the watchdog's eyes.
    fn begin(self: Arc<Self>, made: Result<CommHandle>) -> Result<Arc<Comm>> {
        match made {
            Ok(raw) => {
                let _ = self.raw.set(raw);
                watchdog::register(&self);
                Ok(self)
            }
            Err(error) => {
                self.record(&error);
                lock(&self.host).take();
                watchdog::abort(vec![self]);
                Err(error)
            }
        }
    }

    /// Leaves the communicator to a thread that destroys it. Does not wait.
    pub(super) fn retire(self: Arc<Self>) {
        let healthy = self.host_failure(Call::Barrier).is_none();
        // What was called last is compared, too, as long as the group lives.
        self.tell(Duration::ZERO);
        // Before the process can end: the group on the host says goodbye in this thread.
        lock(&self.host).take();
        self.retiring.store(true, Ordering::SeqCst);
        watchdog::in_background("lightrft-nccl-end", move || self.end(healthy));
    }

    /// Destroys the communicator, within [`watchdog::END`] if nothing is wrong with it; else aborts it.
    fn end(&self, healthy: bool) {
        let begin = Instant::now();
        while healthy && self.is_busy() && begin.elapsed() < watchdog::END {
            std::thread::sleep(watchdog::POLL);
        }
        let mut life = lock(&self.life);
        let Ok(_current) = self.gpu.enter() else { return };
        if *life == Life::Gone || self.aborting.load(Ordering::SeqCst) {
            return;
        }
        *life = Life::Gone;
        self.tell(Duration::ZERO);
        let idle = healthy && !self.is_busy() && self.failure().is_none();
        // Calls before the root: none of its kernels can be what the other waits for.
        for raw in self.handles() {
            let in_order = idle && {
                // SAFETY: live until now, ours while `life` is held, and marked as gone.
                let asked = unsafe { self.nccl.finalize(raw) };
                self.settle(raw, self.progress_of(raw, asked), Call::Barrier, begin, watchdog::END).is_ok()
            };
            let ended = if in_order {
                // SAFETY: as above.
                unsafe { self.nccl.destroy(raw) }
            } else {
                // SAFETY: as above.
                unsafe { self.nccl.abort(raw) }
            };
            if let Err(fault) = ended {
                let (group, message) = (&self.name, fault.message);
                tracing::warn!(group, message, "a communicator could not be freed");
            }
        }
        watchdog::forget(self);
    }

    /// What there is to free.
    fn handles(&self) -> impl Iterator<Item = CommHandle> {
        [&self.raw, &self.root].into_iter().filter_map(|handle| handle.get().copied()).filter(|raw| *raw != 0)
    }

    /// Tells the kernels of the communicator to end, as the first half of an abort: the thread is between
    /// `ncclGroupStart` and `ncclGroupEnd`, and the second half, which frees it, comes with the latter.
    ///
    /// Returns the lock if it could be had soon. `None` inside: another thread is in a call, where it is stuck until the
    /// kernels have ended. `None` outside: the communicator is gone, or another thread ends it.
    pub(super) fn mark_aborted(&self, patience: Duration) -> Option<Option<MutexGuard<'_, Life>>> {
        let life = self.lock_within(patience);
        match &life {
            Some(life) if **life == Life::Gone => return None,
            Some(_) => {}
            None if self.retiring.load(Ordering::SeqCst) => return None,
            // The stuck thread borrows the owner: until it leaves, nobody destroys the communicator.
            None => self.aborting.store(true, Ordering::SeqCst),
        }
        for raw in self.handles() {
            // Nothing of CUDA is called before: it may be stuck behind a launch until the kernels end.
            // SAFETY: live; it is freed by the caller's `ncclGroupEnd`, which waits for the lock.
            if let Err(fault) = unsafe { self.nccl.abort(raw) } {
                let (group, message) = (&self.name, fault.message);
                tracing::warn!(group, message, "a communicator could not be aborted");
            }
        }
        Some(life)
    }

    /// The lock, if it can be had within `patience`.
    pub(super) fn lock_within(&self, patience: Duration) -> Option<MutexGuard<'_, Life>> {
        let begin = Instant::now();
        loop {
            match self.life.try_lock() {
                Ok(life) => return Some(life),
                Err(std::sync::TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) if begin.elapsed() > patience => return None,
                Err(std::sync::TryLockError::WouldBlock) => std::thread::sleep(watchdog::POLL),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::communicator::CommunicatorExt;
    use crate::error::Error;
    use crate::local::World;

    #[test]
    #[ignore = "needs a GPU: cargo xtask gpu test"]
    fn gpus_whose_other_ranks_do_not_come_are_given_up_at_the_deadline() {
        let limit = Duration::from_millis(1500);
        World::run(2, |host| {
            if host.rank() == 0 {
                let (nccl, gpu) = (raw::Nccl::get()?, Gpu::get(0)?);
                let id = nccl.unique_id().unwrap();
                let begin = Instant::now();
                let result = Comm::init(nccl, &gpu, &host, id, limit);
                assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
                assert!(begin.elapsed() < limit * 3, "{:?}", begin.elapsed());
            }
            host.barrier()
        })
        .unwrap();
        assert!(watchdog::settle(Duration::from_secs(20)), "what was begun is not freed");
    }
}
