//! Which elements of a tensor: ranges, boxes, where two of them meet, and whether many cover the whole.

use std::ops::Range;

use crate::element::element_count;

/// Some elements of a tensor, in the coordinates of the whole (global) tensor.
///
/// The bytes that go with a region are its elements in row-major order, dense.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// All of it.
    Whole,
    /// Elements `start..end` of the tensor flattened in row-major order; may be empty.
    Flat(Range<usize>),
    /// A box of indices: `extent[d]` of them from `start[d]` on, in every dim `d`.
    Box {
        /// First index in every dim.
        start: Vec<usize>,
        /// Number of indices in every dim.
        extent: Vec<usize>,
    },
}

impl Region {
    /// Checks the region against a shape; the error says which numbers do not fit. What is contiguous becomes a flat
    /// span, so that most tensors never see a box again.
    pub(crate) fn resolve(&self, shape: &[usize]) -> Result<Span, String> {
        let total = element_count(shape).ok_or_else(|| format!("shape {shape:?} has too many elements"))?;
        match self {
            Region::Whole => Ok(Span::Flat(0..total)),
            Region::Flat(r) if r.start <= r.end && r.end <= total => Ok(Span::Flat(r.clone())),
            Region::Flat(r) => {
                Err(format!("elements {}..{} do not lie in 0..{total} (shape {shape:?})", r.start, r.end))
            }
            Region::Box { start, extent } => {
                let fits = start.len() == shape.len()
                    && extent.len() == shape.len()
                    && (start.iter().zip(extent).zip(shape))
                        .all(|((&s, &e), &d)| s.checked_add(e).is_some_and(|end| end <= d));
                if !fits {
                    return Err(format!("box {extent:?} at {start:?} does not lie in shape {shape:?}"));
                }
                Ok(Span::of_box(start, extent, shape))
            }
        }
    }
}

/// A region known to lie in its tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Span {
    Flat(Range<usize>),
    /// A box that is not contiguous, hence of at least two dims and not empty.
    Block {
        start: Vec<usize>,
        extent: Vec<usize>,
    },
}

/// A run of elements that two spans share: dense in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shared {
    /// First element, counted within the first span.
    pub(crate) in_first: usize,
    /// First element, counted within the second span.
    pub(crate) in_second: usize,
    pub(crate) len: usize,
}

impl Span {
    fn of_box(start: &[usize], extent: &[usize], shape: &[usize]) -> Span {
        if extent.contains(&0) {
            return Span::Flat(0..0);
        }
        // Contiguous: after the first dim with more than one index, every dim is whole.
        let first_wide = extent.iter().position(|&e| e > 1).unwrap_or(extent.len());
        let whole_after = (first_wide + 1..shape.len()).all(|d| extent[d] == shape[d]);
        if whole_after {
            let at = flat_index(start, shape);
            return Span::Flat(at..at + extent.iter().product::<usize>());
        }
        Span::Block { start: start.to_vec(), extent: extent.to_vec() }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Span::Flat(r) => r.len(),
            Span::Block { extent, .. } => extent.iter().product(),
        }
    }

    /// The same elements as a region.
    pub(crate) fn to_region(&self) -> Region {
        match self {
            Span::Flat(r) => Region::Flat(r.clone()),
            Span::Block { start, extent } => Region::Box { start: start.clone(), extent: extent.clone() },
        }
    }

    /// Visits every run that `self` and `other` share, in the order of both spans' elements, until a visit fails.
    pub(crate) fn intersect<E>(
        &self,
        other: &Span,
        shape: &[usize],
        visit: &mut dyn FnMut(Shared) -> Result<(), E>,
    ) -> Result<(), E> {
        self.intersect_within(0..self.len(), other, shape, visit)
    }

    /// Like [`intersect`](Self::intersect), for those of `self`'s elements that lie in `part`, without stepping
    /// through the others. Places are still counted within the whole spans.
    pub(crate) fn intersect_within<E>(
        &self,
        part: Range<usize>,
        other: &Span,
        shape: &[usize],
        visit: &mut dyn FnMut(Shared) -> Result<(), E>,
    ) -> Result<(), E> {
        match (self, other) {
            (Span::Flat(a), Span::Flat(b)) => {
                let lo = (a.start + part.start).max(b.start);
                let hi = (a.start + part.end).min(b.end);
                if lo < hi {
                    visit(Shared { in_first: lo - a.start, in_second: lo - b.start, len: hi - lo })?;
                }
                Ok(())
            }
            (Span::Block { start, extent }, Span::Flat(flat)) => {
                Rows::new(start, extent, shape).meet(part, flat, &mut |local, in_flat, len| {
                    visit(Shared { in_first: local, in_second: in_flat, len })
                })
            }
            (Span::Flat(flat), Span::Block { start, extent }) => {
                let (rows, within) =
                    (Rows::new(start, extent, shape), flat.start + part.start..flat.start + part.end);
                rows.meet(0..other.len(), &within, &mut |local, in_flat, len| {
                    visit(Shared { in_first: part.start + in_flat, in_second: local, len })
                })
            }
            (Span::Block { start: s1, extent: e1 }, Span::Block { start: s2, extent: e2 }) => {
                intersect_blocks(part, (s1, e1), (s2, e2), visit)
            }
        }
    }

    fn overlaps(&self, other: &Span, shape: &[usize]) -> bool {
        self.intersect(other, shape, &mut |_| Err(())).is_err()
    }
}

