//! Asleep, awake, updating, stale: every step and every refusal, in one table.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How deeply an engine sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Weights are kept on the host, the cache is dropped. Waking brings the same weights back.
    One,
    /// Weights and cache are dropped. Waking leaves the engine stale until an update commits.
    Two,
}

/// What to wake. Weights first and the cache after an update needs the least memory at its peak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parts {
    /// Memory for the weights, and after a sleep of level one their contents.
    Weights,
    /// The key-value cache. The weights must be awake.
    Cache,
    /// Both.
    All,
}

/// Whether the key-value cache may take memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// It is there, or grows when it is used.
    Ready,
    /// It was dropped by a sleep and not woken since.
    Asleep,
}

/// Where an engine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The weights are whole and of one version. Generates when the cache is [`Cache::Ready`].
    Awake {
        /// The cache, which may still sleep.
        cache: Cache,
    },
    /// The memory is the trainer's.
    Asleep {
        /// How deeply.
        level: Level,
    },
    /// An update has begun and neither committed nor been dropped.
    Updating {
        /// The cache, as it was when the update began.
        cache: Cache,
    },
    /// The weights are absent, not known, or of no one version. Only an update mends that.
    Stale {
        /// The cache, which may still sleep.
        cache: Cache,
    },
    /// Its process, its server or its GPU is gone. Nothing brings this engine back: make another.
    Dead,
}

/// What may happen to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Completions are asked for.
    Generate,
    /// The requests of its server are to be frozen.
    Pause,
    /// The requests of its server are to go on.
    Resume,
    /// What it keeps of former requests is to be dropped.
    ResetCaches,
    /// The trainer wants the memory.
    Sleep(Level),
    /// The trainer gives the memory back.
    Wake(Parts),
    /// New weights are announced.
    BeginUpdate,
    /// Every new weight has been pushed.
    Commit,
    /// The update was dropped before its commit, or its commit failed.
    Abandon,
    /// A call failed in a way that does not tell whether it was done: what sleeps and which weights there are is not known.
    LoseTrack,
    /// Its process or its server was found to be gone.
    Die,
}

/// What to do with a dead engine.
const GONE: &str = "its server or its GPU is gone: make another engine";

/// A call that the engine's state does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {event} while {state}: {advice}")]
pub struct Refusal {
    /// Where the engine stands, and still stands after the refusal.
    pub state: State,
    /// What was asked.
    pub event: Event,
    /// What to do instead.
    pub advice: &'static str,
}

impl State {
    /// The state of an engine that was made with its weights.
    pub const READY: State = State::Awake { cache: Cache::Ready };
    /// The state of an engine that was made without weights, or for a server that was found asleep.
    pub const EMPTY: State = State::Stale { cache: Cache::Ready };

