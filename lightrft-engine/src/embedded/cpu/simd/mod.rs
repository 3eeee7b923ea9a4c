//! Loops compiled for wider vectors than the target has, taken where the processor has them; this crate's unsafe fence
//!
//! Each loop is written once, in safe code, and compiled for each set of instructions. Where there is a fused
//! multiply-add all of them use it in the same order, so machines with AVX2, AVX-512 or NEON compute the same bits.
#![allow(unsafe_code)]

mod page;
mod product;
mod registers;

use super::lanes;
pub(super) use page::{MOST_HEADS, scores, values};
pub(super) use product::{Ahead, heights, product};

/// A set of vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vectors {
    /// What every machine of the target has.
    Plain,
    /// AVX2 and fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The parts of AVX-512 that servers have had since 2017.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// How [`Vectors::Plain`] rounds.
#[cfg(target_arch = "x86_64")]
type PlainArithmetic = lanes::Apart;
#[cfg(not(target_arch = "x86_64"))]
type PlainArithmetic = lanes::Fused;

impl Vectors {
    /// Every set of the target, the widest first.
    pub(crate) const ALL: &[Vectors] = &[
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512,
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2,
        Vectors::Plain,
    ];

    /// Whether this processor has them. The standard library asks it once and remembers.
    pub(crate) fn at_hand(self) -> bool {
        match self {
            Vectors::Plain => true,
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => {
                Vectors::Avx2.at_hand()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
    }

    /// The widest that this processor has.
    pub(crate) fn widest() -> Self {
        Self::ALL.iter().copied().find(|vectors| vectors.at_hand()).unwrap_or(Vectors::Plain)
    }
}

/// Makes `$name`, which runs `$plain` (an `inline(always)` function of the same arguments, generic over its arithmetic)
/// compiled for the vectors that are named first, or for those of the target where the processor lacks them.
macro_rules! compiled_for_each {
    ($(#[$doc:meta])* $name:ident ($($arg:ident: $type:ty),*) $(-> $out:ty)?, of $($plain:ident)::+) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn $name(vectors: Vectors, $($arg: $type),*) $(-> $out)? {
            #[inline(never)]
            fn plain($($arg: $type),*) $(-> $out)? {
                $($plain)::+::<PlainArithmetic>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) $(-> $out)? {
                $($plain)::+::<lanes::Fused>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($arg: $type),*) $(-> $out)? {
                $($plain)::+::<lanes::Fused>($($arg),*)
            }

            match vectors {
                // SAFETY: `at_hand` has asked the processor for AVX2 and FMA, which is all that this function needs
                // beyond the target's features.
                #[cfg(target_arch = "x86_64")]
                Vectors::Avx2 if vectors.at_hand() => unsafe { avx2($($arg),*) },
                // SAFETY: as above, for the parts of AVX-512 that this function names.
                #[cfg(target_arch = "x86_64")]
                Vectors::Avx512 if vectors.at_hand() => unsafe { avx512($($arg),*) },
                _ => plain($($arg),*),
            }
        }
    };
}

compiled_for_each! {
    /// The greatest element, -inf of none; NaN if any is NaN or +inf.
    greatest(row: &[f32]) -> f32, of lanes::greatest
}

compiled_for_each! {
    /// [`lanes::weigh`].
    weigh(row: &[f32], most: f32, temperature: f32, least: f32, weights: &mut [f32], sums: &mut [f64]),
    of lanes::weigh
}

compiled_for_each! {
    /// The sum of `exp(x - most)`, taken in f64.
    sum_exp(row: &[f32], most: f32) -> f64, of lanes::sum_exp
}

compiled_for_each! {
    /// `sum += more`, element by element.
    add(sum: &mut [f32], more: &[f32]), of lanes::add
}

compiled_for_each! {
    /// `silu(gate) * up`, element by element, into `gate`.
    swiglu(gate: &mut [f32], up: &[f32]), of lanes::swiglu
}

compiled_for_each! {
    /// [`lanes::softmax`].
    softmax(scores: &mut [f32], count: usize, scale: f32) -> f32, of lanes::softmax
}

compiled_for_each! {
    /// [`lanes::rms_norm`].
    rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]), of lanes::rms_norm
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers without a pattern, of many sizes.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mix = |i: u32| i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8;
        (0..count as u32).map(|i| (mix(i) as f32 / (1 << 23) as f32 - 1.0) * (1 << (i % 5)) as f32).collect()
    }

    /// What every loop gives for a row of `count` elements, as bits.
    fn all(vectors: Vectors, count: usize) -> Vec<(&'static str, Vec<u64>)> {
        let bits = |values: &[f32]| values.iter().map(|x| u64::from(x.to_bits())).collect::<Vec<_>>();
        let (row, other) = (numbers(count, 1), numbers(count, 2));
        let most = greatest(vectors, &row);
        let mut given = vec![("greatest", bits(&[most]))];
        given.push(("sum_exp", vec![sum_exp(vectors, &row, most).to_bits()]));
        for least in [0.0, 0.05] {
            let (mut weights, mut sums) = (vec![0.0; count], vec![0.0; count.div_ceil(lanes::BLOCK)]);
            weigh(vectors, &row, most, 0.7, least, &mut weights, &mut sums);
            given.push(("weigh", bits(&weights)));
            given.push(("weigh's sums", sums.iter().map(|sum| sum.to_bits()).collect()));
        }
        let mut out = row.clone();
        add(vectors, &mut out, &other);
        given.push(("add", bits(&out)));
        out.clone_from(&row);
        swiglu(vectors, &mut out, &other);
        given.push(("swiglu", bits(&out)));
        let columns = numbers(count * lanes::LANES, 5);
        out = vec![0.0; columns.len()];
        rms_norm(vectors, &columns, &row, 1e-6, &mut out);
        given.push(("rms_norm", bits(&out)));
        out = numbers(count.next_multiple_of(lanes::LANES), 1);
        let total = softmax(vectors, &mut out, count, 0.3);
        given.push(("softmax", bits(&out)));
        given.push(("softmax's sum", bits(&[total])));

        // The row as pages of 16 tokens, whose heads are as wide as four vectors and one.
        let (heads, dim) = (3, 5 * lanes::LANES);
        let pages: Vec<Vec<f32>> =
            (0..count.div_ceil(lanes::LANES)).map(|at| numbers(dim * lanes::LANES, at as u32)).collect();
        let pages: Vec<&[f32]> = pages.iter().map(Vec::as_slice).collect();
        let stride = pages.len() * lanes::LANES;
        let mut products = vec![0.0; heads * stride];
        assert!(scores(vectors, &numbers(heads * dim, 3), dim, &pages, &mut products, stride));
        given.push(("scores", bits(&products)));
        let mut sums = vec![0.0; heads * dim];
        assert!(values(vectors, &numbers(heads * stride, 4), stride, count, &pages, dim, &mut sums));
        given.push(("values", bits(&sums)));
        given
    }

    /// Plain vectors of x86-64 have no fused multiply-add, and round otherwise: they promise the same bits only among
    /// themselves.
    #[test]
    fn every_loop_gives_the_same_bits_with_every_set_of_instructions_that_fuses() {
        let fuses = |v: &Vectors| *v != Vectors::Plain || cfg!(not(target_arch = "x86_64"));
        let sets: Vec<Vectors> = Vectors::ALL.iter().copied().filter(|v| v.at_hand() && fuses(v)).collect();
        for count in [1, 7, 16, 17, 100, 513, 1100] {
            for vectors in &sets {
                assert_eq!(
                    all(*vectors, count),
                    all(sets[0], count),
                    "{vectors:?} and {:?}, {count}",
                    sets[0]
                );
            }
        }
        println!("compared: {sets:?}");
    }
}
