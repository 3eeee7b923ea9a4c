//! A rank's share of an epoch: pad or drop the tail, skip what was consumed.
//!
//! Positions `0..total` of an epoch are dealt like cards: position `p` goes to rank `p % world`. `total` is the
//! length rounded to a multiple of the world, up ([`Tail::Pad`]) or down ([`Tail::Drop`]). These are the semantics of
//! torch's `DistributedSampler`, and with a number of consumed samples those of LightRFT's.

use std::iter::FusedIterator;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::cursor::{Resume, SamplerState};
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
    /// Rows of `world` positions in an epoch, which is the number of samples of each rank.
    rows: u64,
    epoch: u64,
    consumed: u64,
    /// The epoch's order, made when it is first read: a run that restores a position never pays for epoch 0.
    order: OnceLock<Permutation>,
}

impl DistributedSampler {
    /// Stands at the beginning of epoch 0.
    ///
    /// # Errors
    /// [`Error::RankOutOfRange`]; [`Error::TooLarge`] where length and padding overflow.
    pub fn new(config: SamplerConfig) -> Result<Self, Error> {
        let SamplerConfig { len, rank, world, tail, .. } = config;
        if rank >= world {
            return Err(Error::RankOutOfRange { rank, world });
        }
        let rows = match tail {
            Tail::Pad => len.div_ceil(world),
            Tail::Drop => len / world,
        };
        if rows.checked_mul(world).is_none() {
            return Err(Error::TooLarge { what: "the padded length", len, needed: usize::MAX });
        }
        Ok(Self { config, rows: rows as u64, epoch: 0, consumed: 0, order: OnceLock::new() })
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

    /// Samples of each rank in a whole epoch (torch's `num_samples`).
    pub fn per_rank(&self) -> u64 {
        self.rows
    }

    /// Samples of all ranks in a whole epoch, with padding or without the dropped tail (torch's `total_size`).
    pub fn total(&self) -> u64 {
        self.rows * self.config.world as u64
    }

    /// Samples that this rank has yet to see in this epoch.
    pub fn remaining(&self) -> u64 {
        self.rows - self.first_row()
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
        if consumed / world as u64 > self.rows {
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
        Ok(Indices {
            order: self.order()?,
            row: self.first_row(),
            rows: self.rows,
            rank: self.config.rank as u64,
            world: self.config.world as u64,
        })
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

    fn order(&self) -> Result<Permutation, Error> {
        if let Some(order) = self.order.get() {
            return Ok(order.clone());
        }
        let SamplerConfig { len, seed, shuffle, .. } = self.config;
        let order = Permutation::new(shuffle, len, seed, self.epoch)?;
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
        let mut saved = Self::new(SamplerConfig { rank: 0, world: state.world, ..self.config.clone() })?;
        saved.set_epoch(state.epoch, state.consumed)?;
        if saved.remaining() == 0 && self.config.tail == Tail::Pad {
            // Every sample was seen, some as padding: the epoch is over in any world.
            self.set_epoch(state.epoch, self.total())?;
            return Ok(Resume::Exact);
        }
        // Whole rows only: which ranks had seen their sample of a half-consumed row, nobody knows.
        self.set_epoch(state.epoch, saved.first_row() * state.world as u64)?;
        let begins_at = self.first_row() * self.config.world as u64;
        Ok(match state.consumed - begins_at {
            0 => Resume::Exact,
            samples => Resume::Repeats { samples },
        })
    }
}

/// This rank's samples up to the end of an epoch, made by [`DistributedSampler::indices`]. Skipping costs nothing.
#[derive(Clone, Debug)]
pub struct Indices {
    order: Permutation,
    row: u64,
    rows: u64,
    rank: u64,
    world: u64,
}

impl Iterator for Indices {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.row >= self.rows {
            return None;
        }
        // Positions from `len` on are padding: the order begins again. They are below the padded length, which
        // `new` has shown to fit a usize.
        let position = (self.row * self.world + self.rank) as usize;
        self.row += 1;
        self.order.at(position % self.order.len())
    }

    fn nth(&mut self, n: usize) -> Option<usize> {
        self.row = self.row.saturating_add(n as u64).min(self.rows);
        self.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = (self.rows - self.row) as usize;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Indices {}
impl FusedIterator for Indices {}
