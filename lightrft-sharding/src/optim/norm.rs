//! The global gradient norm: one number for all units, all models given together and all ranks, by one all-reduce.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lightrft_collectives::Communicator;
use rayon::prelude::*;

use super::kernel::{BLOCK, PARALLEL, PIECE};
use super::simd::{self, Vectors, prefetch};
use crate::error::{Error, Result};
use crate::groups::Groups;
use crate::memory::Memory;
use crate::unit::ShardedUnits;

/// Added to the norm before dividing by it, as torch does.
const CLIP_EPS: f32 = 1e-6;

/// The 2-norm of gradients over all ranks, as [`grad_norm`] found it; the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradNorm(f32);

impl GradNorm {
    /// The norm before clipping; NaN or infinite when any gradient of any rank is, or when it is beyond f32.
    pub fn value(self) -> f32 {
        self.0
    }

    /// Whether a step may be made with these gradients.
    pub fn is_finite(self) -> bool {
        self.0.is_finite()
    }

    /// What gradients are multiplied by so that their norm is at most `max_norm`: `min(1, max_norm / (norm + 1e-6))`,
    /// as torch's `clip_grad_norm_` has it. 1 when `max_norm` is 0, which means no clipping.
    pub fn clip_factor(self, max_norm: f64) -> f32 {
        let max_norm = max_norm as f32;
        if max_norm > 0.0 { (max_norm / (self.0 + CLIP_EPS)).min(1.0) } else { 1.0 }
    }
}

/// The 2-norm of all gradients of all `models` together. *Collective*: one all-reduce of eight bytes for each distinct
/// group that the models are cut over (one, that is, unless their meshes differ), none for a group of one rank.
///
/// Each shard counts once: the sum goes over the ranks of the shard group, so replicas of it add nothing, and units that
/// are whole on every rank are counted by the first. To clip
/// several models together, or one model by two optimizers, take the norm of all and give it to
/// [`AdamW::step_with_norm`](crate::AdamW::step_with_norm) of each.
///
/// Squares are exact in f64 and summed in f64, in an order that depends on the lengths of the shards but not on the
/// number of threads nor on the vectors of the machine; the result is rounded to f32, which hides the order for all but
/// one sum in some ten million.
///
/// Sums over ranks first what has only accumulated so far ([`ShardedUnits::sync_gradients`]).
///
/// # Errors
/// Those of [`ShardedUnits::sync_gradients`], and [`Error::Collective`].
pub fn grad_norm<'a, Mem: Memory>(
    models: impl IntoIterator<Item = &'a mut ShardedUnits<Mem>>,
) -> Result<GradNorm> {
    let mut sums: Vec<GroupSum<Mem>> = Vec::new();
    let mut asked = Vec::new();
    for units in models {
        units.sync_gradients()?;
        // Where units are not cut, no rank is heard of in the sum of squares: the gradients' own exchanges must have come
        // to a good end.
        let Groups { world, replicate, .. } = &units.groups;
        asked.push((units.memory.clone(), [Arc::clone(world), Arc::clone(replicate)]));
        let (memory, group) = (&units.memory, units.communicator());
        let same = |sum: &&mut GroupSum<Mem>| sum.memory.is(memory) && sum.group.ranks() == group.ranks();
        match sums.iter_mut().find(same) {
            Some(sum) => sum.squares = Some(memory.squares(sum.squares.take(), &units.grads())?),
            None => sums.push(GroupSum {
                memory: memory.clone(),
                group: Arc::clone(group),
                squares: Some(memory.squares(None, &units.grads())?),
            }),
        }
    }
    let mut total = 0.0;
    let failed = Error::collective("gradient norm", "all units");
    for GroupSum { memory, group, squares } in sums {
        total += squares.map_or(Ok(0.0), |squares| memory.total(squares, &*group)).map_err(&failed)?;
    }
    for (memory, groups) in asked {
        groups.iter().try_for_each(|group| memory.outcome(&**group)).map_err(&failed)?;
    }
    Ok(GradNorm(total.sqrt() as f32))
}

