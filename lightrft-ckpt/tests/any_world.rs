//! Saved by any number of ranks in any cut, read by any other number in any other cut: the same elements.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lightrft_ckpt::testing::{Observed, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Agreement as _, Alone, Checkpoints, Part, Region, Restore, Rotation, Saver, Snapshot, Verify, Wanted,
    Which,
};
use proptest::prelude::*;

/// How a tensor lies over the ranks.
#[derive(Clone, Debug)]
enum Cut {
    /// Cut flat at these places; rank r holds the r-th piece, which may be empty.
    Flat(Vec<usize>),
    /// Even boxes along this dim, in torch's chunk rule: the last may be smaller or empty.
    Dim(usize),
    /// Every rank has all of it.
    Replicated,
}

#[derive(Clone, Debug)]
struct Tensor {
    shape: Vec<usize>,
    cut: Cut,
}

impl Tensor {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn region(&self, rank: usize, world: usize) -> Region {
        match &self.cut {
            Cut::Flat(places) => {
                let at = |i: usize| match i {
                    0 => 0,
                    i if i >= world => self.elements(),
                    i => places[i - 1] % (self.elements() + 1),
                };
                let mut ends: Vec<usize> = (0..=world).map(at).collect();
                ends.sort_unstable();
                Region::Flat(ends[rank]..ends[rank + 1])
            }
            Cut::Dim(dim) => {
                let dim = dim % self.shape.len();
                let chunk = self.shape[dim].div_ceil(world);
                let begin = (chunk * rank).min(self.shape[dim]);
                let mut start = vec![0; self.shape.len()];
                let mut extent = self.shape.clone();
                start[dim] = begin;
                extent[dim] = chunk.min(self.shape[dim] - begin);
                Region::Box { start, extent }
            }
            Cut::Replicated => Region::Whole,
        }
    }
}

/// The elements of a region, picked one by one: the slow way that cannot be wrong.
fn pick(all: &[u32], shape: &[usize], region: &Region) -> Vec<u32> {
    match region {
        Region::Whole => all.to_vec(),
        Region::Flat(range) => all[range.clone()].to_vec(),
        Region::Box { start, extent } => {
            let inside = |at: usize| {
                let mut rest = at;
                (0..shape.len()).rev().all(|d| {
                    let c = rest % shape[d];
                    rest /= shape[d];
                    (start[d]..start[d] + extent[d]).contains(&c)
                })
            };
            (0..all.len()).filter(|&at| inside(at)).map(|at| all[at]).collect()
        }
    }
}

fn tensor() -> impl Strategy<Value = Tensor> {
    let cut = prop_oneof![
        prop::collection::vec(0usize..200, 4).prop_map(Cut::Flat),
        (0usize..3).prop_map(Cut::Dim),
        Just(Cut::Replicated)
    ];
    (prop::collection::vec(0usize..6, 1..4), cut).prop_map(|(shape, cut)| Tensor { shape, cut })
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("layers.{i}.weight")).collect()
}

