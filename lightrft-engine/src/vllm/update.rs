//! An update of a server's weights: checked here, sent by a transport, committed or abandoned as a whole.

use super::control::Control;
use super::engine::VllmEngine;
use super::transfer::Transport;
use crate::server::{Pushed, described};
use crate::transfer::Checksums;
use crate::{Event, NamedTensor, Result, Update, Version};

#[derive(Debug)]
pub(super) struct VllmUpdate<'a> {
    engine: &'a mut VllmEngine,
    to: Version,
    pushed: Pushed,
    checksums: Option<Checksums>,
}

impl<'a> VllmUpdate<'a> {
    pub(super) fn new(engine: &'a mut VllmEngine, to: Version) -> Self {
        let checksums = engine.verifies().then(Checksums::default);
        Self { engine, to, pushed: Pushed::new("vLLM"), checksums }
    }
}

impl Update for VllmUpdate<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let names = self.pushed.check(&self.engine.model().parameters, bucket.iter().map(described))?;
        let send = |transport: &mut dyn Transport, control: &Control| transport.send(control, bucket);
        self.pushed.sent(names, self.engine.with_transport(send))?;
        if let Some(checksums) = &mut self.checksums {
            bucket.iter().for_each(|tensor| checksums.add(tensor));
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn push_gpu(&mut self, bucket: crate::cuda::GpuBucket) -> Result<crate::cuda::GpuBucket> {
        let names = self.pushed.check(&self.engine.model().parameters, bucket.described())?;
        let send = |transport: &mut dyn Transport, control: &Control| transport.send_gpu(control, bucket);
        self.pushed.sent(names, self.engine.with_transport(send))
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        self.pushed.check_complete(self.to, &self.engine.model().parameters)?;
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
