//! Gradients on their way in a backward pass: gathered into buckets, reduce-scattered, beside computing where asked.

use std::ops::Range;
use std::sync::Arc;

use crate::buffers::{FullUnit, Lease, Whole};
use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::gradient::{Exchange, GradState};
use crate::memory::{Memory, Values as _};
use crate::plan::Plan;
use crate::policy::{Overlap, Stage};
use crate::precision::{Combine, Precision, UnitValues};
use crate::replicas::{Pass, Sums};
use crate::unit::{Mode, ShardedUnits, wrong_length};

/// What of a backward pass has yet to be sent or to come back.
#[derive(Debug)]
pub(crate) struct Backlog<Mem: Memory> {
    pub(crate) pass: Pass,
    /// Whole gradients that wait for their bucket to fill.
    bucket: Vec<(usize, Whole<Mem>)>,
    /// The reduce-scatter that runs beside backward.
    in_flight: Option<InFlight<Mem>>,
    pub(crate) sums: Sums<Mem>,
}

impl<Mem: Memory> Default for Backlog<Mem> {
    fn default() -> Self {
        Self { pass: Pass::Any, bucket: Vec::new(), in_flight: None, sums: Sums::default() }
    }
}

#[derive(Debug)]
struct InFlight<Mem: Memory> {
    pending: Mem::Pending,
    lease: Lease,
    parts: Parts,
}

/// Where in a reduced buffer this rank's parts of which units lie.
pub(crate) type Parts = Vec<(usize, Range<usize>)>;

impl ShardedUnits {
    /// Adds this rank's whole gradient of a unit's trainable parameters to what has accumulated. *Collective*. In stages 2
    /// and 3 the ranks' gradients are summed at once, by one reduce-scatter, or none in a group of one rank; in stages 0
    /// and 1 nothing is sent before [`sync_gradients`](Self::sync_gradients).
    ///
    /// The sum is a sum, not a mean: scale the loss by what the batch as a whole calls for (tokens, samples,
    /// accumulation steps times ranks). Ranks are added in rank order, and the result to what has accumulated.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Frozen`], [`Error::Offloaded`], [`Error::AlreadySummed`], [`Error::Collective`],
    /// and [`Error::Length`] when `full` has neither [`trainable_elems`](FlatUnit::trainable_elems) nor
    /// [`trainable_padded_elems`](FlatUnit::trainable_padded_elems) elements. All but failures of the collective are
    /// found before anything is sent.
    pub fn reduce_gradient(&mut self, unit: usize, full: Vec<f32>) -> Result<()> {
        let layout = self.plan.unit(unit)?;
        let (elems, padded) = (layout.trainable_elems(), layout.trainable_padded_elems());
        self.check_learns(layout)?;
        if full.len() != elems && full.len() != padded {
            return Err(wrong_length("the full gradient", layout, full.len(), padded));
        }
        let mut full = full;
        full.resize(padded, 0.0);
        let whole = self.pool.whole(UnitValues::F32(full));
        self.push_gradient(unit, whole, Bucket::Alone)?;
        self.settle()
    }
}

