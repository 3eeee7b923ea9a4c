//! Collectives through shared memory: every rank stages, all meet, every rank takes
//!
//! See [`segment`](super::segment) for the protocol. No kernel call is made while ranks are in step.

use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use rustix::thread::{futex, sched_yield};

use super::exchange::Fault;
use super::fate::{Alarm, Fate};
use super::segment::{HISTORY, SLOT, Segment};
use crate::buffer::{AlignedBytes, Host, HostMut, element_bytes};
use crate::op::{Dtype, ReduceOp};
use crate::operation::{Exchange, HostOperation, Operation, Signature};
use crate::reduce::fold_bytes;

/// Up to this many bytes of all ranks together each rank sums everything itself: one step instead of two.
const SMALL: usize = 64 << 10;

/// How long to spin, if every rank has a core, before giving the core away.
const SPIN: Duration = Duration::from_micros(20);

/// Times to give the core away before sleeping.
const YIELDS: usize = 30;

/// The longest sleep before looking whether somebody died. Whoever comes wakes the sleeper at once.
const NAP: Duration = Duration::from_millis(5);

/// One rank's end of a group's shared memory.
#[derive(Debug)]
pub(super) struct Shm {
    segment: Segment,
    /// The last step published.
    step: u32,
    /// Which slot the next use takes.
    slot: usize,
    spin: Duration,
}

/// What a wait must watch.
pub(super) struct Watch<'a> {
    pub(super) alarm: &'a Alarm,
    pub(super) fate: &'a Fate,
    pub(super) group: u64,
    /// Ranks of the world, by rank in the group.
    pub(super) ranks: &'a [usize],
    pub(super) timeout: Duration,
}

