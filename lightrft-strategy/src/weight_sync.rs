//! Whole parameters streamed into an engine update: one gathered unit in memory at a time, one bucket for each.

use lightrft_engine::{Engine, NamedTensor, Parts, State, Update, Version};
use safetensors::Dtype;

use crate::error::Result;
use crate::prepare::Actor;

/// All ranks gather every unit; those that hold an engine push it.
pub(crate) fn update(
    actor: &mut Actor,
    engine: Option<&mut (dyn Engine + 'static)>,
    version: Version,
) -> Result<()> {
    let mut update: Option<Box<dyn Update + '_>> = match engine {
        None => None,
        Some(engine) => {
            if matches!(engine.state(), State::Asleep { .. }) {
                // The cache can wait until the engine generates.
                engine.wake(Parts::Weights)?;
            }
            Some(engine.begin_update(version)?)
        }
    };
    actor.model.units_mut().for_each_full_unit(|unit, values| -> Result<()> {
        let Some(update) = update.as_mut() else { return Ok(()) };
        let bucket: Vec<NamedTensor<'_>> = unit
            .params()
            .iter()
            .map(|p| {
                NamedTensor::new(p.name(), Dtype::F32, p.shape(), bytemuck::cast_slice(&values[p.range()]))
            })
            .collect::<Result<_, _>>()?;
        Ok(update.push(&bucket)?)
    })?;
    if let Some(update) = update {
        update.commit()?;
    }
    Ok(())
}
