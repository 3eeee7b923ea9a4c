//! What a gather reads of this rank's shard: the f32 masters, or a copy of them that is already in what is gathered.

use std::sync::Arc;

use crate::error::Result;
use crate::memory::{Memory, Values as _};
use crate::policy::GatherFrom;
use crate::precision::{Combine, Precision};
use crate::unit::ShardedUnits;

/// A unit's shard in the precision that it is gathered in, kept from step to step.
#[derive(Debug)]
pub(crate) struct ShardCopy<Mem: Memory> {
    /// The state of the masters that it is of.
    version: u64,
    values: Arc<Mem::Values>,
}

impl<Mem: Memory> ShardCopy<Mem> {
    pub(crate) fn bytes(&self) -> usize {
        self.values.capacity_bytes()
    }

    /// Where an optimizer that steps the masters of this version rounds them to, if this is a copy of those.
    pub(crate) fn out(&mut self, version: u64) -> Result<Option<&mut Mem::Values>> {
        (self.version == version).then(|| Mem::to_change(&mut self.values)).transpose()
    }
}

impl<Mem: Memory> ShardedUnits<Mem> {
    /// What a gather of this unit in `precision` reads. A copy that is of other parameters (they were loaded, say) is made
    /// anew.
    pub(crate) fn source(&mut self, unit: usize, precision: Precision) -> Result<Arc<Mem::Values>> {
        let store = &mut self.stores[unit];
        if precision == Precision::F32 || self.policy.gather_from == GatherFrom::Masters {
            return Ok(Arc::clone(&store.param));
        }
        let version = self.version;
        if let Some(copy) = store.copy.as_ref().filter(|copy| copy.version == version) {
            return Ok(Arc::clone(&copy.values));
        }
        let all = 0..store.param.len();
        let mut values = match store.copy.take() {
            Some(copy) => copy.values,
            None => Arc::new(self.memory.unset(precision, all.len())?),
        };
        self.memory.combine(Mem::to_change(&mut values)?, all.clone(), &store.param, all, Combine::Set)?;
        store.copy = Some(ShardCopy { version, values: Arc::clone(&values) });
        Ok(values)
    }

    /// Lets the next gather make a unit's copy anew: an optimizer's pass is going to write another.
    pub(crate) fn forget_copy(&mut self, unit: usize) {
        if let Some(store) = self.stores.get_mut(unit) {
            store.copy = None;
        }
    }

    /// The masters have been stepped, and every copy of them with them.
    pub(crate) fn params_stepped(&mut self) {
        let before = self.version;
        self.params_changed();
        for copy in self.stores.iter_mut().filter_map(|store| store.copy.as_mut()) {
            if copy.version == before {
                copy.version = self.version;
            }
        }
    }
}
