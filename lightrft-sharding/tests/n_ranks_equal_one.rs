//! Any number of ranks learns what one rank learns, bit for bit where sums have one order.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/tiny/mod.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::sync::Arc;

use lightrft_collectives::{Communicator, local::World};
use lightrft_sharding::{
    Activations, AdamW, AdamWConfig, Error, Overlap, Policy, Precision, ReshardAfterForward, ShardSize,
    ShardedModel, Stage, Update,
};
use tiny::{Batch, Tiny};

const MODEL: Tiny = Tiny { vocab: 11, width: 7, layers: 2 };
const STEPS: usize = 5;

/// The global batch of a step, in twelve micro-batches of three tokens.
fn micro_batch(step: usize, index: usize) -> Batch {
    let tokens: Vec<usize> = (0..3).map(|i| (7 * step + 3 * index + i * i) % MODEL.vocab).collect();
    let targets = tokens.iter().map(|t| (3 * t + step) % MODEL.vocab).collect();
    Batch { tokens, targets }
}

/// Parameters after [`STEPS`] steps. Each step has `count` micro-batches, dealt to ranks in blocks of `count / world`.
fn train(
    comm: Arc<dyn Communicator>,
    count: usize,
    options: Policy,
) -> Result<BTreeMap<String, Vec<f32>>, Error> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let mut model = ShardedModel::new(MODEL, comm, options)?;
    model.units_mut().load(tiny::start)?;
    let config = AdamWConfig { weight_decay: 0.1, max_norm: 0.3, ..AdamWConfig::default() };
    let mut adamw = AdamW::new(config, model.units())?;
    for step in 0..STEPS {
        for index in rank * count / world..(rank + 1) * count / world {
            let batch = micro_batch(step, index);
            let (logits, tape) = model.forward(&batch)?;
            assert_eq!(logits, model.evaluate(&batch)?, "evaluation sees what training sees");
            let (_, grad) = MODEL.loss(&logits, &batch, 3 * count);
            model.backward(tape, grad)?;
            assert_eq!(model.params_without_gradient().count(), 0);
        }
        let report = adamw.step(model.units_mut(), 0.05)?;
        assert_eq!(report.update, Update::Applied);
        assert!(report.clip_factor < 1.0, "clipping takes part in the test");
    }
    let mut params = BTreeMap::new();
    model.units_mut().for_each_full_unit(|unit, values| {
        for param in unit.params() {
            params.insert(param.name().to_owned(), values[param.range()].to_vec());
        }
        Ok::<_, Error>(())
    })?;
    Ok(params)
}

fn on(world: usize, count: usize, options: Policy) -> BTreeMap<String, Vec<f32>> {
    let mut ranks = World::new(world).launch(|comm| train(comm, count, options.clone())).unwrap();
    let first = ranks.swap_remove(0);
    assert!(ranks.iter().all(|params| *params == first), "ranks disagree");
    first
}

