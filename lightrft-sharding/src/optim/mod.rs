//! Optimizers over flat shards: AdamW, which parameters decay, the global norm, averages of parameters.

mod adamw;
mod decay;
mod ema;
mod kernel;
mod narrow;
mod norm;
mod simd;

use std::sync::Arc;

use crate::memory::Memory;
use crate::plan::Plan;
use crate::unit::ShardedUnits;

pub use adamw::{AdamW, AdamWConfig, AdamWCounters, StepReport, Update};
pub use decay::{Decay, decay_by_name};
pub use ema::{Ema, EmaConfig, EmaCounters, EmaUpdate};
pub(crate) use kernel::{Scalars, blend, step_on_host};
pub use narrow::CopyOut;
pub(crate) use narrow::Narrow;
pub(crate) use norm::sum_of_squares;
pub use norm::{GradNorm, grad_norm, loss_scale};

/// How units are other than those that a state was made for, in this memory, with this plan and rank; `None` if they are
/// not.
fn foreign<Mem: Memory>(
    memory: &Mem,
    plan: &Arc<Plan>,
    rank: usize,
    units: &ShardedUnits<Mem>,
) -> Option<String> {
    if rank != units.rank() {
        return Some(format!("it is of rank {rank}, the units are of rank {}", units.rank()));
    }
    if !memory.is(&units.memory) {
        return Some("it lies in other memory".to_owned());
    }
    if Arc::ptr_eq(plan, units.plan()) || plan == units.plan() {
        return None;
    }
    let [mine, theirs] = [plan, units.plan()].map(|plan| {
        let (units, ranks) = (plan.units().len(), plan.world_size());
        format!("{units} units of {} elements over {ranks} ranks", plan.elems())
    });
    Some(format!("it has {mine}, not {theirs}"))
}
