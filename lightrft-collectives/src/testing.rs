//! One suite that every backend passes: what a communicator promises, tried on any group
//!
//! Each function is called by all ranks of a group and panics if a promise is broken. Expected values are computed
//! here, by the plainest code, from the ranks' known inputs. [`Intercepted`] is for tests of what is built on groups: it
//! shows them the calls.

mod derived;
mod device;
mod intercept;
mod survivors;

use std::sync::Arc;

use half::{bf16, f16};

pub use self::device::{Block, Memory, OnDevice};
pub use self::intercept::Intercepted;
pub use self::survivors::survive;
use crate::communicator::{Communicator, CommunicatorExt};
use crate::error::{Error, Result};
use crate::op::{Element, ReduceOp};
use crate::reduce::fold;

/// Lengths that meet each path of a backend: none, one, less than the ranks, odd, several chunks.
const LENGTHS: [usize; 9] = [0, 1, 3, 4, 64, 1027, 8209, 40_003, 300_001];

/// Runs all that any healthy group can be asked for.
///
/// # Errors
/// The first error of a call; in a healthy group there is none.
pub fn conformance(comm: &dyn Communicator) -> Result<()> {
    conformance_with(comm, Samples::Any)
}

/// As [`conformance`], for a backend that folds in an order of its own: sums, and products, of [`Samples::Exact`].
///
/// # Errors
/// As [`conformance`].
pub fn conformance_with(comm: &dyn Communicator, samples: Samples) -> Result<()> {
    reductions::<f32>(comm, samples, &LENGTHS)?;
    reductions::<bf16>(comm, samples, &[0, 1, 3, 40_003])?;
    reductions::<f64>(comm, samples, &[0, 1, 1027])?;
    reductions::<f16>(comm, samples, &[0, 1, 1027])?;
    reductions::<i32>(comm, samples, &[0, 1, 1027])?;
    reductions::<i64>(comm, samples, &[0, 1, 40_003])?;
    reductions::<u8>(comm, samples, &[0, 1, 3, 1027, 100_003])?;
    for length in LENGTHS.into_iter().filter(|length| is_in_reach(comm, *length)) {
        movements::<f32>(comm, length)?;
    }
    for length in [0, 1, 3, 1027] {
        movements::<u8>(comm, length)?;
    }
    heap::<f32>(comm, samples, if is_in_reach(comm, 40_003) { 40_003 } else { 8209 })?;
    heap::<bf16>(comm, samples, if is_in_reach(comm, 300_001) { 300_001 } else { 18_001 })?;
    heap::<u8>(comm, samples, 0)?;
    point_to_point(comm)?;
    objects(comm)?;
    callers_mistakes(comm)?;
    comm.barrier()?;
    subgroups(comm)?;
    // What is built on these calls is tried where it is built: on the host.
    if samples == Samples::Any { derived::derived(comm) } else { Ok(()) }
}

/// Whether `length` is worth its time: what the ranks send and check grows with the square of their number, and in
/// large worlds shorter vectors take all the same paths.
fn is_in_reach(comm: &dyn Communicator, length: usize) -> bool {
    let world = comm.world_size();
    length * world.pow(2) <= if world <= 4 { 5_000_000 } else { 600_000 }
}

/// What ranks contribute to reductions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Samples {
    /// Anything: the bits of a result depend on the order in which contributions are combined, which is that of the ranks.
    Any,
    /// Floating-point numbers whose sums and products are exact, in any order and rounded at any step, on up to
    /// eight ranks: `±½`, `±1`, `±2`.
    Exact,
}

impl Samples {
    fn of<T: Sample>(self, rank: usize, length: usize) -> Vec<T> {
        match self {
            Samples::Any => values(rank, length),
            Samples::Exact => (0..length).map(|i| T::exact(mixed(rank, i))).collect(),
        }
    }
}

/// Element `i` of rank `rank`: varied, reproducible, of both signs where the type has them.
fn value<T: Sample>(rank: usize, i: usize) -> T {
    T::sample(mixed(rank, i))
}

