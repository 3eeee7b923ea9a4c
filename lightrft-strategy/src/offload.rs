//! Memory given up around generation, and what that came to.

use std::time::Duration;

use lightrft_sharding::{Offload, OffloadReport};
use serde::Serialize;

use crate::error::Result;

/// What giving memory up around generation came to in one step, over all ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct OffloadMetrics {
    /// Bytes that were freed or moved away, the sum over ranks.
    pub bytes: u64,
    /// Bytes that stayed, since they exist nowhere else or are in host memory already, the sum over ranks.
    pub kept_bytes: u64,
    /// Seconds spent on giving up and on taking again, the mean over ranks.
    pub seconds: f64,
}

/// The same of one rank, as it adds up.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OffloadTally {
    pub(crate) bytes: usize,
    pub(crate) kept_bytes: usize,
    pub(crate) elapsed: Duration,
}

impl OffloadTally {
    /// Offloads `what`, and counts it.
    pub(crate) fn offload(&mut self, what: &mut impl Offload) -> Result<()> {
        let OffloadReport { bytes, kept_bytes, elapsed } = what.offload()?;
        self.bytes += bytes;
        self.kept_bytes += kept_bytes;
        self.elapsed += elapsed;
        Ok(())
    }

    /// Reloads `what`; the bytes were counted when they went.
    pub(crate) fn reload(&mut self, what: &mut impl Offload) -> Result<()> {
        self.elapsed += what.reload()?.elapsed;
        Ok(())
    }
}
