//! Units, models and gradients on a GPU as the caller sees them

use std::ops::Range;
use std::sync::Arc;

use lightrft_collectives::{Communicator, Device, DeviceMut};

use super::gpu::{Gpu, misplaced};
use super::kernels::Run;
use super::values::{GpuValues, precision};
use crate::buffers::{FullUnit, Lease};
use crate::compute::{Slot, StageGrads, StagedModel};
use crate::error::{Error, Result};
use crate::exchange::Bucket;
use crate::model::ShardedModel;
use crate::plan::UnitSpec;
use crate::policy::Policy;
use crate::precision::Precision;
use crate::unit::{ShardedUnits, wrong_length};

impl ShardedUnits<Gpu> {
    /// All-zero shards of `units` in the memory of `gpu`, cut over the ranks of `world` as `policy` says. *Collective.*
    /// A world of several ranks is an [`Nccl`](lightrft_collectives::nccl::Nccl) over as many GPUs.
    ///
    /// # Errors
    /// Those of [`with_policy`](ShardedUnits::with_policy); [`Error::Collective`] for a group that takes no buffers on this
    /// GPU; [`Error::Device`].
    pub fn on_gpu(
        units: Vec<UnitSpec>,
        world: Arc<dyn Communicator>,
        gpu: &Gpu,
        policy: &Policy,
    ) -> Result<Self> {
        let checked = gpu.check_group(&*world).map(|()| &[][..]);
        Self::of_model(gpu.clone(), units, checked, (world, None), policy)
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.memory
    }

    /// This rank's shard of a unit's f32 masters; empty while they are offloaded.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`].
    pub fn param(&self, unit: usize) -> Result<Device<'_>> {
        self.plan().unit(unit)?;
        Ok(self.stores[unit].param.as_device())
    }

    /// This rank's part of the sum of a unit's gradient, as on the host.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`], [`Error::Frozen`].
    pub fn grad(&self, unit: usize) -> Result<Option<Device<'_>>> {
        Ok(self.gradient_sum(unit)?.map(|(values, part): (&GpuValues, Range<usize>)| values.device(part)))
    }

    /// Adds this rank's whole gradient of a unit's trainable parameters to what has accumulated, as on the host.
    /// *Collective.*
    ///
    /// # Errors
    /// As there, and [`Error::Misplaced`] for values of another GPU or type.
    pub fn reduce_gradient(&mut self, unit: usize, full: FullUnit<Gpu>) -> Result<()> {
        let layout = self.plan().unit(unit)?;
        let padded = layout.trainable_padded_elems();
        self.check_learns(layout)?;
        let FullUnit { whole } = full;
        if whole.values.len() != padded {
            return Err(wrong_length("the full gradient", layout, whole.values.len(), padded));
        }
        self.memory.check_place("the full gradient", &whole.values.as_device())?;
        if whole.values.precision() != Precision::F32 {
            let got = format!("{:?}", whole.values.precision());
            return Err(misplaced("the full gradient", got, "F32".to_owned()));
        }
        self.push_gradient(unit, whole, Bucket::Alone)?;
        self.finish_exchange()
    }

    /// Gives a full-size buffer back for reuse by a later gather or gradient, in the order of the compute stream.
    ///
    /// # Errors
    /// [`Error::Misplaced`] for a buffer of another GPU or stream.
    pub fn recycle(&mut self, values: GpuValues) -> Result<()> {
        self.memory.check_place("the buffer", &values.as_device())?;
        self.pool.put(values);
        Ok(())
    }
}

impl FullUnit<Gpu> {
    /// The values to read, padding at the end; parameters lie where [`FlatParam::range`](crate::FlatParam::range) says.
    pub fn values(&self) -> Device<'_> {
        self.whole.values.as_device()
    }

    /// The values to overwrite.
    pub fn values_mut(&mut self) -> DeviceMut<'_> {
        self.whole.values.as_device_mut()
    }

    /// The values and their lease, to be held apart.
    pub fn into_parts(self) -> (GpuValues, Lease) {
        (self.whole.values, self.whole.lease)
    }
}

impl<M: StagedModel<Gpu>> ShardedModel<M, Gpu> {
    /// Cuts `model` over the ranks of `world` as `policy` says, in the memory of `gpu`. *Collective.*
    ///
    /// # Errors
    /// Those of [`new`](ShardedModel::new), and of [`ShardedUnits::on_gpu`].
    pub fn on_gpu(model: M, world: Arc<dyn Communicator>, gpu: &Gpu, policy: Policy) -> Result<Self> {
        let checked = gpu.check_group(&*world);
        Self::cut(gpu.clone(), model, checked, (world, None), &policy)
    }
}

impl StageGrads<'_, Gpu> {
    /// Adds `gradient` (row-major, the parameter's shape; f32, bf16 or f16) to what the parameter has been given in this
    /// pass, in f32 and in its turn on the compute stream. That of a frozen parameter is dropped.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`]; [`Error::InvalidStage`] for a parameter that the unit does not have; [`Error::Length`] for a
    /// gradient of another length, [`Error::Misplaced`] for one on another GPU or stream or of another type;
    /// [`Error::Device`].
    pub fn add(&mut self, unit: usize, param: usize, gradient: Device<'_>) -> Result<()> {
        let memory = self.memory;
        memory.check_place("the gradient", &gradient)?;
        let Some(precision) = precision(gradient.dtype()) else {
            let got = format!("{:?}", gradient.dtype());
            return Err(misplaced("the gradient", got, "F32, BF16 or F16".to_owned()));
        };
        let from = Run { precision, address: gradient.pointer(), elems: gradient.len() };
        if let Some(Slot { values, range, how }) = self.place(unit, param, gradient.len())? {
            memory.take_in(values, range, from, how).map_err(Error::device("add a gradient on a GPU"))?;
        }
        Ok(())
    }

    /// The parameter's gradient in place (f32, zeros at first), for kernels on the compute stream that add to it.
    ///
    /// # Errors
    /// As [`wants`](Self::wants), and [`Error::FrozenParameter`] for one that does not learn.
    pub fn device_mut(&mut self, unit: usize, param: usize) -> Result<DeviceMut<'_>> {
        self.in_place(unit, param).map(|(values, range)| values.device_mut(range))
    }
}
