//! Device memory as a communicator sees it: an address on a GPU, an element type, and the stream that uses it
#![allow(unsafe_code)]

use std::marker::PhantomData;

use crate::buffer::element_bytes;
use crate::op::Dtype;

/// A CUDA stream by its handle (`CUstream`); 0 is the legacy default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct StreamHandle(pub usize);

/// Elements on a device to read.
///
/// The call that takes one is *enqueued* on its stream and has not happened when it returns: what was enqueued on the
/// stream before is finished first, what is enqueued on it after sees the result.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    raw: Raw,
    memory: PhantomData<&'a [u8]>,
}

/// Elements on a device to overwrite, or to reduce in place; see [`Device`].
#[derive(Debug)]
pub struct DeviceMut<'a> {
    raw: Raw,
    memory: PhantomData<&'a mut [u8]>,
}

#[derive(Clone, Copy, Debug)]
struct Raw {
    dtype: Dtype,
    ordinal: usize,
    pointer: u64,
    len: usize,
    stream: StreamHandle,
}

macro_rules! device_buffer {
    ($name:ident) => {
        impl $name<'_> {
            /// `len` elements of `dtype` at the address `pointer` of GPU `ordinal`, used on `stream`.
            ///
            /// # Safety
            /// The elements must be memory of that device, aligned for `dtype`. They must stay allocated, and be used by
            /// nobody else in a way that conflicts, until the work that `stream` has when the call returns is done: the
            /// lifetime covers the call only. `stream` must be a living stream of that device.
            pub unsafe fn from_raw(
                dtype: Dtype,
                ordinal: usize,
                pointer: u64,
                len: usize,
                stream: StreamHandle,
            ) -> Self {
                $name { raw: Raw { dtype, ordinal, pointer, len, stream }, memory: PhantomData }
            }

            /// The element type.
            pub fn dtype(&self) -> Dtype {
                self.raw.dtype
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                self.raw.len
            }

            /// Whether there is no element.
            pub fn is_empty(&self) -> bool {
                self.raw.len == 0
            }

            /// Number of bytes.
            pub fn bytes(&self) -> usize {
                self.raw.len * element_bytes(self.raw.dtype)
            }

            /// The GPU's ordinal in this process.
            pub fn ordinal(&self) -> usize {
                self.raw.ordinal
            }

            /// The device address.
            pub fn pointer(&self) -> u64 {
                self.raw.pointer
            }

            /// The stream that uses it.
            pub fn stream(&self) -> StreamHandle {
                self.raw.stream
            }
        }
    };
}
device_buffer!(Device);
device_buffer!(DeviceMut);
