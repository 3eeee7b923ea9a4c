//! Single safetensors files: written whole or not at all, read by positioned reads of only what is asked for.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use crate::block_writer::Sequential;
use crate::element::{Element, element_bytes, element_count};
use crate::error::{Error, Result};
use crate::fs::{FileSystem, ReadFile};
use crate::os::OsFileSystem;
use crate::publish;
use crate::region::Region;

/// Headers longer than this are refused, as by every reader of the format.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// What a safetensors file says about one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// The tensor's name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor of that name, dtype and shape.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }

    /// Bytes of the whole tensor.
    ///
    /// # Errors
    /// [`Error::Request`] when its elements are not whole bytes, or its size overflows.
    pub fn bytes(&self) -> Result<usize> {
        let size = element_bytes(self.dtype)
            .ok_or_else(|| self.wrong(format!("elements of {:?} are not whole bytes", self.dtype)))?;
        element_count(&self.shape)
            .and_then(|n| n.checked_mul(size))
            .ok_or_else(|| self.wrong(format!("shape {:?} has too many bytes", self.shape)))
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Request { name: self.name.clone(), reason }
    }
}

/// The length prefix and JSON header of a file, padded with spaces so that the data begins at a multiple of `align`.
/// Tensors lie in the order given.
pub(crate) fn header(
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    align: usize,
) -> Result<Vec<u8>> {
    let mut object = Map::new();
    if !metadata.is_empty() {
        object.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0usize;
    for spec in specs {
        let end =
            offset.checked_add(spec.bytes()?).ok_or_else(|| spec.wrong("the file is too long".into()))?;
        let info = json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end]});
        if spec.name == "__metadata__" || object.insert(spec.name.clone(), info).is_some() {
            return Err(spec.wrong("the name is taken".into()));
        }
        offset = end;
    }
    let json = Value::Object(object).to_string().into_bytes();
    let padded = (8 + json.len()).next_multiple_of(align) - 8;
    if padded as u64 > MAX_HEADER_BYTES {
        let reason = format!("a header of {padded} bytes; at most {MAX_HEADER_BYTES} are allowed");
        return Err(Error::Request { name: "__metadata__".into(), reason });
    }
    let mut bytes = Vec::with_capacity(8 + padded);
    bytes.extend_from_slice(&(padded as u64).to_le_bytes());
    bytes.extend_from_slice(&json);
    bytes.resize(8 + padded, b' ');
    Ok(bytes)
}

/// A file being written: its header first, then the bytes of each tensor in the order of the header, in pieces.
#[derive(Debug)]
pub(crate) struct Body {
    path: PathBuf,
    specs: Vec<TensorSpec>,
    /// The tensor whose turn it is, and how many of its bytes are written.
    turn: usize,
    within: usize,
    out: Sequential,
    failed: bool,
}

impl Body {
    /// Creates the file `path` and writes its header.
    pub(crate) fn create(
        fs: &dyn FileSystem,
        path: PathBuf,
        specs: Vec<TensorSpec>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Body> {
        let header = header(&specs, metadata, 8)?;
        let mut total = header.len() as u64;
        for spec in &specs {
            total += spec.bytes()? as u64;
        }
        let file = fs.create(&path, total).map_err(Error::io("create", &path))?;
        let mut body = Body { path, specs, turn: 0, within: 0, out: Sequential::new(file), failed: false };
        body.append(&header)?;
        Ok(body)
    }

    /// Appends the next bytes of the tensor `name`, whose turn it must be. It is over after its last byte.
    pub(crate) fn push_piece(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let spec = self.check_turn(name)?;
        let expected = spec.bytes()?;
        let end = self.within.saturating_add(bytes.len());
        if end > expected {
            return Err(spec.wrong(format!("{end} bytes given, {:?} has {expected}", spec.shape)));
        }
        self.append(bytes)?;
        self.within = end;
        if end == expected {
            (self.turn, self.within) = (self.turn + 1, 0);
        }
        Ok(())
    }

    /// As [`push_piece`](Self::push_piece) with all bytes of the tensor.
    pub(crate) fn push(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let spec = self.check_turn(name)?;
        let expected = spec.bytes()?;
        if self.within + bytes.len() != expected {
            let given = self.within + bytes.len();
            return Err(spec.wrong(format!("{given} bytes given, {:?} has {expected}", spec.shape)));
        }
        self.push_piece(name, bytes)
    }

    /// The dtype of the tensor `name`, whose turn it must be.
    pub(crate) fn turn_dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.check_turn(name)?.dtype)
    }

    /// Whether the last byte of the last tensor is written.
    pub(crate) fn is_whole(&self) -> bool {
        self.turn == self.specs.len()
    }

    /// Makes the file durable, when it is whole.
    pub(crate) fn sync(&mut self) -> Result<()> {
        if let Some(spec) = self.specs.get(self.turn) {
            let missing = spec.bytes()? - self.within;
            return Err(spec.wrong(format!("{missing} of its bytes were not pushed")));
        }
        self.check_failed()?;
        let synced = self.out.sync().map_err(Error::io("write", &self.path));
        self.failed |= synced.is_err();
        synced
    }

    fn check_turn(&self, name: &str) -> Result<&TensorSpec> {
        self.check_failed()?;
        let refuse = |reason| Error::Request { name: name.into(), reason };
        let Some(spec) = self.specs.get(self.turn) else {
            return Err(refuse(format!("all {} tensors are written already", self.specs.len())));
        };
        if spec.name != name {
            return Err(refuse(format!("it is the turn of `{}`", spec.name)));
        }
        Ok(spec)
    }

    /// After a write that failed nobody knows what the file holds.
    fn check_failed(&self) -> Result<()> {
        if self.failed {
            let source = std::io::Error::other("an earlier write has failed");
            return Err(Error::io("write", &self.path)(source));
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let appended = self.out.append(bytes).map_err(Error::io("write", &self.path));
        self.failed |= appended.is_err();
        appended
    }
}

