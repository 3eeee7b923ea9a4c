//! A call of the seam as calls of NCCL
//!
//! | call | NCCL |
//! |---|---|
//! | all-reduce, all-gather, reduce-scatter, broadcast, reduce | the call of that name; in place as NCCL defines it |
//! | all-gather of different lengths | one broadcast per rank, fused |
//! | gather, scatter, all-to-all(v) | a send and a receive per pair of ranks, fused |
//!
//! Empty parts are left out, on both sides alike.

use super::raw::{self, Fault, Lane, Progress, data_type};
use crate::buffer::element_bytes;
use crate::device::StreamHandle;
use crate::error::{Error, Result};
use crate::host::Told;
use crate::op::ReduceOp;
use crate::operation::{DeviceOperation, Operation, Signature};

/// What is read and what is written, as far as a call has them.
fn buffers<'o, I, O>(operation: &'o Operation<'_, I, O>) -> (Option<&'o I>, Option<&'o O>) {
    match operation {
        Operation::AllReduce { data, .. }
        | Operation::AllGatherInPlace { data }
        | Operation::ReduceScatterInPlace { data, .. }
        | Operation::Broadcast { data, .. }
        | Operation::Reduce { data, .. }
        | Operation::Recv { data, .. } => (None, Some(data)),
        Operation::Send { data, .. } => (Some(data), None),
        Operation::AllGather { input, output }
        | Operation::AllGatherV { input, output, .. }
        | Operation::ReduceScatter { input, output, .. }
        | Operation::Gather { input, output, .. }
        | Operation::Scatter { input, output, .. }
        | Operation::AllToAll { input, output }
        | Operation::AllReduceInto { input, output, .. }
        | Operation::AllToAllV { input, output, .. } => (Some(input), Some(output)),
        Operation::Barrier => (None, None),
    }
}

/// Whether a call has a buffer on a device.
pub(super) fn is_on_device(operation: &Operation<'_>) -> bool {
    let (input, output) = buffers(operation);
    matches!(input, Some(crate::Buffer::Device(_))) || matches!(output, Some(crate::BufferMut::Device(_)))
}

/// The one stream that all buffers of a call name, all being on GPU `ordinal`. `None` for a call without buffers.
pub(super) fn stream_of(operation: &DeviceOperation<'_>, ordinal: usize) -> Result<Option<StreamHandle>> {
    let (input, output) = buffers(operation);
    let places = [input.map(|b| (b.ordinal(), b.stream())), output.map(|b| (b.ordinal(), b.stream()))];
    let mut stream = None;
    for (on, its) in places.into_iter().flatten() {
        if on != ordinal {
            let (got, expected) = ("on another GPU", "on the GPU of the group");
            return Err(Error::Place { call: operation.call(), got, expected });
        }
        if stream.is_some_and(|stream| stream != its) {
            let (got, expected) = ("on another stream", "on the stream of the call's other buffer");
            return Err(Error::Place { call: operation.call(), got, expected });
        }
        stream = Some(its);
    }
    Ok(stream)
}

/// Writes down what of a call, checked before, other ranks must have made alike.
pub(super) fn tell(operation: &DeviceOperation<'_>, rank: usize, world: usize, told: &mut Vec<Told>) {
    let mine = operation.signature(world);
    match operation {
        Operation::Send { to, .. } => told.push(Told::between(rank, *to, world, &mine)),
        Operation::Recv { from, .. } => told.push(Told::between(*from, rank, world, &mine)),
        Operation::AllToAllV { send_counts, recv_counts, .. } => {
            told.push(Told::by_all(&mine));
            // What a rank sends to itself was compared by `Operation::check`.
            for peer in (0..world).filter(|peer| *peer != rank) {
                let of = |counts: &[usize]| Signature { count: counts[peer] as u64, ..mine };
                told.push(Told::between(rank, peer, world, &of(send_counts)));
                told.push(Told::between(peer, rank, world, &of(recv_counts)));
            }
        }
        _ => told.push(Told::by_all(&mine)),
    }
}

