//! Reductions of ranks on several machines: the chain of [`hierarchy`](super::hierarchy)

use std::ops::Range;

use super::exchange::Fault;
use super::hierarchy::{Call, SMALL, bytes, bytes_mut, slice_elements};
use super::topology::share;
use crate::buffer::{AlignedBytes, element_bytes};
use crate::op::{Dtype, ReduceOp};
use crate::operation::Operation;
use crate::reduce::{Begin, finish, fold_in_place, fold_onto, partial_bytes};

/// Chunks that may be on their way forward before the first comes back, at most.
const AHEAD: usize = 4;

/// What is reduced, and this rank's lane.
#[derive(Clone, Copy)]
struct Fold {
    op: ReduceOp,
    dtype: Dtype,
    world: usize,
    lanes: usize,
}

/// Memory of a rank at a lane's end: the local contributions to its slice, and what they are folded onto.
#[derive(Default)]
struct Slices {
    contributions: AlignedBytes,
    partial: AlignedBytes,
}

impl Call<'_, '_> {
    fn fold_of(&self, op: ReduceOp, dtype: Dtype) -> Fold {
        Fold { op, dtype, world: self.tcp.world, lanes: self.topology.lanes() }
    }

    pub(super) fn all_reduce(&mut self, op: ReduceOp, dtype: Dtype, data: &mut [u8]) -> Result<(), Fault> {
        let fold = self.fold_of(op, dtype);
        if data.len() * fold.world <= SMALL {
            return self.all_reduce_small(fold, data);
        }
        let size = element_bytes(dtype);
        let chunk = fold.lanes * slice_elements(dtype, self.topology.most()) * size;
        let chunks = data.len().div_ceil(chunk);
        let part = |index: usize, length: usize| index * chunk..((index + 1) * chunk).min(length);
        let (length, ahead) = (data.len(), self.ahead().min(chunks));
        let slice = |n: usize, lane: Option<usize>| match lane {
            Some(lane) => {
                let share = share(n / size, fold.lanes, lane);
                share.start * size..share.end * size
            }
            None => 0..0,
        };
        let (ranks, lane) = (self.topology.host().len(), self.lane(fold.lanes));
        let mut memory = Slices::default();
        for turn in 0..chunks + ahead {
            if turn < chunks {
                let data = &mut data[part(turn, length)];
                let to = |rank| slice(data.len(), Some(rank).filter(|rank| *rank < fold.lanes)).len();
                let counts: Vec<usize> = (0..ranks).map(to).collect();
                self.forward(fold, data, &counts, &mut memory)?;
                let mine = slice(data.len(), lane);
                if lane.is_some() && self.is_last() {
                    finish(op, dtype, fold.world, memory.partial.as_slice(), &mut data[mine]);
                }
            }
            if let Some(index) = turn.checked_sub(ahead) {
                let data = &mut data[part(index, length)];
                let mine = slice(data.len(), lane);
                if let Some(lane) = lane {
                    self.backward(lane, mine, data)?;
                }
                self.spread_elements(data, size, fold.lanes)?;
            }
        }
        Ok(())
    }

    /// Everyone gets all contributions and folds them.
    fn all_reduce_small(&mut self, fold: Fold, data: &mut [u8]) -> Result<(), Fault> {
        let (topology, n, rank) = (self.topology, data.len(), self.topology.rank);
        let mut all = std::mem::take(self.tcp.staging);
        let parts = all.at_least(n * fold.world);
        let block = |host: usize| topology.hosts[host].start * n..topology.hosts[host].end * n;
        parts[rank * n..(rank + 1) * n].copy_from_slice(data);
        let mut step = || {
            self.local(Operation::AllGatherInPlace { data: bytes_mut(&mut parts[block(topology.mine)]) })?;
            if self.lane(1).is_some() {
                let send = |peer| topology.across(0, peer).map(|_| block(topology.mine));
                let recv = |peer| topology.across(0, peer).map(block);
                self.remote(None, parts, send, recv)?;
            }
            self.spread(parts, 1)
        };
        let done = step();
        if done.is_ok() {
            let part = |peer: usize| &parts[peer * n..(peer + 1) * n];
            fold_in_place(fold.op, fold.dtype, fold.world, rank, &part, data);
        }
        *self.tcp.staging = all;
        done
    }