/// How far the parameter that moved least moved.
fn smallest_change(params: &BTreeMap<String, Vec<f32>>) -> f32 {
    let change = |(name, values): (&String, &Vec<f32>)| {
        let mut start = vec![0.0; values.len()];
        Tiny::fill(name, 0, &mut start);
        values.iter().zip(start).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    params.iter().map(change).fold(f32::INFINITY, f32::min)
}

#[test]
fn ranks_with_one_micro_batch_each_equal_one_rank_with_all_bit_for_bit() {
    for world in [1, 2, 3, 4] {
        // Rank order is the order of accumulation: ((g0 + g1) + g2) + g3 on either side.
        let one = on(1, world, Policy::default());
        let many = on(world, world, Policy::default());
        assert_eq!(one, many, "{world} ranks");
        assert!(smallest_change(&one) > 1e-3, "every parameter learns");
    }
}

#[test]
fn ranks_that_accumulate_equal_one_rank_to_rounding() {
    let one = on(1, 12, Policy::default());
    for world in [2, 3, 4] {
        let many = on(world, 12, Policy::default());
        for (name, values) in &one {
            for (a, b) in values.iter().zip(&many[name]) {
                assert!((a - b).abs() <= 1e-6 + 1e-6 * a.abs(), "{world} ranks, {name}: {a} {b}");
            }
        }
    }
}

#[test]
fn how_a_model_is_cut_and_when_it_travels_changes_no_bit() {
    let always = on(4, 4, Policy::default());
    let default = Policy::default;
    for policy in [
        Policy { reshard_after_forward: ReshardAfterForward::Never, ..default() },
        Policy { reshard_after_forward: ReshardAfterForward::ToGroup(2), ..default() },
        Policy { alignment: 16, ..default() },
        Policy { prefetch: 0, ..default() },
        Policy { prefetch: 3, overlap: Overlap::On, ..default() },
        Policy { activations: Activations::Keep, ..default() },
        Policy { stage: Stage::Zero2, ..default() },
        Policy { stage: Stage::Zero2, reduce_bucket_elems: 1, overlap: Overlap::On, ..default() },
        Policy { stage: Stage::Zero1, ..default() },
        Policy { stage: Stage::Zero1, reduce_bucket_elems: 70, ..default() },
    ] {
        assert!(on(4, 4, policy.clone()) == always, "{policy:?}");
    }
}

#[test]
fn summing_in_another_order_changes_rounding_alone() {
    let one = on(1, 12, Policy::default());
    let default = Policy::default;
    for policy in [
        Policy { stage: Stage::Zero0, ..default() },
        Policy { stage: Stage::Zero0, reduce_bucket_elems: 1, ..default() },
        Policy { stage: Stage::Zero1, ..default() },
        Policy { shard_size: ShardSize::Ranks(2), ..default() },
        Policy { stage: Stage::Zero2, shard_size: ShardSize::Ranks(1), ..default() },
        Policy { persistence_threshold: 60, ..default() },
    ] {
        near(&one, &on(4, 12, policy.clone()), 1e-6, &policy);
    }
    // Computing in bf16 is another model, by some 2^-8 of each parameter; what travels in bf16 is rounded as much.
    let bf16 = Precision::Bf16;
    for policy in [
        Policy { param_dtype: bf16, ..default() },
        Policy { reduce_dtype: bf16, ..default() },
        Policy { grad_accum_dtype: bf16, stage: Stage::Zero1, ..default() },
    ] {
        let many = on(4, 12, policy.clone());
        assert!(many != one, "{policy:?} has no effect");
        near(&one, &many, 0.1, &policy);
    }
}

fn near(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>, tolerance: f32, policy: &Policy) {
    for (name, values) in a {
        for (a, b) in values.iter().zip(&b[name]) {
            assert!((a - b).abs() <= tolerance * (1.0 + a.abs()), "{policy:?}, {name}: {a} {b}");
        }
    }
}

#[test]
fn gradients_written_by_hand_equal_differences() {
    // Without this, all ranks could agree on nonsense.
    let world = World::new(1).launch(|comm| {
        let mut model = ShardedModel::new(MODEL, comm, Policy::default())?;
        model.units_mut().load(tiny::start)?;
        let batch = micro_batch(0, 0);
        let (logits, tape) = model.forward(&batch)?;
        let (_, grad) = MODEL.loss(&logits, &batch, batch.tokens.len());
        model.backward(tape, grad)?;
        for unit in 0..model.units().plan().units().len() {
            let values = model.units().param(unit)?.to_vec();
            let grad = model.units().grad(unit)?.expect("a gradient").to_vec();
            for at in (0..values.len()).step_by(5) {
                let mut loss_at = |delta: f32| -> Result<f32, Error> {
                    let mut moved = values.clone();
                    moved[at] += delta;
                    model.units_mut().load_unit(unit, &moved)?;
                    let logits = model.evaluate(&batch)?;
                    Ok(MODEL.loss(&logits, &batch, 1).0)
                };
                let slope = (loss_at(1e-2)? - loss_at(-1e-2)?) / 2e-2;
                assert!((slope - grad[at]).abs() < 2e-3, "unit {unit} element {at}: {slope} {}", grad[at]);
            }
            model.units_mut().load_unit(unit, &values)?;
        }
        Ok::<_, Error>(())
    });
    world.unwrap();
}
