//! Laws of sharded storage and of the optimizer over it, for any shapes and number of ranks.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod noise;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use lightrft_collectives::{Communicator, local::World};
use lightrft_sharding::{
    AdamW, AdamWConfig, Error, Mode, ParamSpec, Plan, ShardedUnits, StateKind, UnitSpec, load_state,
    state_parts,
};
use noise::{bits, noise};
use proptest::prelude::*;

/// Two units whose parameters have these numbers of elements.
fn model(sizes: &[usize]) -> Vec<UnitSpec> {
    let param = |(p, &elems): (usize, &usize)| {
        // One in three is a bias, which does not decay.
        let kind = if p % 3 == 2 { "bias" } else { "weight" };
        ParamSpec::new(format!("p{p}.{kind}"), [elems])
    };
    let params: Vec<ParamSpec> = sizes.iter().enumerate().map(param).collect();
    let (a, b) = params.split_at(sizes.len() / 2);
    vec![UnitSpec::new("a", a), UnitSpec::new("b", b)]
}

/// Parameters of every unit, by unit.
fn whole(plan: &Plan, seed: u64) -> Vec<Vec<f32>> {
    plan.units().iter().zip(seed..).map(|(unit, seed)| noise(seed, unit.elems())).collect()
}

fn units(sizes: &[usize], comm: Arc<dyn Communicator>, seed: u64) -> Result<ShardedUnits, Error> {
    let plan = Arc::new(Plan::new(model(sizes), comm.world_size())?);
    let mut units = ShardedUnits::new(Arc::clone(&plan), comm, Mode::Train)?;
    for (index, values) in whole(&plan, seed).iter().enumerate() {
        units.load_unit(index, values)?;
    }
    Ok(units)
}

/// Everything that a checkpoint holds, put together over ranks.
type Saved = HashMap<(StateKind, String), Vec<f32>>;

fn save(units: &ShardedUnits, adamw: &AdamW, into: &Mutex<Saved>) {
    let mut saved = into.lock().unwrap();
    for part in state_parts(units, Some(adamw)) {
        let whole = saved.entry((part.kind, part.param.name().to_owned())).or_default();
        whole.resize(part.param.elems(), f32::NAN);
        assert!(whole[part.range.clone()].iter().all(|value| value.is_nan()), "an element is saved twice");
        whole[part.range].copy_from_slice(part.values);
    }
}

