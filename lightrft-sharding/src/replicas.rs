//! Sums over the shard group on their way to the replicas, beside the last backward pass before a step.

use lightrft_collectives::Communicator as _;

use crate::buffers::{Lease, Whole};
use crate::error::{Error, Result};
use crate::exchange::{Parts, units_of};
use crate::gradient::{Exchange, GradState, Gradient};
use crate::memory::Memory;
use crate::policy::{Overlap, Stage};
use crate::precision::{Combine, Precision};
use crate::unit::ShardedUnits;

/// What comes after a backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Another, or the step: who knows.
    Any,
    /// The step: what that would exchange can be exchanged beside this pass.
    Last,
}

/// What of these sums has yet to be sent or to come back.
#[derive(Debug)]
pub(crate) struct Sums<Mem: Memory> {
    /// Units that wait for their bucket to fill.
    waiting: Vec<usize>,
    /// The all-reduce that runs beside backward.
    in_flight: Option<(Mem::Pending, AllReduced)>,
}

impl<Mem: Memory> Default for Sums<Mem> {
    fn default() -> Self {
        Self { waiting: Vec::new(), in_flight: None }
    }
}

/// What an all-reduce is of.
#[derive(Debug)]
enum AllReduced {
    /// This unit's accumulated gradient itself: nothing is copied.
    Lent(usize),
    /// Parts in a buffer.
    Packed { parts: Parts, lease: Lease },
}

impl<Mem: Memory> ShardedUnits<Mem> {
    /// Whether sums over the shard group go on to the replicas at once.
    pub(crate) fn goes_on(&self) -> bool {
        self.backlog.pass == Pass::Last
            && self.policy.overlap == Overlap::On
            && self.groups.replicate.world_size() > 1
    }

    /// In the last pass, hands this rank's parts of these units' sums on to the replicas, as the step would: those of one
    /// reduce-scatter together, and whole gradients of stage 0 in buckets. Units that are whole for being small are left to
    /// the step, since other ranks than the replicas hold them too.
    pub(crate) fn push_sums(&mut self, units: &[usize]) -> Result<()> {
        if !self.goes_on() {
            return Ok(());
        }
        let all_are_replicas = self.groups.all_are_replicas();
        let mut ready = Vec::with_capacity(units.len());
        for &unit in units {
            let Some(gradient) = self.stores.get(unit).and_then(|store| store.grad.as_ref()) else {
                continue;
            };
            if gradient.own.is_empty() || gradient.exchange == Exchange::ReduceAtStep && !all_are_replicas {
                continue;
            }
            ready.push(unit);
        }
        let most = if self.policy.stage == Stage::Zero0 { self.policy.reduce_bucket_elems } else { 0 };
        if self.own_elems(&self.backlog.sums.waiting) + self.own_elems(&ready) > most {
            self.flush_sums()?;
        }
        self.backlog.sums.waiting.extend(ready);
        if self.own_elems(&self.backlog.sums.waiting) >= most { self.flush_sums() } else { Ok(()) }
    }

    /// Sends what waits for the replicas.
    pub(crate) fn flush_sums(&mut self) -> Result<()> {
        let units = std::mem::take(&mut self.backlog.sums.waiting);
        if units.is_empty() {
            return Ok(());
        }
        // One is in flight at a time here, too.
        self.settle_sums()?;
        let lent = match units[..] {
            [unit] if self.policy.reduce_dtype == Precision::F32 => {
                let lend = |gradient: &mut Gradient<Mem>| gradient.lend(&self.memory);
                self.stores[unit].grad.as_mut().map_or(Ok(None), lend)?
            }
            _ => None,
        };
        let names = self.names(&units);
        let failed = Error::collective("gradient all-reduce", &names);
        let (values, what) = match lent {
            Some(accum) => (accum, AllReduced::Lent(units[0])),
            None => {
                let (Whole { values, lease }, parts) = self.pack_own(&units)?;
                (values, AllReduced::Packed { parts, lease })
            }
        };
        let (replicas, queue) = (&self.groups.replicate, self.groups.sums.as_deref());
        match self.memory.all_reduce_beside(values, replicas, queue) {
            Ok(pending) => {
                self.backlog.sums.in_flight = Some((pending, what));
                Ok(())
            }
            Err(error) => {
                self.give_up(&what);
                Err(failed(error))
            }
        }
    }

