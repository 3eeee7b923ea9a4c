//! Writing a model folder: names, dtypes and shapes first, then the bytes of each tensor in turn, also in pieces.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::Xxh3;

use super::companions::{
    companions, copy_companion, embedding, is_output, read_config, says_tied, set_dtype,
};
use super::floats::{Floats, convert};
use super::place::{Staging, check_replaceable};
use super::shards::{file_name, split};
use super::{CONFIG, INDEX};
use crate::catalog::Skipped;
use crate::element::element_bytes;
use crate::error::{Error, Result};
use crate::fs::FileSystem;
use crate::os::OsFileSystem;
use crate::publish::write_durably;
use crate::safetensors::{Body, TensorSpec};

/// Bytes converted at a time.
const CONVERTED_BYTES: usize = 1 << 20;

/// How a model folder is written.
#[derive(Clone, Debug)]
pub struct HfOptions {
    /// The dtype in which floats are written.
    pub floats: Floats,
    /// Bytes of tensors that a file holds before the next one begins; a tensor that is larger has a file of its own.
    pub max_shard_bytes: u64,
    /// A model folder whose `config.json` is taken, and whose tokenizer and processor files are copied: the regular
    /// files directly in it that end in `.json`, `.jinja`, `.txt`, `.model`, `.tiktoken`, `.spm` or `.py`, without
    /// indices of weights, adapters' configurations and logs of training.
    pub source: Option<PathBuf>,
    /// A configuration instead of the source's `config.json`. Without any, no `config.json` is written.
    pub config: Option<Map<String, Value>>,
}

impl Default for HfOptions {
    /// Floats as given, files of 5 GB (5 * 10^9 bytes), nothing beside the weights.
    fn default() -> Self {
        HfOptions { floats: Floats::AsGiven, max_shard_bytes: 5_000_000_000, source: None, config: None }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HfReport {
    /// Files of weights.
    pub shards: usize,
    /// Tensors in them.
    pub tensors: usize,
    /// Bytes of all tensors as they are written.
    pub bytes: u64,
    /// What could not be removed of the folder that was replaced, and why. The new one is in its place.
    pub not_removed: Vec<Skipped>,
}

/// Writes a Hugging Face model folder with a tensor, or a piece of one, in memory at a time.
///
/// One file, `model.safetensors`, when everything fits into [`max_shard_bytes`](HfOptions::max_shard_bytes), else
/// `model-00001-of-0000N.safetensors` and so on, split as `huggingface_hub` does, with `model.safetensors.index.json`.
///
/// The folder appears under its name when [`finish`](Self::finish) returns, complete and durable; until then the one
/// that was there stays. It is replaced only when all that it holds is weights, or files that are written anew. Where
/// the file system can exchange two directories (Linux and macOS, local disks) a crash leaves the old folder or the
/// new one; elsewhere it may also leave the old one as `{name}.replaced-…`, and the next export to this name renames
/// it back. Folders that crashed exports to this name left are removed by the next one.
#[derive(Debug)]
pub struct HfWriter {
    fs: Arc<dyn FileSystem>,
    path: PathBuf,
    staging: Staging,
    shards: Vec<Shard>,
    tensors: HashMap<String, Announced>,
    tied: Option<Tied>,
    /// The names of what lies beside the weights.
    beside: Vec<String>,
    bytes: u64,
    finished: bool,
}

/// A tensor that is written: where, and how it is given.
#[derive(Clone, Copy, Debug)]
struct Announced {
    shard: usize,
    given: Dtype,
    elements: usize,
}

#[derive(Debug)]
struct Shard {
    name: String,
    specs: Vec<TensorSpec>,
    file: Progress,
}

#[derive(Debug)]
enum Progress {
    Waiting,
    Open(Box<Body>),
    Durable,
}

/// An output projection that the configuration says is the embedding: given, but not written.
struct Tied {
    embedding: String,
    output: TensorSpec,
    /// Checksums of what was given for either, and how many bytes for the output.
    sums: Box<[Xxh3; 2]>,
    given: usize,
}

impl std::fmt::Debug for Tied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tied({} = {})", self.output.name, self.embedding)
    }
}

