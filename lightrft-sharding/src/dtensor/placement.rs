//! How a tensor lies along one axis of the mesh.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use lightrft_collectives::ReduceOp;

use crate::error::{Error, Result};

/// How a tensor lies along one axis of a mesh. torch's placements, and [`Ragged`](Self::Ragged).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Placement {
    /// Every rank of the axis has all of it.
    Replicate,
    /// Tensor dim `dim` is cut into chunks of `ceil(n / ranks)`, as `torch.chunk` does: the last chunks may be smaller,
    /// or empty.
    Shard {
        /// The dim of the tensor.
        dim: usize,
    },
    /// Every rank has a contribution; the tensor is their reduction. Operations that are not the same cannot stand on two
    /// axes of one layout.
    Partial(ReduceOp),
    /// The flattened (row-major) tensor is cut anywhere: what a flat unit does to its parameters. No other axis may be
    /// `Shard` or `Ragged` beside it.
    Ragged(Cuts),
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Placement::Replicate => f.write_str("Replicate"),
            Placement::Shard { dim } => write!(f, "Shard({dim})"),
            Placement::Partial(op) => write!(f, "Partial({op})"),
            Placement::Ragged(cuts) => write!(f, "Ragged({cuts})"),
        }
    }
}

/// Where a flattened tensor is cut for the ranks of an axis: rank r holds elements `cuts[r]..cuts[r + 1]`.
///
/// ```
/// use lightrft_sharding::Cuts;
///
/// let cuts = Cuts::new([0, 4, 4, 10])?;
/// assert_eq!((cuts.ranks(), cuts.elems(), cuts.range(2)), (3, 10, 4..10));
/// assert!(Cuts::new([0, 5, 4]).is_err());
/// # Ok::<_, lightrft_sharding::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cuts(Arc<[usize]>);

impl Cuts {
    /// Cut points: one more than there are ranks, the first 0, none less than the one before it, the last the number
    /// of elements.
    ///
    /// # Errors
    /// [`Error::InvalidLayout`] for anything else.
    pub fn new(points: impl Into<Arc<[usize]>>) -> Result<Self> {
        let points = points.into();
        if points.len() < 2 || points[0] != 0 || !points.is_sorted() {
            return Err(Error::InvalidLayout {
                what: format!("cut points {points:?}"),
                expected: "0 and then one for each rank, none less than the one before".to_owned(),
            });
        }
        Ok(Self(points))
    }

    /// For points that are in order by how they were computed.
    pub(super) fn sorted(points: impl Iterator<Item = usize>) -> Self {
        let points: Arc<[usize]> = points.collect();
        debug_assert!(Self::new(Arc::clone(&points)).is_ok());
        Self(points)
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.0.len() - 1
    }

    /// Number of elements of the whole tensor.
    pub fn elems(&self) -> usize {
        self.0.last().copied().unwrap_or(0)
    }

    /// The elements of the rank at place `rank` of the axis; empty for one beyond the last.
    pub fn range(&self, rank: usize) -> Range<usize> {
        let at = |i: usize| self.0.get(i).copied().unwrap_or(self.elems());
        at(rank)..at(rank.saturating_add(1))
    }
}

/// The points, or the first of them where they are many: `0, 4, 4, 10`, `0, 64, 128, 192, 256, .. over 512 ranks`.
impl fmt::Display for Cuts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 5;
        for (i, point) in self.0.iter().take(SHOWN).enumerate() {
            write!(f, "{}{point}", if i > 0 { ", " } else { "" })?;
        }
        if self.0.len() > SHOWN {
            write!(f, ", .. over {} ranks", self.ranks())?;
        }
        Ok(())
    }
}

/// The indices of `0..n` that place `rank` of `ranks` gets: `torch.chunk`, with what is missing at the end empty.
pub(super) fn chunk(n: usize, ranks: usize, rank: usize) -> Range<usize> {
    let size = n.div_ceil(ranks);
    // `rank * size` may not fit for a rank far behind the end; it is clamped there anyway.
    let at = |rank: usize| size.saturating_mul(rank).min(n);
    at(rank)..at(rank + 1)
}
