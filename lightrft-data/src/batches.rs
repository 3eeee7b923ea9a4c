//! Which samples a rank takes for one optimizer step, and in which passes: batches and micro-batches.

use std::sync::Arc;

use crate::cursor::{Resume, SamplerState};
use crate::{BalanceConfig, Cost, DistributedSampler, Draw, Error, GroupPlacement, balance};

/// What happens to the samples at the end of an epoch that do not fill a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LastBatch {
    /// They come as a smaller batch, equally small on every rank.
    #[default]
    Keep,
    /// They are left out of this epoch.
    Drop,
}

/// How a batch is divided into the passes that fit the memory. Every rank makes equally many, since ranks of a sharded
/// model meet in every one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MicroBatch {
    /// Not at all: one pass.
    #[default]
    Whole,
    /// So many samples in a pass, fewer in the last one.
    Samples(usize),
    /// As many samples as a budget of tokens allows, and the batches of all ranks shared anew so that their costs are
    /// nearly equal; see [`balance`](crate::balance()). A rank then takes other samples than its own share, and more or
    /// fewer of them, but all ranks together take the same.
    Tokens {
        /// Tokens of every sample of the data set.
        lengths: Arc<[u32]>,
        /// Most tokens in a pass.
        budget: usize,
        /// What is to be equal.
        cost: Cost,
    },
}

/// How a [`BatchSampler`] divides an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchConfig {
    /// Samples of each rank in a batch.
    pub batch_size: usize,
    /// How a batch is divided into passes.
    pub micro_batch: MicroBatch,
    /// What happens to the samples that do not fill the last batch.
    pub last_batch: LastBatch,
}

impl BatchConfig {
    /// Batches of `batch_size` samples on each rank, in one pass, the last one kept.
    pub fn new(batch_size: usize) -> Self {
        Self { batch_size, micro_batch: MicroBatch::default(), last_batch: LastBatch::default() }
    }

    /// Batches of `samples` over all ranks (LightRFT's `train_batch_size`). A run that is resumed with another number of
    /// ranks and the same number of samples makes its steps of the same samples as before.
    ///
    /// # Errors
    /// [`Error::Setting`] where they do not divide evenly over the ranks.
    pub fn over_all_ranks(samples: usize, world: usize) -> Result<Self, Error> {
        if world == 0 || !samples.is_multiple_of(world) {
            let expected = "a multiple of the number of ranks";
            return Err(Error::Setting { setting: "batch over all ranks", value: samples, expected });
        }
        Ok(Self::new(samples / world))
    }
}

/// The samples of one step on this rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchPlan {
    /// The epoch they belong to.
    pub epoch: u64,
    /// For each pass its samples. An empty pass is one that this rank makes for the others' sake; it happens only where
    /// an [`Assignment`](crate::Assignment) says so, which that of whole batches does not.
    pub micro_batches: Vec<Vec<Draw>>,
}

/// Divides a sampler's epochs into batches and micro-batches.
///
/// ```
/// use lightrft_data::{
///     BatchConfig, BatchSampler, DistributedSampler, MicroBatch, SamplerConfig, Shuffle, Tail,
/// };
///
/// let sampler = DistributedSampler::new(SamplerConfig {
///     len: 20, rank: 1, world: 2, seed: 0, shuffle: Shuffle::InOrder, tail: Tail::Drop,
/// })?;
/// let config = BatchConfig { micro_batch: MicroBatch::Samples(2), ..BatchConfig::over_all_ranks(8, 2)? };
/// let mut batches = BatchSampler::new(sampler, config)?;
/// let step = batches.next_batch()?.expect("an epoch of 20 has batches of 8");
/// let passes: Vec<Vec<usize>> =
///     step.micro_batches.iter().map(|pass| pass.iter().map(|draw| draw.index).collect()).collect();
/// assert_eq!(passes, [[1, 3], [5, 7]]);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct BatchSampler {
    sampler: DistributedSampler,
    config: BatchConfig,
}

