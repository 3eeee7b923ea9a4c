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
