//! Laws of the optimizer, the norm and the average over shards: what N ranks do is what one rank does, bit for bit.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod counted;
mod noise;

use std::collections::HashMap;
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use counted::Counted;
use half::{bf16, f16};
use lightrft_collectives::{Communicator, Single, local::World};
use lightrft_sharding::{
    AdamW, AdamWConfig, CopyOut, Decay, Ema, EmaConfig, EmaUpdate, Error, Mode, Offload as _, ParamSpec,
    Plan, Policy, Precision, ShardSize, ShardedUnits, Stage, StateKind, Trainable, UnitSpec, Update,
    decay_by_name, grad_norm, loss_scale,
};
use noise::{bits, noise};
use proptest::prelude::*;

/// One unit of parameters of these sizes, every second one a bias, with `noise(seed)` in it.
fn unit(sizes: &[usize], comm: Arc<dyn Communicator>, mode: Mode, seed: u64) -> Result<ShardedUnits, Error> {
    let name = |p: usize| format!("p{p}.{}", if p % 2 == 1 { "bias" } else { "weight" });
    let params: Vec<ParamSpec> =
        sizes.iter().enumerate().map(|(p, &elems)| ParamSpec::new(name(p), [elems])).collect();
    let plan = Arc::new(Plan::new(vec![UnitSpec::new("all", params)], comm.world_size())?);
    let mut units = ShardedUnits::new(plan, comm, mode)?;
    units.load_unit(0, &noise(seed, sizes.iter().sum()))?;
    Ok(units)
}

/// Gives the unit a gradient that is `grad` when summed over ranks, bit for bit.
fn accumulate(units: &mut ShardedUnits, grad: Vec<f32>) -> Result<(), Error> {
    let zeros = vec![0.0; grad.len()];
    units.reduce_gradient(0, if units.rank() == 0 { grad } else { zeros })
}

/// The shards of all ranks, put together and without padding.
fn joined<T: Copy>(shards: &[Vec<T>], elems: usize) -> Vec<T> {
    shards.concat()[..elems].to_vec()
}

