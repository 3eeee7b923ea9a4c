//! Whole parameters streamed into an engine update: the next unit gathered while the engine takes the ones before.
//!
//! They are pushed as the trainer computes with them, in `param_dtype`: an engine with finer weights would sample from
//! another policy than the one that learns from the samples.

use lightrft_collectives::Communicator;
use lightrft_engine::{
    Engine, EngineExt, Error as EngineError, Identity, NamedTensor, Parts, Staging, State, TensorInfo,
    Version, WeightSource,
};
use lightrft_sharding::{FlatParam, FlatUnit, Precision, UnitValues};
use safetensors::Dtype;

use crate::agree::agree;
use crate::error::Result;
use crate::prepare::Actor;

/// Parameters that travel together. An engine's rank holds two buckets while it updates.
const BUCKET_BYTES: usize = 128 << 20;

/// All ranks gather every unit; those that hold an engine push it. A rank whose engine refuses goes through the
/// gathers all the same, since the others need its shards, and then all of them learn of it.
pub(crate) fn update(
    world: &dyn Communicator,
    actor: &mut Actor,
    engine: Option<&mut (dyn Engine + 'static)>,
    version: Version,
) -> Result<()> {
    let mut policy = Policy::new(actor);
    let updated = engine.map_or(Ok(()), |engine| push(engine, &mut policy, version));
    // Without an engine, or with one that refused at once, nothing has been gathered yet.
    match policy.gathered.take() {
        Some(gathered) => gathered?,
        None => policy.gather(|_, _| {})?,
    }
    agree(world, "weight update", updated)
}

fn push(engine: &mut (dyn Engine + 'static), policy: &mut Policy<'_>, version: Version) -> Result<()> {
    if matches!(engine.state(), State::Asleep { .. }) {
        // The cache can wait until the engine generates.
        engine.wake(Parts::Weights)?;
    }
    engine.update_from(version, policy, &Identity, BUCKET_BYTES)?;
    Ok(())
}

/// The policy's parameters, gathered unit by unit from all ranks' shards.
struct Policy<'a> {
    actor: &'a mut Actor,
    infos: Vec<TensorInfo>,
    /// How the gathers went, once they have been made. Kept here since the engine could only say that its source failed.
    gathered: Option<lightrft_sharding::Result<()>>,
}

impl<'a> Policy<'a> {
    fn new(actor: &'a mut Actor) -> Self {
        let units = actor.model.units();
        let dtype = match units.policy().param_dtype {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::BF16,
            Precision::F16 => Dtype::F16,
        };
        let params = units.plan().units().iter().flat_map(FlatUnit::params);
        let info = |p: &FlatParam| TensorInfo { name: p.name().into(), dtype, shape: p.shape().into() };
        let infos = params.map(info).collect();
        Self { actor, infos, gathered: None }
    }

    fn gather(&mut self, mut visit: impl FnMut(&FlatUnit, &UnitValues)) -> lightrft_sharding::Result<()> {
        self.actor.model.units_mut().for_each_computed_unit(|unit, values| {
            visit(unit, values);
            Ok::<_, lightrft_sharding::Error>(())
        })
    }
}

impl WeightSource for Policy<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn give(&mut self, staging: &mut Staging<'_>) -> lightrft_engine::Result<()> {
        let mut staged = Ok(());
        let gathered = self.gather(|unit, values| {
            if staged.is_ok() {
                let mut params = unit.params().iter();
                staged = params.try_for_each(|param| staging.copy(&tensor(param, values)?));
            }
        });
        let outcome = match &gathered {
            Ok(()) => staged,
            Err(error) => Err(EngineError::Source(error.to_string().into())),
        };
        self.gathered = Some(gathered);
        outcome
    }
}

/// A parameter's part of its unit.
fn tensor<'u>(param: &'u FlatParam, values: &'u UnitValues) -> lightrft_engine::Result<NamedTensor<'u>> {
    let (dtype, bytes): (Dtype, &[u8]) = match values {
        UnitValues::F32(values) => (Dtype::F32, bytemuck::cast_slice(&values[param.range()])),
        UnitValues::Bf16(values) => (Dtype::BF16, bytemuck::cast_slice(&values[param.range()])),
        UnitValues::F16(values) => (Dtype::F16, bytemuck::cast_slice(&values[param.range()])),
    };
    NamedTensor::new(param.name(), dtype, param.shape(), bytes)
}
