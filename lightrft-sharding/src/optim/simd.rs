//! The optimizer's loops compiled for wider vectors than the target has, taken where the processor has them; one of this
//! crate's unsafe fences
//!
//! Each loop is written once, in safe code, and compiled three times. The operations of an element are the same in all
//! three and in the same order, so the bits are too: a product and the sum it goes into are rounded apart, always. A
//! fused multiply-add would round once, and a machine without the instruction would either differ or call a function for
//! each; it would gain nothing, since these loops wait for memory.
#![allow(unsafe_code)]

use super::kernel::{self, Arrays, BLOCK, Scalars};
use super::narrow::Narrow;
use super::norm;

/// A set of vector instructions, ordered by width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Vectors {
    /// What every machine of the target has.
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Vectors {
    pub(super) const ALL: &[Vectors] = &[
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512,
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2,
        Vectors::Plain,
    ];

    /// Whether this processor has them. The standard library asks it once and remembers.
    pub(super) fn at_hand(self) -> bool {
        match self {
            Vectors::Plain => true,
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2 => std::arch::is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => {
                std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
            }
        }
    }

    pub(super) fn widest() -> Self {
        Self::ALL.iter().copied().find(|vectors| vectors.at_hand()).unwrap_or(Vectors::Plain)
    }
}

/// Makes `$name`, which runs `$plain` (an `inline(always)` function of the same arguments) compiled for the vectors that
/// are named first, or for those of the target where the processor lacks them.
macro_rules! compiled_for_each {
    ($(#[$doc:meta])* $name:ident $(<$T:ident: $bound:ident>)? ($($arg:ident: $type:ty),*) $(-> $out:ty)?, of $plain:path) => {
        $(#[$doc])*
        pub(super) fn $name $(<$T: $bound>)? (vectors: Vectors, $($arg: $type),*) $(-> $out)? {
            #[inline(never)]
            fn plain $(<$T: $bound>)? ($($arg: $type),*) $(-> $out)? {
                $plain($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2 $(<$T: $bound>)? ($($arg: $type),*) $(-> $out)? {
                $plain($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512 $(<$T: $bound>)? ($($arg: $type),*) $(-> $out)? {
                $plain($($arg),*)
            }

            match vectors {
                // SAFETY: `at_hand` has asked the processor for AVX2, which is all that this function needs beyond the
                // target's features.
                #[cfg(target_arch = "x86_64")]
                Vectors::Avx2 if vectors.at_hand() => unsafe { avx2($($arg),*) },
                // SAFETY: as above, for the four parts of AVX-512 that this function names.
                #[cfg(target_arch = "x86_64")]
                Vectors::Avx512 if vectors.at_hand() => unsafe { avx512($($arg),*) },
                _ => plain($($arg),*),
            }
        }
    };
}

compiled_for_each! {
    /// [`kernel::step_slices`].
    step<C: Narrow>(arrays: Arrays<'_>, copy: &mut [C], scalars: Scalars), of kernel::step_slices
}

compiled_for_each! {
    /// [`kernel::copy_slices`].
    copy<C: Narrow>(from: &[f32], to: &mut [C]), of kernel::copy_slices
}

compiled_for_each! {
    /// [`kernel::blend_slices`].
    blend(average: &mut [f32], value: &[f32], weight: f32), of kernel::blend_slices
}

compiled_for_each! {
    /// [`norm::squares`].
    squares(values: &[f32]) -> f64, of norm::squares
}

/// Asks for the memory that a loop over `block` and those after it will come to some blocks later. The processor
/// follows one array by itself, but these loops read four or five at once, and it loses the trail at every page.
#[inline(always)]
pub(super) fn prefetch<T>(block: &[T; BLOCK]) {
    /// Elements ahead: what one core handles in about the time that memory takes to answer (measured: 256 to 512 are
    /// best, at 1,024 part of it has left the nearest cache again).
    const AHEAD: usize = 512;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        const LINE: usize = 64;
        let from = block.as_ptr().wrapping_add(AHEAD).cast::<i8>();
        for line in 0..size_of::<[T; BLOCK]>() / LINE {
            // SAFETY: SSE, which every x86-64 processor has. It is a hint that reads nothing the program could see and
            // never faults, so the address may lie past the end of the array (and is made without leaving the rules
            // for pointers, by a wrapping addition).
            unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line * LINE)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (block, AHEAD);
}
