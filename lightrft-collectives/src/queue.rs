//! Calls that run while their rank does something else: a thread that makes them in the order they were given

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::ops::DerefMut;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::communicator::{Communicator, CommunicatorExt, GroupOptions};
use crate::error::{Error, Result};
use crate::host::Beside;
use crate::memory::GroupMemory;
use crate::object;
use crate::op::{Element, ReduceOp};
use crate::operation::{Call, Operation};
use crate::pending::Pending;
use crate::site;
use crate::within::forward;

/// A communicator whose calls return at once and run, one after the other, on a thread of their own.
///
/// Each method takes its buffers and returns a [`Pending`], which gives them back. Any number may be under way. A queue
/// is itself a [`Communicator`], for code that takes a `&dyn Communicator`: a blocking call through it takes its turn
/// behind what was given before. So the ranks' calls stay in one order as long as all go through the queue; a group that
/// is also used past its queue has two orders. Give a queue a group of its own, see
/// [`Sharing::Exclusive`](crate::Sharing::Exclusive).
///
/// Dropping a queue does not wait: what was given still runs, and fails at the latest when the group's deadlines pass. A
/// process that ends before then leaves the other ranks in the midst of a call: [`flush`](Queue::flush) first.
///
/// ```
/// use lightrft_collectives::{Queue, ReduceOp, local::World};
///
/// let sums = World::run(2, |comm| {
///     let queue = Queue::new(comm)?;
///     let first = queue.all_reduce(vec![1.0f32; 1000], ReduceOp::Sum);
///     let second = queue.all_gather(vec![queue.rank() as i64]);
///     // Other work of this rank goes here.
///     Ok((first.wait()?[0], second.wait()?))
/// })?;
/// assert_eq!(sums, [(2.0, vec![0, 1]), (2.0, vec![0, 1])]);
/// # use lightrft_collectives::Communicator;
/// # Ok::<_, lightrft_collectives::Error>(())
/// ```
pub struct Queue {
    comm: Arc<dyn Communicator>,
    line: Arc<Line>,
    worker: ThreadId,
}

type Job = Box<dyn FnOnce() + Send>;

/// Who may use the communicator: each call draws a number, and runs when that number is served.
#[derive(Default)]
struct Line {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The number that the next call will draw.
    given: u64,
    /// The number whose turn it is.
    serving: u64,
    /// What the worker is to run. The other numbers are those of threads that wait in a blocking call.
    jobs: VecDeque<(u64, Job)>,
    closed: bool,
}

/// One call's turn, over when it is dropped.
struct Turn<'a>(&'a Line);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().serving += 1;
        self.0.changed.notify_all();
    }
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No caller's code runs under this lock, so a poisoned one still guards whole data.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(state: &mut State) -> u64 {
        state.given += 1;
        state.given - 1
    }

    fn push(&self, job: Job) {
        let mut state = self.lock();
        let number = Self::draw(&mut state);
        state.jobs.push_back((number, job));
        self.changed.notify_all();
    }

    /// Waits for this thread's turn: for the calls given before, each of which ends by its own deadline.
    fn turn(&self) -> Turn<'_> {
        let mut state = self.lock();
        let number = Self::draw(&mut state);
        while state.serving != number {
            state = self.wait(state);
        }
        Turn(self)
    }

    /// The worker: runs jobs until the queue is dropped and none is left.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            let due = state.jobs.front().is_some_and(|(number, _)| *number == state.serving);
            if let Some((_, job)) = state.jobs.pop_front_if(|_| due) {
                drop(state);
                let turn = Turn(self);
                job();
                drop(turn);
                state = self.lock();
            } else if state.closed && state.jobs.is_empty() {
                return;
            } else {
                state = self.wait(state);
            }
        }
    }
}

impl Queue {
    /// A queue for the calls on `comm`, and its thread.
    ///
    /// # Errors
    /// [`Error::Io`] if the system gives no thread.
    pub fn new(comm: Arc<dyn Communicator>) -> Result<Self> {
        let line = Arc::new(Line::default());
        let (working, name) = (line.clone(), format!("queue {}", comm.name()));
        let started = thread::Builder::new().name(name).spawn(move || working.work());
        let started = started.map_err(|source| Error::Io {
            doing: format!("start the thread of a queue on `{}`", comm.name()),
            source: Arc::new(source),
        })?;
        Ok(Queue { comm, line, worker: started.thread().id() })
    }

