//! Weights by columns, in vector registers.
//!
//! Every element of a product is one chain of multiply-adds in the order of the inner dimension, whatever is computed
//! beside it: a column's bits depend neither on its place nor on how many columns there are.
#![allow(unsafe_code)]

use super::super::lanes::LANES;
use super::Vectors;
#[cfg(target_arch = "x86_64")]
use super::registers::x86;
use super::registers::{Lanes, Plain, for_shape, for_vectors};

/// Asks for a line of memory that will be needed soon.
#[inline(always)]
fn prefetch(line: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE, which every x86-64 processor has. It is a hint that reads nothing the program could see and never
    // faults, so the address may lie past the end of the weights.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// `acc[g][r] = sum over i of w[r][i] * x[g][i]`, each `x[g][i]` and `acc[g][r]` being 16 columns.
///
/// # Safety
/// The processor has `V`'s instructions; `w` is `R * k` elements, each of `x` is `k * 16`, `acc` is `G * R * 16`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "a sum is found by both of its indices")]
unsafe fn product_of<V: Lanes, const R: usize, const G: usize>(
    (w, k, x, ahead, acc): (*const f32, usize, [*const f32; G], Ahead, *mut f32),
) {
    // SAFETY: `i < k` and `r < R`, so every address lies in the arrays that the caller vouches for; `V` is at hand.
    unsafe {
        let mut sums = [[V::splat(0.0); R]; G];
        let step = |i: usize, sums: &mut [[V; R]; G]| {
            let mut columns = [V::splat(0.0); G];
            for (column, x) in columns.iter_mut().zip(x) {
                *column = V::load(x.add(i * LANES));
            }
            for r in 0..R {
                let weight = V::splat(*w.add(r * k + i));
                for g in 0..G {
                    sums[g][r] = weight.mul_add(columns[g], sums[g][r]);
                }
            }
        };
        let whole = k - k % LANES;
        for block in (0..whole).step_by(LANES) {
            if matches!(ahead, Ahead::NextRows) {
                for line in 0..R {
                    prefetch(w.wrapping_add(R * k + block * R + line * LANES));
                }
            }
            for i in 0..LANES {
                step(block + i, &mut sums);
            }
        }
        for i in whole..k {
            step(i, &mut sums);
        }
        for (g, sums) in sums.iter().enumerate() {
            for (r, sum) in sums.iter().enumerate() {
                sum.store(acc.add((g * R + r) * LANES));
            }
        }
    }
}

/// What to ask the memory for during a product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ahead {
    /// As many rows as are being multiplied, behind them.
    NextRows,
    /// Nothing: they are near already.
    Nothing,
}

/// How many rows one call of [`product`] can take, for one or two groups of columns, most first; the last is 1.
pub(crate) fn heights(vectors: Vectors, groups: usize) -> &'static [usize] {
    match vectors {
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 if groups == 1 => &[24, 12, 4, 1],
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 => &[12, 4, 1],
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2 => &[6, 2, 1],
        Vectors::Plain => &[4, 1],
    }
}

/// Multiplies rows of weights with one or two groups of 16 columns: `acc[g][r] = sum over i of w[r][i] * x[g][i]`.
///
/// `w` is `[rows, k]`, each of `x` `[k, 16]`, `acc` `[groups, rows, 16]`; `rows` is one of [`heights`]. Gives `false`,
/// and computes nothing, for another number of rows or groups, or slices that are too short.
#[must_use]
pub(crate) fn product(
    vectors: Vectors,
    rows: usize,
    w: &[f32],
    x: &[&[f32]],
    ahead: Ahead,
    acc: &mut [f32],
) -> bool {
    let k = w.len() / rows.max(1);
    let fits = k * rows == w.len()
        && x.iter().all(|x| x.len() >= k * LANES)
        && acc.len() >= rows * x.len() * LANES
        && vectors.at_hand();
    if !fits {
        return false;
    }
    if let ([first, second], false) = (x, heights(vectors, 2).contains(&12)) {
        // Too few registers for two groups: one after the other, while the rows are near.
        let (one, two) = acc.split_at_mut(rows * LANES);
        return product(vectors, rows, w, &[first], ahead, one)
            && product(vectors, rows, w, &[second], Ahead::Nothing, two);
    }
    // SAFETY: the lengths were compared above, and `at_hand` has asked the processor for the instructions.
    unsafe { on_vectors(vectors, rows, w.as_ptr(), k, x, ahead, acc.as_mut_ptr()) }
}

