//! Units on GPUs do what units on the host do: `cargo xtask gpu test [N]` runs these on N GPUs
//!
//! A test named `gpus_…` or `two_gpus_…` starts this program once per GPU, with the name of the test below it that is the
//! rank's part. On a machine with too few GPUs they fail: a GPU test that is skipped has tested nothing.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chain;

use std::sync::Arc;
use std::time::{Duration, Instant};

use chain::{Chain, OnGpu, OnHost, start};
use lightrft_collectives::launch::Launcher;
use lightrft_collectives::local::World;
use lightrft_collectives::nccl::{self, DeviceMemory, Nccl, Options, Stream};
use lightrft_collectives::{Communicator, Rendezvous, Single};
use lightrft_sharding::cuda::Gpu;
use lightrft_sharding::{
    AdamW, AdamWConfig, Error, FlatParam, HostMemory, Memory, Offload, Overlap, ParamSpec, Policy, Precision,
    ReshardAfterForward, ShardSize, ShardedModel, ShardedUnits, Stage, StageGrads, StageSpec, StagedModel,
    StateKind, Trainable, UnitSpec, Update, load_state, state_parts, visit_state,
};

/// How long a healthy test may wait.
const LIMIT: Duration = Duration::from_secs(60);

const CHAIN: Chain = Chain { layers: 4, width: 1003, rows: 5 };

/// GPUs to use: `LIGHTRFT_GPUS`, or all.
fn gpus() -> usize {
    let there = nccl::count().expect("a GPU test on a machine without GPUs");
    let wanted = std::env::var("LIGHTRFT_GPUS").map_or(there, |n| n.parse().expect("LIGHTRFT_GPUS"));
    assert!(wanted <= there && wanted > 0, "{wanted} GPUs wanted, {there} there");
    wanted
}

