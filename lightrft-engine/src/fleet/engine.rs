//! The handle: its replicas, what it knows without them, and the seam's calls that go to all of them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use super::replica::{
    self, Member, Replica, ReplicaEvent, Restarts, cache, least_advanced, with_weights, without_weights,
};
use super::threads::{Failure, side_by_side};
use super::update::AllUpdate;
use crate::{
    Completion, Engine, Error, Event, Level, Limits, MemoryBytes, Parts, Request, Result, State, Update,
    Version, Watch,
};

/// Makes the engine of a replica, by its index.
pub(super) type Make = Box<dyn Fn(usize) -> Result<Box<dyn Engine>> + Send + Sync>;

/// Gives a fresh engine the weights of a version.
pub(super) type Weights = Box<dyn Fn(&mut dyn Engine, Version) -> Result<()> + Send + Sync>;

type Listener = Box<dyn FnMut(&ReplicaEvent<'_>) + Send>;

/// Replicas of one model behind one handle, which is an engine itself.
///
/// ```
/// use lightrft_engine::testing::ScriptedEngine;
/// use lightrft_engine::{DataParallel, Engine, EngineExt, Request, Sampling, State};
///
/// // Two engines; the first one's server is gone at the second call.
/// let make = |replica| {
///     let engine = ScriptedEngine::new(32);
///     Ok(Box::new(if replica == 0 { engine.dying_at(1) } else { engine }) as Box<dyn Engine>)
/// };
/// let mut engines = DataParallel::new(2, make)?;
/// let prompts: Vec<Request> = (1..9).map(|n| Request::new(vec![n; 8], Sampling::default())).collect();
/// let first = engines.complete(&prompts)?;
/// assert_eq!(engines.complete(&prompts)?, first, "what the dead one left was drawn by the other");
/// assert_eq!(engines.replicas()[0].state, State::Dead);
/// // The next call begins with another engine in its place.
/// engines.complete(&prompts)?;
/// assert_eq!((engines.replicas()[0].state, engines.replicas()[0].restarts), (State::READY, 0));
/// # Ok::<_, lightrft_engine::Error>(())
/// ```
///
/// # Requests
/// They are dealt by length: prompt tokens, and [`max_new_tokens`](crate::Sampling::max_new_tokens) for each sample; the
/// longest first, to the replica with the least. A prompt's samples stay together, so that they share its cache, unless
/// they alone are more than a replica's fair part. Each replica's part is one call on a thread of its own.
/// [`Request::id`] is set where it was not, and [`Request::first_sample`] where samples were parted, so whichever
/// replica draws a sample draws the same tokens, as far as the engines heed seeds.
///
/// # Weights
/// Every replica takes the buckets of an update from the same bytes in host memory, also where its engine alone would take
/// them from a GPU.
///
/// # Death
/// A replica is dead when its engine says so ([`State::Dead`], [`Error::is_death`]), or panics. The call goes on without it;
/// what it had not answered is dealt to those that live, but a request that was under way on three replicas when they
/// died ends the call with [`Error::Deadly`]. The dead engine is dropped, and made anew at the beginning of
/// - the next update, which gives it the weights, and
/// - the next call of [`generate`](Engine::generate), if it can be given the current weights: where it is made with them,
///   which holds until the first update begins, or [`with_weights`](Self::with_weights) said where they are.
///
/// These calls wait for it to be made: whoever makes it sets the bound, not the [`Watch`]. A call of `generate` that has less
/// time than making ever took leaves it to a later one while others live. [`Restarts`] says how often making is tried.
/// Nothing is restarted by sleeping and waking, which the dead are left out of: their memory is free.
///
/// # State
/// While replicas differ, after a failure of one that lives, the handle stands where the least advanced does, and the same
/// call again, or waking and an update, brings all together. A failure names its replica ([`Error::Replica`]). Where none
/// lives the handle goes on by the table, with its weights lost unless they can be had again, and is [`State::Dead`] when
/// every replica has been given up.
pub struct DataParallel {
    pub(super) members: Vec<Member>,
    pub(super) shared: Shared,
}

/// What does not belong to any one replica.
pub(super) struct Shared {
    pub(super) recipe: Recipe,
    /// The version that replicas are made with, until an update begins. From then on a version does not tell whose weights
    /// they are: an update may take the number that replicas are made with.
    pub(super) made: Option<Version>,
    /// The version of the last update.
    pub(super) version: Version,
    /// Where the handle stands if no replica does.
    pub(super) alone: State,
    pub(super) restarts: Restarts,
    /// The longest that making engines has taken, with giving them weights.
    pub(super) making: Duration,
    listener: Option<Listener>,
}

/// How a replica is made.
pub(super) struct Recipe {
    pub(super) make: Make,
    pub(super) weights: Option<Weights>,
    pub(super) model: Model,
}

/// What all replicas have in common.
pub(super) struct Model {
    pub(super) limits: Limits,
    parameters: Option<BTreeMap<String, Vec<usize>>>,
}

impl fmt::Debug for DataParallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataParallel")
            .field("version", &self.shared.version)
            .field("members", &self.members)
            .finish()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({}, {} if alone)", self.version, self.alone)
    }
}

