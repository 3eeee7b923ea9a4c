//! Distributed tensors on the host: this rank's values of a tensor that a mesh of ranks has together.

use std::borrow::Cow;
use std::sync::Arc;

use lightrft_collectives::{CommunicatorExt as _, Dtype, Element, MeshGroups};

use super::exchange::{Sides, copy, elems};
use super::layout::Layout;
use super::local::fill;
use super::path::steps;
use super::placement::Placement;
use super::region::Region;
use super::spec::DTensorSpec;
use crate::agree;
use crate::error::{Error, Result};

/// This rank's part of a tensor that all ranks of a mesh have together.
///
/// ```
/// use std::sync::Arc;
/// use lightrft_collectives::{DeviceMesh, MeshGroups, local::World};
/// use lightrft_sharding::{DTensor, Error, Layout, Placement::{Replicate, Shard}};
///
/// let columns = World::new(2).launch(|comm| {
///     let rank = comm.rank();
///     let groups = Arc::new(MeshGroups::new(comm, DeviceMesh::new(&[("shard", 2)])?)?);
///     let rows = Layout::new(groups.mesh().clone(), [Shard { dim: 0 }])?;
///     // Rank 0 has a 3 x 2 tensor: two rows stay, one goes to rank 1.
///     let full = (rank == 0).then_some([1, 2, 3, 4, 5, 6]);
///     let tensor = DTensor::distribute(&groups, &rows, &[3, 2], full.as_ref().map(|f| &f[..]))?;
///     assert_eq!(tensor.to_local().len(), if rank == 0 { 4 } else { 2 });
///
///     let columns = tensor.redistribute(&rows.placed([Shard { dim: 1 }])?)?; // an all-to-all
///     assert_eq!(columns.full_tensor()?, [1, 2, 3, 4, 5, 6]); // an all-gather
///     Ok::<_, Error>(columns.into_local())
/// })?;
/// assert_eq!(columns, [[1, 3, 5], [2, 4, 6]]);
/// # Ok::<_, Error>(())
/// ```
///
/// Methods named *collective* must be called by every rank of the mesh, in the same order.
#[derive(Clone, Debug)]
pub struct DTensor<T> {
    local: Vec<T>,
    spec: Arc<DTensorSpec>,
    groups: Arc<MeshGroups>,
}

/// As [`DTensor`], over values that lie elsewhere: a parameter within the shard of its unit.
#[derive(Clone, Debug)]
pub struct DTensorView<'a, T> {
    local: &'a [T],
    spec: Arc<DTensorSpec>,
    groups: Arc<MeshGroups>,
}

impl<T: Element> DTensor<T> {
    /// Gives every rank its part of a tensor of this shape that the first rank of the mesh has. *Collective*: a short
    /// comparison of what the ranks ask for, and one scatter (parts of different lengths: all-to-all; the same for all:
    /// broadcast).
    ///
    /// `full` is ignored on other ranks. Partial axes get contributions as [`redistribute`](Self::redistribute) makes them.
    ///
    /// # Errors
    /// On every rank, before values are sent: [`Error::TensorMismatch`] when the ranks ask for different layouts, shapes
    /// or types; [`Error::LocalLength`] when `full` is missing or of another length; [`Error::InvalidLayout`],
    /// [`Error::Redistribute`]. Before anything is sent: [`Error::ForeignMesh`]. Else [`Error::Collective`].
    pub fn distribute(
        groups: &Arc<MeshGroups>,
        layout: &Layout,
        shape: &[usize],
        full: Option<&[T]>,
    ) -> Result<Self> {
        check_mesh(groups, layout)?;
        let planned = parts_of_whole(layout, shape, T::DTYPE);
        let world = groups.world();
        let (rank, ranks) = (world.rank(), world.world_size());
        let root = groups.mesh().ranks().first().copied().unwrap_or(0);
        let full = full.filter(|_| rank == root);
        let got = full.map_or(0, <[T]>::len);
        let expected = match &planned {
            Ok((cut, _)) if rank == root => cut.elems(),
            // Only the root brings values.
            Ok(_) => 0,
            Err(_) => got,
        };
        agree::on_tensor((T::DTYPE, shape, layout), (got, expected), &**world)?;
        let (cut, rest) = planned?;

        let failed = Error::collective("distribution", "a tensor");
        let boxes: Vec<Vec<Region>> = (0..ranks).map(|rank| cut.boxes(rank).unwrap_or_default()).collect();
        let counts: Vec<usize> = boxes.iter().map(|boxes| elems(boxes)).collect();
        let mut local = fill(counts[rank]);
        let whole = [Region::whole(shape)];
        if cut.elems() == 0 {
            // Nothing to send.
        } else if boxes.iter().all(|boxes| boxes == &whole) {
            if let Some(full) = full {
                local.copy_from_slice(full);
            }
            if ranks > 1 {
                world.broadcast(&mut local, root).map_err(failed)?;
            }
        } else {
            let mut packed = Vec::new();
            if let Some(full) = full {
                packed = fill(counts.iter().sum());
                let mut rest = packed.as_mut_slice();
                for (boxes, count) in boxes.iter().zip(&counts) {
                    let (part, others) = rest.split_at_mut(*count);
                    copy(&whole, full, boxes, part);
                    rest = others;
                }
            }
            if counts.iter().all(|count| *count == counts[0]) {
                world.scatter(&packed, &mut local, root).map_err(failed)?;
            } else {
                let none = vec![0; ranks];
                let mut receive = none.clone();
                receive[root] = counts[rank];
                let send = if rank == root { &counts } else { &none };
                world.all_to_all_v(&packed, send, &mut local, &receive).map_err(failed)?;
            }
        }
        Self { local, spec: Arc::new(cut), groups: Arc::clone(groups) }.redistribute(&rest)
    }