    /// Waits for the sum over replicas that is in flight.
    pub(crate) fn settle_sums(&mut self) -> Result<()> {
        let Some((pending, what)) = self.backlog.sums.in_flight.take() else {
            return Ok(());
        };
        let units = match &what {
            AllReduced::Lent(unit) => vec![*unit],
            AllReduced::Packed { parts, .. } => units_of(parts),
        };
        let names = self.names(&units);
        let values = match self.memory.finish(pending) {
            Ok(values) => values,
            Err(error) => {
                self.give_up(&what);
                return Err(Error::collective("gradient all-reduce", &names)(error));
            }
        };
        match (what, self.stores[units[0]].grad.as_mut()) {
            (AllReduced::Lent(_), Some(gradient)) => gradient.accum = values,
            (AllReduced::Packed { parts, lease }, _) => {
                self.set_own(&values, &parts)?;
                // As in `take_sums`.
                if parts.len() == 1 {
                    self.pool.put_whole(Whole { values, lease });
                }
            }
            (AllReduced::Lent(_), None) => {}
        }
        for unit in units {
            if let Some(gradient) = self.stores[unit].grad.as_mut() {
                gradient.state = GradState::Summed;
            }
        }
        Ok(())
    }

    /// Gives up what is on its way.
    pub(crate) fn abandon_sums(&mut self, sums: Sums<Mem>) {
        if let Some((_, what)) = sums.in_flight {
            self.give_up(&what);
        }
    }

    /// Memory in the place of what was lent to an exchange that is not waited for, or has failed. Its values are gone, as are
    /// those of all gradients of a pass that ends so: they must be zeroed.
    fn give_up(&mut self, what: &AllReduced) {
        if let AllReduced::Lent(unit) = what
            && let Some(gradient) = self.stores[*unit].grad.as_mut()
            && let Err(error) = gradient.take_again(&self.memory, &self.plan.units()[*unit])
        {
            // Whoever uses it next gets an error, since its length is another.
            tracing::warn!(%error, unit, "no memory in the place of a gradient that was lent");
        }
    }

    /// Elements of this rank's parts of the units' sums.
    fn own_elems(&self, units: &[usize]) -> usize {
        let elems = |unit: &usize| self.stores[*unit].grad.as_ref().map_or(0, |gradient| gradient.own.len());
        units.iter().map(elems).sum()
    }

    /// This rank's parts of the units' sums in one buffer, in what they are sent in.
    pub(crate) fn pack_own(&mut self, units: &[usize]) -> Result<(Whole<Mem>, Parts)> {
        let mut packed = self.pool.take(self.policy.reduce_dtype, self.own_elems(units))?;
        let (mut parts, mut at) = (Vec::with_capacity(units.len()), 0);
        for &unit in units {
            if let Some(gradient) = self.stores[unit].grad.as_mut() {
                let (values, own) = gradient.own_mut();
                let part = at..at + own.len();
                at = part.end;
                self.memory.combine(&mut packed.values, part.clone(), values, own, Combine::Set)?;
                parts.push((unit, part));
            }
        }
        Ok((packed, parts))
    }

    /// Overwrites this rank's parts of sums with those of a reduced buffer.
    pub(crate) fn set_own(&mut self, values: &Mem::Values, parts: &Parts) -> Result<()> {
        for (unit, part) in parts {
            if let Some(gradient) = self.stores[*unit].grad.as_mut() {
                gradient.set_own(&self.memory, values, part.clone())?;
            }
        }
        Ok(())
    }
}
