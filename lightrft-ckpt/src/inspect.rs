//! What is in a directory and in a checkpoint, for whoever looks: files, where tensors lie, what was refused.

use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::catalog::{Skipped, scan};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::reader::{Checkpoints, Listed};
use crate::region::Region;
use crate::search::Candidate;

/// Where some elements of a tensor lie.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SavedRegion<'a> {
    /// Which elements.
    pub region: Region,
    /// The file, in the checkpoint's directory.
    pub file: &'a str,
    /// Their bytes in it.
    pub bytes: Range<u64>,
}

/// What one look at a directory found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Survey {
    /// The checkpoints, newest first, as [`Checkpoints::list`] gives them.
    pub checkpoints: Vec<Listed>,
    /// Directories that hold parts of a checkpoint and are none, and why, by name.
    pub refused: Vec<Skipped>,
}

impl Checkpoints {
    /// The checkpoints, and what looks like one and is none, of the same look.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when the directory cannot be listed.
    pub fn survey(&self) -> Result<Survey> {
        let scan = scan(self.fs.as_ref(), &self.dir)?;
        let checkpoints = scan.found.into_iter().map(Listed::from).collect();
        Ok(Survey { checkpoints, refused: scan.skipped })
    }

    /// Opens a checkpoint that was listed, without another look at the directory: reads its manifest and compares the
    /// lengths of its files, and reads no data.
    ///
    /// # Errors
    /// [`Error::Damaged`](crate::Error::Damaged) and [`Error::Io`](crate::Error::Io): it may also have been removed,
    /// or saved again, since it was listed.
    pub fn open_listed(&self, listed: &Listed) -> Result<Checkpoint> {
        self.open_one(&Candidate { dir: listed.dir.clone(), tag: listed.tag.clone() })
    }
}

impl Checkpoint {
    /// When it was committed.
    pub fn saved(&self) -> SystemTime {
        saved_at(self.manifest.summary.saved_unix_ms)
    }

    /// Its files of tensors, each with its length in bytes.
    pub fn files(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        self.manifest.files.iter().map(|f| (f.name.as_str(), f.bytes))
    }

    /// Where the elements of a tensor lie.
    ///
    /// # Errors
    /// [`Error::NoTensor`](crate::Error::NoTensor).
    pub fn regions(&self, name: &str) -> Result<Vec<SavedRegion<'_>>> {
        let tensor = self.record(name)?;
        let mut regions = Vec::with_capacity(tensor.regions.len());
        for r in &tensor.regions {
            // Both were checked when the manifest was read.
            if let (Ok(span), Some(file)) = (r.span(&tensor.shape), self.manifest.files.get(r.file)) {
                let bytes = r.offset..r.offset.saturating_add(r.bytes);
                regions.push(SavedRegion { region: span.to_region(), file: &file.name, bytes });
            }
        }
        Ok(regions)
    }
}

/// The time that a manifest gives.
pub(crate) fn saved_at(unix_ms: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms)).unwrap_or(UNIX_EPOCH)
}
