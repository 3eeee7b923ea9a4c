//! One placement for each axis of a mesh, and the order in which axes cut the same dim. Pure.

use std::fmt;
use std::sync::Arc;

use lightrft_collectives::{DeviceMesh, ReduceOp};

use super::placement::{Placement, chunk};
use super::region::Region;
use crate::error::{Error, Result};

/// How tensors lie on a mesh: one [`Placement`] an axis, and for a dim that several axes cut, which cuts first.
///
/// By default axes cut from left to right, outermost first, as in torch. torch writes "tensor parallel first, data
/// parallel within" on a mesh (dp, tp) as `_StridedShard`; here it is an order, and every rank's part is one box:
///
/// ```
/// use lightrft_collectives::DeviceMesh;
/// use lightrft_sharding::{Layout, Placement::Shard, Region};
///
/// let mesh = DeviceMesh::new(&[("dp", 2), ("tp", 2)])?;
/// let layout = Layout::new(mesh, [Shard { dim: 0 }, Shard { dim: 0 }])?;
/// // Of nine rows, dp 0 has five; of these, tp 0 has three.
/// assert_eq!(layout.region(&[9], 1), Some(Region::new([3], [2])));
/// let layout = layout.with_order(0, &["tp", "dp"])?;
/// assert_eq!(layout.region(&[9], 1), Some(Region::new([5], [2])));
/// # Ok::<_, lightrft_sharding::Error>(())
/// ```
///
/// Nothing here knows how large a tensor is: the same layout serves many. Axes of one rank make no difference.
#[derive(Clone, PartialEq, Eq)]
pub struct Layout {
    mesh: Arc<DeviceMesh>,
    placements: Vec<Placement>,
    /// The axes that cut some dim, each before those that cut what it leaves. Only the order of axes of one dim matters,
    /// so they are kept sorted by dim.
    cutting: Vec<usize>,
}

impl Layout {
    /// One placement for each axis of `mesh`, in its order. Axes that shard one dim cut from left to right.
    ///
    /// # Errors
    /// [`Error::InvalidLayout`] when there are not as many placements as axes; when two axes are partial by different
    /// operations; when an axis is ragged beside another that is sharded or ragged, or for another number of ranks.
    pub fn new(mesh: impl Into<Arc<DeviceMesh>>, placements: impl Into<Vec<Placement>>) -> Result<Self> {
        let (mesh, placements) = (mesh.into(), placements.into());
        let cutting = (0..placements.len()).collect();
        let layout = Self { mesh, placements, cutting }.normal();
        layout.check()?;
        Ok(layout)
    }

    /// Every axis replicated.
    pub fn replicated(mesh: impl Into<Arc<DeviceMesh>>) -> Self {
        let mesh = mesh.into();
        let placements = vec![Placement::Replicate; mesh.sizes().len()];
        Self { mesh, placements, cutting: Vec::new() }
    }

