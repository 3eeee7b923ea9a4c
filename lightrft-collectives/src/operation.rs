//! One collective call as a value: its buffers, its checks, and the signature that ranks compare

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::buffer::{Host, HostMut};
use crate::error::{Error, Result};
use crate::op::{Dtype, ReduceOp};

/// A call on a communicator, with the caller's buffers.
///
/// Every member of the group makes the same call with the same counts, types, reduce operation and root, in
/// the same order. "Part `r`" of a buffer of `n` equal parts is its elements `r*len/n .. (r+1)*len/n`.
#[derive(Debug)]
#[non_exhaustive]
pub enum Operation<'a> {
    /// Every rank gets the reduction of all ranks' `data`, in place.
    AllReduce {
        /// This rank's contribution, then the result.
        data: HostMut<'a>,
        /// How contributions are combined.
        op: ReduceOp,
    },
    /// Every rank gets all ranks' inputs, one after the other in rank order.
    AllGather {
        /// This rank's part.
        input: Host<'a>,
        /// `world_size * input.len()` elements.
        output: HostMut<'a>,
    },
    /// As [`AllGather`](Operation::AllGather), where this rank's part already lies in its place.
    AllGatherInPlace {
        /// `world_size` equal parts; part `rank` is read, the others are written.
        data: HostMut<'a>,
    },
    /// All ranks' inputs of different lengths, one after the other in rank order.
    AllGatherV {
        /// This rank's part, `counts[rank]` elements.
        input: Host<'a>,
        /// Elements of each rank, the same list on every rank.
        counts: &'a [usize],
        /// As many elements as `counts` sums to.
        output: HostMut<'a>,
    },
    /// Each rank gets its part of the reduction of all ranks' inputs.
    ReduceScatter {
        /// `world_size * output.len()` elements; part `r` goes to rank `r`.
        input: Host<'a>,
        /// Part `rank` of the reduction.
        output: HostMut<'a>,
        /// How contributions are combined.
        op: ReduceOp,
    },
    /// Every rank gets the root's `data`.
    Broadcast {
        /// Read on the root, written elsewhere.
        data: HostMut<'a>,
        /// The rank of this group that sends.
        root: usize,
    },
    /// The root gets the reduction of all ranks' `data`; elsewhere `data` is left as it was.
    Reduce {
        /// This rank's contribution; on the root, then the result.
        data: HostMut<'a>,
        /// How contributions are combined.
        op: ReduceOp,
        /// The rank of this group that receives.
        root: usize,
    },
    /// The root gets all ranks' inputs, one after the other in rank order.
    Gather {
        /// This rank's part.
        input: Host<'a>,
        /// On the root, `world_size * input.len()` elements; elsewhere empty.
        output: HostMut<'a>,
        /// The rank of this group that receives.
        root: usize,
    },
    /// Each rank gets its part of the root's input.
    Scatter {
        /// On the root, `world_size * output.len()` elements; elsewhere empty.
        input: Host<'a>,
        /// Part `rank` of the root's input.
        output: HostMut<'a>,
        /// The rank of this group that sends.
        root: usize,
    },
    /// Part `q` of this rank's input becomes part `rank` of rank `q`'s output.
    AllToAll {
        /// `world_size` equal parts.
        input: Host<'a>,
        /// As many elements as `input`.
        output: HostMut<'a>,
    },
    /// No rank returns before every rank has called.
    Barrier,
    /// Sends to one rank, which calls [`Recv`](Operation::Recv). May return before it has.
    Send {
        /// What is sent.
        data: Host<'a>,
        /// The receiving rank of this group.
        to: usize,
    },
    /// Receives what one rank [sends](Operation::Send).
    Recv {
        /// Where it goes; the length must be the sender's.
        data: HostMut<'a>,
        /// The sending rank of this group.
        from: usize,
    },
}

/// The name of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
#[allow(missing_docs)] // Each is the operation of the same name.
#[repr(u8)]
pub enum Call {
    AllReduce,
    AllGather,
    AllGatherInPlace,
    AllGatherV,
    ReduceScatter,
    Broadcast,
    Reduce,
    Gather,
    Scatter,
    AllToAll,
    Barrier,
    Send,
    Recv,
    Subgroup,
}

impl Call {
    const ALL: [Call; 14] = [
        Call::AllReduce,
        Call::AllGather,
        Call::AllGatherInPlace,
        Call::AllGatherV,
        Call::ReduceScatter,
        Call::Broadcast,
        Call::Reduce,
        Call::Gather,
        Call::Scatter,
        Call::AllToAll,
        Call::Barrier,
        Call::Send,
        Call::Recv,
        Call::Subgroup,
    ];

    /// The name as it is written in code.
    pub fn name(self) -> &'static str {
        match self {
            Call::AllReduce => "all_reduce",
            Call::AllGather => "all_gather",
            Call::AllGatherInPlace => "all_gather_in_place",
            Call::AllGatherV => "all_gather_v",
            Call::ReduceScatter => "reduce_scatter",
            Call::Broadcast => "broadcast",
            Call::Reduce => "reduce",
            Call::Gather => "gather",
            Call::Scatter => "scatter",
            Call::AllToAll => "all_to_all",
            Call::Barrier => "barrier",
            Call::Send => "send",
            Call::Recv => "recv",
            Call::Subgroup => "subgroup",
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
        if let Some(dtype) = self.dtype {
            write!(f, "{dtype:?}, {} elements", self.count)?;
        }
        if self.digest != 0 {
            write!(f, ", arguments #{:08x}", self.digest as u32)?;
        }
        write!(f, ")")
    }
}

