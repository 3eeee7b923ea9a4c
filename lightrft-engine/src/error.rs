//! What an engine refuses or fails at, as outcomes that a caller can act on.

use std::path::PathBuf;
use std::time::Duration;

use safetensors::Dtype;

use crate::lifecycle::{Refusal, State};

/// The result of every call into an engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The engine is not in a state that allows the call; nothing was done. The message says what would help.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A field of a request cannot be honoured; nothing was generated for any request of the call.
    #[error("request {request}: {field} = {value}: {expected}")]
    Request {
        /// Index of the request in the call.
        request: usize,
        /// The field of [`Request`](crate::Request) or [`Sampling`](crate::Sampling).
        field: &'static str,
        /// Its value.
        value: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A prompt and what may be generated after it do not fit the engine's context.
    #[error(
        "request {request}: prompt of {prompt_tokens} tokens + max_new_tokens {max_new_tokens} = {} exceeds the context of {context_tokens} tokens",
        prompt_tokens.saturating_add(*max_new_tokens)
    )]
    ContextExceeded {
        /// Index of the request in the call.
        request: usize,
        /// Length of its prompt.
        prompt_tokens: usize,
        /// How many tokens it may generate.
        max_new_tokens: usize,
        /// What the engine holds of one sequence.
        context_tokens: usize,
    },
    /// A request's keys and values would not fit the engine's cache even if it were alone in it.
    #[error(
        "request {request}: the keys and values of {tokens} tokens take {needed_bytes} bytes, the cache has {cache_bytes}"
    )]
    CacheExceeded {
        /// Index of the request in the call.
        request: usize,
        /// Tokens of its prompt and its longest completion that must be remembered.
        tokens: usize,
        /// Bytes they take, whole pages.
        needed_bytes: u64,
        /// Most bytes of the cache.
        cache_bytes: u64,
    },
    /// A token id that the model does not know. Some servers die of one, so it is found before anything is sent.
    #[error(
        "request {request}: {field}[{position}] = {token} is outside the vocabulary of {vocabulary} tokens"
    )]
    OutsideVocabulary {
        /// Index of the request in the call.
        request: usize,
        /// `prompt` or `stop_tokens`.
        field: &'static str,
        /// Index in that field.
        position: usize,
        /// The token id.
        token: u32,
        /// Number of token ids that exist.
        vocabulary: usize,
    },
    /// A pushed tensor that the engine's model does not have; nothing of its bucket was taken.
    #[error("tensor `{name}` is not a parameter of the engine's model")]
    UnknownTensor {
        /// The name as it was pushed.
        name: String,
    },
    /// Several tensors that the engine's model does not have, or has in other shapes: another model's, or names without
    /// their map. Nothing of the bucket was taken; where a whole update was compared before it began, nothing was sent.
    #[error(
        "not this engine's model: of {given} tensors {unknown} are none of its parameters{}, and {misshapen} have another \
         shape{}: compare the model on both sides and the map of names",
        among(unknown_examples),
        among(misshapen_examples)
    )]
    WrongModel {
        /// How many were compared.
        given: usize,
        /// How many of them the model does not have.
        unknown: usize,
        /// Up to four of their names.
        unknown_examples: Vec<String>,
        /// How many of them have another shape than the model gives them.
        misshapen: usize,
        /// Up to four of these, each with both shapes.
        misshapen_examples: Vec<String>,
    },
    /// A tensor pushed twice in one update; nothing of its bucket was taken.
    #[error("tensor `{name}` was already pushed in this update")]
    RepeatedTensor {
        /// The name as it was pushed.
        name: String,
    },
    /// A commit before every parameter was pushed; the engine is stale.
    #[error(
        "update to {version}: {missing} of {total} tensors were never pushed, among them {}: every update gives all of \
         the model's parameters",
        examples.join(", ")
    )]
    MissingTensors {
        /// The version that was to be committed.
        version: crate::Version,
        /// How many are missing.
        missing: usize,
        /// How many the model has.
        total: usize,
        /// Up to four of the missing names.
        examples: Vec<String>,
    },
    /// A pushed tensor has another shape than the engine's model gives it; nothing of its bucket was taken.
    #[error("tensor `{name}` has shape {got:?}, the engine's model has {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Shape pushed.
        got: Vec<usize>,
        /// Shape expected.
        expected: Vec<usize>,
    },
    /// A pushed tensor has elements that the engine cannot take; nothing of its bucket was taken.
    #[error("tensor `{name}` has elements of type {got:?}; this engine takes {expected}")]
    Dtype {
        /// The tensor.
        name: String,
        /// Type pushed.
        got: Dtype,
        /// Types that are taken.
        expected: &'static str,
    },
    /// A tensor's bytes do not fill its shape: a shard where the whole parameter was expected, for example.
    #[error("tensor `{name}`: {got} bytes, but {dtype:?}{shape:?} has {expected}")]
    Bytes {
        /// The tensor.
        name: String,
        /// Type of its elements.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes given.
        got: usize,
        /// Bytes that shape and type ask for.
        expected: usize,
    },
    /// A parameter's name has no counterpart in the engine, or shares it with another; nothing was sent.
    #[error("parameter `{name}`: {reason}")]
    Name {
        /// The trainer's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The trainer's side of an update failed: weights that could not be gathered or read. The engine is stale if the
    /// update had begun.
    #[error("weights for the engine: {0}")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A file of a model folder could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file of a model folder is not what its name promises.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what was expected.
        what: String,
    },
    /// The caller's deadline passed. Completions of the call are lost; the engine can be used again.
    #[error("{operation}: {waited:?} passed with {done} of {total} done")]
    Deadline {
        /// What was under way.
        operation: &'static str,
        /// How long it had been running.
        waited: Duration,
        /// Completions finished by then.
        done: usize,
        /// Completions asked for.
        total: usize,
    },
    /// The model gave a row of logits that no token can be drawn from (NaN, +inf, or nothing but -inf): the weights
    /// are broken.
    #[error("request {request}, sample {sample}, position {position}: {reason}")]
    Logits {
        /// Index of the request in the call.
        request: usize,
        /// Index of the sample.
        sample: usize,
        /// Index of the token that was to be drawn.
        position: usize,
        /// What is wrong with the row.
        reason: String,
    },
    /// The embedded engine's model: its folder, its configuration, its tensors, or its arithmetic.
    #[cfg(feature = "embedded")]
    #[error(transparent)]
    Model(#[from] crate::embedded::ModelError),
    /// A GPU that is needed cannot be used: no CUDA driver, no such GPU, too little memory, or a failure on it.
    #[cfg(feature = "cuda")]
    #[error("{doing} (GPU {ordinal}): {source}; {advice}")]
    Gpu {
        /// What was under way.
        doing: &'static str,
        /// The GPU's ordinal among those that this process sees.
        ordinal: usize,
        /// What to do.
        advice: &'static str,
        /// What the driver said.
        #[source]
        source: Box<lightrft_collectives::Error>,
    },
    /// This process has lost a GPU: it hangs, or every call on it fails since one before went wrong. The embedded engine on
    /// it is dead, and others of this process on that GPU will be.
    #[cfg(feature = "cuda")]
    #[error("{doing} (GPU {ordinal}): {source}; the process has lost this GPU: start it again")]
    GpuLost {
        /// What was under way.
        doing: &'static str,
        /// The GPU's ordinal among those that this process sees.
        ordinal: usize,
        /// What the driver said.
        #[source]
        source: Box<lightrft_collectives::Error>,
    },
    /// A GPU has too little memory for the embedded engine. What it had before it has still.
    #[cfg(feature = "cuda")]
    #[error(
        "GPU {ordinal} has {free_bytes} bytes free, {what} takes {needed_bytes}: let others give memory up, or take fewer \
         bytes by the settings' `cache_bytes`, `max_sequences` or a narrower `dtype`"
    )]
    GpuMemory {
        /// The GPU's ordinal in this process.
        ordinal: usize,
        /// What it was for.
        what: &'static str,
        /// Bytes that were asked for.
        needed_bytes: u64,
        /// Bytes that were free.
        free_bytes: u64,
    },
    /// A setting of an engine that makes no sense; nothing was started.
    #[error("{engine}: {field} = {value}: {expected}")]
    Settings {
        /// Which engine.
        engine: &'static str,
        /// The setting.
        field: &'static str,
        /// Its value.
        value: String,
        /// What was expected.
        expected: &'static str,
    },
    /// What an engine has after an update is not what was sent; the engine is stale.
    #[error(
        "{engine}: `{name}` after the update to {version}: {what}; update it once more, and if that finds the same, \
         compare the model and the `dtype` of both sides"
    )]
    Unequal {
        /// Which engine.
        engine: &'static str,
        /// The parameter, by the engine's name.
        name: String,
        /// The version that was to be committed.
        version: crate::Version,
        /// What differs.
        what: String,
    },
    /// An inference server: its process, the connection to it, its replies.
    #[cfg(any(feature = "sglang", feature = "vllm"))]
    #[error(transparent)]
    Server(Box<crate::ServerError>),
    /// One of several engines behind one handle.
    #[error("replica {replica}: {source}")]
    Replica {
        /// Its index.
        replica: usize,
        /// Its own error.
        #[source]
        source: Box<Error>,
    },
    /// No engine of several is left: all died, and none could be restarted.
    #[error("none of {count} replicas is left to {operation}; the last failure: {source}")]
    NoReplica {
        /// What was under way.
        operation: &'static str,
        /// How many there were.
        count: usize,
        /// What the last of them ended with, or why it could not be restarted.
        #[source]
        source: Box<Error>,
    },
    /// A request, or another that was sent along with it each time, is what engines died of.
    #[error("request {request} was under way on {deaths} replicas that died; the last: {source}")]
    Deadly {
        /// Index of the request in the call.
        request: usize,
        /// How many engines died.
        deaths: usize,
        /// What the last of them ended with.
        #[source]
        source: Box<Error>,
    },
    /// The engine itself failed.
    #[error("{engine}: {operation}: {source}")]
    Backend {
        /// Which engine.
        engine: &'static str,
        /// What it was doing.
        operation: &'static str,
        /// Its own error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Examples in a message, if there are any.
fn among(examples: &[String]) -> String {
    if examples.is_empty() { String::new() } else { format!(" (among them {})", examples.join(", ")) }
}

impl Error {
    /// Whether the engine is gone and stands at [`State::Dead`] since. Every call of a dead engine is
    /// [refused](Error::Refused); the one that finds it dead may also say how it ended. Told by the error alone, for where
    /// the engine cannot be asked: while an update borrows it.
    pub fn is_death(&self) -> bool {
        match self {
            Error::Refused(refusal) => refusal.state == State::Dead,
            #[cfg(any(feature = "sglang", feature = "vllm"))]
            Error::Server(error) => error.is_the_end(),
            #[cfg(feature = "cuda")]
            Error::GpuLost { .. } => true,
            _ => false,
        }
    }
}

#[cfg(any(feature = "sglang", feature = "vllm"))]
impl From<crate::ServerError> for Error {
    fn from(error: crate::ServerError) -> Self {
        Error::Server(Box::new(error))
    }
}