/// The squares of models that are cut over one group and lie in one memory.
struct GroupSum<Mem: Memory> {
    memory: Mem,
    group: Arc<dyn Communicator>,
    squares: Option<Mem::Squares>,
}

/// What a rank multiplies the loss of a micro-batch by, so that the gradients that add up over `accumulation_steps`
/// passes and `ranks` ranks are those of the mean: `1 / (accumulation_steps * ranks)`.
///
/// Sharding sums gradients and divides by nothing, so this is the place where it happens: scale the loss, or, which is
/// the same, the gradient that [`ShardedModel::backward`](crate::ShardedModel::backward) begins from. It is meant for
/// losses that are means over equally many things on each rank and pass. A loss over tokens, of which micro-batches have
/// different numbers, is divided by the number of tokens in the whole batch instead, and by nothing else.
///
/// ```
/// use std::num::NonZeroUsize;
/// use lightrft_sharding::loss_scale;
///
/// let (passes, ranks) = (NonZeroUsize::new(4).unwrap(), NonZeroUsize::new(8).unwrap());
/// assert_eq!(loss_scale(passes, ranks), 1.0 / 32.0);
/// ```
pub fn loss_scale(accumulation_steps: NonZeroUsize, ranks: NonZeroUsize) -> f32 {
    (1.0 / (accumulation_steps.get() as f64 * ranks.get() as f64)) as f32
}

/// Sums of pieces, added in their order whoever summed each.
pub(crate) fn sum_of_squares(values: &[f32]) -> f64 {
    let vectors = Vectors::widest();
    if values.len() < PARALLEL || rayon::current_num_threads() == 1 {
        return values.chunks(PIECE).map(|piece| simd::squares(vectors, piece)).sum();
    }
    let sums: Vec<f64> = values.par_chunks(PIECE).map(|piece| simd::squares(vectors, piece)).collect();
    sums.into_iter().sum()
}

/// The sum of squares in 16 running sums, whatever the vectors: two registers of the widest, and enough of the others
/// that additions need not wait for each other.
#[inline(always)]
pub(super) fn squares(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0f64; LANES];
    let (blocks, rest) = values.as_chunks::<BLOCK>();
    for block in blocks {
        prefetch(block);
        for part in block.as_chunks::<LANES>().0 {
            for (sum, &value) in sums.iter_mut().zip(part) {
                *sum += f64::from(value) * f64::from(value);
            }
        }
    }
    let rest: f64 = rest.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn clipping_never_enlarges_and_zero_turns_it_off() {
        assert_eq!(GradNorm(0.5).clip_factor(1.0), 1.0);
        assert_eq!(GradNorm(1e9).clip_factor(0.0), 1.0);
        assert!((GradNorm(4.0).clip_factor(1.0) - 0.25).abs() < 1e-6);
        assert_eq!(GradNorm(0.0).clip_factor(1.0), 1.0);
    }

    #[test]
    fn the_sum_does_not_depend_on_threads() {
        let values: Vec<f32> = (0..PARALLEL + 13).map(|i| (i as f32 * 0.37).sin()).collect();
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sum_of_squares(&values)).to_bits()
        };
        let alone = with(1);
        for threads in 2..5 {
            assert_eq!(with(threads), alone, "{threads} threads");
        }
    }

    proptest! {
        #[test]
        fn the_sum_has_the_same_bits_with_any_vectors(len in 0usize..300, skip in 0usize..16, seed: u32) {
            let value = |i: usize| f32::from_bits((i as u32).wrapping_mul(2_654_435_761) ^ seed) % 8.0;
            let values: Vec<f32> = (0..skip + len).map(value).map(|v| if v.is_nan() { 1.5 } else { v }).collect();
            let values = &values[skip..];
            let plain = simd::squares(Vectors::Plain, values);
            for &vectors in Vectors::ALL.iter().filter(|vectors| vectors.at_hand()) {
                prop_assert_eq!(simd::squares(vectors, values).to_bits(), plain.to_bits(), "{:?}", vectors);
            }
            let exact: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
            prop_assert!((plain - exact).abs() <= 1e-12 * exact);
        }
    }
}
