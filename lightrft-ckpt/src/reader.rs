//! Finding the newest whole checkpoint, and reading any region of its tensors from whatever ranks wrote them.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::agreement::{Agreement, Alone, agree};
use crate::blocks::{BlockReader, Shard};
use crate::catalog::{Found, Skipped, read_latest, read_whole, scan};
use crate::element::{Element, element_bytes};
use crate::error::{Difference, Error, Mismatch, Result};
use crate::fs::FileSystem;
use crate::manifest::{Manifest, TensorRecord};
use crate::os::OsFileSystem;
use crate::region::{Region, Shared};

/// A directory of checkpoints, to read from. Opening and reading change nothing on disk.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    fs: Arc<dyn FileSystem>,
    dir: PathBuf,
}

/// Which checkpoint to load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Which<'a> {
    /// The complete one of the highest step.
    #[default]
    Newest,
    /// The one saved last, which the file `latest` names. Differs from the newest when a run went back to an earlier
    /// step. When it is damaged or gone, the newest complete one.
    Latest,
    /// The one of this tag and no other.
    Tag(&'a str),
}

/// How much is verified before a checkpoint counts as complete. What is read is verified in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Every byte of every file, shared out over the ranks that load together: rot is found while there still is an
    /// older checkpoint to take instead.
    #[default]
    Everything,
    /// The manifest's checksum and the files' lengths. Rot in the data is an error of the read that meets it.
    WhileReading,
}

/// How a checkpoint was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadReport {
    /// The tag of the one taken.
    pub tag: String,
    /// Its step.
    pub step: u64,
    /// What was looked at before and refused, and why: damaged or incomplete directories.
    pub skipped: Vec<Skipped>,
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listed {
    /// The tag.
    pub tag: String,
    /// The step.
    pub step: u64,
    /// Ranks that wrote it.
    pub world_size: usize,
    /// Bytes of all its files.
    pub bytes: u64,
}

/// What rank 0 found, told to the others so that all try the same.
#[derive(Serialize, Deserialize)]
struct Candidates {
    dirs: Vec<(String, String)>,
    skipped: Vec<Skipped>,
}

impl Checkpoints {
    /// The checkpoints in `dir`, which need not exist yet.
    pub fn open(dir: impl Into<PathBuf>) -> Self {
        Self::open_on(Arc::new(OsFileSystem::new()), dir)
    }

    /// Like [`open`](Self::open), on a file system of the caller's choice.
    pub fn open_on(fs: Arc<dyn FileSystem>, dir: impl Into<PathBuf>) -> Self {
        Checkpoints { fs, dir: dir.into() }
    }

