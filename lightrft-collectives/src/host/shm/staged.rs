//! Large calls through the slots, a slot at a time

use std::ops::Range;

use super::{Call, Shm};
use crate::buffer::element_bytes;
use crate::host::exchange::Fault;
use crate::host::segment::SLOT;
use crate::op::{Dtype, ReduceOp};
use crate::operation::{Exchange, HostOperation, Operation};
use crate::reduce::fold_bytes_from;

/// Bytes summed at a time: what was summed is copied on while it is in the first-level cache.
const BLOCK: usize = 16 << 10;

/// What is reduced: the input, or, in place, the output itself.
struct Reduction<'a> {
    input: Option<&'a [u8]>,
    output: &'a mut [u8],
    dtype: Dtype,
    op: ReduceOp,
}

impl Reduction<'_> {
    fn input(&self, range: Range<usize>) -> &[u8] {
        &self.input.unwrap_or(self.output)[range]
    }
}

impl Shm {
    pub(super) fn run_large(&mut self, call: &Call<'_>, operation: HostOperation<'_>) -> Result<(), Fault> {
        // Other ranks may make the same call in place: where the heap is used, all do.
        let operation = match operation {
            Operation::AllReduceInto { input, mut output, op } if self.uses_heap() => {
                output.bytes_mut().copy_from_slice(input.bytes());
                Operation::AllReduce { data: output, op }
            }
            operation => operation,
        };
        let Some(operation) = self.run_direct(call, operation)? else { return Ok(()) };
        let (rank, world) = (self.segment.rank(), self.segment.world());
        match operation {
            Operation::AllReduce { mut data, op } => {
                let (dtype, output) = (data.dtype(), data.bytes_mut());
                self.all_reduce_staged(call, Reduction { input: None, output, dtype, op })
            }
            Operation::AllReduceInto { input, mut output, op } => {
                let (dtype, input, output) = (output.dtype(), Some(input.bytes()), output.bytes_mut());
                self.all_reduce_staged(call, Reduction { input, output, dtype, op })
            }
            Operation::ReduceScatter { input, mut output, op } => {
                let (dtype, input, output) = (output.dtype(), Some(input.bytes()), output.bytes_mut());
                self.reduce_scatter_staged(call, Reduction { input, output, dtype, op })
            }
            Operation::ReduceScatterInPlace { mut data, op } => {
                let (dtype, output) = (data.dtype(), data.bytes_mut());
                self.reduce_scatter_staged(call, Reduction { input: None, output, dtype, op })
            }
            Operation::Reduce { mut data, op, root } => {
                let (dtype, total) = (data.dtype(), data.bytes().len());
                self.uses(total, SLOT, |shm, slot, offset, n| {
                    let mine = &mut data.bytes_mut()[offset..][..n];
                    shm.segment.write(slot, 0..n).copy_from_slice(mine);
                    shm.step(call, &[])?;
                    if rank == root {
                        let segment = &shm.segment;
                        fold_bytes_from(op, dtype, world, &|from| segment.read(from, slot, 0..n), mine);
                    }
                    Ok(())
                })
            }
            Operation::AllGather { input, mut output } => {
                let n = input.bytes().len();
                output.bytes_mut()[rank * n..][..n].copy_from_slice(input.bytes());
                self.gather_staged(call, &vec![n; world], output.bytes_mut())
            }
            Operation::AllGatherV { input, counts, mut output } => {
                let size = element_bytes(output.dtype());
                let lengths: Vec<usize> = counts.iter().map(|n| n * size).collect();
                let before: usize = lengths[..rank].iter().sum();
                output.bytes_mut()[before..][..lengths[rank]].copy_from_slice(input.bytes());
                self.gather_staged(call, &lengths, output.bytes_mut())
            }
            Operation::AllGatherInPlace { mut data } => {
                let lengths = vec![data.bytes().len() / world; world];
                self.gather_staged(call, &lengths, data.bytes_mut())
            }
            Operation::Broadcast { mut data, root } => {
                let total = data.bytes().len();
                self.uses(total, SLOT, |shm, slot, offset, n| {
                    let chunk = &mut data.bytes_mut()[offset..][..n];
                    if rank == root {
                        shm.segment.write(slot, 0..n).copy_from_slice(chunk);
                    }
                    shm.step(call, &[])?;
                    if rank != root {
                        chunk.copy_from_slice(shm.segment.read(root, slot, 0..n));
                    }
                    Ok(())
                })
            }
            Operation::Gather { input, mut output, root } => {
                let total = input.bytes().len();
                self.uses(total, SLOT, |shm, slot, offset, n| {
                    shm.segment.write(slot, 0..n).copy_from_slice(&input.bytes()[offset..][..n]);
                    shm.step(call, &[])?;
                    for from in (0..world).filter(|_| rank == root) {
                        let place = &mut output.bytes_mut()[from * total + offset..][..n];
                        place.copy_from_slice(shm.segment.read(from, slot, 0..n));
                    }
                    Ok(())
                })
            }
            Operation::Scatter { input, mut output, root } => {
                let (total, part) = (output.bytes().len(), self.part());
                self.uses(total, part, |shm, slot, offset, n| {
                    for to in (0..world).filter(|_| rank == root) {
                        let piece = &input.bytes()[to * total + offset..][..n];
                        shm.segment.write(slot, to * part..to * part + n).copy_from_slice(piece);
                    }
                    shm.step(call, &[])?;
                    let mine = shm.segment.read(root, slot, rank * part..rank * part + n);
                    output.bytes_mut()[offset..][..n].copy_from_slice(mine);
                    Ok(())
                })
            }
            Operation::AllToAll { input, mut output } => {
                let (total, part) = (input.bytes().len() / world, self.part());
                let own = rank * total..(rank + 1) * total;
                output.bytes_mut()[own.clone()].copy_from_slice(&input.bytes()[own]);
                self.uses(total, part, |shm, slot, offset, n| {
                    for to in (0..world).filter(|to| *to != rank) {
                        let piece = &input.bytes()[to * total + offset..][..n];
                        shm.segment.write(slot, to * part..to * part + n).copy_from_slice(piece);
                    }
                    shm.step(call, &[])?;
                    for from in (0..world).filter(|from| *from != rank) {
                        let piece = shm.segment.read(from, slot, rank * part..rank * part + n);
                        output.bytes_mut()[from * total + offset..][..n].copy_from_slice(piece);
                    }
                    Ok(())
                })
            }
            // They have ways of their own.
            Operation::AllToAllV { .. }
            | Operation::Barrier
            | Operation::Send { .. }
            | Operation::Recv { .. } => Ok(()),
        }
    }