/// The contiguous rows of a box, in order.
struct Rows<'a> {
    start: &'a [usize],
    extent: &'a [usize],
    shape: &'a [usize],
    /// Dims before this one are stepped through; it and those after it make one run.
    outer: usize,
    run: usize,
}

impl<'a> Rows<'a> {
    fn new(start: &'a [usize], extent: &'a [usize], shape: &'a [usize]) -> Self {
        let mut outer = extent.len().saturating_sub(1);
        let mut run = extent.last().copied().unwrap_or(1);
        while outer > 0 && extent[outer] == shape[outer] {
            outer -= 1;
            run *= extent[outer];
        }
        Rows { start, extent, shape, outer, run }
    }

    fn count(&self) -> usize {
        self.extent[..self.outer].iter().product()
    }

    /// Where row `index` begins in the flattened tensor.
    fn at(&self, index: usize) -> usize {
        let mut coordinates = self.start.to_vec();
        let mut rest = index;
        for d in (0..self.outer).rev() {
            coordinates[d] += rest % self.extent[d];
            rest /= self.extent[d];
        }
        flat_index(&coordinates, self.shape)
    }

    /// Visits (element of the box, element of the range, length) of every run that those of the box's elements that
    /// lie in `part` share with a flat range.
    fn meet<E>(
        &self,
        part: Range<usize>,
        flat: &Range<usize>,
        visit: &mut dyn FnMut(usize, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        // Rows ascend in the flattened tensor.
        let in_flat = first_that(self.count(), |row| self.at(row) + self.run > flat.start);
        for row in in_flat.max(part.start / self.run)..self.count() {
            let (at, local) = (self.at(row), row * self.run);
            if at >= flat.end || local >= part.end {
                break;
            }
            // What of the row is in the range, and what of it is in the part.
            let from = flat.start.saturating_sub(at).max(part.start.saturating_sub(local));
            let to = self.run.min(flat.end - at).min(part.end - local);
            if from < to {
                visit(local + from, at + from - flat.start, to - from)?;
            }
        }
        Ok(())
    }
}

/// The first of `0..count` for which `holds`, found by halving: it must hold for all after the first.
fn first_that(count: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut lo, mut hi) = (0, count);
    while lo < hi {
        let mid = lo + (hi - lo) / 2;
        if holds(mid) { hi = mid } else { lo = mid + 1 }
    }
    lo
}

