//! What can go wrong, said with the file and line, the index, or the prompt it went wrong at.

use std::path::PathBuf;
use std::time::Duration;

use crate::media::MediumProblem;
use crate::mixture::MixtureProblem;
use crate::multimodal::{MediaKind, MediaProblem};

/// Everything this crate refuses to do, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Ranks count from 0 and a world has at least one of them.
    #[error("rank {rank} is not in a world of {world}: ranks are 0..{world}")]
    RankOutOfRange {
        /// The rank that was asked for.
        rank: usize,
        /// How many ranks there are.
        world: usize,
    },
    /// More samples were reported as consumed than the epoch holds.
    #[error(
        "{consumed} samples consumed in epoch {epoch}, which holds {total} (padding included) over {world} ranks"
    )]
    ConsumedBeyondEpoch {
        /// The epoch in question.
        epoch: u64,
        /// Samples consumed by all ranks together, as the caller said.
        consumed: u64,
        /// Samples of the epoch over all ranks, with padding or without the dropped tail.
        total: u64,
        /// How many ranks there are.
        world: usize,
    },
    /// A saved position belongs to another order of samples.
    #[error("the saved position has {field} = {saved}, this sampler has {field} = {current}")]
    StateMismatch {
        /// Which setting differs.
        field: &'static str,
        /// Its value when the position was saved.
        saved: String,
        /// Its value now.
        current: String,
    },
    /// The order of the samples needs more memory than there is, or more than a number can count.
    #[error("{what} for {len} samples does not fit ({needed} bytes); `Shuffle::Seekable` needs no table")]
    TooLarge {
        /// What was to be allocated or computed.
        what: &'static str,
        /// How many samples there are.
        len: usize,
        /// Bytes that were asked for, or `usize::MAX` where the number itself overflows.
        needed: usize,
    },
    /// An index outside of the data set.
    #[error("index {index} is outside of a data set of {len} samples")]
    IndexOutOfRange {
        /// The index that was asked for.
        index: usize,
        /// How many samples there are.
        len: usize,
    },
    /// The operating system refused to open or read a file.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried: "open", "read".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file without a single sample.
    #[error("{} holds no sample ({bad_lines} bad lines were skipped)", path.display())]
    NoSamples {
        /// The file.
        path: PathBuf,
        /// Lines that were skipped because they were bad.
        bad_lines: u64,
    },
    /// A Parquet file that cannot be read, or a part of it.
    #[error("{}{}: {message}", path.display(), within(*row_group, *row, column.as_deref()))]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The row group, from 0, if it is not the file as a whole.
        row_group: Option<usize>,
        /// The row of the file that was to be read, from 0; its row group may be what is broken.
        row: Option<u64>,
        /// The column, where one is to blame.
        column: Option<String>,
        /// What is wrong.
        message: String,
    },
    /// A line of a JSON Lines file that is not a sample, or a row of a Parquet file.
    #[error(transparent)]
    BadLine(#[from] BadLine),
    /// A sample that could not be read while a batch was put together.
    #[error("sample {index} ({at}) cannot be read")]
    Sample {
        /// The sample's index in the data set.
        index: usize,
        /// Where the data set says that it lies: a file and line, for example.
        at: String,
        /// Why.
        source: Box<Error>,
    },
    /// More samples of an epoch could not be read than [`BadSamples::Skip`](crate::BadSamples::Skip) allows.
    #[error("more than {most} samples of this epoch cannot be read, the last one at {at}: {problem}")]
    TooManyBadSamples {
        /// How many are allowed.
        most: u64,
        /// Where the first one beyond that lies.
        at: String,
        /// Why it cannot be read.
        problem: String,
    },
    /// Reading a sample panicked; the data set has a defect.
    #[error("reading sample {index} panicked: {message}")]
    SamplePanicked {
        /// The sample's index in the data set.
        index: usize,
        /// What the panic said.
        message: String,
    },
    /// The loader's collate function refused the samples of a pass.
    #[error("pass {pass} of a batch of epoch {epoch} (samples {}) cannot be collated", listed(indices))]
    Collate {
        /// The epoch.
        epoch: u64,
        /// Which pass of the batch, from 0.
        pass: usize,
        /// The indices of its samples in the data set.
        indices: Vec<usize>,
        /// Why.
        source: Box<Error>,
    },
    /// The loader's collate function panicked.
    #[error(
        "collating pass {pass} of a batch of epoch {epoch} (samples {}) panicked: {message}",
        listed(indices)
    )]
    CollatePanicked {
        /// The epoch.
        epoch: u64,
        /// Which pass of the batch, from 0.
        pass: usize,
        /// The indices of its samples in the data set.
        indices: Vec<usize>,
        /// What the panic said.
        message: String,
    },
    /// No batch arrived before the loader's deadline.
    #[error("no batch within {waited:?}: the next one begins with sample {first_index}")]
    Stalled {
        /// How long the loader waited.
        waited: Duration,
        /// First index of the batch that is missing.
        first_index: usize,
    },
    /// All buffers of a [`StagingPool`](crate::StagingPool) were in use until the deadline.
    #[error(
        "none of {buffers} staging buffers was given back within {waited:?}: drop batches, or have more buffers"
    )]
    StagingExhausted {
        /// How many there are.
        buffers: usize,
        /// How long it was waited for one.
        waited: Duration,
    },
    /// A setting that cannot work.
    #[error("{setting} = {value}: {expected}")]
    Setting {
        /// The setting's name.
        setting: &'static str,
        /// The value that was given.
        value: usize,
        /// What is allowed.
        expected: &'static str,
    },
    /// A sequence whose parts do not fit together.
    #[error("row {row}: {what} has {got} elements, expected {expected}")]
    Length {
        /// The row of the batch.
        row: usize,
        /// Which part.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that it should have, or the most that is allowed.
        expected: usize,
    },
    /// A loss mask that says neither yes nor no.
    #[error("row {row}: the loss mask holds {found} at token {token}, expected 0 or 1")]
    Mask {
        /// The row of the batch.
        row: usize,
        /// The token's place in the row.
        token: usize,
        /// What the mask holds.
        found: u8,
    },
    /// Data sets that cannot be mixed.
    #[error("the mixture cannot be drawn from: {0}")]
    Mixture(#[from] MixtureProblem),
    /// Images, videos or sounds that cannot be matched with their prompts.
    #[error("prompt {prompt}: {kind}: {problem}")]
    Media {
        /// The prompt's place in the batch, from 0.
        prompt: usize,
        /// Images, videos or sounds.
        kind: MediaKind,
        /// What does not match.
        problem: MediaProblem,
    },
    /// An image, a video or a sound of a prompt that cannot be had.
    #[error("prompt {prompt}: {kind}: number {place} ({at}): {problem}")]
    Medium {
        /// The prompt's place in the batch, from 0.
        prompt: usize,
        /// Images, videos or sounds.
        kind: MediaKind,
        /// Which of the prompt's images, videos or sounds, from 0.
        place: usize,
        /// Where it, or its frame that is at fault, comes from: a path, the beginning of an address, a number of bytes.
        at: String,
        /// Why.
        problem: Box<MediumProblem>,
    },
    /// A chat template, or an input template, that cannot be read or rendered.
    #[error("template: cannot {action}: {message}")]
    Template {
        /// What was tried.
        action: &'static str,
        /// What is wrong: the template's own words where it raised an exception.
        message: String,
    },
    /// A tokenizer that cannot be read, or that refuses a text.
    #[error("tokenizer: {message}")]
    Tokenizer {
        /// What it said.
        message: String,
    },
    /// A prompt of more tokens than allowed, which must not, or cannot, be cut.
    #[error("prompt {prompt} has {tokens} tokens, {max} are allowed{hint}")]
    PromptTooLong {
        /// The prompt's place in the batch, from 0.
        prompt: usize,
        /// Its tokens.
        tokens: usize,
        /// The limit that was set.
        max: usize,
        /// Why it was not cut, where cutting was asked for.
        hint: &'static str,
    },
    /// A data set of the caller's own failed; see [`Error::other`].
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Wraps an error of a [`Dataset`](crate::Dataset) that is not one of this crate's.
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Error::Other(error.into())
    }
}

