//! The fold behind every reduction: contributions in rank order, one accumulator, one rounding

mod partial;
mod simd;

pub(crate) use self::partial::{Begin, finish, fold_in_place, fold_onto, partial_bytes};

use crate::op::{Dtype, Element, ReduceOp, private::Arithmetic, with_element};

/// Elements folded at a time when there are many parts: the accumulators fit in the first-level cache.
const BLOCK: usize = 512;

/// `out[i] = parts[0][i] (op) parts[1][i] (op) ...`, in the order of `parts`; a mean is over `parts.len()`.
///
/// `out` and every part have the same length; anything longer than the shortest is left alone.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fold<T: Element>(op: ReduceOp, parts: &[&[T]], out: &mut [T]) {
    simd::fold(op, parts.len(), &|rank| parts[rank], out);
}

/// Contributions given one by one, by rank: no list of them has to be made. Behind a pointer, so that there is one fold
/// for each type and operation and not one for each place that calls it.
type Parts<'f, 'a, T> = &'f dyn Fn(usize) -> &'a [T];

/// As [`fold`], with the parts of ranks `0..n` given one by one.
#[inline(always)]
fn fold_from<T: Element>(op: ReduceOp, n: usize, part: Parts<'_, '_, T>, out: &mut [T]) {
    match op {
        ReduceOp::Sum => fold_with(n, part, out, T::add, |acc| acc),
        ReduceOp::Mean => fold_with(n, part, out, T::add, |acc| T::mean(acc, n)),
        ReduceOp::Min => fold_with(n, part, out, T::min, |acc| acc),
        ReduceOp::Max => fold_with(n, part, out, T::max, |acc| acc),
        ReduceOp::Product => fold_with(n, part, out, T::mul, |acc| acc),
    }
}

#[inline(always)]
fn fold_with<T: Element>(
    n: usize,
    part: Parts<'_, '_, T>,
    out: &mut [T],
    combine: impl Fn(T::Acc, T::Acc) -> T::Acc,
    finish: impl Fn(T::Acc) -> T::Acc,
) {
    let done = |acc| <T as Arithmetic>::narrow(finish(acc));
    match n {
        0 => {}
        1 => out.iter_mut().zip(part(0)).for_each(|(o, a)| *o = done(a.widen())),
        // One pass over memory, accumulators in registers.
        2 => {
            let parts = part(0).iter().zip(part(1));
            out.iter_mut().zip(parts).for_each(|(o, (a, b))| *o = done(combine(a.widen(), b.widen())));
        }
        3 => {
            let parts = part(0).iter().zip(part(1)).zip(part(2));
            out.iter_mut().zip(parts).for_each(|(o, ((a, b), c))| {
                *o = done(combine(combine(a.widen(), b.widen()), c.widen()));
            });
        }
        4 => {
            let parts = part(0).iter().zip(part(1)).zip(part(2)).zip(part(3));
            out.iter_mut().zip(parts).for_each(|(o, (((a, b), c), d))| {
                *o = done(combine(combine(combine(a.widen(), b.widen()), c.widen()), d.widen()));
            });
        }
        _ if out.len() <= BLOCK / 8 => {
            for (i, o) in out.iter_mut().enumerate() {
                let value = |rank: usize| part(rank).get(i).map(|x| x.widen());
                let Some(first) = value(0) else { break };
                *o = done((1..n).filter_map(value).fold(first, &combine));
            }
        }
        _ => {
            let mut acc: [T::Acc; BLOCK] = [<T as bytemuck::Zeroable>::zeroed().widen(); BLOCK];
            for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                let from = block * BLOCK;
                let acc = &mut acc[..out.len()];
                for (a, x) in acc.iter_mut().zip(part(0).get(from..).unwrap_or(&[])) {
                    *a = x.widen();
                }
                for rank in 1..n {
                    for (a, x) in acc.iter_mut().zip(part(rank).get(from..).unwrap_or(&[])) {
                        *a = combine(*a, x.widen());
                    }
                }
                out.iter_mut().zip(acc.iter()).for_each(|(o, a)| *o = done(*a));
            }
        }
    }
}

/// [`fold`] over the bytes of elements of `dtype`.
///
/// The callers' buffers are aligned by construction ([`crate::buffer`]); a part that is not, or whose dtype
/// has no arithmetic (which [`crate::Operation::check`] has refused before), leaves `out` as it is.
pub(crate) fn fold_bytes(op: ReduceOp, dtype: Dtype, parts: &[&[u8]], out: &mut [u8]) {
    fold_bytes_from(op, dtype, parts.len(), &|rank| parts[rank], out);
}

