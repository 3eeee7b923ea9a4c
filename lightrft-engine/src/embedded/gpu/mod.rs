//! The engine's part that is on a GPU: weights, paged cache, and the forward pass.
//!
//! Nothing is linked: the driver, NVRTC and cuBLAS are looked for when an engine is opened. Kernels are CUDA C, compiled for
//! the model then. Activations are `[column, features]`, a column for each token of a step; the residual stream and what
//! products give are f32, what they read is of the weights' type.
//!
//! Steps of up to [`forward::WIDTH`] columns are filled up to a power of two and recorded as CUDA graphs, since enqueuing
//! their kernels one by one takes longer than computing them.
//!
//! A column's bits do not depend on its company: products are of one width, columns that are not there filling them up, so
//! that cuBLAS takes the same kernel for all; and the own kernels look at nothing but the column and its past.

mod blas;
mod cache;
mod forward;
mod graph;
mod kernels;
mod memory;
mod shape;
#[cfg(test)]
mod tests;
mod weights;

use std::sync::Arc;

use candle_core::{DType, Tensor};
use lightrft_collectives::nccl::Stream;

use super::config::DecoderConfig;
use crate::{Error, Result};
use blas::Blas;
use cache::Cache;
use forward::{GpuForward, Work};
use kernels::Kernels;
use memory::{free_bytes, give_back, wait};
use shape::{Plan, Shape};
use weights::Weights;

pub(super) use forward::STEP_COLUMNS;

/// A model on a GPU.
#[derive(Debug)]
pub(super) struct Gpu {
    shape: Shape,
    plan: Plan,
    /// Rotary frequencies, radians per position, rounded to f32 as HF does.
    frequencies: Vec<f32>,
    kernels: Arc<Kernels>,
    weights: Weights,
    cache: Cache,
    /// Memory that steps use again; there from the first call on, until the engine sleeps.
    work: Option<Work>,
    blas: Blas,
    stream: Stream,
    /// Nothing comes back from it any more.
    lost: bool,
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.weights = Weights::Absent;
        self.drop_cache();
    }
}

impl Gpu {
    /// Looks for the GPU and its libraries, and compiles the kernels.
    pub(super) fn open(config: &DecoderConfig, dtype: DType, ordinal: usize) -> Result<Self> {
        let shape = Shape::new(config, dtype);
        let failed =
            |doing, advice| move |source| Error::Gpu { doing, ordinal, advice, source: Box::new(source) };
        let stream = Stream::new(ordinal).map_err(failed(
            "opening the embedded engine's GPU",
            "NVIDIA's driver and such a GPU are needed; Device::Cpu needs none",
        ))?;
        let kernels = Kernels::of(&stream, &shape).map_err(failed(
            "compiling the embedded engine's kernels",
            "libnvrtc of CUDA 12 or 13 is needed, where the loader finds it or $NVRTC_LIB names it",
        ))?;
        let blas = Blas::new(&stream).map_err(failed(
            "starting cuBLAS",
            "libcublas of CUDA 12 or 13 is needed, where the loader finds it or $CUBLAS_LIB names it, and some memory",
        ))?;
        Ok(Self {
            plan: Plan::new(config, shape.elements),
            frequencies: config.rotary_frequencies().into_iter().map(|f| f as f32).collect(),
            kernels,
            weights: Weights::Absent,
            cache: Cache::new(shape.page_bytes()),
            work: None,
            blas,
            stream,
            shape,
            lost: false,
        })
    }

    /// Takes a tensor of an update, over the former one.
    pub(super) fn stage(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        self.weights.write(&self.stream, &self.plan, name, tensor)
    }

    /// Every tensor has been staged.
    pub(super) fn commit(&mut self) -> Result<()> {
        wait(&self.stream, "taking weights")
    }

    pub(super) fn drop_weights(&mut self) {
        self.weights = Weights::Absent;
        self.return_memory();
    }

    pub(super) fn drop_cache(&mut self) {
        self.cache.clear();
        self.work = None;
        self.return_memory();
    }

    /// Frees all without waiting for a GPU that may never answer.
    pub(super) fn abandon(&mut self) {
        self.lost = true;
        self.drop_weights();
        self.drop_cache();
    }

    /// What was freed is for others now. A failure shows in the next call that needs the GPU.
    fn return_memory(&self) {
        if self.lost {
            return;
        }
        if let Err(error) = give_back(&self.stream) {
            tracing::warn!(%error, "memory was not given back");
        }
    }

    pub(super) fn park(&mut self) -> Result<()> {
        self.weights.park()?;
        self.return_memory();
        Ok(())
    }

    pub(super) fn unpark(&mut self) -> Result<()> {
        self.weights.unpark(&self.stream)
    }

    pub(super) fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    pub(super) fn cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    pub(super) fn page_bytes(&self) -> u64 {
        self.cache.page_bytes()
    }

    /// Four fifths of what is free once steps have their memory, with what the cache has: the same in every call, as long as
    /// others take none.
    pub(super) fn default_cache_bytes(&self, max_sequences: usize) -> Result<u64> {
        let (free, columns) = (free_bytes(&self.stream)?, STEP_COLUMNS.max(max_sequences));
        let steps = Work::missing_bytes(self.work.as_ref(), self, columns);
        Ok((free + self.cache.bytes()).saturating_sub(steps) / 5 * 4)
    }

    /// Calls `f` with the model, ready for steps with so many pages at most.
    pub(super) fn with_forward<R>(
        &mut self,
        most_pages: usize,
        f: impl FnOnce(&mut GpuForward<'_>) -> Result<R>,
    ) -> Result<R> {
        let Some(weights) = self.weights.address() else {
            return Err(Error::Backend {
                engine: "embedded",
                operation: "computing",
                source: "the weights are not on the GPU".into(),
            });
        };
        let mut work = match self.work.take() {
            Some(work) => work,
            None => Work::new(self)?,
        };
        let done =
            GpuForward::new(self, &mut work, weights, most_pages).and_then(|mut forward| f(&mut forward));
        self.work = Some(work);
        done
    }
}