fn norm_in_f64(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

const LAWS: AdamWConfig = AdamWConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, max_norm: 0.5 };

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..50, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn copies_are_the_parameters_after_the_step_rounded_for_any_cut(sizes in sizes(), world in 1usize..9) {
        let elems = sizes.iter().sum();
        let train = |world: usize| {
            World::new(world).launch(|comm| {
                let mut units = unit(&sizes, comm, Mode::Train, 3)?;
                let mut adamw = AdamW::new(LAWS, &units)?;
                let len = units.param(0)?.len();
                let (mut as_bf16, mut as_f16) = (vec![bf16::NAN; len], vec![f16::NAN; len]);
                for step in 0..2 {
                    accumulate(&mut units, noise(50 + step, elems))?;
                    let norm = grad_norm([&mut units])?;
                    let out = CopyOut::Bf16(&mut as_bf16);
                    adamw.step_and_copy(&mut units, 0.01, norm, [out])?;
                }
                accumulate(&mut units, noise(52, elems))?;
                let before = as_bf16.clone();
                let norm = grad_norm([&mut units])?;
                adamw.step_and_copy(&mut units, 0.01, norm, [CopyOut::F16(&mut as_f16)])?;
                assert_eq!(before, as_bf16, "what is not asked for is not written");
                let rounded: Vec<f16> = units.param(0)?.iter().map(|&p| f16::from_f32(p)).collect();
                assert_eq!(as_f16, rounded);
                Ok::<_, Error>((units.param(0)?.to_vec(), as_bf16))
            })
        };
        let one = train(1).unwrap();
        let (params, copies): (Vec<_>, Vec<_>) = train(world).unwrap().into_iter().unzip();
        prop_assert_eq!(bits(&joined(&params, elems)), bits(&one[0].0[..elems]));
        prop_assert_eq!(&joined(&copies, elems), &one[0].1[..elems]);
    }

    #[test]
    fn two_models_are_clipped_by_the_norm_of_both(
        a in sizes(), b in sizes(), world in 1usize..9, max_norm in 0.1f64..3.0,
    ) {
        let (grad_a, grad_b) = (noise(5, a.iter().sum()), noise(6, b.iter().sum()));
        let expected = norm_in_f64(&[grad_a.clone(), grad_b.clone()].concat());
        World::new(world).launch(|comm| {
            let mut actor = unit(&a, Arc::clone(&comm), Mode::Train, 1)?;
            let mut critic = unit(&b, comm, Mode::Train, 2)?;
            let config = AdamWConfig { max_norm, ..LAWS };
            let (mut of_actor, mut of_critic) = (AdamW::new(config, &actor)?, AdamW::new(config, &critic)?);
            accumulate(&mut actor, grad_a.clone())?;
            accumulate(&mut critic, grad_b.clone())?;
            let norm = grad_norm([&mut actor, &mut critic])?;
            assert!((f64::from(norm.value()) - expected).abs() <= 1e-6 * expected);
            let first = of_actor.step_with_norm(&mut actor, 0.1, norm)?;
            let second = of_critic.step_with_norm(&mut critic, 0.1, norm)?;
            assert_eq!(first, second);
            let clipped = f64::from(first.clip_factor) * expected;
            assert!(clipped <= max_norm.min(expected) * (1.0 + 1e-6));
            assert!(clipped >= max_norm.min(expected) * (1.0 - 1e-4));
            Ok::<_, Error>(())
        }).unwrap();
    }

    #[test]
    fn an_average_of_shards_is_the_shard_of_the_average(sizes in sizes(), world in 1usize..9, every in 1u64..4) {
        let elems = sizes.iter().sum();
        let train = |world: usize| {
            World::new(world).launch(|comm| {
                let mut units = unit(&sizes, comm, Mode::Train, 3)?;
                let mut adamw = AdamW::new(LAWS, &units)?;
                let mut ema = Ema::new(EmaConfig { beta: 0.9, every }, &units)?;
                for step in 0..5 {
                    accumulate(&mut units, noise(50 + step, elems))?;
                    adamw.step(&mut units, 0.1)?;
                    let due = (step + 1).is_multiple_of(every);
                    let expected = if due { EmaUpdate::Applied } else { EmaUpdate::NotDue };
                    assert_eq!(ema.update(&units)?, expected);
                }
                assert_eq!((ema.counters().calls, ema.counters().updates), (5, 5 / every));
                Ok::<_, Error>(ema.average(0).unwrap().to_vec())
            })
        };
        let one = train(1).unwrap();
        prop_assert_eq!(bits(&joined(&train(world).unwrap(), elems)), bits(&one[0][..elems]));
    }

    #[test]
    fn an_average_goes_on_bit_for_bit_on_another_number_of_ranks(
        sizes in sizes(), before in 1usize..6, after in 1usize..6,
    ) {
        let elems: usize = sizes.iter().sum();
        let saved: Mutex<HashMap<String, Vec<f32>>> = Mutex::default();
        let steps = |units: &mut ShardedUnits, ema: &mut Ema, seeds: std::ops::Range<u64>| {
            seeds.into_iter().try_for_each(|seed| {
                units.load_unit(0, &noise(seed, elems))?;
                ema.update(units).map(drop)
            })
        };
        let config = EmaConfig { beta: 0.8, every: 2 };
        let unbroken = World::new(before).launch(|comm| {
            let mut units = unit(&sizes, comm, Mode::Train, 1)?;
            let mut ema = Ema::new(config, &units)?;
            steps(&mut units, &mut ema, 10..13)?;
            for part in ema.state_parts() {
                assert_eq!((part.kind, part.unit), (StateKind::Ema, 0));
                let mut saved = saved.lock().unwrap();
                let whole = saved.entry(part.param.name().to_owned()).or_default();
                whole.resize(part.param.elems(), f32::NAN);
                whole[part.range].copy_from_slice(part.values);
            }
            let counters = ema.counters();
            steps(&mut units, &mut ema, 13..16)?;
            Ok::<_, Error>((ema.average(0).unwrap().to_vec(), counters))
        }).unwrap();
        let saved = saved.into_inner().unwrap();
        let counters = unbroken[0].1;
        let resumed = World::new(after).launch(|comm| {
            let mut units = unit(&sizes, comm, Mode::Train, 2)?;
            let mut ema = Ema::new(config, &units)?;
            ema.load_state(|param, range, out| {
                out.copy_from_slice(&saved[param.name()][range]);
                Ok::<_, Infallible>(())
            })?;
            ema.set_counters(counters);
            steps(&mut units, &mut ema, 13..16)?;
            Ok::<_, Error>(ema.average(0).unwrap().to_vec())
        }).unwrap();
        let unbroken: Vec<Vec<f32>> = unbroken.into_iter().map(|(average, _)| average).collect();
        prop_assert_eq!(bits(&joined(&resumed, elems)), bits(&joined(&unbroken, elems)));
    }
}

