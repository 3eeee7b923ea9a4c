//! Saved by any number of ranks in any cut, read by any other number in any other cut: the same elements.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lightrft_ckpt::testing::{Observed, SimulatedDisk, run_ranks};
use lightrft_ckpt::{Agreement as _, Alone, Part, Region, Rotation, Saver, Snapshot, Verify, Which};
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
            let checkpoints = lightrft_ckpt::Checkpoints::open_on(Arc::new(disk.clone()), "/c");
            let (checkpoint, _) = checkpoints.load_together(&group, Which::Newest, Verify::Everything).unwrap();
            assert_eq!(checkpoint.rank_states().len(), saved_by);
            assert_eq!(checkpoint.rank_states()[saved_by - 1]["rank"], saved_by - 1);
            for (i, t) in tensors.iter().enumerate() {
                let wanted = Tensor { shape: t.shape.clone(), cut: recut[i].cut.clone() };
                let region = wanted.region(group.rank(), group.world_size());
                let got: Vec<u32> = checkpoint.read_vec(&names[i], &region).unwrap();
                assert_eq!(got, pick(&values(i, t.elements()), &t.shape, &region));
            }
            checkpoint.step()
        });
        prop_assert_eq!(read, vec![1; read_by]);
    }
}

#[test]
fn a_rank_reads_little_more_than_its_share() {
    // 4 ranks to 3: 8 MiB in one tensor.
    let elements = 2 << 20;
    let all: Vec<u32> = (0..elements as u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
    let disk = SimulatedDisk::new();
    run_ranks(4, |group| {
        let mine = elements * group.rank() / 4..elements * (group.rank() + 1) / 4;
        let mut snapshot = Snapshot::of_step(1);
        snapshot.parts.push(Part::new("w", vec![elements], Region::Flat(mine.clone()), &all[mine]));
        let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &group).unwrap();
        saver.save(&group, &snapshot, &Rotation::default()).unwrap();
    });
    for rank in 0..3 {
        let read = Arc::new(AtomicU64::new(0));
        let counter = read.clone();
        let counted = Observed::new(disk.clone(), move |operation| {
            if operation.kind == "read" && operation.path.to_string_lossy().contains("rank-") {
                counter.fetch_add(operation.bytes, Ordering::Relaxed);
            }
            Ok(())
        });
        let checkpoints = lightrft_ckpt::Checkpoints::open_on(Arc::new(counted), "/c");
        let (checkpoint, _) = checkpoints.load(Which::Newest, Verify::WhileReading).unwrap();
        let mine = elements * rank / 3..elements * (rank + 1) / 3;
        let got: Vec<u32> = checkpoint.read_vec("w", &Region::Flat(mine.clone())).unwrap();
        assert_eq!(got, all[mine.clone()]);
        let needed = mine.len() as u64 * 4;
        let extra = read.load(Ordering::Relaxed) - needed;
        // The two ends of a share may cut a block of 256 KiB each.
        assert!(extra <= 2 * (256 << 10), "rank {rank} read {extra} bytes too many for {needed}");
    }
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
