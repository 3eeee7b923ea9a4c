//! One collective call as a value: its buffers, its checks, and the signature that ranks compare

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::buffer::{Buffer, BufferMut, Elements, Host, HostMut};
use crate::device::{Device, DeviceMut};
use crate::error::{Error, Result};
use crate::op::{BLOCK, Dtype, ReduceOp};

/// A call on a communicator, with the caller's buffers.
///
/// Every member of the group makes the same call with the same counts, types, reduce operation and root, in
/// the same order. "Part `r`" of a buffer of `n` equal parts is its elements `r*len/n .. (r+1)*len/n`. In place or not,
/// on the host or on a device: that is each rank's own affair.
#[derive(Debug)]
#[non_exhaustive]
pub enum Operation<'a, I = Buffer<'a>, O = BufferMut<'a>> {
    /// Every rank gets the reduction of all ranks' `data`, in place.
    AllReduce {
        /// This rank's contribution, then the result.
        data: O,
        /// How contributions are combined.
        op: ReduceOp,
    },
    /// Every rank gets all ranks' inputs, one after the other in rank order.
    AllGather {
        /// This rank's part.
        input: I,
        /// `world_size * input.len()` elements.
        output: O,
    },
    /// As [`AllGather`](Operation::AllGather), where this rank's part already lies in its place.
    AllGatherInPlace {
        /// `world_size` equal parts; part `rank` is read, the others are written.
        data: O,
    },
    /// All ranks' inputs of different lengths, one after the other in rank order.
    AllGatherV {
        /// This rank's part, `counts[rank]` elements.
        input: I,
        /// Elements of each rank, the same list on every rank.
        counts: &'a [usize],
        /// As many elements as `counts` sums to.
        output: O,
    },
    /// Each rank gets its part of the reduction of all ranks' inputs.
    ReduceScatter {
        /// `world_size * output.len()` elements; part `r` goes to rank `r`.
        input: I,
        /// Part `rank` of the reduction.
        output: O,
        /// How contributions are combined.
        op: ReduceOp,
    },
    /// Every rank gets the root's `data`.
    Broadcast {
        /// Read on the root, written elsewhere.
        data: O,
        /// The rank of this group that sends.
        root: usize,
    },
    /// The root gets the reduction of all ranks' `data`; elsewhere `data` is left as it was.
    Reduce {
        /// This rank's contribution; on the root, then the result.
        data: O,
        /// How contributions are combined.
        op: ReduceOp,
        /// The rank of this group that receives.
        root: usize,
    },
    /// The root gets all ranks' inputs, one after the other in rank order.
    Gather {
        /// This rank's part.
        input: I,
        /// On the root, `world_size * input.len()` elements; elsewhere empty.
        output: O,
        /// The rank of this group that receives.
        root: usize,
    },
    /// Each rank gets its part of the root's input.
    Scatter {
        /// On the root, `world_size * output.len()` elements; elsewhere empty.
        input: I,
        /// Part `rank` of the root's input.
        output: O,
        /// The rank of this group that sends.
        root: usize,
    },
    /// Part `q` of this rank's input becomes part `rank` of rank `q`'s output.
    AllToAll {
        /// `world_size` equal parts.
        input: I,
        /// As many elements as `input`.
        output: O,
    },
    /// As [`AllReduce`](Operation::AllReduce), with the result beside the contribution.
    AllReduceInto {
        /// This rank's contribution.
        input: I,
        /// As many elements as `input`.
        output: O,
        /// How contributions are combined.
        op: ReduceOp,
    },
    /// As [`ReduceScatter`](Operation::ReduceScatter), with the result in this rank's part of its contribution.
    ReduceScatterInPlace {
        /// `world_size` equal parts; part `rank` becomes the result, the others' contents are not defined afterwards.
        data: O,
        /// How contributions are combined.
        op: ReduceOp,
    },
    /// Consecutive pieces of this rank's input of any lengths, one for each rank.
    AllToAllV {
        /// As many elements as `send_counts` sums to.
        input: I,
        /// Elements for each rank.
        send_counts: &'a [usize],
        /// As many elements as `recv_counts` sums to.
        output: O,
        /// Elements from each rank: rank `q`'s `send_counts[rank]`.
        recv_counts: &'a [usize],
    },
    /// No rank returns before every rank has called.
    Barrier,
    /// Sends to one rank, which calls [`Recv`](Operation::Recv). May return before it has.
    Send {
        /// What is sent.
        data: I,
        /// The receiving rank of this group.
        to: usize,
    },
    /// Receives what one rank [sends](Operation::Send).
    Recv {
        /// Where it goes; the length must be the sender's.
        data: O,
        /// The sending rank of this group.
        from: usize,
    },
}