#[test]
fn the_norm_of_two_models_is_one_call_and_that_of_two_groups_is_two() {
    World::new(4)
        .launch(|comm| {
            let pairs = [comm.subgroup(&[0, 1])?, comm.subgroup(&[2, 3])?];
            let pair = Counted::new(pairs.into_iter().flatten().next().unwrap());
            let all = Counted::new(comm);
            let sizes = [20, 7];
            let mut actor = unit(&sizes, Arc::clone(&all.comm), Mode::Train, 1)?;
            let mut critic = unit(&sizes, Arc::clone(&all.comm), Mode::Train, 2)?;
            // Each pair of ranks holds all of this one, as the shard groups of a mesh do.
            let mut replicated = unit(&sizes, Arc::clone(&pair.comm), Mode::Train, 3)?;
            accumulate(&mut actor, noise(5, 27))?;
            accumulate(&mut critic, noise(6, 27))?;
            accumulate(&mut replicated, noise(7, 27))?;
            let calls = || (all.take_ops().len(), pair.take_ops().len());
            calls();
            let norm = grad_norm([&mut actor, &mut critic])?;
            assert_eq!(calls(), (1, 0));
            let exact = norm_in_f64(&[noise(5, 27), noise(6, 27)].concat());
            assert!((f64::from(norm.value()) - exact).abs() <= 1e-6 * exact);
            let norm = grad_norm([&mut actor, &mut replicated, &mut critic])?;
            assert_eq!(calls(), (1, 1));
            let exact = norm_in_f64(&[noise(5, 27), noise(6, 27), noise(7, 27)].concat());
            assert!((f64::from(norm.value()) - exact).abs() <= 1e-6 * exact, "each shard counts once");
            Ok::<_, Error>(())
        })
        .unwrap();
}

/// Policies of four ranks, each with what it cuts, keeps whole, freezes or rounds.
fn policies() -> Vec<Policy> {
    let stages = [Stage::Zero0, Stage::Zero1, Stage::Zero2, Stage::Zero3];
    let mut policies: Vec<Policy> =
        stages.into_iter().map(|stage| Policy { stage, ..Policy::default() }).collect();
    policies.push(Policy { shard_size: ShardSize::Ranks(2), ..Policy::default() });
    policies.push(Policy { persistence_threshold: 20, ..Policy::default() });
    policies.push(Policy { param_dtype: Precision::Bf16, ..Policy::default() });
    policies
}

#[test]
fn norm_step_and_average_are_those_of_one_rank_under_every_policy() {
    let specs = |sizes: [usize; 3]| {
        let unit = |(u, elems): (usize, usize)| {
            let params = [
                ParamSpec::new(format!("u{u}.base.weight"), [elems]),
                ParamSpec::new(format!("u{u}.adapter.weight"), [7]),
            ];
            UnitSpec::new(format!("u{u}"), params)
        };
        sizes.into_iter().enumerate().map(unit).collect::<Vec<_>>()
    };
    // What every rank has saved of the average and of the parameters, the norms, and what was saved twice.
    let run = |world: usize, policy: &Policy| {
        let saved: Mutex<HashMap<(StateKind, String), Vec<f32>>> = Mutex::default();
        let norms = World::new(world).launch(|comm| {
            let rank = comm.rank();
            let mut units = ShardedUnits::with_policy(specs([30, 5, 11]), comm, policy)?;
            units.load(|param, range, out| {
                let seed = 1 + param.name().bytes().map(u64::from).sum::<u64>();
                out.copy_from_slice(&noise(seed, param.elems())[range]);
                Ok::<_, Infallible>(())
            })?;
            let mut adamw = AdamW::new(LAWS, &units)?;
            let mut ema = Ema::new(EmaConfig { beta: 0.7, every: 1 }, &units)?;
            let mut norms = Vec::new();
            for step in 0..3 {
                for unit in 0..3 {
                    let elems = units.plan().unit(unit)?.trainable_elems();
                    let grad = noise(20 + 3 * step + unit as u64, elems);
                    units.reduce_gradient(unit, if rank == 0 { grad } else { vec![0.0; elems] })?;
                }
                norms.push(adamw.step(&mut units, 0.1)?.grad_norm.to_bits());
                ema.update(&units)?;
            }
            let mut saved = saved.lock().unwrap();
            for part in lightrft_sharding::state_parts(&units, None).into_iter().chain(ema.state_parts()) {
                let whole = saved.entry((part.kind, part.param.name().to_owned())).or_default();
                whole.resize(part.param.elems(), f32::NAN);
                assert!(whole[part.range.clone()].iter().all(|v| v.is_nan()), "an element is saved twice");
                whole[part.range].copy_from_slice(part.values);
            }
            Ok::<_, Error>(norms)
        });
        let norms = norms.unwrap();
        assert!(norms.iter().all(|rank| *rank == norms[0]), "every rank has the same norm");
        let saved: Vec<_> =
            saved.into_inner().unwrap().into_iter().map(|(key, values)| (key, bits(&values))).collect();
        (saved.into_iter().collect::<HashMap<_, _>>(), norms[0].clone())
    };
    for trainable in [Trainable::All, Trainable::OnlyContaining(vec!["adapter".to_owned()])] {
        let all = trainable == Trainable::All;
        let one = run(1, &Policy { trainable: trainable.clone(), ..Policy::default() });
        assert_eq!(one.0.len(), if all { 12 } else { 9 }, "of what is frozen there is no average");
        let moved = |name: &str| {
            one.0[&(StateKind::Ema, name.to_owned())] != one.0[&(StateKind::Param, name.to_owned())]
        };
        assert!(moved("u1.adapter.weight"));
        for policy in policies() {
            let policy = Policy { trainable: trainable.clone(), ..policy };
            assert_eq!(run(4, &policy), one, "{policy:?}");
        }
    }
}

