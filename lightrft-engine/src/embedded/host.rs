//! Weights and cache in host memory, computed on the CPU.

use candle_core::{DType, Tensor};

use super::config::DecoderConfig;
use super::cpu::{Cache, CpuForward, PageLayout, Team, Work};
use super::error::ModelResult;
use super::held::{Held, readable};
use super::weights::Weights;
use crate::Result;

/// The engine's part that is in host memory.
#[derive(Debug)]
pub(super) struct Host {
    dtype: DType,
    /// Rotary frequencies, radians per position, rounded to f32 as HF does.
    frequencies: Vec<f32>,
    /// Empty unless the engine's state has weights.
    weights: Weights,
    /// What an update has brought so far.
    incoming: Weights,
    cache: Cache,
    work: Work,
}

impl Host {
    pub(super) fn new(config: &DecoderConfig, dtype: DType) -> Self {
        let layout =
            PageLayout { layers: config.layers, kv_heads: config.kv_heads, head_dim: config.head_dim };
        Self {
            dtype,
            frequencies: config.rotary_frequencies().into_iter().map(|f| f as f32).collect(),
            weights: Weights::default(),
            incoming: Weights::default(),
            cache: Cache::new(layout),
            work: Work::default(),
        }
    }

    /// Takes all weights; shares those that can be read as they are. The former are kept on an error.
    pub(super) fn replace(&mut self, weights: &Weights) -> ModelResult<()> {
        let fit = |(name, tensor): (&str, &Tensor)| Ok((name.to_owned(), readable(tensor, self.dtype)?));
        self.weights = weights.iter().map(fit).collect::<ModelResult<_>>()?;
        Ok(())
    }

    /// Takes a tensor of an update.
    pub(super) fn stage(&mut self, name: String, tensor: Tensor) {
        self.incoming.insert(name, tensor);
    }

    /// The tensors of the update are the weights now.
    pub(super) fn commit(&mut self) {
        self.weights = std::mem::take(&mut self.incoming);
    }

    /// Frees the weights, and those of an update.
    pub(super) fn drop_weights(&mut self) {
        (self.weights, self.incoming) = (Weights::default(), Weights::default());
    }

    /// Frees the cache and the memory of a step.
    pub(super) fn drop_cache(&mut self) {
        self.cache.clear();
        self.work = Work::default();
    }

    pub(super) fn weight_bytes(&self) -> u64 {
        self.weights.bytes() as u64
    }

    pub(super) fn cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    pub(super) fn page_bytes(&self) -> u64 {
        self.cache.page_bytes()
    }

    /// Calls `f` with the model as a step sees it.
    pub(super) fn with_forward<R>(
        &mut self,
        config: &DecoderConfig,
        team: &Team,
        f: impl FnOnce(&mut CpuForward<'_>) -> Result<R>,
    ) -> Result<R> {
        let held = Held::of(&self.weights)?;
        let model = held.model(config, &self.frequencies)?;
        f(&mut CpuForward { model, team, cache: &mut self.cache, work: &mut self.work })
    }
}