/// A call on host memory.
pub type HostOperation<'a> = Operation<'a, Host<'a>, HostMut<'a>>;

/// A call on device memory, to be enqueued on the stream that its buffers name.
pub type DeviceOperation<'a> = Operation<'a, Device<'a>, DeviceMut<'a>>;

/// The name of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
#[allow(missing_docs)] // Each is the operation of the same name.
#[repr(u8)]
pub enum Call {
    AllReduce,
    AllGather,
    AllGatherV,
    ReduceScatter,
    Broadcast,
    Reduce,
    Gather,
    Scatter,
    AllToAll,
    AllToAllV,
    Barrier,
    Send,
    Recv,
    Subgroup,
    Alloc,
    Rebuild,
}

impl Call {
    const ALL: [Call; 16] = [
        Call::AllReduce,
        Call::AllGather,
        Call::AllGatherV,
        Call::ReduceScatter,
        Call::Broadcast,
        Call::Reduce,
        Call::Gather,
        Call::Scatter,
        Call::AllToAll,
        Call::AllToAllV,
        Call::Barrier,
        Call::Send,
        Call::Recv,
        Call::Subgroup,
        Call::Alloc,
        Call::Rebuild,
    ];

    /// The name as it is written in code.
    pub fn name(self) -> &'static str {
        match self {
            Call::AllReduce => "all_reduce",
            Call::AllGather => "all_gather",
            Call::AllGatherV => "all_gather_v",
            Call::ReduceScatter => "reduce_scatter",
            Call::Broadcast => "broadcast",
            Call::Reduce => "reduce",
            Call::Gather => "gather",
            Call::Scatter => "scatter",
            Call::AllToAll => "all_to_all",
            Call::AllToAllV => "all_to_all_v",
            Call::Barrier => "barrier",
            Call::Send => "send",
            Call::Recv => "recv",
            Call::Subgroup => "subgroup",
            Call::Alloc => "alloc",
            Call::Rebuild => "rebuild",
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What must be equal on all ranks for a call to make sense; displayed as `all_reduce(sum, F32, 8 elements)`.
///
/// `count` is the number of elements of one rank's part, of the whole for all-gather-v. `digest` stands for
/// what has no room here: the counts of all-gather-v, the ranks of a new group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// Which operation.
    pub call: Call,
    /// Element type; none for calls without data.
    pub dtype: Option<Dtype>,
    /// Reduce operation, where there is one.
    pub op: Option<ReduceOp>,
    /// Root, where there is one.
    pub root: Option<u32>,
    /// Elements.
    pub count: u64,
    /// Hash of longer arguments, or 0.
    pub digest: u64,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.call)?;
        if let Some(op) = self.op {
            write!(f, "{op}, ")?;
        }
        if let Some(root) = self.root {
            write!(f, "root {root}, ")?;
        }
        match self.dtype {
            Some(BLOCK) => write!(f, "first part of a call on objects, a map or a list")?,
            Some(dtype) => write!(f, "{dtype:?}, {} elements", self.count)?,
            None => {}
        }
        if self.digest != 0 {
            write!(f, ", arguments #{:08x}", self.digest as u32)?;
        }
        write!(f, ")")
    }
}

/// The element types that travel, in the order of their codes on the wire.
const DTYPES: [Dtype; 8] =
    [Dtype::F32, Dtype::F64, Dtype::BF16, Dtype::F16, Dtype::I32, Dtype::I64, Dtype::U8, BLOCK];

impl Signature {
    pub(crate) fn bare(call: Call) -> Self {
        Signature { call, dtype: None, op: None, root: None, count: 0, digest: 0 }
    }

