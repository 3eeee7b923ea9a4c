//! Where weights, cache and the forward pass of an engine are.

use candle_core::Tensor;

use super::config::DecoderConfig;
use super::cpu::Team;
use super::drive::Drive;
use super::engine::{Device, Settings};
#[cfg(feature = "cuda")]
use super::gpu;
use super::host::Host;
use super::weights::Weights;
use crate::{Completion, Request, Result, Watch};

#[derive(Debug)]
pub(super) enum Place {
    Host(Box<Host>),
    #[cfg(feature = "cuda")]
    Gpu(Box<gpu::Gpu>),
}

/// Calls the same method of whichever it is.
macro_rules! each {
    ($place:expr, $it:ident => $call:expr) => {
        match $place {
            Place::Host($it) => $call,
            #[cfg(feature = "cuda")]
            Place::Gpu($it) => $call,
        }
    };
}

impl Place {
    /// What the settings ask for, without weights.
    pub(super) fn open(config: &DecoderConfig, settings: &Settings) -> Result<Self> {
        match settings.device {
            Device::Cpu => Ok(Place::Host(Box::new(Host::new(config, settings.dtype)))),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => {
                Ok(Place::Gpu(Box::new(gpu::Gpu::open(config, settings.dtype, ordinal)?)))
            }
        }
    }

    /// Most columns of one step, as far as sequences that only go on do not need more: a long prompt is computed in
    /// pieces between which the others go on.
    fn step_columns(&self) -> usize {
        match self {
            Place::Host(_) => 256,
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => gpu::STEP_COLUMNS,
        }
    }

    /// Takes all weights, which fit the model.
    pub(super) fn replace(&mut self, weights: &Weights) -> Result<()> {
        match self {
            Place::Host(host) => Ok(host.replace(weights)?),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => {
                weights.iter().try_for_each(|(name, tensor)| gpu.stage(name, tensor))?;
                gpu.commit()
            }
        }
    }

    /// Begins an update: the former weights are given up.
    pub(super) fn begin_update(&mut self) {
        match self {
            Place::Host(host) => host.drop_weights(),
            // The new ones are written over them.
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => {}
        }
    }

    /// Takes a tensor of an update, which fits the model.
    pub(super) fn stage(&mut self, name: String, tensor: Tensor) -> Result<()> {
        match self {
            Place::Host(host) => {
                host.stage(name, tensor);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.stage(&name, &tensor),
        }
    }

    /// Every tensor of the update has been staged.
    pub(super) fn commit(&mut self) -> Result<()> {
        match self {
            Place::Host(host) => {
                host.commit();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.commit(),
        }
    }

    /// Frees the weights.
    pub(super) fn drop_weights(&mut self) {
        each!(self, it => it.drop_weights());
    }

    /// Frees the cache and the memory of a step.
    pub(super) fn drop_cache(&mut self) {
        each!(self, it => it.drop_cache());
    }

    /// Frees all without asking the device, which is gone.
    pub(super) fn abandon(&mut self) {
        match self {
            Place::Host(host) => {
                host.drop_weights();
                host.drop_cache();
            }
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.abandon(),
        }
    }

    /// Moves the weights to host memory.
    pub(super) fn park(&mut self) -> Result<()> {
        match self {
            // They are there.
            Place::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.park(),
        }
    }

    /// Brings them back, if they were moved.
    pub(super) fn unpark(&mut self) -> Result<()> {
        match self {
            Place::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.unpark(),
        }
    }

    /// Bytes of the weights, wherever they are.
    pub(super) fn weight_bytes(&self) -> u64 {
        each!(self, it => it.weight_bytes())
    }

    /// Bytes of the cache that are held, used or not.
    pub(super) fn cache_bytes(&self) -> u64 {
        each!(self, it => it.cache_bytes())
    }

    /// Bytes of a page of the cache.
    pub(super) fn page_bytes(&self) -> u64 {
        each!(self, it => it.page_bytes())
    }

    /// Most bytes of the cache now, when the settings name no number; `None` for as many as there are.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "host memory is nobody's to count"))]
    pub(super) fn default_cache_bytes(&self, max_sequences: usize) -> Result<Option<u64>> {
        match self {
            Place::Host(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => gpu.default_cache_bytes(max_sequences).map(Some),
        }
    }

    /// Draws every completion.
    pub(super) fn run(
        &mut self,
        config: &DecoderConfig,
        team: &Team,
        drive: Drive<'_>,
        requests: &[Request],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Completion>> {
        let columns = self.step_columns();
        match self {
            Place::Host(host) => {
                host.with_forward(config, team, |forward| drive.run(forward, columns, requests, watch))
            }
            #[cfg(feature = "cuda")]
            Place::Gpu(gpu) => {
                gpu.with_forward(drive.pages.limit(), |forward| drive.run(forward, columns, requests, watch))
            }
        }
    }
}
