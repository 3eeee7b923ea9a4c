//! Worker threads that read batches ahead, a bounded number of them, handed out in order.
//!
//! The consumer alone decides what is read: it numbers the batches, sends the indices of at most `prefetch_batches`
//! of them to the workers, and puts what comes back in order. So the channels never hold more than that, the order
//! cannot depend on the threads, and a worker never waits for a consumer.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::batches::{BatchPlan, BatchSampler};
use crate::loader::LoaderConfig;
use crate::reader::{Product, Reader};
use crate::{Dataset, Error};

/// Dropping waits this long for workers that are in the middle of a sample, then leaves them to end by themselves.
const GRACE: Duration = Duration::from_secs(1);

struct Task {
    number: u64,
    plan: BatchPlan,
}

struct Done<B> {
    number: u64,
    batch: Result<Product<B>, Error>,
}

/// The workers, and what they have read or are reading.
pub(crate) struct Prefetch<B> {
    /// `None` only while dropping: its end is what tells the workers to stop.
    tasks: Option<Sender<Task>>,
    done: Receiver<Done<B>>,
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
    /// Batches of this epoch that no worker has been given yet; `None` between epochs.
    upcoming: Option<BatchSampler>,
    /// Number of the next batch to give to the workers, and to the consumer.
    next_task: u64,
    next_out: u64,
    /// First index of each batch that is out with the workers or waits for its turn, for messages.
    first_index: BTreeMap<u64, usize>,
    /// Batches that came back before their turn.
    early: BTreeMap<u64, Result<Product<B>, Error>>,
}

impl<B: Send + 'static> Prefetch<B> {
    /// Starts the workers, which have nothing to do yet.
    pub(crate) fn start<D>(reader: &Reader<D, B>, workers: usize) -> Result<Self, Error>
    where
        D: Dataset + 'static,
    {
        let (tasks, queue) = channel();
        let (results, done) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut started = Self {
            tasks: Some(tasks),
            done,
            stop: Arc::new(AtomicBool::new(false)),
            workers: Vec::new(),
            upcoming: None,
            next_task: 0,
            next_out: 0,
            first_index: BTreeMap::new(),
            early: BTreeMap::new(),
        };
        for number in 0..workers {
            let (reader, queue, results, stop) =
                (reader.clone(), Arc::clone(&queue), results.clone(), Arc::clone(&started.stop));
            let worker = thread::Builder::new()
                .name(format!("data-{number}"))
                .spawn(move || work(&reader, &queue, &results, &stop))
                // Returning drops `started`, which stops the workers there are.
                .map_err(|source| Error::Io {
                    action: "start a thread for",
                    path: "data loader".into(),
                    source,
                })?;
            started.workers.push(worker);
        }
        Ok(started)
    }

    /// Whether the epoch given to [`begin`](Self::begin) has been handed out to its end.
    pub(crate) fn is_idle(&self) -> bool {
        self.upcoming.is_none()
    }

    /// Reads these batches from now on.
    pub(crate) fn begin(&mut self, batches: BatchSampler) {
        self.upcoming = Some(batches);
    }

    /// The next batch, `None` at the end of the epoch. After [`Error::Stalled`] it may be asked for again.
    pub(crate) fn next(&mut self, config: &LoaderConfig) -> Result<Option<Product<B>>, Error> {
        self.send_tasks(config);
        let Some(&first_index) = self.first_index.get(&self.next_out) else {
            self.upcoming = None;
            return Ok(None);
        };
        let stalled = Error::Stalled { waited: config.deadline, first_index };
        // No deadline that the clock cannot hold: a caller who asks for the longest wait gets a year.
        let now = Instant::now();
        let until = now.checked_add(config.deadline).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        let batch = loop {
            if let Some(batch) = self.early.remove(&self.next_out) {
                break batch;
            }
            match self.done.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Done { number, batch }) => {
                    self.early.insert(number, batch);
                }
                Err(RecvTimeoutError::Timeout) => return Err(stalled),
                Err(RecvTimeoutError::Disconnected) => {
                    let message = "all workers have ended".to_owned();
                    return Err(Error::SamplePanicked { index: first_index, message });
                }
            }
        };
        self.first_index.remove(&self.next_out);
        self.next_out += 1;
        let batch = batch?;
        // The place of the batch that leaves is filled at once, so that the workers read while the caller computes.
        self.send_tasks(config);
        Ok(Some(batch))
    }

    /// Hands out batches until `prefetch_batches` are under way or waiting.
    fn send_tasks(&mut self, config: &LoaderConfig) {
        let (Some(upcoming), Some(tasks)) = (&mut self.upcoming, &self.tasks) else { return };
        while self.next_task - self.next_out < config.prefetch_batches as u64 {
            let number = self.next_task;
            let plan = match upcoming.next_batch() {
                Ok(Some(plan)) => plan,
                Ok(None) => return,
                Err(error) => {
                    // It is told in its turn, after the batches before it; then all of this is given up.
                    self.first_index.insert(number, 0);
                    self.early.insert(number, Err(error));
                    self.next_task += 1;
                    return;
                }
            };
            // A rank's passes may all be empty; there is still a batch.
            let first = plan.micro_batches.iter().flatten().next().map_or(0, |draw| draw.index);
            if tasks.send(Task { number, plan }).is_err() {
                return; // no worker is left; the wait for the batch says so
            }
            self.first_index.insert(number, first);
            self.next_task += 1;
        }
    }
}

impl<B> Drop for Prefetch<B> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.tasks = None;
        // Each worker holds a sender of results; when the last one ends, receiving says that nobody is left.
        let until = Instant::now() + GRACE;
        loop {
            match self.done.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    for worker in self.workers.drain(..) {
                        // A worker catches the panics of samples; there is nothing else to report here.
                        let _ = worker.join();
                    }
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {
                    tracing::warn!("a data worker is still reading a sample; it is left to end by itself");
                    return;
                }
            }
        }
    }
}

/// A worker's life: batches until there are no more.
fn work<D: Dataset, B>(
    reader: &Reader<D, B>,
    queue: &Mutex<Receiver<Task>>,
    results: &Sender<Done<B>>,
    stop: &AtomicBool,
) {
    loop {
        // One idle worker waits for a task and holds the lock; the others wait for the lock. Both waits end when the
        // consumer sends a task or drops its sender.
        let task = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Task { number, plan }) = task else { return };
        let Some(batch) = reader.read(&plan, || stop.load(Ordering::Relaxed)) else { return };
        if results.send(Done { number, batch }).is_err() {
            return;
        }
    }
}
