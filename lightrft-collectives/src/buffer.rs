//! Memory as a communicator sees it: on the host, bytes made from typed slices; on a device, an address and a stream

use crate::device::{Device, DeviceMut};
use crate::error::{Error, Result};
use crate::op::{BLOCK, Dtype, Element, with_element};

/// Where a call reads: host or device memory.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Buffer<'a> {
    /// Host memory.
    Host(Host<'a>),
    /// Device memory.
    Device(Device<'a>),
}

/// Where a call writes, or reduces in place.
#[derive(Debug)]
#[non_exhaustive]
pub enum BufferMut<'a> {
    /// Host memory.
    Host(HostMut<'a>),
    /// Device memory.
    Device(DeviceMut<'a>),
}

/// Elements of one type, wherever they are.
pub trait Elements {
    /// The element type.
    fn dtype(&self) -> Dtype;
    /// Number of elements.
    fn count(&self) -> usize;
}

macro_rules! elements {
    ($($name:ident)*) => { $(impl Elements for $name<'_> {
        fn dtype(&self) -> Dtype {
            $name::dtype(self)
        }
        fn count(&self) -> usize {
            self.len()
        }
    })* };
}
elements!(Host HostMut Device DeviceMut);

macro_rules! elements_of_either {
    ($($name:ident)*) => { $(impl Elements for $name<'_> {
        fn dtype(&self) -> Dtype {
            match self {
                $name::Host(host) => host.dtype(),
                $name::Device(device) => device.dtype(),
            }
        }
        fn count(&self) -> usize {
            match self {
                $name::Host(host) => host.len(),
                $name::Device(device) => device.len(),
            }
        }
    })* };
}
elements_of_either!(Buffer BufferMut);

impl<'a> From<Host<'a>> for Buffer<'a> {
    fn from(host: Host<'a>) -> Self {
        Buffer::Host(host)
    }
}

impl<'a> From<HostMut<'a>> for BufferMut<'a> {
    fn from(host: HostMut<'a>) -> Self {
        BufferMut::Host(host)
    }
}

impl<'a> From<Device<'a>> for Buffer<'a> {
    fn from(device: Device<'a>) -> Self {
        Buffer::Device(device)
    }
}

impl<'a> From<DeviceMut<'a>> for BufferMut<'a> {
    fn from(device: DeviceMut<'a>) -> Self {
        BufferMut::Device(device)
    }
}

/// Elements of host memory to read.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
}

/// Elements of host memory to overwrite, or to reduce in place.
#[derive(Debug)]
pub struct HostMut<'a> {
    dtype: Dtype,
    bytes: &'a mut [u8],
}

/// Whether `bytes` are whole, aligned elements of `dtype`, a type that can travel.
fn check(dtype: Dtype, bytes: &[u8]) -> Result<()> {
    match with_element!(dtype, T => bytemuck::try_cast_slice::<u8, T>(bytes).is_ok()) {
        Some(true) => Ok(()),
        _ => Err(Error::Buffer { dtype, bytes: bytes.len(), address: bytes.as_ptr() as usize }),
    }
}

/// Bytes in one element of `dtype`; every type that travels has whole bytes.
pub(crate) fn element_bytes(dtype: Dtype) -> usize {
    (dtype.bitsize() / 8).max(1)
}

impl<'a> Host<'a> {
    /// The elements of `data`.
    pub fn new<T: Element>(data: &'a [T]) -> Self {
        Host { dtype: T::DTYPE, bytes: bytemuck::cast_slice(data) }
    }

    /// `bytes` taken as elements of `dtype`.
    ///
    /// # Errors
    /// [`Error::Buffer`] if they are not whole, aligned elements of a type that implements [`Element`].
    pub fn from_bytes(dtype: Dtype, bytes: &'a [u8]) -> Result<Self> {
        // No elements need no alignment: an empty `Vec<u8>` has none.
        let empty = if bytes.is_empty() { with_element!(dtype, T => Host::new::<T>(&[])) } else { None };
        if let Some(empty) = empty {
            return Ok(empty);
        }
        check(dtype, bytes)?;
        Ok(Host { dtype, bytes })
    }

