//! Folds compiled for wider vectors than the target has, taken where the processor has them; one of this crate's unsafe
//! fences
//!
//! The arithmetic is the same, element by element and in the same order, and so are the bits: nothing is contracted or
//! reassociated.
#![allow(unsafe_code)]

use super::partial::{self, Begin};
use super::{Parts, fold_from};
use crate::op::{Element, ReduceOp};

/// Makes `$name`, which takes the widest vectors at hand, of `$plain`, an `inline(always)` function of the same arguments.
/// Each of the two bodies stands in a function of its own, so that there is one for each type.
macro_rules! widest {
    ($(#[$doc:meta])* $name:ident<$T:ident>($($arg:ident: $type:ty),*), by $length:ident, of $plain:path) => {
        $(#[$doc])*
        #[inline(never)]
        pub(super) fn $name<$T: Element>($($arg: $type),*) {
            #[inline(never)]
            fn plain<$T: Element>($($arg: $type),*) {
                $plain($($arg),*);
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2<$T: Element>($($arg: $type),*) {
                $plain($($arg),*);
            }

            #[cfg(target_arch = "x86_64")]
            if $length.len() >= 16 && std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2, which is all that this function asks for beyond the target's features.
                return unsafe { avx2($($arg),*) };
            }
            plain($($arg),*);
        }
    };
}

widest! {
    /// [`fold_from`] with the widest vectors at hand.
    fold<T>(op: ReduceOp, n: usize, part: Parts<'_, '_, T>, out: &mut [T]), by out, of fold_from
}

widest! {
    /// [`partial::onto`] with the widest vectors at hand.
    onto<T>(op: ReduceOp, from: Begin, parts: &[T], acc: &mut [T::Acc]), by acc, of partial::onto
}

widest! {
    /// [`partial::rounded`] with the widest vectors at hand.
    rounded<T>(op: ReduceOp, world: usize, acc: &[T::Acc], out: &mut [T]), by out, of partial::rounded
}
