//! The scripted engine behind a hook that hears of every call before the engine does, and may fail it.

use std::collections::BTreeMap;
use std::fmt;

use lightrft_engine::testing::ScriptedEngine;
use lightrft_engine::{
    Completion, Engine, Error, Level, Limits, MemoryBytes, NamedTensor, Parts, Request, Result, State,
    Update, Version, Watch,
};

/// A call of the engine.
#[derive(Debug)]
pub(crate) enum Call<'a, 'w> {
    Generate(&'a [Request], &'a mut Watch<'w>),
    Sleep,
    Wake,
    Begin,
    Push(&'a [NamedTensor<'a>]),
    Commit,
}

type Hook = Box<dyn FnMut(Call<'_, '_>) -> Result<()> + Send>;

/// Does what the scripted engine does, unless the hook fails.
pub(crate) struct Faulty {
    pub(crate) engine: ScriptedEngine,
    hook: Hook,
}

pub(crate) fn failure() -> Error {
    Error::Backend { engine: "faulty", operation: "fail", source: "as the test wants".into() }
}

impl Faulty {
    pub(crate) fn boxed(
        engine: ScriptedEngine,
        hook: impl FnMut(Call<'_, '_>) -> Result<()> + Send + 'static,
    ) -> Box<dyn Engine> {
        Box::new(Self { engine, hook: Box::new(hook) })
    }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({:?})", self.engine)
    }
}

impl Engine for Faulty {
    fn generate(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>> {
        (self.hook)(Call::Generate(requests, watch))?;
        self.engine.generate(requests, watch)
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        (self.hook)(Call::Sleep)?;
        self.engine.sleep(level)
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        (self.hook)(Call::Wake)?;
        self.engine.wake(parts)
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>> {
        (self.hook)(Call::Begin)?;
        let update = self.engine.begin_update(to)?;
        Ok(Box::new(FaultyUpdate { update, hook: &mut self.hook }))
    }

    fn state(&self) -> State {
        self.engine.state()
    }

    fn version(&self) -> Option<Version> {
        self.engine.version()
    }

    fn memory_bytes(&self) -> Option<MemoryBytes> {
        self.engine.memory_bytes()
    }

    fn limits(&self) -> Limits {
        self.engine.limits()
    }

    fn parameters(&self) -> Option<BTreeMap<String, Vec<usize>>> {
        self.engine.parameters()
    }
}

struct FaultyUpdate<'a> {
    update: Box<dyn Update + 'a>,
    hook: &'a mut Hook,
}

impl fmt::Debug for FaultyUpdate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.update)
    }
}

impl Update for FaultyUpdate<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        (self.hook)(Call::Push(bucket))?;
        self.update.push(bucket)
    }

    fn commit(self: Box<Self>) -> Result<()> {
        (self.hook)(Call::Commit)?;
        self.update.commit()
    }
}
