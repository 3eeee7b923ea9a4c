//! An update of a server's weights: checked here, sent by a transport, committed or abandoned as a whole.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::control::Control;
use super::engine::VllmEngine;
use super::transfer::{TYPES, Transport};
use crate::server::check_complete;
use crate::transfer::Checksums;
use crate::{Error, Event, NamedTensor, Result, Update, Version};

#[derive(Debug)]
pub(super) struct VllmUpdate<'a> {
    engine: &'a mut VllmEngine,
    to: Version,
    pushed: BTreeSet<String>,
    checksums: Option<Checksums>,
    /// A bucket failed under way: what the server has is no longer known.
    broken: bool,
}

impl<'a> VllmUpdate<'a> {
    pub(super) fn new(engine: &'a mut VllmEngine, to: Version) -> Self {
        let checksums = engine.verifies().then(Checksums::default);
        Self { engine, to, pushed: BTreeSet::new(), checksums, broken: false }
    }

    /// Refuses what the model does not have, as far as it is known.
    fn check(&self, name: &str, got: Dtype, shape: &[usize]) -> Result<()> {
        let named = || name.to_owned();
        let parameters = &self.engine.model().parameters;
        match parameters.get(name) {
            None if !parameters.is_empty() => return Err(Error::UnknownTensor { name: named() }),
            Some(expected) if expected != shape => {
                let (got, expected) = (shape.to_vec(), expected.clone());
                return Err(Error::Shape { name: named(), got, expected });
            }
            _ => {}
        }
        if !matches!(got, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(Error::Dtype { name: named(), got, expected: TYPES });
        }
        if self.pushed.contains(name) {
            return Err(Error::RepeatedTensor { name: named() });
        }
        Ok(())
    }

    /// Refuses a bucket that cannot be taken whole; returns its names.
    fn check_all<'t>(
        &self,
        tensors: impl Iterator<Item = (&'t str, Dtype, &'t [usize])>,
    ) -> Result<BTreeSet<String>> {
        let mut taken = BTreeSet::new();
        for (name, dtype, shape) in tensors {
            self.check(name, dtype, shape)?;
            if !taken.insert(name.to_owned()) {
                return Err(Error::RepeatedTensor { name: name.to_owned() });
            }
        }
        if self.broken {
            return Err(broken());
        }
        Ok(taken)
    }

    fn send<T>(&mut self, call: impl FnOnce(&mut dyn Transport, &Control) -> Result<T>) -> Result<T> {
        let sent = self.engine.with_transport(call);
        self.broken = sent.is_err();
        sent
    }
}

impl Update for VllmUpdate<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let mut taken = self.check_all(bucket.iter().map(|t| (t.name(), t.dtype(), t.shape())))?;
        self.send(|transport, control| transport.send(control, bucket))?;
        if let Some(checksums) = &mut self.checksums {
            bucket.iter().for_each(|tensor| checksums.add(tensor));
        }
        self.pushed.append(&mut taken);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn push_gpu(&mut self, bucket: crate::cuda::GpuBucket) -> Result<crate::cuda::GpuBucket> {
        let tensors = bucket.tensors().iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice()));
        let mut taken = self.check_all(tensors)?;
        let bucket = self.send(|transport, control| transport.send_gpu(control, bucket))?;
        self.pushed.append(&mut taken);
        Ok(bucket)
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        if self.broken {
            return Err(broken());
        }
        check_complete("vLLM", self.to, &self.engine.model().parameters, &self.pushed)?;
        let pushed = self.checksums.take();
        self.engine.commit(self.to, pushed)
    }
}

impl Drop for VllmUpdate<'_> {
    fn drop(&mut self) {
        // After a commit the engine is awake and refuses this event, and a dead one stays dead: nothing to abandon.
        if self.engine.step(Event::Abandon).is_ok() {
            tracing::warn!(to = self.to.0, "weight update dropped before its commit: the engine is stale");
            self.engine.abandon();
        }
    }
}

fn broken() -> Error {
    let source = "an earlier bucket of this update failed: drop it and begin another".into();
    Error::Backend { engine: "vLLM", operation: "update weights", source }
}
