//! The seam and its contract: same calls, same order, on every rank

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::buffer::{Host, HostMut};
use crate::error::{Error, Result};
use crate::memory::{GroupBuffer, GroupMemory};
use crate::op::{Element, ReduceOp};
use crate::operation::{Call, Operation};

/// What a new group has of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupOptions {
    /// How long its calls wait for a slow rank; the parent group's timeout if `None`.
    pub timeout: Option<Duration>,
}

impl GroupOptions {
    /// Sets how long the group's calls wait for a slow rank.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        GroupOptions { timeout: Some(timeout) }
    }
}

/// A group of ranks that talk to each other. Backends implement this; users call [`CommunicatorExt`].
///
/// # Contract
/// - Every member makes the same calls in the same order. Calls on one group from several threads of a rank are
///   put in some order, which is rarely the same on all ranks: use one thread per group.
/// - [`run`](Communicator::run) blocks until this rank's part is done and its buffers may be used again. It first calls
///   [`Operation::check`], and sends nothing if that fails.
/// - Reductions are folded in rank order as [`ReduceOp`] says: the bits do not depend on the backend.
/// - If ranks make different calls, every rank gets [`Error::Mismatch`] before it is given any result.
/// - Every wait ends: with the result, when a member is lost ([`Error::PeerLost`]), or at the deadline
///   ([`Error::Timeout`]). Any of these poisons the group.
/// - Dropping a communicator never blocks.
pub trait Communicator: fmt::Debug + Send + Sync {
    /// The group's name in messages: `world`, `world/1`, ...
    fn name(&self) -> &str;

    /// This rank's place in the group, `0..world_size`. Never a GPU ordinal.
    fn rank(&self) -> usize;

    /// The members' ranks in the world, in the order of their ranks here.
    fn ranks(&self) -> &[usize];

    /// Number of members.
    fn world_size(&self) -> usize {
        self.ranks().len()
    }

    /// Makes one call with the other members, waiting for a slow one no longer than `timeout`, or than the group's
    /// own if it is `None`.
    ///
    /// # Errors
    /// See the contract above.
    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()>;

    /// Makes one call with the other members.
    ///
    /// # Errors
    /// See the contract above.
    fn run(&self, operation: Operation<'_>) -> Result<()> {
        self.run_within(operation, None)
    }

    /// `len` zero bytes of memory for this rank that the group's calls find where they lie, if it has such memory;
    /// otherwise ordinary memory. Collective: all members call it with the same length.
    ///
    /// # Errors
    /// As [`run`](Communicator::run).
    fn alloc_bytes(&self, len: usize) -> Result<GroupMemory> {
        Ok(GroupMemory::own(len))
    }

    /// A new group of some members, `ranks` being their ranks in this group, in the order they will have.
    ///
    /// Collective over *this* group: all members call it with the same list and options, also those not in it,
    /// which get `None`. A group of one rank does no communication.
    ///
    /// # Errors
    /// [`Error::Members`] or [`Error::Rank`] for a bad list; otherwise as [`run`](Communicator::run).
    fn subgroup_with(&self, ranks: &[usize], options: &GroupOptions)
    -> Result<Option<Arc<dyn Communicator>>>;

    /// [`subgroup_with`](Communicator::subgroup_with) the default options.
    ///
    /// # Errors
    /// As there.
    fn subgroup(&self, ranks: &[usize]) -> Result<Option<Arc<dyn Communicator>>> {
        self.subgroup_with(ranks, &GroupOptions::default())
    }
}

