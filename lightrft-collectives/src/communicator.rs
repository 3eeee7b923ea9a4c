//! The seam and its contract: same calls, same order, on every rank

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::buffer::{BufferMut, Host, HostMut};
use crate::error::{Error, Result};
use crate::fused::{self, Values};
use crate::host::Beside;
use crate::memory::{GroupBuffer, GroupMemory};
use crate::object;
use crate::op::{Element, ReduceOp};
use crate::operation::{Call, Operation};
use crate::site;
use crate::within::Within;

/// What a new group has of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupOptions {
    /// How long its calls wait for a slow rank; the parent group's timeout if `None`.
    pub timeout: Option<Duration>,
    /// Whether a group of the same ranks that lives already will do.
    pub sharing: Sharing,
}

/// Whether a new group may be one that lives already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Sharing {
    /// One group for each list of ranks (and timeout) in a world: where every member still holds a healthy one that
    /// was made so, they get that one. A mesh then costs no more groups than it has distinct ones.
    #[default]
    Shared,
    /// A group that nobody else has, for calls in an order of their own: those of a [`Queue`](crate::Queue), or of another
    /// thread.
    Exclusive,
}

impl GroupOptions {
    /// Sets how long the group's calls wait for a slow rank.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        GroupOptions { timeout: Some(timeout), ..self }
    }

    /// Asks for a group that nobody else has.
    #[must_use]
    pub fn exclusive(self) -> Self {
        GroupOptions { sharing: Sharing::Exclusive, ..self }
    }
}

/// A group of ranks that talk to each other. Backends implement this; users call [`CommunicatorExt`].
///
/// # Contract
/// - Every member makes the same calls in the same order. Calls on one group from several threads of a rank are
///   put in some order, which is rarely the same on all ranks: use one thread per group.
/// - [`run_within`](Communicator::run_within) blocks until this rank's part is done and its buffers may be used again. It first calls
///   [`Operation::check`], and sends nothing if that fails.
/// - Reductions are folded in rank order as [`ReduceOp`] says: the bits do not depend on the backend.
/// - If ranks make different calls, every rank gets [`Error::Mismatch`] before it is given any result.
/// - Every wait ends: with the result, when a member is lost ([`Error::PeerLost`]), or at the deadline
///   ([`Error::Timeout`]). Any of these poisons the group, with the same error on all its members; groups that do not
///   contain the rank that was lost go on. [`rebuild`](Communicator::rebuild) makes a group of those who are left.
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

    /// `len` zero bytes of memory for this rank that the group's calls find where they lie, if it has such memory;
    /// otherwise ordinary memory. Collective: all members call it with the same length.
    ///
    /// # Errors
    /// As [`run_within`](Communicator::run_within).
    fn alloc_bytes(&self, len: usize) -> Result<GroupMemory> {
        Ok(GroupMemory::own(len))
    }

    /// A new group of some members, `ranks` being their ranks in this group, in the order they will have.
    ///
    /// Collective over *this* group: all members call it with the same list and options, also those not in it,
    /// which get `None`. A group of one rank does no communication. What members hold already is shared unless the
    /// options say otherwise, see [`Sharing`].
    ///
    /// # Errors
    /// [`Error::Members`] or [`Error::Rank`] for a bad list; otherwise as [`run_within`](Communicator::run_within).
    fn subgroup_with(&self, ranks: &[usize], options: &GroupOptions)
    -> Result<Option<Arc<dyn Communicator>>>;

    /// The error that `call` would return at once because the group is dead, as far as this rank knows. Never waits.
    fn failure(&self, call: Call) -> Option<Error> {
        let _ = call;
        None
    }

    /// Declares the group dead on all its ranks, because of what this one has met on another way between them. Never waits;
    /// without effect on a group that is dead already.
    fn poison(&self, error: &Error) {
        let _ = error;
    }

    /// A line beside this group in the flight recorder, for calls that its members make with each other on another way, and
    /// their comparison. `line` is its number: the same on all members, and no other line's. `None` if this backend has no
    /// recorder. For this crate's own layers.
    #[doc(hidden)]
    fn beside(&self, line: u64, name: &str) -> Option<Beside> {
        let _ = (line, name);
        None
    }

    /// [`subgroup_with`](Communicator::subgroup_with) the default options.
    ///
    /// # Errors
    /// As there.
    fn subgroup(&self, ranks: &[usize]) -> Result<Option<Arc<dyn Communicator>>> {
        self.subgroup_with(ranks, &GroupOptions::default())
    }

    /// The group of those members who are left, in the place of this one, which stays dead.
    ///
    /// Collective over the members that live; those that have not called it within `timeout` do not come along, and get
    /// [`Error::PeerLost`] with their own rank if they call it later. The order of ranks is kept. To be called once on a
    /// group; the new one can be rebuilt in its turn. If only this rank is left, it gets a group of one.
    ///
    /// # Errors
    /// [`Error::NoRebuild`] if this backend cannot, or has done it before; [`Error::PeerLost`] if the others went on
    /// without this rank, or, as [`Error::Timeout`], if the new group could not be connected within `timeout`.
    fn rebuild(&self, timeout: Duration) -> Result<Arc<dyn Communicator>> {
        let _ = timeout;
        Err(Error::NoRebuild { group: self.name().into(), why: "this backend does not offer it" })
    }
}

