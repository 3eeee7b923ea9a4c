//! Every policy trains what one rank trains: same parameters in every pass, same gradients, same step, bit for bit where
//! sums are exact, whatever each rank's batch makes it skip.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod probe;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lightrft_collectives::{Communicator, local::World};
use lightrft_sharding::{
    Activations, AdamW, AdamWConfig, AdamWCounters, CopyOut, Error, GatherFrom, Offload as _, Overlap,
    ParamSpec, Policy, Precision, ReshardAfterForward, ShardSize, ShardedModel, ShardedUnits, Stage,
    StateKind, Trainable, UnitSpec, Update, grad_norm, load_state, state_parts,
};
use probe::{Batch, Probe, Seen};
use proptest::prelude::*;

/// The `choice`th divisor of `n`, counted round and round.
fn divisor(n: usize, choice: usize) -> usize {
    let all: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
    all[choice % all.len()]
}

/// A policy that a world of so many ranks allows, from any numbers.
fn policy(world: usize, choices: &[usize; 12]) -> Policy {
    let precision = |choice: usize| [Precision::F32, Precision::Bf16, Precision::F16][choice % 3];
    let stage = [Stage::Zero0, Stage::Zero1, Stage::Zero2, Stage::Zero3, Stage::Zero3][choices[0] % 5];
    let ranks = if stage == Stage::Zero0 { 1 } else { divisor(world, choices[1]) };
    let reshard_after_forward = match choices[2] % 3 {
        1 => ReshardAfterForward::Never,
        2 if stage == Stage::Zero3 => ReshardAfterForward::ToGroup(divisor(ranks, choices[3])),
        _ => ReshardAfterForward::Always,
    };
    Policy {
        stage,
        shard_size: ShardSize::Ranks(ranks),
        reshard_after_forward,
        prefetch: choices[4] % 3,
        overlap: if choices[5].is_multiple_of(2) { Overlap::On } else { Overlap::Off },
        reduce_bucket_elems: 1 + choices[6] % 60,
        param_dtype: precision(choices[7]),
        gather_from: match precision(choices[7]) {
            Precision::F32 => GatherFrom::Masters,
            _ => [GatherFrom::Masters, GatherFrom::Copy][choices[8] / 3 % 2],
        },
        reduce_dtype: precision(choices[8]),
        grad_accum_dtype: precision(choices[9]),
        persistence_threshold: if stage == Stage::Zero0 { 0 } else { choices[10] % 3 * 6 },
        trainable: match choices[11] % 3 {
            0 => Trainable::All,
            1 => Trainable::ExceptPrefixes(vec!["u0.".to_owned()]),
            _ => Trainable::OnlyContaining(vec!["p1".to_owned()]),
        },
        activations: if choices[4].is_multiple_of(2) { Activations::Recompute } else { Activations::Keep },
        alignment: 1 + choices[6] % 3,
        ..Policy::default()
    }
}

/// Whether a run says which pass is the last before a step.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Announce {
    Yes,
    No,
}

const ROUNDS: usize = 2;
const PASSES: usize = 2;

/// What the model saw, and what it was left with, when each rank of `world` runs its batches under `policy`. One rank
/// alone runs those of all `ranks`.
fn run(
    shapes: &[Vec<Vec<usize>>],
    world: usize,
    ranks: usize,
    policy: &Policy,
    announce: Announce,
) -> Vec<(Seen, Seen)> {
    let all = World::new(world).timeout(Duration::from_secs(60)).launch(|comm| {
        let rank = comm.rank();
        let mut model = ShardedModel::new(Probe::new(shapes), comm, policy.clone())?;
        model.units_mut().load(probe::start)?;
        let config = AdamWConfig { max_norm: 1.0, weight_decay: 0.1, ..AdamWConfig::default() };
        let mut adamw = AdamW::new(config, model.units())?;
        for round in 0..ROUNDS {
            // As an engine is given the weights before it generates.
            let mut streamed = Vec::new();
            model.units_mut().for_each_computed_unit(|_, values| {
                streamed.push(values.clone());
                Ok::<_, Error>(())
            })?;
            let mut at = streamed.iter();
            model.units_mut().for_each_full_unit(|_, values| {
                assert_eq!(at.next(), Some(&rounded(values, policy.param_dtype)));
                Ok::<_, Error>(())
            })?;
            let mine = rank * ranks / world..(rank + 1) * ranks / world;
            let last = (mine.end - 1, PASSES - 1);
            for (rank, pass) in mine.flat_map(|rank| (0..PASSES).map(move |pass| (rank, pass))) {
                let batch = Batch { round, rank, pass };
                let (output, tape) = model.forward(&batch)?;
                // An evaluation between the two passes disturbs neither.
                if pass == 0 {
                    assert_eq!(model.evaluate(&batch)?, output);
                }
                if announce == Announce::Yes && (rank, pass) == last {
                    model.backward_last(tape, output)?;
                } else {
                    model.backward(tape, output)?;
                }
            }
            adamw.step(model.units_mut(), 0.1)?;
        }
        let mut last = Seen::new();
        model.units_mut().for_each_full_unit(|unit, values| {
            for param in unit.params() {
                last.insert((0, param.name().to_owned()), probe::bits(&values[param.range()]));
            }
            Ok::<_, Error>(())
        })?;
        Ok::<_, Error>((model.model().take_seen(), last))
    });
    all.unwrap()
}

