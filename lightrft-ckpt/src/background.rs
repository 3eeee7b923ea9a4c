//! A save that goes on while training does: the call copies, a thread writes and commits.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::agreement::{Agreement, agree};
use crate::aligned::AlignedBuf;
use crate::block_writer::Source;
use crate::error::{Error, Result, caught};
use crate::reader::Checkpoints;
use crate::rotation::{Rotated, Rotation};
use crate::saver::{Begun, SaveReport, Saver};
use crate::snapshot::Snapshot;
use crate::writer::RankFile;

/// Saves checkpoints in the background: a call blocks until the ranks have agreed on what to save and this rank's share
/// is copied, and no longer.
///
/// Every rank has one, and all make the same calls in the same order. At most one save is in flight: the next call
/// waits for it. What becomes of a save is told by the next [`save`](Self::save) or [`finish`](Self::finish), and
/// there only, so that all ranks learn of a failure at the same call; until then the checkpoint must not be counted on.
///
/// The copy takes as much memory as this rank writes, kept from one save to the next until this is dropped. It is
/// written as it lies: there is no second copy.
///
/// ```
/// use std::sync::Arc;
/// use lightrft_ckpt::{Alone, BackgroundSaver, Part, Region, Rotation, Saver, Snapshot};
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
///
/// let mut saver = BackgroundSaver::new(Saver::open(dir, &Alone)?, Arc::new(Alone))?;
/// let mut weight = vec![0.0f32; 6];
/// for step in 1..=3 {
///     weight.fill(step as f32); // A training step, while the save of the one before goes on.
///     let mut snapshot = Snapshot::of_step(step);
///     snapshot.parts.push(Part::new("weight", &[2, 3][..], Region::Whole, &weight));
///     if let Some(report) = saver.save(&snapshot, &Rotation::default())? {
///         assert_eq!(report.step, step - 1);
///     }
/// }
/// let last = saver.finish()?.map(|report| report.step);
/// assert_eq!(last, Some(3));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
///
/// Dropping it waits for the save in flight, whose failure is then only logged; call [`finish`](Self::finish) to know.
pub struct BackgroundSaver {
    saver: Arc<Saver>,
    group: Arc<dyn Agreement + Send + Sync>,
    /// `None` while a save has it.
    image: Option<AlignedBuf>,
    progress: Arc<Cell>,
    /// `None` once this is being dropped.
    tasks: Option<Sender<Task>>,
    outcomes: Receiver<Outcome>,
    /// Whether an outcome is still to come.
    pending: bool,
    /// The save before, when the next one was refused before it could be told of it.
    unreported: Option<SaveReport>,
    worker: Option<JoinHandle<()>>,
}

/// How far a save has come.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The tag being saved.
    pub tag: String,
    /// What is being done.
    pub phase: Phase,
    /// Bytes of this rank's file that are written, if not yet durable.
    pub written_bytes: u64,
    /// Bytes that this rank writes.
    pub total_bytes: u64,
}

/// What a save in the background is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[non_exhaustive]
pub enum Phase {
    /// This rank writes its file.
    Writing,
    /// This rank's file is durable. The ranks agree, rank 0 publishes the checkpoint and lets old ones go.
    Publishing,
    /// It is over: saved or failed. The next [`BackgroundSaver::save`] or [`BackgroundSaver::finish`] tells which.
    Over,
}

/// The progress of the save begun last, as the thread tells it.
#[derive(Debug, Default)]
struct Cell {
    begun: Mutex<Option<(String, u64)>>,
    phase: AtomicU8,
    written: AtomicU64,
}

impl Cell {
    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }
}

/// What the thread is given: a save that all ranks have begun, and this rank's file.
struct Task {
    begun: Begun,
    file: Result<RankFile>,
    image: AlignedBuf,
}

/// What it gives back.
struct Outcome {
    saved: Result<SaveReport>,
    image: AlignedBuf,
}

impl BackgroundSaver {
    /// Takes a saver, and a group of the same ranks as it was opened with. The thread in the background speaks on this
    /// group, so nothing else may: give it a group of its own. Every rank of the group calls this.
    ///
    /// # Errors
    /// [`Error::Io`] when no thread can be started; [`Error::Rank`] when none can on another rank; [`Error::Agreement`].
    pub fn new(saver: Saver, group: Arc<dyn Agreement + Send + Sync>) -> Result<Self> {
        let saver = Arc::new(saver);
        let progress = Arc::new(Cell::default());
        let (tasks, given) = channel::<Task>();
        let (done, outcomes) = channel();
        let thread = Worker { saver: saver.clone(), group: group.clone(), progress: progress.clone() };
        let mut worker = None;
        let started = thread::Builder::new()
            .name("ckpt-background".into())
            .spawn(move || {
                // Ends when the saver is dropped, which first waits for what is in flight.
                for task in given {
                    if done.send(thread.run(task)).is_err() {
                        break;
                    }
                }
            })
            .map(|thread| worker = Some(thread))
            .map_err(Error::io("start a thread to save to", saver.dir()));
        // A rank that went on alone would wait for the others in its first save.
        if let Err(e) = agree(group.as_ref(), "starting a thread", started) {
            drop(tasks);
            let _ = worker.map(JoinHandle::join);
            return Err(e);
        }
        Ok(BackgroundSaver {
            saver,
            group,
            image: Some(AlignedBuf::default()),
            progress,
            tasks: Some(tasks),
            outcomes,
            pending: false,
            unreported: None,
            worker,
        })
    }

