//! Named axes over the ranks of a world: pure arithmetic, the same on every rank
//!
//! Two machines of four GPUs, sharded within and replicated between them:
//!
//! ```text
//!                 shard ->
//! replicate   0   1   2   3      rank 6 is at (1, 2); its ranks along `shard` are 4 5 6 7,
//!     v       4   5   6   7      along `replicate` 2 6
//! ```

use crate::error::{Error, Result};

/// Ranks laid out as a grid, the last axis running fastest.
///
/// ```
/// use lightrft_collectives::DeviceMesh;
///
/// let mesh = DeviceMesh::new(&[("replicate", 2), ("shard", 4)])?;
/// assert_eq!(mesh.coordinates(6), Some(vec![1, 2]));
/// assert_eq!(mesh.line("shard", 6)?, [4, 5, 6, 7]);
/// assert_eq!(mesh.line("replicate", 6)?, [2, 6]);
///
/// let mesh = mesh.unflatten("shard", &[("outer", 2), ("inner", 2)])?;
/// assert_eq!(mesh.line("outer", 6)?, [4, 6]);
/// assert_eq!(mesh.flatten(&["replicate", "outer"], "data")?.line("data", 6)?, [0, 2, 4, 6]);
/// # Ok::<_, lightrft_collectives::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMesh {
    names: Vec<String>,
    sizes: Vec<usize>,
    /// Ranks in the order of their coordinates; a rank's place is its index here.
    ranks: Vec<usize>,
}

fn wrong(got: String, expected: impl Into<String>) -> Error {
    Error::Mesh { got, expected: expected.into() }
}

/// Number of ranks in a grid of `axes`, whose names and sizes are checked.
fn grid(axes: &[(&str, usize)]) -> Result<usize> {
    let mut total = 1usize;
    for (index, (name, size)) in axes.iter().enumerate() {
        if name.is_empty() || axes[..index].iter().any(|(other, _)| other == name) {
            return Err(wrong(format!("axis {index} named `{name}`"), "a name of its own for each axis"));
        }
        let grown = total.checked_mul(*size).filter(|_| *size > 0);
        total = grown.ok_or_else(|| wrong(format!("axis `{name}` of size {size}"), "at least one rank"))?;
    }
    if axes.is_empty() {
        return Err(wrong("no axis".into(), "at least one"));
    }
    Ok(total)
}

impl DeviceMesh {
    /// A mesh of the ranks `0..product of the sizes`.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no axis, a size is 0, or a name is empty or used twice.
    pub fn new(axes: &[(&str, usize)]) -> Result<Self> {
        let ranks = (0..grid(axes)?).collect();
        Self::of_ranks(ranks, axes)
    }

