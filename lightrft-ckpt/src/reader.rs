//! The directory of checkpoints, to read from: listing them, and opening the newest whole one on every rank.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::agreement::{Agreement, Alone, agree};
use crate::catalog::{Found, Skipped, read_latest, read_whole, scan};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::fs::FileSystem;
use crate::os::OsFileSystem;

/// Threads that read, unless told otherwise. Ranks on one machine share its disk: more were not faster.
const READERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);

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
        Checkpoints { fs, dir: dir.into(), readers: READERS }
    }

    /// Reads with so many threads on every rank instead of 2.
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
            let step = opened.as_ref().map(Checkpoint::step).map_err(ToString::to_string);
            // That it cannot be opened is news to exchange here, not a failure of the exchange.
            let steps = agree(group, "opening", Ok(step))?;
            let refused = steps.iter().enumerate().find_map(|(rank, s)| Some((rank, s.as_ref().err()?)));
            match (refused, opened) {
                (None, Ok(checkpoint)) => {
                    let report = LoadReport { tag, step: checkpoint.step(), skipped };
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
        let checkpoint = Checkpoint::new(self.fs.clone(), path, tag.to_owned(), manifest, self.readers);
        if verify == Verify::Everything {
            checkpoint.verify_share(group.rank(), group.world_size())?;
        }
        Ok(checkpoint)
    }
}
