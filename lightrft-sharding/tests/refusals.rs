//! What is refused, where, and in which words: wrong lengths, other models, NaN, half-finished passes.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/tiny/mod.rs"]
mod tiny;

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use lightrft_collectives::{Communicator, DeviceMesh, Single, local::World};
use lightrft_sharding::{
    AdamW, AdamWConfig, Error, FlatUnit, GatherFrom, Mode, Offload as _, Overlap, ParamSpec, Plan, Policy,
    Precision, ReshardAfterForward, ShardSize, ShardedModel, ShardedUnits, Stage, StageGrads, StageSpec,
    StagedModel, Trainable, UnitSpec, UnitValues, Update, load_state,
};
use tiny::{Batch, Tiny};

const MODEL: Tiny = Tiny { vocab: 5, width: 3, layers: 1 };

fn batch() -> Batch {
    Batch { tokens: vec![0, 1, 2], targets: vec![1, 2, 3] }
}

fn sharded(comm: Arc<dyn Communicator>, options: Policy) -> Result<ShardedModel<Tiny>, Error> {
    let mut model = ShardedModel::new(MODEL, comm, options)?;
    model.units_mut().load(tiny::start)?;
    Ok(model)
}

#[test]
fn ranks_with_other_shapes_are_told_both_on_every_rank() {
    let results = World::new(3).timeout(Duration::from_secs(20)).launch(|comm| {
        let rows = if comm.rank() == 2 { 5 } else { 4 };
        let unit = UnitSpec::new("u", [ParamSpec::new("same", [2]), ParamSpec::new("w", [rows, 3])]);
        let plan = Arc::new(Plan::new(vec![unit], 3)?);
        Ok::<_, Error>(ShardedUnits::new(plan, comm, Mode::Train).map(drop).unwrap_err())
    });
    for error in results.unwrap() {
        assert!(matches!(error, Error::PlanMismatch { rank: 0, peer: 2, .. }));
        let text = error.to_string();
        assert!(text.contains("`w`") && text.contains("[4, 3]") && text.contains("[5, 3]"), "{text}");
    }
}

#[test]
fn a_plan_for_another_world_is_refused() {
    let plan = Arc::new(Plan::new(vec![], 2).unwrap());
    let error = ShardedUnits::new(plan, Single::world(), Mode::Train).map(drop).unwrap_err();
    assert!(matches!(error, Error::WorldMismatch { plan: 2, world: 1, .. }));
}

#[test]
fn gradients_and_values_of_wrong_lengths_are_refused_before_anything_is_sent() {
    let unit = UnitSpec::new("u", [ParamSpec::new("w", [3, 2])]);
    let mut units =
        ShardedUnits::new(Arc::new(Plan::new(vec![unit], 1).unwrap()), Single::world(), Mode::Train).unwrap();
    let error = units.reduce_gradient(0, vec![0.0; 5]).unwrap_err();
    assert!(matches!(&error, Error::Length { name, got: 5, expected: 6, .. } if name == "u"));
    assert!(matches!(units.load_unit(0, &[0.0; 7]), Err(Error::Length { got: 7, .. })));
    assert!(matches!(units.gather(1), Err(Error::NoSuchUnit { unit: 1, units: 1 })));
    assert_eq!(units.grad(0).unwrap(), None);
}