    /// Three words for headers and shared memory. [`Signature::decode`] reads them back.
    pub(crate) fn encode(&self) -> [u64; 3] {
        // Declared in the order of `Call::ALL` and `ReduceOp::ALL`.
        let dtype = match self.dtype {
            None => 0,
            Some(Dtype::F32) => 1,
            Some(Dtype::F64) => 2,
            Some(Dtype::BF16) => 3,
            Some(Dtype::F16) => 4,
            Some(Dtype::I32) => 5,
            Some(Dtype::I64) => 6,
            Some(Dtype::U8) => 7,
            Some(BLOCK) => 8,
            // No type that travels: no code that is read back.
            Some(_) => 1 + DTYPES.len() as u64,
        };
        let small = (self.call as u64 + 1)
            | dtype << 8
            | self.op.map_or(0, |op| op as u64 + 1) << 16
            | u64::from(self.root.is_some()) << 24
            | u64::from(self.root.unwrap_or(0)) << 32;
        [small, self.count, self.digest]
    }

    /// `None` if the words are no signature: they come from another process.
    pub(crate) fn decode(words: [u64; 3]) -> Option<Self> {
        let [small, count, digest] = words;
        let byte = |shift: u32| ((small >> shift) & 0xff) as usize;
        let optional = |code: usize, len: usize| if code <= len { Some(code.checked_sub(1)) } else { None };
        Some(Signature {
            call: *Call::ALL.get(byte(0).checked_sub(1)?)?,
            dtype: optional(byte(8), DTYPES.len())?.map(|i| DTYPES[i]),
            op: optional(byte(16), ReduceOp::ALL.len())?.map(|i| ReduceOp::ALL[i]),
            root: (byte(24) == 1).then_some((small >> 32) as u32),
            count,
            digest,
        })
    }
}

/// A digest of numbers that every rank computes alike.
///
/// Each number is mixed in by a multiplication and a shift, as in splitmix64 (Steele, Lea, Flood 2014). Both are bijections, so
/// lists that differ in one number differ in their digest.
pub(crate) fn digest(numbers: impl IntoIterator<Item = usize>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for number in numbers {
        hash = (hash ^ number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 32;
    }
    hash.max(1)
}

/// Where a check happens, for its message.
struct Place<'a> {
    call: Call,
    group: &'a str,
}

impl Place<'_> {
    fn length(&self, what: &'static str, got: usize, expected: usize) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(Error::Length { call: self.call, group: self.group.into(), what, got, expected })
    }

    fn divisible(&self, what: &'static str, got: usize, world: usize) -> Result<()> {
        if got.is_multiple_of(world) {
            return Ok(());
        }
        Err(Error::Uneven { call: self.call, group: self.group.into(), what, got, world })
    }

    fn member(&self, what: &'static str, rank: usize, world: usize) -> Result<()> {
        if rank < world {
            return Ok(());
        }
        Err(Error::Rank { call: self.call, group: self.group.into(), what, rank, world })
    }

    fn peer(&self, what: &'static str, peer: usize, rank: usize, world: usize) -> Result<()> {
        self.member(what, peer, world)?;
        if peer != rank {
            return Ok(());
        }
        Err(Error::OwnRank { call: self.call, group: self.group.into(), rank })
    }

    fn same_dtype(&self, input: &impl Elements, output: &impl Elements) -> Result<()> {
        if input.dtype() == output.dtype() {
            return Ok(());
        }
        let (input, output) = (input.dtype(), output.dtype());
        Err(Error::Dtypes { call: self.call, group: self.group.into(), input, output })
    }

    fn reducible(&self, op: ReduceOp, dtype: Dtype) -> Result<()> {
        if op.allows(dtype) {
            return Ok(());
        }
        Err(Error::Unsupported { call: self.call, group: self.group.into(), op, dtype })
    }
}

