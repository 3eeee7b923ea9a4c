//! One NCCL communicator: how calls are enqueued on it, and seen done
//!
//! Whoever calls NCCL on a communicator holds its lock, [`Comm::life`]. Two things are done without: asking whether
//! enqueued work is done, which is a matter of CUDA events, and telling the kernels of a communicator to end while
//! another thread is stuck in a call on it (see [`watchdog`](super::watchdog)).
//!
//! A call is done by the thread that makes it: where NCCL's own thread does it, as on communicators that do not block, it
//! costs ten times as much. So a call may be stuck, in the first meeting with the other ranks or behind a full queue of
//! launches; the watchdog knows of it before it begins.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::cuda::Gpu;
use super::device::{DeviceMemory, Event};
use super::raw::{self, CommHandle, Fault, Lane, Progress};
use super::record::{EnqueuedState, Record};
use super::watchdog;
use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::flight::recorder::{Outcome, Ticket};
use crate::host::{Beside, Told};
use crate::operation::{Call, Signature};

/// How long to look without sleeping whether NCCL has taken a call: about what it needs for one.
const EAGER: Duration = Duration::from_micros(200);

/// How long calls are collected before they are told to whom compares them: each telling costs the watchers of two ranks a few
/// microseconds.
const TELL: Duration = Duration::from_millis(5);

/// How long a call may be outstanding before the ranks that have not made it are named in a line of the log.
const PATIENCE: Duration = Duration::from_secs(10);

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
    first: Signature,
    /// In the record.
    sequence: u64,
    /// In the flight recorder.
    ticket: Option<Ticket>,
    since: Instant,
    limit: Duration,
}

/// A call that a thread is making.
#[derive(Clone, Copy, Debug)]
struct Making {
    call: Call,
    since: Instant,
    limit: Duration,
}

/// Calls that have not been told to whom compares them.
#[derive(Debug, Default)]
struct Untold {
    calls: Vec<Told>,
    last: Option<Instant>,
}

/// What is enqueued at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch<'a> {
    /// The first call.
    pub(super) first: Signature,
    /// Number of calls.
    pub(super) fused: usize,
    /// All calls, as they are compared; none if they are not.
    pub(super) told: &'a [Told],
    pub(super) limit: Duration,
}

