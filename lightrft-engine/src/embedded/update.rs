//! An update of the embedded engine from bytes.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;

use super::engine::EmbeddedEngine;
use super::error::ModelError;
use crate::transfer::check_fit;
use crate::{Engine, Error, Event, NamedTensor, Result, Update, Version};

/// An update of which some tensors have come.
#[derive(Debug)]
pub(super) struct EmbeddedUpdate<'a> {
    engine: &'a mut EmbeddedEngine,
    to: Version,
    shapes: BTreeMap<String, Vec<usize>>,
    pushed: BTreeSet<String>,
}

impl<'a> EmbeddedUpdate<'a> {
    /// An update of an engine whose state says that one has begun.
    pub(super) fn new(engine: &'a mut EmbeddedEngine, to: Version) -> Self {
        let shapes = engine.parameters().unwrap_or_default();
        Self { engine, to, shapes, pushed: BTreeSet::new() }
    }

    /// A tensor of the engine's own type, with its own memory.
    fn tensor(&self, tensor: &NamedTensor<'_>) -> Result<Tensor> {
        let name = tensor.name().to_owned();
        if self.pushed.contains(tensor.name()) {
            return Err(Error::RepeatedTensor { name });
        }
        let dtype = match tensor.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            got => return Err(Error::Dtype { name, got, expected: "F32, BF16 or F16" }),
        };
        let tensor = Tensor::from_raw_buffer(tensor.bytes(), dtype, tensor.shape(), &Device::Cpu)
            .and_then(|t| t.to_dtype(self.engine.dtype()))
            .map_err(ModelError::from)?;
        Ok(tensor)
    }
}

impl Update for EmbeddedUpdate<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        check_fit(&self.shapes, bucket.iter().map(|tensor| (tensor.name(), tensor.shape())))?;
        let mut taken = BTreeMap::new();
        for tensor in bucket {
            if taken.insert(tensor.name().to_owned(), self.tensor(tensor)?).is_some() {
                return Err(Error::RepeatedTensor { name: tensor.name().to_owned() });
            }
        }
        let names: Vec<String> = taken.keys().cloned().collect();
        // Where one fails, those before it are written over when the bucket is pushed again.
        taken.into_iter().try_for_each(|(name, tensor)| self.engine.stage(name, tensor))?;
        self.pushed.extend(names);
        Ok(())
    }

    fn commit(self: Box<Self>) -> Result<()> {
        let missing: Vec<&String> = self.shapes.keys().filter(|n| !self.pushed.contains(*n)).collect();
        if !missing.is_empty() {
            return Err(Error::MissingTensors {
                version: self.to,
                missing: missing.len(),
                total: self.shapes.len(),
                examples: missing.into_iter().take(4).cloned().collect(),
            });
        }
        self.engine.commit(self.to)
    }
}

impl Drop for EmbeddedUpdate<'_> {
    fn drop(&mut self) {
        // After a commit the engine is awake and refuses this event, which is right: there is nothing to abandon.
        let abandoned = self.engine.step(Event::Abandon).is_ok();
        if abandoned {
            tracing::warn!(to = self.to.0, "weight update dropped before its commit: the engine is stale");
        }
    }
}
