//! How a unit becomes whole: now, or ahead of its use on the gathers' queue; from all shards, or from neighbours.

use std::ops::Range;
use std::sync::Arc;

use lightrft_collectives::{Communicator, CommunicatorExt as _, Pending};

use crate::buffers::{FullUnit, Lease, Whole};
use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::precision::{Combine, Precision, UnitValues};
use crate::unit::ShardedUnits;

/// A gather that may be under way.
#[derive(Debug)]
pub(crate) enum Gathering {
    Done(Whole),
    Pending(Pending<UnitValues>, Lease),
}

/// What hpZ keeps of a unit: this rank's part of it among its neighbours.
#[derive(Debug)]
pub(crate) struct NearShard {
    /// The state of the parameters that it is of.
    version: u64,
    values: UnitValues,
}

impl NearShard {
    pub(crate) fn bytes(&self) -> usize {
        self.values.capacity_bytes()
    }
}

impl ShardedUnits {
    /// The whole unit in f32, all-gathered. *Collective*; one all-gather for each of its segments, or none in a group of
    /// one rank.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Offloaded`], [`Error::Collective`].
    pub fn gather(&mut self, unit: usize) -> Result<FullUnit> {
        Ok(FullUnit::new(self.gather_now(unit)?))
    }

    /// The whole unit in f32. The group reads the shard where it lies: to put it into its place first would be one more
    /// pass over it, which takes some 7% of the time of a gather between two ranks.
    fn gather_now(&mut self, unit: usize) -> Result<Whole> {
        let plan = Arc::clone(&self.plan);
        let layout = plan.unit(unit)?;
        if !self.is_remote(layout) {
            return self.filled(unit, Precision::F32);
        }
        self.check_loaded(layout)?;
        let mut whole = self.pool.take(Precision::F32, layout.padded_elems());
        if let UnitValues::F32(values) = &mut whole.values {
            let shard = &self.stores[unit].param;
            for part in layout.parts() {
                let (own, all) = (&shard[layout.shard_part(part)], &mut values[layout.segment(part)]);
                let gathered = self.groups.shard.all_gather(own, all);
                gathered.map_err(Error::collective("gather", layout.name()))?;
            }
        }
        Ok(whole)
    }

    /// Begins to make a unit whole in the precision it is computed in. *Collective*, in the order of these calls.
    pub(crate) fn begin_gather(&mut self, unit: usize) -> Result<Gathering> {
        let plan = Arc::clone(&self.plan);
        let layout = plan.unit(unit)?;
        let near = self.near_whole(unit, layout)?;
        let is_near = near.is_some();
        if !is_near && self.groups.gathers.is_none() && self.policy.param_dtype == Precision::F32 {
            return Ok(Gathering::Done(self.gather_now(unit)?));
        }
        let ranges = self.cut_ranges(layout);
        let mut whole = match near {
            Some(whole) => whole,
            None if ranges.is_empty() || self.groups.gathers.is_none() => {
                self.filled(unit, self.policy.param_dtype)?
            }
            // The queue fills in this rank's part: that is time which computing can hide, too.
            None => self.pool.take(self.policy.param_dtype, layout.padded_elems()),
        };
        let comm = match &self.groups.near {
            Some(near) if is_near => near,
            _ => &self.groups.shard,
        };
        if ranges.is_empty() {
            return Ok(Gathering::Done(whole));
        }
        match &self.groups.gathers {
            Some(queue) => {
                let Whole { mut values, lease } = whole;
                let near = is_near.then(|| Arc::clone(comm));
                let own = (!is_near).then(|| Arc::clone(&self.stores[unit].param));
                let (plan, rank) = (Arc::clone(&plan), self.rank);
                let pending = queue.enqueue(move |comm| {
                    let layout = &plan.units()[unit];
                    if let Some(shard) = own {
                        own_places(layout, rank).for_each(|(to, from)| values.write(to, &shard[from]));
                    }
                    let comm = near.as_deref().unwrap_or(comm);
                    layout.parts().try_for_each(|part| values.all_gather(layout.segment(part), comm))?;
                    Ok(values)
                });
                Ok(Gathering::Pending(pending, lease))
            }
            None => {
                for range in ranges {
                    let gathered = whole.values.all_gather(range, &**comm);
                    gathered.map_err(Error::collective("gather", layout.name()))?;
                }
                Ok(Gathering::Done(whole))
            }
        }
    }

