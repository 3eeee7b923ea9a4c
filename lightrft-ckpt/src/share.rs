//! A checkpoint, or a Hugging Face folder, as what one rank of any world saves: for resharding and for import.

use std::borrow::Cow;

use safetensors::Dtype;
use serde_json::Value;

use crate::element::{element_bytes, element_count};
use crate::error::{Error, Result};
use crate::hf::HfFolder;
use crate::reader::Checkpoint;
use crate::region::Region;
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