fn mixed(rank: usize, i: usize) -> u64 {
    let mixed = (rank as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        ^ (i as u64).wrapping_mul(0xD1B5_4A32_D192_ED03);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 32
}

fn values<T: Sample>(rank: usize, length: usize) -> Vec<T> {
    (0..length).map(|i| value(rank, i)).collect()
}

/// An element type with test values.
trait Sample: Element {
    fn sample(bits: u64) -> Self;
    /// One of few values whose sums and products are exact; any integer, since those wrap around.
    fn exact(bits: u64) -> Self;
}

/// `±½`, `±1` or `±2`.
fn power_of_two(bits: u64) -> f32 {
    let magnitude = [0.5, 1.0, 2.0, 1.0][(bits % 4) as usize];
    if bits & 4 == 0 { magnitude } else { -magnitude }
}

macro_rules! sample {
    ($($t:ty: $from:expr, $exact:expr;)*) => { $(impl Sample for $t {
        fn sample(bits: u64) -> Self {
            $from(bits)
        }
        fn exact(bits: u64) -> Self {
            $exact(bits)
        }
    })* };
}
sample! {
    f32: |bits| (bits as i32 as f32) / 65536.0, power_of_two;
    f64: |bits| (bits as i32 as f64) / 65536.0, |bits| power_of_two(bits).into();
    bf16: |bits| bf16::from_f32((bits as i32 as f32) / 1e8), |bits| bf16::from_f32(power_of_two(bits));
    f16: |bits| f16::from_f32((bits as i32 as f32) / 1e8), |bits| f16::from_f32(power_of_two(bits));
    i32: |bits| bits as i32, Self::sample;
    i64: |bits: u64| (bits as i64) << 20, Self::sample;
    u8: |bits| bits as u8, Self::sample;
}

fn assert_same<T: Element>(got: &[T], expected: &[T], what: impl Fn() -> String) {
    assert_eq!(got.len(), expected.len(), "{}", what());
    let (g, e): (&[u8], &[u8]) = (bytemuck::cast_slice(got), bytemuck::cast_slice(expected));
    if g != e {
        let i = got.iter().zip(expected).position(|(g, e)| bytemuck::bytes_of(g) != bytemuck::bytes_of(e));
        let i = i.unwrap_or(0);
        assert_eq!((i, got[i]), (i, expected[i]), "{}", what());
    }
}

/// The reduction that one rank alone would make of everyone's values.
fn reduced<T: Sample>(op: ReduceOp, world: usize, length: usize) -> Vec<T> {
    reduced_of(op, Samples::Any, world, length)
}

/// As [`reduced`], of everyone's samples.
fn reduced_of<T: Sample>(op: ReduceOp, of: Samples, world: usize, length: usize) -> Vec<T> {
    let all: Vec<Vec<T>> = (0..world).map(|rank| of.of(rank, length)).collect();
    let parts: Vec<&[T]> = all.iter().map(Vec::as_slice).collect();
    let mut out = vec![T::zeroed(); length];
    fold(op, &parts, &mut out);
    out
}

fn reductions<T: Sample>(comm: &dyn Communicator, of: Samples, lengths: &[usize]) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    for &length in lengths.iter().filter(|length| is_in_reach(comm, **length)) {
        // Long vectors are about chunks, not about arithmetic: two operations will do.
        let worth = |op: &ReduceOp| length < 10_000 || matches!(op, ReduceOp::Sum | ReduceOp::Mean);
        // A mean over other numbers of ranks is not exact.
        let worth = |op: &ReduceOp| {
            worth(op) && (of == Samples::Any || *op != ReduceOp::Mean || world.is_power_of_two())
        };
        for op in ReduceOp::ALL.into_iter().filter(|op| op.allows(T::DTYPE) && worth(op)) {
            let what = |call: &str| format!("{call} {op} of {length} {:?} on {world} ranks", T::DTYPE);
            let expected: Vec<T> = reduced_of(op, of, world, length);
            let mut data: Vec<T> = of.of(rank, length);
            comm.all_reduce(&mut data, op)?;
            assert_same(&data, &expected, || what("all_reduce"));

            let input: Vec<T> = of.of(rank, length);
            let mut output = vec![T::zeroed(); length];
            comm.all_reduce_into(&input, &mut output, op)?;
            assert_same(&output, &expected, || what("all_reduce_into"));
            assert_same(&input, &of.of(rank, length), || what("the input of all_reduce_into"));

            let root = length % world;
            let mut data: Vec<T> = of.of(rank, length);
            comm.reduce(&mut data, op, root)?;
            let kept = of.of(rank, length);
            assert_same(&data, if rank == root { &expected } else { &kept }, || what("reduce"));

            let input: Vec<T> = of.of(rank, length * world);
            let mut output = vec![T::zeroed(); length];
            comm.reduce_scatter(&input, &mut output, op)?;
            let expected: Vec<T> = reduced_of(op, of, world, length * world);
            assert_same(&output, &expected[rank * length..][..length], || what("reduce_scatter"));

            let mut data = input;
            comm.reduce_scatter_in_place(&mut data, op)?;
            let mine = rank * length..(rank + 1) * length;
            assert_same(&data[mine.clone()], &expected[mine], || what("reduce_scatter_in_place"));
        }
    }
    Ok(())
}

