//! The ranks of a test, each a process with a GPU; models, and what is compared of them
#![allow(unreachable_pub)]

use std::sync::Arc;
use std::time::Duration;

use lightrft_collectives::launch::{Launcher, Outcome};
use lightrft_collectives::nccl::{self, Nccl, Options};
use lightrft_collectives::{Communicator, Rendezvous, Single};
use lightrft_sharding::cuda::{Gpu, GpuValues};
use lightrft_sharding::{
    AdamW, AdamWConfig, Error, FlatUnit, Memory, ParamSpec, Policy, ShardedModel, ShardedUnits, StageGrads,
    StageSpec, StagedModel, StateKind, UnitSpec, visit_state,
};

use crate::chain::{Chain, OnGpu, start};

/// How long a healthy test may wait.
pub const LIMIT: Duration = Duration::from_secs(60);

pub const CHAIN: Chain = Chain { layers: 4, width: 1003, rows: 5 };

/// GPUs to use: `LIGHTRFT_GPUS`, or all.
pub fn gpus() -> usize {
    let there = nccl::count().expect("a GPU test on a machine without GPUs");
    let wanted = std::env::var("LIGHTRFT_GPUS").map_or(there, |n| n.parse().expect("LIGHTRFT_GPUS"));
    assert!(wanted <= there && wanted > 0, "{wanted} GPUs wanted, {there} there");
    wanted
}

/// Runs the ignored test `role` of this file once for each of `ranks` GPUs.
pub fn run(role: &str, ranks: usize) -> Outcome {
    let launcher = Launcher::new(std::env::current_exe().unwrap())
        .args([role, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .grace(Duration::from_secs(40))
        .ranks(ranks);
    launcher.run().unwrap()
}

pub fn run_all(role: &str, ranks: usize) {
    let outcome = run(role, ranks);
    assert!(outcome.is_success(), "{role}: {outcome}");
}

/// GPUs to use, two or more.
pub fn several() -> usize {
    let ranks = gpus();
    assert!(ranks > 1, "needs two GPUs");
    ranks
}

/// This process' GPU, and its rank in a group of them.
pub fn join() -> (Arc<dyn Communicator>, Gpu) {
    let rendezvous = Rendezvous::from_env().unwrap();
    let ordinal = rendezvous.local_rank();
    let host = rendezvous.timeout(Duration::from_secs(30)).init().unwrap();
    let comm = Nccl::new(host, ordinal, &Options::default().timeout(LIMIT)).unwrap();
    (comm, Gpu::with_ordinal(ordinal).unwrap().timeout(LIMIT))
}

pub fn alone() -> Gpu {
    gpus();
    Gpu::with_ordinal(0).unwrap().timeout(LIMIT)
}

pub fn leave(comm: Arc<dyn Communicator>) {
    drop(comm);
    assert!(nccl::wait_until_destroyed(Duration::from_secs(20)), "communicators are still being destroyed");
}

pub fn settings() -> AdamWConfig {
    AdamWConfig { weight_decay: 0.05, ..AdamWConfig::lightrft() }
}

/// All that a checkpoint of this rank holds.
pub type State = Vec<(StateKind, String, std::ops::Range<usize>, Vec<f32>)>;

pub fn state<Mem: Memory>(units: &ShardedUnits<Mem>, adamw: &AdamW<Mem>) -> State {
    let mut state = Vec::new();
    visit_state(units, Some(adamw), |part| {
        state.push((part.kind, part.param.name().to_owned(), part.range, part.values.to_vec()));
        Ok::<_, Error>(())
    })
    .unwrap();
    state
}

pub fn train(model: &mut ShardedModel<OnGpu, Gpu>, adamw: &mut AdamW<Gpu>, seed: u32) {
    let batch = CHAIN.batch(seed);
    let there = model.model().batch(&batch);
    let (output, tape) = model.forward(&there).unwrap();
    let grad = model.model().rows(&CHAIN.grad(&output.0.download(LIMIT).unwrap(), &batch, 0.01));
    model.backward(tape, grad).unwrap();
    adamw.step(model.units_mut(), 1e-2).unwrap();
}

pub fn ready(gpu: &Gpu) -> (ShardedModel<OnGpu, Gpu>, AdamW<Gpu>) {
    let model = OnGpu::new(CHAIN, gpu);
    let mut model = ShardedModel::on_gpu(model, Single::world(), gpu, Policy::default()).unwrap();
    model.units_mut().load(start).unwrap();
    let adamw = AdamW::new(settings(), model.units()).unwrap();
    (model, adamw)
}

/// Units of `elems` elements each.
pub fn large(units: usize, elems: usize) -> Vec<UnitSpec> {
    let unit = |n| UnitSpec::new(format!("u{n}"), [ParamSpec::new(format!("u{n}.weight"), [elems])]);
    (0..units).map(unit).collect()
}

/// Units that are used one after another, by nobody.
pub struct Idle(pub Vec<UnitSpec>);

impl StagedModel<Gpu> for Idle {
    type Batch = ();
    type Activation = ();
    type Params = GpuValues;
    type Saved = ();
    type Error = Error;

    fn units(&self) -> Vec<UnitSpec> {
        self.0.clone()
    }

    fn stages(&self) -> Vec<StageSpec> {
        (0..self.0.len()).map(|n| StageSpec::new(format!("s{n}"), [n])).collect()
    }

    fn bind(&self, _: &FlatUnit, values: Self::Params) -> Result<Self::Params, Self::Error> {
        Ok(values)
    }

    fn unbind(&self, params: Self::Params) -> Option<Self::Params> {
        Some(params)
    }

    fn forward(&self, _: usize, _: &[&Self::Params], (): &(), _: Option<&()>) -> Result<(), Self::Error> {
        Ok(())
    }

    fn backward(
        &self,
        _: usize,
        _: &[&Self::Params],
        (): &(),
        _: Option<&()>,
        (): (),
        grads: &mut StageGrads<'_, Gpu>,
    ) -> Result<Option<()>, Self::Error> {
        grads.device_mut(0, 0)?;
        Ok(Some(()))
    }
}
