//! From f32 to the half-precision formats, rounded to nearest even, without a branch.

use half::{bf16, f16};

use crate::precision::UnitValues;

/// Where an optimizer writes the parameters it has just updated, in half precision, while they are still in a register:
/// 2 bytes an element of memory traffic instead of the 6 of a pass of its own.
#[derive(Debug, Default)]
pub enum CopyOut<'a> {
    /// Nowhere.
    #[default]
    None,
    /// As bf16.
    Bf16(&'a mut [bf16]),
    /// As f16. Beyond 65,504 this is infinite.
    F16(&'a mut [f16]),
}

impl<'a> CopyOut<'a> {
    /// Elements there is room for; `None` where nothing is to be written.
    pub(super) fn len(&self) -> Option<usize> {
        match self {
            CopyOut::None => None,
            CopyOut::Bf16(out) => Some(out.len()),
            CopyOut::F16(out) => Some(out.len()),
        }
    }

    /// This, or the first `elems` of `values` where this is nowhere.
    pub(crate) fn or(self, values: Option<&'a mut UnitValues>, elems: usize) -> Self {
        match (self, values) {
            (CopyOut::None, Some(UnitValues::Bf16(values))) => CopyOut::Bf16(&mut values[..elems]),
            (CopyOut::None, Some(UnitValues::F16(values))) => CopyOut::F16(&mut values[..elems]),
            (this, _) => this,
        }
    }

    /// The first `at` elements, and the others.
    pub(super) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            CopyOut::None => (CopyOut::None, CopyOut::None),
            CopyOut::Bf16(out) => {
                let (head, tail) = out.split_at_mut(at);
                (CopyOut::Bf16(head), CopyOut::Bf16(tail))
            }
            CopyOut::F16(out) => {
                let (head, tail) = out.split_at_mut(at);
                (CopyOut::F16(head), CopyOut::F16(tail))
            }
        }
    }
}

/// What an f32 can be rounded to.
pub(crate) trait Narrow: Copy + Send {
    fn narrow(value: f32) -> Self;
}

/// Nothing is written: a slice of these has a length and no bytes, so one loop serves both cases.
impl Narrow for () {
    #[inline(always)]
    fn narrow(_value: f32) -> Self {}
}

impl Narrow for bf16 {
    /// The upper half of the bits, after adding half a unit of its last place (a little less where that is even). NaN
    /// stays NaN and is made quiet.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet as u16 } else { rounded as u16 })
    }
}

impl Narrow for f16 {
    /// Three cases, of which each is computed and one taken, so that this turns into vector code: `half`'s conversion is
    /// either a branch or an instruction that not every machine has.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        /// 2^-14, the smallest normal f16.
        const NORMAL: u32 = 0x3880_0000;
        /// 2^16, which is infinite as f16. What lies between 65,520 and this is rounded up to infinity by the carry.
        const INFINITE: u32 = 0x4780_0000;
        /// 0.5: the last place of numbers from here to 1 is 2^-24, that of subnormal f16.
        const HALF: u32 = 0x3f00_0000;
        let bits = value.to_bits();
        let (sign, size) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
        // The exponents' biases, 127 and 15, differ by 112.
        let rebiased = size.wrapping_sub(112 << 23);
        let normal = rebiased.wrapping_add(0xfff + ((rebiased >> 13) & 1)) >> 13;
        let subnormal = (f32::from_bits(size) + 0.5).to_bits().wrapping_sub(HALF);
        let quiet = 0x7e00 | ((size >> 13) & 0x3ff);
        let finite = if size < NORMAL { subnormal } else { normal };
        let number = if size >= INFINITE { 0x7c00 } else { finite };
        f16::from_bits((sign | if value.is_nan() { quiet } else { number }) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agree(bits: u32) {
        let value = f32::from_bits(bits);
        assert_eq!(<bf16 as Narrow>::narrow(value).to_bits(), bf16::from_f32(value).to_bits(), "{bits:#x}");
        assert_eq!(<f16 as Narrow>::narrow(value).to_bits(), f16::from_f32(value).to_bits(), "{bits:#x}");
    }

    #[test]
    fn rounding_agrees_with_half_around_every_boundary_of_both_formats() {
        // Every f16 and bf16 value, and the middle between it and the next, each with its neighbours.
        for sign in [0, 1 << 31] {
            for size in 0..=0x7fff_u32 {
                let as_f16 = f16::from_bits(size as u16).to_f32().to_bits();
                for centre in [size << 16, (size << 16) | 0x8000, as_f16, as_f16.wrapping_add(1 << 12)] {
                    (0..3).for_each(|d| agree(sign | (centre.wrapping_add(d).wrapping_sub(1) & 0x7fff_ffff)));
                }
            }
            // Middles of subnormal f16, and f32's own subnormal numbers.
            for k in 0..2048u32 {
                let centre = ((k as f32 + 0.5) * 2f32.powi(-24)).to_bits();
                (0..3).for_each(|d| agree(sign | (centre + d - 1)));
                agree(sign | k);
            }
        }
    }

    #[test]
    #[ignore = "all 2^32 values take minutes without optimisation"]
    fn rounding_agrees_with_half_on_every_value() {
        (0..=u32::MAX).for_each(agree);
    }
}