/// Writes a safetensors file with one tensor or less in memory at a time: names, dtypes and shapes first, then the
/// bytes of each in the same order.
///
/// The file appears under its name when [`finish`](Self::finish) returns, complete and durable; a file that was there
/// stays until then. A writer that is dropped before leaves only a file named `{name}.tmp-…`, which it removes
/// where it can.
#[derive(Debug)]
pub struct SafetensorsWriter {
    fs: Arc<dyn FileSystem>,
    path: PathBuf,
    staged: PathBuf,
    body: Body,
    finished: bool,
}

impl SafetensorsWriter {
    /// Begins the file `path`, whose directory exists.
    ///
    /// # Errors
    /// [`Error::Request`] for a name used twice or a size that overflows; [`Error::Io`].
    pub fn create(
        path: impl Into<PathBuf>,
        specs: impl IntoIterator<Item = TensorSpec>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        Self::create_on(Arc::new(OsFileSystem::new()), path, specs, metadata)
    }

    /// Like [`create`](Self::create), on a file system of the caller's choice.
    ///
    /// # Errors
    /// As there.
    pub fn create_on(
        fs: Arc<dyn FileSystem>,
        path: impl Into<PathBuf>,
        specs: impl IntoIterator<Item = TensorSpec>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let path = path.into();
        let staged = publish::staged_name(&path);
        let specs = specs.into_iter().collect();
        let body = Body::create(fs.as_ref(), staged.clone(), specs, metadata).inspect_err(|_| {
            // Its header may be half-written.
            let _ = fs.remove_file(&staged);
        })?;
        Ok(SafetensorsWriter { fs, path, staged, body, finished: false })
    }

    /// Appends the bytes of the next tensor, whose name must be `name`.
    ///
    /// # Errors
    /// [`Error::Request`] when it is not that tensor's turn or the length is not its; [`Error::Io`].
    pub fn push(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.body.push(name, bytes)
    }

    /// Appends the next bytes of the tensor `name`, whose turn it must be: a tensor may come in pieces of any length.
    /// It is over after its last byte.
    ///
    /// # Errors
    /// [`Error::Request`] when it is not that tensor's turn or it has no more so many bytes; [`Error::Io`].
    pub fn push_piece(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.body.push_piece(name, bytes)
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// [`Error::Request`] naming the first tensor whose bytes were not all pushed; [`Error::Io`], also when an
    /// earlier write has failed.
    pub fn finish(mut self) -> Result<()> {
        self.body.sync()?;
        publish::name_file(self.fs.as_ref(), &self.staged, &self.path)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for SafetensorsWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Best effort: an unfinished file has no reader, and its name says what it is.
            let _ = self.fs.remove_file(&self.staged);
        }
    }
}

/// Writes tensors that are all at hand as one safetensors file, atomically and durably.
///
/// # Errors
/// As of [`SafetensorsWriter`].
pub fn write_safetensors<'a>(
    path: impl Into<PathBuf>,
    tensors: impl IntoIterator<Item = (TensorSpec, &'a [u8])>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let (specs, bytes): (Vec<TensorSpec>, Vec<&[u8]>) = tensors.into_iter().unzip();
    let names: Vec<String> = specs.iter().map(|s| s.name.clone()).collect();
    let mut writer = SafetensorsWriter::create(path, specs, metadata)?;
    for (name, bytes) in names.iter().zip(bytes) {
        writer.push(name, bytes)?;
    }
    writer.finish()
}