    /// This rank's part of a tensor of this shape that every rank has whole. Not collective: nothing is sent, nor
    /// compared.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::ForeignMesh`], [`Error::InvalidLayout`], [`Error::Redistribute`].
    pub fn from_full(groups: &Arc<MeshGroups>, layout: &Layout, shape: &[usize], full: &[T]) -> Result<Self> {
        check_mesh(groups, layout)?;
        let (cut, rest) = parts_of_whole(layout, shape, T::DTYPE)?;
        check_length("the full tensor", full.len(), &cut)?;
        let boxes = cut.boxes(groups.world().rank()).unwrap_or_default();
        let mut local = fill(elems(&boxes));
        copy(&[Region::whole(shape)], full, &boxes, &mut local);
        Self { local, spec: Arc::new(cut), groups: Arc::clone(groups) }.redistribute(&rest)
    }

    /// The tensor of this (whole) shape whose parts the ranks have already. *Collective*: one short comparison of what
    /// the ranks have; none in a mesh of one rank.
    ///
    /// # Errors
    /// On every rank: [`Error::TensorMismatch`], with both, when ranks have different layouts, shapes or types;
    /// [`Error::LocalLength`] when `local` of any rank is not as long as its part; [`Error::InvalidLayout`]. Before anything
    /// is sent: [`Error::ForeignMesh`].
    pub fn from_local(
        groups: &Arc<MeshGroups>,
        layout: &Layout,
        local: Vec<T>,
        shape: &[usize],
    ) -> Result<Self> {
        check_mesh(groups, layout)?;
        let spec = DTensorSpec::new(layout.clone(), shape, T::DTYPE);
        let rank = groups.world().rank();
        let expected = spec.as_ref().map_or(local.len(), |spec| spec.local_elems(rank).unwrap_or(0));
        agree::on_tensor((T::DTYPE, shape, layout), (local.len(), expected), &**groups.world())?;
        let spec = spec?;
        Ok(Self { local, spec: Arc::new(spec), groups: Arc::clone(groups) })
    }

    /// As [`from_local`](Self::from_local), where the ranks' parts are all of one shape, so that the whole's follows: each
    /// dim times the ranks of the axes that shard it.
    ///
    /// # Errors
    /// As there; also [`Error::InvalidLayout`] for a ragged layout, which says nothing about dims.
    pub fn from_even_local(
        groups: &Arc<MeshGroups>,
        layout: &Layout,
        local: Vec<T>,
        local_shape: &[usize],
    ) -> Result<Self> {
        let mut shape = local_shape.to_vec();
        for (axis, placement) in layout.placements().iter().enumerate() {
            let dim = match placement {
                Placement::Shard { dim } => shape.get_mut(*dim),
                Placement::Ragged(_) if layout.ranks(axis) > 1 => {
                    return Err(Error::InvalidLayout {
                        what: format!("local shape {local_shape:?} as {layout}"),
                        expected: "the whole shape, which flat parts do not tell".to_owned(),
                    });
                }
                _ => None,
            };
            if let Some(dim) = dim {
                *dim = dim.saturating_mul(layout.ranks(axis));
            }
        }
        Self::from_local(groups, layout, local, &shape)
    }

