//! How a unit becomes whole: now, or ahead of its use on the gathers' queue; from all shards, or from neighbours.

use std::ops::Range;
use std::sync::Arc;

use lightrft_collectives::Communicator;

use crate::buffers::{FullUnit, Lease, Whole};
use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::memory::{Among, GatherCall, Memory, Values as _};
use crate::precision::{Combine, Precision};
use crate::unit::ShardedUnits;

/// A gather that may be under way.
#[derive(Debug)]
pub(crate) struct Gathering<Mem: Memory> {
    pending: Mem::Pending,
    lease: Lease,
}

/// What hpZ keeps of a unit: this rank's part of it among its neighbours.
#[derive(Debug)]
pub(crate) struct NearShard<Mem: Memory> {
    /// The state of the parameters that it is of.
    version: u64,
    values: Mem::Values,
}

impl<Mem: Memory> NearShard<Mem> {
    pub(crate) fn bytes(&self) -> usize {
        self.values.capacity_bytes()
    }
}

impl<Mem: Memory> ShardedUnits<Mem> {
    /// The whole unit in f32, all-gathered. *Collective*; one all-gather for each of its segments, or none in a group of
    /// one rank.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Offloaded`], [`Error::Collective`].
    pub fn gather(&mut self, unit: usize) -> Result<FullUnit<Mem>> {
        let plan = Arc::clone(&self.plan);
        let layout = plan.unit(unit)?;
        self.check_loaded(layout)?;
        let Whole { values, lease } = self.pool.take(Precision::F32, layout.padded_elems())?;
        let failed = Error::collective("gather", layout.name());
        let call = self.call_of_shards(unit, layout, Precision::F32)?;
        let pending = self.memory.gather(values, call, None).map_err(&failed)?;
        let values = self.memory.finish(pending).map_err(&failed)?;
        Ok(FullUnit::new(Whole { values, lease }))
    }

    /// Begins to make a unit whole in the precision it is computed in. *Collective*, in the order of these calls.
    pub(crate) fn begin_gather(&mut self, unit: usize) -> Result<Gathering<Mem>> {
        let plan = Arc::clone(&self.plan);
        let layout = plan.unit(unit)?;
        self.check_loaded(layout)?;
        let (whole, call) = match (self.near_whole(unit, layout)?, &self.groups.near) {
            (Some(whole), Some(near)) => {
                let among = Among::Neighbours(Arc::clone(near));
                (whole, self.call(unit, None, among))
            }
            _ => {
                let whole = self.pool.take(self.policy.param_dtype, layout.padded_elems())?;
                (whole, self.call_of_shards(unit, layout, self.policy.param_dtype)?)
            }
        };
        let Whole { values, lease } = whole;
        let pending = self.memory.gather(values, call, self.groups.gathers.as_ref());
        Ok(Gathering { pending: pending.map_err(Error::collective("gather", layout.name()))?, lease })
    }

    /// A gather of the shards, or of the one shard there is, in `precision`.
    fn call_of_shards(
        &mut self,
        unit: usize,
        layout: &FlatUnit,
        precision: Precision,
    ) -> Result<GatherCall<Mem::Values>> {
        let among = match self.is_remote(layout) {
            true => Among::Shards(Arc::clone(&self.groups.shard)),
            false => Among::Alone,
        };
        let shard = Some(self.source(unit, precision)?);
        Ok(self.call(unit, shard, among))
    }

    fn call(&self, unit: usize, shard: Option<Arc<Mem::Values>>, among: Among) -> GatherCall<Mem::Values> {
        GatherCall { shard, among, plan: Arc::clone(&self.plan), unit, rank: self.rank }
    }

    /// Waits for a gather to end.
    pub(crate) fn finish_gather(&mut self, unit: usize, gathering: Gathering<Mem>) -> Result<Whole<Mem>> {
        let layout = self.plan.unit(unit)?;
        let Gathering { pending, lease } = gathering;
        let values = self.memory.finish(pending).map_err(Error::collective("gather", layout.name()))?;
        Ok(Whole { values, lease })
    }

    /// Whether gathers of this unit ask anything of other ranks.
    pub(crate) fn is_remote(&self, unit: &FlatUnit) -> bool {
        self.groups.shard.world_size() > 1 && !unit.is_whole() && unit.padded_elems() > 0
    }

    /// Where hpZ is on, keeps this rank's part of what was gathered for its neighbours, until the parameters change.
    pub(crate) fn keep_near(&mut self, unit: usize, whole: &Whole<Mem>) -> Result<()> {
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
            _ => self.memory.unset(whole.values.precision(), elems)?,
        };
        let mut at = 0;
        for part in layout.parts() {
            let own = near_part(layout.segment(part), rank, ranks);
            let end = at + own.len();
            self.memory.combine(&mut values, at..end, &whole.values, own, Combine::Set)?;
            at = end;
        }
        store.near = Some(NearShard { version: self.version, values });
        Ok(())
    }

    /// A buffer with this rank's part of what its neighbours keep, if that is of these parameters.
    fn near_whole(&mut self, unit: usize, layout: &FlatUnit) -> Result<Option<Whole<Mem>>> {
        let Some(near) = &self.groups.near else {
            return Ok(None);
        };
        let (rank, ranks) = (near.rank(), near.world_size());
        let kept = self.stores[unit].near.as_ref().filter(|near| near.version == self.version);
        let Some(NearShard { values, .. }) = kept else {
            return Ok(None);
        };
        let mut whole = self.pool.take(values.precision(), layout.padded_elems())?;
        let mut at = 0;
        for part in layout.parts() {
            let own = near_part(layout.segment(part), rank, ranks);
            let end = at + own.len();
            self.memory.combine(&mut whole.values, own, values, at..end, Combine::Set)?;
            at = end;
        }
        Ok(Some(whole))
    }
}

/// The even part of a segment that the `rank`th of `ranks` neighbours keeps.
fn near_part(segment: Range<usize>, rank: usize, ranks: usize) -> Range<usize> {
    let each = segment.len() / ranks;
    segment.start + rank * each..segment.start + (rank + 1) * each
}
