//! A weight update of an `SGLang` server: a session of buckets sent by value, checked before they are sent.

use super::engine::SglangEngine;
use crate::server::{Pushed, Verify, described};
use crate::transfer::Checksums;
use crate::{Event, NamedTensor, Result, Update, Version};

/// Weights on their way to a server. While it lasts the server is paused.
#[derive(Debug)]
pub(super) struct SglangUpdate<'a> {
    engine: &'a mut SglangEngine,
    to: Version,
    pushed: Pushed,
    checksums: Option<Checksums>,
}

impl<'a> SglangUpdate<'a> {
    pub(super) fn begin(engine: &'a mut SglangEngine, to: Version) -> Result<Self> {
        // Before the pause: from then on nobody else has the server go on.
        engine.step(Event::BeginUpdate)?;
        let begun = engine.pause().and_then(|()| engine.open_session());
        let checksums = (engine.driver().verify == Verify::Checksums).then(Checksums::default);
        // Dropped where beginning failed, it leaves the engine stale: the server may be in the middle of anything.
        let update = Self { engine, to, pushed: Pushed::new("SGLang"), checksums };
        begun.map(|()| update)
    }
}

impl Update for SglangUpdate<'_> {
    /// Refuses a bucket that would be ignored in part, or bring the server down.
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let names = self.pushed.check(&self.engine.model().parameters, bucket.iter().map(described))?;
        if bucket.is_empty() {
            return Ok(());
        }
        self.pushed.sent(names, self.engine.send(bucket))?;
        if let Some(checksums) = &mut self.checksums {
            bucket.iter().for_each(|tensor| checksums.add(tensor));
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn push_gpu(&mut self, bucket: crate::cuda::GpuBucket) -> Result<crate::cuda::GpuBucket> {
        let names = self.pushed.check(&self.engine.model().parameters, bucket.described())?;
        self.pushed.sent(names, self.engine.send_gpu(bucket))
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        self.pushed.check_complete(self.to, &self.engine.model().parameters)?;
        let to = self.to;
        self.engine.finish()?;
        if let Some(checksums) = self.checksums.take() {
            self.engine.compare(checksums, to)?;
        }
        self.engine.committed(to)
    }
}

impl Drop for SglangUpdate<'_> {
    fn drop(&mut self) {
        // After a commit the engine is awake and refuses this event, which is right: there is nothing to abandon. The
        // server is told nothing: it stays paused, and the next update closes this one's session.
        if self.engine.step(Event::Abandon).is_ok() {
            tracing::warn!(to = self.to.0, "weight update dropped before its commit: the engine is stale");
            self.engine.abandon();
        }
    }
}
