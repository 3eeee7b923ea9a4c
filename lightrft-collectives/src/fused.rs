//! Several tensors in few collectives: packed together where they are small, and checked to be the same on all ranks
//!
//! Every rank first tells every other a digest of what it has (names, operations, types, lengths) and, if all its
//! values fit, the values, which each rank then folds by itself: the fold is the one behind every all-reduce, so are the bits.

use std::collections::BTreeMap;
use std::slice;

use crate::buffer::{AlignedBytes, BufferMut, HostMut};
use crate::communicator::{Communicator, CommunicatorExt};
use crate::error::{Differing, Error, Result};
use crate::op::{Dtype, Element, ReduceOp};
use crate::operation::{Call, Operation, Signature, digest};
use crate::preamble::{Blocks, INLINE_BYTES};
use crate::reduce::fold_bytes_from;

/// Tensors of at least this size are worth a call of their own, where they lie.
const LARGE_BYTES: usize = 32 << 10;

/// The most that is packed together.
const BUCKET_BYTES: usize = 256 << 10;

/// Numbers that are reduced in place: one, or several of one type.
pub trait Values {
    /// Where they lie.
    fn buffer_mut(&mut self) -> BufferMut<'_>;
}

impl<T: Element> Values for T {
    fn buffer_mut(&mut self) -> BufferMut<'_> {
        slice::from_mut(self).into()
    }
}

impl<T: Element> Values for Vec<T> {
    fn buffer_mut(&mut self) -> BufferMut<'_> {
        self.as_mut_slice().into()
    }
}

impl<'a, T: Element> From<&'a mut [T]> for BufferMut<'a> {
    fn from(data: &'a mut [T]) -> Self {
        HostMut::new(data).into()
    }
}

/// One tensor of a fused call.
struct Part<'a> {
    /// Its key; empty for one that is known by its place.
    name: &'a str,
    /// How it is reduced; `None` if it is the root's.
    op: Option<ReduceOp>,
    data: HostMut<'a>,
}

impl Part<'_> {
    fn form(&self) -> String {
        let count = format!("{:?}, {} elements", self.data.dtype(), self.data.len());
        self.op.map_or(count.clone(), |op| format!("{op}, {count}"))
    }
}

pub(crate) fn all_reduce_many<'a, C: Communicator + ?Sized>(
    comm: &C,
    tensors: impl IntoIterator<Item = BufferMut<'a>>,
    op: ReduceOp,
) -> Result<()> {
    all_reduce_named(comm, tensors.into_iter().map(|data| ("", op, data)))
}

pub(crate) fn all_reduce_named<'a, C: Communicator + ?Sized>(
    comm: &C,
    tensors: impl IntoIterator<Item = (&'a str, ReduceOp, BufferMut<'a>)>,
) -> Result<()> {
    let mut parts = Vec::new();
    let mut elsewhere = Vec::new();
    for (name, op, data) in tensors {
        match data {
            BufferMut::Host(data) if op.allows(data.dtype()) => parts.push(Part { name, op: Some(op), data }),
            BufferMut::Host(data) => {
                let (call, group) = (Call::AllReduce, comm.name().into());
                return Err(Error::Unsupported { call, group, op, dtype: data.dtype() });
            }
            data => elsewhere.push(Operation::AllReduce { data, op }),
        }
    }
    run_each(comm, elsewhere, &parts)?.map_or(Ok(()), |()| fuse(comm, parts, None))
}

pub(crate) fn broadcast_many<'a, C: Communicator + ?Sized>(
    comm: &C,
    tensors: impl IntoIterator<Item = BufferMut<'a>>,
    root: usize,
) -> Result<()> {
    let mut parts = Vec::new();
    let mut elsewhere = Vec::new();
    for data in tensors {
        match data {
            BufferMut::Host(data) => parts.push(Part { name: "", op: None, data }),
            data => elsewhere.push(Operation::Broadcast { data, root }),
        }
    }
    run_each(comm, elsewhere, &parts)?.map_or(Ok(()), |()| fuse(comm, parts, Some(root)))
}