    fn is_last(&self) -> bool {
        self.topology.mine + 1 == self.topology.hosts.len()
    }

    fn ahead(&self) -> usize {
        (self.topology.hosts.len() - 1).min(AHEAD)
    }

    /// Gives the lanes' ends their slices of all local `contributions` (`counts` bytes for each local rank, one after the
    /// other), has them folded onto what the machine before sends, and sends it on.
    fn forward(
        &mut self,
        fold: Fold,
        contributions: &[u8],
        counts: &[usize],
        memory: &mut Slices,
    ) -> Result<(), Fault> {
        let (topology, ranks) = (self.topology, counts.len());
        let mine = counts[topology.local()];
        let gathered = memory.contributions.exactly(mine * ranks);
        if ranks == 1 {
            self.meet_local()?;
            gathered.copy_from_slice(contributions);
        } else if counts.iter().all(|n| *n == mine) {
            let operation = Operation::AllToAll { input: bytes(contributions), output: bytes_mut(gathered) };
            self.local(operation)?;
        } else {
            let operation = Operation::AllToAllV {
                input: bytes(contributions),
                send_counts: counts,
                output: bytes_mut(gathered),
                recv_counts: &vec![mine; ranks],
            };
            self.local(operation)?;
        }
        let Some(lane) = self.lane(fold.lanes) else { return Ok(()) };
        let partial = memory.partial.exactly(mine / element_bytes(fold.dtype) * partial_bytes(fold.dtype));
        let all = 0..partial.len();
        let mut from = Begin::Contribution;
        if let Some(before) = topology.mine.checked_sub(1) {
            let peer = topology.end(before, lane);
            self.remote(None, partial, |_| None, |p| (p == peer).then(|| all.clone()))?;
            from = Begin::Partial;
        }
        fold_onto(fold.op, fold.dtype, from, memory.contributions.as_slice(), partial);
        if !self.is_last() {
            let peer = topology.end(topology.mine + 1, lane);
            self.remote(None, partial, |p| (p == peer).then(|| all.clone()), |_| None)?;
        }
        Ok(())
    }

    /// Passes the finished slice `mine` of `data` from the last machine to the first.
    fn backward(&mut self, lane: usize, mine: Range<usize>, data: &mut [u8]) -> Result<(), Fault> {
        let topology = self.topology;
        if !self.is_last() {
            let peer = topology.end(topology.mine + 1, lane);
            self.remote(None, data, |_| None, |p| (p == peer).then(|| mine.clone()))?;
        }
        if let Some(before) = topology.mine.checked_sub(1) {
            let peer = topology.end(before, lane);
            self.remote(None, data, |p| (p == peer).then(|| mine.clone()), |_| None)?;
        }
        Ok(())
    }

    /// [`spread`](Call::spread) of slices of whole elements.
    fn spread_elements(&mut self, data: &mut [u8], size: usize, lanes: usize) -> Result<(), Fault> {
        let (ranks, elements) = (self.topology.host().len(), data.len() / size);
        if lanes == 1 || lanes == ranks && elements.is_multiple_of(lanes) {
            return self.spread(data, lanes);
        }
        let shares = |rank| {
            let share = if rank < lanes { share(elements, lanes, rank) } else { 0..0 };
            share.start * size..share.end * size
        };
        let counts: Vec<usize> = (0..ranks).map(|rank| shares(rank).len()).collect();
        let mine = data[shares(self.topology.local())].to_vec();
        self.local(Operation::AllGatherV { input: bytes(&mine), counts: &counts, output: bytes_mut(data) })
    }

