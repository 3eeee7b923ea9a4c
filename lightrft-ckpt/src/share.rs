//! A checkpoint, or a Hugging Face folder, as what one rank of any world saves: for resharding and for import.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use safetensors::Dtype;
use serde_json::Value;

use crate::agreement::Agreement as _;
use crate::checkpoint::Checkpoint;
use crate::element::{element_bytes, element_count};
use crate::error::{Error, Result};
use crate::hf::HfFolder;
use crate::ranks::run_ranks_within;
use crate::reader::{Checkpoints, Listed};
use crate::region::Region;
use crate::rotation::Rotation;
use crate::saver::{SaveReport, Saver};
use crate::snapshot::{Part, Snapshot};

impl Checkpoint {
    /// This checkpoint as rank `rank` of `world_size` would save it: an even share of the elements of every tensor,
    /// read into memory, with tag, step and shared state, and the state that the rank of the same number saved. When
    /// the world grows the new ranks' states are null; when it shrinks those of the ranks that are gone are left out.
    ///
    /// # Errors
    /// [`Error::Request`] when `rank` is not one of the world's; those of [`read`](Checkpoint::read).
    pub fn share(&self, rank: usize, world_size: usize) -> Result<Snapshot<'static>> {
        let mut snapshot = Snapshot::of_step(self.step());
        snapshot.tag = self.tag().to_owned();
        snapshot.shared = self.shared().clone();
        snapshot.rank_state = self.rank_states().get(rank).cloned().unwrap_or(Value::Null);
        for (name, dtype, shape) in self.tensors() {
            snapshot.parts.push(part(name, dtype, shape, (rank, world_size), |region, bytes| {
                self.read(name, region, bytes)
            })?);
        }
        Ok(snapshot)
    }
}

impl HfFolder {
    /// The folder's tensors as rank `rank` of `world_size` would save them at `step`, in the dtypes in which they are
    /// stored: an even share of the elements of every tensor, read into memory. A tied output projection that is not
    /// stored is no tensor of the snapshot either.
    ///
    /// # Errors
    /// [`Error::Request`] when `rank` is not one of the world's; those of [`read`](HfFolder::read).
    pub fn share(&self, step: u64, rank: usize, world_size: usize) -> Result<Snapshot<'static>> {
        let mut snapshot = Snapshot::of_step(step);
        for spec in self.tensors() {
            let name = &spec.name;
            snapshot.parts.push(part(name, spec.dtype, &spec.shape, (rank, world_size), |region, bytes| {
                self.read(name, region, bytes)
            })?);
        }
        Ok(snapshot)
    }
}

fn part(
    name: &str,
    dtype: Dtype,
    shape: &[usize],
    (rank, world_size): (usize, usize),
    read: impl FnOnce(&Region, &mut [u8]) -> Result<()>,
) -> Result<Part<'static>> {
    let wrong = |reason: String| Error::Request { name: name.into(), reason };
    if rank >= world_size {
        return Err(wrong(format!("rank {rank} of a world of {world_size}")));
    }
    let size =
        element_bytes(dtype).ok_or_else(|| wrong(format!("elements of {dtype:?} are not whole bytes")))?;
    let elements =
        element_count(shape).ok_or_else(|| wrong(format!("shape {shape:?} has too many elements")))?;
    let begin = |rank: usize| (elements as u128 * rank as u128 / world_size as u128) as usize;
    let region = Region::Flat(begin(rank)..begin(rank + 1));
    let mut bytes = vec![0; (begin(rank + 1) - begin(rank)) * size];
    read(&region, &mut bytes)?;
    let (name, shape) = (Cow::Owned(name.to_owned()), Cow::Owned(shape.to_vec()));
    Ok(Part { name, dtype, shape, region, bytes: Cow::Owned(bytes) })
}

/// No rank waits longer than this for another to have written its file.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Saves into `dir` as `world_size` ranks, each a thread of this process with the snapshot that `share` gives for it:
/// what [`Checkpoint::share`] and [`HfFolder::share`] are for. All shares are in memory at once. Nothing rotates, and
/// `latest` stays where it names another checkpoint of a later step: a run would go on from there.
///
/// # Errors
/// [`Error::Request`] when so many threads cannot be started; the first error of `share`; those of [`Saver::open`] and [`Saver::save`].
pub fn save_as_ranks(
    dir: &Path,
    world_size: usize,
    share: impl Fn(usize) -> Result<Snapshot<'static>> + Sync,
) -> Result<SaveReport> {
    let results = run_ranks_within(PATIENCE, world_size, |group| {
        let snapshot = share(group.rank())?;
        let saver = Saver::open(dir, &group)?;
        let saver = if latest_is_later(dir, &snapshot)? { saver.leaving_latest() } else { saver };
        saver.save(&group, &snapshot, &Rotation::KEEP_ALL)
    });
    let results = results.map_err(|e| Error::Request {
        name: dir.display().to_string(),
        reason: format!("{world_size} ranks cannot be had as threads: {e}"),
    })?;
    // A rank that failed by itself says more than those that heard of it.
    let told = |e: &Error| matches!(e, Error::Rank { .. } | Error::Agreement { .. });
    let (own, others): (Vec<_>, Vec<_>) =
        results.into_iter().partition(|r| r.as_ref().is_err_and(|e| !told(e)));
    let nobody = || Error::Request { name: dir.display().to_string(), reason: "a world of no ranks".into() };
    let (failed, saved): (Vec<_>, Vec<_>) = others.into_iter().partition(Result::is_err);
    own.into_iter().chain(failed).chain(saved).next().unwrap_or_else(|| Err(nobody()))
}

/// Whether `latest` names another checkpoint, of a later step.
fn latest_is_later(dir: &Path, snapshot: &Snapshot<'_>) -> Result<bool> {
    let checkpoints = Checkpoints::open(dir);
    let latest = match checkpoints.latest() {
        // What names nothing is better replaced.
        Err(Error::Damaged { .. }) | Ok(None) => return Ok(false),
        latest => latest?,
    };
    let is_it = |listed: &Listed| Some(&listed.tag) == latest.as_ref() && listed.tag != snapshot.tag;
    Ok(checkpoints.list()?.iter().any(|listed| is_it(listed) && listed.step > snapshot.step))
}