impl Shared {
    pub(super) fn tell(&mut self, event: &ReplicaEvent<'_>) {
        if let Some(listener) = self.listener.as_mut() {
            listener(event);
        }
    }

    /// Whether a new engine can have the current weights outside of an update.
    fn can_give(&self) -> bool {
        self.recipe.weights.is_some() || self.made == Some(self.version)
    }
}

impl Model {
    fn of(engine: &dyn Engine) -> Self {
        Self { limits: engine.limits(), parameters: engine.parameters() }
    }

    /// Refuses an engine of another model. A longer context is as good.
    pub(super) fn check(&self, replica: usize, engine: &dyn Engine) -> Result<()> {
        let bad = |field, value, expected| {
            let source = Error::Settings { engine: "data parallel", field, value, expected };
            Err(Error::Replica { replica, source: Box::new(source) })
        };
        let (got, limits) = (engine.limits(), self.limits);
        if got.vocabulary != limits.vocabulary {
            let value = format!("{}, others have {}", got.vocabulary, limits.vocabulary);
            return bad("vocabulary", value, "engines of one model were expected");
        }
        if got.context_tokens < limits.context_tokens {
            let value = format!("{}, others have {}", got.context_tokens, limits.context_tokens);
            return bad("context_tokens", value, "at least as many as the other engines' were expected");
        }
        let parameters = engine.parameters();
        if let (Some(got), Some(expected)) = (&parameters, &self.parameters)
            && got != expected
        {
            let other = got.iter().find(|(name, shape)| expected.get(*name) != Some(shape));
            let missing = expected.iter().find(|(name, _)| !got.contains_key(*name));
            let value =
                other.or(missing).map(|(name, shape)| format!("`{name}` {shape:?}")).unwrap_or_default();
            return bad("parameters", value, "the same names and shapes as the other engines' were expected");
        }
        Ok(())
    }
}

impl DataParallel {
    /// `count` engines made by `make`, which is called with 0, 1, and so on, on a thread for each. It is kept, and called
    /// again for one that died, whose engine has been dropped before.
    ///
    /// # Errors
    /// [`Error::Settings`] for none; [`Error::Replica`] names one that could not be made, or that has another vocabulary,
    /// other parameters, another state or another version than the first.
    pub fn new(
        count: usize,
        make: impl Fn(usize) -> Result<Box<dyn Engine>> + Send + Sync + 'static,
    ) -> Result<Self> {
        let begun = Instant::now();
        let made = side_by_side("start", (0..count).collect(), |replica| {
            make(replica).map_err(|error| Failure::new(error, None))
        });
        let making = begun.elapsed();
        let mut members = Vec::with_capacity(count);
        for (replica, engine) in made.into_iter().enumerate() {
            let engine = engine.map_err(|failure| failure.of(replica))?;
            members.push(Member::new(replica, engine));
        }
        let engines = || members.iter().filter_map(|member| member.engine.as_deref());
        let Some(first) = engines().next() else {
            let (value, expected) = ("0".to_owned(), "at least one engine was expected");
            return Err(Error::Settings { engine: "data parallel", field: "count", value, expected });
        };
        let mut model = Model::of(first);
        let shortest = engines().map(|engine| engine.limits().context_tokens).min();
        model.limits.context_tokens = shortest.unwrap_or(model.limits.context_tokens);
        let (state, version) = (first.state(), first.version());
        for (replica, engine) in engines().enumerate() {
            model.check(replica, engine)?;
            if (engine.state(), engine.version()) != (state, version) {
                let value = format!("{} at {:?}", engine.state(), engine.version());
                let expected = "the same state and version as the first one's were expected";
                let source =
                    Error::Settings { engine: "data parallel", field: "state and version", value, expected };
                return Err(Error::Replica { replica, source: Box::new(source) });
            }
        }
        let shared = Shared {
            recipe: Recipe { make: Box::new(make), weights: None, model },
            made: version,
            version: version.unwrap_or_default(),
            alone: state,
            restarts: Restarts::default(),
            making,
            listener: None,
        };
        Ok(Self { members, shared })
    }

    /// The same handle, which has `weights` give an engine that was made anew the weights of a version, on a thread of its
    /// own: mostly by [`update_from`](crate::EngineExt::update_from) from what was saved. Where that fails the replica
    /// takes no requests before the next update.
    #[must_use]
    pub fn with_weights(
        mut self,
        weights: impl Fn(&mut dyn Engine, Version) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.shared.recipe.weights = Some(Box::new(weights));
        self
    }

    /// The same handle, which restarts the dead so often.
    #[must_use]
    pub fn with_restarts(mut self, restarts: Restarts) -> Self {
        self.shared.restarts = restarts;
        self
    }