    /// Part `q` of the reduction goes by the lane that rank `q`'s place on its machine names, modulo their number. From the
    /// last machine it goes to its owner directly.
    pub(super) fn reduce_scatter(
        &mut self,
        op: ReduceOp,
        dtype: Dtype,
        input: Option<&[u8]>,
        output: &mut [u8],
    ) -> Result<(), Fault> {
        let (fold, size, topology) = (self.fold_of(op, dtype), element_bytes(dtype), self.topology);
        let world = fold.world;
        let part = input.map_or(output.len(), <[u8]>::len) / world;
        let lane_of = |rank: usize| (rank - topology.hosts[topology.host_of(rank)].start) % fold.lanes;
        let owners = |lane: usize| (0..world).filter(move |rank| lane_of(*rank) == lane);
        let ranks = topology.host().len();
        // Of each part, so much that all lanes' slices together are of the usual size.
        let piece = (fold.lanes * slice_elements(dtype, topology.most()) / world).max(1) * size;
        let pieces = part.div_ceil(piece).max(1);
        let own = if input.is_some() { 0 } else { topology.rank * part };
        let piece_of = |index: usize| (index * piece).min(part)..((index + 1) * piece).min(part);
        let lane = self.lane(fold.lanes);
        let (mut packed, mut memory) = (Vec::new(), Slices::default());
        let mut finished = AlignedBytes::default();
        let ahead = self.ahead().min(pieces);
        // Finished slices of the last machine's ends, until their turn to go.
        let mut waiting: std::collections::VecDeque<Vec<u8>> = std::collections::VecDeque::new();
        for turn in 0..pieces + ahead {
            if turn < pieces {
                let range = piece_of(turn);
                packed.clear();
                let source = input.unwrap_or(output);
                for lane in 0..fold.lanes {
                    for owner in owners(lane) {
                        packed.extend_from_slice(&source[owner * part..][range.clone()]);
                    }
                }
                let to = |rank| if rank < fold.lanes { owners(rank).count() * range.len() } else { 0 };
                let counts: Vec<usize> = (0..ranks).map(to).collect();
                self.forward(fold, &packed, &counts, &mut memory)?;
                if lane.is_some() && self.is_last() {
                    let out = finished.exactly(counts[topology.local()]);
                    finish(op, dtype, world, memory.partial.as_slice(), out);
                    waiting.push_back(out.to_vec());
                }
            }
            if let Some(index) = turn.checked_sub(ahead) {
                let range = piece_of(index);
                let slice = if self.is_last() { lane.and_then(|_| waiting.pop_front()) } else { None };
                let mine = own + range.start..own + range.end;
                self.deliver(slice.as_deref(), &lane_of, lane, range.len(), &mut output[mine])?;
            }
        }
        Ok(())
    }

    /// From the ends of the last machine's lanes, which have `slice`, to each owner its `n` bytes.
    fn deliver(
        &mut self,
        slice: Option<&[u8]>,
        lane_of: &dyn Fn(usize) -> usize,
        lane: Option<usize>,
        n: usize,
        mine: &mut [u8],
    ) -> Result<(), Fault> {
        let topology = self.topology;
        let rank = topology.rank;
        let giver = topology.end(topology.hosts.len() - 1, lane_of(rank));
        let place = |owner: usize| {
            let before = (0..owner).filter(|rank| lane_of(*rank) == lane_of(owner)).count();
            before * n..(before + 1) * n
        };
        if let Some(slice) = slice
            && giver == rank
        {
            mine.copy_from_slice(&slice[place(rank)]);
        }
        let send = |peer| (slice.is_some() && lane == Some(lane_of(peer))).then(|| place(peer));
        let recv = |peer| (peer == giver).then_some(0..n);
        self.remote(slice, mine, send, recv)
    }
}
