//! Collectives by direct exchange over TCP: each rank talks to every other, sums are made where they are owned
//!
//! In every step each rank sends a frame to each other rank, if only a header: that is how all of them learn
//! that one of them made another call, before any has a result.

use std::ops::Range;
use std::time::Duration;

use super::exchange::{Fault, Links, Traffic};
use super::fate::Alarm;
use super::vigil::Vigil;
use crate::buffer::{AlignedBytes, element_bytes};
use crate::op::{Dtype, ReduceOp};
use crate::operation::{Call, Exchange, HostOperation, Operation, Signature};
use crate::reduce::fold_bytes;

/// Up to this many bytes every rank sends its whole vector to all and sums by itself: one step instead of two.
const SMALL: usize = 16 << 10;

/// Bytes of a vector that are reduced per round, which bounds the memory for other ranks' contributions.
const ROUND: usize = 4 << 20;

/// A group's connections together with what a call on them needs to know.
pub(super) struct Tcp<'a> {
    pub(super) links: &'a mut Links,
    pub(super) alarm: &'a Alarm,
    pub(super) vigil: &'a Vigil<'a>,
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) timeout: Duration,
}

/// Cuts `bytes` into consecutive parts of these lengths.
fn cut(mut bytes: &mut [u8], lengths: impl IntoIterator<Item = usize>) -> Vec<&mut [u8]> {
    let mut parts = Vec::new();
    for length in lengths {
        let (part, rest) = bytes.split_at_mut(length);
        parts.push(part);
        bytes = rest;
    }
    parts
}

/// The part of `elements` that rank `owner` reduces.
fn owned(elements: usize, world: usize, owner: usize) -> Range<usize> {
    let per = elements.div_ceil(world);
    (owner * per).min(elements)..((owner + 1) * per).min(elements)
}

