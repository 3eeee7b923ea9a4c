//! Folds compiled for wider vectors than the target has, taken where the processor has them; one of this crate's unsafe
//! fences
//!
//! The arithmetic is the same, element by element and in the same order, and so are the bits: nothing is contracted or
//! reassociated.
#![allow(unsafe_code)]

use super::{Parts, fold_from};
use crate::op::{Element, ReduceOp};

/// [`fold_from`] with the widest vectors at hand.
#[inline(never)]
pub(super) fn fold<T: Element>(op: ReduceOp, n: usize, part: Parts<'_, '_, T>, out: &mut [T]) {
    #[cfg(target_arch = "x86_64")]
    if out.len() >= 16 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, which is all that this function asks for beyond the target's features.
        return unsafe { fold_avx2(op, n, part, out) };
    }
    fold_plain(op, n, part, out);
}

#[inline(never)]
fn fold_plain<T: Element>(op: ReduceOp, n: usize, part: Parts<'_, '_, T>, out: &mut [T]) {
    fold_from(op, n, part, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fold_avx2<T: Element>(op: ReduceOp, n: usize, part: Parts<'_, '_, T>, out: &mut [T]) {
    fold_from(op, n, part, out);
}
