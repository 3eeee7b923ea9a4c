//! Memory given up while the model is not used, as around generation, and taken again.

use std::time::{Duration, Instant};

use crate::compute::StagedModel;
use crate::error::Result;
use crate::gradient::Gradient;
use crate::memory::Memory;
use crate::model::ShardedModel;
use crate::optim::{AdamW, Ema};
use crate::unit::{ShardedUnits, Store};

/// What giving memory up, or taking it again, came to on this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OffloadReport {
    /// Bytes that were moved away or freed, or brought back or taken again.
    pub bytes: usize,
    /// Bytes that are still held where they were: of what is in host memory, all that exists nowhere else.
    pub kept_bytes: usize,
    /// How long it took.
    pub elapsed: Duration,
}

/// Something whose memory can be given up between its uses, as around generation: LightRFT's `offload_model` and
/// `reload_model`, `maybe_offload_optimizer` and `maybe_load_optimizer`.
///
/// # Contract
/// - Neither call sends anything to another rank, but all ranks make it between the same passes: what is gone is gathered
///   again. Either may be made twice: the second does nothing.
/// - In between, whatever would use what is gone returns an error that says so; nothing is reloaded behind the caller's
///   back, since the memory may be in use.
/// - After `reload` every bit that counts is as it was before `offload`.
pub trait Offload {
    /// Gives up what can be given up.
    ///
    /// # Errors
    /// The implementation's; [`is_offloaded`](Self::is_offloaded) then says whether it is. None for what is in host memory.
    fn offload(&mut self) -> Result<OffloadReport>;

    /// Takes it again.
    ///
    /// # Errors
    /// The implementation's; it is then still offloaded. None for what is in host memory.
    fn reload(&mut self) -> Result<OffloadReport>;

    /// Whether it is given up now.
    fn is_offloaded(&self) -> bool;
}

/// On the host, gives up all memory but what exists nowhere else: buffers, what hpZ and gathers keep, and gradients, if they are
/// zero as between steps. Gradients that hold something stay. On a device, masters and gradients that hold something go to pinned
/// memory of the host, too, which is kept for the next time. Meanwhile whatever would gather or reduce returns
/// [`Error::Offloaded`](crate::Error::Offloaded);
/// checkpoints may be written, and loaded.
impl<Mem: Memory> Offload for ShardedUnits<Mem> {
    fn offload(&mut self) -> Result<OffloadReport> {
        let start = Instant::now();
        let mut bytes = self.memory.evict(masters_and_gradients(&mut self.stores)?)?;
        bytes += self.pool.clear();
        for store in &mut self.stores {
            bytes += store.copy.take().map_or(0, |copy| copy.bytes());
            bytes += store.near.take().map_or(0, |near| near.bytes());
            bytes += store.grad.as_mut().map_or(Ok(0), |gradient| gradient.release(&self.memory))?;
        }
        self.offloaded = true;
        self.memory.trim()?;
        Ok(OffloadReport { bytes, kept_bytes: self.persistent_bytes(), elapsed: start.elapsed() })
    }

    fn reload(&mut self) -> Result<OffloadReport> {
        let start = Instant::now();
        let mut bytes = self.memory.restore(masters_and_gradients(&mut self.stores)?)?;
        for (unit, store) in self.plan.units().iter().zip(&mut self.stores) {
            let again = |gradient: &mut Gradient<Mem>| gradient.take_again(&self.memory, unit);
            bytes += store.grad.as_mut().map_or(Ok(0), again)?;
        }
        self.offloaded = false;
        Ok(OffloadReport { bytes, kept_bytes: self.persistent_bytes(), elapsed: start.elapsed() })
    }

    fn is_offloaded(&self) -> bool {
        self.offloaded
    }
}

/// What exists nowhere else.
fn masters_and_gradients<Mem: Memory>(stores: &mut [Store<Mem>]) -> Result<Vec<&mut Mem::Values>> {
    let mut all = Vec::new();
    for Store { param, grad, .. } in stores {
        all.push(Mem::to_change(param)?);
        all.extend(grad.iter_mut().flat_map(Gradient::buffers));
    }
    Ok(all)
}

/// Frees every unit that is gathered, then as [`ShardedUnits`]. Units are gathered again when they are used.
impl<M: StagedModel<Mem>, Mem: Memory> Offload for ShardedModel<M, Mem> {
    fn offload(&mut self) -> Result<OffloadReport> {
        let start = Instant::now();
        let before = self.units().transient_bytes().now;
        self.reshard();
        // What was freed with the model's own tensors; what came back as buffers, which may be larger than what was lent, is
        // counted as they are freed.
        let kept = self.units().transient_bytes().now;
        let report = self.units_mut().offload()?;
        let bytes = (before + report.bytes).saturating_sub(kept);
        Ok(OffloadReport { bytes, elapsed: start.elapsed(), ..report })
    }

    fn reload(&mut self) -> Result<OffloadReport> {
        self.units_mut().reload()
    }

    fn is_offloaded(&self) -> bool {
        self.units().is_offloaded()
    }
}

/// For what goes along with units.
macro_rules! offload_state {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// On a device it goes to pinned memory of the host, which is kept for the next time. On the host it is where
        /// offloading would put it: it stays, [`OffloadReport::bytes`] is 0, and neither call costs anything. Either way it is
        /// not to be used between the two, so that a program which forgets to reload fails on a laptop too. Checkpoints
        /// may be written meanwhile.
        impl<Mem: Memory> Offload for $name<Mem> {
            fn offload(&mut self) -> Result<OffloadReport> {
                let start = Instant::now();
                let (memory, values) = self.values_mut();
                let bytes = memory.evict(values)?;
                let trimmed = memory.trim();
                self.offloaded = true;
                trimmed?;
                Ok(OffloadReport { bytes, kept_bytes: self.persistent_bytes(), elapsed: start.elapsed() })
            }

            fn reload(&mut self) -> Result<OffloadReport> {
                let start = Instant::now();
                let (memory, values) = self.values_mut();
                let bytes = memory.restore(values)?;
                self.offloaded = false;
                Ok(OffloadReport { bytes, kept_bytes: self.persistent_bytes(), elapsed: start.elapsed() })
            }

            fn is_offloaded(&self) -> bool {
                self.offloaded
            }
        }
    };
}
offload_state! {
    /// Gives up both means.
    AdamW
}
offload_state! {
    /// Gives up the average.
    Ema
}