/// The part of a Parquet file that is meant, for messages.
fn within(row_group: Option<usize>, row: Option<u64>, column: Option<&str>) -> String {
    let mut place = row.map_or(String::new(), |row| format!(": row {row}"));
    if let Some(group) = row_group {
        place.push_str(&format!(" (row group {group})"));
    }
    if let Some(column) = column {
        place.push_str(&format!(": column `{column}`"));
    }
    place
}

/// The first of some indices, for messages.
fn listed(indices: &[usize]) -> String {
    const SHOWN: usize = 8;
    let first: Vec<_> = indices.iter().take(SHOWN).map(usize::to_string).collect();
    let more = match indices.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", first.join(", "))
}

/// A line of a JSON Lines file, or a row of a Parquet file, that is not a sample, with its place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {problem}", self.place())]
pub struct BadLine {
    /// The file.
    pub path: PathBuf,
    /// The line, counted from 1; blank lines count. In a Parquet file the row, counted from 0.
    pub line: u64,
    /// The row group of a Parquet file, from 0; `None` for JSON Lines.
    pub row_group: Option<usize>,
    /// What is wrong with it.
    pub problem: LineProblem,
}

impl BadLine {
    fn place(&self) -> String {
        let Self { path, line, .. } = self;
        match self.row_group {
            None => format!("{}:{line}", path.display()),
            Some(group) => format!("{}: row {line} (row group {group})", path.display()),
        }
    }
}