#[test]
fn a_step_with_another_models_norm_still_sums_its_own_gradients_over_ranks() {
    let step = |world: usize, stage: Stage| {
        let ranks = World::new(world).launch(|comm| {
            let mut other = unit(&[4], Arc::clone(&comm), Mode::Train, 1)?;
            other.reduce_gradient(0, vec![1.0; 4])?;
            let norm = grad_norm([&mut other])?;
            let specs = vec![UnitSpec::new("u", [ParamSpec::new("w", [8])])];
            let mut units = ShardedUnits::with_policy(specs, comm, &Policy { stage, ..Policy::default() })?;
            let mut adamw = AdamW::new(AdamWConfig { max_norm: 0.0, ..LAWS }, &units)?;
            units.reduce_gradient(0, vec![4.0 / world as f32; 8])?;
            adamw.step_with_norm(&mut units, 0.1, norm)?;
            Ok::<_, Error>(adamw.exp_avg(0).unwrap().to_vec())
        });
        ranks.unwrap().concat()[..8].to_vec()
    };
    let one = step(1, Stage::Zero3);
    for stage in [Stage::Zero0, Stage::Zero1, Stage::Zero2, Stage::Zero3] {
        assert_eq!(bits(&step(2, stage)), bits(&one), "{stage:?}");
    }
}

#[test]
fn an_average_follows_the_formula_and_rests_where_parameters_rest() {
    let mut units = unit(&[100], Single::world(), Mode::Train, 1).unwrap();
    let mut ema = Ema::new(EmaConfig::lightrft(1), &units).unwrap();
    let start = noise(1, 100);
    ema.update(&units).unwrap();
    assert_eq!(bits(ema.average(0).unwrap()), bits(&start), "nothing has moved");
    let mut expected: Vec<f64> = start.into_iter().map(f64::from).collect();
    for seed in 2..200 {
        let values = noise(seed, 100);
        units.load_unit(0, &values).unwrap();
        ema.update(&units).unwrap();
        expected.iter_mut().zip(values).for_each(|(a, p)| *a = 0.992 * *a + 0.008 * f64::from(p));
    }
    for (ours, exact) in ema.average(0).unwrap().iter().zip(expected) {
        assert!((f64::from(*ours) - exact).abs() < 1e-6, "{ours} {exact}");
    }
    assert_eq!(ema.persistent_bytes(), 400);
}

