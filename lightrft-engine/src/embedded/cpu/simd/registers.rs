//! Sixteen f32 in registers, for each set of vector instructions.
#![allow(unsafe_code)]

use super::super::lanes::{Arithmetic, LANES};
use super::PlainArithmetic;

/// Sixteen f32 in registers.
///
/// # Safety
/// Methods may be called only on processors that have the implementation's instructions.
pub(super) unsafe trait Lanes: Copy {
    unsafe fn splat(x: f32) -> Self;
    /// Reads 16 elements.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes 16 elements.
    unsafe fn store(self, to: *mut f32);
    /// `self * b + c`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

/// Without vector instructions that the compiler may not assume.
#[derive(Clone, Copy)]
pub(super) struct Plain([f32; LANES]);

// SAFETY: nothing beyond the target's own instructions is used.
unsafe impl Lanes for Plain {
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Plain([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 16 elements; an array of f32 is aligned as an f32 is.
        Plain(unsafe { *from.cast::<[f32; LANES]>() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as above.
        unsafe { *to.cast::<[f32; LANES]>() = self.0 }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Plain(std::array::from_fn(|lane| PlainArithmetic::mul_add(self.0[lane], b.0[lane], c.0[lane])))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use super::Lanes;
    use std::arch::x86_64::{
        __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_storeu_ps,
    };

    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(__m256, __m256);
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(__m512);

    // SAFETY: AVX2 and FMA, which callers have asked the processor for.
    unsafe impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: AVX is there, see the trait.
            let x = unsafe { _mm256_set1_ps(x) };
            Avx2(x, x)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: AVX is there, and the caller vouches for 16 elements.
            unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: AVX is there, and the caller vouches for 16 elements.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: FMA is there, see the trait.
            unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
    }

    // SAFETY: AVX-512F, which callers have asked the processor for.
    unsafe impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: AVX-512F is there, see the trait.
            Avx512(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: AVX-512F is there, and the caller vouches for 16 elements.
            Avx512(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: AVX-512F is there, and the caller vouches for 16 elements.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: AVX-512F is there, see the trait.
            Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
    }
}

/// Makes `$name`, which runs `$all::<V>` for the vectors that are named first.
///
/// # Safety
/// The processor has them, and the arguments are what `$all` asks for.
macro_rules! for_vectors {
    ($name:ident($($arg:ident: $type:ty),*), of $all:ident) => {
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name(vectors: Vectors, $($arg: $type),*) -> bool {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            unsafe fn avx512($($arg: $type),*) -> bool {
                // SAFETY: the outer function's contract.
                unsafe { $all::<x86::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($arg: $type),*) -> bool {
                // SAFETY: the outer function's contract.
                unsafe { $all::<x86::Avx2>($($arg),*) }
            }
            // SAFETY: the outer function's contract, of which the processor's instructions are a part.
            unsafe {
                match vectors {
                    #[cfg(target_arch = "x86_64")]
                    Vectors::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    Vectors::Avx2 => avx2($($arg),*),
                    Vectors::Plain => $all::<Plain>($($arg),*),
                }
            }
        }
    };
}

/// Calls `$kernel::<V, A, B>` for the pair of `$a` and `$b`, of those listed; leaves the function with `false` for
/// another pair.
macro_rules! for_shape {
    ($kernel:ident, $V:ty, ($x:expr, $y:expr), [$(($a:literal, $b:literal)),*], $args:tt) => {
        match ($x, $y) {
            $(($a, $b) => for_shape!(@call $kernel, $V, $a, $b, $args),)*
            _ => return false,
        }
    };
    (@call $kernel:ident, $V:ty, $a:literal, $b:literal, ($($arg:expr),*)) => {
        $kernel::<$V, $a, $b>($($arg),*)
    };
}

pub(super) use {for_shape, for_vectors};