    /// Asks `read` for this rank's part, a box after another: what a checkpoint's reader is for, whatever layout it was
    /// saved in. Not collective.
    ///
    /// # Errors
    /// That of the reader; [`Error::ForeignMesh`], [`Error::InvalidLayout`], [`Error::PartialValues`].
    pub fn load<E: From<Error>>(
        groups: &Arc<MeshGroups>,
        layout: &Layout,
        shape: &[usize],
        mut read: impl FnMut(&Region, &mut [T]) -> Result<(), E>,
    ) -> Result<Self, E> {
        check_mesh(groups, layout)?;
        let spec = DTensorSpec::new(layout.clone(), shape, T::DTYPE)?;
        if layout.partial().is_some() {
            return Err(Error::PartialValues { layout: layout.to_string() }.into());
        }
        let boxes = spec.boxes(groups.world().rank()).unwrap_or_default();
        let mut local = fill(elems(&boxes));
        let mut rest = local.as_mut_slice();
        for region in boxes.iter().filter(|region| region.elems() > 0) {
            let (part, others) = rest.split_at_mut(region.elems());
            read(region, part)?;
            rest = others;
        }
        Ok(Self { local, spec: Arc::new(spec), groups: Arc::clone(groups) })
    }

    /// Layout, shape and type.
    pub fn spec(&self) -> &DTensorSpec {
        &self.spec
    }

    /// The mesh with its groups.
    pub fn groups(&self) -> &Arc<MeshGroups> {
        &self.groups
    }

    /// This rank's values, row-major; of a ragged layout, in the order of the flattened tensor. Of a partial one they are
    /// a contribution.
    pub fn to_local(&self) -> &[T] {
        &self.local
    }

    /// This rank's values, to be changed. Replicas must stay the same on all ranks.
    pub fn local_mut(&mut self) -> &mut [T] {
        &mut self.local
    }

    /// This rank's values, moved out.
    pub fn into_local(self) -> Vec<T> {
        self.local
    }

    /// The same tensor, borrowed.
    pub fn view(&self) -> DTensorView<'_, T> {
        DTensorView { local: &self.local, spec: Arc::clone(&self.spec), groups: Arc::clone(&self.groups) }
    }

    /// The same tensor in another layout of the same mesh. *Collective*, though axes that do not change and axes of one
    /// rank send nothing, and neither do tensors without elements. An axis at a time, `Cut` being `Shard` or `Ragged`:
    ///
    /// | from | to | |
    /// |---|---|---|
    /// | `Replicate` | `Cut` | local |
    /// | `Cut` | `Replicate` | all-gather |
    /// | `Cut` | another `Cut` | all-to-all; local where the parts are the same |
    /// | `Partial(op)` | `Replicate` | all-reduce |
    /// | `Partial(op)` | `Cut` | reduce-scatter |
    /// | `Replicate` | `Partial(Sum)` | local: the first rank keeps its values, the others take -0.0 |
    /// | `Replicate` | `Partial(Mean, Min, Max)` | local: all keep their values |
    /// | `Cut` | `Partial(Sum)` | local: -0.0 where the others' parts are |
    ///
    /// Values are moved, so any way to a layout leads to the same bits. What is made contributions to a sum comes back to
    /// the bit, for any number of ranks and any type (torch divides by the number of ranks, which rounds); a mean adds
    /// before it divides, which may round. Where an axis must give up its part for another to cut outside it, it is
    /// gathered and cut again.
    ///
    /// # Errors
    /// Before anything is sent: [`Error::ForeignMesh`], [`Error::InvalidLayout`], and [`Error::Redistribute`] for the
    /// pairs that are not in the table. Else [`Error::Collective`].
    pub fn redistribute(self, to: &Layout) -> Result<DTensor<T>> {
        redistribute(self.local.into(), &self.spec, &self.groups, to)
    }

    /// The whole tensor, on every rank: `redistribute` to `Replicate` along all axes. *Collective*.
    ///
    /// # Errors
    /// As [`redistribute`](Self::redistribute).
    pub fn full_tensor(&self) -> Result<Vec<T>> {
        self.view().full_tensor()
    }
}