/// Typed calls, written once over [`Communicator::run_within`]. Lengths are in elements.
///
/// All calls are collective over the group, block, and fail as the contract of [`Communicator`] says.
pub trait CommunicatorExt: Communicator {
    /// Makes one call with the other members, with the group's own deadline.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn run(&self, operation: Operation<'_>) -> Result<()> {
        let _site = site::mark();
        self.run_within(operation, None)
    }

    /// A buffer of `len` zeros from the group's heap. Collective: all ranks call it with the same length.
    ///
    /// Between processes of one machine such a buffer is mapped by all ranks of the group, and calls on which every rank
    /// passes (a piece of) its own work on it directly: an all-reduce needs less than half the memory traffic of one on
    /// other memory. It is an ordinary slice in all else, and may be used with other groups.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn alloc<T: Element>(&self, len: usize) -> Result<GroupBuffer<T>> {
        let _site = site::mark();
        let bytes = len.checked_mul(size_of::<T>());
        let bytes = bytes.ok_or_else(|| {
            object::argument(
                self,
                Call::Alloc,
                format!("{len} elements"),
                "a length that fits in memory".into(),
            )
        })?;
        Ok(GroupBuffer::new(self.alloc_bytes(bytes)?))
    }

    /// Replaces `data` by the reduction of all ranks' `data`.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn all_reduce<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<()> {
        self.run(Operation::AllReduce { data: HostMut::new(data).into(), op })
    }

    /// Gathers all ranks' `input` into `output` (`world_size * input.len()`), in rank order.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.run(Operation::AllGather { input: Host::new(input).into(), output: HostMut::new(output).into() })
    }

    /// Gathers in place: this rank's part is `data[rank * n .. (rank + 1) * n]` with `n = data.len() / world_size`.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn all_gather_in_place<T: Element>(&self, data: &mut [T]) -> Result<()> {
        self.run(Operation::AllGatherInPlace { data: HostMut::new(data).into() })
    }

    /// Gathers inputs of different lengths, `counts[r]` elements from rank `r`, in rank order.
    /// Every rank gives the same `counts`.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn all_gather_counts<T: Element>(&self, input: &[T], counts: &[usize], output: &mut [T]) -> Result<()> {
        self.run(Operation::AllGatherV {
            input: Host::new(input).into(),
            counts,
            output: HostMut::new(output).into(),
        })
    }

    /// Gathers bytes of any length from every rank; the lengths need not be known. Up to 992 bytes take one collective,
    /// more take two.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn all_gather_v(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let _site = site::mark();
        Ok(object::all_gather_bytes(self, Ok(bytes))?.iter().map(<[u8]>::to_vec).collect())
    }

    /// Gives each rank its part of the reduction of all ranks' `input` (`world_size * output.len()`).
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
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
    #[track_caller]
    fn broadcast<T: Element>(&self, data: &mut [T], root: usize) -> Result<()> {
        self.run(Operation::Broadcast { data: HostMut::new(data).into(), root })
    }

    /// [`all_reduce`](CommunicatorExt::all_reduce) of `input`, with the result in `output`.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn all_reduce_into<T: Element>(&self, input: &[T], output: &mut [T], op: ReduceOp) -> Result<()> {
        let (input, output) = (Host::new(input).into(), HostMut::new(output).into());
        self.run(Operation::AllReduceInto { input, output, op })
    }

    /// Reduces in place: this rank's part of `data` (`n = data.len() / world_size` elements from `rank * n`) becomes its part
    /// of the reduction; the other parts' contents are not defined afterwards.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn reduce_scatter_in_place<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<()> {
        self.run(Operation::ReduceScatterInPlace { data: HostMut::new(data).into(), op })
    }

    /// Sends `send_counts[q]` elements to each rank `q`, one piece of `input` after the other, and receives
    /// `recv_counts[q]` from it.
    ///
    /// # Errors
    /// See [`Communicator`]; [`Error::Mismatch`] if a rank expects another number of elements than it is sent.
    #[track_caller]
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
    #[track_caller]
    fn reduce<T: Element>(&self, data: &mut [T], op: ReduceOp, root: usize) -> Result<()> {
        self.run(Operation::Reduce { data: HostMut::new(data).into(), op, root })
    }

    /// Gathers all ranks' `input` into the root's `output` (`world_size * input.len()`; empty elsewhere).
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
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
    #[track_caller]
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
    #[track_caller]
    fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.run(Operation::AllToAll { input: Host::new(input).into(), output: HostMut::new(output).into() })
    }

    /// Sends `data` to rank `to`, which calls [`recv`](CommunicatorExt::recv). May return before it has.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn send<T: Element>(&self, data: &[T], to: usize) -> Result<()> {
        self.run(Operation::Send { data: Host::new(data).into(), to })
    }

    /// Receives what rank `from` [sends](CommunicatorExt::send); lengths and types must agree.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn recv<T: Element>(&self, data: &mut [T], from: usize) -> Result<()> {
        self.run(Operation::Recv { data: HostMut::new(data).into(), from })
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[track_caller]
    fn barrier(&self) -> Result<()> {
        self.run(Operation::Barrier)
    }

    /// Gathers one object from every rank, in rank order.
    ///
    /// Objects travel as MessagePack with named fields, so NaN, bytes and maps survive. Objects of less than 992 bytes take
    /// one collective, longer ones two.
    ///
    /// # Errors
    /// [`Error::Encode`] on *all* ranks, naming the first whose object cannot be written, and [`Error::Decode`] where
    /// one cannot be read: the group stays usable. Otherwise see [`Communicator`].
    #[track_caller]
    fn all_gather_object<S: Serialize + DeserializeOwned>(&self, object: &S) -> Result<Vec<S>> {
        let _site = site::mark();
        object::all_gather(self, object::encode(self, Call::AllGatherV, object))
    }

    /// Gathers one object from every rank at `root`; `None` elsewhere.
    ///
    /// # Errors
    /// As [`all_gather_object`](CommunicatorExt::all_gather_object).
    #[track_caller]
    fn gather_object<S: Serialize + DeserializeOwned>(
        &self,
        object: &S,
        root: usize,
    ) -> Result<Option<Vec<S>>> {
        let _site = site::mark();
        object::gather(self, object::encode(self, Call::Gather, object), root)
    }

    /// Gives every rank the root's object: `Some` on the root, ignored elsewhere.
    ///
    /// # Errors
    /// [`Error::Argument`] on *all* ranks if the root gives `None`; otherwise as
    /// [`all_gather_object`](CommunicatorExt::all_gather_object).
    #[track_caller]
    fn broadcast_object<S: Serialize + DeserializeOwned>(
        &self,
        object: Option<&S>,
        root: usize,
    ) -> Result<S> {
        let _site = site::mark();
        // What another rank has is not sent: whether it can be encoded does not matter.
        let object = object.filter(|_| self.rank() == root);
        object::broadcast(self, object.map(|object| object::encode(self, Call::Broadcast, object)), root)
    }

    /// Gives each rank its object of the root's list: `Some` of `world_size` objects on the root, ignored elsewhere.
    ///
    /// # Errors
    /// [`Error::Argument`] on *all* ranks if the root's list is missing or has another length; otherwise as
    /// [`all_gather_object`](CommunicatorExt::all_gather_object).
    #[track_caller]
    fn scatter_object<S: Serialize + DeserializeOwned>(
        &self,
        objects: Option<&[S]>,
        root: usize,
    ) -> Result<S> {
        let _site = site::mark();
        object::scatter(self, objects, root)
    }

    /// Reduces several tensors in place, each as [`all_reduce`](CommunicatorExt::all_reduce) would, to the bit, but
    /// not with a call for each: together up to 992 bytes take one collective; otherwise small tensors of one
    /// type are packed together, and large ones are reduced where they lie.
    ///
    /// Tensors on a device are reduced one by one, before the others.
    ///
    /// ```
    /// # use lightrft_collectives::{CommunicatorExt, ReduceOp, local::World};
    /// # World::run(2, |comm| {
    /// let (mut loss, mut counts) = ([0.5f32, 0.25], vec![1i64; 3]);
    /// comm.all_reduce_many([(&mut loss[..]).into(), (&mut counts[..]).into()], ReduceOp::Sum)?;
    /// assert_eq!((loss, counts), ([1.0, 0.5], vec![2, 2, 2]));
    /// # Ok(()) })?;
    /// # Ok::<_, lightrft_collectives::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Entries`] on all ranks if their lists of tensors differ: nothing was reduced then, and the group
    /// stays usable. Otherwise see [`Communicator`].
    #[track_caller]
    fn all_reduce_many<'a>(
        &self,
        tensors: impl IntoIterator<Item = BufferMut<'a>>,
        op: ReduceOp,
    ) -> Result<()> {
        let _site = site::mark();
        fused::all_reduce_many(self, tensors, op)
    }

    /// Replaces several tensors by the root's, with as few calls as [`all_reduce_many`](CommunicatorExt::all_reduce_many).
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    fn broadcast_many<'a>(
        &self,
        tensors: impl IntoIterator<Item = BufferMut<'a>>,
        root: usize,
    ) -> Result<()> {
        let _site = site::mark();
        fused::broadcast_many(self, tensors, root)
    }

    /// Reduces all values of a map, a training step's status for instance: numbers, or vectors of them.
    ///
    /// Up to 992 bytes of values, which are 124 numbers of 8 bytes, take one collective.
    ///
    /// ```
    /// # use std::collections::BTreeMap;
    /// # use lightrft_collectives::{CommunicatorExt, ReduceOp, local::World};
    /// # World::run(2, |comm| {
    /// let mut status = BTreeMap::from([("kl".to_string(), 0.5 * comm.rank() as f64), ("loss".to_string(), 3.0)]);
    /// comm.all_reduce_map(&mut status, ReduceOp::Mean)?;
    /// assert_eq!((status["kl"], status["loss"]), (0.25, 3.0));
    /// # Ok(()) })?;
    /// # Ok::<_, lightrft_collectives::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Entries`] on all ranks if their keys, or the values' types or lengths, differ: it names them and the ranks,
    /// nothing was reduced, and the group stays usable. Otherwise see [`Communicator`].
    #[track_caller]
    fn all_reduce_map<V: Values>(&self, map: &mut BTreeMap<String, V>, op: ReduceOp) -> Result<()> {
        let _site = site::mark();
        self.all_reduce_map_by(map, |_| op)
    }

    /// As [`all_reduce_map`](CommunicatorExt::all_reduce_map), each value by the operation that `op` gives for its key.
    ///
    /// # Errors
    /// As there; also if the operations differ.
    #[track_caller]
    fn all_reduce_map_by<V: Values>(
        &self,
        map: &mut BTreeMap<String, V>,
        op: impl Fn(&str) -> ReduceOp,
    ) -> Result<()> {
        let _site = site::mark();
        self.all_reduce_named(
            map.iter_mut().map(|(name, value)| (name.as_str(), op(name), value.buffer_mut())),
        )
    }

    /// As [`all_reduce_many`](CommunicatorExt::all_reduce_many) of named tensors of any types, each with its own operation.
    ///
    /// # Errors
    /// As there; also if names or operations differ.
    #[track_caller]
    fn all_reduce_named<'a>(
        &self,
        tensors: impl IntoIterator<Item = (&'a str, ReduceOp, BufferMut<'a>)>,
    ) -> Result<()> {
        let _site = site::mark();
        fused::all_reduce_named(self, tensors)
    }

    /// This group with `timeout` as the deadline of each call.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use lightrft_collectives::{CommunicatorExt, local::World};
    /// # World::run(2, |comm| {
    /// comm.within(Duration::from_secs(5)).barrier()?;
    /// # Ok(()) })?;
    /// # Ok::<_, lightrft_collectives::Error>(())
    /// ```
    fn within(&self, timeout: Duration) -> Within<&Self> {
        Within::new(self, timeout)
    }
}

impl<C: Communicator + ?Sized> CommunicatorExt for C {}
