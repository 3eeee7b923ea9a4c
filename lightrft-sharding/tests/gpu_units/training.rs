//! The same training on the host and on GPUs, and its state moved from one to the other

use std::sync::Arc;
use std::time::Instant;

use lightrft_collectives::local::World;
use lightrft_collectives::{Communicator, Single};
use lightrft_sharding::cuda::Gpu;
use lightrft_sharding::{
    AdamW, Ema, EmaConfig, Error, FlatParam, GatherFrom, Memory, Offload, Overlap, Policy, Precision,
    ReshardAfterForward, ShardSize, ShardedModel, Stage, StateKind, Trainable, Update, load_state,
    state_parts,
};

use crate::chain::{OnGpu, OnHost, start};
use crate::support::{
    CHAIN, LIMIT, State, alone, join, leave, ready, run_all, settings, several, state, train,
};

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
            if pass == 1 {
                model.backward_last(tape, grad).unwrap();
            } else {
                model.backward(tape, grad).unwrap();
            }
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
            if pass == 1 {
                model.backward_last(tape, grad).unwrap();
            } else {
                model.backward(tape, grad).unwrap();
            }
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
        Policy { gather_from: GatherFrom::Copy, prefetch: 2, ..bf16.clone() },
        Policy { stage: Stage::Zero0, ..Policy::default() },
        Policy { stage: Stage::Zero0, overlap: Overlap::On, reduce_bucket_elems: 5000, ..bf16.clone() },
        Policy { stage: Stage::Zero1, overlap: Overlap::On, ..Policy::default() },
        Policy { stage: Stage::Zero1, gather_from: GatherFrom::Copy, ..bf16.clone() },
        Policy { stage: Stage::Zero1, ..Policy::default() },
        Policy { stage: Stage::Zero1, grad_accum_dtype: Precision::Bf16, ..bf16.clone() },
        Policy { stage: Stage::Zero2, overlap: Overlap::On, ..Policy::default() },
        Policy { stage: Stage::Zero2, reduce_bucket_elems: 5000, ..bf16.clone() },
        Policy { persistence_threshold: 4000, ..Policy::default() },
        Policy { alignment: 64, ..bf16.clone() },
        Policy { trainable: Trainable::ExceptPrefixes(vec!["layer1.".into(), "layer2.w".into()]), ..bf16 },
    ];
    if ranks > 1 {
        all.push(Policy { shard_size: ShardSize::Ranks(1), overlap: Overlap::On, ..Policy::default() });
        all.push(Policy { shard_size: ShardSize::Ranks(1), ..Policy::default() });
    }
    if ranks > 2 && ranks.is_multiple_of(2) {
        let hpz = ReshardAfterForward::ToGroup(2);
        all.push(Policy { reshard_after_forward: hpz, param_dtype: Precision::Bf16, ..Policy::default() });
        all.push(Policy { shard_size: ShardSize::Ranks(2), overlap: Overlap::On, ..Policy::default() });
    }
    all
}

