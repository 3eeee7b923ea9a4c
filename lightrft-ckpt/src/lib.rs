//! Sharded checkpoints that survive a crash at any instruction, written by N ranks and read by any other number.
//!
//! The promise: after [`Saver::save`] has returned, the checkpoint is on the medium; before, the one before it is;
//! and no crash, on any rank, at any operation, leaves anything else.
//!
//! ```
//! use lightrft_ckpt::{Alone, Checkpoints, Part, Region, Rotation, Saver, Snapshot, Verify, Which};
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path();
//!
//! // Every rank opens the directory and saves its own parts; here is one rank, which holds all of a 2 x 3 tensor.
//! let weight = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
//! let saver = Saver::open(dir, &Alone)?;
//! let mut snapshot = Snapshot::of_step(40);
//! snapshot.parts.push(Part::new("layer.weight", &[2, 3][..], Region::Whole, &weight));
//! snapshot.shared = serde_json::json!({"consumed_samples": 5120});
//! saver.save(&Alone, &snapshot, &Rotation { max_num: 3, max_mem_gib: 1000.0, ..Rotation::default() })?;
//!
//! // Whoever resumes asks for the elements that it needs, whatever the ranks were that wrote them.
//! let (checkpoint, _) = Checkpoints::open(dir).load(Which::Newest, Verify::Everything)?;
//! let second_half = checkpoint.read_vec::<f32>("layer.weight", &Region::Flat(3..6))?;
//! assert_eq!((checkpoint.step(), second_half), (40, vec![4.0, 5.0, 6.0]));
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! | To | use |
//! |---|---|
//! | save, with all ranks of a group | [`Saver`], [`Snapshot`], [`Part`], [`Region`] |
//! | save while training goes on | [`BackgroundSaver`] |
//! | save several models of one run | [`save_together`], [`load_newest_common`] |
//! | let old ones go | [`Rotation`], applied after every save |
//! | find and read | [`Checkpoints`], [`Which`], [`Checkpoint`] |
//! | read straight into a model's memory, on all ranks | [`Checkpoints::restore`], [`Wanted`], [`Restore`] |
//! | tell another model's checkpoint | [`Checkpoint::check_against`] |
//! | let the ranks agree | [`Agreement`], implemented with whatever connects them; [`Alone`] |
//! | write and read single safetensors files | [`SafetensorsWriter`], [`SafetensorsFile`] |
//! | write a checkpoint's model as a Hugging Face folder | [`export_hf`], [`HfOptions`]; [`HfWriter`] |
//! | read such a folder, make a checkpoint of it | [`HfFolder`], [`HfFolder::share`] |
//! | write a checkpoint anew for another number of ranks | [`Checkpoint::share`], [`save_as_ranks`] |
//! | save elsewhere than on a local file system | [`FileSystem`] |
//!
//! The command `lightrft-ckpt` lists, inspects, verifies, exports and converts.
//!
//! Every call blocks. A directory has one [`Saver`] at a time (a lock sees to it) and any number of readers.
//!
//! # What a reader might wrongly assume
//!
//! - The order of checkpoints is their *step*, never a file's time. [`Which::Newest`] is the highest step; a run that
//!   went back and saves lower steps again is found by [`Which::Latest`].
//! - `latest` is written for people and other programs. A crash can leave it one save behind; nothing is lost then.
//! - Rotation comes after the save: for that long, one checkpoint more than [`Rotation::max_num`] needs room.
//! - A directory without our manifest is nobody's business here: it is neither counted nor deleted.
//!
//! Not here: what a tensor means, optimizers, process groups (`lightrft-sharding`, `lightrft-collectives`,
//! `lightrft-strategy`). Pickle is not read.

mod agreement;
mod aligned;
mod background;
mod block_writer;
mod blocks;
mod catalog;
mod checkpoint;
mod direct;
mod element;
mod error;
mod fetch;
mod fs;
mod hf;
mod inspect;
mod manifest;
#[cfg(test)]
mod manifest_lies;
mod os;
mod pieces;
mod plan;
mod publish;
mod ranks;
mod reader;
mod region;
mod restore;
mod rotation;
#[cfg(test)]
mod rotation_golden;
mod safetensors;
mod saver;
mod search;
mod share;
mod snapshot;
mod sweep;
#[cfg(feature = "testing")]
pub mod testing;
mod together;
mod wanted;
mod writer;

pub use ::safetensors::Dtype;
pub use agreement::{Agreement, Alone};
pub use background::{BackgroundSaver, Phase, Progress};
pub use catalog::Skipped;
pub use checkpoint::Checkpoint;
pub use element::Element;
pub use error::{Difference, Error, Mismatch, Result};
pub use fs::{Entry, EntryKind, FileSystem, Lock, ReadFile, WriteFile};
pub use hf::{ExportTensors, Floats, HfFolder, HfOptions, HfReport, HfWriter, export_hf, export_hf_on};
pub use inspect::{SavedRegion, Survey};
pub use os::OsFileSystem;
pub use reader::{Checkpoints, Listed, LoadReport, Verify, Which};
pub use region::Region;
pub use restore::{Restore, RestoreReport, Strictness};
pub use rotation::{MemCounts, Rotated, Rotation};
pub use safetensors::{SafetensorsFile, SafetensorsWriter, TensorSpec, write_safetensors};
pub use saver::{SaveReport, Saver};
pub use share::save_as_ranks;
pub use snapshot::{Part, Snapshot};
pub use together::{load_newest_common, save_together};
pub use wanted::Wanted;