fn rounded(values: &[f32], precision: Precision) -> lightrft_sharding::UnitValues {
    use lightrft_sharding::UnitValues;
    match precision {
        Precision::F32 => UnitValues::F32(values.to_vec()),
        Precision::Bf16 => UnitValues::Bf16(values.iter().copied().map(half::bf16::from_f32).collect()),
        Precision::F16 => UnitValues::F16(values.iter().copied().map(half::f16::from_f32).collect()),
    }
}

/// Units of parameters of any shape, scalars and empty ones included.
fn shapes() -> impl Strategy<Value = Vec<Vec<Vec<usize>>>> {
    let shape = prop::collection::vec(0usize..4, 0..3);
    prop::collection::vec(prop::collection::vec(shape, 0..4), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_policy_on_any_number_of_ranks_equals_one_rank_bit_for_bit_where_sums_are_exact(
        shapes in shapes(), world in 1usize..9, choices in prop::array::uniform12(0usize..1000),
    ) {
        let mut policy = policy(world, &choices);
        let learns = |(u, unit): (usize, &Vec<Vec<usize>>)| {
            let named = |p: usize| policy.trainable.includes(&format!("u{u}.p{p}"));
            unit.iter().enumerate().any(|(p, shape)| named(p) && !shape.contains(&0))
        };
        if !shapes.iter().enumerate().any(learns) {
            policy.trainable = Trainable::All;
        }
        // What is computed in and what learns is part of the model, not of how it is cut.
        let alone = Policy {
            param_dtype: policy.param_dtype,
            trainable: policy.trainable.clone(),
            ..Policy::default()
        };
        let (seen, last) = run(&shapes, 1, world, &alone, Announce::No).swap_remove(0);
        let announce = if choices[3].is_multiple_of(2) { Announce::Yes } else { Announce::No };
        let ranks = run(&shapes, world, world, &policy, announce);
        for (rank, (seen_here, last_here)) in ranks.into_iter().enumerate() {
            prop_assert_eq!(&last_here, &last, "rank {} of {}: {:?}", rank, world, &policy);
            for (at, bits) in &seen_here {
                prop_assert_eq!(bits, &seen[at], "rank {} of {}, {:?}: {:?}", rank, world, at, &policy);
            }
        }
    }
}

#[test]
fn each_stage_and_each_way_to_cut_equals_one_rank() {
    let shapes = [vec![vec![5, 3], vec![7], vec![]], vec![vec![4, 4], vec![3]], vec![vec![2, 9], vec![1]]];
    let two = ShardSize::Ranks(2);
    let prefixes = Trainable::ExceptPrefixes(vec!["u1.p0".to_owned(), "u2.".to_owned()]);
    let near = |ranks| ReshardAfterForward::ToGroup(ranks);
    let default = Policy::default;
    let policies = [
        Policy { stage: Stage::Zero0, ..default() },
        Policy { stage: Stage::Zero1, ..default() },
        Policy { stage: Stage::Zero1, reduce_bucket_elems: 20, shard_size: two, ..default() },
        Policy { stage: Stage::Zero2, ..default() },
        Policy { stage: Stage::Zero2, reduce_bucket_elems: 30, overlap: Overlap::On, ..default() },
        Policy { shard_size: two, ..default() },
        Policy { shard_size: two, persistence_threshold: 20, overlap: Overlap::On, ..default() },
        Policy { stage: Stage::Zero0, reduce_bucket_elems: 20, overlap: Overlap::On, ..default() },
        Policy { stage: Stage::Zero1, shard_size: two, overlap: Overlap::On, ..default() },
        Policy { reshard_after_forward: near(2), ..default() },
        Policy { reshard_after_forward: near(4), prefetch: 0, trainable: prefixes.clone(), ..default() },
        Policy { reshard_after_forward: near(1), ..default() },
        Policy { trainable: prefixes, ..default() },
    ];
    for policy in policies {
        let alone = Policy { trainable: policy.trainable.clone(), ..Policy::default() };
        let (seen, last) = run(&shapes, 1, 8, &alone, Announce::No).swap_remove(0);
        for announce in [Announce::No, Announce::Yes] {
            for (seen_here, last_here) in run(&shapes, 8, 8, &policy, announce) {
                assert_eq!(last_here, last, "{policy:?}");
                assert!(seen_here.iter().all(|(at, bits)| *bits == seen[at]), "{policy:?}");
            }
        }
        let mut start = vec![0.0; 15];
        Probe::start_of("u0.p0", &mut start);
        assert_ne!(last[&(0, "u0.p0".to_owned())], probe::bits(&start), "it learns");
        let mut frozen = vec![0.0; 16];
        Probe::start_of("u1.p0", &mut frozen);
        let stays = last[&(0, "u1.p0".to_owned())] == probe::bits(&frozen);
        assert_eq!(stays, !policy.trainable.includes("u1.p0"), "what is frozen stays");
    }
}

/// Everything that a checkpoint holds, put together over ranks.
type Saved = HashMap<(StateKind, String), Vec<f32>>;

/// One round of all eight batches on `world` ranks under `policy`, from what was saved, and what is saved then.
fn round(
    shapes: &[Vec<Vec<usize>>],
    world: usize,
    policy: &Policy,
    round: usize,
    from: Option<&Saved>,
) -> Saved {
    const BATCHES: usize = 8;
    let saved = Mutex::new(Saved::new());
    let ranks = World::new(world).timeout(Duration::from_secs(60)).launch(|comm| {
        let rank = comm.rank();
        let mut model = ShardedModel::new(Probe::new(shapes), comm, policy.clone())?;
        model.units_mut().load(probe::start)?;
        let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
        if let Some(from) = from {
            load_state(model.units_mut(), Some(&mut adamw), |kind, param, range, out| {
                out.copy_from_slice(&from[&(kind, param.name().to_owned())][range]);
                Ok::<_, Error>(())
            })?;
            adamw.set_counters(AdamWCounters { steps: round as u64, skipped: 0 });
        }
        for rank in rank * BATCHES / world..(rank + 1) * BATCHES / world {
            let batch = Batch { round, rank, pass: 0 };
            let (output, tape) = model.forward(&batch)?;
            model.backward(tape, output)?;
        }
        adamw.step(model.units_mut(), 0.1)?;
        let mut saved = saved.lock().unwrap();
        for part in state_parts(model.units(), Some(&adamw)) {
            let whole = saved.entry((part.kind, part.param.name().to_owned())).or_default();
            whole.resize(part.param.elems(), f32::NAN);
            assert!(whole[part.range.clone()].iter().all(|value| value.is_nan()), "saved twice");
            whole[part.range].copy_from_slice(part.values);
        }
        Ok::<_, Error>(())
    });
    ranks.unwrap();
    let saved = saved.into_inner().unwrap();
    assert!(saved.values().flatten().all(|value| !value.is_nan()), "every element is saved");
    saved
}

#[test]
fn what_one_policy_saves_any_other_loads_on_any_number_of_ranks() {
    let shapes = [vec![vec![5, 3], vec![7], vec![]], vec![vec![4, 4], vec![3]], vec![vec![2, 9], vec![1]]];
    let trainable = Trainable::ExceptPrefixes(vec!["u1.p0".to_owned()]);
    let default = || Policy { trainable: trainable.clone(), ..Policy::default() };
    let ways = [
        (8, default()),
        (4, Policy { stage: Stage::Zero0, ..default() }),
        (8, Policy { stage: Stage::Zero1, shard_size: ShardSize::Ranks(4), ..default() }),
        (2, Policy { stage: Stage::Zero2, ..default() }),
        (4, Policy { shard_size: ShardSize::Ranks(2), persistence_threshold: 20, ..default() }),
        (1, default()),
    ];
    let first = round(&shapes, 1, &default(), 0, None);
    let second = round(&shapes, 1, &default(), 1, Some(&first));
    assert_ne!(first, second);
    for (world, policy) in &ways {
        assert_eq!(round(&shapes, *world, policy, 0, None), first, "{world} ranks, {policy:?}");
        assert_eq!(round(&shapes, *world, policy, 1, Some(&first)), second, "{world} ranks, {policy:?}");
    }
    // Of a frozen parameter its values alone are saved.
    let kinds = |name: &str| first.keys().filter(|(_, other)| other == name).count();
    assert_eq!((kinds("u1.p0"), kinds("u1.p1")), (1, 3));
}

#[test]
fn ranks_whose_batches_use_different_units_meet_in_every_collective() {
    // In pass 0 the first stage has work for rank 1 alone, the second for both.
    let [text_only, with_image] = [0, 1].map(|rank| Batch { round: 0, rank, pass: 0 });
    for (prefetch, overlap) in [(0, Overlap::Off), (1, Overlap::On)] {
        let policy = Policy { prefetch, overlap, ..Policy::default() };
        let ranks = World::new(2).timeout(Duration::from_secs(60)).launch(|comm| {
            let batch = if comm.rank() == 0 { text_only } else { with_image };
            let probe = Probe::with_stages(&[vec![vec![4]], vec![vec![2]]], vec![vec![0], vec![1]]);
            let mut model = ShardedModel::new(probe, comm, policy.clone())?;
            model.units_mut().load(probe::start)?;
            let (stages_run, tape) = model.forward(&batch)?;
            model.backward(tape, stages_run)?;
            let missing: Vec<String> = model.params_without_gradient().map(str::to_owned).collect();
            Ok::<_, Error>((stages_run, missing, model.units().grad(0)?.unwrap().to_vec()))
        });
        let image = probe::gradient("u0.p0", &with_image, 4);
        let expected = [(1, vec!["u0.p0".to_owned()], image[..2].to_vec()), (2, vec![], image[2..].to_vec())];
        assert_eq!(ranks.unwrap(), expected);
    }
}

#[test]
fn backward_begins_from_what_was_saved_where_that_is_asked_for() {
    for (activations, kept) in [(Activations::Recompute, 0), (Activations::Keep, 2)] {
        let mut model = ShardedModel::new(
            Probe::new(&[vec![vec![3]]]),
            lightrft_collectives::Single::world(),
            Policy { activations, ..Policy::default() },
        )
        .unwrap();
        // Rank 1 skips no stage of two.
        let batch = Batch { round: 0, rank: 1, pass: 0 };
        let (output, tape) = model.forward(&batch).unwrap();
        model.backward(tape, output).unwrap();
        assert_eq!(model.model().kept.load(std::sync::atomic::Ordering::Relaxed), kept);
    }
}

#[test]
fn units_are_computed_in_the_policys_precision_and_learn_in_f32() {
    // One part in 512 more than one: too fine for bf16.
    let fine = 1.0 + 1.0 / 512.0;
    for (param_dtype, seen) in [(Precision::F32, fine), (Precision::F16, fine), (Precision::Bf16, 1.0)] {
        let ranks = World::new(2).launch(|comm| {
            let policy = Policy { param_dtype, ..Policy::default() };
            let mut model = ShardedModel::new(Probe::new(&[vec![vec![4]]]), comm, policy)?;
            model.units_mut().load_unit(0, &[fine; 4])?;
            model.evaluate(&Batch { round: 0, rank: 1, pass: 0 })?;
            let whole = model.units_mut().gather(0)?.values().to_vec();
            Ok::<_, Error>((model.model().take_seen()[&(0, "u0.p0".to_owned())].clone(), whole))
        });
        assert_eq!(ranks.unwrap(), vec![(probe::bits(&[seen; 4]), vec![fine; 4]); 2]);
    }
}

/// What a model sees of its parameters after each of many ways to change them or not.
fn seen_through_changes(comm: Arc<dyn Communicator>, policy: &Policy) -> Result<Seen, Error> {
    let rank = comm.rank();
    // The second unit has a part that learns and one that does not.
    let mut model =
        ShardedModel::new(Probe::new(&[vec![vec![5, 3]], vec![vec![7], vec![2, 2]]]), comm, policy.clone())?;
    let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
    let mut round = 0;
    let mut pass = |model: &mut ShardedModel<Probe>| {
        round += 1;
        let batch = Batch { round, rank, pass: 0 };
        let (output, tape) = model.forward(&batch)?;
        model.backward(tape, output)
    };
    // Before anything was gathered.
    adamw.step(model.units_mut(), 0.1)?;
    model.units_mut().load(probe::start)?;
    pass(&mut model)?;
    adamw.step(model.units_mut(), 0.1)?;
    pass(&mut model)?;
    model.units_mut().load_unit(0, &[0.3; 15])?;
    pass(&mut model)?;
    // The caller's own copy, of the first unit alone, takes the place of what gathers read.
    let norm = grad_norm([model.units_mut()])?;
    let mut mine = vec![half::bf16::ZERO; model.units().plan().units()[0].trainable_shard_elems()];
    adamw.step_and_copy(model.units_mut(), 0.1, norm, [CopyOut::Bf16(&mut mine)])?;
    pass(&mut model)?;
    // A step that is skipped.
    model.units_mut().zero_gradients();
    model.units_mut().reduce_gradient(0, vec![f32::NAN; 15])?;
    assert_eq!(adamw.step(model.units_mut(), 0.1)?.update, Update::Skipped);
    pass(&mut model)?;
    load_state(model.units_mut(), None, |_, param, range, out| probe::start(param, range, out))?;
    pass(&mut model)?;
    model.units_mut().zero_gradients();
    let kept = model.units().persistent_bytes();
    let freed = model.offload()?;
    assert!(freed.kept_bytes < kept);
    model.reload()?;
    pass(&mut model)?;
    assert_eq!(model.units().persistent_bytes(), kept);
    Ok(model.model().take_seen())
}

#[test]
fn gathers_from_a_copy_carry_the_bits_of_the_masters_whoever_changes_those() {
    let trainable = Trainable::ExceptPrefixes(vec!["u1.p1".to_owned()]);
    for stage in [Stage::Zero0, Stage::Zero1, Stage::Zero3] {
        for (param_dtype, prefetch) in [(Precision::Bf16, 0), (Precision::Bf16, 1), (Precision::F16, 1)] {
            let masters =
                Policy { stage, param_dtype, prefetch, trainable: trainable.clone(), ..Policy::default() };
            let copy = Policy { gather_from: GatherFrom::Copy, ..masters.clone() };
            let [masters, copy] = [masters, copy].map(|policy| {
                World::new(2)
                    .timeout(Duration::from_secs(60))
                    .launch(|comm| seen_through_changes(comm, &policy))
                    .unwrap()
            });
            assert_eq!(masters, copy, "{stage:?}, {param_dtype:?}, {prefetch} ahead");
            // What is loaded twice is seen to be the same, what is stepped to differ.
            let seen = |round| &masters[0][&(round, "u0.p0".to_owned())];
            assert!(
                seen(1) != seen(2) && seen(1) == seen(6) && seen(4) == seen(5),
                "the test shows something"
            );
        }
    }
}

#[test]
fn gradients_are_rounded_to_what_they_are_sent_and_added_up_in() {
    let bf16 = Precision::Bf16;
    // Each of four ranks gives 257, then 1. bf16 tells 256 from 258, and 1,024 from 1,032.
    for (stage, reduce_dtype, grad_accum_dtype, sum) in [
        (Stage::Zero3, Precision::F32, Precision::F32, 4.0 * 258.0),
        // Sent as 256, then as 1.
        (Stage::Zero3, bf16, Precision::F32, 4.0 * 257.0),
        // 1,028 is a tie, kept as 1,024; so is that with 4 more.
        (Stage::Zero3, Precision::F32, bf16, 1024.0),
        // 257 is kept as 256, and so is that with 1 more.
        (Stage::Zero1, Precision::F32, bf16, 1024.0),
        // The sum of both passes is sent, as 258.
        (Stage::Zero1, bf16, Precision::F32, 4.0 * 258.0),
    ] {
        let policy = Policy { reduce_dtype, grad_accum_dtype, stage, ..Policy::default() };
        let sums = World::new(4).launch(|comm| {
            let unit = UnitSpec::new("u", [ParamSpec::new("w", [4])]);
            let mut units = ShardedUnits::with_policy(vec![unit], comm, &policy)?;
            units.reduce_gradient(0, vec![257.0; 4])?;
            units.reduce_gradient(0, vec![1.0; 4])?;
            units.sync_gradients()?;
            Ok::<_, Error>(units.grad(0)?.unwrap()[0])
        });
        assert_eq!(sums.unwrap(), [sum; 4], "{policy:?}");
    }
}

#[test]
fn a_mesh_of_the_callers_gives_the_shards_its_second_axis() {
    let sizes = World::new(4)
        .launch(|comm| {
            // Shard groups of every second rank.
            let mesh = lightrft_collectives::DeviceMesh::of_ranks(vec![0, 2, 1, 3], &[("r", 2), ("s", 2)])
                .expect("a mesh");
            let model = ShardedModel::on_mesh(Probe::new(&[vec![vec![8]]]), comm, &mesh, Policy::default())?;
            let units = model.units();
            let ranks = |comm: &Arc<dyn Communicator>| comm.ranks().to_vec();
            Ok::<_, Error>((ranks(units.communicator()), ranks(units.replicas()), units.param(0)?.len()))
        })
        .unwrap();
    assert_eq!(sizes[1], (vec![1, 3], vec![0, 1], 4));
    assert_eq!(sizes[2], (vec![0, 2], vec![2, 3], 4));
}
