//! Attention over pages of keys and values, in vector registers.
//!
//! A score is one chain of multiply-adds over the head's elements, an output one chain over the tokens in their order:
//! neither depends on what else is computed.
#![allow(unsafe_code)]

use super::super::lanes::LANES;
use super::Vectors;
#[cfg(target_arch = "x86_64")]
use super::registers::x86;
use super::registers::{Lanes, Plain, for_shape, for_vectors};

/// Scores of `H` query heads against `P` pages of keys `[dim, 16]`.
///
/// # Safety
/// The processor has `V`'s instructions; `q` is `[H, dim]`, each page `dim * 16` elements; head `h`'s scores of page `p`
/// go to `scores + h * stride + p * 16`, and 16 elements may be written there.
#[inline(always)]
unsafe fn scores_of<V: Lanes, const H: usize, const P: usize>(
    (q, dim, pages, scores, stride): (*const f32, usize, [*const f32; P], *mut f32, usize),
) {
    // SAFETY: `d < dim`, `h < H` and `p < P`, so every address is one that the caller vouches for; `V` is at hand.
    unsafe {
        let mut sums = [[V::splat(0.0); P]; H];
        for d in 0..dim {
            let mut keys = [V::splat(0.0); P];
            for (key, page) in keys.iter_mut().zip(pages) {
                *key = V::load(page.add(d * LANES));
            }
            for (h, sums) in sums.iter_mut().enumerate() {
                let q = V::splat(*q.add(h * dim + d));
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = q.mul_add(key, *sum);
                }
            }
        }
        for (h, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                sum.store(scores.add(h * stride + p * LANES));
            }
        }
    }
}

/// Weights, their stride, tokens, pages, the first element wanted, the width, the sums.
type Values<'a> = (*const f32, usize, usize, &'a [&'a [f32]], usize, usize, *mut f32);

/// Adds the values of `count` tokens, `[16, width]` a page, weighted: 16 or 64 elements (`C` vectors) of `H` heads.
///
/// # Safety
/// The processor has `V`'s instructions; `p` is `[H, stride]` with `stride >= count`; `pages` holds `count` tokens,
/// each page `[16, width]`; `out` is `[H, width]`; `offset + C * 16 <= width`.
#[inline(always)]
unsafe fn values_of<V: Lanes, const H: usize, const C: usize>(
    (p, stride, count, pages, offset, width, out): Values<'_>,
) {
    // SAFETY: token `t` of page `i` is read while `i * 16 + t < count`; the rest is the caller's word.
    unsafe {
        let mut sums = [[V::splat(0.0); C]; H];
        for (i, page) in pages.iter().enumerate() {
            let page = page.as_ptr().add(offset);
            for t in 0..LANES.min(count - i * LANES) {
                let mut values = [V::splat(0.0); C];
                for (c, value) in values.iter_mut().enumerate() {
                    *value = V::load(page.add(t * width + c * LANES));
                }
                for (h, sums) in sums.iter_mut().enumerate() {
                    let p = V::splat(*p.add(h * stride + i * LANES + t));
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = p.mul_add(value, *sum);
                    }
                }
            }
        }
        for (h, sums) in sums.iter().enumerate() {
            for (c, sum) in sums.iter().enumerate() {
                sum.store(out.add(h * width + offset + c * LANES));
            }
        }
    }
}

/// Most query heads that [`scores`] and [`values`] take at once.
pub(crate) const MOST_HEADS: usize = 4;

/// Scores `[heads, stride]` of query heads `q` `[heads, dim]` against pages of keys, each `[dim, 16]`.
///
/// At most [`MOST_HEADS`] heads. Gives `false`, and computes nothing, for slices that are too short.
#[must_use]
pub(crate) fn scores(
    vectors: Vectors,
    q: &[f32],
    dim: usize,
    pages: &[&[f32]],
    scores: &mut [f32],
    stride: usize,
) -> bool {
    let heads = q.len() / dim.max(1);
    let fits = dim > 0
        && (1..=MOST_HEADS).contains(&heads)
        && pages.iter().all(|page| page.len() >= dim * LANES)
        && stride >= pages.len() * LANES
        && scores.len() >= heads * stride
        && vectors.at_hand();
    if !fits {
        return false;
    }

    // SAFETY: the lengths were compared above, and `at_hand` has asked the processor for the instructions.
    unsafe { scores_on(vectors, heads, q.as_ptr(), dim, pages, scores.as_mut_ptr(), stride) }
}