    /// Runs any calls on the communicator in their turn.
    ///
    /// `calls` makes the same calls on every rank, in this queue's order. It must not wait for what was given to this
    /// queue after it, nor for long for anything else: all that follows waits for it. If it panics the result is
    /// [`Error::Panicked`].
    #[track_caller]
    pub fn enqueue<R: Send + 'static>(
        &self,
        calls: impl FnOnce(&dyn Communicator) -> Result<R> + Send + 'static,
    ) -> Pending<R> {
        let comm = self.comm.clone();
        let rank = comm.ranks()[comm.rank()];
        let (pending, completer) = Pending::new(rank);
        let site = site::current().unwrap_or_else(Location::caller);
        self.line.push(Box::new(move || {
            let _site = site::mark_as(Some(site));
            let result = catch_unwind(AssertUnwindSafe(|| calls(&*comm)))
                .unwrap_or_else(|panic| Err(Error::Panicked { rank, message: message(&*panic) }));
            // Let go before anyone learns of the end: who has waited for all and drops the queue has then dropped
            // the communicator, on its own thread.
            drop(comm);
            completer.end(result);
        }));
        pending
    }

    /// Waits until all that was given so far has ended, well or not.
    pub fn flush(&self) {
        drop(self.turn());
    }

    /// This thread's turn; a job that calls through its own queue has it already.
    fn turn(&self) -> Option<Turn<'_>> {
        (thread::current().id() != self.worker).then(|| self.line.turn())
    }

    /// The reduction of all ranks' `data`: a `Vec`, a boxed slice, or a [`GroupBuffer`](crate::GroupBuffer).
    #[track_caller]
    pub fn all_reduce<T: Element, B>(&self, mut data: B, op: ReduceOp) -> Pending<B>
    where
        B: DerefMut<Target = [T]> + Send + 'static,
    {
        self.enqueue(move |comm| comm.all_reduce(&mut data, op).map(|()| data))
    }

    /// All ranks' `input`, one after the other in rank order.
    #[track_caller]
    pub fn all_gather<T: Element>(&self, input: Vec<T>) -> Pending<Vec<T>> {
        self.enqueue(move |comm| {
            let mut output = vec![T::zeroed(); input.len() * comm.world_size()];
            comm.all_gather(&input, &mut output).map(|()| output)
        })
    }

    /// All ranks' inputs of different lengths, `counts[r]` elements from rank `r`. Every rank gives the same `counts`.
    #[track_caller]
    pub fn all_gather_counts<T: Element>(&self, input: Vec<T>, counts: Vec<usize>) -> Pending<Vec<T>> {
        self.enqueue(move |comm| {
            let mut output = vec![T::zeroed(); counts.iter().sum()];
            comm.all_gather_counts(&input, &counts, &mut output).map(|()| output)
        })
    }

    /// This rank's part of the reduction of all ranks' `input`, whose length is a multiple of the world size.
    #[track_caller]
    pub fn reduce_scatter<T: Element>(&self, mut input: Vec<T>, op: ReduceOp) -> Pending<Vec<T>> {
        self.enqueue(move |comm| {
            comm.reduce_scatter_in_place(&mut input, op)?;
            let part = input.len() / comm.world_size();
            input.drain(..part * comm.rank());
            input.truncate(part);
            Ok(input)
        })
    }

    /// The root's `data`; the others give as many elements.
    #[track_caller]
    pub fn broadcast<T: Element, B>(&self, mut data: B, root: usize) -> Pending<B>
    where
        B: DerefMut<Target = [T]> + Send + 'static,
    {
        self.enqueue(move |comm| comm.broadcast(&mut data, root).map(|()| data))
    }

    /// On the root the reduction of all ranks' `data`; elsewhere `data` as it was.
    #[track_caller]
    pub fn reduce<T: Element, B>(&self, mut data: B, op: ReduceOp, root: usize) -> Pending<B>
    where
        B: DerefMut<Target = [T]> + Send + 'static,
    {
        self.enqueue(move |comm| comm.reduce(&mut data, op, root).map(|()| data))
    }

    /// On the root all ranks' `input` in rank order; nothing elsewhere.
    #[track_caller]
    pub fn gather<T: Element>(&self, input: Vec<T>, root: usize) -> Pending<Vec<T>> {
        self.enqueue(move |comm| {
            let ranks = if comm.rank() == root { comm.world_size() } else { 0 };
            let mut output = vec![T::zeroed(); input.len() * ranks];
            comm.gather(&input, &mut output, root).map(|()| output)
        })
    }

    /// This rank's part, of `count` elements, of the root's `input` (`world_size * count`; empty elsewhere).
    #[track_caller]
    pub fn scatter<T: Element>(&self, input: Vec<T>, count: usize, root: usize) -> Pending<Vec<T>> {
        self.enqueue(move |comm| {
            let mut output = vec![T::zeroed(); count];
            comm.scatter(&input, &mut output, root).map(|()| output)
        })
    }

    /// Part `rank` of every rank's `input`, in rank order.
    #[track_caller]
    pub fn all_to_all<T: Element>(&self, input: Vec<T>) -> Pending<Vec<T>> {
        self.enqueue(move |comm| {
            let mut output = vec![T::zeroed(); input.len()];
            comm.all_to_all(&input, &mut output).map(|()| output)
        })
    }

    /// What every rank sends this one: `recv_counts[q]` elements from rank `q`, for `send_counts[q]` of `input` to it.
    #[track_caller]
    pub fn all_to_all_v<T: Element>(
        &self,
        input: Vec<T>,
        send_counts: Vec<usize>,
        recv_counts: Vec<usize>,
    ) -> Pending<Vec<T>> {
        self.enqueue(move |comm| {
            let mut output = vec![T::zeroed(); recv_counts.iter().sum()];
            comm.all_to_all_v(&input, &send_counts, &mut output, &recv_counts).map(|()| output)
        })
    }

    /// Ends when every rank has come to it.
    #[track_caller]
    pub fn barrier(&self) -> Pending<()> {
        self.enqueue(|comm| comm.barrier())
    }

    /// One object from every rank, in rank order; see [`CommunicatorExt::all_gather_object`].
    #[track_caller]
    pub fn all_gather_object<S>(&self, object: &S) -> Pending<Vec<S>>
    where
        S: Serialize + DeserializeOwned + Send + 'static,
    {
        // Encoded here: the caller keeps the object, and a panic in its code is the caller's.
        let encoded = object::encode(self, Call::AllGatherV, object);
        self.enqueue(move |comm| object::all_gather(comm, encoded))
    }

    /// One object from every rank at `root`; see [`CommunicatorExt::gather_object`].
    #[track_caller]
    pub fn gather_object<S>(&self, object: &S, root: usize) -> Pending<Option<Vec<S>>>
    where
        S: Serialize + DeserializeOwned + Send + 'static,
    {
        let encoded = object::encode(self, Call::Gather, object);
        self.enqueue(move |comm| object::gather(comm, encoded, root))
    }

    /// The root's object; see [`CommunicatorExt::broadcast_object`].
    #[track_caller]
    pub fn broadcast_object<S>(&self, object: Option<&S>, root: usize) -> Pending<S>
    where
        S: Serialize + DeserializeOwned + Send + 'static,
    {
        let encoded = object.map(|object| object::encode(self, Call::Broadcast, object));
        self.enqueue(move |comm| object::broadcast(comm, encoded, root))
    }
}

impl Communicator for Queue {
    forward!(self => self.comm; name, rank, ranks, failure, poison, beside);

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        let _turn = self.turn();
        self.comm.run_within(operation, timeout)
    }

    fn alloc_bytes(&self, len: usize) -> Result<GroupMemory> {
        let _turn = self.turn();
        self.comm.alloc_bytes(len)
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> Result<Option<Arc<dyn Communicator>>> {
        let _turn = self.turn();
        self.comm.subgroup_with(ranks, options)
    }

    fn rebuild(&self, timeout: Duration) -> Result<Arc<dyn Communicator>> {
        let _turn = self.turn();
        self.comm.rebuild(timeout)
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.line.lock();
        let ahead = state.given - state.serving;
        f.debug_struct("Queue").field("comm", &self.comm).field("ahead", &ahead).finish()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.line.lock().closed = true;
        self.line.changed.notify_all();
    }
}

/// The text of a panic, if it has one.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