#[test]
fn a_nan_on_one_rank_skips_the_step_on_all_and_is_counted() {
    let ranks = World::new(3).launch(|comm| {
        let rank = comm.rank();
        let mut model = sharded(comm, Policy::default())?;
        let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
        let before = model.units().param(0)?.to_vec();
        let mut updates = Vec::new();
        for poison in [None, Some(f32::NAN), Some(f32::INFINITY), None] {
            let batch = batch();
            let (logits, tape) = model.forward(&batch)?;
            let (_, mut grad) = MODEL.loss(&logits, &batch, 9);
            if let Some(poison) = poison.filter(|_| rank == 1) {
                grad[4] = poison;
            }
            model.backward(tape, grad)?;
            let was = model.units().param(0)?.to_vec();
            let report = adamw.step(model.units_mut(), 0.01)?;
            updates.push(report.update);
            assert_eq!(report.grad_norm.is_finite(), report.update == Update::Applied);
            assert_eq!(was == model.units().param(0)?, report.update == Update::Skipped);
            assert_eq!(model.units().grad(0)?, None, "gradients are zero after a step, skipped or not");
        }
        assert_ne!(before, model.units().param(0)?);
        assert!(model.units().param(0)?.iter().all(|value| value.is_finite()));
        Ok::<_, Error>((updates, adamw.counters()))
    });
    for (updates, counters) in ranks.unwrap() {
        assert_eq!(updates, [Update::Applied, Update::Skipped, Update::Skipped, Update::Applied]);
        assert_eq!((counters.steps, counters.skipped), (2, 2));
    }
}

#[test]
fn a_tape_is_refused_once_the_parameters_have_changed() {
    let mut model = sharded(Single::world(), Policy::default()).unwrap();
    let mut adamw = AdamW::new(AdamWConfig::default(), model.units()).unwrap();
    let batch = batch();
    let (logits, first) = model.forward(&batch).unwrap();
    let (_, second) = model.forward(&batch).unwrap();
    let (_, grad) = MODEL.loss(&logits, &batch, 3);
    model.backward(first, grad.clone()).unwrap();
    adamw.step(model.units_mut(), 0.1).unwrap();
    assert!(matches!(model.backward(second, grad.clone()), Err(Error::StaleTape)));
    // Nor may another model play it.
    let (_, tape) = model.forward(&batch).unwrap();
    let mut other = sharded(Single::world(), Policy::default()).unwrap();
    assert!(matches!(other.backward(tape, grad), Err(Error::StaleTape)));
}

#[test]
fn units_that_stay_gathered_are_gathered_anew_after_a_step() {
    let never = Policy { reshard_after_forward: ReshardAfterForward::Never, ..Policy::default() };
    let mut model = sharded(Single::world(), never).unwrap();
    let batch = batch();
    let (before, _unused) = model.forward(&batch).unwrap();
    let plan = Arc::clone(model.units().plan());
    for (unit, layout) in plan.units().iter().enumerate() {
        model.units_mut().load_unit(unit, &vec![0.0; layout.elems()]).unwrap();
    }
    let (after, _unused) = model.forward(&batch).unwrap();
    assert_ne!(before, after);
    assert!(after.iter().all(|&logit| logit == 0.0));
    assert!(model.units().transient_bytes().now > 0);
    model.reshard();
    model.units_mut().release_buffers();
    assert_eq!(model.units().transient_bytes().now, 0);
}

#[test]
fn frozen_units_predict_and_refuse_to_learn() {
    let frozen = Policy { mode: Mode::Frozen, ..Policy::default() };
    let mut model = sharded(Single::world(), frozen).unwrap();
    let mut trained = sharded(Single::world(), Policy::default()).unwrap();
    assert_eq!(model.evaluate(&batch()).unwrap(), trained.evaluate(&batch()).unwrap());
    assert_eq!(2 * model.units().persistent_bytes(), trained.units().persistent_bytes());
    assert!(matches!(model.forward(&batch()), Err(Error::Frozen { .. })));
    assert!(matches!(AdamW::new(AdamWConfig::default(), model.units()), Err(Error::Frozen { .. })));
    assert!(matches!(model.units().grad(0), Err(Error::Frozen { .. })));
    assert!(matches!(model.units_mut().reduce_gradient(0, vec![0.0; 15]), Err(Error::Frozen { .. })));
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    let mut model = sharded(Single::world(), Policy::default()).unwrap();
    let default = AdamWConfig::default();
    for (config, setting) in [
        (AdamWConfig { betas: (1.0, 0.9), ..default }, "betas.0"),
        (AdamWConfig { betas: (0.9, f64::NAN), ..default }, "betas.1"),
        (AdamWConfig { eps: -1.0, ..default }, "eps"),
        (AdamWConfig { weight_decay: f64::INFINITY, ..default }, "weight_decay"),
        (AdamWConfig { max_norm: -0.5, ..default }, "max_norm"),
    ] {
        let error = AdamW::new(config, model.units()).map(drop).unwrap_err();
        assert!(matches!(error, Error::InvalidSetting { setting: named, .. } if named == setting));
    }
    let mut adamw = AdamW::new(default, model.units()).unwrap();
    for lr in [-1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(
            adamw.step(model.units_mut(), lr),
            Err(Error::InvalidSetting { setting: "lr", .. })
        ));
    }
}