/// A communicator as its owner, the watchdog and the threads that end it share it.
#[derive(Debug)]
pub(super) struct Comm {
    pub(super) nccl: &'static raw::Nccl,
    pub(super) gpu: Arc<Gpu>,
    /// The group's name.
    pub(super) name: String,
    /// This rank in the world.
    world_rank: usize,
    /// The same on all members, and no other communicator's.
    pub(super) id: u64,
    /// What calls are made on. It blocks.
    pub(super) raw: OnceLock<CommHandle>,
    /// What others are split off from, if it was made. It does not block, so that making a communicator has a deadline.
    pub(super) root: OnceLock<CommHandle>,
    pub(super) life: Mutex<Life>,
    /// Why it is dead: what every call returns from then on.
    failure: OnceLock<Error>,
    /// The call that a thread is making now.
    making: Mutex<Option<Making>>,
    pending: Mutex<VecDeque<Pending>>,
    untold: Mutex<Untold>,
    /// The call that was last complained of, and how long it had waited then.
    complaint: Mutex<Option<(u64, Duration)>>,
    /// Events to use again.
    spare: Mutex<Vec<Arc<Event>>>,
    pub(super) record: Record,
    /// The line in the flight recorder.
    beside: Option<Beside>,
    /// The group on the host, until the owner goes: its last owner says goodbye to the other ranks, and must not be a thread
    /// that may not get to it before the process ends.
    pub(super) host: Mutex<Option<Arc<dyn Communicator>>>,
    /// What barriers reduce, one `f32`: it outlives the work that is enqueued on it.
    pub(super) zero: OnceLock<DeviceMemory>,
    /// Set when the owner is gone and a thread of its own destroys the communicator.
    pub(super) retiring: AtomicBool,
    /// Set when an abort has begun without the lock: whoever began it ends it.
    pub(super) aborting: AtomicBool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Comm {
    /// One that has no handle yet.
    pub(super) fn new(
        nccl: &'static raw::Nccl,
        gpu: &Arc<Gpu>,
        host: &Arc<dyn Communicator>,
        id: u64,
    ) -> Arc<Comm> {
        Arc::new(Comm {
            nccl,
            gpu: gpu.clone(),
            name: host.name().to_owned(),
            world_rank: host.ranks()[host.rank()],
            id,
            raw: OnceLock::new(),
            root: OnceLock::new(),
            life: Mutex::new(Life::Live),
            failure: OnceLock::new(),
            making: Mutex::default(),
            pending: Mutex::default(),
            untold: Mutex::default(),
            complaint: Mutex::default(),
            spare: Mutex::default(),
            record: Record::default(),
            beside: host.beside(id, &format!("{} on GPUs", host.name())),
            host: Mutex::new(Some(host.clone())),
            zero: OnceLock::new(),
            retiring: AtomicBool::new(false),
            aborting: AtomicBool::new(false),
        })
    }

    /// How far the last call on `raw` has come: some calls say that they are done when they have only begun. The caller holds
    /// the lock.
    pub(super) fn progress_of(
        &self,
        raw: CommHandle,
        asked: Result<Progress, Fault>,
    ) -> Result<Progress, Fault> {
        asked?;
        // SAFETY: live, and no other thread calls anything on it (this function's contract).
        unsafe { self.nccl.async_error(raw) }
    }

    /// Waits until NCCL has taken the last call on `raw`. The caller holds the lock, or is the only one to know of this
    /// communicator.
    pub(super) fn settle(
        &self,
        raw: CommHandle,
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
            progress = unsafe { self.nccl.async_error(raw) };
        }
    }

    /// Enqueues the calls that `enqueue` makes on `stream`, and leaves the watchdog to see them done in time.
    ///
    /// # Safety
    /// `stream` is a live stream of this communicator's GPU, and what `enqueue` passes to the lane is as [`Lane::new`] asks.
    pub(super) unsafe fn enqueue(
        &self,
        launch: Launch<'_>,
        stream: usize,
        enqueue: impl FnOnce(&Lane) -> Result<Progress, Fault>,
    ) -> Result<()> {
        let (since, call, limit) = (Instant::now(), launch.first.call, launch.limit);
        let life = self.enter(call)?;
        let Some(raw) = self.raw.get().copied() else { return Err(self.gone(call)) };
        let current = self.gpu.enter()?;
        // Before the call is made: if other ranks make another one, it may not return.
        self.tell_later(launch.told);
        let ticket = self.beside.as_ref().map(|beside| beside.begin(&launch.first));
        *lock(&self.making) = Some(Making { call, since, limit });
        watchdog::expect_one();
        // SAFETY: live and ours while `life` is held; the rest is the caller's promise.
        let lane = unsafe { Lane::new(self.nccl, raw, stream) };
        let taken = self.settle(raw, self.progress_of(raw, enqueue(&lane)), call, since, limit);
        let watched = taken.and_then(|()| self.watch(launch, stream, since, ticket));
        *lock(&self.making) = None;
        let result = watched.map_err(|error| {
            // Told before anything else of CUDA is called, which may be stuck behind a launch.
            let error = watchdog::fail(self, error);
            // Records end in the order in which they began; of a failure that another thread has met the calls before this
            // one may not have ended.
            watchdog::forget(self);
            self.end_record(ticket, Outcome::Failed);
            watchdog::count_done(1);
            error
        });
        drop((current, life));
        if self.failure().is_some() {
            // The watchdog has turned away from this communicator, perhaps before it saw this call.
            watchdog::forget(self);
        }
        result
    }

    fn end_record(&self, ticket: Option<Ticket>, outcome: Outcome) {
        if let (Some(beside), Some(ticket)) = (&self.beside, ticket) {
            beside.end(ticket, outcome);
        }
    }

