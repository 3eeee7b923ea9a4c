//! A sharded policy written as a Hugging Face model folder, with one unit in memory at a time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lightrft_ckpt::{SafetensorsWriter, TensorSpec};
use lightrft_collectives::Communicator;
use lightrft_engine::embedded::{DecoderConfig, Weights};
use lightrft_sharding::ShardedModel;
use safetensors::Dtype;

use crate::agree::agree;
use crate::error::{Error, Result};
use crate::model::CausalLm;
use crate::prepare::Actor;

/// Rank 0 writes `config.json`, `model.safetensors` and a copy of `tokenizer`; the others take part in the gathers.
pub(crate) fn save_model(
    world: &Arc<dyn Communicator>,
    model: &mut ShardedModel<CausalLm>,
    folder: &Path,
    tokenizer: Option<&Path>,
) -> Result<()> {
    let mut written = if world.rank() == 0 { begin(model, folder, tokenizer).map(Some) } else { Ok(None) };
    model.units_mut().for_each_full_unit(|unit, values| -> Result<()> {
        let Ok(Some(writer)) = written.as_mut() else { return Ok(()) };
        for param in unit.params() {
            if let Err(error) = writer.push(param.name(), bytemuck::cast_slice(&values[param.range()])) {
                written = Err(error.into());
                break;
            }
        }
        Ok(())
    })?;
    let finished = written.and_then(|writer| writer.map_or(Ok(()), |w| Ok(w.finish()?)));
    // The others learn whether the folder is there before they read from it.
    agree(&**world, "model export", finished)
}

/// The average takes the parameters' place for as long as the export takes.
pub(crate) fn save_ema_model(
    world: &Arc<dyn Communicator>,
    actor: &mut Actor,
    folder: &Path,
    tokenizer: Option<&Path>,
) -> Result<()> {
    let Actor { model, ema: Some(ema), .. } = actor else {
        return Err(Error::config("enable_ema = false", "there is no average to export"));
    };
    ema.swap(model.units_mut())?;
    let saved = save_model(world, model, folder, tokenizer);
    ema.swap(model.units_mut())?;
    saved
}

/// Writes a model that lies in one process, such as a freshly drawn one, as a Hugging Face folder: `config.json` and
/// `model.safetensors`. Not collective.
///
/// # Errors
/// [`Error::Model`] for weights that are not the configuration's; [`Error::Io`], [`Error::Checkpoint`].
pub fn write_model(folder: &Path, config: &DecoderConfig, weights: &Weights) -> Result<()> {
    weights.check(config)?;
    let mut writer = open(folder, config)?;
    for param in config.parameter_groups().into_iter().flat_map(|g| g.parameters) {
        let values = weights.tensor(&param.name)?.flatten_all()?.to_vec1::<f32>()?;
        writer.push(&param.name, bytemuck::cast_slice(&values))?;
    }
    Ok(writer.finish()?)
}

fn begin(
    model: &ShardedModel<CausalLm>,
    folder: &Path,
    tokenizer: Option<&Path>,
) -> Result<SafetensorsWriter> {
    let writer = open(folder, model.model().decoder().config())?;
    if let Some(source) = tokenizer {
        let copy = folder.join("tokenizer.json");
        if source != copy {
            std::fs::copy(source, &copy).map_err(Error::io(&copy))?;
        }
    }
    Ok(writer)
}

/// The folder with its `config.json`, and a writer that expects the parameters in the order of their groups, which is
/// also that of the sharding plan.
fn open(folder: &Path, config: &DecoderConfig) -> Result<SafetensorsWriter> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join("config.json");
    std::fs::write(&path, config.to_json()).map_err(Error::io(&path))?;
    let parameters = config.parameter_groups().into_iter().flat_map(|g| g.parameters);
    let specs: Vec<TensorSpec> = parameters.map(|p| TensorSpec::new(p.name, Dtype::F32, p.shape)).collect();
    // HF's loader looks for this.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(SafetensorsWriter::create(folder.join("model.safetensors"), specs, &metadata)?)
}
