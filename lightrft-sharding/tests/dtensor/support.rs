//! Any mesh, shape and layout; what a rank must hold, found by really splitting; groups that count their calls.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lightrft_collectives::testing::Intercepted;
use lightrft_collectives::{Call, Communicator, DeviceMesh, MeshGroups, local::World};
use lightrft_sharding::{Cuts, Error, Layout, Placement, Region};
use proptest::prelude::*;

/// Sizes of the axes of a mesh of at most eight ranks.
pub(crate) fn meshes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1usize..=8, 1..=3)
        .prop_filter("at most 8 ranks", |sizes| sizes.iter().product::<usize>() <= 8)
}

/// Shapes with zero to three dims, some of them empty.
pub(crate) fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1 => Just(0usize), 12 => 1usize..8], 0..=3)
}

pub(crate) fn mesh(sizes: &[usize]) -> Arc<DeviceMesh> {
    let names: Vec<String> = (0..sizes.len()).map(|axis| format!("a{axis}")).collect();
    let axes: Vec<(&str, usize)> = names.iter().map(String::as_str).zip(sizes.iter().copied()).collect();
    Arc::new(DeviceMesh::new(&axes).unwrap())
}

/// A number for each choice that a layout needs.
pub(crate) type Picks = [u32; 8];

/// Some layout without contributions: replicated, sharded in any order, or ragged along one axis.
pub(crate) fn layout(mesh: &Arc<DeviceMesh>, shape: &[usize], picks: Picks) -> Layout {
    let [a, b, c, kind, axis, order, x, y] = picks.map(|pick| pick as usize);
    let sizes = mesh.sizes();
    if kind % 3 == 0 {
        let ragged = axis % sizes.len();
        let elems: usize = shape.iter().product();
        let inner = (1..sizes[ragged]).map(|i| (x + i * y) % (elems + 1));
        let mut points: Vec<usize> = [0, elems].into_iter().chain(inner).collect();
        points.sort_unstable();
        let mut placements = vec![Placement::Replicate; sizes.len()];
        placements[ragged] = Placement::Ragged(Cuts::new(points).unwrap());
        return Layout::new(Arc::clone(mesh), placements).unwrap();
    }
    let placement = |pick: usize| match pick % (shape.len() + 1) {
        0 => Placement::Replicate,
        dim => Placement::Shard { dim: dim - 1 },
    };
    let placements: Vec<Placement> = [a, b, c].into_iter().take(sizes.len()).map(placement).collect();
    let mut layout = Layout::new(Arc::clone(mesh), placements).unwrap();
    for dim in 0..shape.len() {
        let mut axes = layout.order(dim);
        if !axes.is_empty() {
            let turn = order % axes.len();
            axes.rotate_left(turn);
            if x % 2 == 1 {
                axes.reverse();
            }
        }
        let names: Vec<&str> = axes.iter().map(|&axis| mesh.axes()[axis].as_str()).collect();
        layout = layout.with_order(dim, &names).unwrap();
    }
    layout
}

/// `torch.chunk` as its documentation has it: pieces of `ceil(n / ranks)` until nothing is left, then nothing.
pub(crate) fn torch_chunk(indices: Range<usize>, ranks: usize) -> Vec<Range<usize>> {
    let size = indices.len().div_ceil(ranks);
    let mut rest = indices;
    (0..ranks)
        .map(|_| {
            let end = (rest.start + size).min(rest.end);
            let piece = rest.start..end;
            rest.start = end;
            piece
        })
        .collect()
}

/// The indices in each dim that are left at these coordinates after really splitting, axis by axis.
pub(crate) fn really_split(layout: &Layout, shape: &[usize], coordinates: &[usize]) -> Vec<Range<usize>> {
    let mut left: Vec<Range<usize>> = shape.iter().map(|&n| 0..n).collect();
    for (dim, left) in left.iter_mut().enumerate() {
        for axis in layout.order(dim) {
            *left = torch_chunk(left.clone(), layout.mesh().sizes()[axis]).swap_remove(coordinates[axis]);
        }
    }
    left
}

/// Which elements of the flattened tensor a rank must hold, in its local order.
pub(crate) fn elements(layout: &Layout, shape: &[usize], rank: usize) -> Vec<usize> {
    let coordinates = layout.mesh().coordinates(rank).unwrap();
    for (placement, at) in layout.placements().iter().zip(&coordinates) {
        if let Placement::Ragged(cuts) = placement {
            return cuts.range(*at).collect();
        }
    }
    box_elements(&really_split(layout, shape, &coordinates), shape)
}

/// The elements of a box, row-major, by their places in the flattened tensor.
pub(crate) fn box_elements(ranges: &[Range<usize>], shape: &[usize]) -> Vec<usize> {
    let mut flat = vec![0];
    for (range, size) in ranges.iter().zip(shape) {
        flat = flat.iter().flat_map(|at| range.clone().map(move |index| at * size + index)).collect();
    }
    flat
}

pub(crate) fn ranges(region: &Region) -> Vec<Range<usize>> {
    region.offsets.iter().zip(&region.sizes).map(|(&offset, &size)| offset..offset + size).collect()
}

/// Values that show where they came from; a few are -0.0.
pub(crate) fn values(shape: &[usize]) -> Vec<f32> {
    let elems: usize = shape.iter().product();
    (0..elems).map(|i| if i % 5 == 3 { -0.0 } else { i as f32 + 0.1 }).collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub(crate) fn expected(layout: &Layout, shape: &[usize], rank: usize) -> Vec<u32> {
    let all = bits(&values(shape));
    elements(layout, shape, rank).into_iter().map(|at| all[at]).collect()
}

/// The calls of one rank on all its groups.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<Call>>>);

impl Log {
    pub(crate) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// A group that writes down what is asked of it, and so do the groups made of it.
fn counted(comm: Arc<dyn Communicator>, log: &Log) -> Arc<dyn Communicator> {
    let log = log.clone();
    Arc::new(Intercepted::new(comm, move |comm, operation, timeout| {
        log.0.lock().unwrap().push(operation.call());
        comm.run_within(operation, timeout)
    }))
}

/// Runs a rank's function on every rank of a mesh; returns what they return, by rank.
pub(crate) fn on_mesh<T: Send>(
    mesh: &Arc<DeviceMesh>,
    rank_main: impl Fn(usize, &Arc<MeshGroups>, &Log) -> Result<T, Error> + Sync,
) -> Vec<T> {
    let world = World::new(mesh.ranks().len()).timeout(Duration::from_secs(60));
    let results = world.launch(|inner| {
        let log = Log::default();
        let rank = inner.rank();
        let groups = Arc::new(MeshGroups::new(counted(inner, &log), (**mesh).clone())?);
        log.take();
        rank_main(rank, &groups, &log)
    });
    results.unwrap()
}
