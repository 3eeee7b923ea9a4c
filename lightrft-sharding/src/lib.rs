//! Parameters, gradients and optimizer state cut over ranks: each keeps its part, and a unit becomes whole while it is
//! used.
//!
//! A **unit** is a group of parameters that are used together: a decoder layer, the embedding, the head. Its
//! parameters lie one after another in one flat buffer, and the buffer is cut evenly over the ranks:
//!
//! ```text
//!             |------- weight -------|-- bias --|pad|
//! whole        0  1  2  3  4  5  6  7  8  9 10  .       gather ▲          │ reduce-scatter
//!             |--- rank 0 ---|--- rank 1 ---|--- rank 2 ---|   │ shards   ▼ of gradients
//! ```
//!
//! So the output of an all-gather *is* the unit and the output of a reduce-scatter *is* a shard's gradient: nothing is
//! copied into order before or after, and padding is less than one element a rank and unit.
//!
//! ```
//! use std::{convert::Infallible, sync::Arc};
//! use lightrft_collectives::{Communicator, local::World};
//! use lightrft_sharding::{AdamW, AdamWConfig, Error, Mode, ParamSpec, Plan, ShardedUnits, UnitSpec};
//!
//! let sums = World::new(3).launch(|comm| {
//!     let mlp = UnitSpec::new("mlp", [ParamSpec::new("mlp.weight", [4, 2]), ParamSpec::new("mlp.bias", [2])]);
//!     let plan = Arc::new(Plan::new(vec![mlp], comm.world_size())?);
//!     let mut units = ShardedUnits::new(plan, comm, Mode::Train)?;
//!     units.load(|_param, range, out| Ok::<_, Infallible>(out.copy_from_slice(&vec![1.0; range.len()])))?;
//!
//!     // Four elements on each rank (the last two of rank 2 are padding); ten when whole.
//!     assert_eq!(units.param(0)?.len(), 4);
//!     assert_eq!(units.gather(0)?.values()[..10], [1.0; 10]);
//!
//!     // A gradient of the whole unit from every rank; its sum, clipped to norm 1, moves each rank's part.
//!     units.reduce_gradient(0, vec![0.5; 10])?;
//!     let mut adamw = AdamW::new(AdamWConfig::default(), &units)?;
//!     let report = adamw.step(&mut units, 0.1)?;
//!     Ok::<_, Error>((units.gather(0)?.values()[..10].to_vec(), report.grad_norm))
//! })?;
//! for (values, norm) in sums {
//!     assert!(values.iter().all(|value| (value - 0.9).abs() < 1e-4));
//!     assert!((norm - 22.5f32.sqrt()).abs() < 1e-6); // ten elements of 3 x 0.5
//! }
//! # Ok::<_, Error>(())
//! ```
//!
//! To train a model, implement [`StagedModel`] for it (no tensor type is needed here, and none is known), and let
//! [`ShardedModel`] gather, compute, free and reduce; [`AdamW`] then steps the shards. For checkpoints,
//! [`state_parts`] and [`load_state`] speak of named parts of tensors, so what was saved on eight ranks loads on four.
//!
//! What is cut, over which ranks, and how it travels, is a [`Policy`]. For P parameters over N ranks, all f32:
//!
//! | [`Stage`] | whole on each rank | bytes kept by each rank | collectives |
//! |---|---|---|---|
//! | `Zero0` | everything | 16 P | a step: all-reduces of buckets of gradients |
//! | `Zero1` | parameters, gradients | 8 P + 12 P/N | a step: reduce-scatters of buckets, an all-gather of each unit |
//! | `Zero2` | parameters | 4 P + 16 P/N | a pass: reduce-scatters of buckets; a step: an all-gather of each unit |
//! | `Zero3` | what is used | 16 P/N | a pass: 2 all-gathers of each unit ([`ReshardAfterForward::Always`]) or 1, and a reduce-scatter |
//!
//! With `param_dtype` bf16 the whole parameters of stages 1 and 2 take 2 P. To each step belongs an all-reduce of eight
//! bytes for the norm, but in stage 0; with replicas (HSDP) also all-reduces of the shards of gradients. In a group of one
//! rank nothing is sent. What belongs to a step runs beside the pass before it where that is
//! [announced](ShardedModel::backward_last).
//!
//! Any tensor of a mesh of ranks, and each parameter, gradient and state of units ([`ParamViews`]), is a [`DTensor`]: its
//! [`Layout`] says how it lies (replicated, sharded, ragged, or as contributions to a sum), and
//! [`redistribute`](DTensor::redistribute) makes it lie otherwise.
//!
//! Units lie in host memory, or, with the feature `cuda`, in that of a GPU: `ShardedUnits<Gpu>` and `ShardedModel<M, Gpu>` are
//! made by `on_gpu`, and all of the above holds for them. Which of the two is a type parameter, [`Memory`], that nobody needs
//! to name who stays on the host.
//!
//! Not here: tensor operations, automatic differentiation and learning-rate schedules; files (`lightrft-ckpt`); the groups
//! themselves (`lightrft-collectives`).

mod agree;
mod buffers;
mod compute;
mod copy;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtensor;
mod error;
mod exchange;
mod flat;
mod gather;
mod gradient;
mod groups;
mod host;
mod memory;
mod model;
mod offload;
mod optim;
mod plan;
mod policy;
mod precision;
mod replicas;
mod schedule;
mod state;
mod sync;
mod unit;

pub use buffers::{FullUnit, Lease, TransientBytes};
pub use compute::{StageGrads, StageSpec, StagedModel};
pub use dtensor::{Cuts, DTensor, DTensorSpec, DTensorView, Layout, ParamViews, Placement, Region};
pub use error::{BoxError, Error, Result};
pub use flat::{FlatParam, FlatUnit, Owned};
pub use host::HostMemory;
pub use memory::Memory;
pub use model::{ShardedModel, Tape};
pub use offload::{Offload, OffloadReport};
pub use optim::{
    AdamW, AdamWConfig, AdamWCounters, CopyOut, Decay, Ema, EmaConfig, EmaCounters, EmaUpdate, GradNorm,
    StepReport, Update, decay_by_name, grad_norm, loss_scale,
};
pub use plan::{ParamSpec, Plan, UnitSpec};
pub use policy::{
    Activations, GatherFrom, Overlap, Policy, ReshardAfterForward, ShardSize, Stage, Trainable,
};
pub use precision::{Precision, UnitValues};
pub use state::{StateKind, StatePart, load_state, state_parts, visit_state};
pub use unit::{Mode, ShardedUnits};

/// The README's example is compiled and run with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