#[test]
fn an_optimizer_of_another_model_is_refused() {
    let model = sharded(Single::world(), Policy::default()).unwrap();
    let mut other =
        ShardedModel::new(Tiny { width: 4, ..MODEL }, Single::world(), Policy::default()).unwrap();
    let mut adamw = AdamW::new(AdamWConfig::default(), model.units()).unwrap();
    assert!(matches!(adamw.step(other.units_mut(), 0.1), Err(Error::ForeignOptimizer { .. })));
    let loaded = load_state(other.units_mut(), Some(&mut adamw), |_, param, range, out| {
        tiny::start(param, range, out)
    });
    assert!(matches!(loaded, Err(Error::ForeignOptimizer { .. })));
}

#[test]
fn a_reader_that_fails_is_quoted_with_what_it_was_asked_for() {
    let mut model = sharded(Single::world(), Policy::default()).unwrap();
    let failed = model.units_mut().load(|param, _, _| match param.name() {
        "head.bias" => Err("the disk is gone"),
        _ => Ok(()),
    });
    let error = failed.unwrap_err();
    assert!(matches!(&error, Error::Read { name, start: 0, end: 5, .. } if name == "head.bias"));
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "the disk is gone");
}

#[test]
fn a_visitor_that_fails_on_one_rank_keeps_no_other_waiting() {
    let ranks = World::new(2).timeout(Duration::from_secs(20)).launch(|comm| {
        let rank = comm.rank();
        let mut model = sharded(comm, Policy::default())?;
        let mut seen = 0;
        let visited = model.units_mut().for_each_full_unit(|_, _| {
            seen += 1;
            if rank == 1 && seen == 2 { Err("enough") } else { Ok(()) }
        });
        Ok::<_, Error>((seen, visited.err().map(|error| error.to_string())))
    });
    let ranks = ranks.unwrap();
    assert_eq!(ranks[0], (3, None));
    assert!(ranks[1].0 == 2 && ranks[1].1.as_ref().is_some_and(|error| error.contains("layers.0")));
}

#[test]
fn a_nan_on_one_rank_skips_the_step_in_every_stage_and_on_replicas() {
    let default = Policy::default;
    for policy in [
        Policy { stage: Stage::Zero0, ..default() },
        Policy { stage: Stage::Zero1, ..default() },
        Policy { stage: Stage::Zero2, overlap: Overlap::On, ..default() },
        Policy { shard_size: ShardSize::Ranks(2), ..default() },
        // Every unit whole: only one rank counts them in the norm.
        Policy { persistence_threshold: 1000, ..default() },
        Policy { grad_accum_dtype: Precision::Bf16, ..default() },
    ] {
        let counters = World::new(4).launch(|comm| {
            let rank = comm.rank();
            let mut model = sharded(comm, policy.clone())?;
            let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
            let before = model.units().param(0)?.to_vec();
            let batch = batch();
            let (logits, tape) = model.forward(&batch)?;
            let (_, mut grad) = MODEL.loss(&logits, &batch, 12);
            if rank == 3 {
                grad[1] = f32::NAN;
            }
            model.backward(tape, grad)?;
            let update = adamw.step(model.units_mut(), 0.01)?.update;
            assert_eq!((update, model.units().param(0)?), (Update::Skipped, &before[..]), "{policy:?}");
            Ok::<_, Error>(adamw.counters())
        });
        assert!(counters.unwrap().iter().all(|counters| (counters.steps, counters.skipped) == (0, 1)));
    }
}

