//! Floats of one dtype as floats of another: rounded to nearest, ties to even, NaN kept.

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use safetensors::Dtype;

/// The dtype in which floats are written. Integers and floats narrower than 16 bits are always written as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Floats {
    /// As they are given.
    #[default]
    AsGiven,
    /// 32 bits: exact for everything but `F64`.
    F32,
    /// The upper 16 bits of an `F32`: its range, 8 bits of precision.
    Bf16,
    /// IEEE's 16 bits. What exceeds 65504 becomes infinite.
    F16,
}

impl Floats {
    /// What a tensor of this dtype is written as.
    pub(crate) fn written(self, given: Dtype) -> Dtype {
        match (self, given) {
            (Floats::F32, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) => Dtype::F32,
            (Floats::Bf16, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) => Dtype::BF16,
            (Floats::F16, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) => Dtype::F16,
            (_, given) => given,
        }
    }
}

/// Elements converted at a time: enough for wide instructions, and they stay in the first cache.
const LANE: usize = 1024;

/// Converts elements of `from` into elements of `to`; `into` has room for exactly as many. `false` when that pair of
/// dtypes is not converted here.
pub(crate) fn convert(from: Dtype, bytes: &[u8], to: Dtype, into: &mut [u8]) -> bool {
    if from == to {
        into.copy_from_slice(bytes);
        return true;
    }
    let (Some(decode), Some(encode)) = (decoder(from, to), encoder(to)) else { return false };
    let (wide, narrow) = (from.bitsize() / 8, to.bitsize() / 8);
    let mut lane = [0f32; LANE];
    for (given, written) in bytes.chunks(LANE * wide).zip(into.chunks_mut(LANE * narrow)) {
        let lane = &mut lane[..given.len() / wide];
        decode(given, lane);
        encode(lane, written);
    }
    true
}

/// From bytes to as many `f32`s as there are elements.
type Decode = fn(&[u8], &mut [f32]);
/// From `f32`s to bytes.
type Encode = fn(&[f32], &mut [u8]);

fn decoder(from: Dtype, to: Dtype) -> Option<Decode> {
    match from {
        Dtype::F32 => Some(|bytes, lane| {
            for (value, bytes) in lane.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }),
        Dtype::BF16 => Some(|bytes, lane| {
            for (value, bytes) in lane.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }),
        Dtype::F16 => Some(|bytes, lane| {
            let mut halves = [f16::ZERO; LANE];
            let halves = &mut halves[..lane.len()];
            for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                *half = f16::from_le_bytes(*bytes);
            }
            halves.convert_to_f32_slice(lane);
        }),
        Dtype::F64 if to == Dtype::F32 => Some(|bytes, lane| {
            for (value, bytes) in lane.iter_mut().zip(bytes.as_chunks().0) {
                *value = f64::from_le_bytes(*bytes) as f32;
            }
        }),
        Dtype::F64 => Some(|bytes, lane| {
            for (value, bytes) in lane.iter_mut().zip(bytes.as_chunks().0) {
                *value = to_odd(f64::from_le_bytes(*bytes));
            }
        }),
        _ => None,
    }
}

fn encoder(to: Dtype) -> Option<Encode> {
    match to {
        Dtype::F32 => Some(|lane, into| {
            for (value, bytes) in lane.iter().zip(into.as_chunks_mut().0) {
                *bytes = value.to_le_bytes();
            }
        }),
        Dtype::BF16 => Some(|lane, into| {
            for (value, bytes) in lane.iter().zip(into.as_chunks_mut().0) {
                *bytes = bf16::from_f32(*value).to_le_bytes();
            }
        }),
        Dtype::F16 => Some(|lane, into| {
            let mut halves = [f16::ZERO; LANE];
            let halves = &mut halves[..lane.len()];
            halves.convert_from_f32_slice(lane);
            for (half, bytes) in halves.iter().zip(into.as_chunks_mut().0) {
                *bytes = half.to_le_bytes();
            }
        }),
        _ => None,
    }
}

