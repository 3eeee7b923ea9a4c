//! Which prompt, in which order, on which rank: resumable distributed sampling and loading.
//!
//! ```
//! use lightrft_data::{DistributedSampler, SamplerConfig, Shuffle, Tail};
//!
//! // Two ranks share ten prompts. Each knows its own part without asking the other.
//! let rank = |rank| {
//!     DistributedSampler::new(SamplerConfig {
//!         len: 10, rank, world: 2, seed: 42, shuffle: Shuffle::TorchExact, tail: Tail::Drop,
//!     })
//! };
//! let (mut zero, mut one) = (rank(0)?, rank(1)?);
//! assert_eq!(zero.next_indices(3)?, [2, 1, 4]);
//! assert_eq!(one.next_indices(3)?, [6, 8, 5]);
//!
//! // The run stops here. Any rank's state goes into the checkpoint, and any number of ranks resumes from it.
//! let state = zero.state();
//! let mut alone = DistributedSampler::new(SamplerConfig { rank: 0, world: 1, ..zero.config().clone() })?;
//! assert_eq!(alone.restore(&state)?, lightrft_data::Resume::Exact);
//! assert_eq!(alone.next_indices(10)?, [0, 9, 3, 7]);
//! # Ok::<_, lightrft_data::Error>(())
//! ```
//!
//! | step | here |
//! |---|---|
//! | where samples lie | [`Dataset`], [`JsonLines`], `Parquet` (feature `parquet`), [`InMemory`], [`Concat`] |
//! | the order of an epoch | [`Shuffle`], [`Permutation`]; of several data sets: [`Mixture`] |
//! | a rank's share, and where it stands | [`DistributedSampler`], [`SamplerState`], [`Resume`] |
//! | each prompt several times | [`Groups`] |
//! | steps and their passes | [`BatchSampler`], [`MicroBatch`] |
//! | batches, read ahead by threads | [`DataLoader`], [`CollatedBatch`]; in memory that a GPU copies from: [`StagingPool`] |
//! | sequences of unequal length to ranks | [`balance()`], [`partition()`] |
//! | token sequences to tensors' shapes | [`pad`], [`pack()`], [`sequence_parallel_slice`] |
//! | records to prompts | [`PromptDataset`], [`PromptFormat`], `ChatTemplate` (feature `templates`) |
//! | prompts to tokens | `PromptTokenizer` (feature `tokenizer`) |
//! | images and videos to their prompts | [`build_multimodal_inputs`], [`inputs_of`] |
//! | how many tokens they take | [`VisionTokens`], [`smart_resize`] |
//! | their pixels | [`MediaSource`], `MediaDecoder` (feature `images`), `HttpFetch` (feature `http`) |
//!
//! Everything blocks; waits have deadlines. Ranks are plain numbers: nothing here talks to another process.
//!
//! Not here: tensors, video containers, sound formats (a sound is [`Audio`]: bytes and a rate). The crate hands out
//! text, indices and plain vectors.
#![forbid(unsafe_code)]

#[cfg(feature = "parquet")]
mod arrow_json;
mod balance;
mod batch;
mod batches;
mod chairman;
#[cfg(feature = "templates")]
mod chat_template;
mod collate;
mod concat;
mod cursor;
mod dataset;
mod deal;
#[cfg(feature = "images")]
mod decode;
#[cfg(feature = "images")]
mod decode_batch;
mod draws;
mod error;
mod groups;
#[cfg(feature = "http")]
mod http;
#[cfg(feature = "images")]
mod jpeg;
mod jsonl;
mod keyed;
mod lines;
mod loader;
mod media;
#[cfg(feature = "images")]
mod media_bytes;
#[cfg(feature = "templates")]
mod messages;
mod mixture;
mod mt19937;
mod multimodal;
mod pack;
#[cfg(feature = "parquet")]
mod parquet_file;
mod partition;
mod placeholders;
mod positioned;
mod prefetch;
mod prompt;
mod prompt_dataset;
#[cfg(feature = "templates")]
mod python_json;
mod reader;
#[cfg(feature = "parquet")]
mod row_groups;
mod sampler;
mod scan;
#[cfg(feature = "parquet")]
mod schema_depth;
mod sequence_parallel;
mod shuffle;
#[cfg(feature = "templates")]
mod small_object;
mod staging;
#[cfg(feature = "templates")]
mod template_files;
#[cfg(feature = "tokenizer")]
mod tokenize;
mod torch_exact;
mod vision_tokens;

pub use balance::{Assignment, BalanceConfig, Cost, balance};
pub use batch::{BadSample, Batch, CollatedBatch, Pass};
pub use batches::{BatchConfig, BatchPlan, BatchSampler, LastBatch, MicroBatch};
#[cfg(feature = "templates")]
pub use chat_template::{ChatOptions, ChatTemplate, GenerationPrompt, OrderedJson};
pub use collate::{PadConfig, Side, TokenBatch, TokenSequence, pad};
pub use concat::Concat;
pub use cursor::{Resume, SamplerState};
pub use dataset::{Dataset, InMemory, Map};
#[cfg(feature = "images")]
pub use decode::{DecodeConfig, Fetch, MediaDecoder, PathPolicy};
#[cfg(feature = "images")]
pub use decode_batch::DecodedInput;
pub use draws::{Draws, Indices};
pub use error::{BadLine, Error, LineProblem};
pub use groups::{Draw, GroupPlacement, Groups};
#[cfg(feature = "http")]
pub use http::{HttpConfig, HttpFetch};
pub use jsonl::{BadLines, JsonLines, JsonLinesOptions, Skipped};
pub use loader::{BadSamples, DataLoader, LoaderConfig};
pub use media::{Audio, MediaSource, MediumProblem, Pixels};
pub use mixture::{Exhausted, Mixture, MixturePart, MixtureProblem};
pub use multimodal::{
    Media, MediaColumn, MediaColumns, MediaKind, MediaProblem, Mode, MultimodalInput,
    build_multimodal_inputs, is_multimodal,
};
pub use pack::{PackConfig, PackedBatch, pack};
#[cfg(feature = "parquet")]
pub use parquet_file::{Parquet, ParquetOptions};
pub use partition::{Counts, partition};
pub use prompt::{Keys, Prompt};
pub use prompt_dataset::{InputTemplate, PromptDataset, PromptFormat, PromptKeys, PromptRecord, inputs_of};
pub use sampler::{DistributedSampler, SamplerConfig, Tail};
pub use sequence_parallel::{SequenceSlice, sequence_parallel_slice};
pub use shuffle::{Permutation, Shuffle};
pub use staging::{StagingBuffer, StagingPool};
#[cfg(feature = "tokenizer")]
pub use tokenize::{PromptTokenizer, TokenizeConfig, Truncation};
pub use vision_tokens::{Grid, PixelBounds, VisionTokens, smart_resize};

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