#[test]
fn nothing_is_added_to_gradients_after_the_last_pass_until_they_are_stepped() {
    let policy = Policy { stage: Stage::Zero1, overlap: Overlap::On, ..Policy::default() };
    let ranks = World::new(2).timeout(Duration::from_secs(20)).launch(|comm| {
        let mut model = sharded(comm, policy.clone())?;
        let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
        let batch = batch();
        let pass = |model: &mut ShardedModel<Tiny>| {
            let (logits, tape) = model.forward(&batch)?;
            model.backward_last(tape, MODEL.loss(&logits, &batch, 6).1)
        };
        pass(&mut model)?;
        let refused = pass(&mut model).unwrap_err();
        adamw.step(model.units_mut(), 0.01)?;
        pass(&mut model)?;
        model.units_mut().zero_gradients();
        pass(&mut model)?;
        Ok::<_, Error>(refused)
    });
    assert!(ranks.unwrap().iter().all(|error| matches!(error, Error::AlreadySummed { .. })));
}

#[test]
fn ranks_that_take_different_passes_for_the_last_are_told_so() {
    let overlapped = Policy { overlap: Overlap::On, reduce_bucket_elems: 16, ..Policy::default() };
    for policy in [
        Policy { stage: Stage::Zero0, ..overlapped.clone() },
        Policy { shard_size: ShardSize::Ranks(1), reduce_bucket_elems: 1000, ..overlapped },
    ] {
        let ranks = World::new(2).timeout(Duration::from_secs(20)).launch(|comm| {
            let rank = comm.rank();
            let mut model = sharded(comm, policy.clone())?;
            let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
            let batch = batch();
            let (logits, tape) = model.forward(&batch)?;
            let grad = MODEL.loss(&logits, &batch, 6).1;
            let passed = if rank == 0 { model.backward_last(tape, grad) } else { model.backward(tape, grad) };
            let stepped = passed.and_then(|()| adamw.step(model.units_mut(), 0.01));
            let error = stepped.unwrap_err();
            Ok::<_, Error>(format!("{error}: {:?}", std::error::Error::source(&error)))
        });
        for error in ranks.unwrap() {
            assert!(error.contains("all-reduce") && error.contains("Mismatch"), "{error}");
        }
    }
}

#[test]
fn choices_that_do_not_go_together_are_named_both() {
    let default = Policy::default;
    let near = ReshardAfterForward::ToGroup(3);
    for (policy, world, first, second) in [
        (
            Policy { stage: Stage::Zero2, reshard_after_forward: near, ..default() },
            3,
            "stage = 2",
            "to_group(3)",
        ),
        (
            Policy { stage: Stage::Zero0, persistence_threshold: 9, ..default() },
            2,
            "stage = 0",
            "threshold = 9",
        ),
        (Policy { gather_from: GatherFrom::Copy, ..default() }, 2, "gather_from = copy", "param_dtype = f32"),
        (
            Policy { stage: Stage::Zero0, shard_size: ShardSize::Ranks(2), ..default() },
            2,
            "stage = 0",
            "size = 2",
        ),
        (Policy { shard_size: ShardSize::Ranks(4), ..default() }, 6, "shard_size = 4", "world size = 6"),
        (Policy { reshard_after_forward: near, ..default() }, 4, "to_group(3)", "shard_size = 4"),
        (
            Policy { reshard_after_forward: near, shard_size: ShardSize::Ranks(4), ..default() },
            8,
            "to_group(3)",
            "shard_size = 4",
        ),
    ] {
        let error = policy.validate(world).unwrap_err();
        let Error::Contradiction { first: one, second: other, .. } = &error else { panic!("{error}") };
        assert!(one.contains(first) && other.contains(second), "{error}");
    }
    let slip = Policy { trainable: Trainable::OnlyContaining(vec!["lorra".to_owned()]), ..default() };
    let error = ShardedModel::new(MODEL, Single::world(), slip).map(drop).unwrap_err().to_string();
    assert!(error.contains("mode = train") && error.contains("lorra"), "{error}");
    for (policy, setting) in [
        (Policy { reduce_bucket_elems: 0, ..default() }, "reduce_bucket_elems"),
        (Policy { alignment: 0, ..default() }, "alignment"),
        (Policy { shard_size: ShardSize::Ranks(0), ..default() }, "shard_size"),
        (
            Policy { reshard_after_forward: ReshardAfterForward::ToGroup(0), ..default() },
            "reshard_after_forward",
        ),
    ] {
        let error = policy.validate(1).unwrap_err();
        assert!(matches!(error, Error::InvalidSetting { setting: named, .. } if named == setting));
    }
    assert!(Stage::try_from(4).is_err_and(|error| error.to_string().contains('4')));
}

