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
/// Padding is fewer than `world * alignment` elements (so with the default alignment of 1, fewer than `world`),
/// and is always zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatUnit {
    name: String,
    params: Vec<FlatParam>,
    elems: usize,
    shard_elems: usize,
    world: usize,
}

/// A parameter's place in the buffer of its unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatParam {
    name: String,
    shape: Vec<usize>,
    offset: usize,
    elems: usize,
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

    /// The parameter's elements within the full buffer of its unit.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.elems
    }
}

impl FlatUnit {
    /// Lays out `spec` over `world` ranks, each shard a multiple of `alignment` elements.
    pub(crate) fn new(spec: UnitSpec, world: usize, alignment: usize) -> Result<Self> {
        let too_large = |unit: &str| Error::TooLarge { unit: unit.to_owned() };
        let mut params = Vec::with_capacity(spec.params.len());
        let mut offset = 0usize;
        for ParamSpec { name, shape } in spec.params {
            let elems = shape
                .iter()
                .try_fold(1usize, |n, &dim| n.checked_mul(dim))
                .ok_or_else(|| too_large(&spec.name))?;
            params.push(FlatParam { name, shape, offset, elems });
            offset = offset.checked_add(elems).ok_or_else(|| too_large(&spec.name))?;
        }
        let shard_elems = offset
            .div_ceil(world)
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| too_large(&spec.name))?;
        // Byte sizes must fit as well: buffers of `padded_elems` f32 values are allocated later.
        shard_elems
            .checked_mul(world)
            .and_then(|n| n.checked_mul(size_of::<f32>()))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| too_large(&spec.name))?;
        Ok(Self { name: spec.name, params, elems: offset, shard_elems, world })
    }

    /// The unit's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The unit's parameters, in the order in which they lie in the buffer.
    pub fn params(&self) -> &[FlatParam] {
        &self.params
    }

    /// Elements of all parameters, without padding.
    pub fn elems(&self) -> usize {
        self.elems
    }

    /// Elements of the full buffer: `world * shard_elems`. The elements past [`elems`](Self::elems) are padding.
    pub fn padded_elems(&self) -> usize {
        self.shard_elems * self.world
    }

    /// Elements that each rank holds.
    pub fn shard_elems(&self) -> usize {
        self.shard_elems
    }

    /// Number of ranks the unit is cut over.
    pub fn world_size(&self) -> usize {
        self.world
    }

    /// The interval of the full buffer that `rank` owns, padding included. Empty for a rank outside the world.
    pub fn shard(&self, rank: usize) -> Range<usize> {
        let start = rank.min(self.world) * self.shard_elems;
        start..(start + self.shard_elems).min(self.padded_elems())
    }

    /// The elements of parameter `param` (an index into [`params`](Self::params)) that `rank` owns, or `None`
    /// when it owns none of them.
    pub fn owned(&self, param: usize, rank: usize) -> Option<Owned> {
        let range = self.params.get(param)?.range();
        let shard = self.shard(rank);
        let (start, end) = (range.start.max(shard.start), range.end.min(shard.end));
        (start < end).then(|| Owned {
            param: start - range.start..end - range.start,
            shard: start - shard.start..end - shard.start,
        })
    }

    /// Every non-empty [`Owned`] part of `rank`, with the index of its parameter, in the order of the shard.
    pub fn owned_parts(&self, rank: usize) -> impl Iterator<Item = (usize, Owned)> + '_ {
        (0..self.params.len()).filter_map(move |i| Some((i, self.owned(i, rank)?)))
    }
}