/// A safetensors file, open for positioned reads. Only the header is in memory.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: Box<dyn ReadFile>,
    data_at: u64,
    tensors: Vec<(TensorSpec, u64)>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Opens a file and checks its header against its length.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when the header is not one, or the file is longer or shorter than it says.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        Self::open_on(&OsFileSystem::new(), path)
    }

    /// Like [`open`](Self::open), on a file system of the caller's choice.
    ///
    /// # Errors
    /// As there.
    pub fn open_on(fs: &dyn FileSystem, path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file = fs.open(&path).map_err(Error::io("open", &path))?;
        let bytes = file.bytes().map_err(Error::io("measure", &path))?;
        let (data_at, header) = parse_header(file.as_ref(), bytes, &path)?;
        let infos = header.tensors();
        let mut tensors = Vec::with_capacity(infos.len());
        for name in header.offset_keys() {
            if let Some(&&TensorInfo { dtype, ref shape, data_offsets }) = infos.get(&name) {
                tensors.push((TensorSpec { name, dtype, shape: shape.clone() }, data_offsets.0 as u64));
            }
        }
        let by_name = tensors.iter().enumerate().map(|(i, (spec, _))| (spec.name.clone(), i)).collect();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(SafetensorsFile { path, file, data_at, tensors, by_name, metadata })
    }

    /// The tensors in the order of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorSpec> {
        self.tensors.iter().map(|(spec, _)| spec)
    }

    /// One tensor's dtype and shape.
    pub fn tensor(&self, name: &str) -> Option<&TensorSpec> {
        self.by_name.get(name).map(|&i| &self.tensors[i].0)
    }

    /// The free text that came with the tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Fills `into` with a region's elements, reading no other byte.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Request`] when the region does not lie in the tensor or `into` has another
    /// length than it; [`Error::Io`].
    pub fn read(&self, name: &str, region: &Region, into: &mut [u8]) -> Result<()> {
        let Some(&i) = self.by_name.get(name) else {
            return Err(Error::NoTensor { within: self.path.display().to_string(), name: name.into() });
        };
        let (spec, offset) = &self.tensors[i];
        spec.bytes()?;
        let size = element_bytes(spec.dtype).unwrap_or(1);
        let wanted = region.resolve(&spec.shape).map_err(|reason| spec.wrong(reason))?;
        if wanted.len() * size != into.len() {
            let needed = wanted.len() * size;
            return Err(spec.wrong(format!("a buffer of {} bytes for {needed}", into.len())));
        }
        let whole = Region::Whole.resolve(&spec.shape).map_err(|reason| spec.wrong(reason))?;
        wanted.intersect(&whole, &spec.shape, &mut |run| {
            let at = self.data_at + offset + (run.in_second * size) as u64;
            let part = &mut into[run.in_first * size..(run.in_first + run.len) * size];
            self.file.read_exact_at(at, part).map_err(Error::io("read", &self.path))
        })
    }

    /// Like [`read`](Self::read), into typed elements.
    ///
    /// # Errors
    /// As there, and [`Error::Request`] when the tensor has another dtype.
    pub fn read_into<T: Element>(&self, name: &str, region: &Region, into: &mut [T]) -> Result<()> {
        if let Some(spec) = self.tensor(name)
            && spec.dtype != T::DTYPE
        {
            return Err(spec.wrong(format!("it is {:?}, not {:?}", spec.dtype, T::DTYPE)));
        }
        self.read(name, region, bytemuck::cast_slice_mut(into))
    }
}

/// Reads the header of a file of that length. Returns where the data begins.
fn parse_header(file: &dyn ReadFile, bytes: u64, path: &Path) -> Result<(u64, Metadata)> {
    let damaged = |reason: String| Error::damaged(path, reason);
    let mut length = [0; 8];
    if bytes < 8 {
        return Err(damaged(format!("{bytes} bytes are too few for a header")));
    }
    file.read_exact_at(0, &mut length).map_err(Error::io("read", path))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES.min(bytes - 8) {
        return Err(damaged(format!("a header of {length} bytes in a file of {bytes}")));
    }
    let mut json = vec![0; length as usize];
    file.read_exact_at(8, &mut json).map_err(Error::io("read", path))?;
    // The header's own checks: offsets without gap or overlap, and each as long as dtype and shape say.
    let header: Metadata = serde_json::from_slice(&json).map_err(|e| damaged(format!("header: {e}")))?;
    let data_at = 8 + length;
    if data_at.checked_add(header.data_len() as u64) != Some(bytes) {
        return Err(damaged(format!(
            "{bytes} bytes; its header describes {data_at} + {}",
            header.data_len()
        )));
    }
    Ok((data_at, header))
}
