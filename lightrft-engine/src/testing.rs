//! An engine whose answers a test decides, and the suite that every engine passes.

mod conformance;
mod scripted;

pub use conformance::{Subject, conformance, conformance_without_seeds};
pub use scripted::ScriptedEngine;

use safetensors::Dtype;

use crate::{NamedTensor, Result};

/// A whole parameter that owns its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorBytes {
    /// The engine's name of the parameter.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its whole shape.
    pub shape: Vec<usize>,
    /// Its elements, row-major and little-endian.
    pub bytes: Vec<u8>,
}

impl TensorBytes {
    /// A parameter of f32.
    pub fn from_f32(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    /// The same parameter, borrowed, as an update takes it.
    ///
    /// # Errors
    /// [`Error::Bytes`](crate::Error::Bytes) if the bytes do not fill the shape.
    pub fn view(&self) -> Result<NamedTensor<'_>> {
        NamedTensor::new(&self.name, self.dtype, &self.shape, &self.bytes)
    }
}
