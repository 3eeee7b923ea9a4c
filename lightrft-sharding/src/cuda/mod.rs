//! Units in the memory of GPUs: the same plans, policies, schedules and steps, over buffers on a device.
//!
//! [`ShardedUnits<Gpu>`](crate::ShardedUnits), [`ShardedModel<M, Gpu>`](crate::ShardedModel) and
//! [`AdamW<Gpu>`](crate::AdamW) are those of the host with another [`Memory`](crate::Memory): what is cut, gathered and
//! summed, and when, is decided by the same code. Between ranks goes an
//! [`Nccl`](lightrft_collectives::nccl::Nccl); in a world of one rank any communicator will do.
//!
//! ```no_run
//! use lightrft_collectives::nccl::{Nccl, Options, Stream};
//! use lightrft_collectives::Rendezvous;
//! use lightrft_sharding::cuda::Gpu;
//! use lightrft_sharding::{AdamW, AdamWConfig, ParamSpec, Policy, ShardedUnits, UnitSpec};
//!
//! let rendezvous = Rendezvous::from_env()?;
//! let compute = Stream::new(rendezvous.local_rank())?; // or `Stream::from_raw`, of the stream of a tensor library
//! let world = Nccl::new(rendezvous.init()?, rendezvous.local_rank(), &Options::default())?;
//! let gpu = Gpu::new(&compute)?;
//! let mlp = UnitSpec::new("mlp", [ParamSpec::new("mlp.weight", [4, 2]), ParamSpec::new("mlp.bias", [2])]);
//! let mut units = ShardedUnits::on_gpu(vec![mlp], world, &gpu, &Policy::default())?;
//! let mut adamw = AdamW::new(AdamWConfig::default(), &units)?;
//! let whole = units.gather(0)?;
//! let (address, elems) = (whole.values().pointer(), whole.values().len()); // enqueued: to be used on `compute`
//! let grad = units.gradient_buffer(0)?; // zeros, to be filled on `compute`
//! units.reduce_gradient(0, grad)?;
//! adamw.step(&mut units, 1e-6)?;
//! # Ok::<_, lightrft_sharding::Error>(())
//! ```
//!
//! # What happens where
//! - **Nothing waits but the step.** Calls enqueue and return. Kernels and collectives are ordered by two streams and by
//!   events between them, the caller's compute stream and one for communication. The host waits once in a step, for the eight
//!   bytes of the norm: with them it knows whether the step is skipped, and that no collective before it has failed. It
//!   also waits where values are copied to the host.
//! - **A gather begins when the stage before has been computed,** and runs beside the next one; the buffer that it
//!   takes is that of the stage before. With [`Overlap::On`](crate::Overlap::On) so does a reduce-scatter.
//! - **Nothing is copied around a collective.** NCCL writes the unit where it is used and the sum where it accumulates. What is
//!   gathered in half precision is rounded shard by shard, into its place in the unit.
//! - **A step has the bits of the host.** Kernels do the operations of the host's loops in their order, each rounded on its own.
//!   Sums over ranks have NCCL's order; the norm is summed in f64 in an order that depends on the lengths alone.
//! - **Buffers are reused in the order of the compute stream.** A model that uses a unit, or makes a gradient, on streams of its
//!   own lets the compute stream wait for them first.
//!
//! # With a tensor library
//! [`StagedModel<Gpu>::bind`](crate::StagedModel::bind) is given a unit as [`GpuValues`]: an address, elements and a stream. In
//! candle, a parameter becomes a tensor without a copy by `CudaStream::upgrade_device_ptr` at the address of its
//! [`range`](crate::FlatParam::range), `CudaStorage::wrap_cuda_slice` and `Tensor::from_storage`. Such a tensor would free the memory,
//! which is ours: keep it in `ManuallyDrop`, beside the [`GpuValues`] in `Params`, and let
//! [`unbind`](crate::StagedModel::unbind) give these back. The device is made by `Device::new_cuda_with_stream`, its stream
//! is the compute stream ([`Stream::from_raw`](lightrft_collectives::nccl::Stream::from_raw)), and gradients are handed to
//! [`StageGrads::add`](crate::StageGrads::add) by their addresses.

mod gpu;
mod kernels;
mod lanes;
mod operations;
#[cfg(test)]
mod tests;
mod units;
mod values;

pub use gpu::Gpu;
pub use values::GpuValues;
