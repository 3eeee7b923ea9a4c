//! Objects between ranks: MessagePack, of any length, in at most two collectives
//!
//! A rank that cannot encode its object, or has none to give, says so in the first of them: all ranks return an error
//! that names it, and the group stays usable. Objects of less than a kilobyte need no second one.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::communicator::{Communicator, CommunicatorExt};
use crate::error::{Error, Result};
use crate::operation::{Call, Signature};
use crate::preamble::Blocks;

/// The data of all ranks, in their blocks or in what came after.
pub(crate) struct Pieces {
    blocks: Blocks,
    rest: Vec<u8>,
}

impl Pieces {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut from = 0;
        (0..self.blocks.ranks()).map(move |rank| {
            let outside = self.blocks.outside(rank);
            from += outside;
            if outside > 0 { &self.rest[from - outside..from] } else { self.blocks.inline(rank) }
        })
    }
}

/// Gathers every rank's bytes everywhere.
pub(crate) fn all_gather_bytes<C: Communicator + ?Sized>(
    comm: &C,
    mine: Result<&[u8], &Error>,
) -> Result<Pieces> {
    let blocks = Blocks::exchange(comm, Signature::bare(Call::AllGatherV), mine)?;
    let counts: Vec<usize> = (0..blocks.ranks()).map(|rank| blocks.outside(rank)).collect();
    let mut rest = vec![0; total(comm, &counts)?];
    if !rest.is_empty() {
        let mine = mine.unwrap_or_default();
        comm.all_gather_counts(&mine[..counts[comm.rank()]], &counts, &mut rest)?;
    }
    Ok(Pieces { blocks, rest })
}

/// Gathers every rank's bytes at `root`; nothing but the blocks travels elsewhere.
fn gather_bytes<C: Communicator + ?Sized>(
    comm: &C,
    mine: Result<&[u8], &Error>,
    root: usize,
) -> Result<Option<Pieces>> {
    check_root(comm, Call::Gather, root)?;
    let signature = Signature { root: Some(root as u32), ..Signature::bare(Call::Gather) };
    let blocks = Blocks::exchange(comm, signature, mine)?;
    let counts: Vec<usize> = (0..blocks.ranks()).map(|rank| blocks.outside(rank)).collect();
    let mut rest = Vec::new();
    if total(comm, &counts)? > 0 {
        let (mut send, mut receive) = (vec![0; counts.len()], vec![0; counts.len()]);
        send[root] = counts[comm.rank()];
        let data = &mine.unwrap_or_default()[..send[root]];
        if comm.rank() == root {
            rest = vec![0; total(comm, &counts)?];
            receive = counts;
        }
        comm.all_to_all_v(data, &send, &mut rest, &receive)?;
    }
    Ok((comm.rank() == root).then_some(Pieces { blocks, rest }))
}

/// The bytes that are still to come; the same list, and so the same error, on every rank.
fn total<C: Communicator + ?Sized>(comm: &C, counts: &[usize]) -> Result<usize> {
    let total =
        counts.iter().try_fold(0usize, |sum, n| sum.checked_add(*n)).filter(|n| isize::try_from(*n).is_ok());
    total.ok_or_else(|| Error::Protocol {
        rank: comm.ranks()[comm.rank()],
        got: format!("lengths {counts:?}"),
        expected: "lengths that fit in memory together".into(),
    })
}

pub(crate) fn all_gather<C: Communicator + ?Sized, S: DeserializeOwned>(
    comm: &C,
    encoded: Result<Vec<u8>>,
) -> Result<Vec<S>> {
    let pieces = all_gather_bytes(comm, encoded.as_deref())?;
    pieces.iter().enumerate().map(|(rank, bytes)| decode(comm, Call::AllGatherV, rank, bytes)).collect()
}

pub(crate) fn gather<C: Communicator + ?Sized, S: DeserializeOwned>(
    comm: &C,
    encoded: Result<Vec<u8>>,
    root: usize,
) -> Result<Option<Vec<S>>> {
    let Some(pieces) = gather_bytes(comm, encoded.as_deref(), root)? else { return Ok(None) };
    let objects = pieces.iter().enumerate().map(|(rank, bytes)| decode(comm, Call::Gather, rank, bytes));
    objects.collect::<Result<_>>().map(Some)
}

