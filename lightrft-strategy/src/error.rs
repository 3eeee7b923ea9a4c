//! What can go wrong in a training run, with the crate it came from as its source.

use std::path::PathBuf;

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A run that cannot start or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two settings contradict each other, or one is out of range.
    #[error("configuration: {fields}: {what}")]
    Config {
        /// The field, or all fields that take part, with their values.
        fields: String,
        /// What was expected.
        what: String,
    },
    /// A configuration file is not one.
    #[error("configuration {}: {what}", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        what: String,
    },
    /// A prompt does not fit.
    #[error("{location}: the prompt has {tokens} tokens: {what}")]
    Prompt {
        /// Where it stands in its data set.
        location: String,
        /// Its length in tokens.
        tokens: usize,
        /// What was expected.
        what: String,
    },
    /// A reward that is no number.
    #[error("the answer {answer:?} to {prompt:?} has the reward {reward}: a finite number was expected")]
    Reward {
        /// The prompt.
        prompt: String,
        /// The answer.
        answer: String,
        /// What the reward function said.
        reward: f32,
    },
    /// An engine's reply that is not what was asked for.
    #[error("the engine's reply: {what}")]
    Completions {
        /// What is wrong with it.
        what: String,
    },
    /// Text that the tokenizer cannot encode, or tokens it cannot decode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A file of the run could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A picture could not be drawn.
    #[error("plot {}: {what}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        what: String,
    },
    /// A checkpoint of another run: its seed or its prompts differ. (One of another model is [`Error::Checkpoint`], with
    /// the tensors that differ.)
    #[error("checkpoint {tag}: {what}")]
    Resume {
        /// The checkpoint's tag.
        tag: String,
        /// What differs.
        what: String,
    },
    /// Another rank failed in a step that all ranks take together.
    #[error("rank {rank} failed in {phase}: {what}")]
    OtherRank {
        /// Its rank in the world.
        rank: usize,
        /// What all ranks were doing.
        phase: &'static str,
        /// What it reported.
        what: String,
    },
    /// Ranks could not talk to each other.
    #[error(transparent)]
    Collectives(#[from] lightrft_collectives::Error),
    /// Parameters could not be sharded, gathered or stepped.
    #[error(transparent)]
    Sharding(#[from] lightrft_sharding::Error),
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] lightrft_engine::Error),
    /// A model folder is wrong.
    #[error(transparent)]
    Model(#[from] lightrft_engine::embedded::ModelError),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] lightrft_ckpt::Error),
    /// A data set is wrong.
    #[error(transparent)]
    Data(#[from] lightrft_data::Error),
    /// A loss or an advantage was asked for with inputs that do not fit.
    #[error(transparent)]
    Rl(#[from] crate::rl::Error),
    /// The tensor library refused an operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn config(fields: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Config { fields: fields.into(), what: what.into() }
    }
}
