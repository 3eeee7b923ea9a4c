//! The part of the suite for what is built on a communicator's calls: pending ones, fused ones, meshes, objects that fail

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use half::bf16;
use serde::de::{Deserialize, Deserializer};
use serde::ser::{Error as _, Serialize, Serializer};

use super::{Sample, assert_same, reduced, values};
use crate::buffer::BufferMut;
use crate::communicator::{Communicator, CommunicatorExt, GroupOptions};
use crate::error::{Error, Result};
use crate::group::MeshGroups;
use crate::mesh::DeviceMesh;
use crate::op::{Element, ReduceOp};
use crate::pending::Pending;
use crate::queue::Queue;

/// Everything in this file, on host memory.
pub(super) fn derived(comm: &dyn Communicator) -> Result<()> {
    let all: Vec<usize> = (0..comm.world_size()).collect();
    let options = GroupOptions::default().exclusive();
    // Every member is in the list.
    let Some(own) = comm.subgroup_with(&all, &options)? else { return Ok(()) };
    // In a block, packed, and large among small.
    for lengths in [&[0, 1, 5][..], &[100, 7, 0, 300, 64], &[1000, 9000, 3]] {
        many(comm, lengths)?;
    }
    // More than a bucket of small ones.
    many(comm, &[8000; 10])?;
    maps(comm)?;
    different_entries(comm)?;
    refusals(comm)?;
    long_objects(comm)?;
    deadline_of_one_call(comm)?;
    pending(&own)?;
    failures_while_pending(&own)?;
    own.barrier()?;
    shared_groups(comm)?;
    meshes(&own)?;
    comm.barrier()
}

/// One tensor of each length and several types, reduced and broadcast together and one by one.
fn many(comm: &dyn Communicator, lengths: &[usize]) -> Result<()> {
    fn tensors<T: Sample>(rank: usize, lengths: &[usize]) -> Vec<Vec<T>> {
        lengths.iter().enumerate().map(|(i, n)| values::<T>(1000 * i + rank, *n)).collect()
    }
    fn buffers<T: Element>(tensors: &mut [Vec<T>]) -> impl Iterator<Item = BufferMut<'_>> {
        tensors.iter_mut().map(|tensor| tensor.as_mut_slice().into())
    }
    let (rank, world) = (comm.rank(), comm.world_size());
    // Long lists are about packing, not about arithmetic.
    let short = lengths.iter().sum::<usize>() < 10_000;
    for op in [ReduceOp::Sum, ReduceOp::Max].into_iter().take(if short { 2 } else { 1 }) {
        let (mut a, mut b, mut c) =
            (tensors::<f32>(rank, lengths), tensors::<bf16>(rank, lengths), tensors::<u8>(rank, lengths));
        let (mut one_a, mut one_b, mut one_c) = (a.clone(), b.clone(), c.clone());
        let mixed = buffers(&mut a).zip(buffers(&mut b)).zip(buffers(&mut c));
        comm.all_reduce_many(mixed.flat_map(|((a, b), c)| [a, b, c]), op)?;
        for (i, length) in lengths.iter().enumerate() {
            comm.all_reduce(&mut one_a[i], op)?;
            comm.all_reduce(&mut one_b[i], op)?;
            comm.all_reduce(&mut one_c[i], op)?;
            let what = || format!("tensor {i} of {length} of {lengths:?} in all_reduce_many, {world} ranks");
            assert_same(&a[i], &one_a[i], what);
            assert_same(&b[i], &one_b[i], what);
            assert_same(&c[i], &one_c[i], what);
        }
    }
    let root = lengths.len() % world;
    let (mut a, mut b) = (tensors::<f64>(rank, lengths), tensors::<u8>(rank, lengths));
    comm.broadcast_many(buffers(&mut a).zip(buffers(&mut b)).flat_map(|(a, b)| [a, b]), root)?;
    let what = || format!("{lengths:?} in broadcast_many, {world} ranks");
    assert_same(&a.concat(), &tensors::<f64>(root, lengths).concat(), what);
    assert_same(&b.concat(), &tensors::<u8>(root, lengths).concat(), what);
    Ok(())
}

