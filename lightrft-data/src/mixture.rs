//! Several data sets in one epoch, in given proportions.
//!
//! Whose turn it is follows Tijdeman's rule (`chairman.rs`), so the proportions hold at every moment of an epoch, not
//! only in the long run as they do where each turn is drawn at random. Within each data set the order is its own
//! shuffle. Nothing of this is state: every position of an epoch is computed from its number.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::chairman::Turns;
use crate::groups::gcd;
use crate::{Error, Permutation, Shuffle};

/// Several data sets, each with a weight.
///
/// At every position of an epoch each data set has had its share of the samples so far (its weight by the sum of
/// weights), give or take less than one sample: at most `1 - 1/(2n - 2)` for `n` data sets. With [`Exhausted::Drop`]
/// the shares are those of the data sets that are left, counted from where the last one ended.
///
/// Which rank draws which of a row's samples changes from row to row, so that every rank, too, sees all data sets in
/// their proportions, though only in the long run.
///
/// The samples of all parts are numbered one after the other, as in [`Concat`](crate::Concat).
///
/// ```
/// use lightrft_data::{DistributedSampler, Exhausted, Mixture, SamplerConfig, Shuffle, Tail};
///
/// // Three in four from a set of 6 (samples 0 to 5), one in four from a set of 100 (6 to 105).
/// let mixture = Mixture::new([(6, 3), (100, 1)], Exhausted::Stop);
/// let config = SamplerConfig {
///     len: 106, rank: 0, world: 1, seed: 0, shuffle: Shuffle::InOrder, tail: Tail::Drop,
/// };
/// let sampler = DistributedSampler::new(config)?.mixing(mixture)?;
/// assert_eq!(sampler.indices()?.collect::<Vec<_>>(), [0, 1, 6, 2, 3, 4, 7, 5]);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mixture {
    /// The data sets.
    pub parts: Vec<MixturePart>,
    /// What happens when one has no samples left.
    pub exhausted: Exhausted,
}

/// One data set of a [`Mixture`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixturePart {
    /// Its samples, at least 1.
    pub len: usize,
    /// Its part in the mixture, relative to the other weights, at least 1. After division by what they have in
    /// common, all weights together are at most [`Mixture::FINEST`].
    pub weight: u32,
}

/// What happens in the middle of an epoch when a data set of a mixture has no samples left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exhausted {
    /// The epoch ends with its last sample. No sample comes twice in an epoch.
    Stop,
    /// It begins again in a new order. The epoch ends when every data set has ended at least once.
    Cycle,
    /// It is left out and the others go on in their proportions. The epoch holds every sample exactly once.
    Drop,
}

/// Why data sets cannot be mixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MixtureProblem {
    /// There is nothing to mix.
    #[error("it has no parts")]
    NoParts,
    /// A part without samples.
    #[error("part {part} has no samples")]
    EmptyPart {
        /// Which, from 0.
        part: usize,
    },
    /// A part that would never be seen.
    #[error("part {part} has weight 0; leave it out instead")]
    NoWeight {
        /// Which, from 0.
        part: usize,
    },
    /// Weights whose proportions are finer than the table of turns.
    #[error(
        "its weights sum to {sum} after division by what they have in common, at most {} is possible: round them",
        Mixture::FINEST
    )]
    TooFine {
        /// What they sum to.
        sum: u64,
    },
    /// The lengths of the parts are not those of the data set.
    #[error("its parts hold {parts} samples, the sampler's data set {len}")]
    Length {
        /// Samples of all parts together.
        parts: u64,
        /// Samples of the data set, as the sampler was told.
        len: usize,
    },
    /// Each part that ends under [`Exhausted::Drop`] begins a table of turns anew, and together they are too large.
    #[error(
        "{parts} of its parts end one after the other, and the tables of turns of those that are left hold more than {}: \
         have fewer parts, or round their weights",
        Mixture::MOST_TURNS
    )]
    TooManyTurns {
        /// How many had ended when the tables were full.
        parts: usize,
    },
    /// An epoch longer than a number can count.
    #[error("its epoch is too long to be counted")]
    TooLong,
    /// There is no mixture in torch that this one could equal.
    #[error("`Shuffle::TorchExact` has no meaning for it; take `Shuffle::Seekable`")]
    TorchExact,
}

impl Mixture {
    /// The largest sum of weights, once they are divided by what they have in common.
    pub const FINEST: u64 = 1 << 16;

    /// Most turns in the tables of a mixture, 12 bytes each. One table holds no more than the sum of weights, so this many
    /// are needed only where many parts end one after the other under [`Exhausted::Drop`].
    pub const MOST_TURNS: usize = 1 << 20;

