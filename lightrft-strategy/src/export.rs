//! A sharded policy written as a Hugging Face model folder, with one unit in memory at a time.

use std::path::Path;
use std::sync::Arc;

use lightrft_ckpt::{HfOptions, HfWriter, TensorSpec};
use lightrft_collectives::Communicator;
use lightrft_engine::embedded::{DecoderConfig, Weights};
use lightrft_sharding::ShardedModel;
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::agree::agree;
use crate::error::{Error, Result};
use crate::model::CausalLm;
use crate::prepare::Actor;

/// Rank 0 writes the folder; the others take part in the gathers.
pub(crate) fn save_model(
    world: &Arc<dyn Communicator>,
    model: &mut ShardedModel<CausalLm>,
    folder: &Path,
    options: &HfOptions,
) -> Result<()> {
    let config = model.model().decoder().config();
    let mut written = if world.rank() == 0 { open(folder, config, options).map(Some) } else { Ok(None) };
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
    let finished = written.and_then(|writer| Ok(writer.map_or(Ok(()), |w| w.finish().map(drop))?));
    // The others learn whether the folder is there before they read from it.
    agree(&**world, "model export", finished)
}

/// The average takes the parameters' place for as long as the export takes.
pub(crate) fn save_ema_model(
    world: &Arc<dyn Communicator>,
    actor: &mut Actor,
    folder: &Path,
    options: &HfOptions,
) -> Result<()> {
    let Actor { model, ema: Some(ema), .. } = actor else {
        return Err(Error::config("enable_ema = false", "there is no average to export"));
    };
    ema.swap(model.units_mut())?;
    let saved = save_model(world, model, folder, options);
    ema.swap(model.units_mut())?;
    saved
}

/// Writes a model that lies in one process, such as a freshly drawn one, as a Hugging Face folder: `config.json` and
/// `model.safetensors`, in place of the folder that is there, unless that holds something else. Not collective.
///
/// # Errors
/// [`Error::Model`] for weights that are not the configuration's; [`Error::Checkpoint`].
pub fn write_model(folder: &Path, config: &DecoderConfig, weights: &Weights) -> Result<()> {
    weights.check(config)?;
    let mut writer = open(folder, config, &HfOptions::default())?;
    for param in config.parameter_groups().into_iter().flat_map(|g| g.parameters) {
        let values = weights.tensor(&param.name)?.flatten_all()?.to_vec1::<f32>()?;
        writer.push(&param.name, bytemuck::cast_slice(&values))?;
    }
    writer.finish()?;
    Ok(())
}

/// A writer that expects the parameters in the order of their groups, which is also that of the sharding plan.
fn open(folder: &Path, config: &DecoderConfig, options: &HfOptions) -> Result<HfWriter> {
    let mut options = options.clone();
    if options.config.is_none() {
        options.config = configuration(config, options.source.as_deref())?;
    }
    let parameters = config.parameter_groups().into_iter().flat_map(|g| g.parameters);
    let specs = parameters.map(|p| TensorSpec::new(p.name, Dtype::F32, p.shape));
    Ok(HfWriter::create(folder, specs, &options)?)
}

/// The source's configuration, which says more than the decoder knows (ids of special tokens, say), with the decoder's
/// own values where they differ; the decoder's alone when there is none.
fn configuration(config: &DecoderConfig, source: Option<&Path>) -> Result<Option<Map<String, Value>>> {
    let own: Value = serde_json::from_str(&config.to_json()).unwrap_or_default();
    let own = own.as_object().cloned();
    let Some(path) = source.map(|source| source.join("config.json")).filter(|path| path.exists()) else {
        return Ok(own);
    };
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let theirs = DecoderConfig::from_json(&text)?;
    let mut written: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|e| Error::ConfigFile { path: path.clone(), what: e.to_string() })?;
    if theirs == *config {
        return Ok(Some(written));
    }
    let shape = |c: &DecoderConfig| {
        let sizes =
            [c.vocab_size, c.hidden_size, c.intermediate_size, c.layers, c.heads, c.kv_heads, c.head_dim];
        (c.family, sizes, [c.tie_word_embeddings, c.qkv_bias, c.output_bias, c.mlp_bias])
    };
    if shape(&theirs) != shape(config) {
        let what = format!("it is of a model of another shape than the one exported: {theirs:?}, {config:?}");
        return Err(Error::ConfigFile { path, what });
    }
    // Either holds the rotary frequencies, by the release that wrote it.
    written.remove("rope_parameters");
    written.remove("rope_scaling");
    let defined =
        own.into_iter().flatten().filter(|(field, _)| !["architectures", "torch_dtype"].contains(&&**field));
    written.extend(defined);
    Ok(Some(written))
}