impl BatchSampler {
    /// Begins where the sampler stands.
    ///
    /// # Errors
    /// [`Error::Setting`] for sizes of 0, for lengths that are not those of the data set, for batches that cut
    /// [groups](crate::Groups), and under [`GroupPlacement::OneRank`] also for passes that do, or for a budget of tokens,
    /// which cannot keep them; [`Error::Length`] with the index of a sample that alone exceeds the budget.
    pub fn new(sampler: DistributedSampler, config: BatchConfig) -> Result<Self, Error> {
        let refuse = |setting, value, expected| Err(Error::Setting { setting, value, expected });
        if config.batch_size == 0 {
            return refuse("batch_size", 0, "at least 1");
        }
        if let Some(groups) = sampler.groups() {
            let whole = |samples: usize| samples.is_multiple_of(groups.size);
            match groups.placement {
                GroupPlacement::OneRank if !whole(config.batch_size) => {
                    let expected = "a multiple of the group size, so that no batch cuts a group";
                    return refuse("batch_size", config.batch_size, expected);
                }
                GroupPlacement::OneRank => match config.micro_batch {
                    MicroBatch::Samples(most) if most < config.batch_size && !whole(most) => {
                        let expected = "a multiple of the group size, so that no pass cuts a group";
                        return refuse("micro-batch", most, expected);
                    }
                    _ => {}
                },
                GroupPlacement::Spread => {
                    let world = sampler.config().world;
                    if !config.batch_size.checked_mul(world).is_some_and(whole) {
                        let expected =
                            "times the ranks a multiple of the group size, so that no batch cuts a group";
                        return refuse("batch_size", config.batch_size, expected);
                    }
                }
            }
        }
        match &config.micro_batch {
            MicroBatch::Samples(0) => return refuse("micro-batch", 0, "at least 1"),
            MicroBatch::Whole | MicroBatch::Samples(_) => {}
            MicroBatch::Tokens { lengths, budget, .. } => {
                if lengths.len() != sampler.config().len {
                    return refuse("lengths", lengths.len(), "one for each sample of the data set");
                }
                if let Some(groups) = sampler.groups().filter(|g| g.placement == GroupPlacement::OneRank) {
                    let expected = "`GroupPlacement::Spread` where micro-batches have a budget of tokens";
                    return refuse("group size on one rank", groups.size, expected);
                }
                let too_long = lengths.iter().position(|&len| len as usize > *budget);
                if let Some((row, &got)) = too_long.and_then(|row| Some((row, lengths.get(row)?))) {
                    let (got, expected) = (got as usize, *budget);
                    return Err(Error::Length { row, what: "the sample", got, expected });
                }
            }
        }
        Ok(Self { sampler, config })
    }

    /// The next batch of this epoch, and moves past it; `None` at its end.
    ///
    /// # Errors
    /// [`Error::TooLarge`] where the order's table cannot be allocated. The sampler stays where it was.
    pub fn next_batch(&mut self) -> Result<Option<BatchPlan>, Error> {
        let plan = self.peek_batch()?;
        if plan.is_some() {
            self.skip_batch()?;
        }
        Ok(plan)
    }

    /// The next batch of this epoch, without moving. The order that is made for it stays with this sampler and its
    /// later copies.
    pub(crate) fn peek_batch(&self) -> Result<Option<BatchPlan>, Error> {
        let rows = self.next_rows();
        if rows == 0 {
            return Ok(None);
        }
        let micro_batches = match &self.config.micro_batch {
            MicroBatch::Tokens { lengths, budget, cost } => {
                let world = self.sampler.config().world;
                let config = BalanceConfig { world, token_budget: *budget, cost: *cost };
                self.shared_anew(rows, lengths, &config)?
            }
            MicroBatch::Whole => vec![self.sampler.draws()?.take(rows).collect()],
            &MicroBatch::Samples(most) => {
                let draws: Vec<Draw> = self.sampler.draws()?.take(rows).collect();
                draws.chunks(most).map(<[Draw]>::to_vec).collect()
            }
        };
        Ok(Some(BatchPlan { epoch: self.sampler.epoch(), micro_batches }))
    }

    /// What this rank gets when the batches of all ranks are put together and shared by length.
    fn shared_anew(
        &self,
        rows: usize,
        lengths: &[u32],
        config: &BalanceConfig,
    ) -> Result<Vec<Vec<Draw>>, Error> {
        let mut all = Vec::new();
        for rank in 0..config.world {
            all.extend(self.sampler.draws_of(rank)?.take(rows));
        }
        let of_all: Vec<usize> = all.iter().map(|draw| lengths[draw.index] as usize).collect();
        let mut plan = balance(&of_all, config)?;
        let mine = plan.ranks.swap_remove(self.sampler.config().rank);
        Ok(mine.into_iter().map(|pass| pass.into_iter().map(|place| all[place]).collect()).collect())
    }

    /// Moves past the next batch without looking at it.
    pub(crate) fn skip_batch(&mut self) -> Result<(), Error> {
        self.sampler.advance(self.next_rows() as u64)
    }

    /// Samples of each rank in the next batch; 0 at the end of the epoch.
    fn next_rows(&self) -> usize {
        // What remains of an epoch fits a usize, as its padded length does.
        let remaining = self.sampler.remaining() as usize;
        match self.config.last_batch {
            LastBatch::Drop if remaining < self.config.batch_size => 0,
            _ => remaining.min(self.config.batch_size),
        }
    }

    /// Batches that are left in this epoch.
    pub fn remaining(&self) -> u64 {
        let (samples, batch_size) = (self.sampler.remaining(), self.config.batch_size as u64);
        match self.config.last_batch {
            LastBatch::Keep => samples.div_ceil(batch_size),
            LastBatch::Drop => samples / batch_size,
        }
    }

    /// The sampler, which knows the position.
    pub fn sampler(&self) -> &DistributedSampler {
        &self.sampler
    }

    /// Goes to an epoch of which `consumed` samples (over all ranks) are done; see [`DistributedSampler::set_epoch`].
    ///
    /// # Errors
    /// As there.
    pub fn set_epoch(&mut self, epoch: u64, consumed: u64) -> Result<(), Error> {
        self.sampler.set_epoch(epoch, consumed)
    }

    /// The position after the last batch.
    pub fn state(&self) -> SamplerState {
        self.sampler.state()
    }

    /// Goes to a saved position; see [`DistributedSampler::restore`].
    ///
    /// # Errors
    /// As there.
    pub fn restore(&mut self, state: &SamplerState) -> Result<Resume, Error> {
        self.sampler.restore(state)
    }
}