/// `steps` AdamW steps over `world` ranks; every rank's gradient is its share of one and the same.
fn train(
    sizes: &[usize],
    world: usize,
    steps: u64,
    max_norm: f64,
    from: Option<(&Saved, u64)>,
) -> (Saved, Vec<f32>) {
    let saved = Mutex::new(Saved::new());
    let norms = World::new(world).launch(|comm| {
        let rank = comm.rank();
        let mut units = units(sizes, comm, 1)?;
        let config = AdamWConfig { weight_decay: 0.1, max_norm, ..AdamWConfig::default() };
        let mut adamw = AdamW::new(config, &units)?;
        let mut first = 0;
        if let Some((saved, done)) = from {
            load_state(&mut units, Some(&mut adamw), |kind, param, range, out| {
                out.copy_from_slice(&saved[&(kind, param.name().to_owned())][range]);
                Ok::<_, Infallible>(())
            })?;
            let counters = lightrft_sharding::AdamWCounters { steps: done, skipped: 0 };
            adamw.set_counters(counters);
            first = done;
        }
        let mut norms = Vec::new();
        for step in first..first + steps {
            for unit in 0..2 {
                let elems = units.plan().units()[unit].elems();
                let grad = noise(100 * step + unit as u64 + 7, elems);
                units.reduce_gradient(unit, if rank == 0 { grad } else { vec![0.0; elems] })?;
            }
            norms.push(adamw.step(&mut units, 0.01)?.grad_norm);
        }
        save(&units, &adamw, &saved);
        Ok::<_, Error>(norms)
    });
    let mut norms = norms.unwrap();
    (saved.into_inner().unwrap(), norms.swap_remove(0))
}

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..40, 2..7)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn gathering_what_was_sharded_gives_it_back_bit_for_bit(sizes in sizes(), world in 1usize..6, seed in 1u64..1000) {
        World::new(world).launch(|comm| {
            let mut units = units(&sizes, comm, seed)?;
            let plan = Arc::clone(units.plan());
            for (index, expected) in whole(&plan, seed).iter().enumerate() {
                let full = units.gather(index)?;
                let (values, padding) = full.values().split_at(expected.len());
                assert_eq!(bits(values), bits(expected));
                assert!(padding.iter().all(|&value| value == 0.0));
                let (values, lease) = full.into_parts();
                drop(lease);
                // Reused buffers must not show what they held.
                units.recycle(values.iter().map(|_| f32::NAN).collect::<Vec<f32>>());
            }
            Ok::<_, Error>(())
        }).unwrap();
    }

    #[test]
    fn a_reduced_gradient_is_the_sum_over_ranks_and_passes(
        sizes in sizes(), world in 1usize..6, passes in 1usize..4,
    ) {
        // Small whole numbers: f32 sums of them are exact, in any order.
        let grad = |rank: usize, pass: usize, elems: usize| -> Vec<f32> {
            (0..elems).map(|i| ((i * 7 + rank * 3 + pass * 5) % 23) as f32 - 11.0).collect()
        };
        World::new(world).launch(|comm| {
            let rank = comm.rank();
            let mut units = units(&sizes, comm, 1)?;
            let elems = units.plan().units()[1].elems();
            for round in 0..2 {
                for pass in 0..passes {
                    units.reduce_gradient(1, grad(rank, pass + round, elems))?;
                }
                let mut sum = vec![0.0f32; units.plan().units()[1].padded_elems()];
                for (rank, pass) in (0..world).flat_map(|rank| (0..passes).map(move |pass| (rank, pass))) {
                    sum.iter_mut().zip(grad(rank, pass + round, elems)).for_each(|(sum, part)| *sum += part);
                }
                let mine = units.plan().units()[1].shard(rank);
                assert_eq!(units.grad(1)?.unwrap(), &sum[mine]);
                assert_eq!(units.grad(0)?, None);
                units.zero_gradients();
                assert_eq!(units.grad(1)?, None);
            }
            Ok::<_, Error>(())
        }).unwrap();
    }

    #[test]
    fn a_step_on_shards_is_the_shard_of_the_step_on_the_whole(
        sizes in sizes(), world in 2usize..9, max_norm in prop_oneof![Just(0.0), Just(0.5)],
    ) {
        let (one, norms) = train(&sizes, 1, 3, max_norm, None);
        let (many, same_norms) = train(&sizes, world, 3, max_norm, None);
        prop_assert_eq!(norms, same_norms, "the norm is that of the whole gradient");
        for (key, values) in &one {
            prop_assert_eq!(bits(values), bits(&many[key]), "{:?}", key);
        }
        prop_assert_eq!(one.len(), many.len());
    }

    #[test]
    fn training_goes_on_bit_for_bit_on_another_number_of_ranks(
        sizes in sizes(), before in 1usize..6, after in 1usize..6,
    ) {
        let (unbroken, _) = train(&sizes, before, 4, 0.0, None);
        let (half, _) = train(&sizes, before, 2, 0.0, None);
        let (resumed, _) = train(&sizes, after, 2, 0.0, Some((&half, 2)));
        prop_assert_eq!(unbroken.len(), resumed.len());
        for (key, values) in &unbroken {
            prop_assert_eq!(bits(values), bits(&resumed[key]), "{:?}", key);
        }
    }
}

#[test]
fn the_norm_is_that_of_all_gradients_together() {
    let (_, norms) = train(&[30, 31, 32], 3, 1, 1.0, None);
    let all = [noise(7, 30), noise(8, 63)].concat();
    let expected = all.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
    assert!((f64::from(norms[0]) - expected).abs() < 1e-6 * expected);
}

#[test]
fn a_thousand_steps_stay_near_the_formula_in_f64() {
    let elems = 64;
    let (saved, _) = train(&[0, elems], 2, 1000, 0.0, None);
    let ours = &saved[&(StateKind::Param, "p1.weight".to_owned())];
    let (mut m, mut v) = (vec![0f64; elems], vec![0f64; elems]);
    let mut p: Vec<f64> = noise(2, elems).into_iter().map(f64::from).collect();
    for step in 0..1000u64 {
        let grad = noise(100 * step + 8, elems);
        let t = (step + 1) as f64;
        for i in 0..elems {
            let g = f64::from(grad[i]);
            p[i] *= 1.0 - 0.01 * 0.1;
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.95 * v[i] + 0.05 * g * g;
            p[i] -= 0.01 / (1.0 - 0.9f64.powf(t)) * m[i] / ((v[i] / (1.0 - 0.95f64.powf(t))).sqrt() + 1e-8);
        }
    }
    for (ours, exact) in ours.iter().zip(p) {
        assert!((f64::from(*ours) - exact).abs() < 2e-5, "{ours} {exact}");
    }
}
