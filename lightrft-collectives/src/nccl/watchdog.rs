//! The watchdog: a thread per process that sees enqueued calls done in time, and ends all communicators when one fails
//!
//! NCCL has no timeouts, and over NVLink nothing tells it that a rank has died: its kernels spin for ever. So, while any call is
//! outstanding, the thread looks every [`POLL`] at the calls' events and deadlines, at NCCL's asynchronous errors,
//! and at the group on the host, which notices deaths. When nothing is outstanding it sleeps.
//!
//! A launch waits while the GPU has a thousand others to do, and with it wait, in the driver, CUDA's other calls: the
//! watchdog's too. So a second thread looks at the clock and at the group on the host, and at nothing else.
//!
//! One failure ends *every* communicator of the process: to free one, NCCL waits for the GPU, and so for the kernels of the
//! others, which wait for ranks that have given up too. For the same reason all are told to end before the first is
//! freed: the aborts are made between `ncclGroupStart` and `ncclGroupEnd`, by one thread, in the order in which the
//! communicators were made. (`ncclCommRevoke`, where NCCL has it, would stop the kernels as well; the
//! group does it with all versions and frees in the same breath.)
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::comm::{Comm, Life};
use crate::error::Error;

/// How long the watchdog sleeps between two looks, with the system's slack less than a millisecond.
pub(super) const POLL: Duration = Duration::from_micros(800);

/// By how much a call is overdue when the second thread gives it up: by then the first would have.
const GRACE: Duration = Duration::from_millis(500);

/// How long a communicator may take to end in order before it is aborted.
pub(super) const END: Duration = Duration::from_secs(2);

/// How long an abort waits for a thread that makes a call before it goes on without: a call takes microseconds.
const PATIENCE: Duration = Duration::from_millis(10);

/// How long the end of the process waits for communicators that are being destroyed.
const EXIT: Duration = Duration::from_secs(3);

/// How long an abort waits for such a thread before the communicator is leaked: its kernels have been told to end.
const LEAVE: Duration = Duration::from_secs(20);

/// Calls of each communicator that a failure logs.
const LOGGED: usize = 8;

#[derive(Debug)]
struct Watchdog {
    /// In the order in which they were made.
    comms: Mutex<Comms>,
    wake: Condvar,
    /// Calls that are not done.
    outstanding: AtomicUsize,
    /// Threads that end communicators.
    ends: Mutex<usize>,
    ended: Condvar,
    /// Held while the watchdog calls CUDA and NCCL.
    looking: Mutex<()>,
    exiting: AtomicBool,
}

#[derive(Debug)]
struct Comms {
    list: Vec<Weak<Comm>>,
    thread: Thread,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    None,
    Running,
}

static WATCHDOG: Watchdog = Watchdog {
    comms: Mutex::new(Comms { list: Vec::new(), thread: Thread::None }),
    wake: Condvar::new(),
    outstanding: AtomicUsize::new(0),
    ends: Mutex::new(0),
    ended: Condvar::new(),
    looking: Mutex::new(()),
    exiting: AtomicBool::new(false),
};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts a new communicator under the watchdog's eyes.
pub(super) fn register(comm: &Arc<Comm>) {
    let mut comms = lock(&WATCHDOG.comms);
    comms.list.retain(|comm| comm.strong_count() > 0);
    comms.list.push(Arc::downgrade(comm));
    wait_at_exit();
    if comms.thread == Thread::None {
        let spawn = |name: &str, body: fn()| std::thread::Builder::new().name(name.into()).spawn(body);
        let both = spawn("lightrft-nccl-watchdog", watch);
        match both.and_then(|_| spawn("lightrft-nccl-afar", watch_from_afar)) {
            Ok(_) => comms.thread = Thread::Running,
            Err(error) => tracing::error!(%error, "no thread for the NCCL watchdog: calls have no deadline"),
        }
    }
}

/// One more call is outstanding.
pub(super) fn expect_one() {
    if WATCHDOG.outstanding.fetch_add(1, Ordering::SeqCst) == 0 {
        // With the lock, so that a thread about to sleep sees the count or the notification.
        drop(lock(&WATCHDOG.comms));
        WATCHDOG.wake.notify_all();
    }
}

/// The calls of a communicator are not waited for any more.
pub(super) fn forget(comm: &Comm) {
    WATCHDOG.outstanding.fetch_sub(comm.forget(), Ordering::SeqCst);
}

unsafe extern "C" {
    /// C's: `at_exit` runs before whatever was registered earlier, the destructors of loaded libraries among them.
    fn atexit(at_exit: extern "C" fn()) -> std::ffi::c_int;
}

/// Lets the threads of this module leave NCCL and CUDA before the process tears these down under their feet.
extern "C" fn before_exit() {
    settle(EXIT);
    WATCHDOG.exiting.store(true, Ordering::SeqCst);
    let begin = Instant::now();
    // Held by the watchdog while it looks, which it does not do again.
    while WATCHDOG.looking.try_lock().is_err() && begin.elapsed() < EXIT {
        std::thread::sleep(POLL);
    }
}

/// Registers [`before_exit`], late: after the libraries have been loaded and have registered theirs.
fn wait_at_exit() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // SAFETY: the function takes nothing, does not unwind and touches only statics without destructors. If it cannot be
        // registered, a process that ends too early may crash in its end, as it would without.
        let _ = unsafe { atexit(before_exit) };
    });
}

