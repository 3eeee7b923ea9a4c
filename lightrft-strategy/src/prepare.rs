//! From a model folder to shards: the plan, the rank's own elements, and the optimizer over them.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use lightrft_ckpt::{HfFolder, Region};
use lightrft_collectives::Communicator;
use lightrft_engine::Engine;
use lightrft_engine::embedded::{Decoder, DecoderConfig, EmbeddedEngine, ModelError, Settings};
use lightrft_sharding::{AdamW, AdamWConfig, Ema, EmaConfig, FlatParam, Policy, Precision, ShardedModel};
use safetensors::Dtype;

use crate::agree::agree;
use crate::config::{EngineType, StrategyConfig};
use crate::cores::Cores;
use crate::error::{Error, Result};
use crate::model::CausalLm;

/// A policy that trains: sharded parameters and gradients, and the optimizer over this rank's shards.
#[derive(Debug)]
pub struct Actor {
    /// The sharded model.
    pub model: ShardedModel<CausalLm>,
    /// AdamW over the shards.
    pub optimizer: AdamW,
    /// The moving average of the parameters that learn, where [`enable_ema`](StrategyConfig::enable_ema) asks for one.
    pub ema: Option<Ema>,
    /// Backward passes since the last optimizer step.
    pub(crate) accumulated: usize,
}

impl Actor {
    /// Forgets the gradients that passes have added up since the last step, and with them the passes: after a pass that
    /// failed, or to begin anew. Not collective, but all ranks do it between the same passes.
    pub fn discard_gradients(&mut self) {
        self.model.units_mut().zero_gradients();
        self.accumulated = 0;
    }
}

/// A sharded model that only predicts.
#[derive(Debug)]
pub struct Reference {
    /// The sharded model, without gradients.
    pub model: ShardedModel<CausalLm>,
}

pub(crate) fn actor(config: &StrategyConfig, world: &Arc<dyn Communicator>, folder: &Path) -> Result<Actor> {
    let model = load(config, world, folder, config.actor_policy()?, |decoder| check_frozen(config, decoder))?;
    let optimizer = optimizer(config, &model)?;
    // Moved once for each optimizer step.
    let average = EmaConfig { beta: config.ema_beta, every: 1 };
    let ema = config.enable_ema.then(|| Ema::new(average, model.units())).transpose()?;
    Ok(Actor { model, optimizer, ema, accumulated: 0 })
}

pub(crate) fn reference(
    config: &StrategyConfig,
    world: &Arc<dyn Communicator>,
    folder: &Path,
) -> Result<Reference> {
    Ok(Reference { model: load(config, world, folder, config.reference_policy()?, |_| Ok(()))? })
}

/// A prefix that freezes nothing is a mistake in it, and so is one that freezes everything.
fn check_frozen(config: &StrategyConfig, decoder: &DecoderConfig) -> Result<()> {
    let names: Vec<String> =
        decoder.parameter_groups().into_iter().flat_map(|g| g.parameters).map(|p| p.name).collect();
    let fields = || format!("freeze_prefix = {:?}", config.freeze_prefix);
    if let Some(prefix) =
        config.freeze_prefix.iter().find(|prefix| !names.iter().any(|name| name.starts_with(prefix.as_str())))
    {
        return Err(Error::config(fields(), format!("no parameter's name begins with {prefix:?}")));
    }
    let is_frozen = |name: &String| config.freeze_prefix.iter().any(|prefix| name.starts_with(prefix));
    if names.iter().all(is_frozen) {
        return Err(Error::config(fields(), "no parameter is left to learn"));
    }
    Ok(())
}

pub(crate) fn engine(
    config: &StrategyConfig,
    wanted: bool,
    cores: Cores,
    actor: &Actor,
) -> Result<Option<Box<dyn Engine>>> {
    if !wanted {
        return Ok(None);
    }
    match config.engine_type {
        EngineType::Embedded => {
            let decoder = actor.model.model().decoder();
            let mut settings =
                Settings { dtype: decoder.dtype(), threads: cores.engine_threads(), ..Settings::default() };
            if config.micro_rollout_batch_size > 0 {
                settings.max_sequences = config.micro_rollout_batch_size;
            }
            Ok(Some(Box::new(EmbeddedEngine::without_weights(decoder.config().clone(), settings)?)))
        }
    }
}

/// A fresh AdamW for these shards.
fn optimizer(config: &StrategyConfig, model: &ShardedModel<CausalLm>) -> Result<AdamW> {
    let settings = AdamWConfig {
        betas: config.adam_betas,
        weight_decay: config.l2,
        max_norm: config.max_norm,
        ..AdamWConfig::default()
    };
    Ok(AdamW::new(settings, model.units())?)
}

/// The model of a folder, sharded. A folder that one rank cannot read, or that `check` refuses there, is an error on all:
/// each may see another file system.
fn load(
    config: &StrategyConfig,
    world: &Arc<dyn Communicator>,
    folder: &Path,
    policy: Policy,
    check: impl FnOnce(&DecoderConfig) -> Result<()>,
) -> Result<ShardedModel<CausalLm>> {
    let opened = DecoderConfig::from_folder(folder).map_err(Error::from).and_then(|decoder| {
        check(&decoder)?;
        let files = open(folder, &decoder)?;
        Ok((decoder, files))
    });
    let (decoder, files) = agree(&**world, "opening a model folder", opened)?;
    let dtype = match config.compute_dtype {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
    };
    let decoder = Decoder::new(decoder, dtype, &Device::Cpu)?;
    let mut model = ShardedModel::new(CausalLm::new(decoder), Arc::clone(world), policy)?;
    let read =
        |param: &FlatParam, range, into: &mut [f32]| files.read_f32(param.name(), &Region::Flat(range), into);
    let loaded = model.units_mut().load(read).map_err(Error::from);
    agree(&**world, "reading a model folder", loaded)?;
    Ok(model)
}

/// Opens a model folder and checks that it holds the model's tensors, each in its shape.
fn open(folder: &Path, config: &DecoderConfig) -> Result<HfFolder> {
    let files = HfFolder::open(folder)?;
    for p in config.parameter_groups().into_iter().flat_map(|g| g.parameters) {
        match files.tensor(&p.name) {
            None => return Err(ModelError::MissingTensor { name: p.name, expected: p.shape }.into()),
            Some(t) if t.shape != p.shape => {
                let got = t.shape.clone();
                return Err(ModelError::Shape { name: p.name, got, expected: p.shape }.into());
            }
            Some(t) if !matches!(t.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) => {
                return Err(ModelError::Malformed {
                    path: folder.to_owned(),
                    what: format!("tensor `{}` is {:?}, F32, BF16 or F16 was expected", p.name, t.dtype),
                }
                .into());
            }
            Some(_) => {}
        }
    }
    Ok(files)
}
