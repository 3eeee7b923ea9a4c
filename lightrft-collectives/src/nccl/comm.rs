//! One NCCL communicator: how it begins, how calls are enqueued on it, how it ends
//!
//! Whoever calls NCCL on a communicator holds its lock, [`Comm::life`]. Two things are done without: asking whether
//! enqueued work is done, which is a matter of CUDA events, and telling the kernels of a communicator to end while
//! another thread is stuck in a call on it (see [`watchdog`](super::watchdog)).
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::cuda::Gpu;
use super::device::{DeviceMemory, Event};
use super::raw::{self, CommHandle, Config, Fault, Lane, Progress, UniqueId};
use super::record::{EnqueuedState, Record};
use super::watchdog;
use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::operation::{Call, Signature};

/// How long to look without sleeping whether NCCL has taken a call: about what it needs for one.
const EAGER: Duration = Duration::from_micros(200);

/// Whether the communicator can still be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Live,
    /// Freed, or about to be by whoever has set this.
    Gone,
}

/// Enqueued work that the watchdog waits for.
#[derive(Debug)]
pub(super) struct Pending {
    event: Arc<Event>,
    call: Call,
    /// In the record.
    sequence: u64,
    since: Instant,
    limit: Duration,
}

/// A communicator as its owner, the watchdog and the threads that end it share it.
#[derive(Debug)]
pub(super) struct Comm {
    nccl: &'static raw::Nccl,
    pub(super) gpu: Arc<Gpu>,
    /// The group's name.
    pub(super) name: String,
    /// This rank in the world.
    world_rank: usize,
    raw: CommHandle,
    life: Mutex<Life>,
    /// Why it is dead: what every call returns from then on.
    failure: OnceLock<Error>,
    pending: Mutex<VecDeque<Pending>>,
    /// Events to use again.
    spare: Mutex<Vec<Arc<Event>>>,
    pub(super) record: Record,
    /// The group on the host, until the owner goes: its last owner says goodbye to the other ranks, and must not be a thread
    /// that may not get to it before the process ends.
    host: Mutex<Option<Arc<dyn Communicator>>>,
    /// What barriers reduce, one `f32`: it outlives the work that is enqueued on it.
    pub(super) zero: OnceLock<DeviceMemory>,
    /// Set when the owner is gone and a thread of its own destroys the communicator.
    retiring: AtomicBool,
    /// Set when an abort has begun without the lock: whoever began it ends it.
    aborting: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Comm {
    fn new(
        nccl: &'static raw::Nccl,
        gpu: &Arc<Gpu>,
        host: &Arc<dyn Communicator>,
        raw: CommHandle,
    ) -> Arc<Comm> {
        Arc::new(Comm {
            nccl,
            gpu: gpu.clone(),
            name: host.name().to_owned(),
            world_rank: host.ranks()[host.rank()],
            raw,
            life: Mutex::new(Life::Live),
            failure: OnceLock::new(),
            pending: Mutex::default(),
            spare: Mutex::default(),
            record: Record::default(),
            host: Mutex::new(Some(host.clone())),
            zero: OnceLock::new(),
            retiring: AtomicBool::new(false),
            aborting: AtomicBool::new(false),
        })
    }

    /// Makes the communicator of all members of `host`, which all call this with the same `id`.
    pub(super) fn init(
        nccl: &'static raw::Nccl,
        gpu: &Arc<Gpu>,
        host: &Arc<dyn Communicator>,
        id: UniqueId,
        limit: Duration,
    ) -> Result<Arc<Comm>> {
        let begin = Instant::now();
        let _current = gpu.enter()?;
        let (raw, progress) = nccl.init(host.world_size(), id, host.rank(), &mut Config::new());
        let comm = Comm::new(nccl, gpu, host, raw);
        comm.begin(progress, begin, limit)
    }

    /// Makes a communicator of some members: of those that give a `group` on the host. All members of this one call it with
    /// the same `colour`.
    pub(super) fn split(
        &self,
        colour: i32,
        group: Option<&Arc<dyn Communicator>>,
        limit: Duration,
    ) -> Result<Option<Arc<Comm>>> {
        let begin = Instant::now();
        // NCCL does not split a communicator that is at work.
        while !lock(&self.pending).is_empty() {
            self.alive()?;
            if begin.elapsed() > limit {
                return Err(watchdog::fail(self, self.late(Call::Subgroup, begin.elapsed())));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        let life = self.enter(Call::Subgroup)?;
        let _current = self.gpu.enter()?;
        let (colour, key) = group.map_or((raw::NO_COLOUR, 0), |group| (colour, group.rank()));
        // Leaked if NCCL fails: it may still write there.
        let new = Box::into_raw(Box::new(0));
        // SAFETY: live, and ours while `life` is held; `new` is freed below only when the parent has settled.
        let asked = unsafe { self.nccl.split(self.raw, colour, key, new, &mut Config::new()) };
        let settled = self.settle(self.progress_of(asked), Call::Subgroup, begin, limit);
        settled.map_err(|error| watchdog::fail(self, error))?;
        drop(life);
        // SAFETY: made above from a box, and NCCL is done with it.
        let raw = *unsafe { Box::from_raw(new) };
        let Some(group) = group else { return Ok(None) };
        let comm = Comm::new(self.nccl, &self.gpu, group, raw);
        // SAFETY: nobody else has the new one yet.
        let progress = unsafe { self.nccl.async_error(raw) };
        comm.begin(progress, begin, limit).map(Some)
    }

    /// Waits for a new communicator to be ready, and puts it under the watchdog's eyes.
    fn begin(
        self: Arc<Self>,
        progress: Result<Progress, Fault>,
        begin: Instant,
        limit: Duration,
    ) -> Result<Arc<Comm>> {
        let settled = self.settle(progress, Call::Subgroup, begin, limit);
        match settled {
            Ok(()) => {
                watchdog::register(&self);
                Ok(self)
            }
            Err(error) => {
                let _ = self.failure.set(error.clone());
                lock(&self.host).take();
                watchdog::abort(vec![self]);
                Err(error)
            }
        }
    }

    /// How far the last call has come: some calls say that they are done when they have only begun. The caller holds the lock.
    fn progress_of(&self, asked: Result<Progress, Fault>) -> Result<Progress, Fault> {
        asked?;
        // SAFETY: live, and no other thread calls anything on it (this function's contract).
        unsafe { self.nccl.async_error(self.raw) }
    }

    /// Waits until NCCL has taken the last call. The caller holds the lock, or is the only one to know of this communicator.
    fn settle(
        &self,
        progress: Result<Progress, Fault>,
        call: Call,
        begin: Instant,
        limit: Duration,
    ) -> Result<()> {
        let mut progress = progress;
        let mut looked = begin;
        loop {
            match progress {
                Ok(Progress::Done) => return Ok(()),
                Ok(Progress::Running) => {}
                Err(fault) => return Err(self.error(call, fault)),
            }
            self.alive()?;
            let now = Instant::now();
            if now - begin > limit {
                return Err(self.late(call, now - begin));
            }
            if now - begin < EAGER {
                std::thread::yield_now();
            } else {
                // NCCL does not notice that a rank has died; the host does.
                if now - looked > watchdog::POLL {
                    looked = now;
                    if let Some(error) = self.host_failure(call) {
                        return Err(error);
                    }
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            // SAFETY: live, and no other thread calls anything on it (this function's contract).
            progress = unsafe { self.nccl.async_error(self.raw) };
        }
    }

    /// Enqueues the calls that `enqueue` makes on `stream`, `fused` of them of which `first` is the first, and leaves the watchdog to see them done within `limit`.
    ///
    /// # Safety
    /// `stream` is a live stream of this communicator's GPU, and what `enqueue` passes to the lane is as [`Lane::new`] asks.
    pub(super) unsafe fn enqueue(
        &self,
        first: Signature,
        fused: usize,
        stream: usize,
        limit: Duration,
        enqueue: impl FnOnce(&Lane) -> Result<Progress, Fault>,
    ) -> Result<()> {
        let (begin, call) = (Instant::now(), first.call);
        let life = self.enter(call)?;
        let current = self.gpu.enter()?;
        // SAFETY: live and ours while `life` is held; the rest is the caller's promise.
        let lane = unsafe { Lane::new(self.nccl, self.raw, stream) };
        let taken = self.settle(self.progress_of(enqueue(&lane)), call, begin, limit);
        let watched = taken.and_then(|()| self.watch(first, fused, stream, begin, limit));
        // Told before anything else of CUDA is called, which may be stuck behind a launch.
        let result = watched.map_err(|error| watchdog::fail(self, error));
        drop((current, life));
        result
    }

    /// Marks where the stream has done the call.
    fn watch(
        &self,
        first: Signature,
        fused: usize,
        stream: usize,
        since: Instant,
        limit: Duration,
    ) -> Result<()> {
        // What is captured into a graph happens when the graph is launched, any number of times or never.
        // SAFETY: `enqueue` was promised a live stream of this GPU.
        if unsafe { self.gpu.is_capturing(stream)? } {
            self.record.push(first, fused, EnqueuedState::Captured);
            return Ok(());
        }
        let (call, sequence) = (first.call, self.record.push(first, fused, EnqueuedState::Outstanding));
        let spare = lock(&self.spare).pop();
        let event = spare.map_or_else(|| Event::new(&self.gpu).map(Arc::new), Ok)?;
        // SAFETY: as above; the event is ours.
        unsafe { self.gpu.record(event.raw, stream)? };
        lock(&self.pending).push_back(Pending { event, call, sequence, since, limit });
        watchdog::expect_one();
        if self.failure().is_some() {
            // The watchdog has turned away from this communicator, perhaps before it saw this call.
            watchdog::forget(self);
        }
        Ok(())
    }

    /// The lock, if the communicator can be called.
    fn enter(&self, call: Call) -> Result<MutexGuard<'_, Life>> {
        self.alive()?;
        let life = lock(&self.life);
        self.alive()?;
        if *life == Life::Live {
            return Ok(life);
        }
        Err(self.error(call, Fault { code: 5, message: "the communicator is gone".into() }))
    }

    /// The error of every call on a dead communicator: what it has died of.
    pub(super) fn alive(&self) -> Result<()> {
        match self.failure.get() {
            None => Ok(()),
            Some(failure) => Err(failure.clone()),
        }
    }

    pub(super) fn failure(&self) -> Option<&Error> {
        self.failure.get()
    }

    /// Records why the communicator is dead, unless it has died of something before. Returns whether this is news.
    pub(super) fn record(&self, error: &Error) -> bool {
        self.failure.set(error.clone()).is_ok()
    }

    fn error(&self, call: Call, fault: Fault) -> Error {
        let Fault { code, message } = fault;
        Error::Nccl { call, group: self.name.clone(), rank: self.world_rank, code, message }
    }

    fn late(&self, call: Call, waited: Duration) -> Error {
        // NCCL does not tell who is late. The other ranks' numbers of the same call do.
        let outstanding =
            self.record.read().into_iter().find(|call| call.state == EnqueuedState::Outstanding);
        let rank = self.world_rank;
        let report = match outstanding {
            Some(first) => format!("the GPU of rank {rank} has not done its call {first}"),
            None => format!("NCCL on rank {rank} has not taken the call"),
        };
        Error::Timeout { call, group: self.name.clone(), waited, missing: Vec::new(), report }
    }

    /// What the group on the host has died of.
    pub(super) fn host_failure(&self, call: Call) -> Option<Error> {
        lock(&self.host).as_ref().and_then(|host| host.failure(call))
    }

    /// Tells the other ranks, through the group on the host, that this one is dead.
    pub(super) fn tell_others(&self, error: &Error) {
        if let Some(host) = &*lock(&self.host) {
            host.poison(error);
        }
    }

    /// Takes off the calls that are done; returns how many.
    ///
    /// The lock is not held while CUDA is asked, which may be stuck behind a launch.
    fn reap(&self) -> Result<()> {
        let mut done = 0;
        let front = || {
            let pending = lock(&self.pending);
            pending.front().map(|front| (front.event.clone(), front.call, front.sequence))
        };
        // NCCL does the calls of a communicator one after the other.
        while let Some((event, call, sequence)) = front() {
            match event.has_passed() {
                Ok(true) => {}
                Ok(false) => break,
                Err(Error::Cuda { code, message, .. }) => {
                    let message = format!("CUDA error {code} in call {sequence}, {message}");
                    // 1 is `ncclUnhandledCudaError`.
                    return Err(self.error(call, Fault { code: 1, message }));
                }
                Err(error) => return Err(error),
            }
            let mut pending = lock(&self.pending);
            // Unless a failure has cleared the queue meanwhile.
            if pending.front().is_some_and(|front| front.sequence == sequence) {
                pending.pop_front();
                self.record.done(sequence);
                lock(&self.spare).push(event);
                done += 1;
            }
        }
        watchdog::count_done(done);
        Ok(())
    }

    /// The watchdog's look: what has gone wrong.
    pub(super) fn look(&self) -> Result<()> {
        self.reap()?;
        self.look_from_afar(Duration::ZERO)?;
        let Some(call) = lock(&self.pending).front().map(|front| front.call) else { return Ok(()) };
        // While a call is being made, the thread that makes it sees NCCL's errors itself.
        if let Ok(life) = self.life.try_lock()
            && *life == Life::Live
        {
            // SAFETY: live, and ours while `life` is held.
            unsafe { self.nccl.async_error(self.raw) }.map_err(|fault| self.error(call, fault))?;
        }
        Ok(())
    }

    /// What has gone wrong as far as it can be seen without CUDA and NCCL: a call that is overdue by more than `grace`, a rank that
    /// the host knows to be lost.
    pub(super) fn look_from_afar(&self, grace: Duration) -> Result<()> {
        let front = lock(&self.pending).front().map(|front| (front.call, front.since.elapsed(), front.limit));
        let Some((call, waited, limit)) = front else { return Ok(()) };
        if let Some(error) = self.host_failure(call) {
            return Err(error);
        }
        if waited > limit.saturating_add(grace) { Err(self.late(call, waited)) } else { Ok(()) }
    }

    /// Forgets the work that is not done; returns how many calls that are.
    ///
    /// The events are kept until the communicator goes: to destroy one, CUDA may wait for a launch that is stuck behind the
    /// very kernels that are to be told to end.
    pub(super) fn forget(&self) -> usize {
        let forgotten: Vec<_> = lock(&self.pending).drain(..).map(|pending| pending.event).collect();
        let calls = forgotten.len();
        lock(&self.spare).extend(forgotten);
        self.record.abandon();
        calls
    }

    /// Leaves the communicator to a thread that destroys it. Does not wait.
    pub(super) fn retire(self: Arc<Self>) {
        let healthy = self.host_failure(Call::Barrier).is_none();
        // Before the process can end: the group on the host says goodbye in this thread.
        lock(&self.host).take();
        self.retiring.store(true, Ordering::SeqCst);
        watchdog::in_background("lightrft-nccl-end", move || self.end(healthy));
    }

    /// Destroys the communicator, within [`watchdog::END`] if nothing is wrong with it; else aborts it.
    fn end(&self, healthy: bool) {
        let begin = Instant::now();
        let busy = || !lock(&self.pending).is_empty() && self.failure().is_none();
        while healthy && busy() && begin.elapsed() < watchdog::END {
            std::thread::sleep(watchdog::POLL);
        }
        let mut life = lock(&self.life);
        let Ok(_current) = self.gpu.enter() else { return };
        if *life == Life::Gone || self.aborting.load(Ordering::SeqCst) {
            return;
        }
        *life = Life::Gone;
        let in_order = healthy && !busy() && self.failure().is_none() && {
            // SAFETY: live until now, ours while `life` is held, and marked as gone.
            let asked = unsafe { self.nccl.finalize(self.raw) };
            self.settle(self.progress_of(asked), Call::Barrier, begin, watchdog::END).is_ok()
        };
        let ended = if in_order {
            // SAFETY: as above.
            unsafe { self.nccl.destroy(self.raw) }
        } else {
            // SAFETY: as above.
            unsafe { self.nccl.abort(self.raw) }
        };
        watchdog::forget(self);
        if let Err(fault) = ended {
            tracing::warn!(group = self.name, message = fault.message, "a communicator could not be freed");
        }
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
        // Nothing of CUDA is called before: it may be stuck behind a launch until the kernels end.
        // SAFETY: live; it is freed by the caller's `ncclGroupEnd`, which waits for the lock.
        if let Err(fault) = unsafe { self.nccl.abort(self.raw) } {
            tracing::warn!(group = self.name, message = fault.message, "a communicator could not be aborted");
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

    pub(super) fn library(&self) -> &'static raw::Nccl {
        self.nccl
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::communicator::CommunicatorExt;
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