/// Some calls are done.
pub(super) fn count_done(calls: usize) {
    WATCHDOG.outstanding.fetch_sub(calls, Ordering::SeqCst);
}

/// Waits until a call is outstanding, and gives the communicators in the order in which they were made.
fn await_calls() -> Vec<Arc<Comm>> {
    let idle = |_: &mut Comms| WATCHDOG.outstanding.load(Ordering::SeqCst) == 0;
    let comms = WATCHDOG.wake.wait_while(lock(&WATCHDOG.comms), idle);
    comms.unwrap_or_else(PoisonError::into_inner).list.iter().filter_map(Weak::upgrade).collect()
}

/// The second thread: sees what the first would, had it not been stuck in CUDA.
fn watch_from_afar() {
    loop {
        for comm in await_calls().iter().filter(|comm| comm.failure().is_none()) {
            if let Err(error) = comm.look_from_afar(GRACE) {
                fail(comm, error);
            } else {
                comm.complain();
            }
        }
        std::thread::sleep(GRACE / 10);
    }
}

fn watch() {
    loop {
        let comms = await_calls();
        let looking = lock(&WATCHDOG.looking);
        if WATCHDOG.exiting.load(Ordering::SeqCst) {
            return;
        }
        for comm in comms {
            if comm.failure().is_some() {
                forget(&comm);
                continue;
            }
            if let Err(error) = comm.look() {
                fail(&comm, error);
            }
        }
        drop(looking);
        std::thread::sleep(POLL);
    }
}

/// Ends every communicator of this process because `origin` has failed, and tells the other ranks. Does not wait. Returns
/// what `origin` has died of: `error`, unless it was dead before.
pub(super) fn fail(origin: &Comm, error: Error) -> Error {
    let first = origin.record(&error);
    let dead: Vec<Arc<Comm>> = {
        let mut comms = lock(&WATCHDOG.comms);
        let all: Vec<Arc<Comm>> = comms.list.drain(..).filter_map(|comm| comm.upgrade()).collect();
        for comm in &all {
            comm.record(&error);
        }
        all
    };
    if first {
        tracing::error!(group = origin.name, %error, communicators = dead.len(), "NCCL: all communicators of this process are aborted");
    }
    abort(dead.clone());
    for comm in &dead {
        comm.tell_others(&error);
        forget(comm);
        for call in comm.record.read().iter().rev().take(LOGGED).rev() {
            tracing::error!(group = comm.name, "{call}");
        }
    }
    origin.failure().cloned().unwrap_or(error)
}

/// Aborts communicators that nobody may call any more, in a thread of its own.
pub(super) fn abort(comms: Vec<Arc<Comm>>) {
    if !comms.is_empty() {
        in_background("lightrft-nccl-abort", move || abort_all(&comms));
    }
}

fn abort_all(comms: &[Arc<Comm>]) {
    let Some(nccl) = comms.first().map(|comm| comm.nccl) else { return };
    if let Err(fault) = nccl.group_start() {
        tracing::error!(message = fault.message, "NCCL: cannot begin to abort");
        return;
    }
    let marked: Vec<_> = comms.iter().filter_map(|comm| Some((comm, comm.mark_aborted(PATIENCE)?))).collect();
    // The kernels are on their way out, and with them whoever was stuck behind them in a call.
    let begin = Instant::now();
    let mut lives = Vec::new();
    for (comm, life) in marked {
        match life.or_else(|| comm.lock_within(LEAVE.saturating_sub(begin.elapsed()))) {
            Some(life) => lives.push(life),
            None => {
                // To free it under that thread's feet would be worse. NCCL's queue of this thread goes with the thread.
                tracing::error!(
                    group = comm.name,
                    "NCCL: a call does not return; its communicator is leaked"
                );
                lives.iter_mut().for_each(|life: &mut MutexGuard<'_, Life>| **life = Life::Gone);
                return;
            }
        }
    }
    for life in &mut lives {
        **life = Life::Gone;
    }
    // SAFETY: the communicators aborted above are live, and their locks are held.
    if let Err(fault) = unsafe { nccl.group_end() } {
        tracing::warn!(message = fault.message, "NCCL: aborted communicators could not be freed");
    }
}

/// Runs `end` in a thread that [`settle`] waits for; in this one if there is none to be had.
pub(super) fn in_background(name: &str, end: impl FnOnce() + Send + 'static) {
    *lock(&WATCHDOG.ends) += 1;
    let run = move || {
        end();
        *lock(&WATCHDOG.ends) -= 1;
        WATCHDOG.ended.notify_all();
    };
    if let Err(error) = std::thread::Builder::new().name(name.into()).spawn(run) {
        // What it would have freed goes with the process.
        tracing::error!(%error, "NCCL: no thread to end a communicator");
        *lock(&WATCHDOG.ends) -= 1;
    }
}

/// Waits, `limit` at most, until the communicators that were dropped or have failed are freed; returns whether they are.
pub(super) fn settle(limit: Duration) -> bool {
    let ends = lock(&WATCHDOG.ends);
    let waited = WATCHDOG.ended.wait_timeout_while(ends, limit, |ends| *ends > 0);
    *waited.unwrap_or_else(PoisonError::into_inner).0 == 0
}