    /// Waits for the save in flight, then begins this one: every rank calls it with its own parts. When it returns, the
    /// snapshot is copied and the tensors may change; `shared` and `rank_state` are saved as they are now.
    ///
    /// Returns the report of the save before, when there was one that was not reported yet. When that one failed, its
    /// error is returned, once and on every rank, and *this snapshot is not saved*: call again to save it.
    ///
    /// # Errors
    /// Those of the save before, as of [`Saver::save`]; and at once, on every rank, what is wrong with this snapshot:
    /// [`Error::Snapshot`], [`Error::Rotation`], [`Error::Foreign`], [`Error::Rank`], [`Error::Agreement`],
    /// [`Error::Io`].
    pub fn save(&mut self, snapshot: &Snapshot<'_>, limits: &Rotation) -> Result<Option<SaveReport>> {
        self.unreported = self.finish()?;
        let begun = self.saver.begin(self.group.as_ref(), snapshot, limits)?;
        // What fails from here on, on one rank, is told to the others by its thread.
        let mut image = self.image.take().unwrap_or_default();
        let file = begun.rank_file(self.group.rank()).and_then(|file| {
            self.saver.copy(&file, snapshot, &mut image)?;
            Ok(file)
        });
        let total = file.as_ref().map_or(0, |file| file.bytes());
        *self.progress.begun.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((begun.tag.clone(), total));
        self.progress.written.store(0, Ordering::Relaxed);
        self.progress.enter(Phase::Writing);
        let task = Task { begun, file, image };
        // The thread ends with `self` and not before; were it gone, the outcome would say so.
        self.pending = true;
        if let Some(tasks) = &self.tasks {
            let _ = tasks.send(task);
        }
        Ok(self.unreported.take())
    }

    /// Waits for the save in flight and reports it; `None` when all were reported. Every rank calls this.
    ///
    /// # Errors
    /// Those of the save, once: it is not reported again.
    pub fn finish(&mut self) -> Result<Option<SaveReport>> {
        if !self.pending {
            return Ok(self.unreported.take());
        }
        self.pending = false;
        match self.outcomes.recv() {
            Ok(Outcome { saved, image }) => {
                self.image = Some(image);
                saved.map(Some)
            }
            Err(_) => Err(Error::Panicked { during: "saving", message: "the thread has ended".into() }),
        }
    }

    /// Waits for the save in flight, then lets go what the limits say, as [`Saver::rotate`] does. Every rank calls this.
    /// The report of that save is still to come.
    ///
    /// # Errors
    /// Those of the save in flight, once: nothing was let go then. Those of [`Saver::rotate`].
    pub fn rotate(&mut self, limits: &Rotation) -> Result<Rotated> {
        self.unreported = self.finish()?;
        self.saver.rotate(self.group.as_ref(), limits)
    }

    /// Whether a save is being written or published. Ranks may see different answers.
    pub fn is_in_flight(&self) -> bool {
        self.pending && self.progress().is_some_and(|progress| progress.phase != Phase::Over)
    }

    /// How far the save begun last has come on this rank; `None` before the first.
    pub fn progress(&self) -> Option<Progress> {
        let begun = self.progress.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let (tag, total_bytes) = begun.clone()?;
        let phase = match self.progress.phase.load(Ordering::Acquire) {
            phase if phase == Phase::Writing as u8 => Phase::Writing,
            phase if phase == Phase::Publishing as u8 => Phase::Publishing,
            _ => Phase::Over,
        };
        let written_bytes = self.progress.written.load(Ordering::Relaxed);
        Some(Progress { tag, phase, written_bytes, total_bytes })
    }

    /// The same directory, to read from.
    pub fn checkpoints(&self) -> Checkpoints {
        self.saver.checkpoints()
    }
}

impl Drop for BackgroundSaver {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            tracing::error!(%error, "a checkpoint saved in the background failed, and nobody asked");
        }
        self.tasks = None;
        if let Some(worker) = self.worker.take() {
            // It catches panics of what it runs.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for BackgroundSaver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackgroundSaver")
            .field("saver", &self.saver)
            .field("pending", &self.pending)
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

/// The thread's own end of it.
struct Worker {
    saver: Arc<Saver>,
    group: Arc<dyn Agreement + Send + Sync>,
    progress: Arc<Cell>,
}

impl Worker {
    fn run(&self, Task { begun, file, image }: Task) -> Outcome {
        let staged = file.and_then(|file| {
            let pieces = file.of_image(&image);
            let source = Source::Image(&pieces, &image);
            self.saver.stage(&begun, &file, source, &self.progress.written)
        });
        self.progress.enter(Phase::Publishing);
        // The thread lives on.
        let saved = caught("publishing", || self.saver.conclude(self.group.as_ref(), begun, staged));
        self.progress.enter(Phase::Over);
        Outcome { saved, image }
    }
}
