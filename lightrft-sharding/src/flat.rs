//! One buffer for a unit: where each parameter lies in it, and which interval of it each rank owns.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::plan::{ParamSpec, UnitSpec};

/// The layout of one unit: its parameters laid one after another, the whole cut evenly over the ranks.
///
/// ```text
/// parameters   |---- w: 0..6 ----|- b: 6..9 -|        9 elements
/// padded       0  1  2  3  4  5  6  7  8  .           10 = 2 ranks x 5
/// shards       |--- rank 0 ---|--- rank 1 ---|
/// ```
///
/// Rank 0 owns `w[0..5]`; rank 1 owns `w[5..6]`, all of `b`, and the element of padding. A rank's shard is one
/// interval, so an all-gather of the shards *is* the unit, and a reduce-scatter of the unit's gradient *is* the
/// shard's gradient: neither needs a copy to put parameters in order.
///
/// Padding is fewer than `world * alignment` elements (so with the default alignment of 1, fewer than `world`) a segment,
/// and is always zero.
///
/// A unit of which some parameters learn and some are frozen has two such segments, each padded and cut on its own: the
/// trainable one first in the full buffer and in every shard. Gradients and optimizer state are as long as the
/// trainable one. A unit that is [not cut](Self::is_whole) is its own shard on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatUnit {
    name: String,
    params: Vec<FlatParam>,
    trainable: Segment,
    frozen: Segment,
    /// Ranks it is cut over: 1 when it is whole.
    cut: usize,
    /// Ranks of the group.
    world: usize,
}

/// One evenly cut run of parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Segment {
    elems: usize,
    shard_elems: usize,
}

/// Which of a unit's two segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Trainable,
    Frozen,
}

/// How a plan lays units out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) alignment: usize,
    /// Units of fewer elements stay whole.
    pub(crate) persistence_threshold: usize,
}

/// A parameter's place in the buffer of its unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatParam {
    name: String,
    shape: Vec<usize>,
    offset: usize,
    elems: usize,
    trainable: bool,
}

/// The part of a parameter that one rank holds (its *ragged* view).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    /// Which elements of the flattened (row-major) parameter.
    pub param: Range<usize>,
    /// Where they lie in the rank's shard of the unit; as long as `param`.
    pub shard: Range<usize>,
}

impl FlatParam {
    /// The parameter's full name, as in the model's state dictionary.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The whole parameter's shape; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements of the whole parameter.
    pub fn elems(&self) -> usize {
        self.elems
    }

    /// Whether it learns.
    pub fn is_trainable(&self) -> bool {
        self.trainable
    }

    /// The parameter's elements within the full buffer of its unit; those of a trainable one also within its gradient.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.elems
    }
}