    /// Bytes that a plain call cannot send: see [`BLOCK`].
    pub(crate) fn block(bytes: &'a [u8]) -> Self {
        Host { dtype: BLOCK, bytes }
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / element_bytes(self.dtype)
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements' memory.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl<'a> HostMut<'a> {
    /// The elements of `data`.
    pub fn new<T: Element>(data: &'a mut [T]) -> Self {
        HostMut { dtype: T::DTYPE, bytes: bytemuck::cast_slice_mut(data) }
    }

    /// `bytes` taken as elements of `dtype`.
    ///
    /// # Errors
    /// [`Error::Buffer`] if they are not whole, aligned elements of a type that implements [`Element`].
    pub fn from_bytes(dtype: Dtype, bytes: &'a mut [u8]) -> Result<Self> {
        let empty =
            if bytes.is_empty() { with_element!(dtype, T => HostMut::new::<T>(&mut [])) } else { None };
        if let Some(empty) = empty {
            return Ok(empty);
        }
        check(dtype, bytes)?;
        Ok(HostMut { dtype, bytes })
    }

    /// Bytes that a plain call cannot receive: see [`BLOCK`].
    pub(crate) fn block(bytes: &'a mut [u8]) -> Self {
        HostMut { dtype: BLOCK, bytes }
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / element_bytes(self.dtype)
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements' memory, to read.
    pub fn bytes(&self) -> &[u8] {
        self.bytes
    }

    /// The elements' memory, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
    }

    /// The elements' memory for as long as it was lent.
    pub fn into_bytes(self) -> &'a mut [u8] {
        self.bytes
    }
}

/// Owned bytes aligned for every element type, for contributions that wait for their reader.
#[derive(Clone, Debug, Default)]
pub(crate) struct AlignedBytes {
    words: Vec<u64>,
    len: usize,
}

impl AlignedBytes {
    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> Self {
        AlignedBytes { words: vec![0; len.div_ceil(8)], len }
    }

    /// Room for at least `len` bytes, whatever they hold.
    pub(crate) fn at_least(&mut self, len: usize) -> &mut [u8] {
        if self.len < len {
            *self = Self::zeroed(len);
        }
        &mut self.as_mut_slice()[..len]
    }

    /// `len` bytes, whatever they hold, and no more.
    pub(crate) fn exactly(&mut self, len: usize) -> &mut [u8] {
        self.words.resize(len.div_ceil(8), 0);
        self.len = len;
        self.as_mut_slice()
    }

    /// A copy of `bytes`.
    pub(crate) fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroed(bytes.len());
        copy.as_mut_slice().copy_from_slice(bytes);
        copy
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_whole_elements_are_refused() {
        let words = [0u64; 2];
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        assert_eq!(Host::from_bytes(Dtype::F64, bytes).map(|h| h.len()).ok(), Some(2));
        for (dtype, range) in
            [(Dtype::F64, 0..12), (Dtype::F32, 1..5), (Dtype::BF16, 0..3), (Dtype::BOOL, 0..1)]
        {
            assert!(matches!(Host::from_bytes(dtype, &bytes[range]), Err(Error::Buffer { .. })), "{dtype:?}");
        }
    }

    #[test]
    fn no_bytes_are_no_elements_wherever_they_lie() {
        let mut words = [0u64; 2];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        assert_eq!(Host::from_bytes(Dtype::F64, &bytes[1..1]).map(|h| h.len()).ok(), Some(0));
        assert_eq!(HostMut::from_bytes(Dtype::F64, &mut bytes[1..1]).map(|h| h.len()).ok(), Some(0));
        assert!(Host::from_bytes(Dtype::BOOL, &bytes[1..1]).is_err());
    }
}