/// Typed calls, written once over [`Communicator::run`]. Lengths are in elements.
///
/// All calls are collective over the group, block, and fail as the contract of [`Communicator`] says.
pub trait CommunicatorExt: Communicator {
    /// A buffer of `len` zeros from the group's heap. Collective: all ranks call it with the same length.
    ///
    /// Between processes of one machine such a buffer is mapped by all ranks of the group, and calls on which every rank
    /// passes (a piece of) its own work on it directly: an all-reduce needs less than half the memory traffic of one on
    /// other memory. It is an ordinary slice in all else, and may be used with other groups.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn alloc<T: Element>(&self, len: usize) -> Result<GroupBuffer<T>> {
        let bytes = len.checked_mul(size_of::<T>());
        let bytes = bytes.ok_or_else(|| {
            argument(self, Call::Alloc, format!("{len} elements"), "a length that fits in memory".into())
        })?;
        Ok(GroupBuffer::new(self.alloc_bytes(bytes)?))
    }

    /// Replaces `data` by the reduction of all ranks' `data`.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn all_reduce<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<()> {
        self.run(Operation::AllReduce { data: HostMut::new(data).into(), op })
    }

    /// Gathers all ranks' `input` into `output` (`world_size * input.len()`), in rank order.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.run(Operation::AllGather { input: Host::new(input).into(), output: HostMut::new(output).into() })
    }

    /// Gathers in place: this rank's part is `data[rank * n .. (rank + 1) * n]` with `n = data.len() / world_size`.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn all_gather_in_place<T: Element>(&self, data: &mut [T]) -> Result<()> {
        self.run(Operation::AllGatherInPlace { data: HostMut::new(data).into() })
    }

    /// Gathers inputs of different lengths, `counts[r]` elements from rank `r`, in rank order.
    /// Every rank gives the same `counts`.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn all_gather_counts<T: Element>(&self, input: &[T], counts: &[usize], output: &mut [T]) -> Result<()> {
        self.run(Operation::AllGatherV {
            input: Host::new(input).into(),
            counts,
            output: HostMut::new(output).into(),
        })
    }

    /// Gathers bytes of any length from every rank; the lengths need not be known.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn all_gather_v(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut lengths = vec![0i64; self.world_size()];
        self.all_gather(&[bytes.len() as i64], &mut lengths)?;
        let counts: Vec<usize> = lengths.iter().map(|n| *n as usize).collect();
        let mut all = vec![0u8; counts.iter().sum()];
        self.all_gather_counts(bytes, &counts, &mut all)?;
        let mut rest = &all[..];
        Ok(counts
            .iter()
            .map(|n| {
                let (one, others) = rest.split_at(*n);
                rest = others;
                one.to_vec()
            })
            .collect())
    }

    /// Gives each rank its part of the reduction of all ranks' `input` (`world_size * output.len()`).
    ///
    /// # Errors
    /// See [`Communicator`].
    fn reduce_scatter<T: Element>(&self, input: &[T], output: &mut [T], op: ReduceOp) -> Result<()> {
        self.run(Operation::ReduceScatter {
            input: Host::new(input).into(),
            output: HostMut::new(output).into(),
            op,
        })
    }

    /// Replaces `data` by the root's.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn broadcast<T: Element>(&self, data: &mut [T], root: usize) -> Result<()> {
        self.run(Operation::Broadcast { data: HostMut::new(data).into(), root })
    }

    /// [`all_reduce`](CommunicatorExt::all_reduce) of `input`, with the result in `output`.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn all_reduce_into<T: Element>(&self, input: &[T], output: &mut [T], op: ReduceOp) -> Result<()> {
        let (input, output) = (Host::new(input).into(), HostMut::new(output).into());
        self.run(Operation::AllReduceInto { input, output, op })
    }

    /// Reduces in place: this rank's part of `data` (`n = data.len() / world_size` elements from `rank * n`) becomes its part
    /// of the reduction; the other parts' contents are not defined afterwards.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn reduce_scatter_in_place<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<()> {
        self.run(Operation::ReduceScatterInPlace { data: HostMut::new(data).into(), op })
    }

    /// Sends `send_counts[q]` elements to each rank `q`, one piece of `input` after the other, and receives
    /// `recv_counts[q]` from it.
    ///
    /// # Errors
    /// See [`Communicator`]; [`Error::Mismatch`] if a rank expects another number of elements than it is sent.
    fn all_to_all_v<T: Element>(
        &self,
        input: &[T],
        send_counts: &[usize],
        output: &mut [T],
        recv_counts: &[usize],
    ) -> Result<()> {
        let (input, output) = (Host::new(input).into(), HostMut::new(output).into());
        self.run(Operation::AllToAllV { input, send_counts, output, recv_counts })
    }

    /// Replaces the root's `data` by the reduction of all ranks' `data`; leaves the others' as it is.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn reduce<T: Element>(&self, data: &mut [T], op: ReduceOp, root: usize) -> Result<()> {
        self.run(Operation::Reduce { data: HostMut::new(data).into(), op, root })
    }

    /// Gathers all ranks' `input` into the root's `output` (`world_size * input.len()`; empty elsewhere).
    ///
    /// # Errors
    /// See [`Communicator`].
    fn gather<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        self.run(Operation::Gather {
            input: Host::new(input).into(),
            output: HostMut::new(output).into(),
            root,
        })
    }

    /// Gives each rank its part of the root's `input` (`world_size * output.len()`; empty elsewhere).
    ///
    /// # Errors
    /// See [`Communicator`].
    fn scatter<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        self.run(Operation::Scatter {
            input: Host::new(input).into(),
            output: HostMut::new(output).into(),
            root,
        })
    }

    /// Sends part `q` of `input` to rank `q`, and receives part `q` of `output` from it.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.run(Operation::AllToAll { input: Host::new(input).into(), output: HostMut::new(output).into() })
    }

    /// Sends `data` to rank `to`, which calls [`recv`](CommunicatorExt::recv). May return before it has.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn send<T: Element>(&self, data: &[T], to: usize) -> Result<()> {
        self.run(Operation::Send { data: Host::new(data).into(), to })
    }

    /// Receives what rank `from` [sends](CommunicatorExt::send); lengths and types must agree.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn recv<T: Element>(&self, data: &mut [T], from: usize) -> Result<()> {
        self.run(Operation::Recv { data: HostMut::new(data).into(), from })
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// See [`Communicator`].
    fn barrier(&self) -> Result<()> {
        self.run(Operation::Barrier)
    }

    /// Gathers one object from every rank, in rank order.
    ///
    /// Objects travel as MessagePack with named fields, so NaN, bytes and maps survive.
    ///
    /// # Errors
    /// [`Error::Encode`] before anything is sent, [`Error::Decode`]; otherwise see [`Communicator`].
    fn all_gather_object<S: Serialize + DeserializeOwned>(&self, object: &S) -> Result<Vec<S>> {
        let bytes = encode(self, Call::AllGatherV, object)?;
        let all = self.all_gather_v(&bytes)?;
        all.iter().enumerate().map(|(rank, bytes)| decode(self, Call::AllGatherV, rank, bytes)).collect()
    }

    /// Gathers one object from every rank at `root`; `None` elsewhere.
    ///
    /// # Errors
    /// As [`all_gather_object`](CommunicatorExt::all_gather_object).
    fn gather_object<S: Serialize + DeserializeOwned>(
        &self,
        object: &S,
        root: usize,
    ) -> Result<Option<Vec<S>>> {
        let call = Call::Gather;
        check_root(self, call, root)?;
        let bytes = encode(self, call, object)?;
        let world = self.world_size();
        let mut lengths = vec![0i64; world];
        self.all_gather(&[bytes.len() as i64], &mut lengths)?;
        // Only the lengths differ: everyone pads to the longest.
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut padded = bytes;
        padded.resize(longest, 0);
        let mut all = vec![0u8; if self.rank() == root { world * longest } else { 0 }];
        self.gather(&padded, &mut all, root)?;
        if self.rank() != root {
            return Ok(None);
        }
        let objects = (0..world).map(|rank| {
            let from = rank * longest;
            decode(self, call, rank, &all[from..from + lengths[rank] as usize])
        });
        objects.collect::<Result<Vec<S>>>().map(Some)
    }

    /// Gives every rank the root's object: `Some` on the root, ignored elsewhere.
    ///
    /// # Errors
    /// [`Error::Argument`] if the root gives `None`; otherwise as
    /// [`all_gather_object`](CommunicatorExt::all_gather_object).
    fn broadcast_object<S: Serialize + DeserializeOwned>(
        &self,
        object: Option<&S>,
        root: usize,
    ) -> Result<S> {
        let call = Call::Broadcast;
        check_root(self, call, root)?;
        let mut bytes = match (self.rank() == root, object) {
            (false, _) => Vec::new(),
            (true, Some(object)) => encode(self, call, object)?,
            (true, None) => {
                return Err(argument(self, call, "no object".into(), "an object on the root".into()));
            }
        };
        let mut length = [bytes.len() as i64];
        self.broadcast(&mut length, root)?;
        bytes.resize(length[0] as usize, 0);
        self.broadcast(&mut bytes, root)?;
        decode(self, call, root, &bytes)
    }

    /// Gives each rank its object of the root's list: `Some` of `world_size` objects on the root, ignored elsewhere.
    ///
    /// # Errors
    /// [`Error::Argument`] if the root's list is missing or has another length; otherwise as
    /// [`all_gather_object`](CommunicatorExt::all_gather_object).
    fn scatter_object<S: Serialize + DeserializeOwned>(
        &self,
        objects: Option<&[S]>,
        root: usize,
    ) -> Result<S> {
        let call = Call::Scatter;
        check_root(self, call, root)?;
        let world = self.world_size();
        let mut lengths = vec![0i64; world];
        let mut padded = Vec::new();
        if self.rank() == root {
            let expected = || format!("{world} objects on the root");
            let objects = objects.ok_or_else(|| argument(self, call, "no objects".into(), expected()))?;
            if objects.len() != world {
                return Err(argument(self, call, format!("{} objects", objects.len()), expected()));
            }
            let encoded: Vec<Vec<u8>> =
                objects.iter().map(|o| encode(self, call, o)).collect::<Result<_>>()?;
            let longest = encoded.iter().map(Vec::len).max().unwrap_or(0);
            for (rank, bytes) in encoded.iter().enumerate() {
                lengths[rank] = bytes.len() as i64;
                padded.extend_from_slice(bytes);
                padded.resize((rank + 1) * longest, 0);
            }
        }
        self.broadcast(&mut lengths, root)?;
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut mine = vec![0u8; longest];
        self.scatter(&padded, &mut mine, root)?;
        decode(self, call, root, &mine[..lengths[self.rank()] as usize])
    }
}

impl<C: Communicator + ?Sized> CommunicatorExt for C {}

/// A bad root is refused before the lengths are exchanged.
fn check_root<C: Communicator + ?Sized>(comm: &C, call: Call, root: usize) -> Result<()> {
    let world = comm.world_size();
    if root < world {
        return Ok(());
    }
    Err(Error::Rank { call, group: comm.name().into(), what: "root", rank: root, world })
}

fn argument<C: Communicator + ?Sized>(comm: &C, call: Call, got: String, expected: String) -> Error {
    Error::Argument { call, group: comm.name().into(), rank: comm.rank(), got, expected }
}

fn encode<C: Communicator + ?Sized, S: Serialize>(comm: &C, call: Call, object: &S) -> Result<Vec<u8>> {
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