    /// The state after `event`, or why there is none.
    ///
    /// | | awake | asleep, level 1 | asleep, level 2 | updating | stale |
    /// |---|---|---|---|---|---|
    /// | generate | stays (cache ready) | refused | refused | refused | refused |
    /// | pause or resume requests, reset caches | stays (cache ready) | refused | refused | refused | refused |
    /// | sleep 1 | asleep 1 | stays | stays | refused | asleep **2** |
    /// | sleep 2 | asleep 2 | asleep 2 | stays | refused | asleep 2 |
    /// | wake weights | stays | awake, no cache | **stale**, no cache | refused | stays |
    /// | wake cache | cache ready | refused | refused | refused | cache ready |
    /// | wake all | cache ready | awake | **stale** | refused | cache ready |
    /// | begin update | updating | refused | refused | starts anew | updating |
    /// | commit | refused | refused | refused | awake | refused |
    /// | abandon | refused | refused | refused | stale | refused |
    /// | lose track | **stale** | **stale** | **stale** | **stale** | stale |
    ///
    /// Dying is possible everywhere; dead, everything else is refused.
    ///
    /// Stale weights are worth nothing, so a stale engine drops them at either level. An update that was leaked
    /// (`std::mem::forget`) leaves the engine updating; beginning another is the way out. An engine that lost track of what
    /// sleeps counts as one with its cache ready: the next update, wake or sleep sees to it.
    ///
    /// # Errors
    /// [`Refusal`], with the state, the event and what to do instead.
    pub fn after(self, event: Event) -> Result<State, Refusal> {
        use Cache::{Asleep as NoCache, Ready};
        use Event::{
            Abandon, BeginUpdate, Commit, Die, Generate, LoseTrack, Pause, ResetCaches, Resume, Sleep, Wake,
        };
        use State::{Asleep, Awake, Dead, Stale, Updating};
        let refused = |advice| Err(Refusal { state: self, event, advice });
        match (self, event) {
            (_, Die) => Ok(Dead),
            (Dead, _) => refused(GONE),
            (_, LoseTrack) => Ok(Self::EMPTY),

            // A server that sleeps or is in the midst of an update stays paused, whoever asks, and what it keeps of former
            // requests goes when that ends.
            (_, Generate | Pause | Resume | ResetCaches) => match self {
                Awake { cache: Ready } => Ok(self),
                Awake { cache: NoCache } => refused("wake the cache first"),
                Asleep { level: Level::One } => refused("wake it first"),
                Asleep { level: Level::Two } => refused("wake it and update its weights first"),
                Updating { .. } => refused("commit the update first, or begin another"),
                Stale { .. } => refused("update its weights first"),
                Dead => refused(GONE),
            },

            (Awake { .. }, Sleep(level)) => Ok(Asleep { level }),
            (Asleep { level: now }, Sleep(level)) => Ok(Asleep { level: now.max(level) }),
            (Stale { .. }, Sleep(_)) => Ok(Asleep { level: Level::Two }),
            (Updating { .. }, Sleep(_)) => refused("commit or drop the update first, or begin another"),

            (Awake { cache }, Wake(parts)) => Ok(Awake { cache: woken(cache, parts) }),
            (Stale { cache }, Wake(parts)) => Ok(Stale { cache: woken(cache, parts) }),
            (Asleep { .. }, Wake(Parts::Cache)) => refused("wake the weights first, or all"),
            (Asleep { level: Level::One }, Wake(parts)) => Ok(Awake { cache: woken(NoCache, parts) }),
            (Asleep { level: Level::Two }, Wake(parts)) => Ok(Stale { cache: woken(NoCache, parts) }),
            (Updating { .. }, Wake(_)) => refused("commit or drop the update first, or begin another"),

            (Awake { cache } | Stale { cache } | Updating { cache }, BeginUpdate) => Ok(Updating { cache }),
            (Asleep { .. }, BeginUpdate) => refused("wake the weights first"),

            (Updating { cache }, Commit) => Ok(Awake { cache }),
            (Updating { cache }, Abandon) => Ok(Stale { cache }),
            (Awake { .. } | Asleep { .. } | Stale { .. }, Commit | Abandon) => {
                refused("begin an update first")
            }
        }
    }

    /// Whether [`Event::Generate`] is allowed now.
    pub fn can_generate(self) -> bool {
        self.after(Event::Generate).is_ok()
    }

    /// Whether the weights that the engine has, on the device or on the host, are whole and of one version.
    pub fn has_weights(self) -> bool {
        matches!(self, State::Awake { .. } | State::Asleep { level: Level::One })
    }
}

fn woken(cache: Cache, parts: Parts) -> Cache {
    match parts {
        Parts::Weights => cache,
        Parts::Cache | Parts::All => Cache::Ready,
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, cache) = match self {
            State::Asleep { level } => return write!(f, "asleep at {level}"),
            State::Dead => return f.write_str("dead"),
            State::Awake { cache } => ("awake", cache),
            State::Updating { cache } => ("updating", cache),
            State::Stale { cache } => ("stale", cache),
        };
        f.write_str(name)?;
        match cache {
            Cache::Ready => Ok(()),
            Cache::Asleep => f.write_str(" with its cache asleep"),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::One => "level 1",
            Level::Two => "level 2",
        })
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Generate => f.write_str("generate"),
            Event::Pause => f.write_str("pause requests"),
            Event::Resume => f.write_str("resume requests"),
            Event::ResetCaches => f.write_str("reset caches"),
            Event::Sleep(level) => write!(f, "sleep at {level}"),
            Event::Wake(Parts::Weights) => f.write_str("wake the weights"),
            Event::Wake(Parts::Cache) => f.write_str("wake the cache"),
            Event::Wake(Parts::All) => f.write_str("wake"),
            Event::BeginUpdate => f.write_str("begin an update"),
            Event::Commit => f.write_str("commit an update"),
            Event::Abandon => f.write_str("abandon an update"),
            Event::LoseTrack => f.write_str("lose track"),
            Event::Die => f.write_str("die"),
        }
    }
}
