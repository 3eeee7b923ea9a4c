//! What a rank wants to read, and where it shall go.

use std::borrow::Cow;

use safetensors::Dtype;

use crate::element::{Element, element_bytes};
use crate::error::{Error, Result};
use crate::region::{Region, Span};

/// Elements of one tensor that this rank wants, and the memory that they go to: the counterpart of
/// [`Part`](crate::Part).
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The tensor's name in the checkpoint.
    pub name: Cow<'a, str>,
    /// The dtype that it must have.
    pub dtype: Dtype,
    /// The global shape that it must have.
    pub shape: Cow<'a, [usize]>,
    /// Which of its elements.
    pub region: Region,
    /// Where they go: row-major, dense, little-endian.
    pub into: &'a mut [u8],
}

impl<'a> Wanted<'a> {
    /// Typed elements.
    pub fn new<T: Element>(
        name: impl Into<Cow<'a, str>>,
        shape: impl Into<Cow<'a, [usize]>>,
        region: Region,
        into: &'a mut [T],
    ) -> Self {
        Wanted {
            name: name.into(),
            dtype: T::DTYPE,
            shape: shape.into(),
            region,
            into: bytemuck::cast_slice_mut(into),
        }
    }

    /// The elements asked for, and the bytes of one.
    pub(crate) fn span(&self) -> Result<(Span, usize)> {
        let wrong = |reason: String| Error::Request { name: self.name.as_ref().to_owned(), reason };
        let size = element_bytes(self.dtype)
            .ok_or_else(|| wrong(format!("elements of {:?} are not whole bytes", self.dtype)))?;
        let span = self.region.resolve(&self.shape).map_err(wrong)?;
        if span.len().checked_mul(size) != Some(self.into.len()) {
            let (bytes, elements) = (self.into.len(), span.len());
            return Err(wrong(format!(
                "a buffer of {bytes} bytes for {elements} elements of {:?}",
                self.dtype
            )));
        }
        Ok((span, size))
    }
}
