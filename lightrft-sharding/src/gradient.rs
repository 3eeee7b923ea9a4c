//! What has come of one unit's gradient on this rank, and how it is to be summed over ranks.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::flat::FlatUnit;
use crate::policy::{Policy, Stage};
use crate::precision::{Combine, Precision, UnitValues};

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
pub(crate) struct Gradient {
    pub(crate) exchange: Exchange,
    pub(crate) state: GradState,
    /// In the policy's `grad_accum_dtype`: the rank's part, or all of it where it is exchanged at the step.
    pub(crate) accum: UnitValues,
    /// This rank's part of `accum`.
    pub(crate) own: Range<usize>,
    /// This rank's part of the sum, where `accum` is not f32. Lives from the sum to the step.
    summed: Vec<f32>,
    /// Whether the sum over passes is not yet the sum over ranks.
    deferred: bool,
}

impl Gradient {
    /// Zeros for `unit`; `replicas` and `ranks` are the sizes of its two groups.
    pub(crate) fn new(unit: &FlatUnit, policy: &Policy, rank: usize, ranks: usize, replicas: usize) -> Self {
        let exchange = Exchange::of(policy, unit);
        let (elems, own) = match exchange {
            Exchange::ScatterAtStep => (unit.trainable_padded_elems(), unit.shard(rank)),
            _ => (unit.trainable_shard_elems(), 0..unit.trainable_shard_elems()),
        };
        let deferred = match exchange {
            Exchange::EachPass => replicas > 1,
            Exchange::ScatterAtStep | Exchange::ReduceAtStep => replicas * ranks > 1,
        };
        let accum = UnitValues::zeros(policy.grad_accum_dtype, elems);
        Self { exchange, state: GradState::Zero, accum, own, summed: Vec::new(), deferred }
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
    pub(crate) fn accumulate(&mut self, values: &UnitValues, part: Range<usize>) {
        let how = if self.state == GradState::Zero { Combine::Set } else { Combine::Add };
        let all = 0..self.accum.len();
        self.accum.take_in(all, values, part, how);
        self.state = GradState::Local;
    }

    /// This rank's part of the sum over all ranks, if there is one.
    pub(crate) fn sum(&self) -> Option<&[f32]> {
        match (self.state, &self.accum) {
            (GradState::Zero, _) => None,
            (GradState::Local, _) if self.deferred => None,
            (_, UnitValues::F32(values)) => values.get(self.own.clone()),
            (GradState::Summed, _) => Some(&self.summed),
            (GradState::Local, _) => None,
        }
    }

    /// As [`sum`](Self::sum), zeros where no gradient has arrived.
    pub(crate) fn sum_or_zeros(&mut self) -> &[f32] {
        if self.state == GradState::Zero {
            self.accum.zero();
            self.widen();
            self.state = GradState::Summed;
        }
        self.own_values()
    }

    /// Zeros become values, so that the ranks can exchange them.
    pub(crate) fn touch(&mut self) {
        if self.state == GradState::Zero {
            self.accum.zero();
            self.state = GradState::Local;
        }
    }

    /// This rank's part as f32, made from the accumulated values where those are not.
    pub(crate) fn widen(&mut self) {
        if self.accum.precision() != Precision::F32 {
            self.summed.resize(self.own.len(), 0.0);
            self.accum.read(self.own.clone(), &mut self.summed);
        }
    }

    /// This rank's part as f32; after [`widen`](Self::widen) or [`set_own`](Self::set_own).
    fn own_values(&self) -> &[f32] {
        match &self.accum {
            UnitValues::F32(values) => values.get(self.own.clone()).unwrap_or(&[]),
            _ => &self.summed,
        }
    }

    /// As [`own_values`](Self::own_values).
    pub(crate) fn own_mut(&mut self) -> &mut [f32] {
        match &mut self.accum {
            UnitValues::F32(values) => values.get_mut(self.own.clone()).unwrap_or(&mut []),
            _ => &mut self.summed,
        }
    }

    /// Overwrites this rank's part with `part` of `values`.
    pub(crate) fn set_own(&mut self, values: &UnitValues, part: Range<usize>) {
        if self.accum.precision() != Precision::F32 {
            self.summed.resize(self.own.len(), 0.0);
        }
        values.read(part, self.own_mut());
    }

    /// Forgets everything; touches no memory, but frees what lives for a step.
    pub(crate) fn clear(&mut self) {
        self.state = GradState::Zero;
        self.summed = Vec::new();
    }

    pub(crate) fn bytes(&self) -> usize {
        self.accum.capacity_bytes() + self.summed.capacity() * size_of::<f32>()
    }

    /// Frees the memory of a gradient that is zero, and says how many bytes.
    pub(crate) fn release(&mut self) -> usize {
        if self.state != GradState::Zero {
            return 0;
        }
        let before = self.bytes();
        self.accum = UnitValues::zeros(self.accum.precision(), 0);
        before - self.bytes()
    }

    /// Takes memory again after [`release`](Self::release).
    pub(crate) fn restore(&mut self, unit: &FlatUnit) -> usize {
        let elems = match self.exchange {
            Exchange::ScatterAtStep => unit.trainable_padded_elems(),
            _ => unit.trainable_shard_elems(),
        };
        if self.accum.len() == elems {
            return 0;
        }
        self.accum = UnitValues::zeros(self.accum.precision(), elems);
        self.accum.capacity_bytes()
    }
}