fn maps(comm: &dyn Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let ops = |key: &str| match &key[..3] {
        "max" => ReduceOp::Max,
        "sum" => ReduceOp::Sum,
        _ => ReduceOp::Mean,
    };
    // A training step's status fits in a block; a thousand numbers do not.
    for keys in [0, 3, 20, 1000] {
        let prefix = |i: usize| ["max", "sum", "mean"][i % 3];
        let name = |i: usize| format!("{}/{i:04}", prefix(i));
        let mut mine: BTreeMap<String, f64> = (0..keys).map(name).zip(values::<f64>(rank, keys)).collect();
        comm.all_reduce_map_by(&mut mine, ops)?;
        let expected = |op| reduced::<f64>(op, world, keys);
        let (max, sum, mean) = (expected(ReduceOp::Max), expected(ReduceOp::Sum), expected(ReduceOp::Mean));
        for i in 0..keys {
            let expected = [&max, &sum, &mean][i % 3][i];
            assert_eq!(mine[&name(i)].to_bits(), expected.to_bits(), "{i} of {keys} on {world} ranks");
        }
    }
    let mut vectors = BTreeMap::from([("a".to_string(), values::<f32>(rank, 10)), ("b".into(), vec![])]);
    comm.all_reduce_map(&mut vectors, ReduceOp::Min)?;
    assert_same(&vectors["a"], &reduced::<f32>(ReduceOp::Min, world, 10), || "a map of vectors".into());
    Ok(())
}

/// Ranks that give other keys, or tensors of other lengths, all hear which; then they may go on.
fn different_entries(comm: &dyn Communicator) -> Result<()> {
    let (odd, world) = (comm.rank() == 0, comm.world_size());
    if world == 1 {
        return Ok(());
    }
    for keys in [2, 300] {
        let mut status: BTreeMap<String, f64> = (0..keys).map(|i| (format!("key {i}"), 1.0)).collect();
        status.insert(if odd { "los" } else { "loss" }.into(), 2.0);
        match comm.all_reduce_map(&mut status, ReduceOp::Sum) {
            Err(Error::Entries { differing, .. }) => {
                let heard: Vec<(&str, &[usize])> = differing.iter().map(|d| (&*d.key, &*d.ranks)).collect();
                assert_eq!(heard, [("los", &comm.ranks()[..1]), ("loss", &comm.ranks()[1..])]);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(status["key 1"], 1.0, "reduced in spite of the error");
    }
    // The same number of elements in all, cut in another way.
    let (mut long, mut short) = ([1f32; 3], [1f32; 2]);
    let (long, short) = (BufferMut::from(&mut long[..]), BufferMut::from(&mut short[..]));
    let tensors = if odd { [long, short] } else { [short, long] };
    match comm.all_reduce_many(tensors, ReduceOp::Sum) {
        Err(Error::Entries { differing, .. }) => assert_eq!(differing.len(), 4, "{differing:?}"),
        other => panic!("{other:?}"),
    }
    let mut status = BTreeMap::from([("kl".to_string(), 1.0f32)]);
    let result = comm.all_reduce_map_by(&mut status, |_| if odd { ReduceOp::Max } else { ReduceOp::Sum });
    assert!(matches!(result, Err(Error::Entries { .. })), "{result:?}");
    comm.barrier()
}

/// An object that cannot be written, on some ranks.
struct Stubborn {
    refuses: bool,
}

impl Serialize for Stubborn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.refuses { Err(S::Error::custom("no words for it")) } else { serializer.serialize_bool(false) }
    }
}

impl<'de> Deserialize<'de> for Stubborn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Stubborn { refuses: bool::deserialize(deserializer)? })
    }
}

/// A rank that has no object to send is named on all ranks, none of which waits for it; then they may go on.
fn refusals(comm: &dyn Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let odd = world / 2;
    let named = comm.ranks()[odd];
    let object = Stubborn { refuses: rank == odd };
    let unwritable = |result: Result<()>| match result {
        Err(Error::Encode { rank, source, .. }) => {
            assert_eq!(rank, named);
            assert!(source.to_string().contains("no words for it"), "{source}");
        }
        other => panic!("rank {rank} got {other:?}"),
    };
    unwritable(comm.all_gather_object(&object).map(drop));
    unwritable(comm.gather_object(&object, 0).map(drop));
    unwritable(comm.gather_object(&object, odd).map(drop));
    unwritable(comm.broadcast_object(Some(&object), odd).map(drop));
    let objects: Vec<Stubborn> = (0..world).map(|i| Stubborn { refuses: i + 1 == world }).collect();
    unwritable(comm.scatter_object((rank == odd).then_some(&objects[..]), odd).map(drop));

    let missing = |result: Result<()>| match result {
        Err(Error::Argument { rank, .. }) => assert_eq!(rank, named),
        other => panic!("rank {rank} got {other:?}"),
    };
    missing(comm.broadcast_object::<u8>(None, odd).map(drop));
    missing(comm.scatter_object::<u8>(None, odd).map(drop));
    missing(comm.scatter_object(Some(&vec![1u8; world + 1][..]), odd).map(drop));
    comm.barrier()
}