    /// Bytes of a slot for each rank, whole cache lines.
    fn part(&self) -> usize {
        SLOT / self.segment.world() / 64 * 64
    }

    /// One use of the slots per `chunk` of `total` bytes, and at least one: a call without data must meet, too.
    pub(super) fn uses(
        &mut self,
        total: usize,
        chunk: usize,
        mut one: impl FnMut(&mut Self, usize, usize, usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut offset = 0;
        loop {
            let slot = self.next_slot();
            let n = chunk.min(total - offset);
            one(self, slot, offset, n)?;
            offset += n;
            if offset >= total {
                return Ok(());
            }
        }
    }

    /// In rounds: stage the parts that others own, meet, sum my own part where the others can read it, meet, take theirs.
    fn all_reduce_staged(&mut self, call: &Call<'_>, data: Reduction<'_>) -> Result<(), Fault> {
        let (rank, world, size) = (self.segment.rank(), self.segment.world(), element_bytes(data.dtype));
        let part = self.part();
        let total = data.output.len();
        for start in (0..total).step_by(part * world) {
            let slot = self.next_slot();
            let length = (part * world).min(total - start);
            // The last round is shorter: its parts are equal too, but for the last ones.
            let per = (length / size).div_ceil(world) * size;
            let owned = |owner: usize| {
                let (from, to) = ((owner * per).min(length), ((owner + 1) * per).min(length));
                start + from..start + to
            };
            for to in (0..world).filter(|to| *to != rank) {
                let range = owned(to);
                let place = self.segment.write(slot, to * part..to * part + range.len());
                place.copy_from_slice(data.input(range));
            }
            self.step(call, &[])?;
            let range = owned(rank);
            let (sum, others) = self.segment.split(slot, rank * part..rank * part + range.len());
            for (index, sum) in sum.chunks_mut(BLOCK).enumerate() {
                let (here, there) = (range.start + index * BLOCK, rank * part + index * BLOCK);
                let n = sum.len();
                let shown = |from: usize| {
                    if from == rank {
                        data.input(here..here + n)
                    } else {
                        others.bytes(from, there..there + n)
                    }
                };
                fold_bytes_from(data.op, data.dtype, world, &shown, sum);
                data.output[here..here + n].copy_from_slice(sum);
            }
            self.step(call, &[])?;
            for from in (0..world).filter(|from| *from != rank) {
                let range = owned(from);
                let sum = self.segment.read(from, slot, from * part..from * part + range.len());
                data.output[range].copy_from_slice(sum);
            }
        }
        Ok(())
    }

    /// In rounds: stage the others' parts, meet, sum mine.
    fn reduce_scatter_staged(&mut self, call: &Call<'_>, data: Reduction<'_>) -> Result<(), Fault> {
        let (rank, world, part) = (self.segment.rank(), self.segment.world(), self.part());
        let in_place = data.input.is_none();
        let total = if in_place { data.output.len() / world } else { data.output.len() };
        self.uses(total, part, |shm, slot, offset, n| {
            for to in (0..world).filter(|to| *to != rank) {
                let start = to * total + offset;
                shm.segment
                    .write(slot, to * part..to * part + n)
                    .copy_from_slice(data.input(start..start + n));
            }
            shm.step(call, &[])?;
            let mine = rank * part..rank * part + n;
            if in_place {
                // Summed beside it first: the sum's place is one of its parts.
                let (sum, others) = shm.segment.split(slot, mine.clone());
                let here = rank * total + offset..rank * total + offset + n;
                let shown = |from: usize| {
                    if from == rank { data.input(here.clone()) } else { others.bytes(from, mine.clone()) }
                };
                fold_bytes_from(data.op, data.dtype, world, &shown, sum);
                data.output[here].copy_from_slice(sum);
            } else {
                let (segment, input) = (&shm.segment, data.input.unwrap_or(&[]));
                let shown = |from: usize| match from == rank {
                    true => &input[rank * total + offset..][..n],
                    false => segment.read(from, slot, mine.clone()),
                };
                fold_bytes_from(data.op, data.dtype, world, &shown, &mut data.output[offset..][..n]);
            }
            Ok(())
        })
    }

    /// All parts to their places in `output`, where this rank's own already lies.
    pub(super) fn gather_staged(
        &mut self,
        call: &Call<'_>,
        lengths: &[usize],
        output: &mut [u8],
    ) -> Result<(), Fault> {
        let rank = self.segment.rank();
        let starts: Vec<usize> = lengths
            .iter()
            .scan(0, |next, n| {
                let start = *next;
                *next += n;
                Some(start)
            })
            .collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        self.uses(longest, SLOT, |shm, slot, offset, n| {
            let here = |r: usize| {
                let n = n.min(lengths[r].saturating_sub(offset));
                let start = starts[r] + offset.min(lengths[r]);
                (n, start..start + n)
            };
            let (n, mine) = here(rank);
            shm.segment.write(slot, 0..n).copy_from_slice(&output[mine]);
            shm.step(call, &[])?;
            for from in (0..lengths.len()).filter(|from| *from != rank) {
                let (n, place) = here(from);
                output[place].copy_from_slice(shm.segment.read(from, slot, 0..n));
            }
            Ok(())
        })
    }

    /// Pieces of all lengths to their places; ranks have agreed on who sends what.
    pub(super) fn all_to_all_v(
        &mut self,
        call: &Call<'_>,
        exchange: &Exchange<'_>,
        size: usize,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<(), Fault> {
        let (rank, world, part) = (self.segment.rank(), self.segment.world(), self.part());
        let sent = |from: usize, to: usize| exchange.sent(from, to) * size;
        let longest = (0..world * world).map(|pair| sent(pair / world, pair % world)).max().unwrap_or(0);
        self.uses(longest, part, |shm, slot, offset, n| {
            let piece = |from: usize, to: usize| n.min(sent(from, to).saturating_sub(offset));
            for to in 0..world {
                let n = piece(rank, to);
                if n > 0 {
                    let start = exchange.offset(rank, to) * size + offset;
                    shm.segment
                        .write(slot, to * part..to * part + n)
                        .copy_from_slice(&input[start..start + n]);
                }
            }
            shm.step(call, &[])?;
            let mut before = 0;
            for from in 0..world {
                let n = piece(from, rank);
                if n > 0 {
                    let bytes = shm.segment.read(from, slot, rank * part..rank * part + n);
                    output[before + offset..][..n].copy_from_slice(bytes);
                }
                before += sent(from, rank);
            }
            Ok(())
        })
    }
}
