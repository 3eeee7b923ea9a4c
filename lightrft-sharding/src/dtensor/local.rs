//! Values of any element type, without arithmetic: zeros, what changes no sum, and where boxes lie one after another.

use lightrft_collectives::{Dtype, Element};

use super::region::Region;

/// `len` zeros.
pub(super) fn fill<T: Element>(len: usize) -> Vec<T> {
    vec![bytemuck::Zeroable::zeroed(); len]
}

/// What added to x gives x, to the bit: 0 for integers, -0.0 for floating-point numbers (0.0 would turn -0.0 to 0.0).
pub(super) fn identity_of_sums<T: Element>() -> T {
    let mut value: T = bytemuck::Zeroable::zeroed();
    if matches!(T::DTYPE, Dtype::F64 | Dtype::F32 | Dtype::BF16 | Dtype::F16) {
        let bytes = bytemuck::bytes_of_mut(&mut value);
        let sign = if cfg!(target_endian = "big") { bytes.first_mut() } else { bytes.last_mut() };
        if let Some(sign) = sign {
            *sign = 0x80;
        }
    }
    value
}

/// Each box with the place of its first element among those of all boxes.
pub(super) fn place_of_each(boxes: &[Region]) -> impl Iterator<Item = (&Region, usize)> {
    boxes.iter().scan(0, |next, region| {
        let start = *next;
        *next += region.elems();
        Some((region, start))
    })
}