impl Tcp<'_> {
    pub(super) fn run(&mut self, operation: HostOperation<'_>) -> Result<(), Fault> {
        let (rank, world) = (self.rank, self.world);
        let signature = operation.signature(world);
        match operation {
            Operation::Barrier => self.meet(signature),
            Operation::AllReduce { mut data, op } => {
                let dtype = data.dtype();
                let bytes = data.bytes_mut();
                if bytes.len() <= SMALL {
                    let reduced = self.reduce_from_all(signature, op, dtype, bytes.len(), |_| bytes)?;
                    bytes.copy_from_slice(reduced.as_slice());
                    return Ok(());
                }
                bytes
                    .chunks_mut(ROUND)
                    .try_for_each(|round| self.all_reduce_round(signature, op, dtype, round))
            }
            Operation::ReduceScatter { input, mut output, op } => {
                let (dtype, part) = (output.dtype(), output.bytes().len());
                let round = (ROUND / world).next_multiple_of(64);
                for (index, out) in output.bytes_mut().chunks_mut(round).enumerate() {
                    let piece = |to: usize| &input.bytes()[to * part + index * round..][..out.len()];
                    out.copy_from_slice(
                        self.reduce_from_all(signature, op, dtype, out.len(), piece)?.as_slice(),
                    );
                }
                self.meet_if_empty(signature, part)
            }
            Operation::Reduce { mut data, op, root } => {
                let dtype = data.dtype();
                let round = (ROUND / world).next_multiple_of(64);
                for chunk in data.bytes_mut().chunks_mut(round) {
                    self.reduce_round(signature, op, dtype, chunk, root)?;
                }
                self.meet_if_empty(signature, data.bytes().len())
            }
            Operation::AllGather { input, mut output } => {
                let n = input.bytes().len();
                self.gather(signature, input.bytes(), cut(output.bytes_mut(), vec![n; world]))
            }
            Operation::AllGatherV { input, counts, mut output } => {
                let size = element_bytes(output.dtype());
                let lengths = counts.iter().map(|n| n * size);
                self.gather(signature, input.bytes(), cut(output.bytes_mut(), lengths))
            }
            Operation::AllGatherInPlace { mut data } => {
                let n = data.bytes().len() / world;
                let mut parts = cut(data.bytes_mut(), vec![n; world]);
                let mine = std::mem::take(&mut parts[rank]);
                self.gather(signature, mine, parts)
            }
            Operation::Broadcast { mut data, root } => {
                if rank == root {
                    let bytes = data.bytes();
                    self.step(signature, |_| bytes, |_| &mut [])
                } else {
                    let mut bytes = Some(data.bytes_mut());
                    self.step(signature, |_| &[], |peer| take_if(peer == root, &mut bytes))
                }
            }
            Operation::Gather { input, mut output, root } => {
                let n = input.bytes().len();
                let to_root = |peer: usize| if peer == root { input.bytes() } else { &[] };
                if rank == root {
                    self.gather_to_me(signature, input.bytes(), cut(output.bytes_mut(), vec![n; world]))
                } else {
                    self.step(signature, to_root, |_| &mut [])
                }
            }
            Operation::Scatter { input, mut output, root } => {
                let n = output.bytes().len();
                if rank == root {
                    output.bytes_mut().copy_from_slice(&input.bytes()[rank * n..][..n]);
                    self.step(signature, |peer| &input.bytes()[peer * n..][..n], |_| &mut [])
                } else {
                    let mut bytes = Some(output.bytes_mut());
                    self.step(signature, |_| &[], |peer| take_if(peer == root, &mut bytes))
                }
            }
            Operation::AllToAll { input, mut output } => {
                let n = input.bytes().len() / world;
                let piece = |peer: usize| &input.bytes()[peer * n..][..n];
                let mut parts = cut(output.bytes_mut(), vec![n; world]);
                parts[rank].copy_from_slice(piece(rank));
                self.step(signature, piece, |peer| std::mem::take(&mut parts[peer]))
            }
            Operation::AllReduceInto { input, mut output, op } => {
                output.bytes_mut().copy_from_slice(input.bytes());
                self.run(Operation::AllReduce { data: output, op })
            }
            Operation::ReduceScatterInPlace { mut data, op } => {
                let (dtype, part) = (data.dtype(), data.bytes().len() / world);
                let round = (ROUND / world).next_multiple_of(64);
                for offset in (0..part).step_by(round) {
                    let n = round.min(part - offset);
                    let bytes = data.bytes();
                    let piece = |to: usize| &bytes[to * part + offset..][..n];
                    let reduced = self.reduce_from_all(signature, op, dtype, n, piece)?;
                    data.bytes_mut()[rank * part + offset..][..n].copy_from_slice(reduced.as_slice());
                }
                self.meet_if_empty(signature, part)
            }
            Operation::AllToAllV { input, send_counts, mut output, recv_counts } => {
                let row = Exchange::row(send_counts, recv_counts);
                let mut rows = vec![0u64; row.len() * world];
                let places = cut(bytemuck::cast_slice_mut(&mut rows), vec![row.len() * 8; world]);
                self.gather(signature, bytemuck::cast_slice(&row), places)?;
                let exchange = Exchange { counts: &rows, world };
                if let Some((from, sent, to, expected)) = exchange.disagreement(signature) {
                    return Err(Fault::Disagree { one: (from, sent), other: (to, expected) });
                }
                let size = element_bytes(output.dtype());
                let piece = |peer: usize| {
                    &input.bytes()[exchange.offset(rank, peer) * size..][..send_counts[peer] * size]
                };
                let mut parts = cut(output.bytes_mut(), recv_counts.iter().map(|n| n * size));
                parts[rank].copy_from_slice(piece(rank));
                self.step(signature, piece, |peer| std::mem::take(&mut parts[peer]))
            }
            Operation::Send { data, to } => {
                let traffic = Traffic { peer: to, send: Some(data.bytes()), recv: None };
                self.links.exchange(signature, signature, [traffic], self.alarm, self.vigil, self.timeout)
            }
            Operation::Recv { mut data, from } => {
                let expected = Signature { call: Call::Send, ..signature };
                let traffic = Traffic { peer: from, send: None, recv: Some(data.bytes_mut()) };
                self.links.exchange(signature, expected, [traffic], self.alarm, self.vigil, self.timeout)
            }
        }
    }

    /// Headers only: returns when every rank has come with this signature.
    pub(super) fn meet(&mut self, signature: Signature) -> Result<(), Fault> {
        self.step(signature, |_| &[], |_| &mut [])
    }

    /// Calls without data would take no step at all, and nobody would learn of a mismatch.
    fn meet_if_empty(&mut self, signature: Signature, bytes: usize) -> Result<(), Fault> {
        if bytes == 0 { self.meet(signature) } else { Ok(()) }
    }

    /// One frame to and from every other rank.
    fn step<'s, 'r>(
        &mut self,
        signature: Signature,
        send: impl Fn(usize) -> &'s [u8],
        mut recv: impl FnMut(usize) -> &'r mut [u8],
    ) -> Result<(), Fault> {
        let rank = self.rank;
        let peers = (0..self.world).filter(|peer| *peer != rank);
        let traffic = peers.map(|peer| Traffic { peer, send: Some(send(peer)), recv: Some(recv(peer)) });
        self.links.exchange(signature, signature, traffic, self.alarm, self.vigil, self.timeout)
    }

    /// Mine to all, theirs to their places; my own place is filled too unless it is empty (already in place).
    fn gather(&mut self, signature: Signature, mine: &[u8], mut places: Vec<&mut [u8]>) -> Result<(), Fault> {
        if !places[self.rank].is_empty() {
            places[self.rank].copy_from_slice(mine);
        }
        self.step(signature, |_| mine, |peer| std::mem::take(&mut places[peer]))
    }

    fn gather_to_me(
        &mut self,
        signature: Signature,
        mine: &[u8],
        mut places: Vec<&mut [u8]>,
    ) -> Result<(), Fault> {
        places[self.rank].copy_from_slice(mine);
        self.step(signature, |_| &[], |peer| std::mem::take(&mut places[peer]))
    }

    /// Sends `piece(q)` to each rank `q`, and reduces what all ranks have for this one: `length` bytes.
    fn reduce_from_all<'a>(
        &mut self,
        signature: Signature,
        op: ReduceOp,
        dtype: Dtype,
        length: usize,
        piece: impl Fn(usize) -> &'a [u8],
    ) -> Result<AlignedBytes, Fault> {
        let (rank, world) = (self.rank, self.world);
        // Aligned places, so that each contribution can be read as elements.
        let stride = length.next_multiple_of(64);
        let mut staging = AlignedBytes::zeroed(stride * world);
        let mut places = cut(staging.as_mut_slice(), vec![stride; world]);
        self.step(signature, &piece, |peer| &mut std::mem::take(&mut places[peer])[..length])?;
        let mine = piece(rank);
        let staged = staging.as_slice();
        let parts: Vec<&[u8]> = (0..world)
            .map(|r| if r == rank { &mine[..length] } else { &staged[r * stride..][..length] })
            .collect();
        let mut out = AlignedBytes::zeroed(length);
        fold_bytes(op, dtype, &parts, out.as_mut_slice());
        Ok(out)
    }

    /// Each rank reduces the part it owns, then all gather the parts.
    fn all_reduce_round(
        &mut self,
        signature: Signature,
        op: ReduceOp,
        dtype: Dtype,
        data: &mut [u8],
    ) -> Result<(), Fault> {
        let (rank, world, size) = (self.rank, self.world, element_bytes(dtype));
        let range = |owner: usize| {
            let elements = owned(data.len() / size, world, owner);
            elements.start * size..elements.end * size
        };
        let lengths: Vec<usize> = (0..world).map(|owner| range(owner).len()).collect();
        let reduced =
            self.reduce_from_all(signature, op, dtype, lengths[rank], |owner| &data[range(owner)])?;
        self.gather(signature, reduced.as_slice(), cut(data, lengths))
    }

    fn reduce_round(
        &mut self,
        signature: Signature,
        op: ReduceOp,
        dtype: Dtype,
        data: &mut [u8],
        root: usize,
    ) -> Result<(), Fault> {
        if self.rank != root {
            let mine: &[u8] = data;
            return self.step(signature, |peer| if peer == root { mine } else { &[] }, |_| &mut []);
        }
        let stride = data.len().next_multiple_of(64);
        let mut staging = AlignedBytes::zeroed(stride * self.world);
        let mut places = cut(staging.as_mut_slice(), vec![stride; self.world]);
        places[root][..data.len()].copy_from_slice(data);
        let length = data.len();
        self.step(signature, |_| &[], |peer| &mut std::mem::take(&mut places[peer])[..length])?;
        let staged = staging.as_slice();
        let parts: Vec<&[u8]> = (0..self.world).map(|r| &staged[r * stride..][..length]).collect();
        fold_bytes(op, dtype, &parts, data);
        Ok(())
    }
}

/// The buffer, once, if `wanted`; else nothing.
fn take_if<'a>(wanted: bool, buffer: &mut Option<&'a mut [u8]>) -> &'a mut [u8] {
    if wanted { buffer.take().unwrap_or_default() } else { &mut [] }
}
