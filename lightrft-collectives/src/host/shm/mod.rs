//! Collectives through shared memory
//!
//! See [`segment`](super::segment) for the protocol. No kernel call is made while ranks are in step, but for those
//! that copy from another process's memory. Three ways, by size and by where the buffers are:
//! - *whole*: every rank shows all it has, in its cell if it fits or else in its slot, and each takes what it needs: one
//!   step.
//! - *staged*: the same, a slot at a time; reductions sum a part on each rank.
//! - *direct*: the buffers stay where they are. Ranks read those of others, through the group's heap or the kernel,
//!   and a last step tells everyone that they have.

mod direct;
mod heap;
mod lend;
mod peer_memory;
mod staged;
mod wait;
mod whole;

use std::io;

use self::heap::Heap;
pub(crate) use self::heap::HeapMemory;
pub(super) use self::wait::{Cores, Watch};
use self::wait::{Policy, Step};
use super::exchange::Fault;
use super::segment::{Mapping, PAYLOAD, Segment};
use crate::buffer::element_bytes;
use crate::operation::{Exchange, HostOperation, Operation, Signature};

/// Up to this many bytes of all ranks together each rank shows all it has, and takes what it needs.
const WHOLE: usize = 64 << 10;

/// From this many bytes of one rank for another on, one copy through the kernel is faster than two through a slot.
const DIRECT: usize = 16 << 10;

/// One rank's end of a group's shared memory.
#[derive(Debug)]
pub(super) struct Shm {
    segment: Segment,
    /// The last step published.
    step: u32,
    /// Which slot the next use takes.
    slot: usize,
    policy: Policy,
    /// Process ids, by rank in the group.
    pids: Vec<u32>,
    /// Whether all ranks can read each other's own memory.
    reads_peers: bool,
    heap: Heap,
    /// What all ranks showed in their cells.
    payloads: Vec<[u64; PAYLOAD]>,
}

/// The call being made: what each of its steps shows and watches.
#[derive(Clone, Copy)]
struct Call<'a> {
    signature: [u64; 3],
    watch: &'a Watch<'a>,
}

impl Shm {
    /// `cores` is what all ranks have together.
    pub(super) fn new(segment: Segment, pids: Vec<u32>, cores: usize) -> Self {
        let world = segment.world();
        Shm {
            segment,
            step: 0,
            slot: 0,
            policy: Policy::of(world, cores),
            pids,
            reads_peers: false,
            heap: Heap::default(),
            payloads: vec![[0; PAYLOAD]; world],
        }
    }

    /// Whether this rank can read the memory of process `pid`, where `word` is at `address`.
    pub(super) fn can_read(pid: u32, address: u64, word: u64) -> bool {
        let mut got = [0u8; 8];
        peer_memory::read(pid, address, &mut got).is_ok_and(|()| got == word.to_ne_bytes())
    }

    /// Tells this rank whether all ranks can read each other's own memory.
    pub(super) fn reads_peers(&mut self, all_can: bool) {
        self.reads_peers = all_can;
    }

    /// Bytes of the file for a heap region with `len` bytes for each rank.
    pub(super) fn region_bytes(&self, len: usize) -> usize {
        Heap::file_bytes(len, self.segment.world())
    }

    /// Takes a file that all ranks have mapped as the heap's next region. All ranks do this in the same order.
    pub(super) fn add_region(&mut self, mapping: Mapping, len: usize) -> HeapMemory {
        self.heap.add(mapping, len, self.segment.rank(), self.segment.world())
    }

    pub(super) fn run(
        &mut self,
        operation: HostOperation<'_>,
        signature: Signature,
        watch: &Watch<'_>,
    ) -> Result<(), Fault> {
        let call = Call { signature: signature.encode(), watch };
        let world = self.segment.world();
        match operation {
            // Point-to-point calls go over the connections: they are not everyone's, and a step is.
            Operation::Send { .. } | Operation::Recv { .. } => Ok(()),
            Operation::Barrier => self.step(&call, &[]),
            Operation::AllToAllV { input, send_counts, mut output, recv_counts } => {
                let row = Exchange::row(send_counts, recv_counts);
                let mut rows = vec![0u64; row.len() * world];
                let lengths = vec![row.len() * 8; world];
                let places: &mut [u8] = bytemuck::cast_slice_mut(&mut rows);
                places[self.segment.rank() * lengths[0]..][..lengths[0]]
                    .copy_from_slice(bytemuck::cast_slice(&row));
                self.gather_staged(&call, &lengths, places)?;
                let exchange = Exchange { counts: &rows, world };
                if let Some((from, sent, to, expected)) = exchange.disagreement(signature) {
                    return Err(Fault::Disagree { one: (from, sent), other: (to, expected) });
                }
                let size = element_bytes(output.dtype());
                self.all_to_all_v(&call, &exchange, size, input.bytes(), output.bytes_mut())
            }
            operation => {
                if let Some(bytes) = whole::contribution_bytes(&operation, world)
                    && (bytes <= PAYLOAD * 8 || bytes * world <= WHOLE)
                {
                    return self.run_whole(&call, operation);
                }
                self.run_large(&call, operation)
            }
        }
    }

    /// Calls without data still meet, and learn whether all make the same one.
    pub(super) fn meet(&mut self, signature: Signature, watch: &Watch<'_>) -> Result<(), Fault> {
        self.step(&Call { signature: signature.encode(), watch }, &[])
    }

    /// Publishes a step with `payload` and waits for everyone's.
    #[inline]
    fn step(&mut self, call: &Call<'_>, payload: &[u64]) -> Result<(), Fault> {
        self.publish(call, payload);
        self.await_all(call)
    }

    #[inline]
    fn publish(&mut self, call: &Call<'_>, payload: &[u64]) {
        self.step = self.step.wrapping_add(1);
        self.step_of(call).publish(&self.segment, payload);
    }

    #[inline]
    fn await_all(&self, call: &Call<'_>) -> Result<(), Fault> {
        self.step_of(call).meet(&self.segment)
    }

    #[inline]
    fn step_of<'c>(&self, call: &Call<'c>) -> Step<'c> {
        Step { number: self.step, signature: call.signature, policy: self.policy, watch: call.watch }
    }

    fn uses_heap(&self) -> bool {
        self.heap.is_used()
    }

    fn next_slot(&mut self) -> usize {
        self.slot ^= 1;
        self.slot
    }
}

/// What a failed read of another process's memory means.
fn unreadable(peer: usize, error: io::Error) -> Fault {
    if peer_memory::is_gone(&error) { Fault::Lost(peer) } else { Fault::System(error) }
}
