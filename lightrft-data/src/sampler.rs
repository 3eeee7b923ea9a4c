//! A rank's share of an epoch: pad or drop the tail, skip what was consumed.
//!
//! Positions `0..total` of an epoch are dealt like cards: position `p` goes to rank `p % world`. `total` is the
//! length rounded to a multiple of the world, up ([`Tail::Pad`]) or down ([`Tail::Drop`]). These are the semantics of
//! torch's `DistributedSampler`, and with a number of consumed samples those of LightRFT's. What goes beyond them,
//! several copies of each prompt and several data sets in one epoch, is in `groups.rs` and `mixture.rs`.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::cursor::{Resume, SamplerState};
use crate::draws::{Draws, EpochOrder, Indices};
use crate::groups::{Deal, Groups};
use crate::mixture::{MixedOrder, Mixture, MixtureProblem, Schedule};
use crate::shuffle::{Permutation, Shuffle};

/// What happens to the samples at the end of an epoch that do not fill a row of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tail {
    /// The row is filled with samples from the beginning of the order, which so come twice (`drop_last=False`).
    Pad,
    /// The row is left out (`drop_last=True`); fewer than `world` samples are not seen in this epoch.
    Drop,
}

/// Everything that fixes which samples a rank sees, and in which order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SamplerConfig {
    /// Samples in the data set.
    pub len: usize,
    /// This rank, `0..world`.
    pub rank: usize,
    /// How many ranks share the data set.
    pub world: usize,
    /// Seed of the run, the same on every rank.
    pub seed: u64,
    /// How an epoch is put in order.
    pub shuffle: Shuffle,
    /// What happens to the samples that do not fill a row of ranks.
    pub tail: Tail,
}

/// Which samples this rank sees in an epoch, and where it stands.
///
/// The sampler is a position, not a stream: [`indices`](Self::indices) looks ahead without moving it,
/// [`next_indices`](Self::next_indices) and [`advance`](Self::advance) move it, [`state`](Self::state) saves it.
///
/// ```
/// use lightrft_data::{DistributedSampler, SamplerConfig, Shuffle, Tail};
///
/// let mut sampler = DistributedSampler::new(SamplerConfig {
///     len: 17, rank: 0, world: 3, seed: 42, shuffle: Shuffle::TorchExact, tail: Tail::Drop,
/// })?;
/// sampler.set_epoch(3, 6)?; // six samples of epoch 3 are done, two on each rank
/// assert_eq!(sampler.indices()?.collect::<Vec<_>>(), [4, 0, 7]);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DistributedSampler {
    config: SamplerConfig,
    groups: Option<Groups>,
    mixture: Option<Arc<Schedule>>,
    deal: Deal,
    epoch: u64,
    consumed: u64,
    /// The epoch's order, made when it is first read: a run that restores a position never pays for epoch 0.
    order: OnceLock<EpochOrder>,
}

impl DistributedSampler {
    /// Stands at the beginning of epoch 0.
    ///
    /// # Errors
    /// [`Error::RankOutOfRange`]; [`Error::TooLarge`] where length and padding overflow.
    pub fn new(config: SamplerConfig) -> Result<Self, Error> {
        Self::with(config, None, None)
    }

    fn with(
        config: SamplerConfig,
        groups: Option<Groups>,
        mixture: Option<Arc<Schedule>>,
    ) -> Result<Self, Error> {
        let SamplerConfig { len, rank, world, tail, .. } = config;
        if rank >= world {
            return Err(Error::RankOutOfRange { rank, world });
        }
        let positions = mixture.as_ref().map_or(len, |mixture| mixture.positions);
        let deal = Deal::new(positions, world, groups, tail)?;
        Ok(Self { config, groups, mixture, deal, epoch: 0, consumed: 0, order: OnceLock::new() })
    }