fn intersect_blocks<E>(
    part: Range<usize>,
    (s1, e1): (&[usize], &[usize]),
    (s2, e2): (&[usize], &[usize]),
    visit: &mut dyn FnMut(Shared) -> Result<(), E>,
) -> Result<(), E> {
    let dims = s1.len();
    let start: Vec<usize> = (0..dims).map(|d| s1[d].max(s2[d])).collect();
    let end: Vec<usize> = (0..dims).map(|d| (s1[d] + e1[d]).min(s2[d] + e2[d])).collect();
    if (0..dims).any(|d| start[d] >= end[d]) {
        return Ok(());
    }
    let extent: Vec<usize> = (0..dims).map(|d| end[d] - start[d]).collect();
    // A run may take in an outer dim only where everything inside it is dense in both boxes.
    let mut outer = dims - 1;
    let mut run = extent[outer];
    while outer > 0 && extent[outer] == e1[outer] && extent[outer] == e2[outer] {
        outer -= 1;
        run *= extent[outer];
    }
    let local = |coordinates: &[usize], s: &[usize], e: &[usize]| {
        let inside: Vec<usize> = coordinates.iter().zip(s).map(|(&c, &s)| c - s).collect();
        flat_index(&inside, e)
    };
    let rows: usize = extent[..outer].iter().product();
    let corner = |row: usize| {
        let mut coordinates = start.clone();
        let mut rest = row;
        for d in (0..outer).rev() {
            coordinates[d] += rest % extent[d];
            rest /= extent[d];
        }
        coordinates
    };
    // Rows ascend in either box.
    for row in first_that(rows, |row| local(&corner(row), s1, e1) + run > part.start)..rows {
        let at = corner(row);
        let (in_first, in_second) = (local(&at, s1, e1), local(&at, s2, e2));
        if in_first >= part.end {
            break;
        }
        let from = part.start.saturating_sub(in_first);
        let to = run.min(part.end - in_first);
        visit(Shared { in_first: in_first + from, in_second: in_second + from, len: to - from })?;
    }
    Ok(())
}

fn flat_index(coordinates: &[usize], shape: &[usize]) -> usize {
    coordinates.iter().zip(shape).fold(0, |at, (&c, &d)| at * d + c)
}

/// Why some spans are not a partition of their tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Uneven {
    /// The spans at these two places share elements.
    Overlap(usize, usize),
    /// So many elements of the tensor belong to no span.
    Missing(usize),
    /// More boxes than can be compared with each other in reasonable time.
    TooManyBoxes(usize),
}

/// Boxes that are not contiguous are compared pairwise; this many take seconds, and no mesh has as many.
const MAX_BOXES: usize = 1 << 14;

/// Checks that every element of a tensor lies in exactly one span. Costs by the number of spans, whatever the sizes
/// they claim.
pub(crate) fn partition(shape: &[usize], spans: &[&Span]) -> Result<(), Uneven> {
    let total = element_count(shape).unwrap_or(usize::MAX);
    let mut order: Vec<usize> = (0..spans.len()).filter(|&i| spans[i].len() > 0).collect();
    if spans.iter().all(|s| matches!(s, Span::Flat(_))) {
        order.sort_by_key(|&i| start_of(spans[i]));
        for pair in order.windows(2) {
            if spans[pair[0]].overlaps(spans[pair[1]], shape) {
                return Err(Uneven::Overlap(pair[0].min(pair[1]), pair[0].max(pair[1])));
            }
        }
    } else {
        if order.len() > MAX_BOXES {
            return Err(Uneven::TooManyBoxes(order.len()));
        }
        for (n, &i) in order.iter().enumerate() {
            if let Some(&j) = order[n + 1..].iter().find(|&&j| spans[i].overlaps(spans[j], shape)) {
                return Err(Uneven::Overlap(i, j));
            }
        }
    }
    // They are disjoint and inside, so they cover the tensor when their sizes add up.
    let covered: usize = order.iter().map(|&i| spans[i].len()).sum();
    if covered == total { Ok(()) } else { Err(Uneven::Missing(total - covered)) }
}

