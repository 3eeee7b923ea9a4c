//! One replica: its engine, what is on record about it, where it stands among others, and how it is restarted.

use std::fmt;
use std::time::{Duration, Instant};

use super::engine::{Recipe, Shared};
use super::threads::{Failure, caught, side_by_side};
use crate::{Cache, Engine, Error, Event, Level, Parts, Result, State, Version};

/// How often a dead replica is made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restarts {
    /// Restarts of one replica, failed ones too, until it has answered requests again. After as many it stays down.
    pub most: u32,
    /// How long a replica is left alone after its first restart, as long as others live; twice as long after each that
    /// follows. Nothing waits for it: a replica whose time has not come is left out.
    pub pause: Duration,
}

impl Default for Restarts {
    /// 3 restarts, 10 s apart.
    fn default() -> Self {
        Self { most: 3, pause: Duration::from_secs(10) }
    }
}

/// Whether a replica takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// It does what the handle is asked.
    In,
    /// It was restarted and could not be given the current weights. It sleeps, wakes and is updated with the others, and
    /// takes requests again after the next update.
    Behind,
    /// It died, and will be restarted.
    Down,
    /// It died, and every restart that [`Restarts::most`] allows has been used.
    GivenUp,
}

/// A replica as it stands, told by [`DataParallel::replicas`](super::DataParallel::replicas).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Where its own engine stands; [`State::Dead`] where there is none.
    pub state: State,
    /// The version of its weights.
    pub version: Option<Version>,
    /// Whether it takes part.
    pub service: Service,
    /// Restarts since it last answered requests.
    pub restarts: u32,
}

/// What happens to replicas, told as it happens.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReplicaEvent<'a> {
    /// A call found its engine gone, or the engine panicked. It will be dropped.
    Died {
        /// Its index.
        replica: usize,
        /// What was under way.
        operation: &'static str,
        /// What the call ended with.
        error: &'a Error,
    },
    /// Requests that it had not answered are dealt to others.
    Repeated {
        /// The one that died.
        replica: usize,
        /// How many requests, as it was sent them.
        requests: usize,
    },
    /// It was made anew.
    Restarted {
        /// Its index.
        replica: usize,
        /// How often in a row, with this one.
        restarts: u32,
        /// [`Service::In`], or [`Service::Behind`] where it has yet to be given the weights.
        service: Service,
        /// Why it could not be given the weights, if that was tried.
        error: Option<&'a Error>,
    },
    /// It could not be made anew.
    NotRestarted {
        /// Its index.
        replica: usize,
        /// How often in a row, with this one.
        restarts: u32,
        /// Why.
        error: &'a Error,
    },
}

/// A replica.
pub(super) struct Member {
    /// None once it died and was dropped.
    pub(super) engine: Option<Box<dyn Engine>>,
    pub(super) record: Record,
}

/// What is known of a replica without asking its engine.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) index: usize,
    /// Its engine died and is to be dropped.
    pub(super) lost: bool,
    pub(super) behind: bool,
    pub(super) restarts: u32,
    attempted: Option<Instant>,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "replica {}: {:?}", self.record.index, self.engine)
    }
}

impl Record {
    /// Notes a death, and tells of it.
    pub(super) fn lose(&mut self, operation: &'static str, error: &Error, shared: &mut Shared) {
        self.lost = true;
        let replica = self.index;
        tracing::warn!(replica, operation, %error, "a replica died");
        shared.tell(&ReplicaEvent::Died { replica, operation, error });
    }
}

impl Member {
    pub(super) fn new(index: usize, engine: Box<dyn Engine>) -> Self {
        Self { engine: Some(engine), record: Record { index, ..Record::default() } }
    }

    /// Its engine, unless it is known to be dead.
    pub(super) fn living(&self) -> Option<&dyn Engine> {
        let engine = self.engine.as_deref().filter(|_| !self.record.lost)?;
        (engine.state() != State::Dead).then_some(engine)
    }

    /// Whether it takes requests when the handle does.
    pub(super) fn is_in_service(&self) -> bool {
        !self.record.behind && self.living().is_some()
    }

    /// Where it stands, with weights of another version for stale ones.
    pub(super) fn state(&self, version: Version) -> Option<State> {
        let engine = self.living()?;
        let state = engine.state();
        Some(if engine.version() == Some(version) { state } else { without_weights(state) })
    }

