//! One rank's part in a schedule: it makes the calls and compares each result with the oracle's

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use lightrft_collectives::{
    Communicator, CommunicatorExt, DeviceMesh, Dtype, GroupBuffer, Result, axis_group, sub_groups,
};

use super::oracle::{Sample, assert_same, reduced, value, values};
use super::place::Place;
use super::random::mix;
use super::schedule::{Call, Kind, Schedule, Step};

/// Names of mesh axes.
const AXES: [&str; 3] = ["outer", "middle", "inner"];

/// A rank's ends of the groups of a schedule.
pub(crate) struct Rank {
    pub(crate) rank: usize,
    /// By family; none where this rank is not a member, or has left.
    pub(crate) comms: Vec<Option<Arc<dyn Communicator>>>,
    /// What it has of its groups' heaps, by family.
    heaps: HashMap<usize, GroupBuffer<u8>>,
}

/// Whether results are compared with the oracle's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Results {
    Checked,
    /// For speed, where the moment of a failure is measured.
    Ignored,
}

impl Rank {
    pub(crate) fn new(world: Arc<dyn Communicator>) -> Self {
        Rank { rank: world.rank(), comms: vec![Some(world)], heaps: HashMap::new() }
    }

    /// Follows `schedule` for `steps` steps.
    pub(crate) fn follow(&mut self, seed: u64, schedule: &mut Schedule, steps: usize) {
        let world = schedule.family(0).size();
        for number in 0..steps {
            let step = schedule.next();
            let at = || format!("seed {seed}, {world} ranks, rank {}, step {number}: {step:?}", self.rank);
            let at = at();
            if let Err(error) = self.perform(&step, schedule, Results::Checked, &at) {
                panic!("{at}: {error}");
            }
        }
    }

    /// Does what `step`, the last one drawn from `schedule`, asks of this rank. `at` is for messages.
    pub(crate) fn perform(
        &mut self,
        step: &Step,
        schedule: &Schedule,
        results: Results,
        at: &str,
    ) -> Result<()> {
        match step {
            Step::Leave { family } => {
                self.comms[*family] = None;
                // Memory outlives its group, as far as the one who has it is concerned.
                self.heaps.remove(family);
            }
            Step::Alloc { family, bytes } => {
                let Some(comm) = &self.comms[*family] else { return Ok(()) };
                self.heaps.insert(*family, comm.alloc(*bytes)?);
            }
            Step::Call { family, call } => {
                let Some(comm) = &self.comms[*family] else { return Ok(()) };
                let heap = self.heaps.get_mut(family).map(|heap| &mut heap[..]);
                return perform_call(&**comm, call, heap, results, at);
            }
            Step::Split { parent, members } => {
                let made = self.comms[*parent].as_ref().map(|comm| comm.subgroup(members)).transpose()?;
                self.join(made.flatten(), schedule, at);
            }
            Step::Axis { parent, sizes, axis } => {
                let axes: Vec<(&str, usize)> = AXES.into_iter().zip(sizes.iter().copied()).collect();
                let mesh = DeviceMesh::new(&axes)?;
                let made = self.comms[*parent].as_ref().map(|comm| axis_group(&**comm, &mesh, AXES[*axis]));
                self.join(made.transpose()?, schedule, at);
            }
            Step::SubGroups { parent, size } => {
                let made = self.comms[*parent].as_ref().map(|comm| sub_groups(&**comm, *size)).transpose()?;
                let (consecutive, strided) = made.map(|g| (g.consecutive, g.strided)).unzip();
                self.join(consecutive, schedule, at);
                self.join(strided, schedule, at);
            }
        }
        Ok(())
    }

    /// Takes this rank's end of the next family, which must be what the schedule says.
    fn join(&mut self, made: Option<Arc<dyn Communicator>>, schedule: &Schedule, at: &str) {
        let expected = schedule.family(self.comms.len()).line_of(self.rank);
        assert_eq!(made.as_ref().map(|comm| comm.ranks()), expected, "{at}");
        if let Some(comm) = &made {
            assert_eq!(comm.ranks()[comm.rank()], self.rank, "{at}");
        }
        self.comms.push(made);
    }

    /// The family's group that this rank is in.
    pub(crate) fn comm(&self, family: usize) -> &dyn Communicator {
        self.comms[family].as_deref().expect("a group of this rank")
    }
}

