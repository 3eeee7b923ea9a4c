//! What can be wrong with a model folder, its configuration or its tensors.

use std::path::PathBuf;

/// A model that cannot be read, or tensors that do not fit it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file of the model folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file of the model folder is not what its name promises.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was wrong, and what was expected.
        what: String,
    },
    /// A field of the configuration has a value this decoder cannot honour.
    #[error("model configuration: {field} = {value}: {expected}")]
    Config {
        /// The field, or the two fields that contradict each other.
        field: &'static str,
        /// Its value.
        value: String,
        /// What was expected.
        expected: String,
    },
    /// A tensor that the configuration asks for is absent.
    #[error("tensor `{name}` of shape {expected:?} is missing")]
    MissingTensor {
        /// HF's name of the tensor.
        name: String,
        /// The shape that the configuration gives it.
        expected: Vec<usize>,
    },
    /// A tensor that the configuration does not know.
    #[error("tensor `{name}` does not belong to this model")]
    UnknownTensor {
        /// Its name.
        name: String,
    },
    /// A tensor has another shape than the configuration gives it.
    #[error("tensor `{name}` has shape {got:?}, the configuration asks for {expected:?}")]
    Shape {
        /// HF's name of the tensor.
        name: String,
        /// Shape found.
        got: Vec<usize>,
        /// Shape expected.
        expected: Vec<usize>,
    },
    /// The caller's batch does not fit the model (a token outside the vocabulary, too long a sequence, ragged rows).
    #[error("batch: {0}")]
    Batch(String),
    /// The tensor library refused an operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Results of the decoder and of its files.
pub type ModelResult<T> = std::result::Result<T, ModelError>;