    pub(super) fn report(&self, restarts: &Restarts) -> Replica {
        let (state, version, service) = match self.living() {
            Some(engine) => {
                let service = if self.record.behind { Service::Behind } else { Service::In };
                (engine.state(), engine.version(), service)
            }
            None if self.record.restarts < restarts.most => (State::Dead, None, Service::Down),
            None => (State::Dead, None, Service::GivenUp),
        };
        Replica { state, version, service, restarts: self.record.restarts }
    }

    /// Drops the engine of a replica that died: its memory, its process and its port are needed.
    pub(super) fn bury(&mut self, operation: &'static str, shared: &mut Shared) {
        let Some(engine) = self.engine.as_ref() else { return };
        if !self.record.lost {
            let Err(refusal) = engine.state().after(Event::Generate) else { return };
            if refusal.state != State::Dead {
                return;
            }
            self.record.lose(operation, &refusal.into(), shared);
        }
        let engine = self.engine.take();
        self.record.lost = false;
        // One that panicked may do so again.
        caught(operation, || {
            drop(engine);
            Ok(())
        })
        .ok();
    }

    /// Whether it is down and may be made anew now. Its pause does not count where nobody else lives.
    pub(super) fn is_due(&self, restarts: &Restarts, others: bool) -> bool {
        let record = &self.record;
        let pause = restarts.pause.saturating_mul(1 << record.restarts.saturating_sub(1).min(16));
        let rested = record.attempted.is_none_or(|at| record.restarts == 0 || at.elapsed() >= pause);
        self.engine.is_none() && record.restarts < restarts.most && (rested || !others)
    }
}

/// The furthest from generating that any of them is, part by part: every call that is allowed from there is allowed to
/// each of them, and brings them together.
pub(super) fn least_advanced(states: impl Iterator<Item = State>) -> Option<State> {
    let join = |a: State, b: State| {
        let cache = match (cache(a), cache(b)) {
            (Cache::Ready, Cache::Ready) => Cache::Ready,
            _ => Cache::Asleep,
        };
        let is_asleep = |s: State| matches!(s, State::Asleep { .. });
        let is_updating = |s: State| matches!(s, State::Updating { .. });
        match (a.has_weights() && b.has_weights(), is_asleep(a) || is_asleep(b)) {
            _ if is_updating(a) || is_updating(b) => State::Updating { cache },
            (true, true) => State::Asleep { level: Level::One },
            (false, true) => State::Asleep { level: Level::Two },
            (true, false) => State::Awake { cache },
            (false, false) => State::Stale { cache },
        }
    };
    states.reduce(join)
}

/// The same state with weights that are worth nothing.
pub(super) fn without_weights(state: State) -> State {
    match state {
        State::Awake { cache } => State::Stale { cache },
        State::Asleep { .. } => State::Asleep { level: Level::Two },
        state => state,
    }
}

/// The same state with weights.
pub(super) fn with_weights(state: State) -> State {
    match state {
        State::Stale { cache } => State::Awake { cache },
        State::Asleep { .. } => State::Asleep { level: Level::One },
        state => state,
    }
}

pub(super) fn cache(state: State) -> Cache {
    match state {
        State::Awake { cache } | State::Stale { cache } | State::Updating { cache } => cache,
        State::Asleep { .. } | State::Dead => Cache::Asleep,
    }
}

/// Makes new engines for `members`, side by side, as the handle stands in `state`. Returns the last failure.
pub(super) fn restart(members: Vec<&mut Member>, state: State, shared: &mut Shared) -> Option<Error> {
    if members.is_empty() {
        return None;
    }
    let indices: Vec<usize> = members.iter().map(|member| member.record.index).collect();
    let begun = Instant::now();
    let made = {
        let (recipe, version, made) = (&shared.recipe, shared.version, shared.made);
        side_by_side("restart", indices, |index| {
            make(index, state, version, made, recipe).map_err(|error| Failure::new(error, None))
        })
    };
    shared.making = shared.making.max(begun.elapsed());
    let mut last = None;
    for (member, made) in members.into_iter().zip(made) {
        let record = &mut member.record;
        record.restarts += 1;
        record.attempted = Some(Instant::now());
        let (replica, restarts) = (record.index, record.restarts);
        match made {
            Ok((engine, given)) => {
                member.engine = Some(engine);
                record.behind = !matches!(given, Given::Current);
                let service = if record.behind { Service::Behind } else { Service::In };
                let error = if let Given::Failed(error) = &given { Some(error) } else { None };
                tracing::info!(
                    replica,
                    restarts,
                    ?service,
                    error = error.map(tracing::field::display),
                    "a replica was restarted"
                );
                shared.tell(&ReplicaEvent::Restarted { replica, restarts, service, error });
                if let Given::Failed(error) = given {
                    last = Some(error);
                }
            }
            Err(Failure::Died(error) | Failure::Failed(error)) => {
                tracing::warn!(replica, restarts, %error, "a replica could not be restarted");
                shared.tell(&ReplicaEvent::NotRestarted { replica, restarts, error: &error });
                last = Some(error);
            }
        }
    }
    last
}