fn start_of(span: &Span) -> usize {
    match span {
        Span::Flat(r) => r.start,
        Span::Block { .. } => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every element of a span, by its index in the flattened tensor, in the span's own order.
    fn elements(span: &Span, shape: &[usize]) -> Vec<usize> {
        match span {
            Span::Flat(r) => r.clone().collect(),
            Span::Block { start, extent } => {
                let total: usize = shape.iter().product();
                (0..total)
                    .filter(|&at| {
                        let mut rest = at;
                        (0..shape.len()).rev().all(|d| {
                            let c = rest % shape[d];
                            rest /= shape[d];
                            c >= start[d] && c < start[d] + extent[d]
                        })
                    })
                    .collect()
            }
        }
    }

    fn shape() -> impl Strategy<Value = Vec<usize>> {
        prop::collection::vec(1usize..5, 1..4)
    }

    fn region_in(shape: Vec<usize>) -> impl Strategy<Value = Region> {
        let total: usize = shape.iter().product();
        let flat = (0..=total, 0..=total).prop_map(|(a, b)| Region::Flat(a.min(b)..a.max(b)));
        let dims: Vec<_> = shape.iter().map(|&d| (0..=d, 0..=d)).collect();
        let boxed = dims.prop_map(|dims| Region::Box {
            start: dims.iter().map(|&(a, b)| a.min(b)).collect(),
            extent: dims.iter().map(|&(a, b)| a.abs_diff(b)).collect(),
        });
        prop_oneof![Just(Region::Whole), flat, boxed]
    }

    proptest! {
        #[test]
        fn two_spans_share_exactly_their_common_elements(
            (shape, a, b) in shape().prop_flat_map(|s| (Just(s.clone()), region_in(s.clone()), region_in(s)))
        ) {
            let (a, b) = (a.resolve(&shape).unwrap(), b.resolve(&shape).unwrap());
            let (in_a, in_b) = (elements(&a, &shape), elements(&b, &shape));
            prop_assert_eq!(a.len(), in_a.len());
            let mut shared = Vec::new();
            a.intersect(&b, &shape, &mut |s: Shared| -> Result<(), ()> {
                for i in 0..s.len {
                    assert_eq!(in_a[s.in_first + i], in_b[s.in_second + i]);
                    shared.push(in_a[s.in_first + i]);
                }
                Ok(())
            }).unwrap();
            let expected: Vec<usize> = in_a.iter().copied().filter(|e| in_b.contains(e)).collect();
            prop_assert_eq!(shared, expected);
        }

        #[test]
        fn the_parts_of_a_span_share_together_what_it_shares(
            (shape, a, b) in shape().prop_flat_map(|s| (Just(s.clone()), region_in(s.clone()), region_in(s))),
            step in 1usize..9,
        ) {
            let (a, b) = (a.resolve(&shape).unwrap(), b.resolve(&shape).unwrap());
            // As (element of a, element of b) pairs, in the order of the visits.
            let pairs = |part: Range<usize>| {
                let mut pairs = Vec::new();
                a.intersect_within(part.clone(), &b, &shape, &mut |s: Shared| -> Result<(), ()> {
                    assert!(s.len > 0 && part.start <= s.in_first && s.in_first + s.len <= part.end);
                    pairs.extend((0..s.len).map(|i| (s.in_first + i, s.in_second + i)));
                    Ok(())
                }).unwrap();
                pairs
            };
            let parts = (0..a.len()).step_by(step).map(|at| at..(at + step).min(a.len()));
            let whole = pairs(0..a.len());
            prop_assert_eq!(parts.flat_map(pairs).collect::<Vec<_>>(), whole.clone());
            // Reading goes forward in the file while it goes forward in memory.
            prop_assert!(whole.is_sorted_by(|x, y| x.0 < y.0 && x.1 < y.1));
        }

        #[test]
        fn a_partition_is_found_out_by_its_elements(
            (shape, regions) in shape().prop_flat_map(|s| (Just(s.clone()), prop::collection::vec(region_in(s), 1..4)))
        ) {
            let spans: Vec<Span> = regions.iter().map(|r| r.resolve(&shape).unwrap()).collect();
            let mut owners = vec![0; shape.iter().product()];
            for span in &spans {
                elements(span, &shape).iter().for_each(|&e| owners[e] += 1);
            }
            let expected = owners.iter().all(|&n| n == 1);
            prop_assert_eq!(partition(&shape, &spans.iter().collect::<Vec<_>>()).is_ok(), expected);
        }
    }

    #[test]
    fn regions_outside_their_tensor_are_refused() {
        assert!(Region::Flat(0..7).resolve(&[2, 3]).is_err());
        let backwards = Range { start: 4, end: 2 };
        assert!(Region::Flat(backwards).resolve(&[2, 3]).is_err());
        assert!(Region::Box { start: vec![1], extent: vec![1] }.resolve(&[2, 3]).is_err());
        assert!(Region::Box { start: vec![usize::MAX, 0], extent: vec![1, 1] }.resolve(&[2, 3]).is_err());
        assert!(Region::Whole.resolve(&[usize::MAX, 2]).is_err());
    }

    #[test]
    fn a_scalar_is_one_element() {
        assert_eq!(Region::Whole.resolve(&[]), Ok(Span::Flat(0..1)));
        assert_eq!(Region::Box { start: vec![], extent: vec![] }.resolve(&[]), Ok(Span::Flat(0..1)));
    }
}
