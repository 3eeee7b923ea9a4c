//! One checkpoint, open for reading: its state, its tensors, and any region of them from whatever ranks wrote it.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use safetensors::Dtype;
use serde_json::Value;

use crate::blocks::Shard;
use crate::element::Element;
use crate::error::{Difference, Error, Mismatch, Result};
use crate::fetch::{Jobs, run};
use crate::fs::FileSystem;
use crate::manifest::{Manifest, TensorRecord};
use crate::region::Region;
use crate::wanted::Wanted;

/// A checkpoint, open for reading by as many threads as like to.
pub struct Checkpoint {
    fs: Arc<dyn FileSystem>,
    path: PathBuf,
    tag: String,
    pub(crate) manifest: Manifest,
    readers: NonZeroUsize,
    by_name: HashMap<String, usize>,
    /// Opened when first read from, and again when closed meanwhile.
    shards: Vec<Mutex<Option<Arc<Shard>>>>,
    /// Those that are open, in the order in which they were opened.
    open: Mutex<VecDeque<usize>>,
}

/// So many shards stay open with their tables of checksums, whatever the number of ranks that saved: well below the
/// files that a process may have, also with a few checkpoints open. Reading goes through the shards in their order, so
/// one that is closed is seldom opened again.
const MAX_OPEN: usize = 64;

impl Checkpoint {
    pub(crate) fn new(
        fs: Arc<dyn FileSystem>,
        path: PathBuf,
        tag: String,
        manifest: Manifest,
        readers: NonZeroUsize,
    ) -> Self {
        let by_name = manifest.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let shards = manifest.files.iter().map(|_| Mutex::new(None)).collect();
        Checkpoint { fs, path, tag, manifest, readers, by_name, shards, open: Mutex::default() }
    }

    /// The name by which it was found.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The training step it was saved at.
    pub fn step(&self) -> u64 {
        self.manifest.summary.step
    }