#[test]
fn an_average_can_be_put_into_a_model_taken_from_it_and_exchanged_with_it() {
    World::new(2)
        .launch(|comm| {
            let mut units = unit(&[7, 6], Arc::clone(&comm), Mode::Train, 1)?;
            let mut ema = Ema::new(EmaConfig { beta: 0.5, every: 1 }, &units)?;
            let old = units.param(0)?.to_vec();
            units.load_unit(0, &noise(2, 13))?;
            let new = units.param(0)?.to_vec();

            let mut frozen = unit(&[7, 6], Arc::clone(&comm), Mode::Frozen, 3)?;
            ema.copy_to(&mut frozen)?;
            assert_eq!(frozen.param(0)?, old);
            ema.swap(&mut units)?;
            assert_eq!((units.param(0)?, ema.average(0).unwrap()), (&*old, &*new));
            ema.swap(&mut units)?;
            assert_eq!((units.param(0)?, ema.average(0).unwrap()), (&*new, &*old));
            ema.copy_from(&units)?;
            assert_eq!(ema.average(0).unwrap(), new);

            let mut other = unit(&[6, 7], comm, Mode::Train, 3)?;
            assert!(matches!(ema.update(&other), Err(Error::ForeignAverage { .. })));
            assert!(matches!(ema.copy_to(&mut other), Err(Error::ForeignAverage { .. })));
            Ok::<_, Error>(())
        })
        .unwrap();
}

#[test]
fn settings_that_an_average_cannot_have_are_refused() {
    let units = unit(&[3], Single::world(), Mode::Train, 1).unwrap();
    for (beta, every) in [(-0.1, 1), (1.1, 1), (f64::NAN, 1), (0.9, 0)] {
        let refused = Ema::new(EmaConfig { beta, every }, &units);
        assert!(matches!(refused, Err(Error::InvalidSetting { .. })), "{beta} {every}");
    }
}

#[test]
fn one_gradient_that_is_not_finite_on_one_rank_of_one_model_skips_every_step() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        World::new(3)
            .launch(|comm| {
                let rank = comm.rank();
                let mut actor = unit(&[5, 4], Arc::clone(&comm), Mode::Train, 1)?;
                let mut critic = unit(&[8], comm, Mode::Train, 2)?;
                let (mut of_actor, mut of_critic) = (AdamW::new(LAWS, &actor)?, AdamW::new(LAWS, &critic)?);
                let before = (actor.param(0)?.to_vec(), critic.param(0)?.to_vec());
                actor.reduce_gradient(0, vec![1.0; 9])?;
                critic.reduce_gradient(0, vec![if rank == 2 { poison } else { 1.0 }; 8])?;
                let norm = grad_norm([&mut actor, &mut critic])?;
                assert!(!norm.is_finite());
                let mut copy = vec![bf16::ONE; actor.param(0)?.len()];
                let out = [CopyOut::Bf16(&mut copy)];
                let report = of_actor.step_and_copy(&mut actor, 0.1, norm, out)?;
                assert_eq!(report.update, Update::Skipped);
                assert_eq!(of_critic.step_with_norm(&mut critic, 0.1, norm)?.update, Update::Skipped);
                assert_eq!((actor.param(0)?, critic.param(0)?), (&*before.0, &*before.1));
                assert!(copy.iter().all(|&value| value == bf16::ONE));
                for counters in [of_actor.counters(), of_critic.counters()] {
                    assert_eq!((counters.steps, counters.skipped), (0, 1));
                }
                // And the next step is made.
                actor.reduce_gradient(0, vec![1.0; 9])?;
                assert_eq!(of_actor.step(&mut actor, 0.1)?.update, Update::Applied);
                Ok::<_, Error>(())
            })
            .unwrap();
    }
}

#[test]
fn a_max_norm_of_zero_means_no_clipping() {
    let step = |max_norm| {
        let mut units = unit(&[64], Single::world(), Mode::Train, 1).unwrap();
        let mut adamw = AdamW::new(AdamWConfig { max_norm, ..LAWS }, &units).unwrap();
        accumulate(&mut units, noise(9, 64)).unwrap();
        let report = adamw.step(&mut units, 0.1).unwrap();
        (report.clip_factor, adamw.exp_avg(0).unwrap().to_vec())
    };
    let (factor, unclipped) = step(0.0);
    let expected: Vec<f32> = noise(9, 64).into_iter().map(|g| (1.0 - 0.9) as f32 * g).collect();
    assert_eq!(factor, 1.0);
    assert_eq!(unclipped, expected);
    let (factor, clipped) = step(0.25);
    assert!(factor < 0.1 && clipped != unclipped);
}