    /// The same handle, which also tells `listener` what happens to replicas, on the thread of the call that finds it.
    #[must_use]
    pub fn telling(mut self, listener: impl FnMut(&ReplicaEvent<'_>) + Send + 'static) -> Self {
        self.shared.listener = Some(Box::new(listener));
        self
    }

    /// Every replica as it stands.
    pub fn replicas(&self) -> Vec<Replica> {
        self.members.iter().map(|member| member.report(&self.shared.restarts)).collect()
    }

    /// Drops the engines of the dead.
    pub(super) fn bury_the_dead(&mut self, operation: &'static str) {
        self.members.iter_mut().for_each(|member| member.bury(operation, &mut self.shared));
    }

    /// Those that take requests.
    pub(super) fn in_service(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.is_in_service())
    }

    fn living(&self) -> impl Iterator<Item = &dyn Engine> {
        self.members.iter().filter_map(Member::living)
    }

    /// Makes those anew that are down and due, if that is of use to `event`. Returns the last failure.
    pub(super) fn restart(&mut self, event: Event) -> Option<Error> {
        if event == Event::Generate && !self.shared.can_give() {
            return None;
        }
        let (state, restarts) = (self.state(), self.shared.restarts);
        let others = self.in_service().next().is_some();
        let due = |member: &&mut Member| member.is_due(&restarts, others);
        replica::restart(self.members.iter_mut().filter(due).collect(), state, &mut self.shared)
    }

    /// One call of every living engine at once. A death is no failure: what the dead one held is gone in any case.
    fn all(
        &mut self,
        event: Event,
        operation: &'static str,
        call: impl Fn(&mut dyn Engine) -> Result<()> + Sync,
    ) -> Result<()> {
        self.bury_the_dead(operation);
        let next = self.state().after(event)?;
        let Self { members, shared } = self;
        let living: Vec<_> = members.iter_mut().filter(|member| member.living().is_some()).collect();
        let (mut records, mut engines) = (Vec::new(), Vec::new());
        for Member { engine, record } in living {
            engines.extend(engine.as_deref_mut());
            records.push(record);
        }
        let done = side_by_side(operation, engines, |engine| {
            call(engine).map_err(|error| Failure::new(error, Some(engine.state())))
        });
        shared.alone = next;
        let mut failed = None;
        for (record, done) in records.into_iter().zip(done) {
            match done {
                Ok(()) => {}
                Err(Failure::Died(error)) => {
                    record.lose(operation, &error, shared);
                }
                Err(Failure::Failed(error)) => {
                    failed.get_or_insert(Error::Replica { replica: record.index, source: Box::new(error) });
                }
            }
        }
        self.bury_the_dead(operation);
        failed.map_or(Ok(()), Err)
    }
}

impl Engine for DataParallel {
    fn generate(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>> {
        self.generate_all(requests, watch)
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        self.all(Event::Sleep(level), "sleep", |engine| engine.sleep(level))
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        self.all(Event::Wake(parts), "wake", |engine| engine.wake(parts))
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>> {
        self.bury_the_dead("update weights");
        let updating = self.state().after(Event::BeginUpdate)?;
        let last = self.restart(Event::BeginUpdate);
        Ok(Box::new(AllUpdate::begin(&mut self.members, &mut self.shared, to, cache(updating), last)?))
    }

    fn state(&self) -> State {
        let Shared { version, alone, restarts, .. } = &self.shared;
        let of = |behind: bool| {
            let members = self.members.iter().filter(|member| member.record.behind == behind);
            least_advanced(members.filter_map(|member| member.state(*version)))
        };
        if let Some(state) = of(false) {
            return state;
        }
        // None that lives has the current weights. A new engine can: those left behind must not be in its way.
        let comes_back = |m: &Member| m.living().is_none() && m.record.restarts < restarts.most;
        match (of(true), self.members.iter().any(comes_back)) {
            (behind, true) if self.shared.can_give() => {
                let others = behind.map(with_weights);
                least_advanced(others.into_iter().chain([*alone])).unwrap_or(*alone)
            }
            (Some(behind), _) => behind,
            (None, true) => without_weights(*alone),
            (None, false) => State::Dead,
        }
    }

    fn version(&self) -> Option<Version> {
        self.state().has_weights().then_some(self.shared.version)
    }

    /// The sum over all that live; `None` if one of them cannot know.
    fn memory_bytes(&self) -> Option<MemoryBytes> {
        self.living().try_fold(MemoryBytes::default(), |sum, engine| {
            let MemoryBytes { weights, cache, parked } = engine.memory_bytes()?;
            Some(MemoryBytes {
                weights: sum.weights.saturating_add(weights),
                cache: sum.cache.saturating_add(cache),
                parked: sum.parked.saturating_add(parked),
            })
        })
    }

    /// The strictest that any replica had when the handle was made.
    fn limits(&self) -> Limits {
        self.shared.recipe.model.limits
    }

    fn parameters(&self) -> Option<BTreeMap<String, Vec<usize>>> {
        self.shared.recipe.model.parameters.clone()
    }
}
