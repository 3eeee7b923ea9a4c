//! Collectives of ranks on several machines: shared memory within a machine, TCP between machines
//!
//! Each machine's ranks form a local group. Between machines go *lanes*: the `l`-th rank of each machine is at the end
//! of lane `l`. A vector's chunks are cut into one slice per lane, so that the lanes share the work.
//!
//! A sum is a chain, because its bits are promised to be those of a fold in rank order: on each machine the ranks at
//! the lanes' ends fold their slices of the local contributions onto the partial result of the machines before, kept in
//! the accumulator's type, and send it on; on the last it is rounded and goes back the same way. So each byte crosses
//! each boundary between machines once in each direction, where the flat path sends it once per pair of ranks.
//!
//! Nothing can lock: all ranks go through the same phases in the same order, and a phase waits for earlier ones or, from
//! machine to machine in one direction, for itself only.
//!
//! Every step carries the caller's signature, on both levels. Each call begins with a local step, so ranks of one
//! machine that disagree learn it there; machines learn it from the first frame on lane 0.

use std::ops::Range;
use std::time::Duration;

use super::exchange::{Fault, Wait};
use super::shm::{Shm, Watch};
use super::steps::Places;
use super::tcp::{Tcp, places};
use super::topology::{Topology, share};
use crate::buffer::{Host, HostMut, element_bytes};
use crate::op::Dtype;
use crate::operation::{HostOperation, Operation, Signature};

/// Up to this many bytes of all ranks together everyone gets everything, in one hop between machines.
pub(super) const SMALL: usize = 64 << 10;

/// Bytes of a slice, of one lane in one chunk.
pub(super) const SLICE: usize = 256 << 10;

/// Bytes of the slices of all ranks of a machine. A reduce-scatter holds about five times as much at most, with the slices that
/// are under way and the shared memory: 4 MiB are promised.
const SLICES: usize = 768 << 10;

/// One rank's place on both levels.
#[derive(Debug)]
pub(super) struct Hierarchy {
    pub(super) topology: Topology,
    /// The local group; none for a rank that is alone on its machine.
    local: Option<Shm>,
}

/// A call under way.
pub(super) struct Call<'a, 'c> {
    pub(super) topology: &'a Topology,
    local: Option<&'a mut Shm>,
    pub(super) tcp: &'a mut Tcp<'c>,
    watch: &'a Watch<'a>,
    pub(super) signature: Signature,
    /// A rank that waits for one on another machine, which waits for a third, must not be the first to complain: it
    /// would name the wrong one. So the first, local, step has the caller's deadline, and what comes after a little more.
    slack: Duration,
}

impl Hierarchy {
    pub(super) fn new(topology: Topology, local: Option<Shm>) -> Self {
        Hierarchy { topology, local }
    }

    fn call<'a, 'c>(
        &'a mut self,
        signature: Signature,
        tcp: &'a mut Tcp<'c>,
        watch: &'a Watch<'a>,
    ) -> Call<'a, 'c> {
        let Hierarchy { topology, local } = self;
        Call { topology, local: local.as_mut(), tcp, watch, signature, slack: Duration::ZERO }
    }

    /// Returns when every rank has come with this signature.
    pub(super) fn meet(
        &mut self,
        signature: Signature,
        tcp: &mut Tcp<'_>,
        watch: &Watch<'_>,
    ) -> Result<(), Fault> {
        self.call(signature, tcp, watch).meet()
    }

    pub(super) fn run(
        &mut self,
        operation: HostOperation<'_>,
        signature: Signature,
        tcp: &mut Tcp<'_>,
        watch: &Watch<'_>,
    ) -> Result<(), Fault> {
        let world = watch.ranks.len();
        let mut call = self.call(signature, tcp, watch);
        match operation {
            operation @ (Operation::Send { .. } | Operation::Recv { .. }) => call.tcp.run(operation),
            Operation::Barrier => call.meet(),
            Operation::AllReduce { data, op } => {
                let dtype = data.dtype();
                call.all_reduce(op, dtype, data.into_bytes())
            }
            Operation::AllReduceInto { input, output, op } => {
                let (dtype, output) = (output.dtype(), output.into_bytes());
                output.copy_from_slice(input.bytes());
                call.all_reduce(op, dtype, output)
            }
            Operation::ReduceScatter { input, output, op } => {
                let dtype = output.dtype();
                call.reduce_scatter(op, dtype, Some(input.bytes()), output.into_bytes())
            }
            Operation::ReduceScatterInPlace { data, op } => {
                let dtype = data.dtype();
                call.reduce_scatter(op, dtype, None, data.into_bytes())
            }
            Operation::AllGather { input, output } => {
                let (input, output) = (input.bytes(), output.into_bytes());
                let (n, rank) = (input.len(), call.topology.rank);
                output[rank * n..(rank + 1) * n].copy_from_slice(input);
                call.all_gather(n, output)
            }
            Operation::AllGatherInPlace { data } => {
                let data = data.into_bytes();
                call.all_gather(data.len() / world, data)
            }
            Operation::AllGatherV { input, counts, output } => {
                let places = places(counts, element_bytes(output.dtype()));
                call.all_gather_v(input.bytes(), &places, output.into_bytes())
            }
            Operation::Broadcast { data, root } => call.broadcast(data.into_bytes(), root),
            Operation::AllToAll { input, output } => call.all_to_all(input.bytes(), output.into_bytes()),
            // Each byte of these crosses to one rank only: two levels would save nothing.
            operation => {
                call.meet_local()?;
                call.tcp.run(operation)
            }
        }
    }
}

