//! A save from end to end: plan together, write apart, commit once, then rotate.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::agreement::{Agreement, agree};
use crate::aligned::AlignedBuf;
use crate::block_writer::{Source, Writing};
use crate::catalog::{Skipped, check_files};
use crate::error::{Error, Result, caught};
use crate::fs::{FileSystem, Lock};
use crate::manifest::{
    BLOCK_BYTES, FileRecord, LOCK, Manifest, Place, RegionRecord, Summary, TMP_INFIX, TensorRecord, check_tag,
};
use crate::os::OsFileSystem;
use crate::plan::{Declared, Plan};
use crate::publish::{Slot, point_latest, publish, seal, slot, unique};
use crate::reader::Checkpoints;
use crate::rotation::{Rotated, Rotation};
use crate::snapshot::Snapshot;
use crate::sweep;
use crate::writer::RankFile;

/// The one group of ranks that saves checkpoints into a directory.
///
/// Rank 0 holds a lock on the directory for as long as this lives, so that a second run started by mistake is refused
/// instead of sweeping away the first one's work.
#[derive(Debug)]
pub struct Saver {
    fs: Arc<dyn FileSystem>,
    dir: PathBuf,
    _lock: HeldLock,
    left: Vec<Skipped>,
    writing: Writing,
    moves_latest: bool,
}

/// What a save did, the same on every rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SaveReport {
    /// The checkpoint's tag.
    pub tag: String,
    /// Its step.
    pub step: u64,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Whether a checkpoint of the same tag was there before.
    pub replaced: bool,
    /// Why `latest` does not name the checkpoint, or not durably, when it could not be moved. The checkpoint itself is
    /// published and durable, and loading the newest finds it; the next save moves `latest` again.
    pub latest_not_moved: Option<String>,
    /// Checkpoints that rotation removed, oldest first.
    pub removed: Vec<String>,
    /// What rotation should have removed and could not, and why. The save itself succeeded.
    pub not_removed: Vec<Skipped>,
    /// From the call to the commit, on rank 0. Rotation comes after.
    pub committed_after: Duration,
}

/// What every rank says before anything is written.
#[derive(Serialize, Deserialize)]
struct Opening {
    tag: String,
    step: u64,
    shared_sum: u64,
    parts: Vec<Declared>,
    /// Rank 0's name for the staging directory.
    staging: Option<String>,
}

/// What every rank says after its file is durable.
#[derive(Serialize, Deserialize)]
struct Written {
    file: FileRecord,
    /// As JSON text, which only rank 0 parses.
    rank_state: String,
}

impl Saver {
    /// Opens a directory for saving, creating it when missing, and sweeps what an earlier crash left there. Every rank
    /// of the group calls this.
    ///
    /// # Errors
    /// [`Error::Busy`] when another process saves there; [`Error::Io`].
    pub fn open(dir: impl Into<PathBuf>, group: &dyn Agreement) -> Result<Saver> {
        Self::open_on(Arc::new(OsFileSystem::new()), dir, group)
    }

    /// Like [`open`](Self::open), on a file system of the caller's choice.
    ///
    /// # Errors
    /// As there.
    pub fn open_on(fs: Arc<dyn FileSystem>, dir: impl Into<PathBuf>, group: &dyn Agreement) -> Result<Saver> {
        let dir = dir.into();
        let mut lock = None;
        let opened = if group.rank() == 0 { take(fs.as_ref(), &dir) } else { Ok((None, Vec::new())) };
        let opened = opened.map(|(held, left)| {
            lock = held;
            left
        });
        let left = agree(group, "opening", opened)?.into_iter().next().unwrap_or_default();
        Ok(Saver { fs, dir, _lock: lock, left, writing: Writing::default(), moves_latest: true })
    }

    /// Leaves `latest` where it is.
    pub(crate) fn leaving_latest(self) -> Saver {
        Saver { moves_latest: false, ..self }
    }

    /// Lets so many threads of this rank write its file, one at least; 3 by custom. Of several, one fills and sums a
    /// block while the others' are being written: more than three help where the disks take several large writes at a
    /// time faster than one, or where one core cannot sum as fast as they write. Each takes the memory of one block.
    pub fn with_writers(self, threads: usize) -> Saver {
        Saver { writing: self.writing.with_threads(threads), ..self }
    }