impl<'a, T: Element> DTensorView<'a, T> {
    pub(super) fn new(local: &'a [T], spec: DTensorSpec, groups: &Arc<MeshGroups>) -> Self {
        Self { local, spec: Arc::new(spec), groups: Arc::clone(groups) }
    }

    /// Layout, shape and type.
    pub fn spec(&self) -> &DTensorSpec {
        &self.spec
    }

    /// This rank's values, where they lie.
    pub fn to_local(&self) -> &'a [T] {
        self.local
    }

    /// What this rank has to save: its boxes (none that is empty), each with its values. Every rank that
    /// [is a first replica](DTensorSpec::is_first_replica) saves its boxes; together they are the tensor.
    ///
    /// # Errors
    /// [`Error::PartialValues`]: contributions are not values of the tensor.
    pub fn parts(&self) -> Result<Vec<(Region, &'a [T])>> {
        if self.spec.layout().partial().is_some() {
            return Err(Error::PartialValues { layout: self.spec.layout().to_string() });
        }
        let mut rest = self.local;
        let mut boxes = self.spec.boxes(self.groups.world().rank()).unwrap_or_default();
        boxes.retain(|region| region.elems() > 0);
        let take = |region: Region| {
            let (part, others) = rest.split_at(region.elems());
            rest = others;
            (region, part)
        };
        Ok(boxes.into_iter().map(take).collect())
    }

    /// As [`DTensor::redistribute`], into a tensor of its own.
    ///
    /// # Errors
    /// As there.
    pub fn redistribute(&self, to: &Layout) -> Result<DTensor<T>> {
        redistribute(self.local.into(), &self.spec, &self.groups, to)
    }

    /// As [`DTensor::full_tensor`].
    ///
    /// # Errors
    /// As there.
    pub fn full_tensor(&self) -> Result<Vec<T>> {
        let whole = Layout::replicated(Arc::clone(self.spec.layout().mesh()));
        Ok(self.redistribute(&whole)?.into_local())
    }
}

fn redistribute<T: Element>(
    mut local: Cow<'_, [T]>,
    spec: &Arc<DTensorSpec>,
    groups: &Arc<MeshGroups>,
    to: &Layout,
) -> Result<DTensor<T>> {
    let target = spec.with_layout(to.clone())?;
    let steps = steps(spec.layout(), to)?;
    if spec.elems() > 0 {
        let at = groups.mesh().coordinates(groups.world().rank()).unwrap_or_default();
        let mut before = Cow::Borrowed(&**spec);
        for step in steps {
            let after = before.with_layout(step.to)?;
            let axis = &groups.mesh().axes()[step.axis];
            local = Sides::new(&before, &after, step.axis, &at).run(local, &**groups.axis(axis)?)?;
            before = Cow::Owned(after);
        }
    }
    let spec = if target == **spec { Arc::clone(spec) } else { Arc::new(target) };
    Ok(DTensor { local: local.into_owned(), spec, groups: Arc::clone(groups) })
}

/// The layout that a tensor known whole can be cut to (partial axes replicated), and what then follows without a word
/// between ranks. Checks that it does.
fn parts_of_whole(layout: &Layout, shape: &[usize], dtype: Dtype) -> Result<(DTensorSpec, Layout)> {
    DTensorSpec::new(layout.clone(), shape, dtype)?;
    let mut cut = layout.clone();
    for (axis, placement) in layout.placements().iter().enumerate() {
        if matches!(placement, Placement::Partial(_)) {
            cut = cut.moved(axis, Placement::Replicate);
        }
    }
    steps(&cut, layout)?;
    Ok((DTensorSpec::new(cut, shape, dtype)?, layout.clone()))
}

fn check_mesh(groups: &Arc<MeshGroups>, layout: &Layout) -> Result<()> {
    steps(&Layout::replicated(groups.mesh().clone()), &Layout::replicated(Arc::clone(layout.mesh())))
        .map(drop)
}

fn check_length(what: &'static str, got: usize, spec: &DTensorSpec) -> Result<()> {
    let expected = spec.elems();
    if got == expected {
        return Ok(());
    }
    Err(Error::Length { what, name: format!("{:?} as {}", spec.shape(), spec.layout()), got, expected })
}
