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
/// # Ok::<_, lightrft_collectives::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMesh {
    names: Vec<String>,
    sizes: Vec<usize>,
    /// Ranks in the order of their coordinates.
    ranks: Vec<usize>,
}

impl DeviceMesh {
    /// A mesh of the ranks `0..product of the sizes`.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no axis, a size is 0, or a name is empty or used twice.
    pub fn new(axes: &[(&str, usize)]) -> Result<Self> {
        let wrong = |got: String, expected: &str| Error::Mesh { got, expected: expected.into() };
        let mut total = 1usize;
        for (index, (name, size)) in axes.iter().enumerate() {
            if name.is_empty() || axes[..index].iter().any(|(other, _)| other == name) {
                return Err(wrong(format!("axis {index} named `{name}`"), "a name of its own for each axis"));
            }
            let grown = total.checked_mul(*size).filter(|_| *size > 0);
            total =
                grown.ok_or_else(|| wrong(format!("axis `{name}` of size {size}"), "at least one rank"))?;
        }
        if axes.is_empty() {
            return Err(wrong("no axis".into(), "at least one"));
        }
        let (names, sizes) = axes.iter().map(|(name, size)| (name.to_string(), *size)).unzip();
        Ok(DeviceMesh { names, sizes, ranks: (0..total).collect() })
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
        let mut place = self.ranks.iter().position(|r| *r == rank)?;
        let mut coordinates = vec![0; self.sizes.len()];
        for (coordinate, size) in coordinates.iter_mut().zip(&self.sizes).rev() {
            *coordinate = place % size;
            place /= size;
        }
        Some(coordinates)
    }

    /// Where `rank` is along `axis`.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis or the rank is not in this mesh.
    pub fn coordinate(&self, axis: &str, rank: usize) -> Result<usize> {
        Ok(self.place(rank)?[self.index(axis)?])
    }

    /// The ranks that differ from `rank` along `axis` only, `rank` among them, in the order of that axis.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis or the rank is not in this mesh.
    pub fn line(&self, axis: &str, rank: usize) -> Result<Vec<usize>> {
        Ok(self.slice(&[axis], rank)?.ranks)
    }

    /// All lines along `axis`, in the order of their first ranks' coordinates. Each rank is in one of them.
    ///
    /// # Errors
    /// [`Error::Mesh`] if there is no such axis.
    pub fn lines(&self, axis: &str) -> Result<Vec<Vec<usize>>> {
        let mut lines = Vec::new();
        for &rank in &self.ranks {
            if self.coordinate(axis, rank)? == 0 {
                lines.push(self.line(axis, rank)?);
            }
        }
        Ok(lines)
    }

    /// The mesh of `axes` through `rank`: the ranks that differ from it along these axes only. The axes keep
    /// the order of this mesh.
    ///
    /// # Errors
    /// [`Error::Mesh`] if an axis does not exist, is named twice, or the rank is not in this mesh.
    pub fn slice(&self, axes: &[&str], rank: usize) -> Result<DeviceMesh> {
        let mut kept = axes.iter().map(|axis| self.index(axis)).collect::<Result<Vec<usize>>>()?;
        kept.sort_unstable();
        if kept.is_empty() || kept.windows(2).any(|pair| pair[0] == pair[1]) {
            let got = format!("a slice along {axes:?}");
            return Err(Error::Mesh { got, expected: "at least one axis and each once".into() });
        }
        let here = self.place(rank)?;
        let same = |rank: &usize| {
            let there = self.coordinates(*rank).unwrap_or_default();
            (0..here.len()).all(|axis| kept.contains(&axis) || here[axis] == there[axis])
        };
        Ok(DeviceMesh {
            names: kept.iter().map(|axis| self.names[*axis].clone()).collect(),
            sizes: kept.iter().map(|axis| self.sizes[*axis]).collect(),
            ranks: self.ranks.iter().copied().filter(same).collect(),
        })
    }

    fn index(&self, axis: &str) -> Result<usize> {
        let index = self.names.iter().position(|name| name == axis);
        let got = || format!("axis `{axis}`");
        index.ok_or_else(|| Error::Mesh { got: got(), expected: format!("one of {:?}", self.names) })
    }

    fn place(&self, rank: usize) -> Result<Vec<usize>> {
        let expected = || format!("one of {:?}", self.ranks);
        self.coordinates(rank)
            .ok_or_else(|| Error::Mesh { got: format!("rank {rank}"), expected: expected() })
    }
}