    /// Writes so many bytes at once, rounded up to a multiple of 4096; 4 MiB by custom.
    pub fn with_block_bytes(self, bytes: usize) -> Saver {
        Saver { writing: self.writing.with_block_bytes(bytes), ..self }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the sweep at opening found and could not remove.
    pub fn left_by_sweep(&self) -> &[Skipped] {
        &self.left
    }

    /// The same directory, to read from.
    pub fn checkpoints(&self) -> Checkpoints {
        Checkpoints::open_on(self.fs.clone(), self.dir.clone())
    }

    /// Saves one checkpoint: every rank of the group calls this with its own parts, and all return the same.
    ///
    /// When it returns, the checkpoint is durable and `latest` names it, unless
    /// [`latest_not_moved`](SaveReport::latest_not_moved) says otherwise. When it fails, on whichever rank, it fails on
    /// all, and the checkpoints that were there are still there. A checkpoint of the same tag is replaced, atomically.
    ///
    /// # Errors
    /// [`Error::Snapshot`] and [`Error::Rotation`], which leave nothing behind; [`Error::Foreign`] when the tag's
    /// directory holds what is not a checkpoint's; [`Error::Rank`] with another rank's failure; [`Error::Agreement`];
    /// [`Error::Io`]; [`Error::Panicked`].
    pub fn save(
        &self,
        group: &dyn Agreement,
        snapshot: &Snapshot<'_>,
        limits: &Rotation,
    ) -> Result<SaveReport> {
        let begun = self.begin(group, snapshot, limits)?;
        let staged = begun.rank_file(group.rank()).and_then(|file| {
            let pieces = file.of_parts(&snapshot.parts);
            self.stage(&begun, &file, Source::Pieces(&pieces), &AtomicU64::new(0))
        });
        self.conclude(group, begun, staged)
    }

    /// Lets go what the limits say, as [`save`](Self::save) does at its end. Every rank of the group calls this.
    ///
    /// For a run that saves with [`Rotation::KEEP_ALL`] and makes room later: several models that must keep a step in
    /// common do so after all of them are saved.
    ///
    /// # Errors
    /// [`Error::Rotation`]; [`Error::Io`]; [`Error::Rank`]; [`Error::Agreement`]. What could not be removed is no
    /// error, but in the report.
    pub fn rotate(&self, group: &dyn Agreement, limits: &Rotation) -> Result<Rotated> {
        let rotated = limits.check().and_then(|()| match group.rank() {
            0 => sweep::rotate(self.fs.as_ref(), &self.dir, None, limits),
            _ => Ok(Rotated::default()),
        });
        Ok(agree(group, "rotating", rotated)?.into_iter().next().unwrap_or_default())
    }

    /// The first phase: all ranks agree on what to save, and rank 0 creates the staging directory.
    pub(crate) fn begin(
        &self,
        group: &dyn Agreement,
        snapshot: &Snapshot<'_>,
        limits: &Rotation,
    ) -> Result<Begun> {
        let since = Instant::now();
        let mut staging = None;
        let opening = self.opening(group.rank(), snapshot, limits, &mut staging);
        let planned = agree(group, "planning", opening).and_then(|openings| {
            let refuse = |reason| Error::Snapshot { tag: snapshot.tag.clone(), reason };
            same_everywhere(&openings).map_err(refuse)?;
            let staged_in = openings[0].staging.clone().unwrap_or_default();
            let declared: Vec<Vec<Declared>> = openings.into_iter().map(|o| o.parts).collect();
            Ok((self.dir.join(staged_in), Plan::new(&declared).map_err(refuse)?))
        });
        match planned {
            Ok((staging, plan)) => Ok(Begun {
                tag: snapshot.tag.clone(),
                step: snapshot.step,
                shared: snapshot.shared.clone(),
                rank_state: snapshot.rank_state.to_string(),
                plan,
                staging,
                limits: *limits,
                since,
            }),
            Err(e) => {
                self.abandon(staging, &e);
                Err(e)
            }
        }
    }

    /// The second phase, by each rank for itself: its file, durable in the staging directory.
    pub(crate) fn stage(
        &self,
        begun: &Begun,
        file: &RankFile,
        source: Source<'_>,
        written: &AtomicU64,
    ) -> Result<FileRecord> {
        let fs = self.fs.as_ref();
        caught("writing", || file.stage(fs, &begun.staging, source, self.writing, written))
    }

    /// Lays a rank's file out in memory, so that its tensors may change before it is written.
    pub(crate) fn copy(
        &self,
        file: &RankFile,
        snapshot: &Snapshot<'_>,
        image: &mut AlignedBuf,
    ) -> Result<()> {
        file.copy(&snapshot.parts, self.writing, image)
            .map_err(Error::io("hold in memory", self.dir.join(&file.name)))
    }

    /// The last phase: all ranks tell how the second one went, rank 0 commits and rotates, all learn of it.
    pub(crate) fn conclude(
        &self,
        group: &dyn Agreement,
        begun: Begun,
        staged: Result<FileRecord>,
    ) -> Result<SaveReport> {
        let concluded = self.agree_and_commit(group, &begun, staged);
        if let Err(e) = &concluded
            && group.rank() == 0
        {
            self.abandon(Some(begun.staging), e);
        }
        concluded
    }

    fn agree_and_commit(
        &self,
        group: &dyn Agreement,
        begun: &Begun,
        staged: Result<FileRecord>,
    ) -> Result<SaveReport> {
        let written = staged.map(|file| Written { file, rank_state: begun.rank_state.clone() });
        let written = agree(group, "writing", written)?;
        let committed = match group.rank() {
            0 => caught("publishing", || self.commit(begun, written)).map(Some),
            _ => Ok(None),
        };
        let reports = agree(group, "publishing", committed)?;
        reports.into_iter().next().flatten().ok_or_else(|| Error::Rank {
            rank: 0,
            during: "publishing",
            reason: "it gave no report".into(),
        })
    }

    /// Removes what rank 0 created for a save that failed. After a rank has failed nobody writes any more. After a
    /// lost rank somebody may: the next start sweeps.
    fn abandon(&self, staging: Option<PathBuf>, failure: &Error) {
        if let Some(staging) = staging
            && !matches!(failure, Error::Agreement { .. })
        {
            let _ = sweep::delete(self.fs.as_ref(), &staging);
        }
    }

    fn opening(
        &self,
        rank: usize,
        snapshot: &Snapshot<'_>,
        limits: &Rotation,
        staging: &mut Option<PathBuf>,
    ) -> Result<Opening> {
        let refuse = |reason| Error::Snapshot { tag: snapshot.tag.clone(), reason };
        check_tag(&snapshot.tag).map_err(refuse)?;
        limits.check()?;
        snapshot.check_state().map_err(refuse)?;
        let mut parts = Vec::with_capacity(snapshot.parts.len());
        for part in &snapshot.parts {
            parts.push(Declared::of(part, &part.span().map_err(refuse)?));
        }
        let name = if rank == 0 {
            slot(self.fs.as_ref(), &self.dir.join(&snapshot.tag))?;
            let name = format!("{}{TMP_INFIX}{}", snapshot.tag, unique());
            let path = self.dir.join(&name);
            self.fs.create_dir(&path).map_err(Error::io("create", &path))?;
            *staging = Some(path);
            Some(name)
        } else {
            None
        };
        let shared_sum = xxh3_64(snapshot.shared.to_string().as_bytes());
        Ok(Opening { tag: snapshot.tag.clone(), step: snapshot.step, shared_sum, parts, staging: name })
    }

    /// Rank 0's part: from files that are durable to a checkpoint that is.
    fn commit(&self, begun: &Begun, written: Vec<Written>) -> Result<SaveReport> {
        let fs = self.fs.as_ref();
        let refuse = |reason| Error::Snapshot { tag: begun.tag.clone(), reason };
        let manifest = manifest_of(begun, written).map_err(refuse)?;
        let manifest_bytes = seal(fs, &begun.staging, &manifest)?;
        // A cleaner of old files, or a directory that the ranks do not share after all, is noticed before it counts.
        check_files(fs, &begun.staging, &manifest)?;
        let replaced = publish(fs, &self.dir, &begun.staging, &begun.tag)?;
        // The checkpoint is safe. That `latest` could not be moved or room could not be made is worth telling, and no
        // reason to call it unsaved. On a full disk the one may even need the other.
        let moved = if self.moves_latest { point_latest(fs, &self.dir, &begun.tag) } else { Ok(()) };
        let latest_not_moved = moved.err().map(|e| {
            tracing::warn!(tag = begun.tag, error = %e, "saved, but `latest` could not be moved");
            e.to_string()
        });
        let committed_after = begun.since.elapsed();
        let rotated = sweep::rotate(fs, &self.dir, Some(&begun.tag), &begun.limits);
        let rotated = rotated.unwrap_or_else(|e| Rotated::nothing(&self.dir, &e));
        let bytes = manifest.summary.data_bytes;
        tracing::info!(tag = begun.tag, bytes, ?committed_after, "checkpoint saved");
        Ok(SaveReport {
            tag: begun.tag.clone(),
            step: begun.step,
            bytes: bytes + manifest_bytes,
            replaced: replaced == Slot::Taken,
            latest_not_moved,
            removed: rotated.removed,
            not_removed: rotated.not_removed,
            committed_after,
        })
    }
}

/// A save that all ranks have agreed on. Nothing in it belongs to the caller: what was shared at the call is saved.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) tag: String,
    step: u64,
    shared: Value,
    /// As JSON text.
    rank_state: String,
    plan: Plan,
    staging: PathBuf,
    limits: Rotation,
    since: Instant,
}

