//! The seam: what every inference engine does for a trainer, and its contract.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::transfer::{self, UpdateReport, WeightSource};
use crate::{
    Completion, Error, Event, Level, Limits, NameMap, NamedTensor, Parts, Request, Result, State, Update,
    Version,
};

/// An inference engine that sleeps while the trainer works, and takes the trainer's weights.
///
/// Every call blocks until it is done; one engine serves one caller at a time (`&mut self`). Callers use
/// [`EngineExt`] as well.
///
/// # Contract
/// - The state changes only as [`State::after`] says, and a refused call changes nothing.
/// - [`generate`](Engine::generate) answers all requests or fails as a whole. It checks every request first, with
///   [`check_requests`](crate::check_requests).
/// - An update dropped before its commit leaves the engine stale, and so does waking from [`Level::Two`].
/// - Same weights, same requests, same seeds: same tokens, in whatever order and company requests come, as far as the
///   engine's arithmetic does not depend on the batch.
///
/// `testing::conformance` (feature `testing`) checks all of that for any engine.
pub trait Engine: fmt::Debug + Send {
    /// Completes every request. Returns the completions of request 0 in the order of their samples, then those of
    /// request 1, and so on.
    ///
    /// # Errors
    /// [`Error::Refused`] unless awake; what [`check_requests`](crate::check_requests) finds; [`Error::Deadline`];
    /// or the engine's own. No completion is returned then.
    fn generate(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>>;

    /// Gives memory back: the cache, and the weights as `level` says. Asleep at that level or deeper already, it stays
    /// as it is.
    ///
    /// # Errors
    /// [`Error::Refused`] while updating.
    fn sleep(&mut self, level: Level) -> Result<()>;

    /// Takes memory again. After [`Level::Two`] the engine is stale until an update commits.
    ///
    /// # Errors
    /// [`Error::Refused`] while updating, and for the cache alone while the weights sleep.
    fn wake(&mut self, parts: Parts) -> Result<()>;

    /// Begins to replace all weights by those of version `to`. The former ones may be dropped at once.
    ///
    /// # Errors
    /// [`Error::Refused`] while asleep.
    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>>;

    /// Where it stands.
    fn state(&self) -> State;

    /// The version of its weights; `None` where [`State::has_weights`] is false.
    fn version(&self) -> Option<Version>;

    /// What it holds in memory now; `None` where it cannot know (a server on another machine).
    fn memory_bytes(&self) -> Option<MemoryBytes>;

    /// What its model and its memory allow of a request.
    fn limits(&self) -> Limits;

    /// Every parameter that an update must push, by the engine's name, with its whole shape; `None` where the engine
    /// learns that only by being pushed to. [`EngineExt::update_from`] compares with it before anything is sent.
    ///
    /// A server's parameters are those of its model folder, as far as that folder is on this machine: by the names that
    /// its safetensors files have, without a head that is tied to the embedding.
    fn parameters(&self) -> Option<BTreeMap<String, Vec<usize>>> {
        None
    }

    /// The GPU on which it takes the buckets of an update, by [`Update::push_gpu`]; `None` where it takes them from the
    /// host.
    #[cfg(feature = "cuda")]
    fn gpu_buckets(&self) -> Option<crate::cuda::GpuBuckets> {
        None
    }

    /// Memory that its workers see too, for the buckets of an update that come from the host: those that lie in it need
    /// not be copied once more by [`Update::push`]. `None` where all memory is the same to it.
    #[cfg(feature = "vllm")]
    fn shared_buckets(&self) -> Option<crate::shared::SharedBuckets> {
        None
    }
}

/// What an engine holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryBytes {
    /// Weights that are in use, on the device.
    pub weights: u64,
    /// The key-value cache, on the device.
    pub cache: u64,
    /// Weights that a sleep of [`Level::One`] put aside on the host.
    pub parked: u64,
}

/// Conveniences for callers, written once. Engines implement only [`Engine`].
pub trait EngineExt: Engine {
    /// [`Engine::generate`] with a deadline of one hour, told to nobody.
    ///
    /// # Errors
    /// Those of [`Engine::generate`].
    fn complete(&mut self, requests: &[Request]) -> Result<Vec<Completion>> {
        self.generate(requests, &mut Watch::within(Duration::from_secs(3600)))
    }

    /// A whole update in one call: begins, pushes `tensors` in buckets of about `bucket_bytes`, commits.
    ///
    /// # Errors
    /// Those of [`Engine::begin_update`], [`Update::push`] and [`Update::commit`]; the engine is stale after the
    /// latter two.
    fn replace_weights(
        &mut self,
        to: Version,
        tensors: &[NamedTensor<'_>],
        bucket_bytes: usize,
    ) -> Result<()> {
        let mut update = self.begin_update(to)?;
        let mut rest = tensors;
        while !rest.is_empty() {
            let mut bytes = 0_usize;
            let fits = |t: &&NamedTensor<'_>| {
                bytes = bytes.saturating_add(t.bytes().len());
                bytes <= bucket_bytes
            };
            // A tensor larger than a bucket is a bucket of its own.
            let count = rest.iter().take_while(fits).count().max(1);
            let (bucket, after) = rest.split_at(count);
            update.push(bucket)?;
            rest = after;
        }
        update.commit()
    }