/// The nearest `f32`, unless `value` lies between two: then the one whose last bit is one. What is rounded further from
/// there comes out as if it had been rounded once.
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let bits = nearest.to_bits();
    if value.is_nan() || f64::from(nearest) == value || bits & 1 == 1 {
        return nearest;
    }
    // The magnitude is in the lower bits: one less or one more is the neighbour towards zero or away from it.
    f32::from_bits(if f64::from(nearest).abs() > value.abs() { bits - 1 } else { bits + 1 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn converted(from: Dtype, bytes: &[u8], to: Dtype) -> Vec<u8> {
        let mut into = vec![0; bytes.len() / (from.bitsize() / 8) * (to.bitsize() / 8)];
        assert!(convert(from, bytes, to, &mut into));
        into
    }

    /// Round to nearest, ties to even, from the definition: the nearer of the two neighbours, or the even one.
    fn nearest_bf16(value: f32) -> bf16 {
        let down = bf16::from_bits((value.to_bits() >> 16) as u16);
        if down.to_f32() == value {
            return down;
        }
        let up = bf16::from_bits(down.to_bits() + 1);
        // Beyond the largest number the next step counts as if the range went on.
        let of =
            |x: bf16| if x.is_infinite() { 2f64.powi(128) * f64::from(value.signum()) } else { x.to_f64() };
        let (below, above) = ((f64::from(value) - of(down)).abs(), (of(up) - f64::from(value)).abs());
        if below < above || (below == above && down.to_bits().is_multiple_of(2)) { down } else { up }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn bf16_is_the_nearest_and_of_two_the_even_one(bits in any::<u32>(), tie in any::<bool>()) {
            let value = f32::from_bits(if tie { bits & 0xffff_0000 | 0x8000 } else { bits });
            prop_assume!(!value.is_nan());
            let got = converted(Dtype::F32, &value.to_le_bytes(), Dtype::BF16);
            prop_assert_eq!(got, nearest_bf16(value).to_le_bytes().to_vec());
        }

        #[test]
        fn many_are_converted_as_one_by_one(bits in prop::collection::vec(any::<u32>(), 0..1500)) {
            let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
            for to in [Dtype::BF16, Dtype::F16, Dtype::F32] {
                let singly: Vec<u8> = bits.iter().flat_map(|b| converted(Dtype::F32, &b.to_le_bytes(), to)).collect();
                prop_assert!(converted(Dtype::F32, &bytes, to) == singly);
            }
        }
    }

    #[test]
    fn sixteen_bits_go_through_f32_and_back_unchanged() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for dtype in [Dtype::BF16, Dtype::F16] {
            let back = converted(Dtype::F32, &converted(dtype, &all, Dtype::F32), dtype);
            for (before, after) in all.as_chunks::<2>().0.iter().zip(back.as_chunks::<2>().0) {
                let is_nan = |b: [u8; 2]| match dtype {
                    Dtype::BF16 => bf16::from_le_bytes(b).is_nan(),
                    _ => f16::from_le_bytes(b).is_nan(),
                };
                assert!(
                    before == after || (is_nan(*before) && is_nan(*after)),
                    "{dtype:?} {before:?} {after:?}"
                );
            }
        }
    }

    #[test]
    fn nan_stays_nan_and_too_large_for_f16_is_infinite() {
        let halves = |values: &[f32], to| converted(Dtype::F32, bytemuck::cast_slice(values), to);
        let nan = halves(&[f32::NAN, f32::from_bits(0x7f80_0001)], Dtype::BF16);
        assert!(nan.as_chunks::<2>().0.iter().all(|b| bf16::from_le_bytes(*b).is_nan()));
        let f16s = halves(&[f32::NAN, 65504.0, 65520.0, -1e9], Dtype::F16);
        let f16s: Vec<f32> =
            f16s.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect();
        assert!(f16s[0].is_nan());
        assert_eq!(f16s[1..], [65504.0, f32::INFINITY, f32::NEG_INFINITY]);
    }

    #[test]
    fn f64_is_rounded_once() {
        // Just above the middle of two bf16 numbers: rounded to f32 first it would lie in the middle, and go to even.
        let value = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
        assert_eq!(bf16::from_f32(value as f32), bf16::from_f32(1.0));
        let of = |value: f64, to| converted(Dtype::F64, &value.to_le_bytes(), to);
        assert_eq!(of(value, Dtype::BF16), bf16::from_f32(1.0 + 2f32.powi(-7)).to_le_bytes());
        assert_eq!(of(-value, Dtype::BF16), bf16::from_f32(-1.0 - 2f32.powi(-7)).to_le_bytes());
        let value = 1.0 + 2f64.powi(-11) - 2f64.powi(-40);
        assert_eq!(of(value, Dtype::F16), f16::ONE.to_le_bytes());
        assert_eq!(of(1e300, Dtype::BF16), bf16::INFINITY.to_le_bytes());
        assert_eq!(of(-1e-300, Dtype::F16), f16::NEG_ZERO.to_le_bytes());
        assert_eq!(of(0.1, Dtype::F32), 0.1f32.to_le_bytes());
        assert!(of(f64::NAN, Dtype::BF16) == bf16::from_f32(f32::NAN).to_le_bytes());
    }

    #[test]
    fn integers_are_left_alone() {
        assert_eq!(Floats::Bf16.written(Dtype::I64), Dtype::I64);
        assert!(!convert(Dtype::I64, &[0; 8], Dtype::F32, &mut [0; 4]));
    }
}
