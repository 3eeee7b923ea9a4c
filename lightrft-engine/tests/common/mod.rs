//! An engine that takes any tensors, notes what was pushed, and fails or waits where a test wants it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::collections::BTreeMap;
use std::fmt;

use lightrft_engine::{
    Completion, Dtype, Engine, Error, Event, Level, Limits, MemoryBytes, NamedTensor, Parts, Request, Result,
    State, Update, Version, Watch,
};

/// What an engine saw of an update, in order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Seen {
    Begin(Version),
    /// The bytes of each tensor of a bucket.
    Push(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>),
    Commit,
}

type Hook = Box<dyn FnMut(usize, &[NamedTensor<'_>]) -> Result<()> + Send>;

/// Takes whatever is pushed.
pub(crate) struct Recorder {
    pub(crate) state: State,
    pub(crate) version: Version,
    pub(crate) seen: Vec<Seen>,
    pub(crate) parameters: Option<BTreeMap<String, Vec<usize>>>,
    /// Called with the number of the push before it is noted.
    pub(crate) on_push: Option<Hook>,
    pub(crate) fail_commit: bool,
    pub(crate) keep_bytes: bool,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recorder({})", self.state)
    }
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            state: State::READY,
            version: Version(0),
            seen: Vec::new(),
            parameters: None,
            on_push: None,
            fail_commit: false,
            keep_bytes: true,
        }
    }
}

pub(crate) fn failure(operation: &'static str) -> Error {
    Error::Backend { engine: "recorder", operation, source: "as the test wants".into() }
}

impl Recorder {
    /// One that calls `hook` before it takes a bucket.
    pub(crate) fn hooked(hook: impl FnMut(usize, &[NamedTensor<'_>]) -> Result<()> + Send + 'static) -> Self {
        Self { on_push: Some(Box::new(hook)), ..Self::default() }
    }

    fn step(&mut self, event: Event) -> Result<()> {
        self.state = self.state.after(event)?;
        Ok(())
    }

    /// Names and bytes of everything pushed, in order.
    pub(crate) fn pushed(&self) -> Vec<(String, Vec<u8>)> {
        let buckets = self.seen.iter().filter_map(|seen| match seen {
            Seen::Push(bucket) => Some(bucket),
            Seen::Begin(_) | Seen::Commit => None,
        });
        buckets.flatten().map(|(name, _, _, bytes)| (name.clone(), bytes.clone())).collect()
    }
}

impl Engine for Recorder {
    fn generate(&mut self, _: &[Request], _: &mut Watch<'_>) -> Result<Vec<Completion>> {
        self.state.after(Event::Generate)?;
        Ok(Vec::new())
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        self.step(Event::Sleep(level))
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        self.step(Event::Wake(parts))
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>> {
        self.step(Event::BeginUpdate)?;
        self.seen.push(Seen::Begin(to));
        Ok(Box::new(Recording { engine: self, to, pushes: 0 }))
    }

    fn state(&self) -> State {
        self.state
    }

    fn version(&self) -> Option<Version> {
        self.state.has_weights().then_some(self.version)
    }

    fn memory_bytes(&self) -> Option<MemoryBytes> {
        None
    }

    fn limits(&self) -> Limits {
        Limits { vocabulary: 32, context_tokens: 32 }
    }

    fn parameters(&self) -> Option<BTreeMap<String, Vec<usize>>> {
        self.parameters.clone()
    }
}

#[derive(Debug)]
struct Recording<'a> {
    engine: &'a mut Recorder,
    to: Version,
    pushes: usize,
}

impl Update for Recording<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        self.pushes += 1;
        if let Some(hook) = self.engine.on_push.as_mut() {
            hook(self.pushes - 1, bucket)?;
        }
        if self.engine.keep_bytes {
            let noted = |t: &NamedTensor<'_>| {
                (t.name().to_owned(), t.dtype(), t.shape().to_vec(), t.bytes().to_vec())
            };
            self.engine.seen.push(Seen::Push(bucket.iter().map(noted).collect()));
        }
        Ok(())
    }

    fn commit(self: Box<Self>) -> Result<()> {
        if self.engine.fail_commit {
            return Err(failure("commit"));
        }
        self.engine.step(Event::Commit)?;
        self.engine.version = self.to;
        self.engine.seen.push(Seen::Commit);
        Ok(())
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        self.engine.step(Event::Abandon).ok();
    }
}
