//! New weights as a transaction: begin, push whole tensors in buckets, commit a version.

use std::fmt;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Which weights: the trainer's count of updates, or any number that tells two sets of weights apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u64);

impl Version {
    /// The version after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "version {}", self.0)
    }
}

/// A whole parameter in host memory, row-major and little-endian, under the engine's name for it.
///
/// A rank's shard is not one: the constructor refuses bytes that do not fill the shape.
#[derive(Clone, Copy)]
pub struct NamedTensor<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl<'a> NamedTensor<'a> {
    /// Names the bytes of a parameter.
    ///
    /// # Errors
    /// [`Error::Bytes`] if `bytes` is not exactly what `dtype` and `shape` ask for.
    pub fn new(name: &'a str, dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> Result<Self> {
        let expected = byte_len(dtype, shape).unwrap_or(usize::MAX);
        if bytes.len() != expected {
            return Err(Error::Bytes {
                name: name.to_owned(),
                dtype,
                shape: shape.to_vec(),
                got: bytes.len(),
                expected,
            });
        }
        Ok(Self { name, dtype, shape, bytes })
    }

    /// The engine's name of the parameter.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its whole shape, outermost dim first.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Its elements, row-major and little-endian.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// What is known of it without its bytes.
    pub fn info(&self) -> TensorInfo {
        TensorInfo { name: self.name.to_owned(), dtype: self.dtype, shape: self.shape.to_vec() }
    }

    /// The same tensor under another name.
    #[must_use]
    pub fn renamed<'b>(self, name: &'b str) -> NamedTensor<'b>
    where
        'a: 'b,
    {
        NamedTensor { name, ..self }
    }
}

impl fmt::Debug for NamedTensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}{:?}", self.name, self.dtype, self.shape)
    }
}

/// A whole parameter without its bytes: what is known of it before it is gathered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name: the trainer's for a [`WeightSource`](crate::WeightSource).
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its whole shape, outermost dim first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Bytes that its elements take, row-major.
    ///
    /// # Errors
    /// [`Error::Bytes`] if they are more than memory has addresses.
    pub fn bytes(&self) -> Result<usize> {
        byte_len(self.dtype, &self.shape).ok_or_else(|| Error::Bytes {
            name: self.name.clone(),
            dtype: self.dtype,
            shape: self.shape.clone(),
            got: 0,
            expected: usize::MAX,
        })
    }
}

/// Bytes of a tensor; `None` if they are more than a `usize` counts.
fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elems = shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(*dim))?;
    Some(elems.checked_mul(dtype.bitsize())?.div_ceil(8))
}

/// An update under way, made by [`Engine::begin_update`](crate::Engine::begin_update).
///
/// # Contract
/// - A bucket is taken whole or refused whole. After a refusal the update goes on as if it had never been pushed.
/// - A pushed tensor is copied or sent before `push` returns: the bytes may be reused at once.
/// - Every parameter is pushed exactly once, in any order and in any number of buckets. Order by layer: engines that
///   fuse projections finish a layer as soon as all of its parts are there.
/// - It may move to another thread between two calls.
/// - Dropped before [`commit`](Update::commit), or after a commit that failed, the engine is stale.
pub trait Update: fmt::Debug + Send {
    /// Hands over a bucket of whole parameters.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`], [`Error::Shape`], [`Error::WrongModel`], [`Error::RepeatedTensor`], [`Error::Dtype`]; or the engine's own.
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()>;

    /// Hands over a bucket that lies on the GPU which [`Engine::gpu_buckets`](crate::Engine::gpu_buckets) names, and gives
    /// its memory back once nobody reads it any more. Memory that may still be read is kept, and an error returned.
    ///
    /// # Errors
    /// Those of [`push`](Update::push); [`Error::Gpu`]; [`Error::Backend`] from an engine that names no GPU.
    #[cfg(feature = "cuda")]
    fn push_gpu(&mut self, bucket: crate::cuda::GpuBucket) -> Result<crate::cuda::GpuBucket> {
        let source = format!("{bucket:?} was pushed to an engine that takes weights from the host").into();
        Err(Error::Backend { engine: "an engine", operation: "update weights", source })
    }

    /// Makes the pushed parameters the engine's weights, under the version that was announced.
    ///
    /// # Errors
    /// [`Error::MissingTensors`] if the model has parameters that were not pushed; or the engine's own. The engine is
    /// then stale.
    fn commit(self: Box<Self>) -> Result<()>;
}