impl FlatUnit {
    /// Lays out `spec` over `world` ranks, parameters that `learns` apart from those that do not.
    pub(crate) fn new(
        spec: UnitSpec,
        world: usize,
        rules: &Rules,
        learns: &impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let UnitSpec { name: unit, params: specs } = spec;
        let too_large = || Error::TooLarge { unit: unit.clone() };
        let mut params = Vec::with_capacity(specs.len());
        let (mut trainable, mut frozen) = (Segment::default(), Segment::default());
        for ParamSpec { name, shape } in specs {
            let elems = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim)).ok_or_else(too_large)?;
            let learns = learns(&name);
            let segment = if learns { &mut trainable } else { &mut frozen };
            params.push(FlatParam { name, shape, offset: segment.elems, elems, trainable: learns });
            segment.elems = segment.elems.checked_add(elems).ok_or_else(too_large)?;
        }
        let elems = trainable.elems.checked_add(frozen.elems).ok_or_else(too_large)?;
        let cut = if elems < rules.persistence_threshold { 1 } else { world };
        for segment in [&mut trainable, &mut frozen] {
            let even = segment.elems.div_ceil(cut).checked_next_multiple_of(rules.alignment);
            segment.shard_elems = even.ok_or_else(too_large)?;
        }
        // Byte sizes must fit as well: buffers of `padded_elems` f32 values are allocated later.
        trainable
            .shard_elems
            .checked_add(frozen.shard_elems)
            .and_then(|n| n.checked_mul(cut)?.checked_mul(size_of::<f32>()))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(too_large)?;
        for param in params.iter_mut().filter(|param| !param.trainable) {
            param.offset += trainable.shard_elems * cut;
        }
        Ok(Self { name: unit, params, trainable, frozen, cut, world })
    }

    /// The unit's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The unit's parameters, in the order given. They lie in the buffer in this order, the frozen ones after all that
    /// are trainable.
    pub fn params(&self) -> &[FlatParam] {
        &self.params
    }

    /// Elements of all parameters, without padding.
    pub fn elems(&self) -> usize {
        self.trainable.elems + self.frozen.elems
    }

    /// Elements of the full buffer, padding included.
    pub fn padded_elems(&self) -> usize {
        self.shard_elems() * self.cut
    }

    /// Elements that each rank holds.
    pub fn shard_elems(&self) -> usize {
        self.trainable.shard_elems + self.frozen.shard_elems
    }

    /// Elements of the trainable parameters, without padding.
    pub fn trainable_elems(&self) -> usize {
        self.trainable.elems
    }

    /// Elements of the whole gradient, padding included: the first of the full buffer.
    pub fn trainable_padded_elems(&self) -> usize {
        self.trainable.shard_elems * self.cut
    }

    /// Elements of the gradient, and of each tensor of optimizer state, that each rank holds: the first of its shard.
    pub fn trainable_shard_elems(&self) -> usize {
        self.trainable.shard_elems
    }

    /// Number of ranks of the group the plan is for.
    pub fn world_size(&self) -> usize {
        self.world
    }

    /// Whether every rank holds all of it: it is smaller than the persistence threshold.
    pub fn is_whole(&self) -> bool {
        self.cut != self.world
    }

    /// The interval of the full buffer's trainable segment that `rank` owns, padding included: of the full buffer, where
    /// no parameter is frozen. Empty for a rank outside the world.
    pub fn shard(&self, rank: usize) -> Range<usize> {
        self.interval(Part::Trainable, rank)
    }

    /// The elements of parameter `param` (an index into [`params`](Self::params)) that `rank` owns, or `None`
    /// when it owns none of them.
    pub fn owned(&self, param: usize, rank: usize) -> Option<Owned> {
        let param = self.params.get(param)?;
        let range = param.range();
        let (part, before) = match param.trainable {
            true => (Part::Trainable, 0),
            false => (Part::Frozen, self.trainable.shard_elems),
        };
        let shard = self.interval(part, rank);
        let (start, end) = (range.start.max(shard.start), range.end.min(shard.end));
        (start < end).then(|| Owned {
            param: start - range.start..end - range.start,
            shard: before + start - shard.start..before + end - shard.start,
        })
    }

    /// Every non-empty [`Owned`] part of `rank`, with the index of its parameter, in the order of the parameters.
    pub fn owned_parts(&self, rank: usize) -> impl Iterator<Item = (usize, Owned)> + '_ {
        (0..self.params.len()).filter_map(move |i| Some((i, self.owned(i, rank)?)))
    }

    /// As [`owned_parts`](Self::owned_parts), of the parameters that learn: what an optimizer steps, in the order of the
    /// shard.
    pub fn trainable_parts(&self, rank: usize) -> impl Iterator<Item = (usize, Owned)> + '_ {
        self.owned_parts(rank).filter(|(param, _)| self.params[*param].trainable)
    }

    /// The interval of the full buffer that a segment fills, padding included.
    pub(crate) fn segment(&self, part: Part) -> Range<usize> {
        let trainable = self.trainable_padded_elems();
        match part {
            Part::Trainable => 0..trainable,
            Part::Frozen => trainable..self.padded_elems(),
        }
    }

    /// The interval of a rank's shard that a segment fills.
    pub(crate) fn shard_part(&self, part: Part) -> Range<usize> {
        match part {
            Part::Trainable => 0..self.trainable.shard_elems,
            Part::Frozen => self.trainable.shard_elems..self.shard_elems(),
        }
    }

    /// The interval of the full buffer that a rank owns of a segment.
    pub(crate) fn interval(&self, part: Part, rank: usize) -> Range<usize> {
        let segment = self.segment(part);
        if rank >= self.world {
            return segment.end..segment.end;
        }
        let each = segment.len() / self.cut;
        // A whole unit is cut for one rank, and is every rank's.
        let start = segment.start + if self.is_whole() { 0 } else { rank * each };
        start..start + each
    }

    /// The segments that have elements.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        [Part::Trainable, Part::Frozen].into_iter().filter(|part| !self.segment(*part).is_empty())
    }
}
