//! What units take of a GPU's memory, by our count and the driver's, and how it is given up for a while

use std::time::{Duration, Instant};

use lightrft_sharding::cuda::Gpu;
use lightrft_sharding::{
    AdamW, AdamWConfig, Error, Offload, Policy, Precision, ShardedModel, Update, grad_norm,
};

use crate::chain::OnGpu;
use crate::support::{CHAIN, Idle, LIMIT, alone, gpus, join, large, leave, ready, run_all, state, train};

/// A pass that computes nothing: only gathers and reductions.
fn pass(model: &mut ShardedModel<Idle, Gpu>) {
    let ((), tape) = model.forward(&()).unwrap();
    model.backward(tape, ()).unwrap();
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu bench"]
fn gpus_bench_steps_and_passes() {
    run_all("memory::rank_measures_steps", gpus());
}

#[test]
#[ignore = "a rank of gpus_bench_steps_and_passes"]
fn rank_measures_steps() {
    const ELEMS: usize = 32 << 20;
    const UNITS: usize = 6;
    let (comm, gpu) = join();
    let policy = Policy { param_dtype: Precision::Bf16, ..Policy::default() };
    let mut model = ShardedModel::on_gpu(Idle(large(UNITS, ELEMS)), comm.clone(), &gpu, policy).unwrap();
    let mut adamw = AdamW::new(AdamWConfig::lightrft(), model.units()).unwrap();
    pass(&mut model);
    let mut times = Vec::new();
    for _ in 0..10 {
        let norm = grad_norm([model.units_mut()]).unwrap();
        let begin = Instant::now();
        adamw.step_with_norm(model.units_mut(), 1e-3, norm).unwrap();
        assert!(gpu.compute().wait(LIMIT).unwrap());
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let elems = (UNITS * ELEMS / comm.world_size()) as f64;
    println!("AdamW over {elems} elements: {:.3} ms, {:.0} GB/s", times[5] * 1e3, 28e-9 * elems / times[5]);
    let begin = Instant::now();
    for _ in 0..10 {
        pass(&mut model);
    }
    assert!(gpu.compute().wait(LIMIT).unwrap());
    println!("a pass of gathers and reductions: {:.3} ms", begin.elapsed().as_secs_f64() * 1e2);
    drop((model, adamw));
    leave(comm);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_hold_sixteen_bytes_a_parameter_over_the_ranks_and_a_few_units() {
    run_all("memory::rank_is_measured", gpus());
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
    let mut small =
        ShardedModel::on_gpu(Idle(large(3, 1 << 20)), comm.clone(), &gpu, policy.clone()).unwrap();
    pass(&mut small);
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
    pass(&mut model);
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
    // The pinned memory is there from the first time on.
    println!("again: {:?} and {:?}", model.offload().unwrap(), adamw.offload().unwrap());
    println!("and back: {:?} and {:?}", model.reload().unwrap(), adamw.reload().unwrap());
    drop((model, adamw, small));
    leave(comm);
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
    let accumulate = |model: &mut ShardedModel<OnGpu, Gpu>| {
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
    // A gradient that is zeroed while it is away is one to train with again.
    accumulate(&mut model);
    model.offload().unwrap();
    model.units_mut().zero_gradients();
    model.reload().unwrap();
    train(&mut model, &mut adamw, 2);
    train(&mut other, &mut others, 2);
    assert_eq!(state(model.units(), &adamw), state(other.units(), &others));
}
