//! A model folder as a source of weights: safetensors files, read tensor by tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;
use serde::Deserialize;

#[cfg(feature = "sglang")]
use super::Checksums;
use super::{Staging, WeightSource};
#[cfg(feature = "sglang")]
use crate::NamedTensor;
use crate::{Error, Result, TensorInfo};

/// The weights of a Hugging Face folder: `model.safetensors`, or the files that `model.safetensors.index.json` names.
///
/// Opening reads the headers; the weights are read in the order of the files when they are asked for, never more than
/// what the receiver has room for. Names are those of the files. A head that is stored although `config.json` ties it to
/// the embedding is left out: it is no parameter of such a model, and engines have none.
#[derive(Debug)]
pub struct HfFolder {
    infos: Vec<TensorInfo>,
    /// Where each tensor's bytes begin: index of the file, offset in it.
    places: Vec<(usize, u64)>,
    files: Vec<(PathBuf, File)>,
}

/// `safetensors` takes no longer header either.
const MAX_HEADER_BYTES: u64 = 100_000_000;

impl HfFolder {
    /// Opens the weights of a folder.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Malformed`] name the file: an index that names no such file or one outside of the
    /// folder, a header that is none, a file that is shorter than its header says, a tensor in two files or in none.
    pub fn open(folder: &Path) -> Result<Self> {
        let (index_path, index) = read_index(folder)?;
        let mut this = Self { infos: Vec::new(), places: Vec::new(), files: Vec::new() };
        let names = match &index {
            Some(index) => index.files(&index_path)?,
            None => BTreeSet::from(["model.safetensors"]),
        };
        for name in names {
            this.add(folder.join(name))?;
        }
        this.check(folder, &index_path, index.as_ref())?;
        if ties_its_head(folder) {
            this.leave_out(TIED_HEAD);
        }
        Ok(this)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.infos.iter().filter_map(|info| info.bytes().ok()).map(|bytes| bytes as u64).sum()
    }

    /// Checksums of all tensors, each read into the memory of the one before.
    #[cfg(feature = "sglang")]
    pub(crate) fn checksums(&self) -> Result<Checksums> {
        let (mut checksums, mut bytes) = (Checksums::default(), Vec::new());
        for (info, (file, offset)) in self.infos.iter().zip(&self.places) {
            let Some((path, file)) = self.files.get(*file) else { continue };
            bytes.resize(info.bytes()?, 0);
            let read = file.read_exact_at(&mut bytes, *offset);
            read.map_err(|source| Error::Io { path: path.clone(), source })?;
            checksums.add(&NamedTensor::new(&info.name, info.dtype, &info.shape, &bytes)?);
        }
        Ok(checksums)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let io = |source| Error::Io { path: path.clone(), source };
        let malformed = |what: String| Error::Malformed { path: path.clone(), what };
        let mut file = File::open(&path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(io)?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES || header_bytes.saturating_add(8) > length {
            return Err(malformed(format!(
                "no safetensors file: a header of {header_bytes} bytes in {length}"
            )));
        }
        let mut header = vec![0; usize::try_from(header_bytes).unwrap_or(usize::MAX)];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| malformed(format!("no safetensors header: {e}")))?;
        let expected = (metadata.data_len() as u64).saturating_add(8 + header_bytes);
        if length != expected {
            return Err(malformed(format!("{length} bytes, but its header speaks of {expected}")));
        }
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            self.places.push((self.files.len(), 8 + header_bytes + info.data_offsets.0 as u64));
            self.infos.push(TensorInfo { name, dtype: info.dtype, shape: info.shape.clone() });
        }
        self.files.push((path, file));
        Ok(())
    }

    fn leave_out(&mut self, name: &str) {
        if let Some(at) = self.infos.iter().position(|info| info.name == name) {
            self.infos.remove(at);
            self.places.remove(at);
        }
    }

    /// Every tensor once, and where the index says.
    fn check(&self, folder: &Path, index_path: &Path, index: Option<&Index>) -> Result<()> {
        let mut found = BTreeMap::new();
        for (info, (file, _)) in self.infos.iter().zip(&self.places) {
            let path = self.files.get(*file).map_or(folder, |(path, _)| path);
            if let Some(other) = found.insert(info.name.as_str(), path) {
                let what = format!("`{}` is in {} too", info.name, other.display());
                return Err(Error::Malformed { path: path.to_owned(), what });
            }
        }
        for (name, file) in index.iter().flat_map(|index| &index.weight_map) {
            if found.get(name.as_str()).is_none_or(|path| **path != folder.join(file)) {
                let what = format!("`{name}` is not in `{file}`");
                return Err(Error::Malformed { path: index_path.to_owned(), what });
            }
        }
        Ok(())
    }
}

impl WeightSource for HfFolder {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn give(&mut self, staging: &mut Staging<'_>) -> Result<()> {
        for (info, (file, offset)) in self.infos.iter().zip(&self.places) {
            let Some((path, file)) = self.files.get(*file) else { continue };
            staging.fill(&info.name, |bytes| {
                file.read_exact_at(bytes, *offset).map_err(|source| Error::Io { path: path.clone(), source })
            })?;
        }
        Ok(())
    }
}

/// What a model that ties it to its embedding does not have.
const TIED_HEAD: &str = "lm_head.weight";

/// Whether `config.json` says that the head is the embedding. A folder of nothing but weights says nothing.
fn ties_its_head(folder: &Path) -> bool {
    #[derive(Default, Deserialize)]
    struct Config {
        tie_word_embeddings: Option<bool>,
        text_config: Option<TextConfig>,
    }
    #[derive(Deserialize)]
    struct TextConfig {
        tie_word_embeddings: Option<bool>,
    }
    let text = std::fs::read(folder.join("config.json")).unwrap_or_default();
    let Config { tie_word_embeddings, text_config } = serde_json::from_slice(&text).unwrap_or_default();
    tie_word_embeddings.or(text_config.and_then(|text| text.tie_word_embeddings)) == Some(true)
}

/// `model.safetensors.index.json`, as far as it matters here.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn files(&self, path: &Path) -> Result<BTreeSet<&str>> {
        // A file name, never a path: an index must not reach outside of its folder.
        let reaches_out = |file: &str| file.contains(['/', '\\']) || file.starts_with('.');
        if let Some((name, file)) = self.weight_map.iter().find(|(_, file)| reaches_out(file)) {
            let what = format!("`{name}` lies in `{file}`, which is not a plain file name");
            return Err(Error::Malformed { path: path.to_owned(), what });
        }
        Ok(self.weight_map.values().map(String::as_str).collect())
    }
}

fn read_index(folder: &Path) -> Result<(PathBuf, Option<Index>)> {
    let path = folder.join("model.safetensors.index.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((path, None)),
        Err(source) => return Err(Error::Io { path, source }),
    };
    match serde_json::from_slice(&text) {
        Ok(index) => Ok((path, Some(index))),
        Err(e) => Err(Error::Malformed { path, what: format!("no index of safetensors files: {e}") }),
    }
}