    /// Waits for a gather to end.
    pub(crate) fn finish_gather(&mut self, unit: usize, gathering: Gathering) -> Result<Whole> {
        let layout = self.plan.unit(unit)?;
        match gathering {
            Gathering::Done(whole) => Ok(whole),
            Gathering::Pending(pending, lease) => {
                let values = pending.wait().map_err(Error::collective("gather", layout.name()))?;
                Ok(Whole { values, lease })
            }
        }
    }

    /// Whether gathers of this unit ask anything of other ranks.
    pub(crate) fn is_remote(&self, unit: &FlatUnit) -> bool {
        self.groups.shard.world_size() > 1 && !unit.is_whole() && unit.padded_elems() > 0
    }

    /// Where hpZ is on, keeps this rank's part of what was gathered for its neighbours, until the parameters change.
    pub(crate) fn keep_near(&mut self, unit: usize, whole: &Whole) -> Result<()> {
        let layout = self.plan.unit(unit)?;
        let Some(near) = self.groups.near.as_ref().filter(|_| self.is_remote(layout)) else {
            return Ok(());
        };
        let (rank, ranks) = (near.rank(), near.world_size());
        let store = &mut self.stores[unit];
        if store.near.as_ref().is_some_and(|near| near.version == self.version) {
            return Ok(());
        }
        let elems = layout.padded_elems() / ranks;
        let mut values = match store.near.take() {
            Some(old) if old.values.len() == elems => old.values,
            _ => UnitValues::zeros(whole.values.precision(), elems),
        };
        let mut at = 0;
        for part in layout.parts() {
            let own = near_part(layout.segment(part), rank, ranks);
            let end = at + own.len();
            values.take_in(at..end, &whole.values, own, Combine::Set);
            at = end;
        }
        store.near = Some(NearShard { version: self.version, values });
        Ok(())
    }

    /// A buffer with this rank's part of what its neighbours keep, if that is of these parameters.
    fn near_whole(&mut self, unit: usize, layout: &FlatUnit) -> Result<Option<Whole>> {
        self.check_loaded(layout)?;
        let Some(near) = &self.groups.near else {
            return Ok(None);
        };
        let (rank, ranks) = (near.rank(), near.world_size());
        let kept = self.stores[unit].near.as_ref().filter(|near| near.version == self.version);
        let Some(NearShard { values, .. }) = kept else {
            return Ok(None);
        };
        let mut whole = self.pool.take(values.precision(), layout.padded_elems());
        let mut at = 0;
        for part in layout.parts() {
            let own = near_part(layout.segment(part), rank, ranks);
            let end = at + own.len();
            whole.values.take_in(own, values, at..end, Combine::Set);
            at = end;
        }
        Ok(Some(whole))
    }

    /// A buffer for the whole unit with this rank's shard in its place.
    fn filled(&mut self, unit: usize, precision: Precision) -> Result<Whole> {
        let layout = self.plan.unit(unit)?;
        self.check_loaded(layout)?;
        let mut whole = self.pool.take(precision, layout.padded_elems());
        for (to, from) in own_places(layout, self.rank) {
            whole.values.write(to, &self.stores[unit].param[from]);
        }
        Ok(whole)
    }

    /// The segments that other ranks have parts of.
    fn cut_ranges(&self, layout: &FlatUnit) -> Vec<Range<usize>> {
        if !self.is_remote(layout) {
            return Vec::new();
        }
        layout.parts().map(|part| layout.segment(part)).collect()
    }
}

/// Where in the whole unit which intervals of the rank's shard lie.
fn own_places(layout: &FlatUnit, rank: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
    layout.parts().map(move |part| (layout.interval(part, rank), layout.shard_part(part)))
}

/// The even part of a segment that the `rank`th of `ranks` neighbours keeps.
fn near_part(segment: Range<usize>, rank: usize, ranks: usize) -> Range<usize> {
    let each = segment.len() / ranks;
    segment.start + rank * each..segment.start + (rank + 1) * each
}
