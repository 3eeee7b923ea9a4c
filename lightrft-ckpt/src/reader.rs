//! The directory of checkpoints, to read from: listing them, and opening the newest whole one on every rank.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use crate::agreement::{Agreement, Alone};
use crate::catalog::{Found, Skipped, read_latest, read_whole};
use crate::checkpoint::Checkpoint;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::fs::FileSystem;
use crate::inspect::saved_at;
use crate::os::OsFileSystem;
use crate::search::{Candidate, Tried, same_everywhere, search, tell};

/// Threads that read, unless told otherwise. One waits for the disk while another verifies; more were not faster.
const READERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);

/// A directory of checkpoints, to read from. Opening and reading change nothing on disk.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    pub(crate) fs: Arc<dyn FileSystem>,
    pub(crate) dir: PathBuf,
    readers: NonZeroUsize,
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
    /// When it was committed.
    pub saved: SystemTime,
    /// The directory's name; differs from the tag while the tag is being saved again.
    pub(crate) dir: String,
}

impl From<Found> for Listed {
    fn from(found: Found) -> Listed {
        Listed {
            tag: found.tag,
            step: found.summary.step,
            world_size: found.summary.world_size,
            bytes: found.bytes,
            saved: saved_at(found.summary.saved_unix_ms),
            dir: found.dir,
        }
    }
}

impl Checkpoints {
    /// The checkpoints in `dir`, which need not exist yet.
    pub fn open(dir: impl Into<PathBuf>) -> Self {
        Self::open_on(Arc::new(OsFileSystem::new()), dir)
    }

    /// Like [`open`](Self::open), on a file system of the caller's choice.
    pub fn open_on(fs: Arc<dyn FileSystem>, dir: impl Into<PathBuf>) -> Self {
        Checkpoints { fs, dir: dir.into(), readers: READERS }
    }

    /// Reads with so many threads on every rank instead of 4.
    #[must_use]
    pub fn with_readers(self, readers: NonZeroUsize) -> Self {
        Checkpoints { readers, ..self }
    }

    /// The checkpoints, newest first: every directory with a manifest whose summary is whole. Whether the rest of it
    /// is, [`load`](Self::load) finds out.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be listed.
    pub fn list(&self) -> Result<Vec<Listed>> {
        Ok(self.survey()?.checkpoints)
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
    /// That a rank may not read a file, or has no more files or memory, is no damage: all fail, and no older one is
    /// taken.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] with all that was refused; [`Error::NoTag`], or a tag's own damage, when a tag was
    /// asked for; [`Error::Io`] as said, and when the directory cannot be listed; [`Error::Agreement`];
    /// [`Error::Rank`].
    pub fn load_together(
        &self,
        group: &dyn Agreement,
        which: Which<'_>,
        verify: Verify,
    ) -> Result<(Checkpoint, LoadReport)> {
        let (checkpoint, skipped) = search(self, group, which, |found| {
            let opened = self.open_one(found).and_then(|checkpoint| {
                if verify == Verify::Everything {
                    checkpoint.verify_share(group.rank(), group.world_size())?;
                }
                Ok(checkpoint)
            });
            let identity = opened.as_ref().map(Checkpoint::identity);
            match (tell(group, "opening", identity)?.and_then(|all| same_everywhere(&all)), opened) {
                (Ok(()), opened) => opened.map(Tried::Took),
                (Err(told), opened) => Tried::refused("opening", told, opened.err()),
            }
        })?;
        let report = LoadReport { tag: checkpoint.tag().to_owned(), step: checkpoint.step(), skipped };
        Ok((checkpoint, report))
    }

    /// Opens the checkpoint in one directory, by its manifest and the lengths of its files.
    pub(crate) fn open_one(&self, Candidate { dir, tag }: &Candidate) -> Result<Checkpoint> {
        let path = self.dir.join(dir);
        let manifest = read_whole(self.fs.as_ref(), &path)?;
        Ok(Checkpoint::new(self.fs.clone(), path, tag.clone(), manifest, self.readers))
    }
}