    /// The checkpoints, newest first: every directory with a manifest whose summary is whole. Whether the rest of it
    /// is, [`load`](Self::load) finds out.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be listed.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let listed = |f: Found| Listed {
            tag: f.tag,
            step: f.summary.step,
            world_size: f.summary.world_size,
            bytes: f.bytes,
        };
        Ok(scan(self.fs.as_ref(), &self.dir)?.found.into_iter().map(listed).collect())
    }

    /// The tag that the file `latest` names.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] when its content is no tag.
    pub fn latest(&self) -> Result<Option<String>> {
        read_latest(self.fs.as_ref(), &self.dir)
    }

    /// Opens a checkpoint for this process alone. See [`load_together`](Self::load_together).
    ///
    /// # Errors
    /// As there.
    pub fn load(&self, which: Which<'_>, verify: Verify) -> Result<(Checkpoint, LoadReport)> {
        self.load_together(&Alone, which, verify)
    }

    /// Opens a checkpoint on every rank of a group, the same one on all: a checkpoint that any rank finds damaged is
    /// skipped by all, and the next older one tried. The group need not be as large as the one that saved.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] with all that was refused; [`Error::NoTag`], or a tag's own damage, when a tag was
    /// asked for; [`Error::Agreement`]; [`Error::Rank`].
    pub fn load_together(
        &self,
        group: &dyn Agreement,
        which: Which<'_>,
        verify: Verify,
    ) -> Result<(Checkpoint, LoadReport)> {
        let mine = if group.rank() == 0 { self.candidates(which).map(Some) } else { Ok(None) };
        let found = agree(group, "looking for checkpoints", mine)?.into_iter().next().flatten();
        let Candidates { dirs, mut skipped } =
            found.unwrap_or(Candidates { dirs: Vec::new(), skipped: Vec::new() });
        for (dir, tag) in dirs {
            let opened = self.open_one(group, &dir, &tag, verify);
            let step = opened.as_ref().map(|c| c.manifest.summary.step).map_err(ToString::to_string);
            // That it cannot be opened is news to exchange here, not a failure of the exchange.
            let steps = agree(group, "opening", Ok(step))?;
            let refused = steps.iter().enumerate().find_map(|(rank, s)| Some((rank, s.as_ref().err()?)));
            match (refused, opened) {
                (None, Ok(checkpoint)) => {
                    let report = LoadReport { tag, step: checkpoint.manifest.summary.step, skipped };
                    return Ok((checkpoint, report));
                }
                (_, Err(e)) if matches!(which, Which::Tag(_)) => return Err(e),
                (Some((rank, reason)), _) if matches!(which, Which::Tag(_)) => {
                    return Err(Error::Rank { rank, during: "opening", reason: reason.clone() });
                }
                (refused, _) => {
                    let reason = refused.map_or_else(String::new, |(_, reason)| reason.clone());
                    tracing::warn!(dir, reason, "checkpoint skipped");
                    skipped.push(Skipped { name: dir, reason });
                }
            }
        }
        Err(Error::NoCheckpoint { dir: self.dir.clone(), skipped })
    }

    /// The directories to try, best first.
    fn candidates(&self, which: Which<'_>) -> Result<Candidates> {
        let found = scan(self.fs.as_ref(), &self.dir)?;
        let mut skipped = found.skipped;
        let mut dirs: Vec<(String, String)> = found.found.into_iter().map(|f| (f.dir, f.tag)).collect();
        match which {
            Which::Newest => {}
            Which::Latest => match self.latest() {
                Ok(Some(tag)) if dirs.iter().any(|(_, t)| *t == tag) => dirs.sort_by_key(|(_, t)| *t != tag),
                Ok(None) => {}
                Ok(Some(tag)) => {
                    let reason = format!("it names `{tag}`, which is not there");
                    skipped.push(Skipped { name: "latest".into(), reason });
                }
                Err(e) => skipped.push(Skipped { name: "latest".into(), reason: e.to_string() }),
            },
            Which::Tag(tag) => {
                if let Some(damaged) = skipped.iter().find(|s| s.name == tag) {
                    return Err(Error::damaged(self.dir.join(tag), damaged.reason.clone()));
                }
                let present = dirs.iter().map(|(_, t)| t.clone()).collect();
                dirs.retain(|(_, t)| t == tag);
                skipped.clear();
                if dirs.is_empty() {
                    return Err(Error::NoTag { dir: self.dir.clone(), tag: tag.into(), present });
                }
            }
        }
        Ok(Candidates { dirs, skipped })
    }

    fn open_one(&self, group: &dyn Agreement, dir: &str, tag: &str, verify: Verify) -> Result<Checkpoint> {
        let path = self.dir.join(dir);
        let manifest = read_whole(self.fs.as_ref(), &path)?;
        let checkpoint = Checkpoint::new(self.fs.clone(), path, tag.to_owned(), manifest);
        if verify == Verify::Everything {
            checkpoint.verify_share(group.rank(), group.world_size())?;
        }
        Ok(checkpoint)
    }
}

/// A checkpoint, open for reading by as many threads as like to.
pub struct Checkpoint {
    fs: Arc<dyn FileSystem>,
    path: PathBuf,
    tag: String,
    manifest: Manifest,
    by_name: HashMap<String, usize>,
    /// Opened when first read from.
    shards: Vec<Mutex<Option<Arc<Shard>>>>,
}