    /// Ranks that wrote it.
    pub fn world_size(&self) -> usize {
        self.manifest.summary.world_size
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What tells this checkpoint from any other, also of the same name.
    pub(crate) fn identity(&self) -> String {
        self.manifest.summary.xxh3.clone()
    }

    /// The state that all ranks shared.
    pub fn shared(&self) -> &Value {
        &self.manifest.shared
    }

    /// The states of the ranks that saved, in rank order.
    pub fn rank_states(&self) -> &[Value] {
        &self.manifest.ranks
    }

    /// The tensors: name, dtype, global shape; by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, Dtype, &[usize])> {
        self.manifest.tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice()))
    }

    /// Dtype and global shape of one tensor.
    pub fn tensor(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.record(name).ok().map(|t| (t.dtype, t.shape.as_slice()))
    }

    /// Compares the tensors with those a model expects, before anything is read into it.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with every tensor that is missing, unexpected, or of another dtype or shape.
    pub fn check_against<'e>(
        &self,
        expected: impl IntoIterator<Item = (&'e str, Dtype, &'e [usize])>,
    ) -> Result<()> {
        let mut mismatch = Mismatch { tag: self.tag.clone(), ..Mismatch::default() };
        let mut unexpected: BTreeSet<&str> = self.tensors().map(|(name, ..)| name).collect();
        for (name, dtype, shape) in expected {
            unexpected.remove(name);
            match self.tensor(name) {
                None => mismatch.missing.push(name.to_owned()),
                saved => mismatch.differing.extend(difference(name, saved, (dtype, shape))),
            }
        }
        mismatch.unexpected = unexpected.into_iter().map(str::to_owned).collect();
        let same =
            mismatch.missing.is_empty() && mismatch.unexpected.is_empty() && mismatch.differing.is_empty();
        if same { Ok(()) } else { Err(Error::Mismatch(Box::new(mismatch))) }
    }

    /// Fills every destination with its elements, from whichever ranks' files hold them, reading and verifying only the
    /// blocks that they lie in: by a few threads, in the order of the files' bytes, mostly without another copy.
    ///
    /// Nothing is read when anything is asked for that is not there.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming what is missing or of another dtype or shape; [`Error::Request`] when a region
    /// does not lie in its tensor or a destination has another length; [`Error::Damaged`] when a block is not what was
    /// saved, and [`Error::Io`]: no destination must then be used.
    pub fn read_many(&self, wanted: &mut [Wanted<'_>]) -> Result<()> {
        let mut mismatch = Mismatch { tag: self.tag.clone(), ..Mismatch::default() };
        for w in wanted.iter() {
            match self.tensor(&w.name) {
                None => mismatch.missing.push(w.name.as_ref().to_owned()),
                saved => mismatch.differing.extend(difference(&w.name, saved, (w.dtype, &w.shape))),
            }
        }
        if !mismatch.missing.is_empty() || !mismatch.differing.is_empty() {
            return Err(Error::Mismatch(Box::new(mismatch)));
        }
        let mut jobs = Jobs::new(&self.manifest);
        for w in wanted {
            let (span, size) = w.span()?;
            let wrong = |reason| Error::Request { name: w.name.as_ref().to_owned(), reason };
            jobs.want(self.record(&w.name)?, span, size, w.into).map_err(wrong)?;
        }
        let readers = self.readers.get();
        run(jobs.into_jobs(readers), readers, self.manifest.block_bytes, &|i| self.shard(i))
    }

    /// Fills `into` with a region's elements. Many regions are read faster together: [`read_many`](Self::read_many).
    ///
    /// # Errors
    /// [`Error::NoTensor`]; the rest as there.
    pub fn read(&self, name: &str, region: &Region, into: &mut [u8]) -> Result<()> {
        let tensor = self.record(name)?;
        let (name, shape) = (Cow::Borrowed(name), Cow::Borrowed(tensor.shape.as_slice()));
        self.read_many(&mut [Wanted { name, dtype: tensor.dtype, shape, region: region.clone(), into }])
    }

    /// Like [`read`](Self::read), into typed elements.
    ///
    /// # Errors
    /// As there, and [`Error::Request`] when the tensor has another dtype.
    pub fn read_into<T: Element>(&self, name: &str, region: &Region, into: &mut [T]) -> Result<()> {
        let dtype = self.record(name)?.dtype;
        if dtype != T::DTYPE {
            return Err(Error::Request {
                name: name.into(),
                reason: format!("it is {dtype:?}, not {:?}", T::DTYPE),
            });
        }
        self.read(name, region, bytemuck::cast_slice_mut(into))
    }

    /// Like [`read_into`](Self::read_into), into a new vector.
    ///
    /// # Errors
    /// As there.
    pub fn read_vec<T: Element>(&self, name: &str, region: &Region) -> Result<Vec<T>> {
        let wanted = region
            .resolve(&self.record(name)?.shape)
            .map_err(|reason| Error::Request { name: name.into(), reason })?;
        let mut elements = vec![T::zeroed(); wanted.len()];
        self.read_into(name, region, &mut elements)?;
        Ok(elements)
    }

    /// Reads every byte of every file and compares the checksums.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming a file and byte range that is not what was saved; [`Error::Io`].
    pub fn verify(&self) -> Result<()> {
        self.verify_share(0, 1)
    }

    /// The share of [`verify`](Self::verify) of one rank among many.
    pub(crate) fn verify_share(&self, rank: usize, world_size: usize) -> Result<()> {
        self.verify_headers(rank, world_size)?;
        let mut jobs = Jobs::new(&self.manifest);
        jobs.verify_all();
        let jobs = jobs.into_jobs(self.readers.get().saturating_mul(world_size));
        let mine = jobs.into_iter().skip(rank).step_by(world_size).collect();
        run(mine, self.readers.get(), self.manifest.block_bytes, &|i| self.shard(i))
    }

    /// Verifies the headers and tables of checksums of one rank's share of the files.
    pub(crate) fn verify_headers(&self, rank: usize, world_size: usize) -> Result<()> {
        (rank..self.shards.len()).step_by(world_size).try_for_each(|i| self.shard(i)?.verify_header())
    }

    pub(crate) fn record(&self, name: &str) -> Result<&TensorRecord> {
        match self.by_name.get(name) {
            Some(&i) => Ok(&self.manifest.tensors[i]),
            None => Err(Error::NoTensor { within: self.tag.clone(), name: name.into() }),
        }
    }

    fn shard(&self, index: usize) -> Result<Arc<Shard>> {
        let shard = {
            let mut slot = lock(&self.shards[index]);
            if let Some(open) = &*slot {
                return Ok(open.clone());
            }
            let record = &self.manifest.files[index];
            let open = Shard::open(self.fs.clone(), &self.path, record, self.manifest.block_bytes)?;
            slot.insert(Arc::new(open)).clone()
        };
        // One lock at a time. Whoever still reads from the shard that goes keeps it open until it is done.
        let mut open = lock(&self.open);
        open.push_back(index);
        let oldest = if open.len() > MAX_OPEN { open.pop_front() } else { None };
        drop(open);
        if let Some(oldest) = oldest {
            *lock(&self.shards[oldest]) = None;
        }
        Ok(shard)
    }
}

/// A panic while one of the locks was held leaves an open shard, none, or one that is not closed early: all are fine.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("step", &self.manifest.summary.step)
            .field("tensors", &self.manifest.tensors.len())
            .finish_non_exhaustive()
    }
}

/// How a saved tensor differs from what is expected.
pub(crate) fn difference(
    name: &str,
    saved: Option<(Dtype, &[usize])>,
    expected: (Dtype, &[usize]),
) -> Option<Difference> {
    let (dtype, shape) = saved.filter(|saved| *saved != expected)?;
    Some(Difference {
        name: name.to_owned(),
        saved: (dtype, shape.to_vec()),
        expected: (expected.0, expected.1.to_vec()),
    })
}
