//! Folds that go on where another left off: in place among the others' contributions, and on a partial result
//!
//! A partial result is kept in the accumulator's type, so that it may travel between ranks and be folded further with
//! the bits that one rank folding everything would get.

use super::{BLOCK, fold_bytes_from, simd};
use crate::op::{Dtype, Element, ReduceOp, private::Arithmetic, with_element};

/// Bytes of the own contribution that are put aside at a time: with those of the others they fit in the first-level cache.
const ASIDE: usize = 4 << 10;

/// Replaces `data`, rank `rank`'s contribution, by the reduction of all `world` ranks' contributions in rank order.
/// `part` gives those of the others, as long as `data`.
///
/// As [`fold_bytes`](super::fold_bytes), which has the contributions apart from the result, and with the same bits.
pub(crate) fn fold_in_place<'a>(
    op: ReduceOp,
    dtype: Dtype,
    world: usize,
    rank: usize,
    part: &dyn Fn(usize) -> &'a [u8],
    data: &mut [u8],
) {
    let mut aside = [0u64; ASIDE / 8];
    let aside: &mut [u8] = bytemuck::cast_slice_mut(&mut aside);
    for (block, data) in data.chunks_mut(ASIDE).enumerate() {
        let (from, mine) = (block * ASIDE, &mut aside[..data.len()]);
        mine.copy_from_slice(data);
        let (mine, length) = (&*mine, data.len());
        let part = |peer: usize| if peer == rank { mine } else { &part(peer)[from..from + length] };
        fold_bytes_from(op, dtype, world, &part, data);
    }
}

/// Elements; none where the bytes are not whole and aligned, which the makers of all buffers see to.
fn cast<T: bytemuck::Pod>(bytes: &[u8]) -> &[T] {
    debug_assert!(bytemuck::try_cast_slice::<u8, T>(bytes).is_ok(), "unaligned buffer reached the fold");
    bytemuck::try_cast_slice(bytes).unwrap_or_default()
}

fn cast_mut<T: bytemuck::Pod>(bytes: &mut [u8]) -> &mut [T] {
    bytemuck::try_cast_slice_mut(bytes).unwrap_or_default()
}

/// Bytes of a partial result per element of `dtype`.
pub(crate) fn partial_bytes(dtype: Dtype) -> usize {
    with_element!(dtype, T => size_of::<<T as Arithmetic>::Acc>()).unwrap_or(1)
}

/// What a fold begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// The first contribution.
    Contribution,
    /// The partial result of the ranks before.
    Partial,
}

/// Folds contributions that follow each other in `parts`, each as long as `partial`, onto it, or begins it with the first
/// of them.
pub(crate) fn fold_onto(op: ReduceOp, dtype: Dtype, from: Begin, parts: &[u8], partial: &mut [u8]) {
    with_element!(dtype, T => simd::onto::<T>(op, from, cast(parts), cast_mut(partial)));
}

#[inline(always)]
pub(super) fn onto<T: Element>(op: ReduceOp, from: Begin, parts: &[T], acc: &mut [T::Acc]) {
    match op {
        ReduceOp::Sum | ReduceOp::Mean => onto_with(from, parts, acc, T::add),
        ReduceOp::Min => onto_with(from, parts, acc, T::min),
        ReduceOp::Max => onto_with(from, parts, acc, T::max),
        ReduceOp::Product => onto_with(from, parts, acc, T::mul),
    }
}

#[inline(always)]
fn onto_with<T: Element>(
    from: Begin,
    parts: &[T],
    acc: &mut [T::Acc],
    combine: impl Fn(T::Acc, T::Acc) -> T::Acc,
) {
    let length = acc.len().max(1);
    for (block, acc) in acc.chunks_mut(BLOCK).enumerate() {
        for (index, part) in parts.chunks(length).enumerate() {
            let x = part.get(block * BLOCK..).unwrap_or_default();
            if index == 0 && from == Begin::Contribution {
                acc.iter_mut().zip(x).for_each(|(a, x)| *a = x.widen());
            } else {
                acc.iter_mut().zip(x).for_each(|(a, x)| *a = combine(*a, x.widen()));
            }
        }
    }
}

/// Rounds the partial result of all `world` ranks to the element type.
pub(crate) fn finish(op: ReduceOp, dtype: Dtype, world: usize, partial: &[u8], out: &mut [u8]) {
    with_element!(dtype, T => simd::rounded::<T>(op, world, cast(partial), cast_mut(out)));
}

#[inline(always)]
pub(super) fn rounded<T: Element>(op: ReduceOp, world: usize, partial: &[T::Acc], out: &mut [T]) {
    let pairs = out.iter_mut().zip(partial);
    if op == ReduceOp::Mean {
        pairs.for_each(|(x, a)| *x = <T as Arithmetic>::narrow(T::mean(*a, world)));
    } else {
        pairs.for_each(|(x, a)| *x = <T as Arithmetic>::narrow(*a));
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::reduce::fold;

    fn check<T: Element>(op: ReduceOp, all: &[Vec<T>], cut: usize) {
        let (world, length) = (all.len(), all[0].len());
        let parts: Vec<&[T]> = all.iter().map(Vec::as_slice).collect();
        let mut expected = vec![T::zeroed(); length];
        fold(op, &parts, &mut expected);
        let expected: &[u8] = bytemuck::cast_slice(&expected);
        for rank in 0..world {
            let mut data = all[rank].clone();
            let part = |peer: usize| bytemuck::cast_slice(&all[peer]);
            fold_in_place(op, T::DTYPE, world, rank, &part, bytemuck::cast_slice_mut(&mut data));
            assert_eq!(bytemuck::cast_slice::<T, u8>(&data), expected);
        }
        let mut partial = vec![0u64; (length * partial_bytes(T::DTYPE)).div_ceil(8)];
        let partial = &mut bytemuck::cast_slice_mut(&mut partial)[..length * partial_bytes(T::DTYPE)];
        let mut from = Begin::Contribution;
        for some in [&all[..cut], &all[cut..]] {
            let together: Vec<T> = some.concat();
            if !some.is_empty() {
                fold_onto(op, T::DTYPE, from, bytemuck::cast_slice(&together), partial);
                from = Begin::Partial;
            }
        }
        let mut out = vec![T::zeroed(); length];
        finish(op, T::DTYPE, world, partial, bytemuck::cast_slice_mut(&mut out));
        assert_eq!(bytemuck::cast_slice::<T, u8>(&out), expected);
    }

    proptest! {
        #[test]
        fn folds_in_place_and_in_steps_have_the_bits_of_the_whole_fold(
            length in 0usize..1500, world in 1usize..6, cut in 0usize..6, seed: u64,
        ) {
            let mut state = seed | 1;
            let mut next = || { state = state.wrapping_mul(6364136223846793005).wrapping_add(1); (state >> 33) as i32 as f32 / 7e4 - 15e3 };
            let floats: Vec<Vec<f32>> = (0..world).map(|_| (0..length).map(|_| next()).collect()).collect();
            let halves: Vec<Vec<bf16>> = floats.iter().map(|v| v.iter().map(|x| bf16::from_f32(*x)).collect()).collect();
            let bytes: Vec<Vec<u8>> = floats.iter().map(|v| v.iter().map(|x| *x as i64 as u8).collect()).collect();
            for op in ReduceOp::ALL {
                check(op, &floats, cut.min(world));
                check(op, &halves, cut.min(world));
                if op.allows(Dtype::U8) {
                    check(op, &bytes, cut.min(world));
                }
            }
        }
    }
}