/// Objects around and far beyond what fits in a block, on some ranks and on all.
fn long_objects(comm: &dyn Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    for longest in [980, 990, 1000, 100_000] {
        let object =
            |rank: usize| vec![rank as u32 + 200; if rank.is_multiple_of(2) { longest / 5 } else { 1 }];
        let everyone: Vec<Vec<u32>> = (0..world).map(object).collect();
        assert_eq!(comm.all_gather_object(&object(rank))?, everyone, "all_gather_object, {longest}");
        for root in [0, world - 1] {
            let gathered = comm.gather_object(&object(rank), root)?;
            assert_eq!(gathered, (rank == root).then(|| everyone.clone()), "gather_object, {longest}");
            let given = everyone[root].clone();
            let mine = (rank == root).then_some(&given);
            assert_eq!(comm.broadcast_object(mine, root)?, given, "broadcast_object, {longest}");
            let mine = (rank == root).then_some(&everyone[..]);
            assert_eq!(comm.scatter_object(mine, root)?, everyone[rank], "scatter_object, {longest}");
        }
    }
    for bytes in [991, 992, 993] {
        let all = comm.all_gather_v(&vec![rank as u8; bytes])?;
        assert_eq!(all, (0..world).map(|r| vec![r as u8; bytes]).collect::<Vec<_>>());
    }
    Ok(())
}

fn deadline_of_one_call(comm: &dyn Communicator) -> Result<()> {
    let patient = comm.within(Duration::from_secs(30));
    let mut sum = [1i32];
    patient.all_reduce(&mut sum, ReduceOp::Sum)?;
    assert_eq!(sum[0] as usize, comm.world_size());
    assert_eq!((patient.rank(), patient.ranks()), (comm.rank(), comm.ranks()));
    Ok(())
}

/// Many calls under way at once, with blocking ones between them, end in order and with the right results.
fn pending(comm: &Arc<dyn Communicator>) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let queue = Queue::new(comm.clone())?;
    let sums: Vec<_> =
        (0..20).map(|i| queue.all_reduce(values::<f32>(rank, 300 * i), ReduceOp::Sum)).collect();
    let everyone = queue.all_gather(values::<i64>(rank, 100));
    // Takes its turn behind what was given.
    let mut blocking = [rank as i64];
    let seam: &dyn Communicator = &queue;
    seam.all_reduce(&mut blocking, ReduceOp::Sum)?;
    assert_eq!(blocking[0] as usize, world * (world - 1) / 2);
    assert!(sums.iter().all(Pending::is_done));
    let root = world - 1;
    let rooted = queue.broadcast(values::<u8>(rank, 999), root);
    let part = queue.reduce_scatter(values::<f32>(rank, 10 * world), ReduceOp::Mean);
    let turned = queue.all_to_all(values::<i32>(rank, 3 * world));
    let gathered = queue.gather(values::<f32>(rank, 5), root);
    let objects = queue.all_gather_object(&format!("rank {rank}"));
    let ragged = queue.all_gather_counts(vec![rank as u8; rank], (0..world).collect());
    let dropped = queue.all_reduce(vec![1f32; 100_000], ReduceOp::Max);
    drop(dropped);
    let last = queue.enqueue(|comm| comm.broadcast_object(Some(&comm.world_size()), 0));

    assert_eq!(last.wait()?, world);
    for (i, sum) in sums.into_iter().enumerate() {
        let expected = reduced::<f32>(ReduceOp::Sum, world, 300 * i);
        assert_same(&sum.wait()?, &expected, || format!("pending all_reduce {i}"));
    }
    let all = |n: usize| (0..world).flat_map(|r| values::<i64>(r, n)).collect::<Vec<i64>>();
    assert_same(&everyone.wait()?, &all(100), || "pending all_gather".into());
    assert_same(&rooted.wait()?, &values::<u8>(root, 999), || "pending broadcast".into());
    let means = reduced::<f32>(ReduceOp::Mean, world, 10 * world);
    assert_same(&part.wait()?, &means[10 * rank..][..10], || "pending reduce_scatter".into());
    let parts: Vec<i32> =
        (0..world).flat_map(|r| values::<i32>(r, 3 * world)[3 * rank..][..3].to_vec()).collect();
    assert_same(&turned.wait()?, &parts, || "pending all_to_all".into());
    let at_root: Vec<f32> = (0..world).flat_map(|r| values::<f32>(r, 5)).collect();
    let expected = if rank == root { &at_root[..] } else { &[] };
    assert_same(&gathered.wait()?, expected, || "pending gather".into());
    let names: Vec<String> = (0..world).map(|r| format!("rank {r}")).collect();
    assert_eq!(objects.wait()?, names);
    let expected: Vec<u8> = (0..world).flat_map(|r| vec![r as u8; r]).collect();
    assert_same(&ragged.wait()?, &expected, || "pending all_gather_counts".into());
    queue.flush();
    Ok(())
}