fn values(tensor: usize, elements: usize) -> Vec<u32> {
    (0..elements).map(|i| (tensor * 1000 + i) as u32).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_world_reads_what_any_other_saved(
        tensors in prop::collection::vec(tensor(), 1..4),
        recut in prop::collection::vec(tensor(), 4),
        (saved_by, read_by) in (1usize..5, 1usize..5),
    ) {
        let disk = SimulatedDisk::new();
        let names = names(tensors.len());
        run_ranks(saved_by, |group| {
            let (rank, world) = (group.rank(), group.world_size());
            let regions: Vec<Region> = tensors.iter().map(|t| t.region(rank, world)).collect();
            let held: Vec<Vec<u32>> = (tensors.iter().zip(&regions).enumerate())
                .map(|(i, (t, region))| pick(&values(i, t.elements()), &t.shape, region)).collect();
            let mut snapshot = Snapshot::of_step(1);
            snapshot.rank_state = serde_json::json!({ "rank": rank });
            for (i, t) in tensors.iter().enumerate() {
                snapshot.parts.push(Part::new(&names[i], &t.shape, regions[i].clone(), &held[i]));
            }
            let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &group).unwrap();
            saver.save(&group, &snapshot, &Rotation::default()).unwrap();
        });
        let read = run_ranks(read_by, |group| {
            let checkpoints = Checkpoints::open_on(Arc::new(disk.clone()), "/c");
            let (checkpoint, _) = checkpoints.load_together(&group, Which::Newest, Verify::Everything).unwrap();
            assert_eq!(checkpoint.rank_states().len(), saved_by);
            assert_eq!(checkpoint.rank_states()[saved_by - 1]["rank"], saved_by - 1);
            let regions: Vec<Region> = tensors.iter().zip(&recut)
                .map(|(t, recut)| Tensor { shape: t.shape.clone(), cut: recut.cut.clone() })
                .map(|t| t.region(group.rank(), group.world_size()))
                .collect();
            let expected: Vec<Vec<u32>> = (tensors.iter().zip(&regions).enumerate())
                .map(|(i, (t, region))| pick(&values(i, t.elements()), &t.shape, region)).collect();
            // All at once, and one by one.
            let mut got: Vec<Vec<u32>> = expected.iter().map(|e| vec![u32::MAX; e.len()]).collect();
            let mut wanted: Vec<Wanted<'_>> = (got.iter_mut().enumerate())
                .map(|(i, into)| Wanted::new(&names[i], &tensors[i].shape, regions[i].clone(), into)).collect();
            checkpoint.read_many(&mut wanted).unwrap();
            assert_eq!(got, expected);
            for (i, region) in regions.iter().enumerate() {
                assert_eq!(checkpoint.read_vec::<u32>(&names[i], region).unwrap(), expected[i]);
            }
            // And in one pass.
            let mut restored: Vec<Vec<u32>> = expected.iter().map(|e| vec![u32::MAX; e.len()]).collect();
            let (again, report) = checkpoints.restore(&group, &Restore::default(), &mut restored, |restored, _| {
                Ok((restored.iter_mut().enumerate())
                    .map(|(i, into)| Wanted::new(names[i].clone(), tensors[i].shape.clone(), regions[i].clone(), into)).collect())
            }).unwrap();
            assert_eq!((restored, again.step(), report.skipped), (expected, 1, vec![]));
            checkpoint.step()
        });
        prop_assert_eq!(read, vec![1; read_by]);
    }
}

/// Bytes read from shards through a file system made by [`counting`].
type Count = Arc<AtomicU64>;

fn counting(disk: &SimulatedDisk) -> (Count, Checkpoints) {
    let count = Count::default();
    let counter = count.clone();
    let counted = Observed::new(disk.clone(), move |operation| {
        if operation.kind == "read" && operation.path.to_string_lossy().contains("rank-") {
            counter.fetch_add(operation.bytes, Ordering::Relaxed);
        }
        Ok(())
    });
    (count, Checkpoints::open_on(Arc::new(counted), "/c"))
}

