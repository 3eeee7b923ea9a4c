//! A layout, a shape and an element type: which elements each rank has. Pure.

use lightrft_collectives::Dtype;

use super::layout::Layout;
use super::placement::Placement;
use super::region::Region;
use crate::error::{Error, Result};

/// What there is to know of a distributed tensor besides its values.
///
/// ```
/// use lightrft_collectives::{DeviceMesh, Dtype};
/// use lightrft_sharding::{Cuts, DTensorSpec, Layout, Placement::Ragged};
///
/// let mesh = DeviceMesh::new(&[("shard", 2)])?;
/// let layout = Layout::new(mesh, [Ragged(Cuts::new([0, 4, 6])?)])?;
/// let spec = DTensorSpec::new(layout, [2, 3], Dtype::F32)?;
/// assert_eq!(spec.local_shape(1), Some(vec![2])); // elements 4 and 5, flat
/// assert_eq!(spec.boxes(0).map(|boxes| boxes.len()), Some(2)); // a row and a third of the next
/// # Ok::<_, lightrft_sharding::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DTensorSpec {
    layout: Layout,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl DTensorSpec {
    /// A tensor of this shape (as a whole) and type, that lies so.
    ///
    /// # Errors
    /// [`Error::InvalidLayout`] when a dim is sharded that the tensor does not have, when cut points are for another
    /// number of elements, when it is partial by an operation that its type does not have (a mean of integers), and when
    /// the tensor has more elements than can be addressed.
    pub fn new(layout: Layout, shape: impl Into<Vec<usize>>, dtype: Dtype) -> Result<Self> {
        let shape = shape.into();
        let invalid = |expected: String| {
            Err(Error::InvalidLayout { what: format!("{dtype:?} {shape:?} as {layout}"), expected })
        };
        let elems = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        // Bytes must fit too: at most eight an element.
        let Some(elems) = elems.filter(|&n| n <= isize::MAX as usize / 8) else {
            return invalid("a tensor that can be addressed".to_owned());
        };
        for placement in layout.placements() {
            match placement {
                Placement::Shard { dim } if *dim >= shape.len() => {
                    return invalid(format!("a dim below {}", shape.len()));
                }
                Placement::Ragged(cuts) if cuts.elems() != elems => {
                    return invalid(format!("cut points that end at {elems}, the number of elements"));
                }
                Placement::Partial(op) if !op.allows(dtype) => {
                    return invalid(format!("an operation defined on {dtype:?}"));
                }
                _ => {}
            }
        }
        Ok(Self { layout, shape, dtype })
    }

    /// The same tensor, lying otherwise.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_layout(&self, layout: Layout) -> Result<Self> {
        Self::new(layout, self.shape.clone(), self.dtype)
    }

    /// How it lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The whole tensor's shape; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Elements of the whole tensor.
    pub fn elems(&self) -> usize {
        self.shape.iter().product()
    }

    /// The shape of what `rank` (of the mesh's world) holds: that of its box, or its number of elements where the layout
    /// is ragged. `None` for a rank outside the mesh.
    pub fn local_shape(&self, rank: usize) -> Option<Vec<usize>> {
        let coordinates = self.layout.mesh().coordinates(rank)?;
        match self.layout.region_at(&self.shape, &coordinates) {
            Some(region) => Some(region.sizes),
            None => Some(vec![self.elems_at(&coordinates)]),
        }
    }

    /// Elements that `rank` holds. `None` for a rank outside the mesh.
    pub fn local_elems(&self, rank: usize) -> Option<usize> {
        Some(self.elems_at(&self.layout.mesh().coordinates(rank)?))
    }

    /// The boxes that `rank` holds: its local values are their elements, one box after another. One box, which may be
    /// empty, unless the layout is ragged; then none for an empty part. `None` for a rank outside the mesh.
    pub fn boxes(&self, rank: usize) -> Option<Vec<Region>> {
        Some(self.boxes_at(&self.layout.mesh().coordinates(rank)?))
    }

    /// Whether `rank` is the first of those that hold the same part: its coordinate is 0 along every replicated axis. Over
    /// such ranks every element stands once, so they are those that save a tensor, or add their squares to a norm.
    pub fn is_first_replica(&self, rank: usize) -> bool {
        self.layout.mesh().coordinates(rank).is_some_and(|coordinates| {
            let mut axes = self.layout.placements().iter().zip(coordinates);
            axes.all(|(placement, at)| at == 0 || *placement != Placement::Replicate)
        })
    }

    pub(super) fn boxes_at(&self, coordinates: &[usize]) -> Vec<Region> {
        if let Some(region) = self.layout.region_at(&self.shape, coordinates) {
            return vec![region];
        }
        let ragged = self.layout.ragged().map(|axis| (axis, &self.layout.placements()[axis]));
        match ragged {
            Some((axis, Placement::Ragged(cuts))) => {
                Region::of_range(cuts.range(coordinates[axis]), &self.shape)
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn elems_at(&self, coordinates: &[usize]) -> usize {
        self.boxes_at(coordinates).iter().map(Region::elems).sum()
    }
}
