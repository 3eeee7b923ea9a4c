//! What has come of one unit's gradient on this rank, and how it is to be summed over ranks.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::memory::{Memory, Values as _};
use crate::policy::{Policy, Stage};
use crate::precision::{Combine, Precision};

/// When and how ranks sum a unit's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exchange {
    /// A reduce-scatter in each backward pass: only this rank's part accumulates.
    EachPass,
    /// A reduce-scatter at the step: the whole gradient accumulates.
    ScatterAtStep,
    /// An all-reduce over all ranks at the step: every rank has the whole unit.
    ReduceAtStep,
}

impl Exchange {
    pub(crate) fn of(policy: &Policy, unit: &FlatUnit) -> Self {
        match policy.stage {
            _ if unit.is_whole() => Exchange::ReduceAtStep,
            Stage::Zero0 => Exchange::ReduceAtStep,
            Stage::Zero1 => Exchange::ScatterAtStep,
            Stage::Zero2 | Stage::Zero3 => Exchange::EachPass,
        }
    }
}

/// Whether the contents mean anything. Zeroing is a change of this word; the first gradient that arrives then
/// overwrites what lies there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GradState {
    Zero,
    /// Passes have added to it.
    Local,
    /// The ranks have summed it for the step.
    Summed,
}

/// The accumulated gradient of a unit's trainable segment.
#[derive(Debug)]
pub(crate) struct Gradient<Mem: Memory> {
    pub(crate) exchange: Exchange,
    pub(crate) state: GradState,
    /// In the policy's `grad_accum_dtype`: the rank's part, or all of it where it is exchanged at the step.
    pub(crate) accum: Mem::Values,
    /// This rank's part of `accum`.
    pub(crate) own: Range<usize>,
    /// This rank's part of the sum, f32, where `accum` is not. Lives from the sum to the step.
    summed: Option<Mem::Values>,
    /// Whether the sum over passes is not yet the sum over ranks.
    deferred: bool,
}

impl<Mem: Memory> Gradient<Mem> {
    /// Zeros for `unit`; `replicas` and `ranks` are the sizes of its two groups.
    pub(crate) fn new(
        memory: &Mem,
        unit: &FlatUnit,
        policy: &Policy,
        rank: usize,
        (ranks, replicas): (usize, usize),
    ) -> Result<Self> {
        let exchange = Exchange::of(policy, unit);
        let (elems, own) = match exchange {
            Exchange::ScatterAtStep => (unit.trainable_padded_elems(), unit.shard(rank)),
            _ => (unit.trainable_shard_elems(), 0..unit.trainable_shard_elems()),
        };
        let deferred = match exchange {
            Exchange::EachPass => replicas > 1,
            Exchange::ScatterAtStep | Exchange::ReduceAtStep => replicas * ranks > 1,
        };
        let accum = memory.zeros(policy.grad_accum_dtype, elems)?;
        Ok(Self { exchange, state: GradState::Zero, accum, own, summed: None, deferred })
    }

    /// Whether [`sync_gradients`](crate::ShardedUnits::sync_gradients) has something to send for it.
    pub(crate) fn is_deferred(&self) -> bool {
        self.deferred
    }

    /// Refuses to add to what the ranks have summed, since that would be counted once for each of them.
    pub(crate) fn check_open(&self, unit: &FlatUnit) -> Result<()> {
        if self.deferred && self.state == GradState::Summed {
            return Err(Error::AlreadySummed { unit: unit.name().to_owned() });
        }
        Ok(())
    }

    /// Adds `part` of `values`, which is as long as `accum`.
    pub(crate) fn accumulate(
        &mut self,
        memory: &Mem,
        values: &Mem::Values,
        part: Range<usize>,
    ) -> Result<()> {
        let how = if self.state == GradState::Zero { Combine::Set } else { Combine::Add };
        let all = 0..self.accum.len();
        memory.combine(&mut self.accum, all, values, part, how)?;
        self.state = GradState::Local;
        Ok(())
    }

    /// This rank's part of the sum over all ranks, if there is one: which elements of which buffer.
    pub(crate) fn sum(&self) -> Option<(&Mem::Values, Range<usize>)> {
        match self.state {
            GradState::Zero => None,
            GradState::Local if self.deferred => None,
            GradState::Local if !self.is_f32() => None,
            GradState::Local | GradState::Summed => Some(self.own_values()),
        }
    }

    /// As [`sum`](Self::sum), zeros where no gradient has arrived.
    pub(crate) fn sum_or_zeros(&mut self, memory: &Mem) -> Result<(&Mem::Values, Range<usize>)> {
        if self.state == GradState::Zero {
            self.touch(memory)?;
            self.widen(memory)?;
            self.state = GradState::Summed;
        }
        Ok(self.own_values())
    }