    /// Data sets of these lengths, each with its length as its weight: all come to their end together, as in one shuffled
    /// data set, but each keeps its share at every moment.
    ///
    /// Where the lengths are finer than [`FINEST`](Self::FINEST) the weights are rounded to that, and a small part has at
    /// least weight 1: they then end at about the same time, and under [`Exhausted::Drop`] every sample still comes exactly
    /// once. [`Exhausted::Stop`] is not meant for this: the last turn of a part of few samples may come long before the end.
    ///
    /// ```
    /// use lightrft_data::{Exhausted, Mixture};
    ///
    /// let weights = |lengths: [usize; 3]| {
    ///     let mixture = Mixture::proportional(lengths, Exhausted::Drop);
    ///     mixture.parts.iter().map(|part| part.weight).collect::<Vec<_>>()
    /// };
    /// assert_eq!(weights([6000, 4000, 500]), [12, 8, 1]);
    /// assert_eq!(weights([20_000_000, 10_000_001, 3]), [43_689, 21_844, 1]);
    /// ```
    pub fn proportional(lengths: impl IntoIterator<Item = usize>, exhausted: Exhausted) -> Self {
        let lengths: Vec<usize> = lengths.into_iter().collect();
        let total: u128 = lengths.iter().map(|&len| len as u128).sum();
        let common = lengths.iter().fold(0, |common, &len| gcd(common, len as u64)).max(1);
        let exact = total / u128::from(common) <= u128::from(Self::FINEST);
        // Rounded up or to 1, each adds less than 1 to this.
        let room = u128::from(Self::FINEST).saturating_sub(lengths.len() as u128);
        let weight = |len: usize| match exact {
            true => len as u64 / common,
            false => (((len as u128 * room + total / 2) / total) as u64).max(1),
        };
        // Each is at most `FINEST`.
        let parts = lengths.iter().map(|&len| (len, weight(len) as u32));
        Self::new(parts.collect::<Vec<_>>(), exhausted)
    }

    /// Data sets of these lengths with these weights.
    pub fn new(parts: impl IntoIterator<Item = (usize, u32)>, exhausted: Exhausted) -> Self {
        let parts = parts.into_iter().map(|(len, weight)| MixturePart { len, weight }).collect();
        Self { parts, exhausted }
    }
}

/// A stretch of an epoch in which the same parts take turns.
#[derive(Debug)]
struct Phase {
    /// Position in the epoch at which it begins.
    start: u64,
    turns: Turns,
    /// The parts that take turns, as numbers of the mixture's parts.
    parts: Vec<usize>,
    /// How many samples of each of them came before.
    before: Vec<u64>,
}

/// The turns of a whole epoch, the same in every epoch.
#[derive(Debug)]
pub(crate) struct Schedule {
    pub(crate) mixture: Mixture,
    phases: Vec<Phase>,
    /// Index of the first sample of each part.
    offsets: Vec<usize>,
    /// Passes that an epoch makes over each part, the last of them perhaps not to its end.
    passes: Vec<u64>,
    /// Positions of an epoch.
    pub(crate) positions: usize,
}