    /// Keeps calls for the watchdog, which tells them to whom compares them.
    fn tell_later(&self, calls: &[Told]) {
        if calls.is_empty() || self.beside.is_none() {
            return;
        }
        let mut untold = lock(&self.untold);
        let was_empty = untold.calls.is_empty();
        untold.calls.extend_from_slice(calls);
        drop(untold);
        if was_empty {
            // The watchdog stays awake until it has told them.
            watchdog::expect_one();
        }
    }

    /// Tells the calls that were made since the last telling, if that was longer ago than `rest`.
    pub(super) fn tell(&self, rest: Duration) {
        let mut untold = lock(&self.untold);
        let now = Instant::now();
        if untold.calls.is_empty() || untold.last.is_some_and(|last| now - last < rest) {
            return;
        }
        untold.last = Some(now);
        // Held while they are sent: two that tell at once tell in the order of the calls.
        let calls = std::mem::take(&mut untold.calls);
        if let Some(beside) = &self.beside {
            beside.tell(&calls);
        }
        drop(untold);
        watchdog::count_done(1);
    }

    /// Marks where the stream has done the call.
    fn watch(&self, launch: Launch<'_>, stream: usize, since: Instant, ticket: Option<Ticket>) -> Result<()> {
        let Launch { first, fused, limit, .. } = launch;
        // What is captured into a graph happens when the graph is launched, any number of times or never.
        // SAFETY: `enqueue` was promised a live stream of this GPU.
        if unsafe { self.gpu.is_capturing(stream)? } {
            self.record.push(first, fused, EnqueuedState::Captured);
            self.end_record(ticket, Outcome::Done);
            watchdog::count_done(1);
            return Ok(());
        }
        let sequence = self.record.push(first, fused, EnqueuedState::Outstanding);
        let spare = lock(&self.spare).pop();
        let event = spare.map_or_else(|| Event::new(&self.gpu).map(Arc::new), Ok)?;
        // SAFETY: as above; the event is ours.
        unsafe { self.gpu.record(event.raw, stream)? };
        lock(&self.pending).push_back(Pending { event, first, sequence, ticket, since, limit });
        Ok(())
    }