    /// A mesh of any `ranks`, given in the order of their coordinates.
    ///
    /// # Errors
    /// As [`new`](DeviceMesh::new); also if a rank is named twice or there are not as many as the axes have places.
    pub fn of_ranks(ranks: Vec<usize>, axes: &[(&str, usize)]) -> Result<Self> {
        let places = grid(axes)?;
        if ranks.len() != places {
            return Err(wrong(format!("{} ranks", ranks.len()), format!("the {places} of {axes:?}")));
        }
        let mut sorted = ranks.clone();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(wrong(format!("rank {} twice", twice[0]), "each rank once"));
        }
        let (names, sizes) = axes.iter().map(|(name, size)| (name.to_string(), *size)).unzip();
        Ok(DeviceMesh { names, sizes, ranks })
    }

    /// The axes' names, outermost first.
    pub fn axes(&self) -> &[String] {
        &self.names
    }

    /// Number of ranks along each axis.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// All ranks in the order of their coordinates.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Number of ranks along `axis`.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis.
    pub fn size(&self, axis: &str) -> Result<usize> {
        Ok(self.sizes[self.index(axis)?])
    }

    /// Where `rank` is, one number per axis; `None` if it is not in this mesh.
    pub fn coordinates(&self, rank: usize) -> Option<Vec<usize>> {
        let place = self.ranks.iter().position(|r| *r == rank)?;
        Some((0..self.sizes.len()).map(|axis| self.along(axis, place)).collect())
    }

    /// Where `rank` is along `axis`.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis or the rank is not in this mesh.
    pub fn coordinate(&self, axis: &str, rank: usize) -> Result<usize> {
        Ok(self.along(self.index(axis)?, self.place(rank)?))
    }

    /// The ranks that differ from `rank` along `axis` only, `rank` among them, in the order of that axis.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis or the rank is not in this mesh.
    pub fn line(&self, axis: &str, rank: usize) -> Result<Vec<usize>> {
        Ok(self.line_at(self.index(axis)?, self.place(rank)?))
    }

    /// All lines along `axis`, in the order of their first ranks' coordinates. Each rank is in one of them.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis.
    pub fn lines(&self, axis: &str) -> Result<Vec<Vec<usize>>> {
        let axis = self.index(axis)?;
        let first = (0..self.ranks.len()).filter(|place| self.along(axis, *place) == 0);
        Ok(first.map(|place| self.line_at(axis, place)).collect())
    }

    /// The mesh of `axes` through `rank`: the ranks that differ from it along these axes only. The axes keep
    /// the order of this mesh.
    ///
    /// # Errors
    /// [`Error::Mesh`] if an axis does not exist, is named twice, or the rank is not in this mesh.
    pub fn slice(&self, axes: &[&str], rank: usize) -> Result<DeviceMesh> {
        let mut kept = self.indices(axes)?;
        kept.sort_unstable();
        let here = self.place(rank)?;
        let fixed: Vec<usize> = (0..self.sizes.len()).filter(|axis| !kept.contains(axis)).collect();
        let same =
            |place: &usize| fixed.iter().all(|axis| self.along(*axis, *place) == self.along(*axis, here));
        Ok(DeviceMesh {
            names: kept.iter().map(|axis| self.names[*axis].clone()).collect(),
            sizes: kept.iter().map(|axis| self.sizes[*axis]).collect(),
            ranks: (0..self.ranks.len()).filter(same).map(|place| self.ranks[place]).collect(),
        })
    }

    /// This mesh with `axes` made one, called `name`, in the place of the first of them. Along it runs the last of `axes`
    /// fastest, wherever they are in this mesh.
    ///
    /// # Errors
    /// [`Error::Mesh`] if an axis does not exist or is named twice, or `name` is empty or that of another axis.
    pub fn flatten(&self, axes: &[&str], name: &str) -> Result<DeviceMesh> {
        let merged = self.indices(axes)?;
        // The old axes in their new order: those that are not merged keep their places.
        let (mut order, mut result) = (Vec::new(), Vec::new());
        for axis in 0..self.sizes.len() {
            if axis == merged[0] {
                order.extend(&merged);
                result.push((name, merged.iter().map(|axis| self.sizes[*axis]).product()));
            } else if !merged.contains(&axis) {
                order.push(axis);
                result.push((self.names[axis].as_str(), self.sizes[axis]));
            }
        }
        // The new place of each rank is its coordinates along the old axes, read in their new order.
        let new_place = |place: usize| {
            order.iter().fold(0, |sum, axis| sum * self.sizes[*axis] + self.along(*axis, place))
        };
        let mut ranks = self.ranks.clone();
        for (place, rank) in self.ranks.iter().enumerate() {
            ranks[new_place(place)] = *rank;
        }
        Self::of_ranks(ranks, &result)
    }

    /// This mesh with `axis` cut into several, the last of them running fastest: the inverse of
    /// [`flatten`](DeviceMesh::flatten) of neighbours.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis, the sizes of `axes` do not multiply to its size, or a name is taken.
    pub fn unflatten(&self, axis: &str, axes: &[(&str, usize)]) -> Result<DeviceMesh> {
        let cut = self.index(axis)?;
        if grid(axes)? != self.sizes[cut] {
            return Err(wrong(format!("{axes:?}"), format!("the {} ranks of `{axis}`", self.sizes[cut])));
        }
        let mut result: Vec<(&str, usize)> =
            self.names.iter().map(String::as_str).zip(self.sizes.iter().copied()).collect();
        result.splice(cut..=cut, axes.iter().copied());
        Self::of_ranks(self.ranks.clone(), &result)
    }

    /// Ranks between neighbours along `axis`, in places.
    fn stride(&self, axis: usize) -> usize {
        self.sizes[axis + 1..].iter().product()
    }

    fn along(&self, axis: usize, place: usize) -> usize {
        place / self.stride(axis) % self.sizes[axis]
    }

    fn line_at(&self, axis: usize, place: usize) -> Vec<usize> {
        let stride = self.stride(axis);
        let first = place - self.along(axis, place) * stride;
        (0..self.sizes[axis]).map(|step| self.ranks[first + step * stride]).collect()
    }

    /// The axes of these names: at least one, and each once.
    fn indices(&self, axes: &[&str]) -> Result<Vec<usize>> {
        let indices = axes.iter().map(|axis| self.index(axis)).collect::<Result<Vec<usize>>>()?;
        let twice = (0..indices.len()).any(|i| indices[..i].contains(&indices[i]));
        if indices.is_empty() || twice {
            return Err(wrong(format!("axes {axes:?}"), "at least one axis and each once"));
        }
        Ok(indices)
    }

    fn index(&self, axis: &str) -> Result<usize> {
        let index = self.names.iter().position(|name| name == axis);
        index.ok_or_else(|| wrong(format!("axis `{axis}`"), format!("one of {:?}", self.names)))
    }

    fn place(&self, rank: usize) -> Result<usize> {
        let place = self.ranks.iter().position(|r| *r == rank);
        place.ok_or_else(|| wrong(format!("rank {rank}"), format!("one of {:?}", self.ranks)))
    }
}