impl Schedule {
    /// Checks the mixture and lays out its epoch.
    pub(crate) fn new(mixture: Mixture, len: usize) -> Result<Self, MixtureProblem> {
        let parts = &mixture.parts;
        if parts.is_empty() {
            return Err(MixtureProblem::NoParts);
        }
        let (mut offsets, mut sum) = (Vec::new(), 0u64);
        for (part, MixturePart { len, weight }) in parts.iter().enumerate() {
            match (len, weight) {
                (0, _) => return Err(MixtureProblem::EmptyPart { part }),
                (_, 0) => return Err(MixtureProblem::NoWeight { part }),
                _ => offsets.push(sum as usize),
            }
            sum = sum.checked_add(*len as u64).ok_or(MixtureProblem::TooLong)?;
        }
        if sum != len as u64 {
            return Err(MixtureProblem::Length { parts: sum, len });
        }

        let mut phases: Vec<Phase> = Vec::new();
        let mut active: Vec<usize> = (0..parts.len()).collect();
        let mut drawn = vec![0u64; parts.len()];
        let (mut start, mut table) = (0u64, 0usize);
        loop {
            let weights = reduced(parts, &active)?;
            let turns = match mixture.exhausted {
                Exhausted::Cycle => Turns::new(weights),
                Exhausted::Stop | Exhausted::Drop => {
                    let left: Vec<u64> =
                        active.iter().map(|&part| parts[part].len as u64 - drawn[part]).collect();
                    Turns::until_one_has(weights, &left)
                }
            };
            table += turns.len();
            if table > Mixture::MOST_TURNS {
                return Err(MixtureProblem::TooManyTurns { parts: parts.len() - active.len() });
            }
            // When each part will have given its last sample. Parts whose end nobody can count never end first.
            let ends = active.iter().enumerate().map(|(slot, &part)| {
                turns.until(slot, parts[part].len as u64 - drawn[part]).unwrap_or(u64::MAX)
            });
            let ends: Vec<u64> = ends.collect();
            let end = match mixture.exhausted {
                Exhausted::Cycle => ends.iter().max(),
                Exhausted::Stop | Exhausted::Drop => ends.iter().min(),
            };
            let end = end.copied().filter(|&end| end < u64::MAX).ok_or(MixtureProblem::TooLong)?;
            let before = active.iter().map(|&part| drawn[part]).collect();
            for (slot, &part) in active.iter().enumerate() {
                drawn[part] += turns.count(slot, end);
            }
            phases.push(Phase { start, turns, parts: active.clone(), before });
            start = start.checked_add(end).ok_or(MixtureProblem::TooLong)?;
            active.retain(|&part| drawn[part] < parts[part].len as u64);
            if active.is_empty() || mixture.exhausted != Exhausted::Drop {
                break;
            }
        }
        let passes = drawn.iter().zip(parts).map(|(drawn, part)| drawn.div_ceil(part.len as u64)).collect();
        let positions = usize::try_from(start).map_err(|_| MixtureProblem::TooLong)?;
        Ok(Self { mixture, phases, offsets, passes, positions })
    }

    /// The part at a position, and how many of its samples came before in this epoch.
    fn at(&self, position: u64) -> (usize, u64) {
        // The first phase begins at 0.
        let phase = &self.phases[self.phases.partition_point(|phase| phase.start <= position) - 1];
        let (slot, earlier) = phase.turns.at(position - phase.start);
        (phase.parts[slot], phase.before[slot] + earlier)
    }
}

/// The weights of some parts, divided by what they have in common.
fn reduced(parts: &[MixturePart], active: &[usize]) -> Result<Vec<u32>, MixtureProblem> {
    let weights = || active.iter().map(|&part| u64::from(parts[part].weight));
    let common = weights().fold(0, gcd);
    let sum = weights().map(|weight| weight / common).sum();
    if sum > Mixture::FINEST {
        return Err(MixtureProblem::TooFine { sum });
    }
    // The sum is small, so each of them is.
    Ok(weights().map(|weight| (weight / common) as u32).collect())
}

/// The order of one epoch of a mixture.
#[derive(Clone, Debug)]
pub(crate) struct MixedOrder {
    schedule: Arc<Schedule>,
    /// Each part's order in its first pass of the epoch, which for most is the only one.
    first: Arc<Vec<Permutation>>,
    shuffle: Shuffle,
    seed: u64,
    epoch: u64,
}

impl MixedOrder {
    pub(crate) fn new(
        schedule: &Arc<Schedule>,
        shuffle: Shuffle,
        seed: u64,
        epoch: u64,
    ) -> Result<Self, Error> {
        let mut order =
            Self { schedule: Arc::clone(schedule), first: Arc::new(Vec::new()), shuffle, seed, epoch };
        let parts = 0..schedule.mixture.parts.len();
        order.first = Arc::new(parts.map(|part| order.pass(part, 0)).collect::<Result<_, _>>()?);
        Ok(order)
    }

    /// The order of one pass over a part. Passes are counted through the epochs, so none has the order of another, and
    /// parts of one length differ by their seed.
    fn pass(&self, part: usize, pass: u64) -> Result<Permutation, Error> {
        let seed = self.seed.wrapping_add((part as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let pass = self.epoch.wrapping_mul(self.schedule.passes[part]).wrapping_add(pass);
        Permutation::new(self.shuffle, self.schedule.mixture.parts[part].len, seed, pass)
    }

    /// The sample at a position of the epoch.
    pub(crate) fn at(&self, position: u64) -> Option<usize> {
        if position >= self.schedule.positions as u64 {
            return None;
        }
        let (part, drawn) = self.schedule.at(position);
        let len = self.schedule.mixture.parts[part].len as u64;
        let within = (drawn % len) as usize;
        let sample = match drawn / len {
            0 => self.first[part].at(within),
            // Neither of the shuffles that a mixture allows has a table, so this neither fails nor takes long.
            pass => self.pass(part, pass).ok()?.at(within),
        };
        Some(self.schedule.offsets[part] + sample?)
    }
}
