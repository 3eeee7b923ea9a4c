//! Small calls: every rank shows all it has, and each takes what it needs

use std::sync::atomic::Ordering::Relaxed;

use super::{Call, Shm};
use crate::buffer::element_bytes;
use crate::host::exchange::Fault;
use crate::host::segment::{PAYLOAD, SLOT};
use crate::operation::{HostOperation, Operation};
use crate::reduce::fold_bytes_from;

/// Bytes that one rank shows in a call, the most of any rank; the same on all ranks. `None` for calls that have another
/// way.
pub(super) fn contribution_bytes(operation: &HostOperation<'_>, world: usize) -> Option<usize> {
    Some(match operation {
        Operation::AllReduce { data, .. }
        | Operation::Reduce { data, .. }
        | Operation::Broadcast { data, .. }
        | Operation::ReduceScatterInPlace { data, .. } => data.bytes().len(),
        Operation::AllGatherInPlace { data } => data.bytes().len() / world,
        Operation::AllReduceInto { input, .. }
        | Operation::AllGather { input, .. }
        | Operation::ReduceScatter { input, .. }
        | Operation::Gather { input, .. }
        | Operation::AllToAll { input, .. } => input.bytes().len(),
        Operation::AllGatherV { counts, output, .. } => {
            counts.iter().copied().max().unwrap_or(0) * element_bytes(output.dtype())
        }
        Operation::Scatter { output, .. } => output.bytes().len() * world,
        Operation::AllToAllV { .. }
        | Operation::Barrier
        | Operation::Send { .. }
        | Operation::Recv { .. } => return None,
    })
}

/// Writes this rank's result from what all ranks have shown: `shown(rank, start, length)`.
#[inline(always)]
fn take<'s>(
    operation: HostOperation<'_>,
    rank: usize,
    world: usize,
    shown: impl Fn(usize, usize, usize) -> &'s [u8],
) {
    match operation {
        Operation::AllReduce { mut data, op } | Operation::AllReduceInto { output: mut data, op, .. } => {
            let (dtype, bytes) = (data.dtype(), data.bytes_mut());
            let n = bytes.len();
            fold_bytes_from(op, dtype, world, &|from| shown(from, 0, n), bytes);
        }
        Operation::Reduce { mut data, op, root } => {
            if rank == root {
                let (dtype, bytes) = (data.dtype(), data.bytes_mut());
                let n = bytes.len();
                fold_bytes_from(op, dtype, world, &|from| shown(from, 0, n), bytes);
            }
        }
        Operation::ReduceScatter { mut output, op, .. } => {
            let (dtype, bytes) = (output.dtype(), output.bytes_mut());
            let n = bytes.len();
            fold_bytes_from(op, dtype, world, &|from| shown(from, rank * n, n), bytes);
        }
        Operation::ReduceScatterInPlace { mut data, op } => {
            let (dtype, n) = (data.dtype(), data.bytes().len() / world);
            let bytes = &mut data.bytes_mut()[rank * n..][..n];
            fold_bytes_from(op, dtype, world, &|from| shown(from, rank * n, n), bytes);
        }
        Operation::AllGather { mut output, .. } | Operation::AllGatherInPlace { data: mut output } => {
            let n = output.bytes().len() / world;
            for (from, place) in output.bytes_mut().chunks_exact_mut(n.max(1)).enumerate() {
                place.copy_from_slice(shown(from, 0, n));
            }
        }
        Operation::AllGatherV { counts, mut output, .. } => {
            let (size, mut rest) = (element_bytes(output.dtype()), output.bytes_mut());
            for (from, count) in counts.iter().enumerate() {
                let (place, others) = rest.split_at_mut(count * size);
                place.copy_from_slice(shown(from, 0, count * size));
                rest = others;
            }
        }
        Operation::Gather { input, mut output, root } => {
            let n = input.bytes().len();
            for from in (0..world).filter(|_| rank == root) {
                output.bytes_mut()[from * n..][..n].copy_from_slice(shown(from, 0, n));
            }
        }
        Operation::Broadcast { mut data, root } => {
            if rank != root {
                let n = data.bytes().len();
                data.bytes_mut().copy_from_slice(shown(root, 0, n));
            }
        }
        Operation::Scatter { mut output, root, .. } => {
            let n = output.bytes().len();
            output.bytes_mut().copy_from_slice(shown(root, rank * n, n));
        }
        Operation::AllToAll { input, mut output } => {
            let n = input.bytes().len() / world;
            for (from, place) in output.bytes_mut().chunks_exact_mut(n.max(1)).enumerate() {
                place.copy_from_slice(shown(from, rank * n, n));
            }
        }
        // They have ways of their own.
        Operation::AllToAllV { .. }
        | Operation::Barrier
        | Operation::Send { .. }
        | Operation::Recv { .. } => {}
    }
}

impl Shm {
    /// A call whose contributions fit in a cell or a slot.
    pub(super) fn run_whole(&mut self, call: &Call<'_>, operation: HostOperation<'_>) -> Result<(), Fault> {
        let (rank, world) = (self.segment.rank(), self.segment.world());
        let most = contribution_bytes(&operation, world).unwrap_or(0);
        let mine = operation.contribution(rank, world);
        if most > PAYLOAD * 8 {
            debug_assert!(most <= SLOT);
            let slot = self.next_slot();
            self.segment.write(slot, 0..mine.len()).copy_from_slice(mine);
            self.step(call, &[])?;
            let segment = &self.segment;
            take(operation, rank, world, |from, start, n| segment.read(from, slot, start..start + n));
            return Ok(());
        }
        let mut words = [0u64; PAYLOAD];
        bytemuck::bytes_of_mut(&mut words)[..mine.len()].copy_from_slice(mine);
        let used = most.div_ceil(8);
        self.step(call, &words[..used])?;
        for (from, payload) in self.payloads.iter_mut().enumerate() {
            let cell = self.segment.cell(from, self.step);
            for (word, shown) in payload.iter_mut().zip(&cell.payload).take(used) {
                *word = shown.load(Relaxed);
            }
        }
        let payloads = &self.payloads;
        take(operation, rank, world, |from, start, n| &bytemuck::bytes_of(&payloads[from])[start..][..n]);
        Ok(())
    }
}
