//! From a model folder to shards: the plan, the rank's own elements, and the optimizer over them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use lightrft_ckpt::{Region, SafetensorsFile};
use lightrft_collectives::Communicator;
use lightrft_engine::embedded::{Decoder, DecoderConfig, ModelError};
use lightrft_sharding::{AdamW, AdamWConfig, Mode, ShardOptions, ShardedModel};
use safetensors::Dtype;

use crate::config::StrategyConfig;
use crate::error::{Error, Result};
use crate::model::CausalLm;

/// A policy that trains: sharded parameters and gradients, and the optimizer over this rank's shards.
#[derive(Debug)]
pub struct Actor {
    /// The sharded model.
    pub model: ShardedModel<CausalLm>,
    /// AdamW over the shards.
    pub optimizer: AdamW,
    /// Backward passes since the last optimizer step.
    pub(crate) accumulated: usize,
}

/// A sharded model that only predicts.
#[derive(Debug)]
pub struct Reference {
    /// The sharded model, without gradients.
    pub model: ShardedModel<CausalLm>,
}

pub(crate) fn actor(config: &StrategyConfig, world: &Arc<dyn Communicator>, folder: &Path) -> Result<Actor> {
    let model = load(world, folder, Mode::Train)?;
    let optimizer = optimizer(config, &model)?;
    Ok(Actor { model, optimizer, accumulated: 0 })
}

pub(crate) fn reference(world: &Arc<dyn Communicator>, folder: &Path) -> Result<Reference> {
    Ok(Reference { model: load(world, folder, Mode::Frozen)? })
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

fn load(world: &Arc<dyn Communicator>, folder: &Path, mode: Mode) -> Result<ShardedModel<CausalLm>> {
    let config = DecoderConfig::from_folder(folder)?;
    let decoder = Decoder::new(config, DType::F32, &Device::Cpu)?;
    let options = ShardOptions { mode, ..ShardOptions::default() };
    let mut model = ShardedModel::new(CausalLm::new(decoder), Arc::clone(world), options)?;
    let files = ModelFiles::open(folder, model.model().decoder().config())?;
    model.units_mut().load(|param, range, into| files.read(param.name(), Region::Flat(range), into))?;
    Ok(model)
}

/// The safetensors files of a model folder, read by ranges.
struct ModelFiles {
    files: Vec<SafetensorsFile>,
    folder: PathBuf,
}

impl ModelFiles {
    /// Opens the folder's files and checks that they hold the model's tensors, each in its shape.
    fn open(folder: &Path, config: &DecoderConfig) -> Result<Self> {
        let mut paths = vec![folder.join("model.safetensors")];
        if !paths[0].exists() {
            paths = std::fs::read_dir(folder)
                .map_err(Error::io(folder))?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
                .collect();
            paths.sort();
        }
        let files = paths.iter().map(SafetensorsFile::open).collect::<Result<Vec<_>, _>>()?;
        let this = Self { files, folder: folder.to_owned() };
        for p in config.parameter_groups().into_iter().flat_map(|g| g.parameters) {
            match this.files.iter().find_map(|f| f.tensor(&p.name)) {
                None => return Err(ModelError::MissingTensor { name: p.name, expected: p.shape }.into()),
                Some(t) if t.shape != p.shape => {
                    let got = t.shape.clone();
                    return Err(ModelError::Shape { name: p.name, got, expected: p.shape }.into());
                }
                Some(t) if !matches!(t.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) => {
                    return Err(ModelError::Malformed {
                        path: this.folder.clone(),
                        what: format!("tensor `{}` is {:?}, F32, BF16 or F16 was expected", p.name, t.dtype),
                    }
                    .into());
                }
                Some(_) => {}
            }
        }
        Ok(this)
    }

    fn read(&self, name: &str, region: Region, into: &mut [f32]) -> Result<(), lightrft_ckpt::Error> {
        let found = self.files.iter().find_map(|file| Some((file, file.tensor(name)?.dtype)));
        match found {
            Some((file, Dtype::BF16)) => widen::<half::bf16>(file, name, &region, into),
            Some((file, Dtype::F16)) => widen::<half::f16>(file, name, &region, into),
            Some((file, _)) => file.read_into(name, &region, into),
            // `open` has seen every tensor that the plan asks for.
            None => Ok(()),
        }
    }
}

/// Reads elements of a narrower type into f32.
fn widen<T: lightrft_ckpt::Element + Into<f32>>(
    file: &SafetensorsFile,
    name: &str,
    region: &Region,
    into: &mut [f32],
) -> Result<(), lightrft_ckpt::Error> {
    let mut narrow = vec![T::zeroed(); into.len()];
    file.read_into(name, region, &mut narrow)?;
    for (wide, narrow) in into.iter_mut().zip(narrow) {
        *wide = narrow.into();
    }
    Ok(())
}
