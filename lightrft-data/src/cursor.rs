//! Where a run stopped, as plain data for a checkpoint, and what resuming there means.

use serde::{Deserialize, Serialize};

use crate::sampler::Tail;
use crate::{Error, Groups, Mixture, Shuffle};

/// A position in an epoch, together with everything that fixes the order of the samples.
///
/// Plain data: it goes into a checkpoint as JSON or any other serde format. It holds no rank, so one rank's state
/// serves all, and a run may resume with another number of ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// Samples in the data set.
    pub len: usize,
    /// Seed of the run.
    pub seed: u64,
    /// How the epoch is put in order.
    pub shuffle: Shuffle,
    /// What happens to the samples that do not fill a row of ranks.
    pub tail: Tail,
    /// The epoch.
    pub epoch: u64,
    /// Samples of this epoch consumed so far by all ranks together, padding included.
    pub consumed: u64,
    /// How many ranks consumed them.
    pub world: usize,
    /// The groups in which prompts come, if each comes more than once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<Groups>,
    /// The data sets and their weights, if there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixture: Option<Mixture>,
}

/// What [`DistributedSampler::restore`](crate::DistributedSampler::restore) could do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a resume that repeats samples should be told to the user"]
pub enum Resume {
    /// The samples that follow are exactly those that had not been consumed. Under another number of ranks, the
    /// padding or the dropped tail at the end of the epoch is the new world's.
    Exact,
    /// The consumed samples do not fill whole rows of this world (a row is one sample on each rank), or they end in
    /// the middle of groups that another number of ranks would deal elsewhere. Up to this many that had been consumed
    /// come again. Nothing is left out.
    Repeats {
        /// Samples that come a second time in this epoch.
        samples: u64,
    },
}

impl SamplerState {
    /// Says which setting differs from `current`'s, if one does. The position and the world may differ.
    pub(crate) fn check_same_order(&self, current: &SamplerState) -> Result<(), Error> {
        fn same<T: PartialEq + std::fmt::Debug>(
            field: &'static str,
            saved: T,
            current: T,
        ) -> Result<(), Error> {
            if saved == current {
                return Ok(());
            }
            Err(Error::StateMismatch { field, saved: format!("{saved:?}"), current: format!("{current:?}") })
        }
        same("len", self.len, current.len)?;
        same("seed", self.seed, current.seed)?;
        same("shuffle", self.shuffle, current.shuffle)?;
        same("tail", self.tail, current.tail)?;
        same("groups", &self.groups, &current.groups)?;
        same("mixture", &self.mixture, &current.mixture)
    }
}
