//! Whole parameters streamed into an engine update: one gathered unit in memory at a time, one bucket for each.

use lightrft_collectives::Communicator;
use lightrft_engine::{Engine, NamedTensor, Parts, State, Update, Version};
use lightrft_sharding::FlatUnit;
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
    actor.model.units_mut().for_each_full_unit(|unit, values| -> Result<()> {
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

fn push(update: &mut (dyn Update + '_), unit: &FlatUnit, values: &[f32]) -> Result<()> {
    let bucket: Vec<NamedTensor<'_>> = unit
        .params()
        .iter()
        .map(|p| NamedTensor::new(p.name(), Dtype::F32, p.shape(), bytemuck::cast_slice(&values[p.range()])))
        .collect::<Result<_, _>>()?;
    Ok(update.push(&bucket)?)
}