/// Makes the calls on device memory; `Some` if there is something to do on the host. A communicator of devices can do nothing
/// there, so it is left alone if all tensors are on devices.
fn run_each<C: Communicator + ?Sized>(
    comm: &C,
    calls: Vec<Operation<'_>>,
    parts: &[Part<'_>],
) -> Result<Option<()>> {
    let only_devices = parts.is_empty() && !calls.is_empty();
    for call in calls {
        comm.run(call)?;
    }
    Ok((!only_devices).then_some(()))
}

/// Bytes that a part takes in a block: each begins where every element type may.
fn padded(part: &Part<'_>) -> usize {
    part.data.bytes().len().next_multiple_of(8)
}

fn fuse<C: Communicator + ?Sized>(comm: &C, mut parts: Vec<Part<'_>>, root: Option<usize>) -> Result<()> {
    let call = if root.is_some() { Call::Broadcast } else { Call::AllReduce };
    let (rank, world) = (comm.rank(), comm.world_size());
    if let Some(rank) = root.filter(|root| *root >= world) {
        return Err(Error::Rank { call, group: comm.name().into(), what: "root", rank, world });
    }
    if world == 1 {
        return Ok(());
    }
    let bytes: usize = parts.iter().map(padded).sum();
    let mut packed = AlignedBytes::zeroed(if bytes <= INLINE_BYTES { bytes } else { 0 });
    if bytes <= INLINE_BYTES && root.is_none_or(|root| root == rank) {
        let mut rest = packed.as_mut_slice();
        for part in &parts {
            let (here, after) = rest.split_at_mut(padded(part));
            here[..part.data.bytes().len()].copy_from_slice(part.data.bytes());
            rest = after;
        }
    }
    let signature = Signature {
        root: root.map(|root| root as u32),
        count: parts.iter().map(|part| part.data.len() as u64).sum(),
        digest: layout(&parts),
        ..Signature::bare(call)
    };
    let blocks = Blocks::exchange(comm, signature, Ok(packed.as_slice()))?;
    if !blocks.agree() {
        return Err(difference(comm, call, &parts));
    }
    if bytes > INLINE_BYTES {
        return in_buckets(comm, parts, root);
    }
    // What stood here is sent: the results of the folds go to the same places.
    let mut rest = packed.as_mut_slice();
    let (mut from, mut parts) = (0, &mut parts[..]);
    while let Some(first) = parts.first() {
        let form = kind(first);
        let (alike, after) = parts.split_at_mut(parts.iter().take_while(|part| kind(part) == form).count());
        let bytes = alike.iter().map(padded).sum();
        let (here, later) = rest.split_at_mut(bytes);
        let all = |rank: usize| &blocks.inline(rank)[from..from + bytes];
        match (form, root) {
            // One fold for all of them: what fills the gaps is zero on all ranks, and nobody reads what becomes of it.
            ((Some(op), dtype), _) => fold_bytes_from(op, dtype, world, &all, here),
            // The root's data; the others have sent zeros.
            ((None, _), Some(root)) => here.copy_from_slice(all(root)),
            ((None, _), None) => {}
        }
        from += bytes;
        let mut results = &*here;
        for part in alike {
            let (result, others) = results.split_at(padded(part));
            let data = part.data.bytes_mut();
            data.copy_from_slice(&result[..data.len()]);
            results = others;
        }
        (rest, parts) = (later, after);
    }
    Ok(())
}

/// What all ranks must have alike.
fn layout(parts: &[Part<'_>]) -> u64 {
    digest(parts.iter().flat_map(|part| {
        // The length goes before, so what fills the last word up is no part of it.
        let name = part.name.as_bytes().chunks(8).map(|bytes| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(word) as usize
        });
        let numbers = [
            part.name.len(),
            part.op.map_or(0, |op| op as usize + 1),
            part.data.dtype() as usize,
            part.data.len(),
        ];
        numbers.into_iter().chain(name)
    }))
}

/// Which entries differ, found by a second exchange: all ranks know by now that it is needed.
fn difference<C: Communicator + ?Sized>(comm: &C, call: Call, parts: &[Part<'_>]) -> Error {
    let place = |(index, part): (usize, &Part<'_>)| {
        let key = if part.name.is_empty() { format!("tensor {index}") } else { part.name.to_string() };
        (key, part.form())
    };
    let mine: Vec<(String, String)> = parts.iter().enumerate().map(place).collect();
    let all = match comm.all_gather_object(&mine) {
        Ok(all) => all,
        Err(error) => return error,
    };
    let mut given: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    for (rank, entries) in all.into_iter().enumerate() {
        for entry in entries {
            given.entry(entry).or_default().push(comm.ranks()[rank]);
        }
    }
    let differing = given.into_iter().filter(|(_, ranks)| ranks.len() != comm.world_size());
    let differing = differing.map(|((key, form), ranks)| Differing { key, form, ranks }).collect();
    Error::Entries { call, group: comm.name().into(), differing }
}

/// Parts that travel together: reductions by operation and type, what the root sends as bytes.
fn kind(part: &Part<'_>) -> (Option<ReduceOp>, Dtype) {
    (part.op, if part.op.is_some() { part.data.dtype() } else { Dtype::U8 })
}

/// Large parts one by one; small ones packed, each kind for itself.
fn in_buckets<C: Communicator + ?Sized>(comm: &C, parts: Vec<Part<'_>>, root: Option<usize>) -> Result<()> {
    let mut kinds: Vec<Vec<Part<'_>>> = Vec::new();
    for part in parts {
        if part.data.bytes().len() >= LARGE_BYTES {
            run(comm, part.op, root, part.data)?;
            continue;
        }
        match kinds.iter_mut().find(|parts| kind(&parts[0]) == kind(&part)) {
            Some(parts) => parts.push(part),
            None => kinds.push(vec![part]),
        }
    }
    for mut parts in kinds {
        let mut rest = &mut parts[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |part: &&Part<'_>| {
                bytes += part.data.bytes().len();
                bytes <= BUCKET_BYTES
            };
            // Every part is smaller than a bucket, so there is at least one.
            let (bucket, after) = rest.split_at_mut(rest.iter().take_while(fits).count());
            one_bucket(comm, bucket, root)?;
            rest = after;
        }
    }
    Ok(())
}

fn one_bucket<C: Communicator + ?Sized>(comm: &C, parts: &mut [Part<'_>], root: Option<usize>) -> Result<()> {
    let (op, dtype) = kind(&parts[0]);
    let mut packed = AlignedBytes::zeroed(parts.iter().map(|part| part.data.bytes().len()).sum());
    let mut rest = packed.as_mut_slice();
    for part in &*parts {
        let (here, after) = rest.split_at_mut(part.data.bytes().len());
        here.copy_from_slice(part.data.bytes());
        rest = after;
    }
    run(comm, op, root, HostMut::from_bytes(dtype, packed.as_mut_slice())?)?;
    let mut rest = packed.as_slice();
    for part in parts {
        let (here, after) = rest.split_at(part.data.bytes().len());
        part.data.bytes_mut().copy_from_slice(here);
        rest = after;
    }
    Ok(())
}

fn run<C: Communicator + ?Sized>(
    comm: &C,
    op: Option<ReduceOp>,
    root: Option<usize>,
    data: HostMut<'_>,
) -> Result<()> {
    let data = data.into();
    comm.run(match op {
        Some(op) => Operation::AllReduce { data, op },
        None => Operation::Broadcast { data, root: root.unwrap_or_default() },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout_of(names: &[String]) -> u64 {
        let mut values = vec![0f32; names.len()];
        let parts = names.iter().zip(&mut values).map(|(name, value)| {
            let data = HostMut::new(std::slice::from_mut(value));
            Part { name, op: Some(ReduceOp::Sum), data }
        });
        layout(&parts.collect::<Vec<_>>())
    }

    proptest! {
        #[test]
        fn other_names_have_another_layout(names: Vec<String>, other: Vec<String>) {
            prop_assert_eq!(layout_of(&names) == layout_of(&other), names == other);
        }

        #[test]
        fn names_that_differ_in_one_letter_or_in_length_have_another_layout(
            names in prop::collection::vec("[a-z\0]{1,20}", 1..20), which: prop::sample::Index, letter in "[a-z\0]",
        ) {
            let which = which.index(names.len());
            let mut longer = names.clone();
            longer[which].push_str(&letter);
            prop_assert_ne!(layout_of(&names), layout_of(&longer));
            let mut changed = names.clone();
            changed[which].replace_range(0..1, &letter);
            prop_assert_eq!(layout_of(&names) == layout_of(&changed), names == changed);
        }
    }
}