/// The element types that travel, in the order of their codes on the wire.
const DTYPES: [Dtype; 7] =
    [Dtype::F32, Dtype::F64, Dtype::BF16, Dtype::F16, Dtype::I32, Dtype::I64, Dtype::U8];

impl Signature {
    pub(crate) fn bare(call: Call) -> Self {
        Signature { call, dtype: None, op: None, root: None, count: 0, digest: 0 }
    }

    /// Three words for headers and shared memory. [`Signature::decode`] reads them back.
    pub(crate) fn encode(&self) -> [u64; 3] {
        fn code<T: PartialEq>(all: &[T], x: Option<T>) -> u64 {
            x.and_then(|x| all.iter().position(|y| *y == x)).map_or(0, |i| i as u64 + 1)
        }
        let small = code(&Call::ALL, Some(self.call))
            | code(&DTYPES, self.dtype) << 8
            | code(&ReduceOp::ALL, self.op) << 16
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

/// FNV-1a over numbers: a digest every rank computes alike.
pub(crate) fn digest(numbers: impl IntoIterator<Item = usize>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for number in numbers {
        for byte in (number as u64).to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
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

    fn same_dtype(&self, input: &Host<'_>, output: &HostMut<'_>) -> Result<()> {
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

impl Operation<'_> {
    /// The name of this call.
    pub fn call(&self) -> Call {
        match self {
            Operation::AllReduce { .. } => Call::AllReduce,
            Operation::AllGather { .. } => Call::AllGather,
            Operation::AllGatherInPlace { .. } => Call::AllGatherInPlace,
            Operation::AllGatherV { .. } => Call::AllGatherV,
            Operation::ReduceScatter { .. } => Call::ReduceScatter,
            Operation::Broadcast { .. } => Call::Broadcast,
            Operation::Reduce { .. } => Call::Reduce,
            Operation::Gather { .. } => Call::Gather,
            Operation::Scatter { .. } => Call::Scatter,
            Operation::AllToAll { .. } => Call::AllToAll,
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
                at.length("output", output.len(), world * input.len())
            }
            Operation::AllGatherInPlace { data } => at.divisible("data", data.len(), world),
            Operation::AllGatherV { input, counts, output } => {
                at.same_dtype(input, output)?;
                at.length("counts", counts.len(), world)?;
                at.length("input", input.len(), counts[rank])?;
                let total = counts.iter().try_fold(0usize, |sum, n| sum.checked_add(*n));
                at.length("output", output.len(), total.unwrap_or(usize::MAX))
            }
            Operation::ReduceScatter { input, output, op } => {
                at.same_dtype(input, output)?;
                at.reducible(*op, input.dtype())?;
                at.length("input", input.len(), world * output.len())
            }
            Operation::Broadcast { root, .. } => at.member("root", *root, world),
            Operation::Reduce { data, op, root } => {
                at.reducible(*op, data.dtype())?;
                at.member("root", *root, world)
            }
            Operation::Gather { input, output, root } => {
                at.same_dtype(input, output)?;
                at.member("root", *root, world)?;
                let expected = if rank == *root { world * input.len() } else { 0 };
                at.length("output", output.len(), expected)
            }
            Operation::Scatter { input, output, root } => {
                at.same_dtype(input, output)?;
                at.member("root", *root, world)?;
                let expected = if rank == *root { world * output.len() } else { 0 };
                at.length("input", input.len(), expected)
            }
            Operation::AllToAll { input, output } => {
                at.same_dtype(input, output)?;
                at.divisible("input", input.len(), world)?;
                at.length("output", output.len(), input.len())
            }
            Operation::Barrier => Ok(()),
            Operation::Send { to, .. } => at.peer("receiver", *to, rank, world),
            Operation::Recv { from, .. } => at.peer("sender", *from, rank, world),
        }
    }

    /// What this rank's call has in common with the other ranks' calls.
    pub fn signature(&self) -> Signature {
        let of = |dtype, count: usize| Signature {
            dtype: Some(dtype),
            count: count as u64,
            ..Signature::bare(self.call())
        };
        let root = |r: &usize| Some(*r as u32);
        match self {
            Operation::AllReduce { data, op } => Signature { op: Some(*op), ..of(data.dtype(), data.len()) },
            Operation::AllGather { input, .. } => of(input.dtype(), input.len()),
            Operation::AllGatherInPlace { data } => of(data.dtype(), data.len()),
            Operation::AllGatherV { counts, output, .. } => {
                Signature { digest: digest(counts.iter().copied()), ..of(output.dtype(), output.len()) }
            }
            Operation::ReduceScatter { output, op, .. } => {
                Signature { op: Some(*op), ..of(output.dtype(), output.len()) }
            }
            Operation::Broadcast { data, root: r } => {
                Signature { root: root(r), ..of(data.dtype(), data.len()) }
            }
            Operation::Reduce { data, op, root: r } => {
                Signature { op: Some(*op), root: root(r), ..of(data.dtype(), data.len()) }
            }
            Operation::Gather { input, root: r, .. } => {
                Signature { root: root(r), ..of(input.dtype(), input.len()) }
            }
            Operation::Scatter { output, root: r, .. } => {
                Signature { root: root(r), ..of(output.dtype(), output.len()) }
            }
            Operation::AllToAll { input, .. } => of(input.dtype(), input.len()),
            Operation::Barrier => Signature::bare(Call::Barrier),
            Operation::Send { data, .. } => of(data.dtype(), data.len()),
            Operation::Recv { data, .. } => of(data.dtype(), data.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_signature_survives_its_encoding(
            call in 0usize..14, dtype in 0usize..8, op in 0usize..6, root: Option<u32>, count: u64, digest: u64,
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
