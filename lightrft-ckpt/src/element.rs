//! The Rust types that tensors of whole bytes per element can be read into and written from.

use half::{bf16, f16};
use safetensors::Dtype;

// Tensors lie on disk little-endian, and slices are handed over as they are in memory.
#[cfg(target_endian = "big")]
compile_error!("lightrft-ckpt reads and writes little-endian memory as it is");

/// A type that can stand for a tensor's elements.
pub trait Element: bytemuck::Pod + sealed::Sealed {
    /// The dtype on disk.
    const DTYPE: Dtype;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),* $(,)?) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: Dtype = Dtype::$dtype;
        }
    )*};
}

elements! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f16 => F16, bf16 => BF16, f32 => F32, f64 => F64,
}

/// Bytes of one element; `None` for dtypes whose elements are not whole bytes (F4, F6).
pub(crate) fn element_bytes(dtype: Dtype) -> Option<usize> {
    let bits = dtype.bitsize();
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Elements of a tensor of this shape; `None` when that number does not fit a `usize`.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    // A zero makes the product zero whatever the other dims are.
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}
