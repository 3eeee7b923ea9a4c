//! Reading a model folder: one file or many with an index, every tensor found, nothing trusted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::companions::{embedding, is_output, read_config, read_small, says_tied};
use super::floats::convert;
use super::{CONFIG, INDEX, SINGLE};
use crate::error::{Error, Result};
use crate::fs::FileSystem;
use crate::os::OsFileSystem;
use crate::region::Region;
use crate::safetensors::{SafetensorsFile, TensorSpec};

/// A Hugging Face model folder, open for positioned reads. Only headers are in memory.
#[derive(Debug)]
pub struct HfFolder {
    path: PathBuf,
    /// An unreadable one hinders nobody who wants the weights: Python writes numbers that JSON does not have.
    config: std::result::Result<Option<Map<String, Value>>, String>,
    files: Vec<SafetensorsFile>,
    file_of: HashMap<String, usize>,
}

impl HfFolder {
    /// Opens a folder: `model.safetensors`, or the files that `model.safetensors.index.json` names, each of which
    /// must hold the tensors that the index says and no other.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming the file that is wrong; [`Error::Io`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        Self::open_on(&OsFileSystem::new(), path)
    }

    /// Like [`open`](Self::open), on a file system of the caller's choice.
    ///
    /// # Errors
    /// As there.
    pub fn open_on(fs: &dyn FileSystem, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let config = match read_config(fs, &path) {
            Ok(config) => Ok(config),
            Err(Error::Damaged { reason, .. }) => Err(reason),
            Err(e) => return Err(e),
        };
        let index_path = path.join(INDEX);
        let index = match read_small(fs, &index_path)? {
            Some(content) => Some(parse_index(&content, &index_path)?),
            None => None,
        };
        let names: BTreeSet<&str> = match &index {
            Some(index) => index.values().map(String::as_str).collect(),
            None => BTreeSet::from([SINGLE]),
        };
        if !names.contains(SINGLE) && fs.open(&path.join(SINGLE)).is_ok() {
            let reason =
                format!("there is also `{SINGLE}`, which it does not name: which of them is the model?");
            return Err(Error::damaged(index_path, reason));
        }
        let mut files = Vec::with_capacity(names.len());
        let mut file_of: HashMap<String, usize> = HashMap::new();
        for (number, name) in names.into_iter().enumerate() {
            let file = SafetensorsFile::open_on(fs, path.join(name)).map_err(|e| match e {
                Error::Io { op: "open", source, .. }
                    if index.is_some() && source.kind() == io::ErrorKind::NotFound =>
                {
                    Error::damaged(&index_path, format!("it names `{name}`, which is not there"))
                }
                other => other,
            })?;
            for spec in file.tensors() {
                let says = index.as_ref().map_or(Some(name), |i| i.get(&spec.name).map(String::as_str));
                if says != Some(name) {
                    let says = says.map_or("does not name it".to_owned(), |says| format!("says `{says}`"));
                    let reason = format!("it holds tensor `{}`, but the index {says}", spec.name);
                    return Err(Error::damaged(path.join(name), reason));
                }
                file_of.insert(spec.name.clone(), number);
            }
            files.push(file);
        }
        let missing = index.iter().flatten().find(|(tensor, _)| !file_of.contains_key(*tensor));
        if let Some((tensor, file)) = missing {
            let reason = format!("it says that tensor `{tensor}` lies in `{file}`, which does not hold it");
            return Err(Error::damaged(index_path, reason));
        }
        Ok(HfFolder { path, config, files, file_of })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The object in `config.json`, if there is one.
    ///
    /// # Errors
    /// [`Error::Damaged`] when it is no JSON object; with `NaN` or `Infinity` in it, as Python writes them, it is none.
    /// The weights can be read nevertheless.
    pub fn config(&self) -> Result<Option<&Map<String, Value>>> {
        let damaged = |reason: &String| Error::damaged(self.path.join(CONFIG), reason.clone());
        self.config.as_ref().map(Option::as_ref).map_err(damaged)
    }

    /// The tensors that the folder holds, file by file, in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.files.iter().flat_map(SafetensorsFile::tensors)
    }

    /// One tensor's dtype and shape. An output projection that the folder does not hold is the embedding, when
    /// `config.json` says so with `tie_word_embeddings`, or says nothing of it, as for classes whose default it is; its
    /// name is then the embedding's.
    pub fn tensor(&self, name: &str) -> Option<&TensorSpec> {
        let find = |name: &str| self.files[*self.file_of.get(name)?].tensor(name);
        let tied = || match &self.config {
            Ok(Some(config)) => says_tied(config) != Some(false),
            Ok(None) => false,
            Err(_) => true,
        };
        let names = || self.file_of.keys().map(String::as_str);
        find(name).or_else(|| {
            let stands_for = is_output(name) && tied() && !names().any(is_output);
            stands_for.then(|| embedding(names())).flatten().and_then(find)
        })
    }

    /// Fills `into` with a region's elements as they are stored, reading no other byte.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Request`] when the region does not lie in the tensor or `into` has another
    /// length than it; [`Error::Io`].
    pub fn read(&self, name: &str, region: &Region, into: &mut [u8]) -> Result<()> {
        let spec = self.spec(name)?;
        self.files[self.file_of[&spec.name]].read(&spec.name, region, into)
    }

    /// Fills `into` with a region's elements as `f32`, whichever float they are stored as.
    ///
    /// # Errors
    /// As of [`read`](Self::read); [`Error::Request`] for a tensor that is not of 16-, 32- or 64-bit floats.
    pub fn read_f32(&self, name: &str, region: &Region, into: &mut [f32]) -> Result<()> {
        let spec = self.spec(name)?;
        let stored = spec.dtype;
        let into: &mut [u8] = bytemuck::cast_slice_mut(into);
        if stored == safetensors::Dtype::F32 {
            return self.read(name, region, into);
        }
        let mut bytes = vec![0; into.len() / 4 * (stored.bitsize() / 8)];
        self.read(name, region, &mut bytes)?;
        if !convert(stored, &bytes, safetensors::Dtype::F32, into) {
            let reason = format!("elements of {stored:?} cannot be read as F32");
            return Err(Error::Request { name: name.into(), reason });
        }
        Ok(())
    }

    fn spec(&self, name: &str) -> Result<&TensorSpec> {
        let unknown = || Error::NoTensor { within: self.path.display().to_string(), name: name.into() };
        self.tensor(name).ok_or_else(unknown)
    }
}

/// The part of the index that is read. Its `metadata` is not: published models have it wrong.
#[derive(Deserialize)]
struct Index {
    weight_map: Pairs,
}

/// A JSON object of strings whose repeated names are seen.
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensors' names to files' names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(All)
    }
}

/// From tensor to file.
fn parse_index(content: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    let damaged = |reason: String| Error::damaged(path, reason);
    let index: Index = serde_json::from_slice(content).map_err(|e| damaged(e.to_string()))?;
    let mut file_of = BTreeMap::new();
    for (tensor, file) in index.weight_map.0 {
        // A file's name and never a path: an index must not reach out of its folder.
        let plain = !file.is_empty() && !file.starts_with('.') && !file.contains(['/', '\\', '\0']);
        if !plain {
            return Err(damaged(format!(
                "tensor `{tensor}` lies in {file:?}, which is not a plain file name"
            )));
        }
        if let Some(other) = file_of.insert(tensor.clone(), file) {
            return Err(damaged(format!("tensor `{tensor}` is named twice, first in `{other}`")));
        }
    }
    if file_of.is_empty() {
        return Err(damaged("it names no tensor".into()));
    }
    Ok(file_of)
}