for_vectors!(
    scores_on(heads: usize, q: *const f32, dim: usize, pages: &[&[f32]], scores: *mut f32, stride: usize),
    of all_scores
);

/// # Safety
/// Those of `scores_of`, for every page.
#[inline(always)]
unsafe fn all_scores<V: Lanes>(
    heads: usize,
    q: *const f32,
    dim: usize,
    pages: &[&[f32]],
    scores: *mut f32,
    stride: usize,
) -> bool {
    let (fours, ones) = pages.as_chunks::<4>();
    // SAFETY: page `p` has its own 16 elements of every head's `stride`; the rest is this function's contract.
    unsafe {
        for (at, pages) in fours.iter().enumerate() {
            let args = (q, dim, pages.map(<[f32]>::as_ptr), scores.add(at * 4 * LANES), stride);
            for_shape!(scores_of, V, (heads, 4), [(1, 4), (2, 4), (3, 4), (4, 4)], (args));
        }
        for (at, page) in ones.iter().enumerate() {
            let args = (q, dim, [page.as_ptr()], scores.add((fours.len() * 4 + at) * LANES), stride);
            for_shape!(scores_of, V, (heads, 1), [(1, 1), (2, 1), (3, 1), (4, 1)], (args));
        }
    }
    true
}

/// Sums of `count` tokens' values, each page `[16, width]`, weighted by `p` `[heads, stride]`, into `out`
/// `[heads, width]`.
///
/// At most [`MOST_HEADS`] heads; `width` is a multiple of 16. Gives `false`, and computes nothing, for other sizes or
/// slices that are too short.
#[must_use]
pub(crate) fn values(
    vectors: Vectors,
    p: &[f32],
    stride: usize,
    count: usize,
    pages: &[&[f32]],
    width: usize,
    out: &mut [f32],
) -> bool {
    let heads = out.len() / width.max(1);
    let fits = width > 0
        && width.is_multiple_of(LANES)
        && (1..=MOST_HEADS).contains(&heads)
        && p.len() >= heads * stride
        && stride >= count
        && pages.len() == count.div_ceil(LANES)
        && pages.iter().all(|page| page.len() >= width * LANES)
        && vectors.at_hand();
    if !fits {
        return false;
    }

    // SAFETY: the lengths were compared above, and `at_hand` has asked the processor for the instructions.
    unsafe { values_on(vectors, heads, p.as_ptr(), stride, count, pages, width, out.as_mut_ptr()) }
}

for_vectors!(
    values_on(
        heads: usize, p: *const f32, stride: usize, count: usize, pages: &[&[f32]], width: usize, out: *mut f32
    ),
    of all_values
);

/// # Safety
/// Those of `values_of`, for every part of the width.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn all_values<V: Lanes>(
    heads: usize,
    p: *const f32,
    stride: usize,
    count: usize,
    pages: &[&[f32]],
    width: usize,
    out: *mut f32,
) -> bool {
    let mut at = 0;
    while at < width {
        let vectors = if width - at >= 4 * LANES { 4 } else { 1 };
        let args = (p, stride, count, pages, at, width, out);
        // SAFETY: `at + vectors * 16 <= width`; the rest is this function's contract.
        unsafe {
            for_shape!(
                values_of,
                V,
                (heads, vectors),
                [(1, 1), (2, 1), (3, 1), (4, 1), (1, 4), (2, 4), (3, 4), (4, 4)],
                (args)
            );
        }
        at += vectors * LANES;
    }
    true
}