impl<Mem: Memory> ShardedUnits<Mem> {
    /// A zeroed buffer for the whole gradient of a unit, to be filled and handed to
    /// [`reduce_gradient`](Self::reduce_gradient).
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Frozen`], [`Error::Offloaded`].
    pub fn gradient_buffer(&mut self, unit: usize) -> Result<FullUnit<Mem>> {
        Ok(FullUnit::new(self.gradient_whole(unit)?))
    }

    pub(crate) fn gradient_whole(&mut self, unit: usize) -> Result<Whole<Mem>> {
        let layout = self.plan.unit(unit)?;
        self.check_learns(layout)?;
        self.pool.take_zeroed(layout.trainable_padded_elems())
    }

    /// The bucket that the stage asks for.
    pub(crate) fn stage_bucket(&self) -> Bucket {
        match self.policy.stage {
            Stage::Zero1 | Stage::Zero2 => Bucket::Elems(self.policy.reduce_bucket_elems),
            _ => Bucket::Alone,
        }
    }

    /// Begins to sum a whole gradient (f32, padded), or adds it to what waits.
    pub(crate) fn push_gradient(&mut self, unit: usize, mut whole: Whole<Mem>, bucket: Bucket) -> Result<()> {
        let plan = Arc::clone(&self.plan);
        let layout = plan.unit(unit)?;
        let goes_on = self.goes_on();
        let Some(gradient) = self.stores.get_mut(unit).and_then(|store| store.grad.as_mut()) else {
            return Ok(());
        };
        gradient.check_open(layout)?;
        // Whatever a caller left in the padding must not reach the norm.
        let padding = layout.trainable_elems()..whole.values.len();
        self.memory.zero(&mut whole.values, padding)?;
        let is_cut = self.groups.shard.world_size() > 1 && whole.values.len() > 0;
        let is_sent = match gradient.exchange {
            Exchange::EachPass => is_cut,
            Exchange::ScatterAtStep => {
                is_cut && self.backlog.pass == Pass::Last && self.policy.overlap == Overlap::On
            }
            Exchange::ReduceAtStep => false,
        };
        if !(is_sent && gradient.exchange == Exchange::EachPass) {
            let all = 0..gradient.accum.len();
            gradient.accumulate(&self.memory, &whole.values, all.clone())?;
            if is_sent {
                // What is sent is the sum of all passes.
                let sum = &gradient.accum;
                self.memory.combine(&mut whole.values, all.clone(), sum, all, Combine::Set)?;
            }
        }
        if !is_sent {
            if goes_on {
                gradient.widen(&self.memory)?;
            }
            self.pool.put_whole(whole);
            return self.push_sums(&[unit]);
        }
        let most = match bucket {
            Bucket::Alone => 0,
            Bucket::Elems(elems) => elems,
        };
        if self.backlog.elems() + whole.values.len() > most {
            self.flush()?;
        }
        self.backlog.bucket.push((unit, whole));
        if self.backlog.elems() >= most { self.flush() } else { Ok(()) }
    }

    /// Says what comes after the pass whose gradients are exchanged next.
    pub(crate) fn begin_exchange(&mut self, pass: Pass) {
        self.backlog.pass = pass;
    }

    /// Ends all exchanges of a backward pass.
    pub(crate) fn finish_exchange(&mut self) -> Result<()> {
        self.flush()?;
        self.settle()?;
        self.flush_sums()?;
        self.settle_sums()?;
        self.backlog.pass = Pass::Any;
        Ok(())
    }

    /// Sends what waits in the bucket.
    fn flush(&mut self) -> Result<()> {
        let bucket = std::mem::take(&mut self.backlog.bucket);
        let (values, parts) = match <[_; 1]>::try_from(bucket) {
            Ok([(unit, whole)]) => {
                let own = self.plan.unit(unit)?.shard(self.rank);
                if self.reduce_directly(unit, &whole)? {
                    self.pool.put_whole(whole);
                    return Ok(());
                }
                (self.in_reduce_dtype(whole)?, vec![(unit, own)])
            }
            Err(bucket) if bucket.is_empty() => return Ok(()),
            Err(bucket) => {
                // Not three buckets at once: one on its way, one that is full, and that in one piece.
                self.settle()?;
                self.pack(bucket)?
            }
        };
        self.start(values, parts)
    }

    /// One call without a buffer between, where the sum can lie at once where it belongs.
    fn reduce_directly(&mut self, unit: usize, whole: &Whole<Mem>) -> Result<bool> {
        let layout = self.plan.unit(unit)?;
        let Some(gradient) = self.stores.get_mut(unit).and_then(|store| store.grad.as_mut()) else {
            return Ok(false);
        };
        if self.policy.overlap == Overlap::On
            || gradient.accum.precision() != Precision::F32
            || self.policy.reduce_dtype != Precision::F32
            || gradient.state != GradState::Zero
        {
            return Ok(false);
        }
        let shard = &*self.groups.shard;
        let reduced = self.memory.reduce_scatter_into(&whole.values, &mut gradient.accum, shard);
        reduced.map_err(Error::collective("gradient reduce-scatter", layout.name()))?;
        gradient.state = GradState::Local;
        Ok(true)
    }

    /// Sums `values` over the shard group, beside computing where that is asked for.
    fn start(&mut self, whole: Whole<Mem>, parts: Parts) -> Result<()> {
        // One is in flight at a time: memory is bounded by it.
        self.settle()?;
        let Whole { values, lease } = whole;
        let (shard, queue) = (&self.groups.shard, self.groups.reduces.as_ref());
        let names = self.names(&units_of(&parts));
        let failed = Error::collective("gradient reduce-scatter", &names);
        let pending = self.memory.reduce_scatter(values, shard, queue).map_err(failed)?;
        self.backlog.in_flight = Some(InFlight { pending, lease, parts });
        if self.policy.overlap == Overlap::On { Ok(()) } else { self.settle() }
    }

    /// Waits for the exchange that is in flight.
    fn settle(&mut self) -> Result<()> {
        let Some(InFlight { pending, lease, parts }) = self.backlog.in_flight.take() else {
            return Ok(());
        };
        let names = self.names(&units_of(&parts));
        let failed = Error::collective("gradient reduce-scatter", &names);
        let values = self.memory.finish(pending).map_err(failed)?;
        self.take_sums(Whole { values, lease }, parts)
    }

    /// Takes this rank's parts of a reduced buffer: into what has accumulated, or as the sum of it. The buffer of one unit is
    /// kept for reuse; that of several is freed, since a unit that were gathered into it would hold all of it.
    fn take_sums(&mut self, whole: Whole<Mem>, parts: Parts) -> Result<()> {
        let (goes_on, has_replicas) = (self.goes_on(), self.groups.replicate.world_size() > 1);
        let units = units_of(&parts);
        for (unit, part) in parts {
            let Some(gradient) = self.stores.get_mut(unit).and_then(|store| store.grad.as_mut()) else {
                continue;
            };
            match gradient.exchange {
                Exchange::EachPass | Exchange::ReduceAtStep => {
                    gradient.accumulate(&self.memory, &whole.values, part)?;
                    if goes_on {
                        gradient.widen(&self.memory)?;
                    }
                }
                Exchange::ScatterAtStep => {
                    gradient.set_own(&self.memory, &whole.values, part)?;
                    if !has_replicas {
                        gradient.state = GradState::Summed;
                    }
                }
            }
        }
        if units.len() == 1 {
            self.pool.put_whole(whole);
        }
        self.push_sums(&units)
    }

    /// The gradient in what it is sent in.
    fn in_reduce_dtype(&mut self, whole: Whole<Mem>) -> Result<Whole<Mem>> {
        if whole.values.precision() == self.policy.reduce_dtype {
            return Ok(whole);
        }
        let all = 0..whole.values.len();
        let mut sent = self.pool.take(self.policy.reduce_dtype, all.len())?;
        self.memory.combine(&mut sent.values, all.clone(), &whole.values, all, Combine::Set)?;
        self.pool.put_whole(whole);
        Ok(sent)
    }

    /// Several units in one buffer, ordered by rank so that one reduce-scatter serves all.
    fn pack(&mut self, bucket: Vec<(usize, Whole<Mem>)>) -> Result<(Whole<Mem>, Parts)> {
        let elems = bucket.iter().map(|(_, whole)| whole.values.len()).sum();
        let mut packed = self.pool.take(self.policy.reduce_dtype, elems)?;
        let units: Vec<usize> = bucket.iter().map(|(unit, _)| *unit).collect();
        let order = rank_order(&self.plan, &units, self.groups.shard.world_size())?;
        for (at, unit, from) in &order {
            if let Some((_, whole)) = bucket.iter().find(|(other, _)| other == unit) {
                let to = *at..*at + from.len();
                self.memory.combine(&mut packed.values, to, &whole.values, from.clone(), Combine::Set)?;
            }
        }
        for (_, whole) in bucket {
            self.pool.put_whole(whole);
        }
        Ok((packed, own_parts(&order, &self.plan, self.rank)?))
    }

    pub(crate) fn names(&self, units: &[usize]) -> String {
        let name = |unit: &usize| self.plan.unit(*unit).map_or("", FlatUnit::name);
        units.iter().map(name).collect::<Vec<_>>().join(", ")
    }

    /// Refuses a pass between the ranks' sum and the step.
    pub(crate) fn check_open(&self) -> Result<()> {
        for (unit, store) in self.plan.units().iter().zip(&self.stores) {
            store.grad.as_ref().map_or(Ok(()), |gradient| gradient.check_open(unit))?;
        }
        Ok(())
    }

    /// Forgets what was on its way.
    pub(crate) fn abandon_exchange(&mut self) {
        let Backlog { sums, .. } = std::mem::take(&mut self.backlog);
        self.abandon_sums(sums);
    }

    pub(crate) fn check_learns(&self, layout: &FlatUnit) -> Result<()> {
        self.check_loaded(layout)?;
        match self.policy.mode {
            Mode::Train => Ok(()),
            Mode::Frozen => Err(Error::Frozen { unit: layout.name().to_owned() }),
        }
    }
}

/// The units whose parts they are.
pub(crate) fn units_of(parts: &Parts) -> Vec<usize> {
    parts.iter().map(|(unit, _)| *unit).collect()
}

/// How much is sent at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bucket {
    /// Each unit on its own.
    Alone,
    /// Units until there are so many elements.
    Elems(usize),
}

impl<Mem: Memory> Backlog<Mem> {
    fn elems(&self) -> usize {
        self.bucket.iter().map(|(_, whole)| whole.values.len()).sum()
    }
}

/// For a buffer of several units whose even parts are what each rank gets: (where in it, unit, which elements of it).
pub(crate) fn rank_order(
    plan: &Plan,
    units: &[usize],
    ranks: usize,
) -> Result<Vec<(usize, usize, Range<usize>)>> {
    let mut order = Vec::with_capacity(units.len() * ranks);
    let mut at = 0;
    for rank in 0..ranks {
        for &unit in units {
            let from = plan.unit(unit)?.shard(rank);
            let elems = from.len();
            order.push((at, unit, from));
            at += elems;
        }
    }
    Ok(order)
}

/// Where in such a buffer the parts of `rank` lie.
pub(crate) fn own_parts(order: &[(usize, usize, Range<usize>)], plan: &Plan, rank: usize) -> Result<Parts> {
    let mut parts = Vec::new();
    for (at, unit, from) in order {
        if plan.unit(*unit)?.shard(rank) == *from {
            parts.push((*unit, *at..*at + from.len()));
        }
    }
    Ok(parts)
}