impl Shm {
    pub(super) fn new(segment: Segment) -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        let spin = if segment.world() <= cores { SPIN } else { Duration::ZERO };
        Shm { segment, step: 0, slot: 0, spin }
    }

    pub(super) fn run(&mut self, operation: HostOperation<'_>, watch: &Watch<'_>) -> Result<(), Fault> {
        let (rank, world) = (self.segment.rank(), self.segment.world());
        let signature = operation.signature(world);
        let meet = |shm: &mut Self| shm.meet(signature, watch);
        match operation {
            // Point-to-point calls go over the connections: they are not everyone's, and a step is.
            Operation::Send { .. } | Operation::Recv { .. } => Ok(()),
            Operation::AllReduceInto { input, mut output, op } => {
                output.bytes_mut().copy_from_slice(input.bytes());
                self.run(Operation::AllReduce { data: output, op }, watch)
            }
            Operation::ReduceScatterInPlace { mut data, op } => {
                let input = AlignedBytes::copy_of(data.bytes());
                let (dtype, n) = (data.dtype(), data.bytes().len() / world);
                let (input, output) = (
                    Host::from_bytes(dtype, input.as_slice()),
                    HostMut::from_bytes(dtype, &mut data.bytes_mut()[rank * n..][..n]),
                );
                let (Ok(input), Ok(output)) = (input, output) else { return Ok(()) };
                self.run(Operation::ReduceScatter { input, output, op }, watch)
            }
            Operation::AllToAllV { input, send_counts, mut output, recv_counts } => {
                let row = Exchange::row(send_counts, recv_counts);
                let mut rows = vec![0u64; row.len() * world];
                let lengths = vec![row.len() * 8; world];
                let places: &mut [u8] = bytemuck::cast_slice_mut(&mut rows);
                places[rank * lengths[0]..][..lengths[0]].copy_from_slice(bytemuck::cast_slice(&row));
                self.gather(&lengths, places, meet)?;
                let exchange = Exchange { counts: &rows, world };
                if let Some((from, sent, to, expected)) = exchange.disagreement(signature) {
                    return Err(Fault::Disagree { one: (from, sent), other: (to, expected) });
                }
                let (size, part) = (element_bytes(output.dtype()), SLOT / world / 64 * 64);
                let longest = (0..world * world)
                    .map(|pair| exchange.sent(pair / world, pair % world))
                    .max()
                    .unwrap_or(0);
                self.uses(longest * size, part, |shm, slot, offset, n| {
                    let piece = |from: usize, to: usize| {
                        let n = n.min((exchange.sent(from, to) * size).saturating_sub(offset));
                        (exchange.offset(from, to) * size + offset, n)
                    };
                    for to in 0..world {
                        let (start, n) = piece(rank, to);
                        if n > 0 {
                            let place = shm.segment.write(slot, to * part..to * part + n);
                            place.copy_from_slice(&input.bytes()[start..][..n]);
                        }
                    }
                    meet(shm)?;
                    let mut before = 0;
                    for from in 0..world {
                        let (_, n) = piece(from, rank);
                        if n > 0 {
                            let bytes = shm.segment.read(from, slot, rank * part..rank * part + n);
                            output.bytes_mut()[before + offset..][..n].copy_from_slice(bytes);
                        }
                        before += exchange.sent(from, rank) * size;
                    }
                    Ok(())
                })
            }
            Operation::Barrier => meet(self),
            Operation::AllReduce { mut data, op } => {
                let (dtype, bytes) = (data.dtype(), data.bytes_mut());
                if bytes.len() * world <= SMALL {
                    return self.all_reduce_small(op, dtype, bytes, meet);
                }
                let size = element_bytes(dtype);
                // Elements of each owner's part of a round, a whole number of cache lines.
                let part = SLOT / world / 64 * 64 / size;
                bytes
                    .chunks_mut(part * world * size)
                    .try_for_each(|round| self.all_reduce_round(op, dtype, round, part * size, meet))
            }
            Operation::ReduceScatter { input, mut output, op } => {
                let (dtype, total) = (output.dtype(), output.bytes().len());
                let part = SLOT / world / 64 * 64;
                self.uses(total, part, |shm, slot, offset, n| {
                    let pieces = |to: usize| &input.bytes()[to * total + offset..][..n];
                    for to in (0..world).filter(|to| *to != rank) {
                        shm.segment.write(slot, to * part..to * part + n).copy_from_slice(pieces(to));
                    }
                    meet(shm)?;
                    let parts = shm.parts(slot, rank * part..rank * part + n, pieces(rank));
                    fold_bytes(op, dtype, &parts, &mut output.bytes_mut()[offset..][..n]);
                    Ok(())
                })
            }
            Operation::Reduce { mut data, op, root } => {
                let (dtype, total) = (data.dtype(), data.bytes().len());
                self.uses(total, SLOT, |shm, slot, offset, n| {
                    let mine = &mut data.bytes_mut()[offset..][..n];
                    shm.segment.write(slot, 0..n).copy_from_slice(mine);
                    meet(shm)?;
                    if rank == root {
                        let parts: Vec<&[u8]> = (0..world).map(|r| shm.segment.read(r, slot, 0..n)).collect();
                        fold_bytes(op, dtype, &parts, mine);
                    }
                    Ok(())
                })
            }
            Operation::AllGather { input, mut output } => {
                let lengths = vec![input.bytes().len(); world];
                output.bytes_mut()[rank * lengths[0]..][..lengths[0]].copy_from_slice(input.bytes());
                self.gather(&lengths, output.bytes_mut(), meet)
            }
            Operation::AllGatherV { input, counts, mut output } => {
                let size = element_bytes(output.dtype());
                let lengths: Vec<usize> = counts.iter().map(|n| n * size).collect();
                let before: usize = lengths[..rank].iter().sum();
                output.bytes_mut()[before..][..lengths[rank]].copy_from_slice(input.bytes());
                self.gather(&lengths, output.bytes_mut(), meet)
            }
            Operation::AllGatherInPlace { mut data } => {
                let lengths = vec![data.bytes().len() / world; world];
                self.gather(&lengths, data.bytes_mut(), meet)
            }
            Operation::Broadcast { mut data, root } => {
                let total = data.bytes().len();
                self.uses(total, SLOT, |shm, slot, offset, n| {
                    let chunk = &mut data.bytes_mut()[offset..][..n];
                    if rank == root {
                        shm.segment.write(slot, 0..n).copy_from_slice(chunk);
                    }
                    meet(shm)?;
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
                    meet(shm)?;
                    for from in (0..world).filter(|_| rank == root) {
                        let place = &mut output.bytes_mut()[from * total + offset..][..n];
                        place.copy_from_slice(shm.segment.read(from, slot, 0..n));
                    }
                    Ok(())
                })
            }
            Operation::Scatter { input, mut output, root } => {
                let (total, part) = (output.bytes().len(), SLOT / world / 64 * 64);
                self.uses(total, part, |shm, slot, offset, n| {
                    for to in (0..world).filter(|_| rank == root) {
                        let piece = &input.bytes()[to * total + offset..][..n];
                        shm.segment.write(slot, to * part..to * part + n).copy_from_slice(piece);
                    }
                    meet(shm)?;
                    let mine = shm.segment.read(root, slot, rank * part..rank * part + n);
                    output.bytes_mut()[offset..][..n].copy_from_slice(mine);
                    Ok(())
                })
            }
            Operation::AllToAll { input, mut output } => {
                let (total, part) = (input.bytes().len() / world, SLOT / world / 64 * 64);
                self.uses(total, part, |shm, slot, offset, n| {
                    for to in 0..world {
                        let piece = &input.bytes()[to * total + offset..][..n];
                        shm.segment.write(slot, to * part..to * part + n).copy_from_slice(piece);
                    }
                    meet(shm)?;
                    for from in 0..world {
                        let piece = shm.segment.read(from, slot, rank * part..rank * part + n);
                        output.bytes_mut()[from * total + offset..][..n].copy_from_slice(piece);
                    }
                    Ok(())
                })
            }
        }
    }

    /// One use of the slots per `chunk` of `total` bytes, and at least one: a call without data must meet, too.
    fn uses(
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

    fn next_slot(&mut self) -> usize {
        self.slot ^= 1;
        self.slot
    }

    /// Contributions in rank order: `mine`, and `range` of the others' slots.
    fn parts<'s>(&'s self, slot: usize, range: std::ops::Range<usize>, mine: &'s [u8]) -> Vec<&'s [u8]> {
        let of = |r| if r == self.segment.rank() { mine } else { self.segment.read(r, slot, range.clone()) };
        (0..self.segment.world()).map(of).collect()
    }

    fn all_reduce_small(
        &mut self,
        op: ReduceOp,
        dtype: Dtype,
        data: &mut [u8],
        meet: impl Fn(&mut Self) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let slot = self.next_slot();
        self.segment.write(slot, 0..data.len()).copy_from_slice(data);
        meet(self)?;
        let all: Vec<&[u8]> =
            (0..self.segment.world()).map(|r| self.segment.read(r, slot, 0..data.len())).collect();
        fold_bytes(op, dtype, &all, data);
        Ok(())
    }

    /// Stage the parts that others own, meet, sum my own part where the others can read it, meet, take theirs.
    fn all_reduce_round(
        &mut self,
        op: ReduceOp,
        dtype: Dtype,
        data: &mut [u8],
        part: usize,
        meet: impl Fn(&mut Self) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let (rank, world, size) = (self.segment.rank(), self.segment.world(), element_bytes(dtype));
        let slot = self.next_slot();
        // The last round is shorter: its parts are equal too, but for the last ones.
        let per = (data.len() / size).div_ceil(world) * size;
        let owned = |owner: usize| (owner * per).min(data.len())..((owner + 1) * per).min(data.len());
        let (ranges, lengths): (Vec<_>, Vec<_>) = (0..world).map(|r| (owned(r), owned(r).len())).unzip();
        for to in (0..world).filter(|to| *to != rank) {
            let place = self.segment.write(slot, to * part..to * part + lengths[to]);
            place.copy_from_slice(&data[ranges[to].clone()]);
        }
        meet(self)?;
        let mine = rank * part..rank * part + lengths[rank];
        let (sum, mut parts) = self.segment.write_beside(slot, mine.clone(), mine);
        parts[rank] = &data[ranges[rank].clone()];
        fold_bytes(op, dtype, &parts, sum);
        data[ranges[rank].clone()].copy_from_slice(sum);
        meet(self)?;
        for from in (0..world).filter(|from| *from != rank) {
            let sum = self.segment.read(from, slot, from * part..from * part + lengths[from]);
            data[ranges[from].clone()].copy_from_slice(sum);
        }
        Ok(())
    }

    /// All parts to their places in `output`, where this rank's own already lies.
    fn gather(
        &mut self,
        lengths: &[usize],
        output: &mut [u8],
        meet: impl Fn(&mut Self) -> Result<(), Fault>,
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
            meet(shm)?;
            for from in (0..lengths.len()).filter(|from| *from != rank) {
                let (n, place) = here(from);
                output[place].copy_from_slice(shm.segment.read(from, slot, 0..n));
            }
            Ok(())
        })
    }

    /// Publishes a step and waits for everyone's, comparing signatures.
    pub(super) fn meet(&mut self, signature: Signature, watch: &Watch<'_>) -> Result<(), Fault> {
        self.step = self.step.wrapping_add(1);
        let (step, words) = (self.step, signature.encode());
        let mine = self.segment.line(self.segment.rank());
        for (place, word) in mine.signatures[step as usize % HISTORY].iter().zip(words) {
            place.store(word, Relaxed);
        }
        // The order of this store and the load of `sleepers` matters, as does that of their counterparts in `sleep`:
        // either the sleeper is seen here, or it sees the step.
        mine.step.store(step, SeqCst);
        if mine.sleepers.load(SeqCst) != 0 {
            let _ = futex::wake(&mine.step, futex::Flags::empty(), i32::MAX as u32);
        }
        let world = self.segment.world();
        for distance in 1..world {
            let peer = (self.segment.rank() + distance) % world;
            self.wait_for(peer, watch)?;
            let theirs = &self.segment.line(peer).signatures[step as usize % HISTORY];
            let theirs = [theirs[0].load(Relaxed), theirs[1].load(Relaxed), theirs[2].load(Relaxed)];
            if theirs != words {
                return Err(Fault::Mismatch(peer, Signature::decode(theirs)));
            }
        }
        Ok(())
    }

    fn has_come(&self, peer: usize) -> bool {
        let theirs = self.segment.line(peer).step.load(Acquire);
        theirs.wrapping_sub(self.step) as i32 >= 0
    }

    fn wait_for(&self, peer: usize, watch: &Watch<'_>) -> Result<(), Fault> {
        if self.has_come(peer) {
            return Ok(());
        }
        let begin = Instant::now();
        while begin.elapsed() < self.spin {
            for _ in 0..32 {
                if self.has_come(peer) {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        for _ in 0..YIELDS {
            sched_yield();
            if self.has_come(peer) {
                return Ok(());
            }
        }
        loop {
            // Looked at before the step: what a rank published before it left or died counts.
            let rung = watch.alarm.is_rung();
            let left = watch.fate.has_left(watch.ranks[peer], watch.group);
            if self.has_come(peer) {
                return Ok(());
            }
            if rung {
                return Err(Fault::Alarm);
            }
            if left {
                return Err(Fault::Lost(peer));
            }
            if begin.elapsed() >= watch.timeout {
                let missing = (0..self.segment.world()).filter(|r| !self.has_come(*r)).collect();
                return Err(Fault::Deadline(begin.elapsed(), missing));
            }
            self.sleep(peer, NAP.min(watch.timeout));
        }
    }

    fn sleep(&self, peer: usize, time: Duration) {
        let line = self.segment.line(peer);
        line.sleepers.fetch_add(1, SeqCst);
        let seen = line.step.load(SeqCst);
        if (seen.wrapping_sub(self.step) as i32) < 0 {
            let time = futex::Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
            // Woken, timed out, changed before sleeping or interrupted: the caller looks again in any case. No
            // private flag: the futex is shared between processes.
            let _ = futex::wait(&line.step, futex::Flags::empty(), seen, Some(&time));
        }
        line.sleepers.fetch_sub(1, SeqCst);
    }
}