fn movements<T: Sample>(comm: &dyn Communicator, length: usize) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let what = |call: &str| format!("{call} of {length} {:?} on {world} ranks", T::DTYPE);
    let everyone: Vec<T> = (0..world).flat_map(|r| values::<T>(r, length)).collect();
    let mine: Vec<T> = values(rank, length);

    let mut output = vec![T::zeroed(); world * length];
    comm.all_gather(&mine, &mut output)?;
    assert_same(&output, &everyone, || what("all_gather"));

    let mut data = vec![T::zeroed(); world * length];
    data[rank * length..][..length].copy_from_slice(&mine);
    comm.all_gather_in_place(&mut data)?;
    assert_same(&data, &everyone, || what("all_gather_in_place"));

    let counts: Vec<usize> = (0..world).map(|r| (length + 7 * r) % (length + 3)).collect();
    let ragged: Vec<T> = counts.iter().enumerate().flat_map(|(r, n)| values::<T>(r, *n)).collect();
    let mut output = vec![T::zeroed(); ragged.len()];
    comm.all_gather_counts(&values::<T>(rank, counts[rank]), &counts, &mut output)?;
    assert_same(&output, &ragged, || what("all_gather_counts"));

    let part = |from: usize, to: usize| values::<T>(from * world + to, length);
    let input: Vec<T> = (0..world).flat_map(|to| part(rank, to)).collect();
    let mut output = vec![T::zeroed(); world * length];
    comm.all_to_all(&input, &mut output)?;
    let expected: Vec<T> = (0..world).flat_map(|from| part(from, rank)).collect();
    assert_same(&output, &expected, || what("all_to_all"));

    // Every pair of ranks has a length of its own, some of them 0.
    let count = |from: usize, to: usize| (length + 5 * from + 3 * to) % (length / 2 + 2);
    let ragged = |from: usize, to: usize| values::<T>(from * world + to, count(from, to));
    let counts =
        |of: &dyn Fn(usize) -> (usize, usize)| (0..world).map(of).map(|(from, to)| count(from, to)).collect();
    let (send, recv): (Vec<usize>, Vec<usize>) = (counts(&|to| (rank, to)), counts(&|from| (from, rank)));
    let input: Vec<T> = (0..world).flat_map(|to| ragged(rank, to)).collect();
    let expected: Vec<T> = (0..world).flat_map(|from| ragged(from, rank)).collect();
    let mut output = vec![T::zeroed(); expected.len()];
    comm.all_to_all_v(&input, &send, &mut output, &recv)?;
    assert_same(&output, &expected, || what("all_to_all_v"));

    // A long vector from every root would tell nothing new.
    for root in (0..world).filter(|root| length < 10_000 || *root == length % world) {
        let mut data = mine.clone();
        comm.broadcast(&mut data, root)?;
        assert_same(&data, &values(root, length), || what("broadcast"));

        let mut output = vec![T::zeroed(); if rank == root { world * length } else { 0 }];
        comm.gather(&mine, &mut output, root)?;
        let expected = if rank == root { &everyone[..] } else { &[] };
        assert_same(&output, expected, || what("gather"));

        let input = if rank == root { &everyone[..] } else { &[] };
        let mut output = vec![T::zeroed(); length];
        comm.scatter(input, &mut output, root)?;
        assert_same(&output, &mine, || what("scatter"));
    }
    Ok(())
}

