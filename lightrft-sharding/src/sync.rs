//! What ranks still have to sum when a step begins: whole gradients of stages 0 and 1, shards over replicas.

use std::sync::Arc;

use lightrft_collectives::Communicator;

use crate::error::{Error, Result};
use crate::exchange::{own_parts, rank_order};
use crate::gradient::{Exchange, GradState, Gradient};
use crate::memory::{Memory, Values as _};
use crate::precision::{Combine, Precision};
use crate::unit::{ShardedUnits, Store};

impl<Mem: Memory> ShardedUnits<Mem> {
    /// Sums over ranks what has only accumulated so far, so that every [`grad`](Self::grad) is this rank's part of the sum
    /// over all of them. [`AdamW::step`](crate::AdamW::step) calls it. *Collective*: whole units (stage 0) by all-reduces,
    /// stage 1 by reduce-scatters, both of buckets; and replicas (HSDP) by all-reduces of shards. Stages 2 and 3 without
    /// replicas send nothing; nor do others what [`backward_last`](crate::ShardedModel::backward_last) has summed.
    ///
    /// # Errors
    /// [`Error::Frozen`], [`Error::Offloaded`], [`Error::IncompleteBackward`], [`Error::Collective`].
    pub fn sync_gradients(&mut self) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        for unit in plan.units() {
            self.check_learns(unit)?;
        }
        if self.backward_incomplete() {
            return Err(Error::IncompleteBackward);
        }
        // A failure on the way leaves some gradients summed and some not.
        self.begin_backward();
        let memory = self.memory.clone();
        let pending = |wanted: &[Exchange], stores: &mut [Store<Mem>]| -> Result<Vec<usize>> {
            let chosen = stores.iter_mut().enumerate().filter_map(|(unit, store)| {
                let gradient = store.grad.as_mut()?;
                let open = gradient.is_deferred() && gradient.state != GradState::Summed;
                let chosen = open && wanted.contains(&gradient.exchange) && !gradient.own.is_empty();
                chosen.then(|| gradient.touch(&memory).map(|()| unit))
            });
            chosen.collect()
        };
        let is_cut = self.groups.shard.world_size() > 1;
        let scattered =
            if is_cut { pending(&[Exchange::ScatterAtStep], &mut self.stores)? } else { Vec::new() };
        let whole = pending(&[Exchange::ReduceAtStep], &mut self.stores)?;
        let cut = pending(&[Exchange::ScatterAtStep, Exchange::EachPass], &mut self.stores)?;
        // What a reduce-scatter does not widen on its way.
        for (unit, store) in self.stores.iter_mut().enumerate() {
            if let Some(gradient) = store.grad.as_mut().filter(|gradient| gradient.state == GradState::Local)
                && !scattered.contains(&unit)
            {
                gradient.widen(&memory)?;
            }
        }
        for bucket in self.buckets(&scattered, |gradient| gradient.accum.len()) {
            self.scatter_bucket(&bucket)?;
        }
        let everyone = self.groups.whole_comm();
        for bucket in self.buckets(&whole, |gradient| gradient.own.len()) {
            self.all_reduce_bucket(&bucket, &*everyone)?;
        }
        let replicas = self.groups.sums_comm();
        if replicas.world_size() > 1 {
            for bucket in self.buckets(&cut, |gradient| gradient.own.len()) {
                self.all_reduce_bucket(&bucket, &*replicas)?;
            }
        }
        for gradient in self.stores.iter_mut().filter_map(|store| store.grad.as_mut()) {
            if gradient.state == GradState::Local {
                gradient.state = GradState::Summed;
            }
        }
        self.end_backward();
        Ok(())
    }

    /// `units` in their order, as many together as the policy lets.
    fn buckets(&self, units: &[usize], elems: impl Fn(&Gradient<Mem>) -> usize) -> Vec<Vec<usize>> {
        let most = self.policy.reduce_bucket_elems;
        let mut buckets: Vec<Vec<usize>> = Vec::new();
        let mut filled = 0usize;
        for &unit in units {
            let more = self.stores[unit].grad.as_ref().map_or(0, &elems);
            match buckets.last_mut() {
                Some(bucket) if filled + more <= most => {
                    bucket.push(unit);
                    filled += more;
                }
                _ => {
                    buckets.push(vec![unit]);
                    filled = more;
                }
            }
        }
        buckets
    }

    /// One reduce-scatter of whole accumulated gradients.
    fn scatter_bucket(&mut self, units: &[usize]) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        let failed = Error::collective("gradient reduce-scatter", plan.unit(units[0])?.name());
        let shard = Arc::clone(&self.groups.shard);
        let sent_in = self.policy.reduce_dtype;
        if let [unit] = units
            && let Some(gradient) = self.stores[*unit].grad.as_mut()
            && gradient.accum.precision() == sent_in
        {
            self.memory.reduce_scatter_now(&mut gradient.accum, &*shard).map_err(&failed)?;
            return gradient.widen(&self.memory);
        }
        let order = rank_order(&plan, units, shard.world_size())?;
        let elems = order.iter().map(|(_, _, from)| from.len()).sum();
        let mut packed = self.pool.take(sent_in, elems)?;
        for (at, unit, from) in &order {
            if let Some(gradient) = &self.stores[*unit].grad {
                let to = *at..*at + from.len();
                let from = from.clone();
                self.memory.combine(&mut packed.values, to, &gradient.accum, from, Combine::Set)?;
            }
        }
        self.memory.reduce_scatter_now(&mut packed.values, &*shard).map_err(&failed)?;
        self.set_own(&packed.values, &own_parts(&order, &plan, self.rank)?)?;
        // A bucket is as large as many units, and is not needed before the next step: it is not kept for reuse.
        drop(packed);
        Ok(())
    }

    /// One all-reduce of this rank's parts of the sums.
    fn all_reduce_bucket(&mut self, units: &[usize], comm: &dyn Communicator) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        let failed = Error::collective("gradient all-reduce", plan.unit(units[0])?.name());
        let sent_in = self.policy.reduce_dtype;
        if let ([unit], Precision::F32) = (units, sent_in)
            && let Some(gradient) = self.stores[*unit].grad.as_mut()
        {
            let (values, part) = gradient.own_mut();
            return self.memory.all_reduce(values, part, comm).map_err(failed);
        }
        let (mut packed, parts) = self.pack_own(units)?;
        let all = 0..packed.values.len();
        self.memory.all_reduce(&mut packed.values, all, comm).map_err(failed)?;
        self.set_own(&packed.values, &parts)?;
        drop(packed);
        Ok(())
    }
}