impl<I: Elements, O: Elements> Operation<'_, I, O> {
    /// The name of this call.
    pub fn call(&self) -> Call {
        match self {
            Operation::AllReduce { .. } | Operation::AllReduceInto { .. } => Call::AllReduce,
            Operation::AllGather { .. } | Operation::AllGatherInPlace { .. } => Call::AllGather,
            Operation::AllGatherV { .. } => Call::AllGatherV,
            Operation::ReduceScatter { .. } | Operation::ReduceScatterInPlace { .. } => Call::ReduceScatter,
            Operation::Broadcast { .. } => Call::Broadcast,
            Operation::Reduce { .. } => Call::Reduce,
            Operation::Gather { .. } => Call::Gather,
            Operation::Scatter { .. } => Call::Scatter,
            Operation::AllToAll { .. } => Call::AllToAll,
            Operation::AllToAllV { .. } => Call::AllToAllV,
            Operation::Barrier => Call::Barrier,
            Operation::Send { .. } => Call::Send,
            Operation::Recv { .. } => Call::Recv,
        }
    }

    /// Checks all that one rank can know by itself: lengths, types, roots.
    ///
    /// A communicator calls this before it sends anything, so that a caller's mistake is an error on the rank
    /// that makes it and leaves the group usable.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Uneven`], [`Error::Rank`], [`Error::OwnRank`], [`Error::Dtypes`],
    /// [`Error::Unsupported`].
    pub fn check(&self, rank: usize, world: usize, group: &str) -> Result<()> {
        let at = Place { call: self.call(), group };
        match self {
            Operation::AllReduce { data, op } => at.reducible(*op, data.dtype()),
            Operation::AllGather { input, output } => {
                at.same_dtype(input, output)?;
                at.length("output", output.count(), world * input.count())
            }
            Operation::AllGatherInPlace { data } => at.divisible("data", data.count(), world),
            Operation::AllGatherV { input, counts, output } => {
                at.same_dtype(input, output)?;
                at.length("counts", counts.len(), world)?;
                at.length("input", input.count(), counts[rank])?;
                at.length("output", output.count(), total(counts))
            }
            Operation::ReduceScatter { input, output, op } => {
                at.same_dtype(input, output)?;
                at.reducible(*op, input.dtype())?;
                at.length("input", input.count(), world * output.count())
            }
            Operation::Broadcast { root, .. } => at.member("root", *root, world),
            Operation::Reduce { data, op, root } => {
                at.reducible(*op, data.dtype())?;
                at.member("root", *root, world)
            }
            Operation::Gather { input, output, root } => {
                at.same_dtype(input, output)?;
                at.member("root", *root, world)?;
                let expected = if rank == *root { world * input.count() } else { 0 };
                at.length("output", output.count(), expected)
            }
            Operation::Scatter { input, output, root } => {
                at.same_dtype(input, output)?;
                at.member("root", *root, world)?;
                let expected = if rank == *root { world * output.count() } else { 0 };
                at.length("input", input.count(), expected)
            }
            Operation::AllToAll { input, output } => {
                at.same_dtype(input, output)?;
                at.divisible("input", input.count(), world)?;
                at.length("output", output.count(), input.count())
            }
            Operation::AllReduceInto { input, output, op } => {
                at.same_dtype(input, output)?;
                at.reducible(*op, input.dtype())?;
                at.length("output", output.count(), input.count())
            }
            Operation::ReduceScatterInPlace { data, op } => {
                at.reducible(*op, data.dtype())?;
                at.divisible("data", data.count(), world)
            }
            Operation::AllToAllV { input, send_counts, output, recv_counts } => {
                at.same_dtype(input, output)?;
                at.length("send_counts", send_counts.len(), world)?;
                at.length("recv_counts", recv_counts.len(), world)?;
                at.length("input", input.count(), total(send_counts))?;
                at.length("output", output.count(), total(recv_counts))?;
                at.length("recv_counts of this rank", recv_counts[rank], send_counts[rank])
            }
            Operation::Barrier => Ok(()),
            Operation::Send { to, .. } => at.peer("receiver", *to, rank, world),
            Operation::Recv { from, .. } => at.peer("sender", *from, rank, world),
        }
    }

    /// What this rank's call has in common with the other ranks' calls.
    pub fn signature(&self, world: usize) -> Signature {
        let of = |dtype, count: usize| Signature {
            dtype: Some(dtype),
            count: count as u64,
            ..Signature::bare(self.call())
        };
        let root = |r: &usize| Some(*r as u32);
        match self {
            Operation::AllReduce { data, op } => {
                Signature { op: Some(*op), ..of(data.dtype(), data.count()) }
            }
            Operation::AllGather { input, .. } => of(input.dtype(), input.count()),
            Operation::AllGatherInPlace { data } => of(data.dtype(), data.count() / world),
            Operation::AllGatherV { counts, output, .. } => {
                Signature { digest: digest(counts.iter().copied()), ..of(output.dtype(), output.count()) }
            }
            Operation::ReduceScatter { output, op, .. } => {
                Signature { op: Some(*op), ..of(output.dtype(), output.count()) }
            }
            Operation::Broadcast { data, root: r } => {
                Signature { root: root(r), ..of(data.dtype(), data.count()) }
            }
            Operation::Reduce { data, op, root: r } => {
                Signature { op: Some(*op), root: root(r), ..of(data.dtype(), data.count()) }
            }
            Operation::Gather { input, root: r, .. } => {
                Signature { root: root(r), ..of(input.dtype(), input.count()) }
            }
            Operation::Scatter { output, root: r, .. } => {
                Signature { root: root(r), ..of(output.dtype(), output.count()) }
            }
            Operation::AllToAll { input, .. } => of(input.dtype(), input.count()),
            Operation::AllReduceInto { input, op, .. } => {
                Signature { op: Some(*op), ..of(input.dtype(), input.count()) }
            }
            Operation::ReduceScatterInPlace { data, op } => {
                Signature { op: Some(*op), ..of(data.dtype(), data.count() / world) }
            }
            // Each rank has counts of its own: what two ranks must agree on is compared between them.
            Operation::AllToAllV { input, .. } => of(input.dtype(), 0),
            Operation::Barrier => Signature::bare(Call::Barrier),
            Operation::Send { data, .. } => of(data.dtype(), data.count()),
            Operation::Recv { data, .. } => of(data.dtype(), data.count()),
        }
    }
}