    /// A whole update from `source`, whose next bucket is gathered on this thread while another thread pushes the one
    /// before. Two buckets of `bucket_bytes` are in memory at most; a tensor that is larger is a bucket of its own.
    ///
    /// Names are mapped and, as far as the engine knows them, compared with its [`parameters`](Engine::parameters)
    /// before the source or the engine is asked for anything. From then on a failure on either side leaves the engine
    /// stale, and another update mends it.
    ///
    /// ```
    /// use lightrft_engine::testing::{ScriptedEngine, TensorBytes};
    /// use lightrft_engine::{Engine, EngineExt, Identity, TensorSlice, Version};
    ///
    /// let mut engine = ScriptedEngine::new(32);
    /// let weights = engine.example_weights(1);
    /// let tensors = weights.iter().map(TensorBytes::view).collect::<Result<Vec<_>, _>>()?;
    /// let report = engine.update_from(Version(1), &mut TensorSlice::new(&tensors), &Identity, 1 << 20)?;
    /// assert_eq!((report.tensors, report.bytes, engine.version()), (2, 33 * 16, Some(Version(1))));
    /// # Ok::<_, lightrft_engine::Error>(())
    /// ```
    ///
    /// # Errors
    /// Before anything is asked for: [`Error::Refused`]; [`Error::Name`]; [`Error::UnknownTensor`], [`Error::Shape`],
    /// [`Error::WrongModel`] and [`Error::MissingTensors`] against the engine's parameters. After that: [`Error::Source`] and what the source
    /// itself reports; those of [`Engine::begin_update`], [`Update::push`] and [`Update::commit`]. Where both sides
    /// fail, the engine's error is returned.
    fn update_from(
        &mut self,
        to: Version,
        source: &mut dyn WeightSource,
        map: &dyn NameMap,
        bucket_bytes: usize,
    ) -> Result<UpdateReport> {
        self.allows(Event::BeginUpdate)?;
        let plan = transfer::Plan::new(source.tensors(), map, self.parameters().as_ref(), to)?;
        transfer::run(self, to, source, &plan, bucket_bytes)
    }

    /// Checks that `event` is allowed now, and changes nothing.
    ///
    /// # Errors
    /// [`Error::Refused`].
    fn allows(&self, event: Event) -> Result<()> {
        self.state().after(event).map(drop).map_err(Error::from)
    }
}

impl<E: Engine + ?Sized> EngineExt for E {}

/// How far a call of [`Engine::generate`] has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Completions that have ended.
    pub done: usize,
    /// Completions asked for.
    pub total: usize,
    /// Tokens drawn so far, over all completions.
    pub tokens: usize,
}

/// A caller's deadline, and whom to tell how far a call has come.
pub struct Watch<'a> {
    started: Instant,
    limit: Duration,
    tell: Option<&'a mut dyn FnMut(Progress)>,
    /// Nobody waits any more: the time is over.
    stop: Option<&'a AtomicBool>,
}

impl fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Watch({:?} of {:?})", self.started.elapsed(), self.limit)
    }
}

impl<'a> Watch<'a> {
    /// A watch that starts now and runs out after `limit`.
    pub fn within(limit: Duration) -> Self {
        Self { started: Instant::now(), limit, tell: None, stop: None }
    }

    /// The same watch, which also tells `listener` after every step of the engine.
    #[must_use]
    pub fn telling(self, listener: &'a mut dyn FnMut(Progress)) -> Self {
        Self { tell: Some(listener), ..self }
    }

    /// The same watch, which also runs out when somebody sets `stop`.
    pub(crate) fn until(self, stop: &'a AtomicBool) -> Self {
        Self { stop: Some(stop), ..self }
    }

    /// What is left, zero when it has run out. A driver takes this as its request's time-out.
    pub fn left(&self) -> Duration {
        if self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Duration::ZERO;
        }
        self.limit.saturating_sub(self.started.elapsed())
    }

    /// Engines call this between steps: tells the listener and looks at the clock.
    ///
    /// # Errors
    /// [`Error::Deadline`] when the time is over and something is left to do.
    pub fn report(&mut self, progress: Progress) -> Result<()> {
        if let Some(tell) = self.tell.as_mut() {
            tell(progress);
        }
        let Progress { done, total, .. } = progress;
        if done < total && self.left().is_zero() {
            let waited = self.started.elapsed();
            return Err(Error::Deadline { operation: "generate", waited, done, total });
        }
        Ok(())
    }
}