#[test]
fn the_size_of_shard_groups_follows_lightrfts_thresholds_where_it_is_left_to_them() {
    let auto = |mode| Policy { shard_size: ShardSize::Auto, mode, ..Policy::default() };
    let ranks = |mode, world, billions: usize| auto(mode).shard_ranks(world, billions * 1_000_000_000);
    for (billions, expected) in [(0, 1), (9, 1), (10, 8), (79, 8), (80, 32)] {
        assert_eq!(ranks(Mode::Frozen, 32, billions).unwrap(), expected);
        assert_eq!(ranks(Mode::Train, 32, billions).unwrap(), 32);
    }
    assert_eq!(ranks(Mode::Frozen, 4, 10).unwrap(), 4);
    let error = ranks(Mode::Frozen, 12, 10).unwrap_err().to_string();
    assert!(error.contains("shard_size = 8 (auto)") && error.contains("world size = 12"), "{error}");
}

#[test]
fn a_policy_survives_json_and_unknown_fields_are_refused() {
    let policy = Policy {
        stage: Stage::Zero1,
        shard_size: ShardSize::Ranks(2),
        trainable: Trainable::ExceptPrefixes(vec!["visual.".to_owned()]),
        ..Policy::default()
    };
    let json = serde_json::to_string(&policy).unwrap();
    assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
    let short: Policy =
        serde_json::from_str(r#"{"stage": 2, "param_dtype": "bf16", "overlap": "on"}"#).unwrap();
    assert_eq!((short.stage, short.param_dtype, short.overlap), (Stage::Zero2, Precision::Bf16, Overlap::On));
    assert!(serde_json::from_str::<Policy>(r#"{"stage": 4}"#).is_err());
    assert!(serde_json::from_str::<Policy>(r#"{"prefech": 1}"#).is_err());
}

#[test]
fn ranks_with_other_policies_are_told_both_on_every_rank() {
    let results = World::new(2).timeout(Duration::from_secs(20)).launch(|comm| {
        let policy = Policy { prefetch: comm.rank(), ..Policy::default() };
        Ok::<_, Error>(ShardedModel::new(MODEL, comm, policy).map(drop).unwrap_err().to_string())
    });
    for text in results.unwrap() {
        assert!(text.contains("prefetch = 0") && text.contains("prefetch = 1"), "{text}");
    }
}

#[test]
fn a_mesh_that_does_not_fit_the_world_is_refused() {
    for (axes, fits) in [
        (vec![("s", 4)], true),
        (vec![("r", 2), ("s", 2)], true),
        (vec![("s", 3)], false),
        (vec![("r", 2), ("s", 4)], false),
        (vec![("r", 2), ("s", 2), ("t", 1)], false),
    ] {
        let made = World::new(4).timeout(Duration::from_secs(20)).launch(|comm| {
            let mesh = DeviceMesh::new(&axes)?;
            match ShardedModel::on_mesh(MODEL, comm, &mesh, Policy::default()) {
                Ok(_) => Ok::<_, Error>(true),
                Err(Error::MeshMismatch { sizes, world: 4, .. }) if sizes == mesh.sizes() => Ok(false),
                Err(error) => Err(error),
            }
        });
        assert_eq!(made.unwrap(), [fits; 4], "{axes:?}");
    }
    // Stage 0 cuts nothing, so no mesh that cuts something is one for it.
    let mesh = DeviceMesh::new(&[("r", 1), ("s", 1)]).unwrap();
    let stage_0 = Policy { stage: Stage::Zero0, ..Policy::default() };
    assert!(ShardedModel::on_mesh(MODEL, Single::world(), &mesh, stage_0).is_ok());
}

#[test]
fn a_pass_between_the_sum_over_ranks_and_the_step_is_refused() {
    let refused = World::new(2).launch(|comm| {
        let mut model = sharded(comm, Policy { stage: Stage::Zero1, ..Policy::default() })?;
        let pass = |model: &mut ShardedModel<Tiny>| {
            let batch = batch();
            let (logits, tape) = model.forward(&batch)?;
            model.backward(tape, MODEL.loss(&logits, &batch, 6).1)
        };
        pass(&mut model)?;
        assert_eq!(model.units().grad(0)?, None, "the ranks have yet to sum it");
        model.units_mut().sync_gradients()?;
        assert!(model.units().grad(0)?.is_some());
        let again = pass(&mut model);
        let by_hand = model.units_mut().reduce_gradient(0, vec![0.0; 15]);
        let refused =
            [again, by_hand].iter().all(|result| matches!(result, Err(Error::AlreadySummed { .. })));
        // Nothing was added half-way: the step can still be made.
        AdamW::new(AdamWConfig::default(), model.units())?.step(model.units_mut(), 0.1)?;
        pass(&mut model)?;
        Ok::<_, Error>(refused)
    });
    assert_eq!(refused.unwrap(), [true; 2]);
}

#[test]
fn what_a_caller_leaves_in_the_padding_does_not_reach_the_norm() {
    let norms = World::new(4).launch(|comm| {
        let unit = UnitSpec::new("u", [ParamSpec::new("w", [5])]);
        let mut units = ShardedUnits::with_policy(vec![unit], comm, &Policy::default())?;
        let mut full = vec![1.0; 8];
        full[5..].fill(f32::NAN);
        units.reduce_gradient(0, full)?;
        Ok::<_, Error>(AdamW::new(AdamWConfig::default(), &units)?.step(&mut units, 0.1)?.grad_norm)
    });
    assert_eq!(norms.unwrap(), [80f32.sqrt(); 4]);
}

#[test]
fn units_that_are_offloaded_are_not_used_and_come_back_as_they_were() {
    for policy in [
        Policy::default(),
        Policy { stage: Stage::Zero2, ..Policy::default() },
        Policy { reshard_after_forward: ReshardAfterForward::ToGroup(2), ..Policy::default() },
    ] {
        let ranks = World::new(4).launch(|comm| {
            let mut model = sharded(comm, policy.clone())?;
            let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
            let train = |model: &mut ShardedModel<Tiny>| {
                let batch = batch();
                let (logits, tape) = model.forward(&batch)?;
                model.backward(tape, MODEL.loss(&logits, &batch, 12).1)?;
                Ok::<_, Error>(logits)
            };
            train(&mut model)?;
            adamw.step(model.units_mut(), 0.01)?;
            let before = model.evaluate(&batch())?;
            let held = model.units().persistent_bytes() + model.units().transient_bytes().now;

            let report = model.offload()?;
            let now = model.units().persistent_bytes() + model.units().transient_bytes().now;
            assert_eq!(now, 4 * model.units().plan().shard_elems(), "the masters alone");
            assert_eq!((report.bytes, report.kept_bytes), (held - now, now), "{policy:?}");
            assert!(matches!(model.evaluate(&batch()), Err(Error::Offloaded { unit }) if unit == "embed"));
            assert!(matches!(model.units_mut().gather(1), Err(Error::Offloaded { .. })));
            assert!(matches!(model.units_mut().gradient_buffer(1), Err(Error::Offloaded { .. })));
            assert!(matches!(adamw.step(model.units_mut(), 0.1), Err(Error::Offloaded { .. })));

            let report = model.reload()?;
            assert_eq!(report.kept_bytes - now, report.bytes, "gradients");
            assert_eq!(model.evaluate(&batch())?, before);
            train(&mut model)?;
            // What has accumulated is kept.
            let grad = model.units().grad(1)?.unwrap().to_vec();
            model.offload()?;
            model.reload()?;
            assert_eq!(model.units().grad(1)?.unwrap(), grad);
            adamw.step(model.units_mut(), 0.01).map(|report| report.update)
        });
        assert_eq!(ranks.unwrap(), [Update::Applied; 4]);
    }
}

/// A model whose one stage fails in backward when told to, after it has given a gradient.
struct Fragile {
    fails: Cell<bool>,
    gradient: usize,
}

impl StagedModel for Fragile {
    type Batch = ();
    type Activation = ();
    type Params = ();
    type Saved = ();
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn units(&self) -> Vec<UnitSpec> {
        vec![UnitSpec::new("u", [ParamSpec::new("w", [4]), ParamSpec::new("unused", [1])])]
    }

    fn stages(&self) -> Vec<StageSpec> {
        vec![StageSpec::new("only", [0])]
    }

    fn bind(&self, _: &FlatUnit, _: UnitValues) -> Result<(), Self::Error> {
        Ok(())
    }

    fn forward(&self, _: usize, _: &[&()], (): &(), _: Option<&()>) -> Result<(), Self::Error> {
        Ok(())
    }

    fn backward(
        &self,
        _: usize,
        _: &[&()],
        (): &(),
        _: Option<&()>,
        (): (),
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<()>, Self::Error> {
        assert_eq!(grads.layouts().map(FlatUnit::name).collect::<Vec<_>>(), ["u"]);
        grads.add(0, 0, &vec![1.0; self.gradient])?;
        grads.add(0, 0, &vec![1.0; self.gradient])?;
        if self.fails.get() { Err("out of paper".into()) } else { Ok(None) }
    }
}

#[test]
fn a_backward_that_failed_half_way_blocks_the_step_until_gradients_are_zeroed() {
    let fragile = Fragile { fails: Cell::new(true), gradient: 4 };
    let mut model = ShardedModel::new(fragile, Single::world(), Policy::default()).unwrap();
    let mut adamw = AdamW::new(AdamWConfig::default(), model.units()).unwrap();
    let ((), tape) = model.forward(&()).unwrap();
    let error = model.backward(tape, ()).unwrap_err();
    assert!(matches!(&error, Error::Compute { phase: "backward", what, .. } if what == "only"));
    assert!(matches!(adamw.step(model.units_mut(), 0.1), Err(Error::IncompleteBackward)));
    model.units_mut().release_buffers();
    assert_eq!(model.units().transient_bytes().now, 0, "nothing stays gathered after a failure");

    model.model().fails.set(false);
    let ((), tape) = model.forward(&()).unwrap();
    let retried = model.backward(tape, ());
    assert!(matches!(retried, Err(Error::IncompleteBackward)), "a later pass does not hide the failed one");
    model.units_mut().zero_gradients();
    let ((), tape) = model.forward(&()).unwrap();
    model.backward(tape, ()).unwrap();
    assert_eq!(model.units().grad(0).unwrap().unwrap(), [2.0, 2.0, 2.0, 2.0, 0.0]);
    assert_eq!(model.params_without_gradient().collect::<Vec<_>>(), ["unused"]);
    adamw.step(model.units_mut(), 0.1).unwrap();
}

#[test]
fn a_gradient_of_the_wrong_length_names_the_parameter() {
    let fragile = Fragile { fails: Cell::new(false), gradient: 3 };
    let mut model = ShardedModel::new(fragile, Single::world(), Policy::default()).unwrap();
    let ((), tape) = model.forward(&()).unwrap();
    let error = model.backward(tape, ()).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("`w`") && source.contains('3') && source.contains('4'), "{source}");
}