impl Begun {
    /// The file that a rank is to write.
    pub(crate) fn rank_file(&self, rank: usize) -> Result<RankFile> {
        RankFile::new(&self.plan, rank)
    }
}

/// Rank 0's lock; `None` on the other ranks, and where the file system has no locks.
type HeldLock = Option<Box<dyn Lock>>;

/// Creates, locks and sweeps the directory.
fn take(fs: &dyn FileSystem, dir: &Path) -> Result<(HeldLock, Vec<Skipped>)> {
    fs.create_dir_all(dir).map_err(Error::io("create", dir))?;
    let lock = dir.join(LOCK);
    match fs.try_lock(&lock) {
        Ok(Some(held)) => Ok((Some(held), sweep::sweep(fs, dir)?)),
        Ok(None) => Err(Error::Busy { dir: dir.into() }),
        // Without a lock another run's work cannot be told from leftovers, so nothing is swept.
        Err(e) if e.kind() == std::io::ErrorKind::Unsupported => {
            tracing::warn!(dir = %dir.display(), "no locks here: leftovers of a crash are not swept");
            Ok((None, Vec::new()))
        }
        Err(e) => Err(Error::io("lock", lock)(e)),
    }
}

fn same_everywhere(openings: &[Opening]) -> Result<(), String> {
    let first = &openings[0];
    for (rank, other) in openings.iter().enumerate().skip(1) {
        if (&other.tag, other.step) != (&first.tag, first.step) {
            return Err(format!(
                "rank 0 saves `{}` of step {}, rank {rank} `{}` of step {}",
                first.tag, first.step, other.tag, other.step
            ));
        }
        if other.shared_sum != first.shared_sum {
            return Err(format!(
                "the shared state of rank {rank} is not rank 0's; what differs by rank belongs into rank_state"
            ));
        }
    }
    Ok(())
}