/// As [`fold_bytes`], with the parts given one by one.
pub(crate) fn fold_bytes_from(op: ReduceOp, dtype: Dtype, n: usize, part: Parts<'_, '_, u8>, out: &mut [u8]) {
    with_element!(dtype, T => {
        let Ok(out) = bytemuck::try_cast_slice_mut::<u8, T>(out) else {
            debug_assert!(false, "unaligned buffer reached the fold");
            return;
        };
        let typed = |rank: usize| {
            let part: Result<&[T], _> = bytemuck::try_cast_slice(part(rank));
            debug_assert!(part.is_ok(), "unaligned buffer reached the fold");
            part.unwrap_or(&[])
        };
        simd::fold(op, n, &typed, out);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    #[test]
    fn sums_of_bf16_round_once() {
        // 256 + 1 + 1 is 258 in f32; rounding to bf16 after each step would stay at 256.
        let parts = [[bf16::from_f32(256.0)], [bf16::ONE], [bf16::ONE]];
        let mut out = [bf16::ZERO];
        fold(ReduceOp::Sum, &[&parts[0], &parts[1], &parts[2]], &mut out);
        assert_eq!(out[0].to_f32(), 258.0);
    }

    #[test]
    fn contributions_are_combined_in_rank_order() {
        // In f32, 1e8 + 1 is 1e8: only from the left the one is lost before the large terms cancel.
        let mut out = [7f32];
        fold(ReduceOp::Sum, &[&[1e8], &[1.0], &[-1e8]], &mut out);
        assert_eq!(out, [0.0]);
        fold(ReduceOp::Sum, &[&[1e8], &[-1e8], &[1.0]], &mut out);
        assert_eq!(out, [1.0]);
    }

    #[test]
    fn nan_wins_in_min_and_max_wherever_it_stands() {
        for parts in [[f32::NAN, 1.0, 2.0], [1.0, f32::NAN, 2.0], [1.0, 2.0, f32::NAN]] {
            for op in [ReduceOp::Min, ReduceOp::Max] {
                let mut out = [0.0];
                fold(op, &[&parts[0..1], &parts[1..2], &parts[2..3]], &mut out);
                assert!(out[0].is_nan(), "{op} of {parts:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn wider_vectors_change_no_bit(bits: Vec<u32>, n in 1usize..7, op in 0usize..5) {
            let parts: Vec<Vec<f32>> = (0..n as u32)
                .map(|rank| bits.iter().map(|b| f32::from_bits(b.rotate_left(5 * rank))).collect())
                .collect();
            let part = |rank: usize| &parts[rank][..];
            let (mut plain, mut wide) = (vec![0f32; bits.len()], vec![0f32; bits.len()]);
            fold_from(ReduceOp::ALL[op], n, &part, &mut plain);
            simd::fold(ReduceOp::ALL[op], n, &part, &mut wide);
            for (a, b) in plain.iter().zip(&wide) {
                prop_assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
            }
        }

        #[test]
        fn the_fold_of_a_vector_is_the_fold_of_its_chunks(
            len in 0usize..3000, cut in 0usize..3000, ranks in 1usize..5, seed: u64,
        ) {
            let mut state = seed | 1;
            let mut next = || { state = state.wrapping_mul(6364136223846793005).wrapping_add(1); (state >> 40) as f32 / 1e3 - 8e3 };
            let parts: Vec<Vec<f32>> = (0..ranks).map(|_| (0..len).map(|_| next()).collect()).collect();
            let cut = cut.min(len);
            let all: Vec<&[f32]> = parts.iter().map(|p| &p[..]).collect();
            let (mut whole, mut pieces) = (vec![0.0; len], vec![0.0; len]);
            fold(ReduceOp::Mean, &all, &mut whole);
            let left: Vec<&[f32]> = parts.iter().map(|p| &p[..cut]).collect();
            let right: Vec<&[f32]> = parts.iter().map(|p| &p[cut..]).collect();
            fold(ReduceOp::Mean, &left, &mut pieces[..cut]);
            fold(ReduceOp::Mean, &right, &mut pieces[cut..]);
            prop_assert_eq!(whole, pieces);
        }
    }
}
