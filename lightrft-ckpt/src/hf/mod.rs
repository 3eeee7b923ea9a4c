//! Hugging Face model folders: `config.json`, tokenizer files and safetensors, in one file or in shards with an index.
//!
//! The layout and the names are those of `transformers`' `save_pretrained`, which reads what is written here.

mod checkpoint;
mod companions;
mod floats;
mod folder;
mod place;
mod shards;
mod writer;

pub use checkpoint::{ExportTensors, export_hf, export_hf_on};
pub use floats::Floats;
pub use folder::HfFolder;
pub use writer::{HfOptions, HfReport, HfWriter};

/// The file of a model that fits into one.
const SINGLE: &str = "model.safetensors";
/// Which tensor lies in which shard.
const INDEX: &str = "model.safetensors.index.json";
/// What the model is.
const CONFIG: &str = "config.json";