/// What can be wrong with one line of a JSON Lines file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LineProblem {
    /// Not JSON.
    #[error("not JSON: {message} (column {column})")]
    Json {
        /// Column in bytes, from 1.
        column: usize,
        /// What the parser said.
        message: String,
    },
    /// Bytes that are not UTF-8.
    #[error("not UTF-8 from byte {byte} of the line on")]
    InvalidUtf8 {
        /// Offset in the line of the first wrong byte, from 0.
        byte: usize,
    },
    /// An integer that fits neither an `i64` nor a `u64`, and would be read as the nearest floating-point number.
    #[error("the integer {text} does not fit 64 bits and would lose digits; write it as a string")]
    Integer {
        /// The beginning of the number, as it stands there.
        text: String,
    },
    /// JSON, but not an object.
    #[error("expected an object, found {found}")]
    NotAnObject {
        /// The JSON type that stands there.
        found: &'static str,
    },
    /// The object lacks a key that was asked for.
    #[error("no key `{key}`; the line has: {present}")]
    MissingKey {
        /// The key that is missing.
        key: String,
        /// The keys that are there, with commas.
        present: String,
    },
    /// The value under a key has the wrong type.
    #[error("`{key}` must be {expected}, found {found}")]
    WrongType {
        /// The key.
        key: String,
        /// The JSON type that is wanted.
        expected: &'static str,
        /// The JSON type that stands there.
        found: &'static str,
    },
    /// The prompt is a list of chat messages, which needs a chat template that this reader does not apply.
    #[error(
        "`{key}` is a list of {messages} chat messages; render it to a string with the model's chat template"
    )]
    ChatPrompt {
        /// The key.
        key: String,
        /// How many messages the list holds.
        messages: usize,
    },
    /// A message of a conversation that is none.
    #[error("message {index}: {expected} expected")]
    Message {
        /// Its place in the conversation, from 0.
        index: usize,
        /// What should be there.
        expected: &'static str,
    },
    /// The messages have another number of places for images, videos or sounds than the record has of them.
    #[error("{kind}: {media} in the record, {parts} places for them in its messages")]
    MediaParts {
        /// Images, videos or sounds.
        kind: MediaKind,
        /// In the record.
        media: usize,
        /// In its messages.
        parts: usize,
    },
    /// Something that is no image, no video and no sound, nor a way to one.
    #[error("{kind}: number {place}: {message}")]
    Medium {
        /// Images, videos or sounds.
        kind: MediaKind,
        /// Which one, from 0.
        place: usize,
        /// What is wrong.
        message: String,
    },
    /// The chat template refused the record.
    #[error("the chat template: {message}")]
    Template {
        /// What it said.
        message: String,
    },
    /// The line is longer than the reader accepts.
    #[error("longer than {limit} bytes")]
    TooLong {
        /// The limit that was set.
        limit: usize,
    },
}