    /// The lock, if the communicator can be called.
    pub(super) fn enter(&self, call: Call) -> Result<MutexGuard<'_, Life>> {
        self.alive()?;
        let life = lock(&self.life);
        self.alive()?;
        if *life == Life::Live { Ok(life) } else { Err(self.gone(call)) }
    }

    fn gone(&self, call: Call) -> Error {
        self.error(call, Fault { code: 5, message: "the communicator is gone".into() })
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

    pub(super) fn error(&self, call: Call, fault: Fault) -> Error {
        let Fault { code, message } = fault;
        Error::Nccl { call, group: self.name.clone(), rank: self.world_rank, code, message }
    }

    pub(super) fn late(&self, call: Call, waited: Duration) -> Error {
        let outstanding = {
            let pending = lock(&self.pending);
            pending.front().map(|front| (front.sequence, front.first, pending.len()))
        };
        let rank = self.world_rank;
        let mut report = match outstanding {
            Some((sequence, first, 1)) => {
                format!("the GPU of rank {rank} has not done call #{sequence}, {first}")
            }
            Some((sequence, first, all)) => {
                let behind = all - 1;
                format!(
                    "the GPU of rank {rank} has not done call #{sequence}, {first}, and {behind} behind it"
                )
            }
            None => format!("NCCL on rank {rank} has not taken the call"),
        };
        // NCCL does not tell who is late. The recorders of the other ranks do.
        let (missing, text) = self.missing();
        report.push_str(&text);
        Error::Timeout { call, group: self.name.clone(), waited, missing, report }
    }

    /// The members that have not made the first call that is outstanding here, and what they do instead.
    fn missing(&self) -> (Vec<usize>, String) {
        let ticket = lock(&self.pending).front().and_then(|front| front.ticket);
        let (Some(beside), Some(ticket)) = (&self.beside, ticket) else { return Default::default() };
        beside.missing(ticket.step())
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

    /// Takes off the calls that are done.
    ///
    /// The lock is not held while CUDA is asked, which may be stuck behind a launch.
    fn reap(&self) -> Result<()> {
        let mut done = 0;
        let front = || {
            let pending = lock(&self.pending);
            pending.front().map(|front| (front.event.clone(), front.first.call, front.sequence))
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
            if let Some(front) = pending.pop_front_if(|front| front.sequence == sequence) {
                self.record.done(sequence);
                self.end_record(front.ticket, Outcome::Done);
                lock(&self.spare).push(event);
                done += 1;
            }
        }
        watchdog::count_done(done);
        Ok(())
    }

    /// The watchdog's look: what has gone wrong.
    pub(super) fn look(&self) -> Result<()> {
        self.tell(TELL);
        self.reap()?;
        self.look_from_afar(Duration::ZERO)?;
        let Some(call) = lock(&self.pending).front().map(|front| front.first.call) else { return Ok(()) };
        // While a call is being made, the thread that makes it sees NCCL's errors itself.
        if let (Ok(life), Some(raw)) = (self.life.try_lock(), self.raw.get())
            && *life == Life::Live
        {
            // SAFETY: live, and ours while `life` is held.
            unsafe { self.nccl.async_error(*raw) }.map_err(|fault| self.error(call, fault))?;
        }
        Ok(())
    }

    /// What has gone wrong as far as it can be seen without CUDA and NCCL: a call that is overdue by more than `grace`, a rank that
    /// the host knows to be lost.
    pub(super) fn look_from_afar(&self, grace: Duration) -> Result<()> {
        let front = lock(&self.pending).front().map(|front| (front.first.call, front.since, front.limit));
        let making = || lock(&self.making).map(|making| (making.call, making.since, making.limit));
        let Some((call, since, limit)) = front.or_else(making) else { return Ok(()) };
        if let Some(error) = self.host_failure(call) {
            return Err(error);
        }
        let waited = since.elapsed();
        if waited > limit.saturating_add(grace) { Err(self.late(call, waited)) } else { Ok(()) }
    }

    /// Says, after [`PATIENCE`] and then ever more rarely, who has not made the call that is outstanding.
    pub(super) fn complain(&self) {
        let front = lock(&self.pending).front().map(|front| (front.sequence, front.since.elapsed()));
        let Some((sequence, waited)) = front.filter(|(_, waited)| *waited >= PATIENCE) else { return };
        let mut complaint = lock(&self.complaint);
        if complaint.is_none_or(|(of, at)| of != sequence || waited >= at * 2) {
            *complaint = Some((sequence, waited));
            drop(complaint);
            if let Error::Timeout { missing, report, .. } = self.late(Call::Barrier, waited) {
                tracing::warn!(group = self.name, ?missing, "a GPU waits: {report}");
            }
        }
    }

    /// Whether a call is outstanding, and the communicator is not dead.
    pub(super) fn is_busy(&self) -> bool {
        self.failure().is_none() && !lock(&self.pending).is_empty()
    }

    /// Forgets the work that is not done; returns how many reasons to look that were.
    ///
    /// The events are kept until the communicator goes: to destroy one, CUDA may wait for a launch that is stuck behind the
    /// very kernels that are to be told to end.
    pub(super) fn forget(&self) -> usize {
        let forgotten: Vec<Pending> = lock(&self.pending).drain(..).collect();
        let mut reasons = forgotten.len();
        for pending in &forgotten {
            self.end_record(pending.ticket, Outcome::Failed);
        }
        lock(&self.spare).extend(forgotten.into_iter().map(|pending| pending.event));
        self.record.abandon();
        let mut untold = lock(&self.untold);
        reasons += usize::from(!untold.calls.is_empty());
        untold.calls.clear();
        reasons
    }
}