impl Call<'_, '_> {
    /// Makes a call of the local group. A rank alone on its machine has nothing to do.
    pub(super) fn local(&mut self, operation: HostOperation<'_>) -> Result<(), Fault> {
        self.locally(|shm, signature, watch| shm.run(operation, signature, watch))
    }

    /// The local step that every call begins with.
    pub(super) fn meet_local(&mut self) -> Result<(), Fault> {
        self.locally(Shm::meet)
    }

    fn locally(
        &mut self,
        step: impl FnOnce(&mut Shm, Signature, &Watch<'_>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let (host, watch) = (self.topology.host(), self.watch);
        let timeout = watch.timeout.saturating_add(2 * self.slack);
        self.slack = (watch.timeout / 8).min(Duration::from_secs(5));
        let Some(shm) = self.local.as_deref_mut() else { return Ok(()) };
        let ranks = &watch.ranks[host.clone()];
        let vigil = &watch.vigil.over(ranks);
        let watch = Watch { ranks, timeout, vigil, ..*watch };
        step(shm, self.signature, &watch).map_err(|fault| of_group(fault, host.start))
    }

    /// One step on this rank's connections: `send` of `input`, or of `output` without one; `recv` of `output`.
    pub(super) fn remote(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        send: impl Fn(usize) -> Option<Range<usize>>,
        recv: impl Fn(usize) -> Option<Range<usize>>,
    ) -> Result<(), Fault> {
        let Tcp { links, wait, .. } = &mut *self.tcp;
        let wait = Wait { timeout: wait.timeout.saturating_add(self.slack), ..*wait };
        let mut step = Places { input, output, send, recv };
        links.exchange(self.signature, self.signature, &mut step, wait)
    }

    /// This rank's lane, if it is at the end of one of the first `lanes`.
    pub(super) fn lane(&self, lanes: usize) -> Option<usize> {
        Some(self.topology.local()).filter(|local| *local < lanes)
    }

    /// All with the same call: local, between lane 0's ends, local.
    fn meet(&mut self) -> Result<(), Fault> {
        self.meet_local()?;
        self.meet_machines()?;
        self.meet_local()
    }

    fn meet_machines(&mut self) -> Result<(), Fault> {
        if self.topology.local() > 0 {
            return Ok(());
        }
        let topology = self.topology;
        let header = |peer| topology.across(0, peer).map(|_| 0..0);
        self.remote(None, &mut [], header, header)
    }

    /// `n` bytes of each rank; this rank's own are already in place.
    fn all_gather(&mut self, n: usize, data: &mut [u8]) -> Result<(), Fault> {
        let topology = self.topology;
        let block = |host: usize| topology.hosts[host].start * n..topology.hosts[host].end * n;
        self.local(Operation::AllGatherInPlace { data: bytes_mut(&mut data[block(topology.mine)]) })?;
        self.exchange_blocks(&block, data)
    }

    fn all_gather_v(
        &mut self,
        input: &[u8],
        places: &[Range<usize>],
        output: &mut [u8],
    ) -> Result<(), Fault> {
        let topology = self.topology;
        let block = |host: usize| {
            let ranks = topology.hosts[host].clone();
            places[ranks.start].start..places[ranks.end - 1].end
        };
        output[places[topology.rank].clone()].copy_from_slice(input);
        let counts: Vec<usize> = places[topology.host()].iter().map(|place| place.len()).collect();
        let block_here = bytes_mut(&mut output[block(topology.mine)]);
        self.local(Operation::AllGatherV { input: bytes(input), counts: &counts, output: block_here })?;
        self.exchange_blocks(&block, output)
    }

    /// Gives every rank the blocks of the other machines; those of its own are there.
    fn exchange_blocks(
        &mut self,
        block: &dyn Fn(usize) -> Range<usize>,
        data: &mut [u8],
    ) -> Result<(), Fault> {
        let topology = self.topology;
        let longest = (0..topology.hosts.len()).map(|host| block(host).len()).max().unwrap_or(0);
        let lanes = if data.len() <= SMALL { 1 } else { topology.lanes() };
        let chunk = lanes * SLICE;
        for from in (0..longest.max(1)).step_by(chunk) {
            let part = |host: usize| {
                let block = block(host);
                let begin = block.start + from.min(block.len());
                begin..(begin + chunk).min(block.end)
            };
            if let Some(lane) = self.lane(lanes) {
                let slice = |host: usize| {
                    let (part, share) = (part(host), share(part(host).len(), lanes, lane));
                    part.start + share.start..part.start + share.end
                };
                let send = |peer| topology.across(lane, peer).map(|_| slice(topology.mine));
                let recv = |peer| topology.across(lane, peer).map(slice);
                self.remote(None, data, send, recv)?;
            }
            for host in (0..topology.hosts.len()).filter(|host| *host != topology.mine) {
                self.spread(&mut data[part(host)], lanes)?;
            }
        }
        Ok(())
    }

    /// Gives the local ranks the slices that each lane's end has of `data`.
    pub(super) fn spread(&mut self, data: &mut [u8], lanes: usize) -> Result<(), Fault> {
        let ranks = self.topology.host().len();
        if lanes == 1 {
            return self.local(Operation::Broadcast { data: bytes_mut(data), root: 0 });
        }
        if lanes == ranks && data.len().is_multiple_of(lanes) {
            return self.local(Operation::AllGatherInPlace { data: bytes_mut(data) });
        }
        let shares = |rank| if rank < lanes { share(data.len(), lanes, rank) } else { 0..0 };
        let counts: Vec<usize> = (0..ranks).map(|rank| shares(rank).len()).collect();
        let mine = data[shares(self.topology.local())].to_vec();
        let operation =
            Operation::AllGatherV { input: bytes(&mine), counts: &counts, output: bytes_mut(data) };
        self.local(operation)
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<(), Fault> {
        let topology = self.topology;
        let origin = topology.host_of(root);
        let here = topology.mine == origin;
        // Nobody has a result before all are known to make this call: those of a machine meet before the ends of its lanes
        // tell the other machines, the root's in the broadcast among them.
        if !here {
            self.meet_local()?;
        }
        let lanes = if data.len() <= SMALL { 1 } else { topology.lanes() };
        let length = data.len();
        for from in (0..length.max(1)).step_by(lanes * SLICE) {
            let chunk = &mut data[from..(from + lanes * SLICE).min(length)];
            let n = chunk.len();
            if here {
                let root = root - topology.host().start;
                self.local(Operation::Broadcast { data: bytes_mut(chunk), root })?;
            }
            if let Some(lane) = self.lane(lanes) {
                let slice = |from: usize| if from == origin { share(n, lanes, lane) } else { 0..0 };
                let send = |peer| topology.across(lane, peer).map(|_| slice(topology.mine));
                let recv = |peer| topology.across(lane, peer).map(slice);
                self.remote(None, chunk, send, recv)?;
            }
            if !here {
                self.spread(chunk, lanes)?;
            }
        }
        if here { self.meet_local() } else { Ok(()) }
    }

    /// Within the machine through memory; to each rank elsewhere directly, which crosses once in any case.
    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<(), Fault> {
        let (topology, world) = (self.topology, self.watch.ranks.len());
        let (host, n) = (topology.host(), input.len() / world);
        let part = |rank: usize| rank * n..(rank + 1) * n;
        let within = host.start * n..host.end * n;
        if host.len() == 1 {
            output[within.clone()].copy_from_slice(&input[within]);
        } else {
            let (input, output) = (bytes(&input[within.clone()]), bytes_mut(&mut output[within]));
            self.local(Operation::AllToAll { input, output })?;
        }
        let place = |peer| (!host.contains(&peer)).then(|| part(peer));
        self.remote(Some(input), output, place, place)
    }
}

/// Bytes as a call moves them, whatever they stand for.
pub(super) fn bytes(bytes: &[u8]) -> Host<'_> {
    Host::new(bytes)
}

/// As [`bytes`], to write.
pub(super) fn bytes_mut(bytes: &mut [u8]) -> HostMut<'_> {
    HostMut::new(bytes)
}

/// A fault of the local group, which begins with rank `first`, with ranks of the whole.
fn of_group(fault: Fault, first: usize) -> Fault {
    match fault {
        Fault::Lost(rank) => Fault::Lost(first + rank),
        Fault::Mismatch(rank, theirs) => Fault::Mismatch(first + rank, theirs),
        Fault::Disagree { one, other } => {
            Fault::Disagree { one: (first + one.0, one.1), other: (first + other.0, other.1) }
        }
        Fault::Deadline { waited, missing, come } => {
            let of_group = |ranks: Vec<usize>| ranks.into_iter().map(|rank| first + rank).collect();
            Fault::Deadline { waited, missing: of_group(missing), come: of_group(come) }
        }
        fault @ (Fault::Alarm | Fault::System(_)) => fault,
    }
}

/// Whole elements of `dtype` in a slice, the partial result of which is as long as a slice may be. A rank at a lane's end
/// has one slice of each rank of its machine, and the fullest machine has `most`.
pub(super) fn slice_elements(dtype: Dtype, most: usize) -> usize {
    let bytes = (SLICES / most.max(1) / 64 * 64).clamp(64, SLICE);
    bytes / crate::reduce::partial_bytes(dtype).max(1)
}