    /// Draws every prompt several times; see [`Groups`]. Stands at the beginning of epoch 0.
    ///
    /// Everything that this sampler counts (samples, rows, what is consumed) then counts each copy.
    ///
    /// ```
    /// use lightrft_data::{DistributedSampler, GroupPlacement, Groups, SamplerConfig, Shuffle, Tail};
    ///
    /// let rank_0_of_2 = SamplerConfig {
    ///     len: 4, rank: 0, world: 2, seed: 0, shuffle: Shuffle::InOrder, tail: Tail::Drop,
    /// };
    /// let sampler = DistributedSampler::new(rank_0_of_2)?
    ///     .in_groups(Groups { size: 3, placement: GroupPlacement::OneRank })?;
    /// assert_eq!(sampler.indices()?.collect::<Vec<_>>(), [0, 0, 0, 2, 2, 2]);
    /// # Ok::<_, lightrft_data::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Setting`] for groups of 0; [`Error::TooLarge`] where the copies cannot be counted.
    pub fn in_groups(self, groups: Groups) -> Result<Self, Error> {
        if groups.size == 0 {
            return Err(Error::Setting { setting: "group size", value: 0, expected: "at least 1" });
        }
        // Groups of one are none, wherever they lie: a position saved without them fits.
        Self::with(self.config, (groups.size > 1).then_some(groups), self.mixture)
    }

    /// Draws from several data sets in given proportions; see [`Mixture`]. Stands at the beginning of epoch 0.
    ///
    /// `len` of this sampler's configuration is the number of samples of all of them together.
    ///
    /// # Errors
    /// [`Error::Mixture`] for parts that cannot be mixed, that are not `len` samples together, or under
    /// [`Shuffle::TorchExact`]; [`Error::TooLarge`] where the padded epoch cannot be counted.
    pub fn mixing(self, mixture: Mixture) -> Result<Self, Error> {
        if self.config.shuffle == Shuffle::TorchExact {
            return Err(MixtureProblem::TorchExact.into());
        }
        let schedule = Schedule::new(mixture, self.config.len)?;
        Self::with(self.config, self.groups, Some(Arc::new(schedule)))
    }

    /// What the sampler was made from.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// The epoch that it stands in.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Samples of this epoch consumed so far by all ranks together.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// The groups in which prompts come, if each comes more than once.
    pub fn groups(&self) -> Option<Groups> {
        self.groups
    }

    /// Samples of each rank in a whole epoch (torch's `num_samples`).
    pub fn per_rank(&self) -> u64 {
        self.deal.rows
    }

    /// Samples of all ranks in a whole epoch, with padding or without the dropped tail (torch's `total_size`).
    pub fn total(&self) -> u64 {
        self.deal.rows * self.config.world as u64
    }

    /// Samples that this rank has yet to see in this epoch.
    pub fn remaining(&self) -> u64 {
        self.deal.rows - self.first_row()
    }

    /// Whole rows consumed. Samples of a row that was begun are seen again: no rank can know which ranks saw theirs.
    fn first_row(&self) -> u64 {
        self.consumed / self.config.world as u64
    }

    /// Goes to an epoch, of which `consumed` samples (over all ranks) are done already.
    ///
    /// `consumed` counts in rows of `world` samples; what exceeds a whole number of rows is seen again.
    ///
    /// # Errors
    /// [`Error::ConsumedBeyondEpoch`] where more whole rows are consumed than the epoch has; the sampler stays where
    /// it was.
    pub fn set_epoch(&mut self, epoch: u64, consumed: u64) -> Result<(), Error> {
        let world = self.config.world;
        if consumed / world as u64 > self.deal.rows {
            return Err(Error::ConsumedBeyondEpoch { epoch, consumed, total: self.total(), world });
        }
        if epoch != self.epoch {
            self.order = OnceLock::new();
        }
        self.epoch = epoch;
        self.consumed = consumed;
        Ok(())
    }

    /// Notes that every rank consumed `per_rank` more samples.
    ///
    /// # Errors
    /// [`Error::ConsumedBeyondEpoch`] where fewer are left; the sampler stays where it was.
    pub fn advance(&mut self, per_rank: u64) -> Result<(), Error> {
        let rows = self.first_row().saturating_add(per_rank);
        self.set_epoch(self.epoch, rows.saturating_mul(self.config.world as u64))
    }

    /// This rank's samples from here to the end of the epoch. The sampler does not move.
    ///
    /// # Errors
    /// [`Error::TooLarge`] where the order's table cannot be allocated.
    pub fn indices(&self) -> Result<Indices, Error> {
        Ok(Indices { draws: self.draws()? })
    }

