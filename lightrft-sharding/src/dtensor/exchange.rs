//! One axis of a distributed tensor takes another placement: which collective, and what goes where in its buffers.

use std::borrow::Cow;

use lightrft_collectives::{Communicator, CommunicatorExt as _, Element, ReduceOp};

use super::local::{fill, identity_of_sums, place_of_each};
use super::placement::Placement;
use super::region::Region;
use super::spec::DTensorSpec;
use crate::error::{Error, Result};

/// The two sides of one step, as the ranks of one axis see it.
pub(super) struct Sides<'a> {
    /// This rank's place along the axis.
    place: usize,
    /// What each rank of the axis holds before.
    before: Vec<Vec<Region>>,
    /// And after.
    after: Vec<Vec<Region>>,
    from: &'a Placement,
    to: &'a Placement,
}

impl<'a> Sides<'a> {
    pub(super) fn new(before: &'a DTensorSpec, after: &'a DTensorSpec, axis: usize, at: &[usize]) -> Self {
        let boxes = |spec: &DTensorSpec| -> Vec<Vec<Region>> {
            let mut at = at.to_vec();
            let places = 0..spec.layout().ranks(axis);
            places
                .map(|place| {
                    at[axis] = place;
                    spec.boxes_at(&at)
                })
                .collect()
        };
        Self {
            place: at[axis],
            before: boxes(before),
            after: boxes(after),
            from: &before.layout().placements()[axis],
            to: &after.layout().placements()[axis],
        }
    }

    /// The local values after the step.
    pub(super) fn run<'v, T: Element>(
        &self,
        values: Cow<'v, [T]>,
        comm: &dyn Communicator,
    ) -> Result<Cow<'v, [T]>> {
        use Placement::{Partial, Ragged, Replicate, Shard};

        match (self.from, self.to) {
            (Replicate, Shard { .. } | Ragged(_)) => Ok(self.keep(&values).into()),
            (Partial(op), Replicate) => self.all_reduce(values, *op, comm),
            (Partial(op), Shard { .. } | Ragged(_)) => self.reduce_scatter(&values, *op, comm).map(Cow::from),
            (Shard { .. } | Ragged(_), Replicate) => self.all_gather(&values, comm).map(Cow::from),
            (Shard { .. } | Ragged(_), Shard { .. } | Ragged(_)) => {
                self.all_to_all(&values, comm).map(Cow::from)
            }
            // One rank contributes the values, the others what changes no sum: exact for any number of ranks and type.
            (Replicate, Partial(ReduceOp::Sum)) if self.place > 0 => {
                Ok(vec![identity_of_sums(); values.len()].into())
            }
            (Shard { .. } | Ragged(_), Partial(ReduceOp::Sum)) => {
                let mut out = vec![identity_of_sums(); elems(&self.after[self.place])];
                copy(&self.before[self.place], &values, &self.after[self.place], &mut out);
                Ok(out.into())
            }
            // The rest keep what they have: contributions to a smallest, a largest or a mean are the value itself.
            _ => Ok(values),
        }
    }

    /// Of what this rank has, what it has afterwards too.
    fn keep<T: Element>(&self, values: &[T]) -> Vec<T> {
        let (before, after) = (&self.before[self.place], &self.after[self.place]);
        let mut out = fill(elems(after));
        copy(before, values, after, &mut out);
        out
    }

    fn all_reduce<'v, T: Element>(
        &self,
        values: Cow<'v, [T]>,
        op: ReduceOp,
        comm: &dyn Communicator,
    ) -> Result<Cow<'v, [T]>> {
        let failed = Error::collective("all-reduce", "a distributed tensor");
        match values {
            values if values.is_empty() => Ok(values),
            Cow::Owned(mut values) => {
                comm.all_reduce(&mut values, op).map_err(failed)?;
                Ok(values.into())
            }
            Cow::Borrowed(values) => {
                let mut out = fill(values.len());
                comm.all_reduce_into(values, &mut out, op).map_err(failed)?;
                Ok(out.into())
            }
        }
    }

    /// Parts that are not of one length are padded to the longest.
    fn reduce_scatter<T: Element>(
        &self,
        values: &[T],
        op: ReduceOp,
        comm: &dyn Communicator,
    ) -> Result<Vec<T>> {
        let longest = self.after.iter().map(|boxes| elems(boxes)).max().unwrap_or(0);
        let mine = elems(&self.after[self.place]);
        if longest == 0 {
            return Ok(Vec::new());
        }
        let whole = &self.before[self.place];
        let even = self.after.iter().all(|boxes| elems(boxes) == longest);
        let packed: Cow<'_, [T]> = if even && in_order(self.after.iter(), whole) {
            values.into()
        } else {
            let mut packed = fill(longest * self.after.len());
            for (boxes, out) in self.after.iter().zip(packed.chunks_mut(longest)) {
                copy(whole, values, boxes, out);
            }
            packed.into()
        };
        let mut out = fill(longest);
        comm.reduce_scatter(&packed, &mut out, op)
            .map_err(Error::collective("reduce-scatter", "a distributed tensor"))?;
        out.truncate(mine);
        Ok(out)
    }

    /// Where the parts one after another are the whole, as with dim 0 and flat parts, they are gathered where they belong.
    fn all_gather<T: Element>(&self, values: &[T], comm: &dyn Communicator) -> Result<Vec<T>> {
        let failed = Error::collective("all-gather", "a distributed tensor");
        let counts: Vec<usize> = self.before.iter().map(|boxes| elems(boxes)).collect();
        let mut gathered = fill(counts.iter().sum());
        if gathered.is_empty() {
            return Ok(gathered);
        }
        if counts.iter().all(|count| *count == counts[0]) {
            comm.all_gather(values, &mut gathered).map_err(failed)?;
        } else {
            comm.all_gather_counts(values, &counts, &mut gathered).map_err(failed)?;
        }
        let whole = &self.after[self.place];
        if in_order(self.before.iter(), whole) {
            return Ok(gathered);
        }
        let mut out = fill(gathered.len());
        let mut rest = gathered.as_slice();
        for (boxes, count) in self.before.iter().zip(counts) {
            let (part, others) = rest.split_at(count);
            copy(boxes, part, whole, &mut out);
            rest = others;
        }
        Ok(out)
    }

    /// Nothing is sent where every rank has what it shall have.
    fn all_to_all<T: Element>(&self, values: &[T], comm: &dyn Communicator) -> Result<Vec<T>> {
        let both = || self.before.iter().zip(&self.after);
        if both().all(|(before, after)| shared(before, after) == elems(after)) {
            return Ok(self.keep(values));
        }
        let (before, after) = (&self.before[self.place], &self.after[self.place]);
        let mut input = Vec::with_capacity(values.len());
        let mut send = Vec::with_capacity(self.after.len());
        for theirs in &self.after {
            let start = input.len();
            runs(before, theirs, |from, _, len| input.extend_from_slice(&values[from..from + len]));
            send.push(input.len() - start);
        }
        let receive: Vec<usize> = self.before.iter().map(|theirs| shared(theirs, after)).collect();
        let mut output = fill(receive.iter().sum());
        comm.all_to_all_v(&input, &send, &mut output, &receive)
            .map_err(Error::collective("all-to-all", "a distributed tensor"))?;
        drop(input);
        let mut out = fill(elems(after));
        let mut at = 0;
        for theirs in &self.before {
            // The runs are those that the sender saw, in its order.
            runs(theirs, after, |_, to, len| {
                out[to..to + len].copy_from_slice(&output[at..at + len]);
                at += len;
            });
        }
        Ok(out)
    }
}

