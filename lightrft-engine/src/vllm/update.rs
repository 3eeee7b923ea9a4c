//! An update of a server's weights: checked here, sent by a transport, committed or abandoned as a whole.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::control::Control;
use super::engine::VllmEngine;
use super::transfer::{TYPES, Transport};
use crate::transfer::Checksums;
use crate::{Error, Event, NamedTensor, Result, Update, Version};

/// Projections that vLLM fuses into one parameter: all or none of them, or the rest is uninitialised memory.
const FUSED: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];

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

    /// Names that were not pushed, and how many there are in all.
    fn missing(&self) -> (Vec<String>, usize) {
        let parameters = &self.engine.model().parameters;
        if !parameters.is_empty() {
            let missing = parameters.keys().filter(|name| !self.pushed.contains(*name)).cloned();
            return (missing.collect(), parameters.len());
        }
        let missing = missing_parts(&self.pushed);
        let total = self.pushed.len() + missing.len();
        (missing, total)
    }

    fn send<T>(&mut self, call: impl FnOnce(&mut dyn Transport, &Control) -> Result<T>) -> Result<T> {
        let sent = self.engine.with_transport(call);
        self.broken = sent.is_err();
        sent
    }
}

/// Parts of fused parameters that are absent although others of the same layer are there.
fn missing_parts(names: &BTreeSet<String>) -> Vec<String> {
    let mut missing = BTreeSet::new();
    for name in names {
        for (parts, part) in FUSED.iter().flat_map(|parts| parts.iter().map(move |part| (parts, part))) {
            let Some((before, after)) = name.split_once(&format!(".{part}.")) else { continue };
            let others = parts.iter().map(|other| format!("{before}.{other}.{after}"));
            missing.extend(others.filter(|other| !names.contains(other)));
        }
    }
    missing.into_iter().collect()
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
        let (missing, total) = self.missing();
        if !missing.is_empty() {
            let examples = missing.iter().take(4).cloned().collect();
            return Err(Error::MissingTensors { version: self.to, missing: missing.len(), total, examples });
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_fused_layer_calls_for_the_others() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let found = missing_parts(&names(&[
            "l.0.attn.q_proj.weight",
            "l.0.attn.q_proj.bias",
            "l.0.attn.k_proj.bias",
        ]));
        let expected =
            ["l.0.attn.k_proj.weight", "l.0.attn.v_proj.bias", "l.0.attn.v_proj.weight"].map(str::to_owned);
        assert_eq!(found, expected);
        assert_eq!(missing_parts(&names(&["l.1.mlp.up_proj.weight"])), ["l.1.mlp.gate_proj.weight"]);
        assert!(
            missing_parts(&names(&["l.1.mlp.up_proj.weight", "l.1.mlp.gate_proj.weight", "norm"])).is_empty()
        );
    }
}