    /// As [`indices`](Self::indices), with the group and the copy of each sample.
    ///
    /// # Errors
    /// As there.
    pub fn draws(&self) -> Result<Draws, Error> {
        self.draws_of(self.config.rank)
    }

    /// The draws of any rank: what the others do now needs no message from them.
    pub(crate) fn draws_of(&self, rank: usize) -> Result<Draws, Error> {
        let positions = self.mixture.as_ref().map_or(self.config.len, |mixture| mixture.positions);
        Ok(Draws::new(self.order()?, self.deal.clone(), positions, self.first_row(), rank))
    }

    /// This rank's next samples, at most `per_rank` of them, and moves past them. Empty at the end of the epoch.
    ///
    /// Every rank receives equally many, so the ranks stay in step.
    ///
    /// # Errors
    /// [`Error::TooLarge`] where the order's table cannot be allocated.
    pub fn next_indices(&mut self, per_rank: usize) -> Result<Vec<usize>, Error> {
        let taken: Vec<usize> = self.indices()?.take(per_rank).collect();
        self.advance(taken.len() as u64)?;
        Ok(taken)
    }

    /// Whether the order of this epoch has been made, so that nothing makes it again.
    #[cfg(test)]
    pub(crate) fn has_order(&self) -> bool {
        self.order.get().is_some()
    }

    fn order(&self) -> Result<EpochOrder, Error> {
        if let Some(order) = self.order.get() {
            return Ok(order.clone());
        }
        let SamplerConfig { len, seed, shuffle, .. } = self.config;
        let order = match &self.mixture {
            None => EpochOrder::One(Permutation::new(shuffle, len, seed, self.epoch)?),
            Some(schedule) => EpochOrder::Mixed(MixedOrder::new(schedule, shuffle, seed, self.epoch)?),
        };
        // If another thread was faster its order is the same one; only the work was done twice.
        Ok(self.order.get_or_init(|| order).clone())
    }

    /// The position, as plain data.
    pub fn state(&self) -> SamplerState {
        SamplerState {
            len: self.config.len,
            seed: self.config.seed,
            shuffle: self.config.shuffle,
            tail: self.config.tail,
            epoch: self.epoch,
            consumed: self.consumed,
            world: self.config.world,
            groups: self.groups,
            mixture: self.mixture.as_ref().map(|schedule| schedule.mixture.clone()),
        }
    }

    /// Goes to a saved position, also one of a run with another number of ranks; see [`Resume`].
    ///
    /// # Errors
    /// [`Error::StateMismatch`] where the saved order is another one (length, seed, shuffle or tail), with both
    /// values; [`Error::ConsumedBeyondEpoch`] where the state contradicts itself. The sampler stays where it was.
    pub fn restore(&mut self, state: &SamplerState) -> Result<Resume, Error> {
        state.check_same_order(&self.state())?;
        // The state must have been possible in its own world before it is carried over into this one.
        let config = SamplerConfig { rank: 0, world: state.world, ..self.config.clone() };
        let mut saved = Self::with(config, self.groups, self.mixture.clone())?;
        saved.set_epoch(state.epoch, state.consumed)?;
        // Whole rows only: which ranks had seen their sample of a half-consumed row, nobody knows.
        let rows = saved.first_row();
        let positions = self.mixture.as_ref().map_or(self.config.len, |mixture| mixture.positions);
        let all_seen = saved.deal.whole_groups(rows) >= positions as u64;
        if self.config.tail == Tail::Pad && all_seen && state.world != self.config.world {
            // Every sample was seen, some as padding: the epoch is over in any other world.
            self.set_epoch(state.epoch, self.total())?;
            return Ok(Resume::Exact);
        }
        let begins_at = self.deal.row_after(&saved.deal, rows) * self.config.world as u64;
        self.set_epoch(state.epoch, begins_at)?;
        // What this world drops at the end does not come again either.
        Ok(match state.consumed.min(self.total()).saturating_sub(begins_at) {
            0 => Resume::Exact,
            samples => Resume::Repeats { samples },
        })
    }
}