/// Makes one call, with what this rank brings in `heap` where there is one.
pub(crate) fn perform_call(
    comm: &dyn Communicator,
    call: &Call,
    heap: Option<&mut [u8]>,
    results: Results,
    at: &str,
) -> Result<()> {
    match call.dtype {
        Dtype::F64 => typed::<f64>(comm, call, heap, results, at),
        Dtype::BF16 => typed::<bf16>(comm, call, heap, results, at),
        Dtype::F16 => typed::<f16>(comm, call, heap, results, at),
        Dtype::I32 => typed::<i32>(comm, call, heap, results, at),
        Dtype::I64 => typed::<i64>(comm, call, heap, results, at),
        Dtype::U8 => typed::<u8>(comm, call, heap, results, at),
        _ => typed::<f32>(comm, call, heap, results, at),
    }
}

fn typed<T: Sample>(
    comm: &dyn Communicator,
    call: &Call,
    heap: Option<&mut [u8]>,
    results: Results,
    at: &str,
) -> Result<()> {
    let Call { kind, count, op, root, seed, .. } = *call;
    let (rank, world, line) = (comm.rank(), comm.world_size(), comm.ranks());
    let check = |got: &[T], expected: &dyn Fn() -> Vec<T>| {
        if results == Results::Checked {
            assert_same(got, &expected(), || at.to_string());
        }
    };
    let mine = |count: usize| values::<T>(seed, line[rank], count);
    let place = |values: Vec<T>| Place::of(values, heap, mix(seed ^ line[rank] as u64));
    let theirs = |member: usize, count: usize| values::<T>(seed, line[member], count);
    let everyone = || (0..world).flat_map(|member| theirs(member, count)).collect::<Vec<T>>();
    let zeros = |count: usize| vec![T::zeroed(); count];
    // Part `part` of what `member` brings, where it brings one part for each rank.
    let piece = |member: usize, part: usize| {
        (0..count).map(|i| value::<T>(seed, line[member], part * count + i)).collect::<Vec<T>>()
    };
    match kind {
        Kind::Barrier => comm.barrier()?,
        Kind::AllReduce => {
            let mut data = place(mine(count));
            comm.all_reduce(&mut data, op)?;
            check(&data, &|| reduced(seed, line, op, 0..count));
        }
        Kind::AllReduceInto => {
            let (input, mut output) = (place(mine(count)), zeros(count));
            comm.all_reduce_into(&input, &mut output, op)?;
            check(&output, &|| reduced(seed, line, op, 0..count));
            check(&input, &|| mine(count));
        }
        Kind::Reduce => {
            let mut data = place(mine(count));
            comm.reduce(&mut data, op, root)?;
            check(&data, &|| if rank == root { reduced(seed, line, op, 0..count) } else { mine(count) });
        }
        Kind::ReduceScatter => {
            let (input, mut output) = (place(mine(world * count)), zeros(count));
            comm.reduce_scatter(&input, &mut output, op)?;
            check(&output, &|| reduced(seed, line, op, rank * count..(rank + 1) * count));
        }
        Kind::ReduceScatterInPlace => {
            let mut data = place(mine(world * count));
            comm.reduce_scatter_in_place(&mut data, op)?;
            let own = rank * count..(rank + 1) * count;
            check(&data[own.clone()], &|| reduced(seed, line, op, own.clone()));
        }
        Kind::AllGather => {
            let (input, mut output) = (place(mine(count)), zeros(world * count));
            comm.all_gather(&input, &mut output)?;
            check(&output, &everyone);
        }
        Kind::AllGatherInPlace => {
            let mut data = place(zeros(world * count));
            data[rank * count..][..count].copy_from_slice(&mine(count));
            comm.all_gather_in_place(&mut data)?;
            check(&data, &everyone);
        }
        Kind::AllGatherCounts | Kind::AllGatherV => {
            let counts: Vec<usize> = (0..world).map(|member| ragged(seed, member, count)).collect();
            let expected = || counts.iter().enumerate().flat_map(|(r, n)| theirs(r, *n)).collect::<Vec<T>>();
            let input = place(mine(counts[rank]));
            let mut output = zeros(counts.iter().sum());
            if kind == Kind::AllGatherCounts {
                comm.all_gather_counts(&input, &counts, &mut output)?;
            } else {
                let all = comm.all_gather_v(bytemuck::cast_slice(&input))?;
                bytemuck::cast_slice_mut(&mut output).copy_from_slice(&all.concat());
            }
            check(&output, &expected);
        }
        Kind::Broadcast => {
            let mut data = place(if rank == root { mine(count) } else { zeros(count) });
            comm.broadcast(&mut data, root)?;
            check(&data, &|| theirs(root, count));
        }
        Kind::Gather => {
            let (input, mut output) =
                (place(mine(count)), zeros(if rank == root { world * count } else { 0 }));
            comm.gather(&input, &mut output, root)?;
            check(&output, &|| if rank == root { everyone() } else { Vec::new() });
        }
        Kind::Scatter => {
            let (input, mut output) =
                (place(mine(if rank == root { world * count } else { 0 })), zeros(count));
            comm.scatter(&input, &mut output, root)?;
            check(&output, &|| piece(root, rank));
        }
        Kind::AllToAll => {
            let (input, mut output) = (place(mine(world * count)), zeros(world * count));
            comm.all_to_all(&input, &mut output)?;
            check(&output, &|| (0..world).flat_map(|member| piece(member, rank)).collect());
        }
        Kind::AllToAllV => {
            // What goes from one rank to another is as long as both draw, and begins with its first elements.
            let between = |from: usize, to: usize| ragged(seed ^ (from * world + to) as u64, to, count);
            let send: Vec<usize> = (0..world).map(|to| between(rank, to)).collect();
            let recv: Vec<usize> = (0..world).map(|from| between(from, rank)).collect();
            let cut = |from: usize, to: usize| piece(from, to)[..between(from, to)].to_vec();
            let input: Vec<T> = (0..world).flat_map(|to| cut(rank, to)).collect();
            let mut output = zeros(recv.iter().sum());
            comm.all_to_all_v(&input, &send, &mut output, &recv)?;
            check(&output, &|| (0..world).flat_map(|from| cut(from, rank)).collect());
        }
        Kind::SendRecv => {
            let to = (root + 1) % world;
            if rank == root {
                comm.send(&mine(count), to)?;
            } else if rank == to {
                let mut data = zeros(count);
                comm.recv(&mut data, root)?;
                check(&data, &|| theirs(root, count));
            }
        }
        Kind::Ring => {
            let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
            let (input, mut output) = (mine(count), zeros(count));
            if rank.is_multiple_of(2) {
                comm.send(&input, next)?;
                comm.recv(&mut output, before)?;
            } else {
                comm.recv(&mut output, before)?;
                comm.send(&input, next)?;
            }
            check(&output, &|| theirs(before, count));
        }
        Kind::AllGatherObject | Kind::GatherObject | Kind::BroadcastObject | Kind::ScatterObject => {
            objects(comm, call, at)?;
        }
    }
    Ok(())
}

