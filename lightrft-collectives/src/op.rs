//! Reduce operations and element types: what can be combined, and with what accumulator

use std::fmt;

use half::{bf16, f16};
pub use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// How the contributions of all ranks become one value, element by element.
///
/// Contributions are combined in rank order, `((x0 + x1) + x2) + ...`, in the accumulator of
/// [`Element`], and rounded to the element type once at the end. The result is therefore the same bit for
/// bit on every rank, for every backend, for every chunking, and from run to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReduceOp {
    /// Sum; wraps around for integers.
    Sum,
    /// Sum, then one multiplication by `1 / world_size` before the rounding. Floating-point types only.
    Mean,
    /// Smallest; NaN if any contribution is NaN.
    Min,
    /// Largest; NaN if any contribution is NaN.
    Max,
    /// Product; wraps around for integers.
    Product,
}

impl ReduceOp {
    /// All reduce operations.
    pub const ALL: [ReduceOp; 5] =
        [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product];

    /// Whether this operation is defined on elements of `dtype`.
    pub fn allows(self, dtype: Dtype) -> bool {
        match dtype {
            Dtype::F64 | Dtype::F32 | Dtype::BF16 | Dtype::F16 => true,
            Dtype::I64 | Dtype::I32 | Dtype::U8 => self != ReduceOp::Mean,
            _ => false,
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Mean => "mean",
            ReduceOp::Min => "min",
            ReduceOp::Max => "max",
            ReduceOp::Product => "product",
        })
    }
}

/// The bytes that ranks exchange first in a call made of several (`preamble.rs`). A type that is no [`Element`], so that a
/// plain call never has it: the two are told apart as any two types are.
pub(crate) const BLOCK: Dtype = Dtype::F8_E8M0;

/// A type whose slices can be sent and reduced.
///
/// | type | accumulator of sums and products |
/// |---|---|
/// | `f32`, `bf16`, `f16` | `f32` |
/// | `f64` | `f64` |
/// | `i32`, `i64`, `u8` | itself, wrapping |
pub trait Element: bytemuck::Pod + PartialEq + fmt::Debug + Send + Sync + private::Arithmetic {
    /// The run-time name of this type.
    const DTYPE: Dtype;
}

pub(crate) mod private {
    /// What a fold needs of an element type. In a private module, so that nobody else can implement
    /// [`Element`](super::Element).
    pub trait Arithmetic: Copy {
        /// The type contributions are combined in.
        type Acc: bytemuck::Pod;
        fn widen(self) -> Self::Acc;
        fn narrow(acc: Self::Acc) -> Self;
        fn add(a: Self::Acc, b: Self::Acc) -> Self::Acc;
        fn mul(a: Self::Acc, b: Self::Acc) -> Self::Acc;
        fn min(a: Self::Acc, b: Self::Acc) -> Self::Acc;
        fn max(a: Self::Acc, b: Self::Acc) -> Self::Acc;
        /// `acc / ranks` as one multiplication; the identity for integers, which have no mean.
        fn mean(acc: Self::Acc, ranks: usize) -> Self::Acc;
    }
}

/// bf16 to f32: the upper half of the bits. Written out because it vectorises.
#[inline(always)]
fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// f32 to bf16, nearest even, NaN kept (made quiet). Branch-free, so that it vectorises.
#[inline(always)]
fn narrow_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet as u16 } else { rounded as u16 })
}

macro_rules! float_element {
    ($t:ty, $acc:ty, $dtype:ident, $widen:expr, $narrow:expr) => {
        impl Element for $t {
            const DTYPE: Dtype = Dtype::$dtype;
        }
        impl private::Arithmetic for $t {
            type Acc = $acc;
            #[inline(always)]
            fn widen(self) -> $acc {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(acc: $acc) -> Self {
                $narrow(acc)
            }
            #[inline(always)]
            fn add(a: $acc, b: $acc) -> $acc {
                a + b
            }
            #[inline(always)]
            fn mul(a: $acc, b: $acc) -> $acc {
                a * b
            }
            #[inline(always)]
            fn min(a: $acc, b: $acc) -> $acc {
                // The comparison is false for a NaN in `b`, which is then taken; one in `a` stays.
                if a.is_nan() || a <= b { a } else { b }
            }
            #[inline(always)]
            fn max(a: $acc, b: $acc) -> $acc {
                if a.is_nan() || a >= b { a } else { b }
            }
            #[inline(always)]
            fn mean(acc: $acc, ranks: usize) -> $acc {
                acc * (1.0 / ranks as $acc)
            }
        }
    };
}

macro_rules! integer_element {
    ($t:ty, $dtype:ident) => {
        impl Element for $t {
            const DTYPE: Dtype = Dtype::$dtype;
        }
        impl private::Arithmetic for $t {
            type Acc = $t;
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(acc: $t) -> $t {
                acc
            }
            #[inline(always)]
            fn add(a: $t, b: $t) -> $t {
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn mul(a: $t, b: $t) -> $t {
                a.wrapping_mul(b)
            }
            #[inline(always)]
            fn min(a: $t, b: $t) -> $t {
                Ord::min(a, b)
            }
            #[inline(always)]
            fn max(a: $t, b: $t) -> $t {
                Ord::max(a, b)
            }
            #[inline(always)]
            fn mean(acc: $t, _: usize) -> $t {
                acc
            }
        }
    };
}

float_element!(f64, f64, F64, |x| x, |x| x);
float_element!(f32, f32, F32, |x| x, |x| x);
float_element!(bf16, f32, BF16, widen_bf16, narrow_bf16);
float_element!(f16, f32, F16, f16::to_f32, f16::from_f32);
integer_element!(i64, I64);
integer_element!(i32, I32);
integer_element!(u8, U8);

/// Runs `$body` with `$T` bound to the element type that `$dtype` names; `None` for a type without one.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::op::Dtype::F64 => Some({
                type $T = f64;
                $body
            }),
            $crate::op::Dtype::F32 => Some({
                type $T = f32;
                $body
            }),
            $crate::op::Dtype::BF16 => Some({
                type $T = half::bf16;
                $body
            }),
            $crate::op::Dtype::F16 => Some({
                type $T = half::f16;
                $body
            }),
            $crate::op::Dtype::I64 => Some({
                type $T = i64;
                $body
            }),
            $crate::op::Dtype::I32 => Some({
                type $T = i32;
                $body
            }),
            $crate::op::Dtype::U8 => Some({
                type $T = u8;
                $body
            }),
            _ => None,
        }
    };
}
pub(crate) use with_element;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bf16_conversions_agree_with_half(bits: u32) {
            let x = f32::from_bits(bits);
            let (ours, theirs) = (narrow_bf16(x), bf16::from_f32(x));
            prop_assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan());
            let y = bf16::from_bits(bits as u16);
            prop_assert!(widen_bf16(y) == y.to_f32() || widen_bf16(y).is_nan() && y.is_nan());
        }
    }
}