/// Saves tensors of 16 MiB by 4 ranks, reads them by 3, and returns by how much each reader read more than it needed.
fn overhead(saved: &Tensor, wanted: &Tensor, tensors: usize) -> Vec<f64> {
    let elements = saved.elements();
    assert_eq!(elements, 4 << 20);
    let mut all: Vec<u32> = vec![0; elements];
    all.iter_mut().zip(0u32..).for_each(|(e, i)| *e = i.wrapping_mul(2_654_435_761));
    let held = |tensor: &Tensor, rank, world| match tensor.region(rank, world) {
        Region::Flat(range) => all[range].to_vec(),
        Region::Box { start, extent } => {
            let rows = all.chunks(tensor.shape[1]).skip(start[0]).take(extent[0]);
            rows.flat_map(|row| &row[start[1]..start[1] + extent[1]]).copied().collect()
        }
        Region::Whole => all.clone(),
    };
    let disk = SimulatedDisk::new();
    let names = names(tensors);
    run_ranks(4, |group| {
        let mine = held(saved, group.rank(), 4);
        let mut snapshot = Snapshot::of_step(1);
        for name in &names {
            snapshot.parts.push(Part::new(name, &saved.shape, saved.region(group.rank(), 4), &mine));
        }
        let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &group).unwrap();
        saver.save(&group, &snapshot, &Rotation::default()).unwrap();
    });
    let reader = |rank| {
        let (count, checkpoints) = counting(&disk);
        let (checkpoint, _) = checkpoints.load(Which::Newest, Verify::WhileReading).unwrap();
        let expected = held(wanted, rank, 3);
        let mut got = vec![vec![0u32; expected.len()]; tensors];
        let mut many: Vec<Wanted<'_>> = (names.iter().zip(&mut got))
            .map(|(name, into)| Wanted::new(name, &wanted.shape, wanted.region(rank, 3), into))
            .collect();
        checkpoint.read_many(&mut many).unwrap();
        assert!(got.iter().all(|got| *got == expected), "rank {rank}");
        count.load(Ordering::Relaxed) as f64 / (4 * tensors * expected.len()) as f64
    };
    (0..3).map(reader).collect()
}

/// Elements behind one checksum.
const BLOCK: usize = 16 * 1024 / 4;

#[test]
fn four_ranks_read_by_three_cost_each_at_most_2_percent_more_than_it_needs() {
    let shape = || vec![1024, 4096];
    let even = |world: usize| (1..world).map(|r| (4 << 20) * r / world).collect::<Vec<_>>();
    let flat = |cuts: Vec<usize>| Tensor { shape: shape(), cut: Cut::Flat(cuts) };
    let rows = || Tensor { shape: shape(), cut: Cut::Dim(0) };
    let columns = || Tensor { shape: shape(), cut: Cut::Dim(1) };
    // Cut by elements, by rows, and from one into the other; and where the cuts fall worst.
    for (saved, wanted) in [
        (flat(even(4)), flat(even(3))),
        (rows(), rows()),
        (flat(even(4)), rows()),
        (rows(), flat(even(3))),
        (flat(even(4)), flat(vec![(1 << 20) + 43 * BLOCK - 1, (2 << 20) + 85 * BLOCK + 1])),
        // All columns of a box are needed, or whole rows of it: no more than what is wanted lies in its blocks.
        (columns(), rows()),
    ] {
        let overheads = overhead(&saved, &wanted, 1);
        assert!(
            overheads.iter().all(|&o| (1.0..=1.02).contains(&o)),
            "{saved:?} to {wanted:?}: {overheads:?}"
        );
    }
    // Of several tensors each is cut anew.
    let overheads = overhead(&flat(even(4)), &flat(even(3)), 3);
    assert!(overheads.iter().all(|&o| (1.0..=1.02).contains(&o)), "{overheads:?}");
}

#[test]
fn floats_of_the_state_come_back_exactly() {
    let disk = SimulatedDisk::new();
    let saver = Saver::open_on(Arc::new(disk), "/c", &Alone).unwrap();
    let exact =
        [0.1, 1e-323, 2.225_073_858_507_201e-308, 5e-324, f64::MAX, 1.0 / 3.0, 8.41e21, 9.5367431640625e-7];
    let mut snapshot = Snapshot::of_step(7);
    snapshot.shared = serde_json::json!({"f": exact, "u": [u64::MAX, 0], "i": i64::MIN});
    saver.save(&Alone, &snapshot, &Rotation::default()).unwrap();
    let (checkpoint, _) = saver.checkpoints().load(Which::Newest, Verify::Everything).unwrap();
    assert_eq!(checkpoint.shared(), &snapshot.shared);
    for (i, f) in exact.iter().enumerate() {
        assert_eq!(checkpoint.shared()["f"][i].as_f64().unwrap().to_bits(), f.to_bits());
    }
}