    /// Zeros become values, so that the ranks can exchange them.
    pub(crate) fn touch(&mut self, memory: &Mem) -> Result<()> {
        if self.state == GradState::Zero {
            let all = 0..self.accum.len();
            memory.zero(&mut self.accum, all)?;
            self.state = GradState::Local;
        }
        Ok(())
    }

    fn is_f32(&self) -> bool {
        self.accum.precision() == Precision::F32
    }

    /// This rank's part as f32, made from the accumulated values where those are not.
    pub(crate) fn widen(&mut self, memory: &Mem) -> Result<()> {
        if !self.is_f32() {
            let part = self.own.clone();
            let summed = summed(&mut self.summed, memory, part.len())?;
            memory.combine(summed, 0..part.len(), &self.accum, part, Combine::Set)?;
        }
        Ok(())
    }

    /// This rank's part as f32; after [`widen`](Self::widen) or [`set_own`](Self::set_own).
    fn own_values(&self) -> (&Mem::Values, Range<usize>) {
        match &self.summed {
            Some(summed) => (summed, 0..self.own.len()),
            None => (&self.accum, self.own.clone()),
        }
    }

    /// As [`own_values`](Self::own_values).
    pub(crate) fn own_mut(&mut self) -> (&mut Mem::Values, Range<usize>) {
        match &mut self.summed {
            Some(summed) => (summed, 0..self.own.len()),
            None => (&mut self.accum, self.own.clone()),
        }
    }

    /// Takes the accumulated values out, to be put back once the ranks have summed them: if they are f32, and all of them
    /// this rank's part.
    pub(crate) fn lend(&mut self, memory: &Mem) -> Result<Option<Mem::Values>> {
        if self.own != (0..self.accum.len()) || !self.is_f32() {
            return Ok(None);
        }
        Ok(Some(std::mem::replace(&mut self.accum, memory.zeros(Precision::F32, 0)?)))
    }

    /// Overwrites this rank's part with `part` of `values`.
    pub(crate) fn set_own(&mut self, memory: &Mem, values: &Mem::Values, part: Range<usize>) -> Result<()> {
        if !self.is_f32() {
            summed(&mut self.summed, memory, self.own.len())?;
        }
        let (into, range) = self.own_mut();
        memory.combine(into, range, values, part, Combine::Set)
    }

    /// Forgets everything; touches no memory, but frees what lives for a step.
    pub(crate) fn clear(&mut self) {
        self.state = GradState::Zero;
        self.summed = None;
    }

    pub(crate) fn bytes(&self) -> usize {
        self.accum.capacity_bytes() + self.summed.as_ref().map_or(0, |summed| summed.capacity_bytes())
    }

    /// Frees the memory of a gradient that is zero, and says how many bytes.
    pub(crate) fn release(&mut self, memory: &Mem) -> Result<usize> {
        if self.state != GradState::Zero {
            return Ok(0);
        }
        let before = self.bytes();
        self.accum = memory.zeros(self.accum.precision(), 0)?;
        Ok(before - self.bytes())
    }

    /// Takes memory again after [`release`](Self::release).
    pub(crate) fn take_again(&mut self, memory: &Mem, unit: &FlatUnit) -> Result<usize> {
        let elems = match self.exchange {
            Exchange::ScatterAtStep => unit.trainable_padded_elems(),
            _ => unit.trainable_shard_elems(),
        };
        // One that was zeroed while it lay elsewhere has its length and no memory.
        if self.accum.len() == elems && (elems == 0 || self.accum.capacity_bytes() > 0) {
            return Ok(0);
        }
        self.accum = memory.zeros(self.accum.precision(), elems)?;
        Ok(self.accum.capacity_bytes())
    }

    /// The buffers of a gradient that holds something.
    pub(crate) fn buffers(&mut self) -> impl Iterator<Item = &mut Mem::Values> {
        let holds = self.state != GradState::Zero;
        std::iter::once(&mut self.accum).chain(&mut self.summed).filter(move |_| holds)
    }
}

/// The buffer of `elems` f32, made where it is not there.
fn summed<'a, Mem: Memory>(
    summed: &'a mut Option<Mem::Values>,
    memory: &Mem,
    elems: usize,
) -> Result<&'a mut Mem::Values> {
    let values = match summed.take() {
        Some(values) => values,
        None => memory.unset(Precision::F32, elems)?,
    };
    Ok(summed.insert(values))
}
