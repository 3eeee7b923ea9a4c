//! A model that computes nothing for a set time, to see how much of its gathers is hidden behind that

use std::cell::Cell;
use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lightrft_collectives::Communicator;
use lightrft_sharding::{
    FlatUnit, Mode, ParamSpec, Policy, ShardedModel, StageGrads, StageSpec, StagedModel, UnitSpec, UnitValues,
};

const STAGES: usize = 12;

/// Elements of each stage's unit: 8 MiB.
const ELEMS: usize = 2 << 20;

/// How long a stage computes: longer than a gather takes. It sleeps, as a host does while a device computes.
const COMPUTE: Duration = Duration::from_millis(8);

struct Sleeper {
    slept: Cell<f64>,
}

impl StagedModel for Sleeper {
    type Batch = ();
    type Activation = ();
    type Params = UnitValues;
    type Saved = ();
    type Error = lightrft_sharding::Error;

    fn units(&self) -> Vec<UnitSpec> {
        let unit = |i| UnitSpec::new(format!("u{i}"), [ParamSpec::new(format!("w{i}"), [ELEMS])]);
        (0..STAGES).map(unit).collect()
    }

    fn stages(&self) -> Vec<StageSpec> {
        (0..STAGES).map(|i| StageSpec::new(format!("s{i}"), [i])).collect()
    }

    fn bind(&self, _: &FlatUnit, values: UnitValues) -> Result<UnitValues, Self::Error> {
        Ok(values)
    }

    fn unbind(&self, params: UnitValues) -> Option<UnitValues> {
        Some(params)
    }

    fn forward(&self, _: usize, _: &[&UnitValues], (): &(), _: Option<&()>) -> Result<(), Self::Error> {
        let begin = Instant::now();
        thread::sleep(COMPUTE);
        self.slept.set(self.slept.get() + begin.elapsed().as_secs_f64());
        Ok(())
    }

    fn backward(
        &self,
        _: usize,
        _: &[&UnitValues],
        (): &(),
        _: Option<&()>,
        (): (),
        _: &mut StageGrads<'_>,
    ) -> Result<Option<()>, Self::Error> {
        Ok(None)
    }
}

/// Two models, one that waits for each gather and one that gathers the next unit while it computes.
pub(crate) struct Overlap {
    waiting: ShardedModel<Sleeper>,
    ahead: ShardedModel<Sleeper>,
}

/// Seconds of one forward pass.
pub(crate) struct Pass {
    /// Where gathers are waited for.
    pub(crate) waiting: f64,
    /// Of which it computed.
    pub(crate) computing: f64,
    /// Where they run ahead.
    pub(crate) ahead: f64,
}

impl Overlap {
    pub(crate) fn new(comm: &Arc<dyn Communicator>) -> Result<Self, Box<dyn Error>> {
        let model = |prefetch| {
            let policy = Policy { mode: Mode::Frozen, prefetch, ..Policy::default() };
            ShardedModel::new(Sleeper { slept: Cell::new(0.0) }, Arc::clone(comm), policy)
        };
        Ok(Self { waiting: model(0)?, ahead: model(1)? })
    }

    pub(crate) fn pass(&mut self, comm: &dyn Communicator) -> Result<Pass, Box<dyn Error>> {
        let timed = |model: &mut ShardedModel<Sleeper>| -> Result<f64, Box<dyn Error>> {
            lightrft_collectives::CommunicatorExt::barrier(comm)?;
            let begin = Instant::now();
            model.evaluate(&())?;
            Ok(begin.elapsed().as_secs_f64())
        };
        self.waiting.model().slept.set(0.0);
        let waiting = timed(&mut self.waiting)?;
        let computing = self.waiting.model().slept.get();
        Ok(Pass { waiting, computing, ahead: timed(&mut self.ahead)? })
    }
}