/// A mistake fails its own call; what was given after it goes on.
fn failures_while_pending(comm: &Arc<dyn Communicator>) -> Result<()> {
    let queue = Queue::new(comm.clone())?;
    let wrong = queue.broadcast(vec![1f32], comm.world_size());
    // Without the hook, which would print it.
    let panicked = queue.enqueue(|_| -> Result<()> { std::panic::resume_unwind(Box::new("as it should")) });
    let right = queue.all_reduce(vec![1i32], ReduceOp::Sum);
    assert!(matches!(wrong.wait(), Err(Error::Rank { .. })));
    let named = comm.ranks()[comm.rank()];
    assert!(matches!(panicked.wait(), Err(Error::Panicked { rank, .. }) if rank == named));
    assert_eq!(right.wait()?, [comm.world_size() as i32]);
    Ok(())
}

/// One live group per list of ranks, on all ranks or on none.
fn shared_groups(comm: &dyn Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    if world == 1 {
        return Ok(());
    }
    let name = |group: &Option<Arc<dyn Communicator>>| group.as_ref().map(|group| group.name().to_string());
    let backwards: Vec<usize> = (0..world).rev().collect();
    let first = comm.subgroup(&backwards)?;
    assert_eq!(name(&comm.subgroup(&backwards)?), name(&first), "a second group of the same ranks");
    let own = comm.subgroup_with(&backwards, &GroupOptions::default().exclusive())?;
    assert_ne!(name(&own), name(&first), "an exclusive group that is shared");
    let other = comm.subgroup_with(&backwards, &GroupOptions::default().timeout(Duration::from_secs(29)))?;
    assert_ne!(name(&other), name(&first), "a group with another deadline");
    // Groups of a part, asked for through different parents, are the same.
    let pair = comm.subgroup(&[0, world - 1])?;
    if let Some(first) = &first {
        assert_eq!(name(&first.subgroup(&[world - 1, 0])?), name(&pair), "through another parent");
    }
    // One rank lets go of its end: then nobody has it.
    let held = first.filter(|_| rank != 0);
    let again = comm.subgroup(&backwards)?;
    assert!(again.is_some() && (held.is_none() || name(&held) != name(&again)), "shared though one let go");
    if let Some(again) = again {
        again.barrier()?;
        // A failure ends the calls of members that are still in an earlier one: all must be out of it first.
        comm.barrier()?;
        // A group that has failed is not given to anybody again.
        let result = if rank == 0 { again.barrier() } else { again.all_reduce(&mut [1f32], ReduceOp::Sum) };
        assert!(matches!(result, Err(Error::Mismatch { .. })), "{result:?}");
        let fresh = comm.subgroup(&backwards)?;
        assert_ne!(name(&fresh), Some(again.name().to_string()), "a dead group was shared");
        fresh.map_or(Ok(()), |fresh| fresh.barrier())?;
    }
    Ok(())
}

/// Meshes over the group: the sum along an axis is that of the ranks on its line.
fn meshes(comm: &Arc<dyn Communicator>) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let inner = (2..=world).find(|n| world.is_multiple_of(*n)).unwrap_or(1);
    let mesh = DeviceMesh::new(&[("dp", world / inner), ("one", 1), ("sp", inner)])?;
    let mut groups = MeshGroups::new(comm.clone(), mesh.clone())?;
    groups.flatten(&["dp", "sp"], "dp_sp")?;
    groups.flatten(&["sp", "dp"], "sp_dp")?;
    let flat = mesh.flatten(&["sp", "dp"], "sp_dp")?;
    let lines = [
        ("dp", mesh.line("dp", rank)?),
        ("one", vec![rank]),
        ("sp", mesh.line("sp", rank)?),
        ("dp_sp", (0..world).collect()),
        ("sp_dp", flat.line("sp_dp", rank)?),
    ];
    for (axis, line) in lines {
        let group = groups.axis(axis)?;
        let world_ranks: Vec<usize> = line.iter().map(|r| comm.ranks()[*r]).collect();
        assert_eq!(group.ranks(), world_ranks, "{axis}");
        let mut sum = [rank as i64];
        group.all_reduce(&mut sum, ReduceOp::Sum)?;
        assert_eq!(sum[0] as usize, line.iter().sum::<usize>(), "{axis}");
    }
    assert!(matches!(groups.flatten(&["dp"], "sp"), Err(Error::Mesh { .. })));
    assert!(matches!(groups.axis("tp"), Err(Error::Mesh { .. })));
    Ok(())
}
