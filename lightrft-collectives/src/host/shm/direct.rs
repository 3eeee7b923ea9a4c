//! Large calls on buffers where they lie: in the group's heap, or read through the kernel

use std::sync::atomic::Ordering::Relaxed;

use super::heap::Shared;
use super::lend::{Borrower, Loan};
use super::{Call, DIRECT, Shm, Watch, peer_memory, unreadable};
use crate::buffer::element_bytes;
use crate::host::exchange::Fault;
use crate::host::vigil::Condition;
use crate::op::{Dtype, ReduceOp};
use crate::operation::{HostOperation, Operation};
use crate::reduce::fold_bytes_from;

/// Bytes summed at a time, in the first-level cache.
const BLOCK: usize = 8 << 10;

/// Bytes written to another's memory in one kernel call, so that a rank that takes its buffer back waits for no more.
const WRITTEN_AT_ONCE: usize = 64 << 20;

/// How a rank gets at the others' buffers.
enum Reach {
    /// All lie in one region of the heap.
    Heap(Shared),
    /// At these addresses of the others' own memory.
    Kernel(Vec<u64>),
}

/// Who writes to others' buffers in a call.
enum Writer {
    Nobody,
    One(usize),
    All,
}

impl Writer {
    fn is(&self, rank: usize) -> bool {
        match self {
            Writer::Nobody => false,
            Writer::One(one) => *one == rank,
            Writer::All => true,
        }
    }
}