for_vectors!(on_vectors(rows: usize, w: *const f32, k: usize, x: &[&[f32]], ahead: Ahead, acc: *mut f32), of all);

/// # Safety
/// Those of `product_of`.
#[inline(always)]
unsafe fn all<V: Lanes>(
    rows: usize,
    w: *const f32,
    k: usize,
    x: &[&[f32]],
    ahead: Ahead,
    acc: *mut f32,
) -> bool {
    // SAFETY: this function's own contract.
    unsafe {
        match x {
            [x] => {
                let x = [x.as_ptr()];
                let args = (w, k, x, ahead, acc);
                for_shape!(
                    product_of,
                    V,
                    (rows, 1),
                    [(24, 1), (12, 1), (6, 1), (4, 1), (2, 1), (1, 1)],
                    (args)
                );
            }
            [a, b] => {
                let args = (w, k, [a.as_ptr(), b.as_ptr()], ahead, acc);
                for_shape!(product_of, V, (rows, 2), [(12, 2), (4, 2), (1, 2)], (args));
            }
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mix = |i: u32| i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8;
        (0..count as u32).map(|i| mix(i) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    #[test]
    fn every_set_of_instructions_gives_one_chain_of_fused_multiply_adds_for_each_element() {
        for (groups, k) in [(1, 40), (2, 40), (1, 7), (2, 16)] {
            for vectors in Vectors::ALL.iter().copied().filter(|v| v.at_hand()) {
                for rows in heights(vectors, groups).iter().copied() {
                    let (w, x) = (numbers(rows * k, 1), numbers(groups * k * LANES, 2));
                    let columns: Vec<&[f32]> = x.chunks(k * LANES).collect();
                    let mut acc = vec![f32::NAN; groups * rows * LANES];
                    assert!(product(vectors, rows, &w, &columns, Ahead::NextRows, &mut acc));
                    for (at, got) in acc.iter().enumerate() {
                        let (g, r, lane) = (at / LANES / rows, at / LANES % rows, at % LANES);
                        let term = |i: usize| (w[r * k + i], columns[g][i * LANES + lane]);
                        let fused = (0..k).fold(0.0_f32, |sum, i| term(i).0.mul_add(term(i).1, sum));
                        let apart = (0..k).fold(0.0_f32, |sum, i| term(i).0 * term(i).1 + sum);
                        let plain = vectors == Vectors::Plain && cfg!(target_arch = "x86_64");
                        assert_eq!(
                            *got,
                            if plain { apart } else { fused },
                            "{vectors:?} {rows} {groups} {at}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn slices_that_are_too_short_are_refused() {
        let (x, mut acc) = (vec![0.0; 8 * LANES], vec![0.0; 4 * LANES]);
        let v = Vectors::widest();
        assert!(product(v, 4, &[0.0; 32], &[&x], Ahead::Nothing, &mut acc));
        assert!(!product(v, 4, &[0.0; 33], &[&x], Ahead::Nothing, &mut acc));
        assert!(!product(v, 4, &[0.0; 36], &[&x], Ahead::Nothing, &mut acc));
        assert!(!product(v, 4, &[0.0; 32], &[&x, &x], Ahead::Nothing, &mut acc));
        assert!(!product(v, 5, &[0.0; 40], &[&x], Ahead::Nothing, &mut acc));
    }
}