/// Elements of `member`'s part where parts have different lengths; some have none.
fn ragged(seed: u64, member: usize, count: usize) -> usize {
    value::<i64>(seed ^ 1, member, 0) as usize % (count + 1)
}

fn objects(comm: &dyn Communicator, call: &Call, at: &str) -> Result<()> {
    let Call { kind, root, seed, count, .. } = *call;
    let (rank, line) = (comm.rank(), comm.ranks());
    let object = |member: usize| {
        let numbers = values::<i32>(seed, line[member], ragged(seed, member, count.min(500)));
        (format!("rank {member}"), numbers, member.is_multiple_of(2).then_some(0.5f32))
    };
    let everyone = || (0..line.len()).map(object).collect::<Vec<_>>();
    let is_root = rank == root;
    match kind {
        Kind::GatherObject => {
            assert_eq!(comm.gather_object(&object(rank), root)?, is_root.then(everyone), "{at}");
        }
        Kind::BroadcastObject => {
            let given = object(root);
            assert_eq!(comm.broadcast_object(is_root.then_some(&given), root)?, given, "{at}");
        }
        Kind::ScatterObject => {
            let given = everyone();
            let got = comm.scatter_object(is_root.then_some(&given[..]), root)?;
            assert_eq!(got, object(rank), "{at}");
        }
        _ => assert_eq!(comm.all_gather_object(&object(rank))?, everyone(), "{at}"),
    }
    Ok(())
}
