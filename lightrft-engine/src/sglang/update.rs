//! A weight update of an `SGLang` server: a session of buckets sent by value, checked before they are sent.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::engine::SglangEngine;
use crate::server::{Verify, check_complete};
use crate::transfer::Checksums;
use crate::wire::sglang::flattened_bucket;
use crate::{Error, Event, NamedTensor, Result, Update, Version};

/// Weights on their way to a server. While it lasts the server is paused.
#[derive(Debug)]
pub(super) struct SglangUpdate<'a> {
    engine: &'a mut SglangEngine,
    to: Version,
    pushed: BTreeSet<String>,
    checksums: Option<Checksums>,
    /// A bucket was lost on its way, so the server may have a part of it.
    broken: bool,
}

impl<'a> SglangUpdate<'a> {
    pub(super) fn begin(engine: &'a mut SglangEngine, to: Version) -> Result<Self> {
        engine.state_after(Event::BeginUpdate)?;
        let begun = engine.pause().and_then(|()| engine.open_session());
        let stepped = engine.step(Event::BeginUpdate);
        let checksums = (engine.driver().verify == Verify::Checksums).then(Checksums::default);
        // Dropped where beginning failed, it leaves the engine stale: the server may be in the middle of anything.
        let update = Self { engine, to, pushed: BTreeSet::new(), checksums, broken: false };
        // The server's end first, which a dead engine's refusal follows from.
        begun.and(stepped).map(|()| update)
    }

    /// Refuses a bucket that would be ignored in part, or bring the server down.
    fn check(&self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let known = &self.engine.model().parameters;
        let mut seen = BTreeSet::new();
        for tensor in bucket {
            let name = || tensor.name().to_owned();
            if !known.is_empty() {
                match known.get(tensor.name()) {
                    None => return Err(Error::UnknownTensor { name: name() }),
                    Some(expected) if expected != tensor.shape() => {
                        let (got, expected) = (tensor.shape().to_vec(), expected.clone());
                        return Err(Error::Shape { name: name(), got, expected });
                    }
                    Some(_) => {}
                }
            }
            if !matches!(tensor.dtype(), Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                return Err(Error::Dtype { name: name(), got: tensor.dtype(), expected: "F32, BF16 or F16" });
            }
            if !seen.insert(tensor.name()) || self.pushed.contains(tensor.name()) {
                return Err(Error::RepeatedTensor { name: name() });
            }
        }
        Ok(())
    }

    fn check_complete(&self) -> Result<()> {
        check_complete("SGLang", self.to, &self.engine.model().parameters, &self.pushed)
    }

    fn check_whole(&self) -> Result<()> {
        match self.broken {
            false => Ok(()),
            true => Err(Error::Backend {
                engine: "SGLang",
                operation: "update weights",
                source: "an earlier bucket of this update was lost: begin another".into(),
            }),
        }
    }
}

impl Update for SglangUpdate<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        self.check_whole()?;
        self.check(bucket)?;
        if bucket.is_empty() {
            return Ok(());
        }
        let message = flattened_bucket(bucket)?;
        let shards = self.engine.shards();
        if let Err(error) = self.engine.told(|control| control.update_from_tensor(&message, shards)) {
            self.broken = true;
            return Err(error);
        }
        for tensor in bucket {
            self.pushed.insert(tensor.name().to_owned());
            if let Some(checksums) = &mut self.checksums {
                checksums.add(tensor);
            }
        }
        Ok(())
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        self.check_whole()?;
        self.check_complete()?;
        let to = self.to;
        self.engine.close_session()?;
        if let Some(checksums) = self.checksums.take() {
            self.engine.compare(checksums, to)?;
        }
        self.engine.told(|control| control.name_weights(to))?;
        self.engine.committed(to)
    }
}

impl Drop for SglangUpdate<'_> {
    fn drop(&mut self) {
        // After a commit the engine is awake and refuses this event, which is right: there is nothing to abandon. The
        // server is told nothing: it stays paused, and the next update closes this one's session.
        if self.engine.step(Event::Abandon).is_ok() {
            tracing::warn!(to = self.to.0, "weight update dropped before its commit: the engine is stale");
        }
    }
}