/// What became of a new engine's weights.
enum Given {
    Current,
    /// They are another version's, and nobody was asked for the current ones.
    Others,
    Failed(Error),
}

/// A new engine for a handle that stands in `state` at `version`; one that says `made` has the weights it is made with.
fn make(
    index: usize,
    state: State,
    version: Version,
    made: Option<Version>,
    recipe: &Recipe,
) -> Result<(Box<dyn Engine>, Given)> {
    let mut engine = (recipe.make)(index)?;
    recipe.model.check(index, engine.as_ref())?;
    if !matches!(state, State::Asleep { .. }) && cache(state) == Cache::Asleep {
        // The handle's caches sleep: somebody else uses that memory.
        engine.sleep(Level::Two)?;
        engine.wake(Parts::Weights)?;
    }
    let is_current = |engine: &dyn Engine| engine.version() == Some(version);
    if made == Some(version) && is_current(engine.as_ref()) {
        return Ok((engine, Given::Current));
    }
    let given = match recipe.weights.as_ref() {
        // Before an update they would be in vain.
        Some(weights) if state.can_generate() => match weights(engine.as_mut(), version) {
            Ok(()) if is_current(engine.as_ref()) && engine.state().can_generate() => Given::Current,
            Ok(()) => {
                let got = engine.version();
                let source = format!("it is {} at {got:?}, {version} was to be given", engine.state()).into();
                Given::Failed(Error::Backend { engine: "data parallel", operation: "give weights", source })
            }
            Err(error) if engine.state() == State::Dead => return Err(error),
            Err(error) => Given::Failed(error),
        },
        _ => Given::Others,
    };
    Ok((engine, given))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn states() -> Vec<State> {
        let caches = [Cache::Ready, Cache::Asleep];
        let with = |make: fn(Cache) -> State| caches.map(make);
        [
            with(|cache| State::Awake { cache }),
            with(|cache| State::Stale { cache }),
            [Level::One, Level::Two].map(|level| State::Asleep { level }),
        ]
        .concat()
    }

    proptest! {
        #[test]
        fn what_is_allowed_to_all_is_allowed_to_each_and_brings_them_closer(
            picks in prop::collection::vec(0..6_usize, 1..5), event in 0..6_usize,
        ) {
            let states: Vec<State> = picks.iter().map(|pick| states()[*pick]).collect();
            let event = [
                Event::Generate, Event::Sleep(Level::One), Event::Sleep(Level::Two), Event::Wake(Parts::Weights),
                Event::Wake(Parts::Cache), Event::Wake(Parts::All),
            ][event];
            let all = least_advanced(states.iter().copied()).unwrap();
            if let Ok(next) = all.after(event) {
                let each: Result<Vec<State>, _> = states.iter().map(|s| s.after(event)).collect();
                prop_assert_eq!(least_advanced(each.unwrap().into_iter()), Some(next), "{} after {:?}", all, event);
            }
        }
    }

    #[test]
    fn any_mixture_is_mended_by_wake_and_update() {
        for a in states() {
            for b in states() {
                let mut both = [a, b];
                for event in [Event::Wake(Parts::All), Event::BeginUpdate, Event::Commit] {
                    let all = least_advanced(both.into_iter()).unwrap();
                    all.after(event).unwrap();
                    both = both.map(|state| state.after(event).unwrap());
                }
                assert_eq!(both, [State::READY; 2]);
            }
        }
    }
}