pub(super) fn elems(boxes: &[Region]) -> usize {
    boxes.iter().map(Region::elems).sum()
}

/// Visits the runs that two lists of boxes share: (place in the elements of the first, in those of the second, length).
fn runs(from: &[Region], to: &[Region], mut visit: impl FnMut(usize, usize, usize)) {
    for (a, start) in place_of_each(from) {
        for (b, end) in place_of_each(to) {
            a.shared_runs(b, |x, y, len| visit(start + x, end + y, len));
        }
    }
}

pub(super) fn copy<T: Element>(from: &[Region], values: &[T], to: &[Region], out: &mut [T]) {
    runs(from, to, |x, y, len| out[y..y + len].copy_from_slice(&values[x..x + len]));
}

/// Elements that two lists of boxes share.
fn shared(from: &[Region], to: &[Region]) -> usize {
    let both =
        |a: &Region| -> usize { to.iter().filter_map(|b| a.intersection(b)).map(|both| both.elems()).sum() };
    from.iter().map(both).sum()
}

/// Whether the elements of all `parts`, one after another, are those of `whole`.
fn in_order<'a>(parts: impl Iterator<Item = &'a Vec<Region>>, whole: &[Region]) -> bool {
    let mut next = 0;
    for part in parts {
        let start = next;
        let mut ordered = true;
        runs(part, whole, |from, to, len| {
            ordered &= start + from == next && to == next;
            next += len;
        });
        if !ordered {
            return false;
        }
    }
    true
}