/// Calls on memory of the group's heap, on pieces of it that lie elsewhere on each rank, and where some ranks pass other
/// memory or gather in place and others do not: the results are the same.
fn heap<T: Sample>(comm: &dyn Communicator, of: Samples, length: usize) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let what = |call: &str| format!("{call} of {length} {:?} in the heap on {world} ranks", T::DTYPE);
    let mut buffer = comm.alloc::<T>(world * length + 64 * world)?;
    assert!(buffer.iter().all(|x| *x == T::zeroed()), "{}", what("alloc"));
    let expected: Vec<T> = reduced_of(ReduceOp::Sum, of, world, length);
    for start in [0, 64 * rank] {
        let data = &mut buffer[start..start + length];
        data.copy_from_slice(&of.of(rank, length));
        comm.all_reduce(data, ReduceOp::Sum)?;
        assert_same(data, &expected, || what("all_reduce"));
    }

    let input: Vec<T> = of.of(rank, length * world);
    let sums: Vec<T> = reduced_of(ReduceOp::Sum, of, world, length * world);
    let mine = rank * length..(rank + 1) * length;
    let place = 64 * rank..64 * rank + world * length;
    for in_place in [rank % 2 == 0, true, false] {
        let data = &mut buffer[place.clone()];
        data.copy_from_slice(&input);
        if in_place {
            comm.reduce_scatter_in_place(data, ReduceOp::Sum)?;
            assert_same(&data[mine.clone()], &sums[mine.clone()], || what("reduce_scatter_in_place"));
        } else {
            let mut output = vec![T::zeroed(); length];
            comm.reduce_scatter(data, &mut output, ReduceOp::Sum)?;
            assert_same(&output, &sums[mine.clone()], || what("reduce_scatter"));
        }
    }

    let everyone: Vec<T> = (0..world).flat_map(|r| values::<T>(r, length)).collect();
    for in_place in [rank % 2 == 0, true, false] {
        let data = &mut buffer[place.clone()];
        data[mine.clone()].copy_from_slice(&everyone[mine.clone()]);
        if in_place {
            comm.all_gather_in_place(data)?;
            assert_same(data, &everyone, || what("all_gather_in_place"));
        } else {
            let mut output = vec![T::zeroed(); world * length];
            comm.all_gather(&data[mine.clone()], &mut output)?;
            assert_same(&output, &everyone, || what("all_gather"));
        }
    }

    let root = world - 1;
    let data = &mut buffer[..length];
    data.copy_from_slice(&values(rank, length));
    comm.broadcast(data, root)?;
    assert_same(data, &values(root, length), || what("broadcast"));

    // One rank's memory is not the heap's.
    let mut other = of.of(rank, length);
    let data = if rank == 0 { &mut other[..] } else { &mut buffer[..length] };
    data.copy_from_slice(&of.of(rank, length));
    comm.all_reduce(data, ReduceOp::Sum)?;
    assert_same(data, &expected, || what("all_reduce, one rank elsewhere"));
    drop(buffer);

    // The heap is gone here; what comes after it works as before.
    let mut data: Vec<T> = of.of(rank, length);
    comm.all_reduce(&mut data, ReduceOp::Sum)?;
    assert_same(&data, &expected, || what("all_reduce after it"));
    let mut data: Vec<T> = of.of(rank, length);
    let mut output = vec![T::zeroed(); length];
    match rank % 2 {
        0 => comm.all_reduce(&mut data, ReduceOp::Sum)?,
        _ => comm.all_reduce_into(&data, &mut output, ReduceOp::Sum)?,
    }
    let result = if rank % 2 == 0 { &data } else { &output };
    assert_same(result, &expected, || what("all_reduce in place on some ranks"));
    Ok(())
}