/// Makes a call, checked before, as rank `rank` of `world`.
pub(super) fn enqueue(
    lane: &Lane,
    operation: &DeviceOperation<'_>,
    rank: usize,
    world: usize,
) -> Result<Progress, Fault> {
    let dtype = |dtype| {
        data_type(dtype).ok_or_else(|| Fault { code: 4, message: format!("{dtype:?} is no type of NCCL") })
    };
    // What one rank reduces alone is its data, whatever the operation. NCCL has a kernel for a mean of one rank, which leaves the
    // last elements of a length that is no multiple of 4 unwritten (seen with 2.28.9).
    let reduce_op = |op| raw::reduce_op(if world == 1 { ReduceOp::Sum } else { op });
    /// Where part `rank` of equal parts of `count` elements begins.
    fn part(base: u64, rank: usize, count: usize, bytes: usize) -> u64 {
        base + (rank * count * bytes) as u64
    }
    match operation {
        Operation::AllReduce { data, op } => {
            let at = data.pointer();
            lane.all_reduce(at, at, data.len(), dtype(data.dtype())?, reduce_op(*op))
        }
        Operation::AllReduceInto { input, output, op } => {
            let ty = dtype(input.dtype())?;
            lane.all_reduce(input.pointer(), output.pointer(), input.len(), ty, reduce_op(*op))
        }
        Operation::AllGather { input, output } => {
            lane.all_gather(input.pointer(), output.pointer(), input.len(), dtype(input.dtype())?)
        }
        Operation::AllGatherInPlace { data } => {
            let (at, count) = (data.pointer(), data.len() / world);
            let mine = part(at, rank, count, element_bytes(data.dtype()));
            lane.all_gather(mine, at, count, dtype(data.dtype())?)
        }
        Operation::AllGatherV { input, counts, output } => {
            let (ty, bytes) = (dtype(input.dtype())?, element_bytes(input.dtype()));
            lane.fused(|| {
                let mut to = output.pointer();
                for (root, &count) in counts.iter().enumerate() {
                    if count > 0 {
                        let from = if root == rank { input.pointer() } else { to };
                        lane.broadcast(from, to, count, ty, root)?;
                    }
                    to += (count * bytes) as u64;
                }
                Ok(())
            })
        }
        Operation::ReduceScatter { input, output, op } => {
            let ty = dtype(input.dtype())?;
            lane.reduce_scatter(input.pointer(), output.pointer(), output.len(), ty, reduce_op(*op))
        }
        Operation::ReduceScatterInPlace { data, op } => {
            let (at, count) = (data.pointer(), data.len() / world);
            let mine = part(at, rank, count, element_bytes(data.dtype()));
            lane.reduce_scatter(at, mine, count, dtype(data.dtype())?, reduce_op(*op))
        }
        Operation::Broadcast { data, root } => {
            lane.broadcast(data.pointer(), data.pointer(), data.len(), dtype(data.dtype())?, *root)
        }
        Operation::Reduce { data, op, root } => {
            let at = data.pointer();
            lane.reduce(at, at, data.len(), dtype(data.dtype())?, reduce_op(*op), *root)
        }
        Operation::Gather { input, output, root } => {
            let (ty, count, bytes) = (dtype(input.dtype())?, input.len(), element_bytes(input.dtype()));
            pairs(lane, |lane| {
                if rank == *root {
                    for from in 0..world {
                        recv(lane, part(output.pointer(), from, count, bytes), count, ty, from)?;
                    }
                }
                send(lane, input.pointer(), count, ty, *root)
            })
        }
        Operation::Scatter { input, output, root } => {
            let (ty, count, bytes) = (dtype(input.dtype())?, output.len(), element_bytes(input.dtype()));
            pairs(lane, |lane| {
                if rank == *root {
                    for to in 0..world {
                        send(lane, part(input.pointer(), to, count, bytes), count, ty, to)?;
                    }
                }
                recv(lane, output.pointer(), count, ty, *root)
            })
        }
        Operation::AllToAll { input, output } => {
            let (ty, count, bytes) =
                (dtype(input.dtype())?, input.len() / world, element_bytes(input.dtype()));
            pairs(lane, |lane| {
                for peer in 0..world {
                    send(lane, part(input.pointer(), peer, count, bytes), count, ty, peer)?;
                    recv(lane, part(output.pointer(), peer, count, bytes), count, ty, peer)?;
                }
                Ok(())
            })
        }
        Operation::AllToAllV { input, send_counts, output, recv_counts } => {
            let (ty, bytes) = (dtype(input.dtype())?, element_bytes(input.dtype()));
            pairs(lane, |lane| {
                let (mut from, mut to) = (input.pointer(), output.pointer());
                for (peer, (&sent, &received)) in send_counts.iter().zip(*recv_counts).enumerate() {
                    send(lane, from, sent, ty, peer)?;
                    recv(lane, to, received, ty, peer)?;
                    from += (sent * bytes) as u64;
                    to += (received * bytes) as u64;
                }
                Ok(())
            })
        }
        Operation::Send { data, to } => {
            let ty = dtype(data.dtype())?;
            pairs(lane, |lane| send(lane, data.pointer(), data.len(), ty, *to))
        }
        Operation::Recv { data, from } => {
            let ty = dtype(data.dtype())?;
            pairs(lane, |lane| recv(lane, data.pointer(), data.len(), ty, *from))
        }
        Operation::Barrier => Ok(Progress::Done),
    }
}

fn pairs(lane: &Lane, body: impl FnOnce(&Lane) -> Result<(), Fault>) -> Result<Progress, Fault> {
    lane.fused(|| body(lane))
}

fn send(lane: &Lane, from: u64, count: usize, dtype: i32, peer: usize) -> Result<(), Fault> {
    if count > 0 { lane.send(from, count, dtype, peer).map(drop) } else { Ok(()) }
}

fn recv(lane: &Lane, to: u64, count: usize, dtype: i32, peer: usize) -> Result<(), Fault> {
    if count > 0 { lane.recv(to, count, dtype, peer).map(drop) } else { Ok(()) }
}
