//! Collectives by direct exchange over TCP: each rank talks to every other, sums are made where they are owned
//!
//! In every step each rank sends a frame to each other rank, if only a header: that is how all of them learn
//! that one of them made another call, before any has a result.

use std::ops::Range;

use super::exchange::{Fault, Links, Step, Wait};
use super::reduction::{Owners, Plan, Reduction};
use super::steps::{Places, Relay};
use crate::buffer::{AlignedBytes, element_bytes};
use crate::op::{Dtype, ReduceOp};
use crate::operation::{Call, Exchange, HostOperation, Operation, Signature};
use crate::reduce::fold_in_place;

/// Up to this many bytes to all peers together every rank sends its whole vector to all and sums by itself: one hop
/// instead of two.
const SMALL: usize = 64 << 10;

/// Below this a vector is always small.
const TINY: usize = 1 << 10;

/// From this many bytes on the receivers of a broadcast help to spread it.
const RELAY: usize = 64 << 10;

/// A group's connections together with what a call on them needs to know.
pub(super) struct Tcp<'a> {
    pub(super) links: &'a mut Links,
    pub(super) staging: &'a mut AlignedBytes,
    pub(super) wait: Wait<'a>,
    pub(super) rank: usize,
    pub(super) world: usize,
}

impl Tcp<'_> {
    pub(super) fn run(&mut self, operation: HostOperation<'_>) -> Result<(), Fault> {
        let (rank, world) = (self.rank, self.world);
        let signature = operation.signature(world);
        match operation {
            Operation::Barrier => self.meet(signature),
            Operation::AllReduce { data, op } => {
                let dtype = data.dtype();
                self.all_reduce(signature, op, dtype, data.into_bytes())
            }
            Operation::AllReduceInto { input, output, op } => {
                let (dtype, output) = (output.dtype(), output.into_bytes());
                if self.is_small(output.len()) {
                    output.copy_from_slice(input.bytes());
                    return self.all_reduce(signature, op, dtype, output);
                }
                self.reduce(signature, op, dtype, Owners::Shares, Some(input.bytes()), output)
            }
            Operation::ReduceScatter { input, output, op } => {
                let (dtype, output) = (output.dtype(), output.into_bytes());
                self.reduce(signature, op, dtype, Owners::Parts, Some(input.bytes()), output)
            }
            Operation::ReduceScatterInPlace { data, op } => {
                let (dtype, data) = (data.dtype(), data.into_bytes());
                self.reduce(signature, op, dtype, Owners::Parts, None, data)
            }
            Operation::Reduce { data, op, root } => {
                let (dtype, data) = (data.dtype(), data.into_bytes());
                self.reduce(signature, op, dtype, Owners::Root(root), None, data)
            }
            Operation::AllGather { input, output } => {
                let (input, output) = (input.bytes(), output.into_bytes());
                output[part(input.len(), rank)].copy_from_slice(input);
                self.all_gather(signature, input.len(), output)
            }
            Operation::AllGatherInPlace { data } => {
                let data = data.into_bytes();
                self.all_gather(signature, data.len() / world, data)
            }
            Operation::AllGatherV { input, counts, output } => {
                let places = places(counts, element_bytes(output.dtype()));
                let (input, output) = (input.bytes(), output.into_bytes());
                output[places[rank].clone()].copy_from_slice(input);
                self.move_places(
                    signature,
                    Some(input),
                    output,
                    |_| 0..input.len(),
                    |peer| places[peer].clone(),
                )
            }
            Operation::Broadcast { data, root } => self.broadcast(signature, data.into_bytes(), root),
            Operation::Gather { input, output, root } => {
                let (input, output) = (input.bytes(), output.into_bytes());
                let n = input.len();
                if rank == root {
                    output[part(n, rank)].copy_from_slice(input);
                }
                let send = |peer| if peer == root { 0..n } else { 0..0 };
                let recv = |peer| if rank == root { part(n, peer) } else { 0..0 };
                self.move_places(signature, Some(input), output, send, recv)
            }
            Operation::Scatter { input, output, root } => {
                let (input, output) = (input.bytes(), output.into_bytes());
                let n = output.len();
                if rank == root {
                    output.copy_from_slice(&input[part(n, rank)]);
                }
                let send = |peer| if rank == root { part(n, peer) } else { 0..0 };
                let recv = |peer| if peer == root { 0..n } else { 0..0 };
                self.move_places(signature, Some(input), output, send, recv)
            }
            Operation::AllToAll { input, output } => {
                let (input, output) = (input.bytes(), output.into_bytes());
                let n = input.len() / world;
                output[part(n, rank)].copy_from_slice(&input[part(n, rank)]);
                self.move_places(signature, Some(input), output, |peer| part(n, peer), |peer| part(n, peer))
            }
            Operation::AllToAllV { input, send_counts, output, recv_counts } => {
                self.agree(signature, send_counts, recv_counts)?;
                let size = element_bytes(output.dtype());
                let (input, output) = (input.bytes(), output.into_bytes());
                let (send, recv) = (places(send_counts, size), places(recv_counts, size));
                output[recv[rank].clone()].copy_from_slice(&input[send[rank].clone()]);
                let (send, recv) = (|peer: usize| send[peer].clone(), |peer: usize| recv[peer].clone());
                self.move_places(signature, Some(input), output, send, recv)
            }
            Operation::Send { data, to } => {
                let bytes = data.bytes();
                let send = |peer| (peer == to).then_some(0..bytes.len());
                let mut step = Places { input: Some(bytes), output: &mut [], send, recv: |_| None };
                self.links.exchange(signature, signature, &mut step, self.wait)
            }
            Operation::Recv { data, from } => {
                let expected = Signature { call: Call::Send, ..signature };
                let bytes = data.into_bytes();
                let n = bytes.len();
                let recv = |peer| (peer == from).then_some(0..n);
                let mut step = Places { input: None, output: bytes, send: |_| None, recv };
                self.links.exchange(signature, expected, &mut step, self.wait)
            }
        }
    }

    /// Headers only: returns when every rank has come with this signature.
    pub(super) fn meet(&mut self, signature: Signature) -> Result<(), Fault> {
        self.move_places(signature, None, &mut [], |_| 0..0, |_| 0..0)
    }

    fn step(&mut self, signature: Signature, step: &mut impl Step) -> Result<(), Fault> {
        self.links.exchange(signature, signature, step, self.wait)
    }

    /// One frame to and from every other rank: `send` of `input`, or, without one, of `output`; `recv` of `output`.
    fn move_places(
        &mut self,
        signature: Signature,
        input: Option<&[u8]>,
        output: &mut [u8],
        send: impl Fn(usize) -> Range<usize>,
        recv: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), Fault> {
        let (send, recv) = (|peer| Some(send(peer)), |peer| Some(recv(peer)));
        self.step(signature, &mut Places { input, output, send, recv })
    }

    fn is_small(&self, bytes: usize) -> bool {
        bytes <= TINY.max(SMALL / (self.world - 1).max(1))
    }

    fn all_reduce(
        &mut self,
        signature: Signature,
        op: ReduceOp,
        dtype: Dtype,
        data: &mut [u8],
    ) -> Result<(), Fault> {
        let (rank, world, n) = (self.rank, self.world, data.len());
        if !self.is_small(n) {
            return self.reduce(signature, op, dtype, Owners::Shares, None, data);
        }
        // Aligned places, so that each contribution can be read as elements.
        let stride = n.next_multiple_of(64);
        let place = |peer: usize| peer * stride..peer * stride + n;
        let mut step = Places {
            input: Some(data),
            output: self.staging.at_least(stride * world),
            send: |_| Some(0..n),
            recv: |peer| Some(place(peer)),
        };
        self.links.exchange(signature, signature, &mut step, self.wait)?;
        let staging = self.staging.as_slice();
        fold_in_place(op, dtype, world, rank, &|peer| &staging[place(peer)], data);
        Ok(())
    }

    fn reduce(
        &mut self,
        signature: Signature,
        op: ReduceOp,
        dtype: Dtype,
        owners: Owners,
        input: Option<&[u8]>,
        output: &mut [u8],
    ) -> Result<(), Fault> {
        let bytes = input.map_or(output.len(), <[u8]>::len);
        let plan = Plan { rank: self.rank, world: self.world, op, dtype, owners, bytes };
        let mut step = Reduction::new(plan, input, output, self.staging);
        self.links.exchange(signature, signature, &mut step, self.wait)
    }

    /// `n` bytes of each rank; this rank's own are already in place.
    fn all_gather(&mut self, signature: Signature, n: usize, data: &mut [u8]) -> Result<(), Fault> {
        let rank = self.rank;
        self.move_places(signature, None, data, |_| part(n, rank), |peer| part(n, peer))
    }

    fn broadcast(&mut self, signature: Signature, data: &mut [u8], root: usize) -> Result<(), Fault> {
        let (rank, world, n) = (self.rank, self.world, data.len());
        if n >= RELAY && world > 2 {
            return self.step(signature, &mut Relay { data, rank, world, root, have: 0 });
        }
        let send = |_| if rank == root { 0..n } else { 0..0 };
        let recv = |peer| if peer == root { 0..n } else { 0..0 };
        self.move_places(signature, None, data, send, recv)
    }

    /// Compares who sends how much to whom, of all pairs on all ranks: none goes on if two do not agree.
    pub(super) fn agree(
        &mut self,
        signature: Signature,
        send_counts: &[usize],
        recv_counts: &[usize],
    ) -> Result<(), Fault> {
        let row = Exchange::row(send_counts, recv_counts);
        let mut rows = vec![0u64; row.len() * self.world];
        rows[part(row.len(), self.rank)].copy_from_slice(&row);
        self.all_gather(signature, row.len() * 8, bytemuck::cast_slice_mut(&mut rows))?;
        match (Exchange { counts: &rows, world: self.world }).disagreement(signature) {
            Some((from, sent, to, expected)) => {
                Err(Fault::Disagree { one: (from, sent), other: (to, expected) })
            }
            None => Ok(()),
        }
    }
}

/// The `index`-th of equal parts.
pub(super) fn part(length: usize, index: usize) -> Range<usize> {
    index * length..(index + 1) * length
}

/// Consecutive places for these numbers of elements, in bytes.
pub(super) fn places(counts: &[usize], size: usize) -> Vec<Range<usize>> {
    let ends = counts.iter().scan(0, |end, n| {
        *end += n * size;
        Some(*end)
    });
    ends.zip(counts).map(|(end, n)| end - n * size..end).collect()
}