fn point_to_point(comm: &dyn Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    if world == 1 {
        return Ok(());
    }
    // Around the ring: even ranks send first, so that it works however little a backend buffers.
    let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
    for length in [0, 5, 100_000] {
        let mine: Vec<i64> = values(rank, length);
        let mut theirs = vec![0i64; length];
        if rank % 2 == 0 {
            comm.send(&mine, next)?;
            comm.recv(&mut theirs, before)?;
        } else {
            comm.recv(&mut theirs, before)?;
            comm.send(&mine, next)?;
        }
        assert_same(&theirs, &values(before, length), || format!("recv of {length} on {world} ranks"));
    }
    Ok(())
}

fn objects(comm: &dyn Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let object = |rank: usize| (format!("rank {rank}"), vec![rank as u32; 1000 * rank], Some(-1.5f64));
    let everyone: Vec<_> = (0..world).map(object).collect();
    assert_eq!(comm.all_gather_object(&object(rank))?, everyone);
    let bytes: Vec<Vec<u8>> = (0..world).map(|r| vec![r as u8; 3 * r]).collect();
    assert_eq!(comm.all_gather_v(&bytes[rank])?, bytes);
    let root = world - 1;
    let gathered = comm.gather_object(&object(rank), root)?;
    assert_eq!(gathered, (rank == root).then(|| everyone.clone()));
    let given = object(root);
    assert_eq!(comm.broadcast_object((rank == root).then_some(&given), root)?, given);
    let scattered = comm.scatter_object((rank == root).then_some(&everyone[..]), root)?;
    assert_eq!(scattered, everyone[rank]);
    assert!(comm.all_gather_object(&f64::NAN)?.iter().all(|x| x.is_nan()));
    Ok(())
}

/// Mistakes that one rank can see by itself are refused there, and the group stays usable.
fn callers_mistakes(comm: &dyn Communicator) -> Result<()> {
    let world = comm.world_size();
    let (mut output, mut no_multiple) = (vec![0f32; 4 * world + 1], vec![0f32; world * 2 + 1]);
    assert!(matches!(comm.all_gather(&[0f32; 4], &mut output), Err(Error::Length { .. })));
    assert!(matches!(comm.broadcast(&mut output, world), Err(Error::Rank { .. })));
    assert!(matches!(comm.all_reduce(&mut [1i32], ReduceOp::Mean), Err(Error::Unsupported { .. })));
    assert!(matches!(comm.send(&[1f32], comm.rank()), Err(Error::OwnRank { .. })));
    assert!(matches!(comm.subgroup(&[]), Err(Error::Members { .. })));
    assert!(matches!(comm.subgroup(&[0, 0]), Err(Error::Members { .. })));
    if world > 1 {
        assert!(matches!(comm.all_gather_in_place(&mut no_multiple), Err(Error::Uneven { .. })));
    }
    Ok(())
}