/// What every rank sends to and expects from every other in an all-to-all-v: row `r` has rank `r`'s send counts, then
/// its receive counts.
pub(crate) struct Exchange<'a> {
    pub(crate) counts: &'a [u64],
    pub(crate) world: usize,
}

impl Exchange<'_> {
    /// One rank's row.
    pub(crate) fn row(send_counts: &[usize], recv_counts: &[usize]) -> Vec<u64> {
        send_counts.iter().chain(recv_counts).map(|n| *n as u64).collect()
    }

    /// Elements that `from` sends to `to`.
    pub(crate) fn sent(&self, from: usize, to: usize) -> usize {
        self.counts[2 * self.world * from + to] as usize
    }

    /// Where in its input `from` has what it sends to `to`.
    pub(crate) fn offset(&self, from: usize, to: usize) -> usize {
        (0..to).map(|rank| self.sent(from, rank)).sum()
    }

    /// The first pair of ranks, sender and receiver, that do not agree, with the signature of each. The same on all ranks.
    pub(crate) fn disagreement(&self, signature: Signature) -> Option<(usize, Signature, usize, Signature)> {
        let pairs = (0..self.world).flat_map(|from| (0..self.world).map(move |to| (from, to)));
        pairs
            .map(|(from, to)| {
                let sent = self.sent(from, to) as u64;
                let expected = self.counts[2 * self.world * to + self.world + from];
                (from, Signature { count: sent, ..signature }, to, Signature { count: expected, ..signature })
            })
            .find(|(_, sent, _, expected)| sent.count != expected.count)
    }
}

/// The sum of `counts`; more than any buffer has if it overflows.
fn total(counts: &[usize]) -> usize {
    counts.iter().try_fold(0usize, |sum, n| sum.checked_add(*n)).unwrap_or(usize::MAX)
}

impl HostOperation<'_> {
    /// What rank `rank` of `world` brings; empty where only another rank has something.
    pub(crate) fn contribution(&self, rank: usize, world: usize) -> &[u8] {
        match self {
            Operation::AllReduce { data, .. }
            | Operation::Reduce { data, .. }
            | Operation::ReduceScatterInPlace { data, .. } => data.bytes(),
            Operation::Broadcast { data, root } if *root == rank => data.bytes(),
            Operation::AllGatherInPlace { data } => {
                let n = data.bytes().len() / world;
                &data.bytes()[rank * n..][..n]
            }
            Operation::AllReduceInto { input, .. }
            | Operation::AllGather { input, .. }
            | Operation::AllGatherV { input, .. }
            | Operation::ReduceScatter { input, .. }
            | Operation::Gather { input, .. }
            | Operation::Scatter { input, .. }
            | Operation::AllToAll { input, .. }
            | Operation::AllToAllV { input, .. } => input.bytes(),
            Operation::Send { data, .. } => data.bytes(),
            Operation::Broadcast { .. } | Operation::Barrier | Operation::Recv { .. } => &[],
        }
    }
}

