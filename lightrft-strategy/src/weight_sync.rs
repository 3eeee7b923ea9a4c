//! Whole parameters streamed into an engine update: one bucket for each unit, the next gathered while one is pushed.
//!
//! They are pushed as the trainer computes with them, in `param_dtype`: an engine with finer weights would sample from
//! another policy than the one that learns from the samples.

use lightrft_collectives::Communicator;
use lightrft_engine::{Engine, NamedTensor, Parts, State, Update, Version};
use lightrft_sharding::{FlatParam, FlatUnit, UnitValues};
use safetensors::Dtype;

use crate::agree::agree;
use crate::error::Result;
use crate::prepare::Actor;

/// All ranks gather every unit; those that hold an engine push it. A rank whose engine refuses goes through the
/// gathers all the same, since the others need its shards, and then all of them learn of it.
pub(crate) fn update(
    world: &dyn Communicator,
    actor: &mut Actor,
    engine: Option<&mut (dyn Engine + 'static)>,
    version: Version,
) -> Result<()> {
    let mut update = engine.map(|engine| begin(engine, version)).transpose();
    actor.model.units_mut().for_each_computed_unit(|unit, values| -> Result<()> {
        if let Ok(Some(open)) = update.as_mut()
            && let Err(error) = push(&mut **open, unit, values)
        {
            // Dropped without a commit, the update leaves the engine stale.
            update = Err(error);
        }
        Ok(())
    })?;
    let committed = update.and_then(|update| update.map_or(Ok(()), |u| Ok(u.commit()?)));
    agree(world, "weight update", committed)
}

fn begin<'e>(engine: &'e mut (dyn Engine + 'static), version: Version) -> Result<Box<dyn Update + 'e>> {
    if matches!(engine.state(), State::Asleep { .. }) {
        // The cache can wait until the engine generates.
        engine.wake(Parts::Weights)?;
    }
    Ok(engine.begin_update(version)?)
}

fn push(update: &mut (dyn Update + '_), unit: &FlatUnit, values: &UnitValues) -> Result<()> {
    let tensors = unit.params().iter().map(|param| tensor(param, values));
    Ok(update.push(&tensors.collect::<Result<Vec<_>, _>>()?)?)
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
