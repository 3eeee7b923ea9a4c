//! A gathered unit as tensors: its buffer moves into one tensor, parameters are views of it, and it moves out again.

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};
use lightrft_sharding::{FlatParam, FlatUnit, UnitValues};

use crate::error::Result;

/// The parameters of one gathered unit.
///
/// A graph that outlives the unit may hold the views: once the unit is freed they have no memory behind them, until they
/// are lent that of the unit as gathered anew.
#[derive(Debug)]
pub struct BoundUnit {
    /// All values, with the padding.
    flat: Tensor,
    /// In the order of the unit.
    params: Arc<[(String, Tensor)]>,
}

impl BoundUnit {
    /// Moves the values into a tensor of `dtype`. What was gathered in `dtype` is not copied; anything else is widened
    /// to f32 and the narrower buffer dropped.
    pub(super) fn new(unit: &FlatUnit, values: UnitValues, dtype: DType, device: &Device) -> Result<Self> {
        let elems = values.len();
        let flat = match (values, dtype) {
            (UnitValues::Bf16(values), DType::BF16) => Tensor::from_vec(values, elems, &Device::Cpu)?,
            (UnitValues::F16(values), DType::F16) => Tensor::from_vec(values, elems, &Device::Cpu)?,
            (values, _) => Tensor::from_vec(values.into_f32(), elems, &Device::Cpu)?.to_dtype(dtype)?,
        };
        let flat = flat.to_device(device)?;
        let view = |p: &FlatParam| -> Result<(String, Tensor)> {
            let view = flat.narrow(0, p.range().start, p.elems())?.reshape(p.shape())?;
            Ok((p.name().to_owned(), view))
        };
        let params = unit.params().iter().map(view).collect::<Result<_>>()?;
        Ok(Self { flat, params })
    }

    /// The same tensors, for a graph. Not to be computed with once [`into_values`](Self::into_values) has taken their memory.
    pub(super) fn share(&self) -> Self {
        Self { flat: self.flat.clone(), params: Arc::clone(&self.params) }
    }

    /// Names and values, in the order of the unit.
    pub(super) fn params(&self) -> &[(String, Tensor)] {
        &self.params
    }

    /// The buffer, out of the tensor and of every view of it. `None` on another device, where the memory goes with the
    /// last view.
    pub(super) fn into_values(self) -> Option<UnitValues> {
        if !self.flat.device().is_cpu() {
            return None;
        }
        match exchange(&self.flat, nothing()).ok()? {
            CpuStorage::F32(values) => Some(UnitValues::F32(values)),
            CpuStorage::BF16(values) => Some(UnitValues::Bf16(values)),
            CpuStorage::F16(values) => Some(UnitValues::F16(values)),
            _ => None,
        }
    }

    /// Whether the memory behind the views has moved elsewhere.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let (storage, _) = self.flat.storage_and_layout();
        matches!(&*storage, candle_core::Storage::Cpu(CpuStorage::F32(values)) if values.is_empty())
    }
}

/// Runs `f` while `views`, which belong to a graph, have the memory of `bound`: the same units gathered again. Where both
/// are one, nothing moves.
pub(super) fn with_values_of<R>(
    views: &[BoundUnit],
    bound: &[&BoundUnit],
    f: impl FnOnce() -> Result<R>,
) -> Result<R> {
    let mut lent = Lent(Vec::new());
    for (view, &bound) in views.iter().zip(bound).filter(|(view, bound)| view.flat.id() != bound.flat.id()) {
        exchange(&view.flat, exchange(&bound.flat, nothing())?)?;
        lent.0.push((view, bound));
    }
    f()
}

/// Views that have the memory of a unit, which gets it back however this ends.
struct Lent<'a>(Vec<(&'a BoundUnit, &'a BoundUnit)>);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        for (view, bound) in &self.0 {
            // On the host an exchange does not fail.
            if let Ok(values) = exchange(&view.flat, nothing()) {
                let _ = exchange(&bound.flat, values);
            }
        }
    }
}

fn nothing() -> CpuStorage {
    CpuStorage::F32(Vec::new())
}

/// Puts `storage` behind a tensor and all views of it, and returns what was there.
fn exchange(tensor: &Tensor, storage: CpuStorage) -> Result<CpuStorage> {
    let exchange = Exchange(Cell::new(storage));
    tensor.inplace_op1(&exchange)?;
    Ok(exchange.0.into_inner())
}

struct Exchange(Cell<CpuStorage>);

impl InplaceOp1 for Exchange {
    fn name(&self) -> &'static str {
        "exchange"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        *storage = self.0.replace(std::mem::replace(storage, nothing()));
        Ok(())
    }
}