impl<'a> Operation<'a> {
    /// This call, if all its buffers are on the host.
    ///
    /// # Errors
    /// [`Error::Place`] if one is on a device.
    pub fn on_host(self) -> Result<HostOperation<'a>> {
        let call = self.call();
        let elsewhere = Error::Place { call, got: "device memory", expected: "host memory" };
        self.map(
            |buffer| match buffer {
                Buffer::Host(host) => Ok(host),
                Buffer::Device(_) => Err(elsewhere.clone()),
            },
            |buffer| match buffer {
                BufferMut::Host(host) => Ok(host),
                BufferMut::Device(_) => Err(elsewhere.clone()),
            },
        )
    }

    /// This call, if all its buffers are on a device. A barrier, which has none, is a call on the host.
    ///
    /// # Errors
    /// [`Error::Place`] if one is on the host.
    pub fn on_device(self) -> Result<DeviceOperation<'a>> {
        let call = self.call();
        let elsewhere = Error::Place { call, got: "host memory", expected: "device memory" };
        self.map(
            |buffer| match buffer {
                Buffer::Device(device) => Ok(device),
                Buffer::Host(_) => Err(elsewhere.clone()),
            },
            |buffer| match buffer {
                BufferMut::Device(device) => Ok(device),
                BufferMut::Host(_) => Err(elsewhere.clone()),
            },
        )
    }
}

impl<'a, I, O> Operation<'a, I, O> {
    /// The same call over other buffers.
    pub(crate) fn map<I2, O2>(
        self,
        read: impl Fn(I) -> Result<I2>,
        write: impl Fn(O) -> Result<O2>,
    ) -> Result<Operation<'a, I2, O2>> {
        Ok(match self {
            Operation::AllReduce { data, op } => Operation::AllReduce { data: write(data)?, op },
            Operation::AllReduceInto { input, output, op } => {
                Operation::AllReduceInto { input: read(input)?, output: write(output)?, op }
            }
            Operation::AllGather { input, output } => {
                Operation::AllGather { input: read(input)?, output: write(output)? }
            }
            Operation::AllGatherInPlace { data } => Operation::AllGatherInPlace { data: write(data)? },
            Operation::AllGatherV { input, counts, output } => {
                Operation::AllGatherV { input: read(input)?, counts, output: write(output)? }
            }
            Operation::ReduceScatter { input, output, op } => {
                Operation::ReduceScatter { input: read(input)?, output: write(output)?, op }
            }
            Operation::ReduceScatterInPlace { data, op } => {
                Operation::ReduceScatterInPlace { data: write(data)?, op }
            }
            Operation::Broadcast { data, root } => Operation::Broadcast { data: write(data)?, root },
            Operation::Reduce { data, op, root } => Operation::Reduce { data: write(data)?, op, root },
            Operation::Gather { input, output, root } => {
                Operation::Gather { input: read(input)?, output: write(output)?, root }
            }
            Operation::Scatter { input, output, root } => {
                Operation::Scatter { input: read(input)?, output: write(output)?, root }
            }
            Operation::AllToAll { input, output } => {
                Operation::AllToAll { input: read(input)?, output: write(output)? }
            }
            Operation::AllToAllV { input, send_counts, output, recv_counts } => {
                Operation::AllToAllV { input: read(input)?, send_counts, output: write(output)?, recv_counts }
            }
            Operation::Barrier => Operation::Barrier,
            Operation::Send { data, to } => Operation::Send { data: read(data)?, to },
            Operation::Recv { data, from } => Operation::Recv { data: write(data)?, from },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_signature_survives_its_encoding(
            call in 0usize..Call::ALL.len(), dtype in 0usize..8, op in 0usize..6, root: Option<u32>, count: u64, digest: u64,
        ) {
            let signature = Signature {
                call: Call::ALL[call],
                dtype: DTYPES.get(dtype).copied(),
                op: ReduceOp::ALL.get(op).copied(),
                root, count, digest,
            };
            prop_assert_eq!(Signature::decode(signature.encode()), Some(signature));
        }

        #[test]
        fn any_words_decode_to_a_signature_or_to_none(words: [u64; 3]) {
            let _ = Signature::decode(words);
        }
    }
}
