//! Boxes of indices: what a rank holds, where two boxes meet, and which boxes a range of the flattened tensor is.

use std::ops::Range;

/// A box of indices of a tensor: in dim d the `sizes[d]` indices from `offsets[d]` on. Its elements go row-major.
///
/// ```
/// use lightrft_sharding::Region;
///
/// // Elements 4..11 of a 3 x 5 tensor: the end of one row, a whole row, the beginning of the last.
/// let boxes = Region::of_range(4..11, &[3, 5]);
/// assert_eq!(boxes, [Region::new([0, 4], [1, 1]), Region::new([1, 0], [1, 5]), Region::new([2, 0], [1, 1])]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// The first index in each dim.
    pub offsets: Vec<usize>,
    /// The number of indices in each dim.
    pub sizes: Vec<usize>,
}

impl Region {
    /// The box of these `sizes` at these `offsets`, of as many dims.
    pub fn new(offsets: impl Into<Vec<usize>>, sizes: impl Into<Vec<usize>>) -> Self {
        Self { offsets: offsets.into(), sizes: sizes.into() }
    }

    /// All of a tensor of this shape.
    pub fn whole(shape: &[usize]) -> Self {
        Self::new(vec![0; shape.len()], shape)
    }

    /// Number of elements.
    pub fn elems(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Elements `range` of a tensor of this shape, flattened row-major, as boxes that hold them one box after another:
    /// at most two a dim, less one. None for an empty range; what lies beyond the tensor's end is left out.
    pub fn of_range(range: Range<usize>, shape: &[usize]) -> Vec<Region> {
        let mut boxes = Vec::new();
        let elems = shape.iter().fold(1usize, |n, &dim| n.saturating_mul(dim));
        cut(range.start..range.end.min(elems), shape, &[], &mut boxes);
        boxes
    }

    /// The indices in both boxes; `None` where there are none.
    pub fn intersection(&self, other: &Region) -> Option<Region> {
        let dims = self.offsets.len();
        if [self.sizes.len(), other.offsets.len(), other.sizes.len()] != [dims; 3] {
            return None;
        }
        let mut both = Region::new(Vec::with_capacity(dims), Vec::with_capacity(dims));
        for d in 0..dims {
            let start = self.offsets[d].max(other.offsets[d]);
            let ends = [self, other].map(|region| region.offsets[d].saturating_add(region.sizes[d]));
            let end = ends[0].min(ends[1]);
            if start >= end {
                return None;
            }
            both.offsets.push(start);
            both.sizes.push(end - start);
        }
        Some(both)
    }

    /// Copies what this box, whose elements are `values`, shares with `other` to its places in `out`, the elements of
    /// `other`; returns how many elements that were. What a reader does with the saved boxes of other ranks. Runs that lie
    /// beyond the end of either slice are left out.
    ///
    /// ```
    /// use lightrft_sharding::Region;
    ///
    /// let (saved, wanted) = (Region::new([0, 0], [2, 2]), Region::new([1, 0], [2, 2]));
    /// let mut out = [0; 4];
    /// assert_eq!(saved.copy_overlap(&[1, 2, 3, 4], &wanted, &mut out), 2);
    /// assert_eq!(out, [3, 4, 0, 0]);
    /// ```
    pub fn copy_overlap<T: Copy>(&self, values: &[T], other: &Region, out: &mut [T]) -> usize {
        let mut copied = 0;
        self.shared_runs(other, |from, to, len| {
            if let (Some(from), Some(to)) = (values.get(from..from + len), out.get_mut(to..to + len)) {
                to.copy_from_slice(from);
                copied += len;
            }
        });
        copied
    }

    /// Visits every run of elements that are neighbours in both boxes, in row-major order: (place in this box, place in
    /// the other, length).
    pub(super) fn shared_runs(&self, other: &Region, mut visit: impl FnMut(usize, usize, usize)) {
        let Some(both) = self.intersection(other) else { return };
        let dims = both.sizes.len();
        // Inner dims that both boxes have no more of than what they share go into one run, with the dim outside them.
        let mut inner = dims;
        let mut run = 1;
        while inner > 0 {
            inner -= 1;
            run *= both.sizes[inner];
            if self.sizes[inner] != both.sizes[inner] || other.sizes[inner] != both.sizes[inner] {
                break;
            }
        }
        let rows: usize = both.sizes[..inner].iter().product();
        let mut at = both.offsets.clone();
        for _ in 0..rows {
            visit(self.place(&at), other.place(&at), run);
            for d in (0..inner).rev() {
                at[d] += 1;
                if at[d] < both.offsets[d] + both.sizes[d] {
                    break;
                }
                at[d] = both.offsets[d];
            }
        }
    }

    /// Where the element at these indices of the tensor lies in the box.
    fn place(&self, indices: &[usize]) -> usize {
        let dims = indices.iter().zip(&self.offsets).zip(&self.sizes);
        dims.fold(0, |place, ((index, offset), size)| place * size + (index - offset))
    }
}

/// Appends the boxes of elements `range` of the sub-tensor at index `at` of the outer dims, whose own dims are `shape`.
fn cut(range: Range<usize>, shape: &[usize], at: &[usize], boxes: &mut Vec<Region>) {
    if range.is_empty() {
        return;
    }
    let Some((_, inner)) = shape.split_first() else {
        return boxes.push(Region::new(at, vec![1; at.len()]));
    };
    let row: usize = inner.iter().product();
    let part = |index: usize, range: Range<usize>, boxes: &mut Vec<Region>| {
        cut(range, inner, &[at, &[index]].concat(), boxes);
    };
    let (first, last) = (range.start / row, range.end / row);
    let (head, tail) = (range.start % row, range.end % row);
    if first == last {
        return part(first, head..tail, boxes);
    }
    if head > 0 {
        part(first, head..row, boxes);
    }
    let rows = first + usize::from(head > 0)..last;
    if !rows.is_empty() {
        let offsets = [at, &[rows.start], &vec![0; inner.len()]].concat();
        boxes.push(Region::new(offsets, [&vec![1; at.len()], &[rows.len()][..], inner].concat()));
    }
    part(last, 0..tail, boxes);
}
