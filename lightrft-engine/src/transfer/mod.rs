//! Weights from a trainer into an engine: gathered bucket by bucket on one side, pushed on the other at the same time.
//!
//! ```text
//! caller's thread   gather bucket 1 │ gather bucket 2 │ gather bucket 3 │
//! sender's thread         begin     │ push bucket 1   │ push bucket 2   │ push bucket 3 │ commit
//! ```
//!
//! The source stays on the caller's thread, since gathering shards is a collective that belongs to the trainer's own
//! order of operations; it is the engine that moves to another thread for the length of the update.

#[cfg(any(feature = "sglang", feature = "vllm"))]
mod checksums;
mod fit;
mod folder;
mod memory;
mod pipeline;
mod plan;
mod staging;

pub use folder::HfFolder;
pub use pipeline::UpdateReport;
pub use staging::Staging;

#[cfg(any(feature = "sglang", feature = "vllm"))]
pub(crate) use checksums::Checksums;
#[cfg(any(feature = "vllm", all(feature = "sglang", feature = "testing")))]
pub(crate) use checksums::without_counterpart;
pub(crate) use fit::check_fit;
pub(crate) use pipeline::run;
pub(crate) use plan::Plan;

use crate::{NamedTensor, Result, TensorInfo};

/// Where new weights come from: a trainer's shards, a folder, tensors in memory.
///
/// A source is asked once for what it will give, and then gives it in that order. It runs on the thread that called
/// [`EngineExt::update_from`](crate::EngineExt::update_from), while another thread sends what it gave before. It gives, rather than is
/// asked for the next, because gathers walk a model by themselves and call back; a source with a list of its own
/// writes a loop.
pub trait WeightSource {
    /// Every tensor that [`give`](WeightSource::give) will give, under the trainer's names and in that order, known
    /// before any is gathered. By layer, so that an engine that fuses projections holds the parts of one at most.
    fn tensors(&self) -> &[TensorInfo];

    /// Gives every tensor once.
    ///
    /// # Errors
    /// The source's own, as [`Error::Source`](crate::Error::Source), or those of [`Staging`]. Once a [`Staging`] has refused a tensor it refuses
    /// all that follow, and a source may stop; a collective source goes on gathering for the sake of other ranks.
    fn give(&mut self, staging: &mut Staging<'_>) -> Result<()>;
}

/// Whole tensors that lie in memory, in the order of the slice.
#[derive(Debug)]
pub struct TensorSlice<'a> {
    tensors: &'a [NamedTensor<'a>],
    infos: Vec<TensorInfo>,
}

impl<'a> TensorSlice<'a> {
    /// A source of these tensors, which keep the trainer's names.
    pub fn new(tensors: &'a [NamedTensor<'a>]) -> Self {
        Self { tensors, infos: tensors.iter().map(NamedTensor::info).collect() }
    }
}

impl WeightSource for TensorSlice<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn give(&mut self, staging: &mut Staging<'_>) -> Result<()> {
        self.tensors.iter().try_for_each(|tensor| staging.copy(tensor))
    }
}