impl Checkpoint {
    fn new(fs: Arc<dyn FileSystem>, path: PathBuf, tag: String, manifest: Manifest) -> Self {
        let by_name = manifest.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let shards = manifest.files.iter().map(|_| Mutex::new(None)).collect();
        Checkpoint { fs, path, tag, manifest, by_name, shards }
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
                Some(saved) if saved == (dtype, shape) => {}
                Some((d, s)) => mismatch.differing.push(Difference {
                    name: name.to_owned(),
                    saved: (d, s.to_vec()),
                    expected: (dtype, shape.to_vec()),
                }),
            }
        }
        mismatch.unexpected = unexpected.into_iter().map(str::to_owned).collect();
        let same =
            mismatch.missing.is_empty() && mismatch.unexpected.is_empty() && mismatch.differing.is_empty();
        if same { Ok(()) } else { Err(Error::Mismatch(Box::new(mismatch))) }
    }

    /// Fills `into` with a region's elements, from whichever ranks' files hold them, reading and verifying only the
    /// blocks that they lie in.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Request`] when the region does not lie in the tensor or `into` has another
    /// length; [`Error::Damaged`] when a block is not what was saved, and `into` must then not be used; [`Error::Io`].
    pub fn read(&self, name: &str, region: &Region, into: &mut [u8]) -> Result<()> {
        let tensor = self.record(name)?;
        let wrong = |reason: String| Error::Request { name: name.into(), reason };
        let size = element_bytes(tensor.dtype).unwrap_or(1);
        let wanted = region.resolve(&tensor.shape).map_err(wrong)?;
        if wanted.len().checked_mul(size) != Some(into.len()) {
            let reason = format!(
                "a buffer of {} bytes for {} elements of {:?}",
                into.len(),
                wanted.len(),
                tensor.dtype
            );
            return Err(wrong(reason));
        }
        for record in &tensor.regions {
            let held = record.span(&tensor.shape).map_err(wrong)?;
            let mut blocks: Option<BlockReader<'_>> = None;
            held.intersect(&wanted, &tensor.shape, &mut |run: Shared| {
                let blocks = match &mut blocks {
                    Some(open) => open,
                    none => none.insert(BlockReader::new(self.shard(record.file)?, record)),
                };
                let part = &mut into[run.in_second * size..(run.in_second + run.len) * size];
                blocks.read((run.in_first * size) as u64, part)
            })?;
        }
        Ok(())
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
    /// [`Error::Damaged`] naming the first file and byte range that is not what was saved; [`Error::Io`].
    pub fn verify(&self) -> Result<()> {
        self.verify_share(0, 1)
    }

    /// The share of [`verify`](Self::verify) of one rank among many.
    fn verify_share(&self, rank: usize, world_size: usize) -> Result<()> {
        for i in (rank..self.manifest.files.len()).step_by(world_size) {
            let regions = self.manifest.tensors.iter().flat_map(|t| &t.regions).filter(|r| r.file == i);
            self.shard(i)?.verify(regions)?;
        }
        Ok(())
    }

    fn record(&self, name: &str) -> Result<&TensorRecord> {
        match self.by_name.get(name) {
            Some(&i) => Ok(&self.manifest.tensors[i]),
            None => Err(Error::NoTensor { within: self.tag.clone(), name: name.into() }),
        }
    }

    fn shard(&self, index: usize) -> Result<Arc<Shard>> {
        // A panic while opening leaves `None` or an open shard: either is fine to go on with.
        let mut slot = self.shards[index].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*slot {
            return Ok(open.clone());
        }
        let record = &self.manifest.files[index];
        let open = Arc::new(Shard::open(self.fs.as_ref(), &self.path, record, self.manifest.block_bytes)?);
        Ok(slot.insert(open).clone())
    }
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