impl Shm {
    /// Makes the call if its buffers can be used where they lie; else gives it back.
    pub(super) fn run_direct<'o>(
        &mut self,
        call: &Call<'_>,
        mut operation: HostOperation<'o>,
    ) -> Result<Option<HostOperation<'o>>, Fault> {
        let (rank, world) = (self.segment.rank(), self.segment.world());
        // Bytes that one rank reads of another, and the buffer that is read.
        let (piece, shown): (usize, &[u8]) = match &operation {
            Operation::AllReduce { data, .. } | Operation::ReduceScatterInPlace { data, .. } => {
                (0, data.bytes())
            }
            Operation::ReduceScatter { input, .. } => (0, input.bytes()),
            Operation::AllGather { input, .. } | Operation::Gather { input, .. } => {
                (input.bytes().len(), input.bytes())
            }
            // Some ranks may gather in place and others not: all show their piece.
            Operation::AllGatherInPlace { data } => {
                let n = data.bytes().len() / world;
                (n, &data.bytes()[rank * n..][..n])
            }
            Operation::AllGatherV { input, counts, output } => {
                let longest = counts.iter().copied().max().unwrap_or(0);
                (longest * element_bytes(output.dtype()), input.bytes())
            }
            Operation::Broadcast { data, .. } => (data.bytes().len(), data.bytes()),
            Operation::Scatter { input, output, .. } => (output.bytes().len(), input.bytes()),
            Operation::AllToAll { input, .. } => (input.bytes().len() / world, input.bytes()),
            _ => return Ok(Some(operation)),
        };
        // The same answer on all ranks: it depends on the call and on what the group has agreed on.
        let through_kernel = self.reads_peers && piece >= DIRECT;
        if !through_kernel && !self.heap.is_used() {
            return Ok(Some(operation));
        }
        let length = shown.len().max(piece);
        let (region, offset) = self.heap.find(shown).unwrap_or((0, 0));
        let place = [region, offset as u64, shown.as_ptr() as u64];
        // Those who go to work make the same call: they have compared.
        let writer = match &operation {
            Operation::AllReduce { .. } => Writer::All,
            Operation::Broadcast { root, .. } => Writer::One(*root),
            _ => Writer::Nobody,
        };
        self.publish(call, &place);
        let loan = Loan::of(self.step);
        // While the others come.
        keep_own(&mut operation, rank, world);
        let result = self.on_loan(call, loan, operation, |shm| shm.reach(region, length, through_kernel));
        if result.is_err() {
            let Watch { fate, ranks, group, timeout, .. } = call.watch;
            loan.take_back(&self.segment, *timeout, |peer| {
                if fate.is_lost(ranks[peer]) || fate.has_left(ranks[peer], *group) {
                    Borrower::Gone
                } else if writer.is(peer) && Condition::of(self.pids[peer]) != Condition::Stopped {
                    Borrower::Writes
                } else {
                    Borrower::Harmless
                }
            });
        }
        result
    }

    /// Makes the call, once all others have come and lent their buffers; gives it back if those cannot be reached.
    fn on_loan<'o>(
        &mut self,
        call: &Call<'_>,
        loan: Loan,
        operation: HostOperation<'o>,
        reach: impl FnOnce(&Self) -> Option<Reach>,
    ) -> Result<Option<HostOperation<'o>>, Fault> {
        let (rank, world) = (self.segment.rank(), self.segment.world());
        self.await_all(call)?;
        let Some(reach) = reach(self) else { return Ok(Some(operation)) };
        loan.begin(&self.segment)?;
        match operation {
            Operation::AllReduce { data, op } => {
                let (dtype, total) = (data.dtype(), data.bytes().len());
                if let Reach::Heap(shared) = &reach {
                    self.all_reduce_in_heap(loan, shared, op, dtype, total)?;
                }
            }
            Operation::ReduceScatterInPlace { mut data, op } => {
                let (dtype, n) = (data.dtype(), data.bytes().len() / world);
                if let Reach::Heap(shared) = &reach {
                    let mut sum = [0u64; BLOCK / 8];
                    for (index, place) in data.bytes_mut()[rank * n..][..n].chunks_mut(BLOCK).enumerate() {
                        let (start, length) = (rank * n + index * BLOCK, place.len());
                        let sum = &mut bytemuck::bytes_of_mut(&mut sum)[..length];
                        fold_bytes_from(op, dtype, world, &|from| shared.bytes(from, start, length), sum);
                        place.copy_from_slice(sum);
                    }
                }
            }
            Operation::ReduceScatter { mut output, op, .. } => {
                let (dtype, n) = (output.dtype(), output.bytes().len());
                if let Reach::Heap(shared) = &reach {
                    let part = |from| shared.bytes(from, rank * n, n);
                    fold_bytes_from(op, dtype, world, &part, output.bytes_mut());
                }
            }
            Operation::AllGather { input, mut output } => {
                let n = input.bytes().len();
                self.collect(&reach, |from| (0, from * n, n), output.bytes_mut())?;
            }
            Operation::AllGatherV { counts, mut output, .. } => {
                let size = element_bytes(output.dtype());
                let place =
                    |from: usize| (0, counts[..from].iter().sum::<usize>() * size, counts[from] * size);
                self.collect(&reach, place, output.bytes_mut())?;
            }
            Operation::AllGatherInPlace { mut data } => {
                let n = data.bytes().len() / world;
                for from in (0..world).filter(|from| *from != rank) {
                    self.fetch(&reach, from, 0, &mut data.bytes_mut()[from * n..][..n])?;
                }
            }
            Operation::Broadcast { mut data, root } => {
                self.broadcast(loan, &reach, data.bytes_mut(), root)?;
            }
            Operation::Gather { input, mut output, root } => {
                let n = input.bytes().len();
                if rank == root {
                    self.collect(&reach, |from| (0, from * n, n), output.bytes_mut())?;
                }
            }
            Operation::Scatter { mut output, root, .. } => {
                let n = output.bytes().len();
                if rank != root {
                    self.fetch(&reach, root, rank * n, output.bytes_mut())?;
                }
            }
            Operation::AllToAll { input, mut output } => {
                let n = input.bytes().len() / world;
                self.collect(&reach, |from| (rank * n, from * n, n), output.bytes_mut())?;
            }
            // Sent back above.
            _ => {}
        }
        // What was read since may be something else by now.
        loan.holds(&self.segment)?;
        loan.done(&self.segment);
        // The others' buffers are theirs again when everyone has read them.
        self.step(call, &[])?;
        Ok(None)
    }

    /// How the buffers that all ranks have shown, of up to `length` bytes, can be reached. `None`, on all ranks alike, if
    /// they cannot. This rank's is in `region` of the heap, or in none if that is 0.
    fn reach(&self, region: u64, length: usize, through_kernel: bool) -> Option<Reach> {
        let world = self.segment.world();
        let shown = |from: usize, word: usize| self.segment.cell(from, self.step).payload[word].load(Relaxed);
        if region != 0 && (0..world).all(|from| shown(from, 0) == region) {
            let offsets = (0..world).map(|from| shown(from, 1) as usize);
            return self.heap.shared(region, length, offsets).map(Reach::Heap);
        }
        through_kernel.then(|| Reach::Kernel((0..world).map(|from| shown(from, 2)).collect()))
    }

    /// Copies from the buffer of rank `from`.
    fn fetch(&self, reach: &Reach, from: usize, start: usize, to: &mut [u8]) -> Result<(), Fault> {
        match reach {
            Reach::Heap(shared) => {
                to.copy_from_slice(shared.bytes(from, start, to.len()));
                Ok(())
            }
            Reach::Kernel(addresses) => {
                let address = addresses[from] + start as u64;
                peer_memory::read(self.pids[from], address, to).map_err(|error| unreadable(from, error))
            }
        }
    }

    /// The root gives each other rank the last part of its data, 1 of as many as there are ranks, while that takes the rest:
    /// so all copy the same amount.
    fn broadcast(&self, loan: Loan, reach: &Reach, data: &mut [u8], root: usize) -> Result<(), Fault> {
        let (rank, world) = (self.segment.rank(), self.segment.world());
        let Reach::Kernel(addresses) = reach else {
            return if rank == root { Ok(()) } else { self.fetch(reach, root, 0, data) };
        };
        let taken = (data.len() - data.len() / world).next_multiple_of(4096).min(data.len());
        if rank != root {
            return self.fetch(reach, root, 0, &mut data[..taken]);
        }
        for to in (rank + 1..world).chain(0..rank) {
            let mut address = addresses[to] + taken as u64;
            for bytes in data[taken..].chunks(WRITTEN_AT_ONCE) {
                loan.holds(&self.segment)?;
                peer_memory::write(self.pids[to], address, bytes).map_err(|error| unreadable(to, error))?;
                address += bytes.len() as u64;
            }
        }
        Ok(())
    }

    /// Copies a piece of every other rank's buffer to `output`: `place(rank)` is where the piece begins, where it goes, and
    /// its length.
    fn collect(
        &self,
        reach: &Reach,
        place: impl Fn(usize) -> (usize, usize, usize),
        output: &mut [u8],
    ) -> Result<(), Fault> {
        let (rank, world) = (self.segment.rank(), self.segment.world());
        // Each begins with its neighbour, so that not all read the same memory at once.
        for from in (rank + 1..world).chain(0..rank) {
            let (start, to, n) = place(from);
            self.fetch(reach, from, start, &mut output[to..to + n])?;
        }
        Ok(())
    }

    /// Sums this rank's part of the buffers and stores it in all of them.
    fn all_reduce_in_heap(
        &self,
        loan: Loan,
        shared: &Shared,
        op: ReduceOp,
        dtype: Dtype,
        total: usize,
    ) -> Result<(), Fault> {
        let (rank, world) = (self.segment.rank(), self.segment.world());
        // Whole cache lines for each rank.
        let per = total.div_ceil(world).next_multiple_of(64);
        let (mut at, end) = ((rank * per).min(total), ((rank + 1) * per).min(total));
        let mut sum = [0u64; BLOCK / 8];
        let sum: &mut [u8] = bytemuck::cast_slice_mut(&mut sum);
        while at < end {
            let n = BLOCK.min(end - at);
            fold_bytes_from(op, dtype, world, &|from| shared.bytes(from, at, n), &mut sum[..n]);
            loan.holds(&self.segment)?;
            shared.store(at, &sum[..n]);
            at += n;
        }
        Ok(())
    }
}

/// Copies this rank's own piece of its input to its place in the output.
fn keep_own(operation: &mut HostOperation<'_>, rank: usize, world: usize) {
    match operation {
        Operation::AllGather { input, output } => {
            let n = input.bytes().len();
            output.bytes_mut()[rank * n..][..n].copy_from_slice(input.bytes());
        }
        Operation::Gather { input, output, root } if rank == *root => {
            let n = input.bytes().len();
            output.bytes_mut()[rank * n..][..n].copy_from_slice(input.bytes());
        }
        Operation::AllGatherV { input, counts, output } => {
            let before = counts[..rank].iter().sum::<usize>() * element_bytes(output.dtype());
            output.bytes_mut()[before..][..input.bytes().len()].copy_from_slice(input.bytes());
        }
        Operation::Scatter { input, output, root } if rank == *root => {
            let n = output.bytes().len();
            output.bytes_mut().copy_from_slice(&input.bytes()[rank * n..][..n]);
        }
        Operation::AllToAll { input, output } => {
            let n = input.bytes().len() / world;
            output.bytes_mut()[rank * n..][..n].copy_from_slice(&input.bytes()[rank * n..][..n]);
        }
        _ => {}
    }
}