#[test]
fn the_loss_scale_makes_the_sum_over_passes_and_ranks_their_mean() {
    let elems = 40;
    // Losses whose gradients are whole numbers, so that sums of them are exact in any order.
    let grad = |rank: usize, pass: usize| -> Vec<f32> {
        (0..elems).map(|i| ((i * 5 + rank * 3 + pass * 7) % 17) as f32).collect()
    };
    for (ranks, passes) in [(1, 4), (2, 2), (4, 8)] {
        let scale = loss_scale(NonZeroUsize::new(passes).unwrap(), NonZeroUsize::new(ranks).unwrap());
        let shards = World::new(ranks).launch(|comm| {
            let rank = comm.rank();
            let mut units = unit(&[elems], comm, Mode::Train, 1)?;
            for pass in 0..passes {
                units.reduce_gradient(0, grad(rank, pass).into_iter().map(|g| scale * g).collect())?;
            }
            Ok::<_, Error>(units.grad(0)?.unwrap().to_vec())
        });
        let mut mean = vec![0.0f32; elems];
        for (rank, pass) in (0..ranks).flat_map(|rank| (0..passes).map(move |pass| (rank, pass))) {
            mean.iter_mut().zip(grad(rank, pass)).for_each(|(sum, g)| *sum += g);
        }
        mean.iter_mut().for_each(|sum| *sum /= (ranks * passes) as f32);
        assert_eq!(joined(&shards.unwrap(), elems), mean);
    }
}

#[test]
fn names_decay_as_in_lightrfts_own_grouping() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("data/decay_by_name.json")).unwrap();
    let mut names = 0;
    for (key, expected) in [("decay", Decay::Yes), ("no_decay", Decay::No)] {
        for name in golden[key].as_array().unwrap() {
            assert_eq!(decay_by_name(name.as_str().unwrap()), expected, "{name}");
            names += 1;
        }
    }
    assert_eq!(names, 26);
}

#[test]
fn the_settings_that_bear_a_name_are_those_of_who_bears_it() {
    let AdamWConfig { betas, eps, weight_decay, max_norm } = AdamWConfig::lightrft();
    assert_eq!((betas, eps, weight_decay, max_norm), ((0.9, 0.95), 1e-8, 0.0, 1.0));
    assert_eq!(AdamWConfig::default(), AdamWConfig::lightrft());
    let AdamWConfig { betas, eps, weight_decay, max_norm } = AdamWConfig::torch();
    assert_eq!((betas, eps, weight_decay, max_norm), ((0.9, 0.999), 1e-8, 0.01, 0.0));
    assert_eq!(EmaConfig::lightrft(16), EmaConfig { beta: 0.992, every: 16 });
}

#[test]
fn an_optimizer_that_is_offloaded_refuses_steps_until_it_is_reloaded() {
    let mut units = unit(&[10], Single::world(), Mode::Train, 1).unwrap();
    let mut adamw = AdamW::new(LAWS, &units).unwrap();
    accumulate(&mut units, noise(2, 10)).unwrap();
    adamw.step(&mut units, 0.1).unwrap();
    let (mean, param) = (adamw.exp_avg(0).unwrap().to_vec(), units.param(0).unwrap().to_vec());
    accumulate(&mut units, noise(3, 10)).unwrap();
    for _twice in 0..2 {
        let report = adamw.offload().unwrap();
        assert_eq!((report.bytes, report.kept_bytes), (0, 80), "it is in host memory already");
        assert!(adamw.is_offloaded());
    }
    assert!(matches!(adamw.step(&mut units, 0.1), Err(Error::OptimizerOffloaded)));
    assert_eq!(units.param(0).unwrap(), param);
    adamw.reload().unwrap();
    assert!(!adamw.is_offloaded());
    assert_eq!(adamw.exp_avg(0).unwrap(), mean);
    assert_eq!(adamw.step(&mut units, 0.1).unwrap().update, Update::Applied);
}

#[test]
fn a_copy_of_another_length_is_refused_before_anything_changes() {
    let mut units = unit(&[10], Single::world(), Mode::Train, 1).unwrap();
    let mut adamw = AdamW::new(LAWS, &units).unwrap();
    accumulate(&mut units, noise(2, 10)).unwrap();
    let before = units.param(0).unwrap().to_vec();
    let norm = grad_norm([&mut units]).unwrap();
    let mut short = vec![bf16::ZERO; 9];
    let refused = adamw.step_and_copy(&mut units, 0.1, norm, [CopyOut::Bf16(&mut short)]);
    assert!(matches!(refused, Err(Error::Length { got: 9, expected: 10, .. })));
    assert_eq!((units.param(0).unwrap(), adamw.counters().steps), (&*before, 0));
}
