//! Models that compute nothing for a set time or at all, to see what they send, and how much of it computing can hide

use std::cell::Cell;
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use half::bf16;
use lightrft_collectives::{Communicator, CommunicatorExt as _};
use lightrft_sharding::{GatherFrom, Mode, Overlap, Policy, Precision, ShardSize, ShardedModel};

use stages::Stages;

#[path = "../../tests/stages/mod.rs"]
mod stages;

const STAGES: usize = 12;

/// Elements of each stage's unit: 8 MiB.
const ELEMS: usize = 2 << 20;

/// How long a stage computes: longer than what is sent for it takes. It sleeps, as a host does while a device computes.
const COMPUTE: Duration = Duration::from_millis(8);

/// A model that sleeps, and counts how long.
struct Sleeper {
    model: Model,
    slept: Rc<Cell<f64>>,
}

type Model = ShardedModel<Stages<Box<dyn Fn(&'static str, usize)>>>;

fn model(
    comm: &Arc<dyn Communicator>,
    policy: Policy,
    compute: impl Fn(&'static str, usize) + 'static,
) -> Result<Model, Box<dyn Error>> {
    let stages = Stages { count: STAGES, elems: ELEMS, compute: Box::new(compute) as _ };
    Ok(ShardedModel::new(stages, Arc::clone(comm), policy)?)
}

impl Sleeper {
    fn new(comm: &Arc<dyn Communicator>, policy: Policy) -> Result<Self, Box<dyn Error>> {
        let slept = Rc::new(Cell::new(0.0));
        let count = Rc::clone(&slept);
        let compute = move |_, _| {
            let begin = Instant::now();
            thread::sleep(COMPUTE);
            count.set(count.get() + begin.elapsed().as_secs_f64());
        };
        Ok(Self { model: model(comm, policy, compute)?, slept })
    }
}

/// Pairs of models, one that waits for what is sent and one that computes meanwhile.
pub(crate) struct Overlaps {
    comm: Arc<dyn Communicator>,
    gathers: [Sleeper; 2],
    sums: [Sleeper; 2],
}

/// Seconds of one pass.
pub(crate) struct Pass {
    /// Where what is sent is waited for.
    pub(crate) waiting: f64,
    /// What that took of it.
    pub(crate) sending: f64,
    /// Where it runs beside.
    pub(crate) beside: f64,
}

impl Overlaps {
    pub(crate) fn new(comm: &Arc<dyn Communicator>) -> Result<Self, Box<dyn Error>> {
        let gathers =
            |prefetch| Sleeper::new(comm, Policy { mode: Mode::Frozen, prefetch, ..Policy::default() });
        // Every rank a replica: nothing else is sent, and each unit goes alone either way.
        let sums = |overlap| {
            let shard_size = ShardSize::Ranks(1);
            Sleeper::new(
                comm,
                Policy { shard_size, overlap, reduce_bucket_elems: ELEMS, ..Policy::default() },
            )
        };
        Ok(Self {
            comm: Arc::clone(comm),
            gathers: [gathers(0)?, gathers(1)?],
            sums: [sums(Overlap::Off)?, sums(Overlap::On)?],
        })
    }

    /// A forward pass: units gathered where they are used, and one ahead.
    pub(crate) fn forward(&mut self) -> Result<Pass, Box<dyn Error>> {
        let comm = &self.comm;
        let timed = |sleeper: &mut Sleeper| -> Result<f64, Box<dyn Error>> {
            sleeper.slept.set(0.0);
            comm.barrier()?;
            let begin = Instant::now();
            sleeper.model.evaluate(&())?;
            Ok(begin.elapsed().as_secs_f64())
        };
        let [waiting, beside] = &mut self.gathers;
        let seconds = timed(waiting)?;
        let sending = seconds - waiting.slept.get();
        Ok(Pass { waiting: seconds, sending, beside: timed(beside)? })
    }

    /// A last backward pass: gradients summed over replicas after it, and in it.
    pub(crate) fn backward(&mut self) -> Result<Pass, Box<dyn Error>> {
        let comm = &self.comm;
        let [waiting, beside] = &mut self.sums;
        let ((), tape) = waiting.model.forward(&())?;
        comm.barrier()?;
        let begin = Instant::now();
        waiting.model.backward(tape, ())?;
        let computed = begin.elapsed().as_secs_f64();
        waiting.model.units_mut().sync_gradients()?;
        let seconds = begin.elapsed().as_secs_f64();
        waiting.model.units_mut().zero_gradients();
        let ((), tape) = beside.model.forward(&())?;
        comm.barrier()?;
        let begin = Instant::now();
        beside.model.backward_last(tape, ())?;
        let beside_seconds = begin.elapsed().as_secs_f64();
        beside.model.units_mut().zero_gradients();
        Ok(Pass { waiting: seconds, sending: seconds - computed, beside: beside_seconds })
    }
}

/// Bytes of a unit as it is gathered in bf16.
pub(crate) const HALF_BYTES: usize = 2 * ELEMS;

/// Models that gather their units in bf16 and compute nothing.
pub(crate) struct HalfGathers {
    comm: Arc<dyn Communicator>,
    masters: Model,
    copy: Model,
    parts: Vec<Vec<bf16>>,
    whole: Vec<bf16>,
}

impl HalfGathers {
    pub(crate) fn new(comm: &Arc<dyn Communicator>) -> Result<Self, Box<dyn Error>> {
        let of = |gather_from| {
            let param_dtype = Precision::Bf16;
            let policy =
                Policy { mode: Mode::Frozen, prefetch: 0, param_dtype, gather_from, ..Policy::default() };
            model(comm, policy, |_, _| {})
        };
        let part = vec![bf16::ONE; ELEMS / comm.world_size()];
        let parts = vec![part; STAGES];
        let (masters, copy) = (of(GatherFrom::Masters)?, of(GatherFrom::Copy)?);
        Ok(Self { comm: Arc::clone(comm), masters, copy, parts, whole: vec![bf16::ZERO; ELEMS] })
    }

    /// Seconds of a unit's gather: the collective alone, from the masters, from a copy.
    pub(crate) fn times(&mut self) -> Result<[f64; 3], Box<dyn Error>> {
        let comm = Arc::clone(&self.comm);
        let timed = |call: &mut dyn FnMut() -> Result<(), Box<dyn Error>>| -> Result<f64, Box<dyn Error>> {
            comm.barrier()?;
            let begin = Instant::now();
            call()?;
            Ok(begin.elapsed().as_secs_f64() / STAGES as f64)
        };
        let alone = timed(&mut || {
            Ok(self.parts.iter().try_for_each(|part| comm.all_gather(part, &mut self.whole))?)
        })?;
        let masters = timed(&mut || Ok(self.masters.evaluate(&())?))?;
        Ok([alone, masters, timed(&mut || Ok(self.copy.evaluate(&())?))?])
    }
}