fn subgroups(comm: &dyn Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    // Pairs, singles at the end, and everyone backwards; all alive at the same time.
    let mut lists: Vec<Vec<usize>> =
        (0..world).step_by(2).map(|r| (r..(r + 2).min(world)).collect()).collect();
    lists.push((0..world).rev().collect());
    let mut groups: Vec<(Vec<usize>, Arc<dyn Communicator>)> = Vec::new();
    for list in lists {
        let group = comm.subgroup(&list)?;
        assert_eq!(group.is_some(), list.contains(&rank));
        groups.extend(group.map(|group| (list, group)));
    }
    for (list, group) in &groups {
        assert_eq!(list[group.rank()], rank);
        let world_ranks: Vec<usize> = list.iter().map(|r| comm.ranks()[*r]).collect();
        assert_eq!(group.ranks(), world_ranks);
        let mut sum = [rank as i64];
        group.all_reduce(&mut sum, ReduceOp::Sum)?;
        assert_eq!(sum[0], list.iter().sum::<usize>() as i64);
        let inner = group.subgroup(&[0])?;
        if let Some(inner) = inner {
            inner.barrier()?;
        }
    }
    comm.barrier()
}

/// Rank 0 makes one call, the others another: every rank must learn of both. The group is dead afterwards.
///
/// # Panics
/// If a rank gets anything but [`Error::Mismatch`].
pub fn mismatch(comm: &dyn Communicator, case: Mismatch) {
    let odd = comm.rank() == 0;
    let result = match case {
        Mismatch::Call => {
            if odd {
                comm.barrier()
            } else {
                comm.all_reduce(&mut [1f32], ReduceOp::Sum)
            }
        }
        Mismatch::Dtype => {
            if odd {
                comm.all_reduce(&mut [1f32; 8], ReduceOp::Sum)
            } else {
                comm.all_reduce(&mut [1i32; 8], ReduceOp::Sum)
            }
        }
        Mismatch::Count => comm.all_reduce(&mut vec![1f32; if odd { 100_000 } else { 3 }], ReduceOp::Sum),
        Mismatch::Op => comm.all_reduce(&mut [1f32], if odd { ReduceOp::Sum } else { ReduceOp::Max }),
        Mismatch::Root => comm.broadcast(&mut [1f32], usize::from(odd)),
        Mismatch::Pair => {
            // Rank 0 sends one element too few to rank 1, which expects three from everyone.
            let world = comm.world_size();
            let (mut send, recv) = (vec![3; world], vec![3; world]);
            send[1] -= usize::from(odd);
            let (input, mut output) = (vec![1f32; send.iter().sum()], vec![0f32; 3 * world]);
            comm.all_to_all_v(&input, &send, &mut output, &recv)
        }
        Mismatch::Members => comm.subgroup(if odd { &[0] } else { &[1] }).map(drop),
        // These begin with the same collective: what it carries tells them apart.
        Mismatch::Objects => {
            if odd {
                comm.all_gather_object(&1u8).map(drop)
            } else {
                comm.gather_object(&1u8, 0).map(drop)
            }
        }
        Mismatch::Fused => {
            let (mut a, mut b) = ([1f32; 3], [1i64; 2]);
            if odd {
                comm.all_reduce_many([(&mut a[..]).into(), (&mut b[..]).into()], ReduceOp::Sum)
            } else {
                comm.broadcast_many([(&mut a[..]).into(), (&mut b[..]).into()], 0)
            }
        }
    };
    match result {
        Err(Error::Mismatch { rank, mine, other, theirs, .. }) => {
            assert!(rank == 0 || other == 0, "neither {rank} nor {other} is the odd one");
            assert_ne!(mine, theirs, "{case:?}");
        }
        other => panic!("{case:?}: rank {} got {other:?}", comm.rank()),
    }
    assert!(matches!(comm.barrier(), Err(Error::Mismatch { .. })), "{case:?}: the group is not poisoned");
}

/// What ranks may disagree in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // Each is an argument of a call.
pub enum Mismatch {
    Call,
    Dtype,
    Count,
    Op,
    Root,
    Pair,
    Members,
    Objects,
    Fused,
}

impl Mismatch {
    /// All cases.
    pub const ALL: [Mismatch; 9] = [
        Mismatch::Call,
        Mismatch::Dtype,
        Mismatch::Count,
        Mismatch::Op,
        Mismatch::Root,
        Mismatch::Pair,
        Mismatch::Members,
        Mismatch::Objects,
        Mismatch::Fused,
    ];
}