pub(crate) fn broadcast<C: Communicator + ?Sized, S: DeserializeOwned>(
    comm: &C,
    encoded: Option<Result<Vec<u8>>>,
    root: usize,
) -> Result<S> {
    let call = Call::Broadcast;
    check_root(comm, call, root)?;
    let is_root = comm.rank() == root;
    let bytes = match encoded.filter(|_| is_root) {
        Some(encoded) => encoded,
        None if is_root => Err(argument(comm, call, "no object".into(), "an object on the root".into())),
        None => Ok(Vec::new()),
    };
    let blocks = Blocks::from_root(comm, Signature::bare(call), bytes.as_deref(), root, &mut [])?;
    if blocks.outside(0) == 0 {
        return decode(comm, call, root, blocks.inline(0));
    }
    let mut data = bytes?;
    data.resize(blocks.outside(0), 0);
    comm.broadcast(&mut data, root)?;
    decode(comm, call, root, &data)
}

/// `objects` are those of the root.
pub(crate) fn scatter<C: Communicator + ?Sized, S: Serialize + DeserializeOwned>(
    comm: &C,
    objects: Option<&[S]>,
    root: usize,
) -> Result<S> {
    let call = Call::Scatter;
    check_root(comm, call, root)?;
    let (rank, world) = (comm.rank(), comm.world_size());
    let mut lengths = vec![0u64; world];
    let data = if rank == root { pack(comm, objects, &mut lengths) } else { Ok(Vec::new()) };
    let blocks = Blocks::from_root(comm, Signature::bare(call), data.as_deref(), root, &mut lengths)?;
    let lengths: Vec<usize> = lengths.into_iter().map(|n| n as usize).collect();
    if total(comm, &lengths)? != blocks.data_bytes(0) {
        return Err(Error::Protocol {
            rank: comm.ranks()[root],
            got: format!("{} bytes of objects of lengths {lengths:?}", blocks.data_bytes(0)),
            expected: "their sum".into(),
        });
    }
    if blocks.outside(0) == 0 {
        let from: usize = lengths[..rank].iter().sum();
        return decode(comm, call, root, &blocks.inline(0)[from..from + lengths[rank]]);
    }
    let (mut send, mut receive) = (vec![0; world], vec![0; world]);
    let mut output = vec![0; lengths[rank]];
    receive[root] = lengths[rank];
    if rank == root {
        send = lengths;
    }
    comm.all_to_all_v(data.as_deref().unwrap_or_default(), &send, &mut output, &receive)?;
    decode(comm, call, root, &output)
}

/// The root's objects one after the other, and the length of each.
fn pack<C: Communicator + ?Sized, S: Serialize>(
    comm: &C,
    objects: Option<&[S]>,
    lengths: &mut [u64],
) -> Result<Vec<u8>> {
    let call = Call::Scatter;
    let wrong = |got: String| argument(comm, call, got, format!("{} objects on the root", lengths.len()));
    let objects = objects.ok_or_else(|| wrong("no objects".into()))?;
    if objects.len() != lengths.len() {
        return Err(wrong(format!("{} objects", objects.len())));
    }
    let mut data = Vec::new();
    for (object, length) in objects.iter().zip(lengths) {
        let encoded = encode(comm, call, object)?;
        *length = encoded.len() as u64;
        data.extend(encoded);
    }
    Ok(data)
}

/// A bad root is refused before anything is sent.
fn check_root<C: Communicator + ?Sized>(comm: &C, call: Call, root: usize) -> Result<()> {
    let world = comm.world_size();
    if root < world {
        return Ok(());
    }
    Err(Error::Rank { call, group: comm.name().into(), what: "root", rank: root, world })
}

pub(crate) fn argument<C: Communicator + ?Sized>(
    comm: &C,
    call: Call,
    got: String,
    expected: String,
) -> Error {
    Error::Argument { call, group: comm.name().into(), rank: comm.ranks()[comm.rank()], got, expected }
}

pub(crate) fn encode<C: Communicator + ?Sized, S: Serialize>(
    comm: &C,
    call: Call,
    object: &S,
) -> Result<Vec<u8>> {
    rmp_serde::to_vec_named(object).map_err(|source| Error::Encode {
        call,
        group: comm.name().into(),
        rank: comm.ranks()[comm.rank()],
        source: Arc::new(source),
    })
}

fn decode<C: Communicator + ?Sized, S: DeserializeOwned>(
    comm: &C,
    call: Call,
    rank: usize,
    bytes: &[u8],
) -> Result<S> {
    rmp_serde::from_slice(bytes).map_err(|source| Error::Decode {
        call,
        group: comm.name().into(),
        rank: comm.ranks()[rank],
        source: Arc::new(source),
    })
}