/// Runs the ignored test `role` of this file once for each of `ranks` GPUs.
fn run_all(role: &str, ranks: usize) {
    let launcher = Launcher::new(std::env::current_exe().unwrap())
        .args([role, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .grace(Duration::from_secs(40))
        .ranks(ranks);
    let outcome = launcher.run().unwrap();
    assert!(outcome.is_success(), "{role}: {outcome}");
}

/// This process' GPU, and its rank in a group of them.
fn join() -> (Arc<dyn Communicator>, Gpu) {
    let rendezvous = Rendezvous::from_env().unwrap();
    let ordinal = rendezvous.local_rank();
    let host = rendezvous.timeout(Duration::from_secs(30)).init().unwrap();
    let comm = Nccl::new(host, ordinal, &Options::default().timeout(LIMIT)).unwrap();
    (comm, Gpu::with_ordinal(ordinal).unwrap().timeout(LIMIT))
}

fn alone() -> Gpu {
    gpus();
    Gpu::with_ordinal(0).unwrap().timeout(LIMIT)
}

fn leave(comm: Arc<dyn Communicator>) {
    drop(comm);
    assert!(nccl::wait_until_destroyed(Duration::from_secs(20)), "communicators are still being destroyed");
}

fn settings() -> AdamWConfig {
    AdamWConfig { weight_decay: 0.05, ..AdamWConfig::lightrft() }
}

/// All that a checkpoint of this rank holds.
type State = Vec<(StateKind, String, std::ops::Range<usize>, Vec<f32>)>;

fn state<Mem: Memory>(units: &ShardedUnits<Mem>, adamw: &AdamW<Mem>) -> State {
    let mut state = Vec::new();
    visit_state(units, Some(adamw), |part| {
        state.push((part.kind, part.param.name().to_owned(), part.range, part.values.to_vec()));
        Ok::<_, Error>(())
    })
    .unwrap();
    state
}

const STEPS: u32 = 5;

/// Several steps of two passes each on the host: norms and clip factors, and what comes of it.
fn on_host(comm: Arc<dyn Communicator>, policy: &Policy) -> (Vec<(f32, f32)>, State) {
    let rank = comm.rank() as u32;
    let mut model = ShardedModel::new(OnHost(CHAIN), comm, policy.clone()).unwrap();
    model.units_mut().load(start).unwrap();
    let mut adamw = AdamW::new(settings(), model.units()).unwrap();
    let mut reports = Vec::new();
    for step in 0..STEPS {
        for pass in 0..2 {
            let batch = CHAIN.batch(100 * rank + 10 * step + pass);
            let (output, tape) = model.forward(&batch).unwrap();
            let grad = CHAIN.grad(&output, &batch, 0.01);
            model.backward(tape, grad).unwrap();
        }
        let report = adamw.step(model.units_mut(), 1e-2).unwrap();
        reports.push((report.grad_norm, report.clip_factor));
    }
    (reports, state(model.units(), &adamw))
}

/// The same on a GPU.
fn on_gpu(comm: Arc<dyn Communicator>, gpu: &Gpu, policy: &Policy) -> (Vec<(f32, f32)>, State) {
    let rank = comm.rank() as u32;
    let mut model = ShardedModel::on_gpu(OnGpu::new(CHAIN, gpu), comm, gpu, policy.clone()).unwrap();
    model.units_mut().load(start).unwrap();
    let mut adamw = AdamW::new(settings(), model.units()).unwrap();
    let mut reports = Vec::new();
    for step in 0..STEPS {
        for pass in 0..2 {
            let batch = CHAIN.batch(100 * rank + 10 * step + pass);
            let there = model.model().batch(&batch);
            let (output, tape) = model.forward(&there).unwrap();
            let grad = CHAIN.grad(&output.0.download(LIMIT).unwrap(), &batch, 0.01);
            let grad = model.model().rows(&grad);
            model.backward(tape, grad).unwrap();
            assert_eq!(model.params_without_gradient().count(), 0);
        }
        let report = adamw.step(model.units_mut(), 1e-2).unwrap();
        reports.push((report.grad_norm, report.clip_factor));
    }
    (reports, state(model.units(), &adamw))
}

/// Every kind of policy that a world of `ranks` can have.
fn policies(ranks: usize) -> Vec<Policy> {
    let bf16 = Policy { param_dtype: Precision::Bf16, ..Policy::default() };
    let mut all = vec![
        Policy::default(),
        Policy { prefetch: 0, ..Policy::default() },
        Policy { prefetch: 2, overlap: Overlap::On, ..Policy::default() },
        bf16.clone(),
        Policy { grad_accum_dtype: Precision::Bf16, ..Policy::default() },
        Policy { reshard_after_forward: ReshardAfterForward::Never, ..Policy::default() },
        Policy { stage: Stage::Zero0, ..Policy::default() },
        Policy { stage: Stage::Zero1, ..Policy::default() },
        Policy { stage: Stage::Zero1, grad_accum_dtype: Precision::Bf16, ..bf16.clone() },
        Policy { stage: Stage::Zero2, overlap: Overlap::On, ..Policy::default() },
        Policy { stage: Stage::Zero2, reduce_bucket_elems: 5000, ..bf16.clone() },
        Policy { persistence_threshold: 4000, ..Policy::default() },
        Policy { alignment: 64, ..bf16.clone() },
        Policy { trainable: Trainable::ExceptPrefixes(vec!["layer1.".into(), "layer2.w".into()]), ..bf16 },
    ];
    if ranks == 2 {
        all.push(Policy { shard_size: ShardSize::Ranks(1), ..Policy::default() });
    }
    all
}

/// Compares with the host's `expected`, bit for bit.
fn assert_same(policy: &Policy, got: &(Vec<(f32, f32)>, State), expected: &(Vec<(f32, f32)>, State)) {
    assert!(got.0.iter().all(|(norm, clip)| *norm > 1.0 && *clip < 1.0), "{:?}", got.0);
    assert_eq!(got.0, expected.0, "norms and clip factors, {policy:?}");
    assert_eq!(got.1.len(), expected.1.len(), "{policy:?}");
    for (got, expected) in got.1.iter().zip(&expected.1) {
        assert_eq!((&got.0, &got.1, &got.2), (&expected.0, &expected.1, &expected.2));
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(bits(&got.3) == bits(&expected.3), "{} of {}, {policy:?}", got.0, got.1);
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_training_has_the_bits_of_the_host_under_every_policy() {
    let gpu = alone();
    for policy in policies(1) {
        let expected = on_host(Single::world(), &policy);
        assert_same(&policy, &on_gpu(Single::world(), &gpu, &policy), &expected);
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn two_gpus_training_have_the_bits_of_two_ranks_on_the_host_under_every_policy() {
    assert!(gpus() > 1, "needs two GPUs");
    run_all("rank_trains", 2);
}

#[test]
#[ignore = "a rank of two_gpus_training_have_the_bits_of_two_ranks_on_the_host_under_every_policy"]
fn rank_trains() {
    let (comm, gpu) = join();
    for policy in policies(2) {
        let begin = Instant::now();
        let hosts = World::new(2).launch(|comm| Ok::<_, Error>(on_host(comm, &policy))).unwrap();
        // A sum of two has one order, so that even sums over ranks have the host's bits.
        assert_same(&policy, &on_gpu(comm.clone(), &gpu, &policy), &hosts[comm.rank()]);
        println!("{:?}, {:?} in {:?}", policy.stage, policy.param_dtype, begin.elapsed());
    }
    leave(comm);
}

/// Units of `elems` elements each.
fn large(units: usize, elems: usize) -> Vec<UnitSpec> {
    let unit = |n| UnitSpec::new(format!("u{n}"), [ParamSpec::new(format!("u{n}.weight"), [elems])]);
    (0..units).map(unit).collect()
}

/// Units that are used one after another, by nobody.
struct Idle(Vec<UnitSpec>);

impl StagedModel<Gpu> for Idle {
    type Batch = ();
    type Activation = ();
    type Params = lightrft_sharding::cuda::GpuValues;
    type Saved = ();
    type Error = Error;

    fn units(&self) -> Vec<UnitSpec> {
        self.0.clone()
    }

    fn stages(&self) -> Vec<StageSpec> {
        (0..self.0.len()).map(|n| StageSpec::new(format!("s{n}"), [n])).collect()
    }

    fn bind(
        &self,
        _: &lightrft_sharding::FlatUnit,
        values: Self::Params,
    ) -> Result<Self::Params, Self::Error> {
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

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_hold_sixteen_bytes_a_parameter_over_the_ranks_and_a_few_units() {
    run_all("rank_is_measured", gpus());
}

#[test]
#[ignore = "a rank of gpus_hold_sixteen_bytes_a_parameter_over_the_ranks_and_a_few_units"]
fn rank_is_measured() {
    const ELEMS: usize = 32 << 20;
    const UNITS: usize = 6;
    let (comm, gpu) = join();
    let world = comm.world_size();
    let free = || {
        assert!(gpu.compute().wait(LIMIT).unwrap());
        gpu.free_bytes().unwrap()
    };
    let policy = Policy { param_dtype: Precision::Bf16, ..Policy::default() };
    // What the first calls leave behind in the driver and in NCCL is not ours to count.
    let pass = |model: &mut ShardedModel<Idle, Gpu>| {
        let ((), tape) = model.forward(&()).unwrap();
        model.backward(tape, ()).unwrap();
    };
    let mut small =
        ShardedModel::on_gpu(Idle(large(3, 1 << 20)), comm.clone(), &gpu, policy.clone()).unwrap();
    pass(&mut small);
    drop(small);
    let before = free();
    let mut model =
        ShardedModel::on_gpu(Idle(large(UNITS, ELEMS)), comm.clone(), &gpu, policy.clone()).unwrap();
    let mut adamw = AdamW::new(AdamWConfig::lightrft(), model.units()).unwrap();
    let kept = model.units().persistent_bytes() + adamw.persistent_bytes();
    assert_eq!(kept, 16 * UNITS * ELEMS / world);
    let taken = before - free();
    println!("kept {kept} B by our count, {taken} B by the driver's");
    const SLACK: usize = 96 << 20;
    assert!(taken.abs_diff(kept) < SLACK);
    for _ in 0..3 {
        pass(&mut model);
        pass(&mut model);
        assert_eq!(adamw.step(model.units_mut(), 1e-3).unwrap().update, Update::Applied);
    }
    // Two units in bf16, where there is one to gather ahead, and a gradient in f32.
    let peak = model.units().transient_bytes().peak;
    let units = if world > 1 { 2 } else { 1 };
    assert_eq!(peak, (2 * units + 4) * ELEMS, "transient peak");
    let taken = before - free();
    println!("and {peak} B at most; {taken} B by the driver's count");
    assert!(taken < kept + peak + SLACK, "{taken} {kept} {peak}");

    // What a step costs, for the record.
    let mut times = Vec::new();
    for _ in 0..10 {
        let norm = lightrft_sharding::grad_norm([model.units_mut()]).unwrap();
        let begin = Instant::now();
        adamw.step_with_norm(model.units_mut(), 1e-3, norm).unwrap();
        assert!(gpu.compute().wait(LIMIT).unwrap());
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let elems = (UNITS * ELEMS / world) as f64;
    println!("AdamW over {elems} elements: {:.3} ms, {:.0} GB/s", times[5] * 1e3, 28e-9 * elems / times[5]);
    let begin = Instant::now();
    for _ in 0..10 {
        pass(&mut model);
    }
    assert!(gpu.compute().wait(LIMIT).unwrap());
    println!("a pass of gathers and reductions: {:.3} ms", begin.elapsed().as_secs_f64() * 1e2);
    model.units_mut().zero_gradients();

    // Offloading gives all of it back.
    let (first, second) = (model.offload().unwrap(), adamw.offload().unwrap());
    println!("offloaded: {first:?} and {second:?}");
    assert_eq!(first.bytes + second.bytes, kept + model.units().transient_bytes().now + peak);
    assert_eq!((first.kept_bytes, second.kept_bytes), (0, 0));
    let held = before.saturating_sub(free());
    println!("still held: {held} B");
    assert!(held < SLACK, "{held}");
    let (first, second) = (model.reload().unwrap(), adamw.reload().unwrap());
    println!("reloaded: {first:?} and {second:?}");
    assert_eq!(first.bytes + second.bytes, kept);
    drop((model, adamw));
    leave(comm);
}

fn train(model: &mut ShardedModel<OnGpu, Gpu>, adamw: &mut AdamW<Gpu>, seed: u32) {
    let batch = CHAIN.batch(seed);
    let there = model.model().batch(&batch);
    let (output, tape) = model.forward(&there).unwrap();
    let grad = model.model().rows(&CHAIN.grad(&output.0.download(LIMIT).unwrap(), &batch, 0.01));
    model.backward(tape, grad).unwrap();
    adamw.step(model.units_mut(), 1e-2).unwrap();
}

fn ready(gpu: &Gpu) -> (ShardedModel<OnGpu, Gpu>, AdamW<Gpu>) {
    let model = OnGpu::new(CHAIN, gpu);
    let mut model = ShardedModel::on_gpu(model, Single::world(), gpu, Policy::default()).unwrap();
    model.units_mut().load(start).unwrap();
    let adamw = AdamW::new(settings(), model.units()).unwrap();
    (model, adamw)
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_state_loads_on_the_host_over_more_ranks_and_the_other_way() {
    let gpu = alone();
    let (mut model, mut adamw) = ready(&gpu);
    (0..3).for_each(|seed| train(&mut model, &mut adamw, seed));
    let saved = state(model.units(), &adamw);
    let find = |saved: &State, kind, param: &FlatParam, range: std::ops::Range<usize>, out: &mut [f32]| {
        let holds = |part: &&(StateKind, String, std::ops::Range<usize>, Vec<f32>)| {
            part.0 == kind && part.1 == param.name() && part.2.start <= range.start && range.end <= part.2.end
        };
        let (_, _, of, values) = saved.iter().find(holds).expect("a part");
        out.copy_from_slice(&values[range.start - of.start..range.end - of.start]);
        Ok::<_, Error>(())
    };
    // On three ranks of the host, and what they hold together again.
    let parts = World::new(3).launch(|comm| {
        let mut model = ShardedModel::new(OnHost(CHAIN), comm, Policy::default())?;
        let mut adamw = AdamW::new(settings(), model.units())?;
        load_state(model.units_mut(), Some(&mut adamw), |kind, param, range, out| {
            find(&saved, kind, param, range, out)
        })?;
        let parts = state_parts(model.units(), Some(&adamw)).into_iter();
        Ok::<_, Error>(
            parts.map(|p| (p.kind, p.param.name().to_owned(), p.range, p.values.to_vec())).collect::<State>(),
        )
    });
    let parts: State = parts.unwrap().into_iter().flatten().collect();
    let (mut again, mut its) = ready(&gpu);
    load_state(again.units_mut(), Some(&mut its), |kind, param, range, out| {
        for (_, _, of, values) in parts.iter().filter(|part| part.0 == kind && part.1 == param.name()) {
            out[of.start - range.start..of.end - range.start].copy_from_slice(values);
        }
        Ok::<_, Error>(())
    })
    .unwrap();
    its.set_counters(adamw.counters());
    assert_eq!(state(again.units(), &its), saved);
    // And both go on alike.
    train(&mut again, &mut its, 7);
    train(&mut model, &mut adamw, 7);
    assert_eq!(state(again.units(), &its), state(model.units(), &adamw));
    let mut whole = Vec::new();
    let see = |_: &_, values: &[f32]| {
        whole.extend_from_slice(values);
        Ok::<_, Error>(())
    };
    model.units_mut().for_each_full_unit(see).unwrap();
    let expected: Vec<f32> = (0..CHAIN.layers)
        .flat_map(|unit| gpu.to_host::<f32>(model.units().param(unit).unwrap()).unwrap())
        .collect();
    assert_eq!(whole, expected);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_memory_comes_back_as_it_went_and_is_refused_meanwhile() {
    let gpu = alone();
    let ((mut model, mut adamw), (mut other, mut others)) = (ready(&gpu), ready(&gpu));
    train(&mut model, &mut adamw, 1);
    train(&mut other, &mut others, 1);
    // A gradient that has accumulated goes along, and comes back.
    let batch = CHAIN.batch(2);
    let mut accumulate = |model: &mut ShardedModel<OnGpu, Gpu>| {
        let there = model.model().batch(&batch);
        let (_, tape) = model.forward(&there).unwrap();
        let grad = model.model().rows(&batch.target);
        model.backward(tape, grad).unwrap();
    };
    accumulate(&mut model);
    accumulate(&mut other);
    let before = state(model.units(), &adamw);
    let (gone, state_gone) = (model.offload().unwrap(), adamw.offload().unwrap());
    println!("{gone:?} {state_gone:?}");
    let elems = model.units().plan().shard_elems();
    assert!(gone.bytes >= 8 * elems && state_gone.bytes == 8 * elems, "{gone:?} {state_gone:?}");
    assert_eq!((gone.kept_bytes, state_gone.kept_bytes), (0, 0));
    assert!(gone.elapsed > Duration::ZERO);
    // Saved from where it is now.
    assert_eq!(state(model.units(), &adamw), before);
    assert_eq!(model.units().param(0).unwrap().len(), 0);
    let there = model.model().batch(&batch);
    assert!(matches!(model.evaluate(&there), Err(Error::Offloaded { .. })));
    assert!(matches!(model.units_mut().gather(0), Err(Error::Offloaded { .. })));
    assert!(matches!(adamw.step(model.units_mut(), 0.1), Err(Error::OptimizerOffloaded)));
    assert_eq!(model.offload().unwrap().bytes, 0);
    let (back, state_back) = (model.reload().unwrap(), adamw.reload().unwrap());
    println!("{back:?} {state_back:?}");
    assert!(back.bytes >= 8 * elems && state_back.bytes == 8 * elems);
    assert_eq!(model.reload().unwrap().bytes, 0);
    assert_eq!(state(model.units(), &adamw), before);
    adamw.step(model.units_mut(), 1e-2).unwrap();
    others.step(other.units_mut(), 1e-2).unwrap();
    assert_eq!(state(model.units(), &adamw), state(other.units(), &others));
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_gradients_that_are_not_finite_skip_the_step() {
    let gpu = alone();
    let (mut model, mut adamw) = ready(&gpu);
    train(&mut model, &mut adamw, 1);
    let before = state(model.units(), &adamw);
    for bad in [f32::NAN, f32::INFINITY] {
        let batch = CHAIN.batch(2);
        let there = model.model().batch(&batch);
        let (_, tape) = model.forward(&there).unwrap();
        let mut grad = batch.target.clone();
        grad[17] = bad;
        let grad = model.model().rows(&grad);
        model.backward(tape, grad).unwrap();
        let report = adamw.step(model.units_mut(), 1e-2).unwrap();
        assert_eq!(report.update, Update::Skipped);
        assert!(!report.grad_norm.is_finite());
    }
    assert_eq!(adamw.counters().skipped, 2);
    assert_eq!(state(model.units(), &adamw), before);
    train(&mut model, &mut adamw, 3);
    assert_eq!(adamw.counters().steps, 2);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_are_given_a_whole_pass_without_waiting() {
    run_all("rank_runs_ahead", gpus());
}

#[test]
#[ignore = "a rank of gpus_are_given_a_whole_pass_without_waiting"]
fn rank_runs_ahead() {
    let (comm, gpu) = join();
    for overlap in [Overlap::Off, Overlap::On] {
        let policy = Policy { overlap, param_dtype: Precision::Bf16, ..Policy::default() };
        let mut model = ShardedModel::on_gpu(OnGpu::new(CHAIN, &gpu), comm.clone(), &gpu, policy).unwrap();
        model.units_mut().load(start).unwrap();
        let there = model.model().batch(&CHAIN.batch(1));
        let grads: Vec<_> = (0..2).map(|_| model.model().rows(&CHAIN.batch(1).target)).collect();
        for (turn, grad) in grads.into_iter().enumerate() {
            assert!(gpu.compute().wait(LIMIT).unwrap());
            comm.barrier_for_tests();
            let begin = Instant::now();
            if turn == 1 {
                // About a second.
                model.model().spin(1_500_000_000);
            }
            let (_, tape) = model.forward(&there).unwrap();
            model.backward(tape, grad).unwrap();
            let (enqueued, end) = (begin.elapsed(), gpu.compute().record().unwrap());
            let was_done = end.has_passed().unwrap();
            assert!(end.wait(LIMIT).unwrap());
            println!("pass {turn}, {overlap:?}: enqueued in {enqueued:?}, done after {:?}", begin.elapsed());
            assert!(turn == 0 || !was_done, "the host has waited for the GPU");
        }
    }
    leave(comm);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_mistakes_are_errors_that_say_what_was_wrong() {
    let gpu = alone();
    let specs = || vec![UnitSpec::new("u", [ParamSpec::new("w", [6]), ParamSpec::new("b", [3])])];
    let mut units = ShardedUnits::on_gpu(specs(), Single::world(), &gpu, &Policy::default()).unwrap();
    units.load(start).unwrap();
    assert!(matches!(units.gather(3), Err(Error::NoSuchUnit { unit: 3, .. })));
    assert!(matches!(units.param(3), Err(Error::NoSuchUnit { unit: 3, .. })));
    assert!(matches!(units.load_unit(0, &[0.0; 8]), Err(Error::Length { got: 8, expected: 9, .. })));
    assert!(matches!(Gpu::with_ordinal(4096), Err(Error::Device { .. })));

    // Gradients of other units, other streams, other GPUs, other types.
    let other = vec![UnitSpec::new("v", [ParamSpec::new("x", [4])])];
    let mut others = ShardedUnits::on_gpu(other, Single::world(), &gpu, &Policy::default()).unwrap();
    let short = others.gradient_buffer(0).unwrap();
    assert!(matches!(units.reduce_gradient(0, short), Err(Error::Length { got: 4, expected: 9, .. })));
    let elsewhere = Gpu::with_ordinal(0).unwrap();
    let mut there = ShardedUnits::on_gpu(specs(), Single::world(), &elsewhere, &Policy::default()).unwrap();
    let foreign = there.gradient_buffer(0).unwrap();
    let refused = units.reduce_gradient(0, foreign).unwrap_err();
    println!("{refused}");
    assert!(matches!(refused, Error::Misplaced { .. }));
    let (values, _lease) = there.gradient_buffer(0).unwrap().into_parts();
    assert!(matches!(units.recycle(values), Err(Error::Misplaced { .. })));
    let mut theirs = AdamW::new(settings(), &there).unwrap();
    let refused = theirs.step(&mut units, 0.1).unwrap_err();
    println!("{refused}");
    assert!(matches!(refused, Error::ForeignOptimizer { .. }));
    let bytes = DeviceMemory::zeroed::<u8>(gpu.compute(), 9).unwrap();
    let refused = gpu.to_host::<f32>(chain::device(&bytes)).unwrap_err();
    println!("{refused}");
    assert!(matches!(refused, Error::Misplaced { .. }));

    // What is frozen has no gradient; a unit that was given up has no address.
    let frozen = Policy { mode: lightrft_sharding::Mode::Frozen, ..Policy::default() };
    let mut frozen = ShardedUnits::on_gpu(specs(), Single::world(), &gpu, &frozen).unwrap();
    assert!(matches!(frozen.gradient_buffer(0), Err(Error::Frozen { .. })));
    assert_eq!(frozen.persistent_bytes(), 4 * 9);
    // The group is asked whether it takes buffers of a GPU before anything is cut.
    let refused = World::new(2).launch(|comm| {
        let units = ShardedUnits::on_gpu(specs(), comm, &gpu, &Policy::default());
        Ok::<_, Error>(units.map(drop).unwrap_err())
    });
    for refused in refused.unwrap() {
        println!("{refused}");
        assert!(matches!(refused, Error::Collective { .. }), "{refused:?}");
    }
    // Where everything was right, it works.
    let grad = units.gradient_buffer(0).unwrap();
    units.reduce_gradient(0, grad).unwrap();
    assert_eq!(gpu.to_host::<f32>(units.grad(0).unwrap().unwrap()).unwrap(), [0.0; 9]);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_gradients_may_be_of_any_precision_and_stream_order_is_asked_for() {
    let gpu = alone();
    struct Given<'a>(&'a Gpu, &'a Stream);
    impl StagedModel<Gpu> for Given<'_> {
        type Batch = ();
        type Activation = ();
        type Params = lightrft_sharding::cuda::GpuValues;
        type Saved = ();
        type Error = Error;

        fn units(&self) -> Vec<UnitSpec> {
            vec![UnitSpec::new("u", [ParamSpec::new("a", [3]), ParamSpec::new("b", [2])])]
        }

        fn stages(&self) -> Vec<StageSpec> {
            vec![StageSpec::new("s", [0])]
        }

        fn bind(
            &self,
            _: &lightrft_sharding::FlatUnit,
            values: Self::Params,
        ) -> Result<Self::Params, Self::Error> {
            Ok(values)
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
            let halves = [1.5, -2.0, 3.0].map(half::bf16::from_f32);
            let given = DeviceMemory::upload(self.0.compute(), &halves)?;
            grads.add(0, 0, chain::device(&given))?;
            let more = DeviceMemory::upload(self.0.compute(), &[0.25f32; 3])?;
            grads.add(0, 0, chain::device(&more))?;
            let f16 = DeviceMemory::upload(self.0.compute(), &[half::f16::ONE; 2])?;
            grads.add(0, 1, chain::device(&f16))?;
            let short = grads.add(0, 1, chain::device(&given));
            assert!(matches!(short, Err(Error::Length { got: 3, expected: 2, .. })), "{short:?}");
            let whole_numbers = DeviceMemory::upload(self.0.compute(), &[1i32; 2])?;
            let refused = grads.add(0, 1, chain::device(&whole_numbers));
            assert!(matches!(refused, Err(Error::Misplaced { .. })), "{refused:?}");
            let elsewhere = DeviceMemory::upload(self.1, &[1f32; 2])?;
            let refused = grads.add(0, 1, chain::device(&elsewhere));
            assert!(matches!(refused, Err(Error::Misplaced { .. })), "{refused:?}");
            assert!(matches!(grads.add(0, 2, chain::device(&f16)), Err(Error::InvalidStage { .. })));
            assert!(matches!(grads.device_mut(1, 0), Err(Error::NoSuchUnit { .. })));
            Ok(None)
        }
    }
    let other = Stream::new(0).unwrap();
    let mut model =
        ShardedModel::on_gpu(Given(&gpu, &other), Single::world(), &gpu, Policy::default()).unwrap();
    let ((), tape) = model.forward(&()).unwrap();
    model.backward(tape, ()).unwrap();
    let sum = gpu.to_host::<f32>(model.units().grad(0).unwrap().unwrap()).unwrap();
    assert_eq!(sum, [1.75, -1.75, 3.25, 1.0, 1.0]);
}

#[test]
fn without_a_gpu_there_is_an_error_that_says_so() {
    assert!(matches!(Gpu::with_ordinal(4096), Err(Error::Device { .. })));
    // The type of the memory is all that differs.
    fn same<Mem: Memory>(_: Option<&ShardedUnits<Mem>>) {}
    same::<HostMemory>(None);
    same::<Gpu>(None);
}
