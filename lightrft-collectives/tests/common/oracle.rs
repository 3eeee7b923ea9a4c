//! What each call must give, computed by one process alone with the plainest code
//!
//! Nothing of the library's arithmetic is used: contributions in rank order, one accumulator, one rounding.

use half::{bf16, f16};
use lightrft_collectives::{Element, ReduceOp};

use super::random::mix;

/// An element type with test values and a reduction written out.
pub(crate) trait Sample: Element {
    fn sample(bits: u64) -> Self;

    /// The reduction of one element of every rank, in rank order.
    fn reduce(op: ReduceOp, parts: &[Self]) -> Self;

    /// Equal bits, or both not a number: which NaN a sum gives is the processor's affair.
    fn same(self, other: Self) -> bool;
}

/// Element `i` of what rank `rank` of the world brings to the call with this `seed`.
pub(crate) fn value<T: Sample>(seed: u64, rank: usize, i: usize) -> T {
    T::sample(mix(seed ^ mix(((rank as u64) << 40) ^ i as u64)))
}

/// Elements `0..count` of it.
pub(crate) fn values<T: Sample>(seed: u64, rank: usize, count: usize) -> Vec<T> {
    (0..count).map(|i| value(seed, rank, i)).collect()
}

/// Elements `range` of the reduction over the ranks of the world in `line`, in this order.
pub(crate) fn reduced<T: Sample>(
    seed: u64,
    line: &[usize],
    op: ReduceOp,
    range: std::ops::Range<usize>,
) -> Vec<T> {
    let mut parts = Vec::new();
    range
        .map(|i| {
            parts.clear();
            parts.extend(line.iter().map(|rank| value::<T>(seed, *rank, i)));
            T::reduce(op, &parts)
        })
        .collect()
}

/// Mostly tame numbers of both signs; one in 64 is what floating-point code gets wrong.
fn sample_f64(bits: u64, special: [f64; 7]) -> f64 {
    if bits.is_multiple_of(64) {
        return special[(bits >> 6) as usize % special.len()];
    }
    f64::from((bits >> 32) as i32) / 65536.0
}

macro_rules! floats {
    ($($t:ty, $wide:ty, $tiny:expr, $widen:expr, $narrow:expr;)*) => { $(impl Sample for $t {
        fn sample(bits: u64) -> Self {
            let special = [0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, $tiny, -1.0];
            $narrow(sample_f64(bits, special) as $wide)
        }

        fn reduce(op: ReduceOp, parts: &[Self]) -> Self {
            let mut acc: $wide = $widen(parts[0]);
            for part in &parts[1..] {
                let x: $wide = $widen(*part);
                acc = match op {
                    ReduceOp::Sum | ReduceOp::Mean => acc + x,
                    ReduceOp::Product => acc * x,
                    ReduceOp::Min if x.is_nan() || x < acc => x,
                    ReduceOp::Max if x.is_nan() || x > acc => x,
                    ReduceOp::Min | ReduceOp::Max => acc,
                };
            }
            if op == ReduceOp::Mean {
                acc *= 1.0 / parts.len() as $wide;
            }
            $narrow(acc)
        }

        fn same(self, other: Self) -> bool {
            self.to_bits() == other.to_bits() || self.is_nan() && other.is_nan()
        }
    })* };
}
floats! {
    f32, f32, 1e-40, |x: f32| x, |x: f32| x;
    f64, f64, 1e-310, |x: f64| x, |x: f64| x;
    bf16, f32, 1e-39, bf16::to_f32, bf16::from_f32;
    f16, f32, 1e-6, f16::to_f32, f16::from_f32;
}

macro_rules! integers {
    ($($t:ty)*) => { $(impl Sample for $t {
        fn sample(bits: u64) -> Self {
            (bits >> 3) as $t
        }

        fn reduce(op: ReduceOp, parts: &[Self]) -> Self {
            let mut acc = parts[0];
            for x in &parts[1..] {
                acc = match op {
                    ReduceOp::Sum => acc.wrapping_add(*x),
                    ReduceOp::Product => acc.wrapping_mul(*x),
                    ReduceOp::Min => acc.min(*x),
                    ReduceOp::Max => acc.max(*x),
                    ReduceOp::Mean => panic!("integers have no mean"),
                };
            }
            acc
        }

        fn same(self, other: Self) -> bool {
            self == other
        }
    })* };
}
integers! { i32 i64 u8 }

/// Panics, saying `what` it was, at the first element that differs.
pub(crate) fn assert_same<T: Sample>(got: &[T], expected: &[T], what: impl Fn() -> String) {
    assert_eq!(got.len(), expected.len(), "{}", what());
    let odd = got.iter().zip(expected).position(|(g, e)| !g.same(*e));
    if let Some(i) = odd {
        panic!("{}: element {i} of {} is {:?}, expected {:?}", what(), got.len(), got[i], expected[i]);
    }
}