/// Compares with the host's `expected`: bit for bit in a world of one or two ranks, where sums over ranks have one order.
fn assert_same(
    ranks: usize,
    policy: &Policy,
    got: &(Vec<(f32, f32)>, State),
    expected: &(Vec<(f32, f32)>, State),
) {
    assert!(got.0.iter().all(|(norm, clip)| *norm > 1.0 && *clip < 1.0), "{:?}", got.0);
    // bf16 that is rounded to the other side of a boundary moves a gradient by its last place.
    let near = if policy.grad_accum_dtype == Precision::Bf16 { 1e-2 } else { 1e-5 };
    let same = |got: f32, expected: f32| {
        got.to_bits() == expected.to_bits()
            || ranks > 2 && (got - expected).abs() <= near * (1.0 + expected.abs())
    };
    let alike =
        |(got, expected): (&(f32, f32), &(f32, f32))| same(got.0, expected.0) && same(got.1, expected.1);
    assert!(
        got.0.iter().zip(&expected.0).all(alike),
        "norms and clips, {policy:?}: {:?}, {:?}",
        got.0,
        expected.0
    );
    assert_eq!(got.1.len(), expected.1.len(), "{policy:?}");
    for (got, expected) in got.1.iter().zip(&expected.1) {
        assert_eq!((&got.0, &got.1, &got.2), (&expected.0, &expected.1, &expected.2));
        let differs = got.3.iter().zip(&expected.3).find(|(got, expected)| !same(**got, **expected));
        assert!(differs.is_none(), "{} of {}, {policy:?}: {differs:?}", got.0, got.1);
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_training_has_the_bits_of_the_host_under_every_policy() {
    let gpu = alone();
    for policy in policies(1) {
        let expected = on_host(Single::world(), &policy);
        assert_same(1, &policy, &on_gpu(Single::world(), &gpu, &policy), &expected);
    }
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn two_gpus_training_have_the_bits_of_two_ranks_on_the_host_under_every_policy() {
    run_all("training::rank_trains", several());
}

#[test]
#[ignore = "a rank of two_gpus_training_have_the_bits_of_two_ranks_on_the_host_under_every_policy"]
fn rank_trains() {
    let (comm, gpu) = join();
    for policy in policies(comm.world_size()) {
        let begin = Instant::now();
        let ranks = comm.world_size();
        let hosts = World::new(ranks).launch(|comm| Ok::<_, Error>(on_host(comm, &policy))).unwrap();
        assert_same(ranks, &policy, &on_gpu(comm.clone(), &gpu, &policy), &hosts[comm.rank()]);
        println!("{:?}, {:?} in {:?}", policy.stage, policy.param_dtype, begin.elapsed());
    }
    leave(comm);
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

/// All of an average that this rank saves.
fn averages<Mem: Memory>(ema: &Ema<Mem>) -> Vec<f32> {
    let mut all = Vec::new();
    ema.visit_state(|part| {
        all.extend_from_slice(part.values);
        Ok::<_, Error>(())
    })
    .unwrap();
    all
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_averages_of_parameters_have_the_bits_of_the_hosts() {
    let gpu = alone();
    let (mut model, mut adamw) = ready(&gpu);
    let mut host = ShardedModel::new(OnHost(CHAIN), Single::world(), Policy::default()).unwrap();
    let copy = |host: &mut ShardedModel<OnHost>, model: &ShardedModel<OnGpu, Gpu>| {
        for unit in 0..CHAIN.layers {
            let values = gpu.to_host::<f32>(model.units().param(unit).unwrap()).unwrap();
            host.units_mut().load_unit(unit, &values).unwrap();
        }
    };
    copy(&mut host, &model);
    let config = EmaConfig { beta: 0.9, every: 1 };
    let mut here = Ema::new(config, host.units()).unwrap();
    let mut there = Ema::new(config, model.units()).unwrap();
    for seed in 0..3 {
        train(&mut model, &mut adamw, seed);
        copy(&mut host, &model);
        here.update(host.units()).unwrap();
        there.update(model.units()).unwrap();
        assert_eq!(averages(&there), averages(&here));
    }
    let trained = state(model.units(), &adamw);
    there.swap(model.units_mut()).unwrap();
    here.swap(host.units_mut()).unwrap();
    assert_ne!(state(model.units(), &adamw), trained);
    assert_eq!(averages(&there), averages(&here));
    there.swap(model.units_mut()).unwrap();
    here.swap(host.units_mut()).unwrap();
    assert_eq!(state(model.units(), &adamw), trained);
    // Saved from the host, loaded on the GPU.
    let mut again = Ema::new(config, model.units()).unwrap();
    assert_ne!(averages(&again), averages(&here));
    let saved = here.state_parts();
    let load = |param: &FlatParam, _: std::ops::Range<usize>, out: &mut [f32]| {
        let part = saved.iter().find(|part| part.param.name() == param.name()).expect("a part");
        out.copy_from_slice(part.values);
        Ok::<_, Error>(())
    };
    again.load_state(load).unwrap();
    assert_eq!(averages(&again), averages(&here));
    again.copy_to(model.units_mut()).unwrap();
    again.copy_from(model.units()).unwrap();
    assert_eq!(averages(&again), averages(&here));
    model.offload().unwrap();
    assert!(matches!(again.update(model.units()), Err(Error::Offloaded { .. })));
    model.reload().unwrap();
    assert_eq!(again.offload().unwrap().bytes, again.reload().unwrap().bytes);
    again.offload().unwrap();
    assert!(matches!(again.update(model.units()), Err(Error::AverageOffloaded)));
    assert_eq!((again.persistent_bytes(), averages(&again)), (0, averages(&here)));
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