/// Lays the ranks' reports side by side with the plan that they all followed.
fn manifest_of(begun: &Begun, written: Vec<Written>) -> Result<Manifest, String> {
    let mut tensors: Vec<TensorRecord> = (begun.plan.tensors.iter())
        .map(|(name, t)| TensorRecord {
            name: name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            regions: Vec::new(),
        })
        .collect();
    for (rank, said) in written.iter().enumerate() {
        let mut offset = said.file.header_bytes;
        for (name, tensor, region) in begun.plan.of_rank(rank) {
            let bytes = (region.span.len() * tensor.dtype.bitsize() / 8) as u64;
            let place = Place::from(&region.span);
            let record = RegionRecord { place, file: rank, offset, bytes, first_sum: 0 };
            offset += bytes;
            if let Ok(at) = tensors.binary_search_by(|t| t.name.as_str().cmp(name)) {
                tensors[at].regions.push(record);
            }
        }
    }
    let saved = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (mut files, mut ranks) = (Vec::with_capacity(written.len()), Vec::with_capacity(written.len()));
    for (rank, Written { file, rank_state }) in written.into_iter().enumerate() {
        files.push(file);
        let state: Value =
            serde_json::from_str(&rank_state).map_err(|e| format!("the state of rank {rank}: {e}"))?;
        ranks.push(state);
    }
    Ok(Manifest {
        summary: Summary {
            tag: begun.tag.clone(),
            step: begun.step,
            world_size: ranks.len(),
            saved_unix_ms: saved.as_millis().try_into().unwrap_or(u64::MAX),
            data_bytes: files.iter().map(|f| f.bytes).sum(),
            ..Summary::default()
        },
        block_bytes: BLOCK_BYTES,
        files,
        tensors,
        shared: begun.shared.clone(),
        ranks,
    })
}