    /// The same mesh, other placements; axes cut from left to right.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn placed(&self, placements: impl Into<Vec<Placement>>) -> Result<Self> {
        Self::new(Arc::clone(&self.mesh), placements)
    }

    /// The same placements, with the axes that shard tensor dim `dim` named outermost first: the first cuts the whole
    /// dim, the next what that leaves.
    ///
    /// # Errors
    /// [`Error::InvalidLayout`] unless `axes` are those that shard this dim, each once.
    pub fn with_order(mut self, dim: usize, axes: &[&str]) -> Result<Self> {
        let named = axes.iter().map(|name| self.mesh.axes().iter().position(|axis| axis == name));
        let named: Option<Vec<usize>> = named.collect();
        let before = self.order(dim);
        let same = named.as_ref().is_some_and(|named| {
            let mut sorted = [named.clone(), before.clone()];
            sorted.iter_mut().for_each(|axes| axes.sort_unstable());
            sorted[0] == sorted[1]
        });
        let Some(named) = named.filter(|_| same) else {
            let names: Vec<&String> = before.iter().map(|&axis| &self.mesh.axes()[axis]).collect();
            return Err(Error::InvalidLayout {
                what: format!("the order {axes:?} for dim {dim} in {self}"),
                expected: format!("the axes that shard this dim, which are {names:?}"),
            });
        };
        self.cutting.retain(|axis| !named.contains(axis));
        self.cutting.extend(named);
        Ok(self.normal())
    }

    /// The mesh.
    pub fn mesh(&self) -> &Arc<DeviceMesh> {
        &self.mesh
    }

    /// One placement for each axis of the mesh.
    pub fn placements(&self) -> &[Placement] {
        &self.placements
    }

    /// The axes (indices) that shard tensor dim `dim`, outermost first.
    pub fn order(&self, dim: usize) -> Vec<usize> {
        self.cutting.iter().copied().filter(|&axis| self.dim(axis) == Some(dim)).collect()
    }

    /// The box that `rank` (of the world of the mesh) holds of a tensor of this shape. A box that is empty begins at the
    /// end of each dim that was cut away, as in torch. `None` for a rank outside the mesh, for a ragged layout, whose
    /// parts are several boxes, and where a dim is sharded that `shape` does not have; see
    /// [`DTensorSpec::boxes`](super::DTensorSpec::boxes).
    pub fn region(&self, shape: &[usize], rank: usize) -> Option<Region> {
        let coordinates = self.mesh.coordinates(rank)?;
        self.region_at(shape, &coordinates)
    }

    pub(super) fn region_at(&self, shape: &[usize], coordinates: &[usize]) -> Option<Region> {
        if self.ragged().is_some() {
            return None;
        }
        let mut region = Region::whole(shape);
        for &axis in &self.cutting {
            let dim = self.dim(axis)?;
            let size = region.sizes.get_mut(dim)?;
            let part = chunk(*size, self.mesh.sizes()[axis], coordinates[axis]);
            *size = part.len();
            region.offsets[dim] += part.start;
        }
        for &axis in &self.cutting {
            let dim = self.dim(axis)?;
            if region.sizes[dim] == 0 {
                region.offsets[dim] = shape[dim];
            }
        }
        Some(region)
    }

    /// The axis that is ragged, if any of more than one rank is.
    pub(super) fn ragged(&self) -> Option<usize> {
        (0..self.placements.len()).find(|&axis| self.is_ragged(axis))
    }

    pub(super) fn is_ragged(&self, axis: usize) -> bool {
        self.ranks(axis) > 1 && matches!(self.placements[axis], Placement::Ragged(_))
    }

    /// Ranks along an axis.
    pub(super) fn ranks(&self, axis: usize) -> usize {
        self.mesh.sizes()[axis]
    }

    /// The dim that an axis shards.
    pub(super) fn dim(&self, axis: usize) -> Option<usize> {
        match self.placements[axis] {
            Placement::Shard { dim } => Some(dim),
            _ => None,
        }
    }

    /// The operation by which axes of more than one rank are partial.
    pub(super) fn partial(&self) -> Option<ReduceOp> {
        let mut axes = self.placements.iter().zip(self.mesh.sizes());
        axes.find_map(|(placement, &ranks)| match placement {
            Placement::Partial(op) if ranks > 1 => Some(*op),
            _ => None,
        })
    }

    /// The axes of more than one rank that shard `dim`, outermost first.
    pub(super) fn cuts_of(&self, dim: usize) -> Vec<usize> {
        let mut axes = self.order(dim);
        axes.retain(|&axis| self.ranks(axis) > 1);
        axes
    }

    /// This layout with another placement of one axis, which cuts last where it shards.
    pub(super) fn moved(&self, axis: usize, to: Placement) -> Layout {
        let mut layout = self.clone();
        layout.placements[axis] = to;
        layout.cutting.retain(|&other| other != axis);
        layout.cutting.push(axis);
        layout.normal()
    }

    fn normal(mut self) -> Self {
        let placements = &self.placements;
        let dim = |axis: usize| match placements.get(axis) {
            Some(Placement::Shard { dim }) => Some(*dim),
            _ => None,
        };
        self.cutting.retain(|&axis| dim(axis).is_some());
        self.cutting.sort_by_key(|&axis| dim(axis));
        self
    }

    fn check(&self) -> Result<()> {
        let sizes = self.mesh.sizes();
        let invalid = |expected: String| Err(Error::InvalidLayout { what: self.to_string(), expected });
        if self.placements.len() != sizes.len() {
            return invalid(format!("one placement for each of the {} axes", sizes.len()));
        }
        for (axis, (placement, &ranks)) in self.placements.iter().zip(sizes).enumerate() {
            if let Placement::Ragged(cuts) = placement
                && cuts.ranks() != ranks
            {
                let name = &self.mesh.axes()[axis];
                return invalid(format!("cut points for the {ranks} ranks of `{name}`"));
            }
        }
        let large = || self.placements.iter().zip(sizes).filter(|(_, ranks)| **ranks > 1).map(|(p, _)| p);
        if let Some(op) = self.partial()
            && large().any(|p| matches!(p, Placement::Partial(other) if *other != op))
        {
            return invalid("one operation for all partial axes".to_owned());
        }
        let cut = large().filter(|p| matches!(p, Placement::Shard { .. } | Placement::Ragged(_))).count();
        if self.ragged().is_some() && cut > 1 {
            return invalid("no axis sharded or ragged beside a ragged one".to_owned());
        }
        Ok(())
    }
}

/// `[dp 2: Shard(0), tp 4: Replicate]`, with the order where it is not from left to right.
impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes = self.mesh.axes();
        f.write_str("[")?;
        for (i, placement) in self.placements.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            match (axes.get(i), self.mesh.sizes().get(i)) {
                (Some(name), Some(size)) => write!(f, "{comma}{name} {size}: {placement}")?,
                _ => write!(f, "{comma}{placement}")?,
            }
        }
        for pair in self.cutting.windows(2) {
            if self.dim(pair[0]) == self.dim(pair[1]) && pair[0] > pair[1] {
                write!(f, "; {} before {}", axes[pair[0]], axes[pair[1]])?;
            }
        }
        f.write_str("]")
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Layout{self}")
    }
}