impl HfWriter {
    /// Begins the folder `path`. The tensors are given in the order of the model, which decides what goes into which
    /// file; dtypes are those that the bytes will have when they are pushed.
    ///
    /// # Errors
    /// [`Error::Request`] for no tensor, a name used twice, or a size that overflows; [`Error::Foreign`] when the
    /// folder that is there holds something that would be lost; [`Error::Damaged`] for a source whose `config.json`
    /// is none; [`Error::Io`].
    pub fn create(
        path: impl Into<PathBuf>,
        tensors: impl IntoIterator<Item = TensorSpec>,
        options: &HfOptions,
    ) -> Result<Self> {
        Self::create_on(Arc::new(OsFileSystem::new()), path, tensors, options)
    }

    /// Like [`create`](Self::create), on a file system of the caller's choice.
    ///
    /// # Errors
    /// As there.
    pub fn create_on(
        fs: Arc<dyn FileSystem>,
        path: impl Into<PathBuf>,
        tensors: impl IntoIterator<Item = TensorSpec>,
        options: &HfOptions,
    ) -> Result<Self> {
        let path = path.into();
        if path.file_name().is_none() {
            return Err(Error::Request {
                name: path.display().to_string(),
                reason: "no name for a folder".into(),
            });
        }
        let mut given: Vec<TensorSpec> = tensors.into_iter().collect();
        let source = options.source.as_deref();
        let config = match (&options.config, source) {
            (Some(config), _) => Some(config.clone()),
            (None, Some(source)) => read_config(fs.as_ref(), source)?,
            (None, None) => None,
        };
        let says = config.as_ref().and_then(says_tied);
        let tied = if says == Some(true) { Tied::find(&mut given)? } else { None };
        if given.is_empty() {
            return Err(Error::Request {
                name: path.display().to_string(),
                reason: "a model without tensors".into(),
            });
        }
        let layout = Layout::new(&given, options)?;
        let config = config.map(|mut config| {
            layout.floats.into_iter().for_each(|dtype| set_dtype(&mut config, dtype));
            config
        });
        let copied = source.map(|source| companions(fs.as_ref(), source)).transpose()?.unwrap_or_default();
        let mut beside = copied.clone();
        beside.extend(config.is_some().then(|| CONFIG.to_owned()));

        let parent = crate::fs::parent_of(&path);
        fs.create_dir_all(parent).map_err(Error::io("create", parent))?;
        check_replaceable(fs.as_ref(), &path, &beside)?;
        let staging = Staging::begin(fs.as_ref(), &path, beside.clone())?;
        let writer = HfWriter {
            fs,
            path,
            staging,
            shards: layout.shards,
            tensors: layout.tensors,
            tied,
            beside,
            bytes: layout.bytes,
            finished: false,
        };
        if let Some(config) = config {
            writer.write_beside(CONFIG, &pretty(&Value::Object(config)))?;
        }
        for (name, source) in copied.iter().zip(std::iter::repeat(source).flatten()) {
            copy_companion(writer.fs.as_ref(), &source.join(name), &writer.staging.path.join(name))?;
        }
        Ok(writer)
    }

    /// The names in an order in which they can be pushed: file by file. Tensors of one width can be pushed in the
    /// order in which they were given as well.
    pub fn order(&self) -> impl Iterator<Item = &str> {
        let tied = self.tied.iter().map(|tied| tied.output.name.as_str());
        self.shards.iter().flat_map(|s| s.specs.iter().map(|t| t.name.as_str())).chain(tied)
    }

    /// Appends all bytes of a tensor, in the dtype that was announced.
    ///
    /// # Errors
    /// [`Error::NoTensor`] for a name that was not announced; [`Error::Request`] when it is not that tensor's turn in
    /// its file or the length is not its; [`Error::Io`].
    pub fn push(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (given, elements) = self.announced(name)?;
        let expected = elements.saturating_mul(element_bytes(given).unwrap_or(1));
        if bytes.len() != expected {
            let reason = format!("{} bytes given, {expected} expected", bytes.len());
            return Err(Error::Request { name: name.into(), reason });
        }
        self.push_piece(name, bytes)
    }

