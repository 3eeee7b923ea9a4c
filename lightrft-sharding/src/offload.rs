//! Memory given up while the model is not used, as around generation, and taken again.

use std::time::{Duration, Instant};

use crate::compute::StagedModel;
use crate::error::Result;
use crate::gradient::Gradient;
use crate::model::ShardedModel;
use crate::unit::ShardedUnits;

/// What giving memory up, or taking it again, came to on this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OffloadReport {
    /// Bytes that were freed, or taken again.
    pub bytes: usize,
    /// Bytes that the units still hold: of units in host memory the shards of parameters, which exist nowhere else.
    pub kept_bytes: usize,
    /// How long it took.
    pub elapsed: Duration,
}

impl ShardedUnits {
    /// Gives up all memory but what exists nowhere else: buffers, what hpZ keeps, and gradients, if they are zero as
    /// between steps. Gradients that hold something stay. Until [`reload`](Self::reload), whatever would gather or
    /// reduce returns [`Error::Offloaded`](crate::Error::Offloaded). Sends nothing.
    ///
    /// # Errors
    /// None for units in host memory.
    pub fn offload(&mut self) -> Result<OffloadReport> {
        let start = Instant::now();
        let mut bytes = self.pool.clear();
        for store in &mut self.stores {
            bytes += store.near.take().map_or(0, |near| near.bytes());
            bytes += store.grad.as_mut().map_or(0, Gradient::release);
        }
        self.offloaded = true;
        Ok(OffloadReport { bytes, kept_bytes: self.persistent_bytes(), elapsed: start.elapsed() })
    }

    /// Takes again what training needs. Sends nothing.
    ///
    /// # Errors
    /// None for units in host memory.
    pub fn reload(&mut self) -> Result<OffloadReport> {
        let start = Instant::now();
        let mut bytes = 0;
        for (unit, store) in self.plan.units().iter().zip(&mut self.stores) {
            bytes += store.grad.as_mut().map_or(0, |gradient| gradient.restore(unit));
        }
        self.offloaded = false;
        Ok(OffloadReport { bytes, kept_bytes: self.persistent_bytes(), elapsed: start.elapsed() })
    }
}

impl<M: StagedModel> ShardedModel<M> {
    /// Frees every unit that is gathered, then as [`ShardedUnits::offload`]. Sends nothing.
    ///
    /// # Errors
    /// As there.
    pub fn offload(&mut self) -> Result<OffloadReport> {
        let start = Instant::now();
        let before = self.units().transient_bytes().now;
        self.reshard();
        // What was freed with the model's own tensors; what came back as buffers is counted as they are freed.
        let freed = before - self.units().transient_bytes().now;
        let report = self.units_mut().offload()?;
        Ok(OffloadReport { bytes: freed + report.bytes, elapsed: start.elapsed(), ..report })
    }

    /// As [`ShardedUnits::reload`]: units are gathered again when they are used.
    ///
    /// # Errors
    /// As there.
    pub fn reload(&mut self) -> Result<OffloadReport> {
        self.units_mut().reload()
    }
}
