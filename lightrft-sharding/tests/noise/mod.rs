//! Values that tell places and seeds apart.
#![allow(unreachable_pub)]

/// Well-mixed values in -1..1 that differ by seed and place.
pub fn noise(seed: u64, elems: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..elems).map(|_| next()).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