    /// Appends the next elements of a tensor; it is over after its last.
    ///
    /// # Errors
    /// As of [`push`](Self::push); [`Error::Request`] for a piece that is not whole elements, or one element too many.
    pub fn push_piece(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (given, _) = self.announced(name)?;
        let size = element_bytes(given).unwrap_or(1);
        if !bytes.len().is_multiple_of(size) {
            let reason = format!("{} bytes are not whole elements of {given:?}", bytes.len());
            return Err(Error::Request { name: name.into(), reason });
        }
        if let Some(tied) = self.tied.as_mut().filter(|tied| tied.output.name == name) {
            return tied.take(bytes);
        }
        let Some(announced) = self.tensors.get(name) else { return Err(self.unknown(name)) };
        let shard = &mut self.shards[announced.shard];
        if matches!(shard.file, Progress::Waiting) {
            let path = self.staging.path.join(&shard.name);
            // What HF's loader asks for.
            let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
            let body = Body::create(self.fs.as_ref(), path, shard.specs.clone(), &metadata)?;
            shard.file = Progress::Open(Box::new(body));
        }
        let Progress::Open(body) = &mut shard.file else {
            let reason = format!("all tensors of `{}` are written already", shard.name);
            return Err(Error::Request { name: name.into(), reason });
        };
        let written = body.turn_dtype(name)?;
        if written == given {
            body.push_piece(name, bytes)?;
        } else {
            let mut converted =
                vec![0; bytes.len().min(CONVERTED_BYTES) / size * element_bytes(written).unwrap_or(1)];
            // At least once: a tensor without elements is over after an empty piece.
            let mut rest = bytes;
            loop {
                let (now, later) = rest.split_at(rest.len().min(CONVERTED_BYTES));
                let into = &mut converted[..now.len() / size * element_bytes(written).unwrap_or(1)];
                if !convert(given, now, written, into) {
                    let reason = format!("{given:?} cannot be written as {written:?}");
                    return Err(Error::Request { name: name.into(), reason });
                }
                body.push_piece(name, into)?;
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
        }
        // Bytes that were refused, which may come again, are none of the embedding's.
        if let Some(tied) = self.tied.as_mut().filter(|tied| tied.embedding == name) {
            tied.sums[0].update(bytes);
        }
        if body.is_whole() {
            body.sync()?;
            shard.file = Progress::Durable;
        }
        Ok(())
    }

    /// Makes the folder durable and gives it its name.
    ///
    /// # Errors
    /// [`Error::Request`] naming a tensor whose bytes were not all pushed, or an output projection that
    /// `config.json` says is the embedding and that has other values; [`Error::Foreign`] and [`Error::Io`] as of
    /// [`create`](Self::create).
    pub fn finish(mut self) -> Result<HfReport> {
        for shard in &mut self.shards {
            match &mut shard.file {
                Progress::Durable => {}
                // Names the tensor whose turn it is.
                Progress::Open(body) => body.sync()?,
                Progress::Waiting => {
                    let name = shard.specs.first().map(|s| s.name.clone()).unwrap_or_default();
                    return Err(Error::Request { name, reason: "its bytes were not pushed".into() });
                }
            }
        }
        self.tied.as_ref().map_or(Ok(()), Tied::check)?;
        if self.shards.len() > 1 {
            let lies_in = |s: &Shard| {
                s.specs.iter().map(|t| (t.name.clone(), s.name.clone().into())).collect::<Vec<_>>()
            };
            let weight_map: Map<String, Value> = self.shards.iter().flat_map(lies_in).collect();
            let index = json!({"metadata": {"total_size": self.bytes}, "weight_map": weight_map});
            self.write_beside(INDEX, &pretty(&index))?;
        }
        check_replaceable(self.fs.as_ref(), &self.path, &self.beside)?;
        let not_removed = self.staging.publish(self.fs.as_ref(), &self.path)?;
        self.finished = true;
        let tensors = self.tensors.len();
        Ok(HfReport { shards: self.shards.len(), tensors, bytes: self.bytes, not_removed })
    }

    fn write_beside(&self, name: &str, content: &[u8]) -> Result<()> {
        write_durably(self.fs.as_ref(), &self.staging.path.join(name), content)
    }

    /// The dtype and the number of elements in which a tensor is given.
    fn announced(&self, name: &str) -> Result<(Dtype, usize)> {
        if let Some(tied) = self.tied.as_ref().filter(|tied| tied.output.name == name) {
            return Ok((tied.output.dtype, elements(&tied.output)?));
        }
        let announced = self.tensors.get(name).ok_or_else(|| self.unknown(name))?;
        Ok((announced.given, announced.elements))
    }

    fn unknown(&self, name: &str) -> Error {
        Error::NoTensor { within: self.path.display().to_string(), name: name.into() }
    }
}

impl Drop for HfWriter {
    fn drop(&mut self) {
        if !self.finished {
            self.staging.abandon(self.fs.as_ref());
        }
    }
}

impl Tied {
    /// Takes the output projection out of `given` when the embedding is there too.
    fn find(given: &mut Vec<TensorSpec>) -> Result<Option<Tied>> {
        let Some(at) = given.iter().position(|spec| is_output(&spec.name)) else { return Ok(None) };
        let names = given.iter().map(|spec| spec.name.as_str());
        let Some(embedding) = embedding(names).and_then(|name| given.iter().find(|s| s.name == name)) else {
            return Ok(None);
        };
        if (embedding.dtype, &embedding.shape) != (given[at].dtype, &given[at].shape) {
            let reason = format!(
                "tie_word_embeddings says that it is `{}`, which is {:?} {:?} and not {:?} {:?}",
                embedding.name, embedding.dtype, embedding.shape, given[at].dtype, given[at].shape
            );
            return Err(Error::Request { name: given[at].name.clone(), reason });
        }
        let embedding = embedding.name.clone();
        Ok(Some(Tied { embedding, output: given.remove(at), sums: Box::default(), given: 0 }))
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let given = self.given.saturating_add(bytes.len());
        let expected = self.output.bytes()?;
        if given > expected {
            let reason = format!("{given} bytes given, {expected} expected");
            return Err(Error::Request { name: self.output.name.clone(), reason });
        }
        self.given = given;
        self.sums[1].update(bytes);
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let refuse = |reason| Err(Error::Request { name: self.output.name.clone(), reason });
        if self.given != self.output.bytes()? {
            return refuse("its bytes were not all pushed".into());
        }
        if self.sums[0].digest128() != self.sums[1].digest128() {
            let embedding = &self.embedding;
            return refuse(format!(
                "tie_word_embeddings says that it is `{embedding}`, but their values differ"
            ));
        }
        Ok(())
    }
}

/// The number of a tensor's elements, multiplied up in the order of its dims: where that overflows before it comes to a
/// zero, readers of the format refuse the whole file.
fn elements(spec: &TensorSpec) -> Result<usize> {
    let reason = || format!("shape {:?} has too many elements", spec.shape);
    let product = spec.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    product.ok_or_else(|| Error::Request { name: spec.name.clone(), reason: reason() })
}

/// Which tensor is written where, and as what.
struct Layout {
    shards: Vec<Shard>,
    tensors: HashMap<String, Announced>,
    bytes: u64,
    /// The dtype of all floats that are written; `None` when there are several, or none.
    floats: Option<Dtype>,
}

impl Layout {
    fn new(given: &[TensorSpec], options: &HfOptions) -> Result<Layout> {
        let written: Vec<TensorSpec> = given
            .iter()
            .map(|s| TensorSpec::new(s.name.clone(), options.floats.written(s.dtype), s.shape.clone()))
            .collect();
        let sizes: Vec<u64> = written.iter().map(|s| Ok(s.bytes()? as u64)).collect::<Result<_>>()?;
        let (shard_of, count) = split(&sizes, options.max_shard_bytes);
        let mut shards: Vec<Shard> = (0..count)
            .map(|i| Shard { name: file_name(i, count), specs: Vec::new(), file: Progress::Waiting })
            .collect();
        let mut tensors = HashMap::new();
        for ((spec, given), &shard) in written.iter().zip(given).zip(&shard_of) {
            let announced = Announced { shard, given: given.dtype, elements: elements(spec)? };
            if tensors.insert(spec.name.clone(), announced).is_some() {
                return Err(Error::Request { name: spec.name.clone(), reason: "the name is taken".into() });
            }
            shards[shard].specs.push(spec.clone());
        }
        // Wide dtypes first, so that every tensor is aligned to its elements: some readers cannot do without.
        shards.iter_mut().for_each(|s| s.specs.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize())));
        let is_float = |d: &Dtype| matches!(d, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64);
        let mut floats: Vec<Dtype> = written.iter().map(|s| s.dtype).filter(is_float).collect();
        floats.dedup();
        let floats = (floats.len() == 1).then(|| floats[0]);
        let bytes = sizes.iter().fold(0u64, |sum, &b| sum.saturating_add(b));
        Ok(Layout { shards, tensors, bytes, floats })
    }
}

/// Indented by two, with a newline at the end, as HF writes its JSON files.
fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
