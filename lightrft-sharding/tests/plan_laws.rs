//! Laws of the plan: pure functions of names, shapes and the number of ranks.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lightrft_sharding::{Error, Mode, ParamSpec, Plan, Policy, Trainable, UnitSpec};
use proptest::prelude::*;

fn model(shapes: &[Vec<Vec<usize>>]) -> Vec<UnitSpec> {
    let unit = |(u, shapes): (usize, &Vec<Vec<usize>>)| {
        let param = |(p, shape): (usize, &Vec<usize>)| ParamSpec::new(format!("u{u}.p{p}"), shape.clone());
        UnitSpec::new(format!("u{u}"), shapes.iter().enumerate().map(param).collect::<Vec<_>>())
    };
    shapes.iter().enumerate().map(unit).collect()
}

/// Units of parameters of any shape, scalars and empty ones included.
fn shapes() -> impl Strategy<Value = Vec<Vec<Vec<usize>>>> {
    let shape = prop::collection::vec(0usize..6, 0..4);
    prop::collection::vec(prop::collection::vec(shape, 0..5), 0..5)
}

proptest! {
    #[test]
    fn shards_partition_the_buffer_and_padding_is_below_one_alignment_a_rank(
        shapes in shapes(), world in 1usize..9, alignment in 1usize..9,
    ) {
        let plan = Plan::with_alignment(model(&shapes), world, alignment).unwrap();
        for unit in plan.units() {
            let mut next = 0;
            for rank in 0..world {
                let shard = unit.shard(rank);
                prop_assert_eq!(shard.start, next);
                prop_assert_eq!(shard.len(), unit.shard_elems());
                next = shard.end;
            }
            prop_assert_eq!(next, unit.padded_elems());
            prop_assert_eq!(unit.shard_elems() % alignment, 0);
            prop_assert!(unit.padded_elems() - unit.elems() < world * alignment);
            prop_assert_eq!(unit.shard(world).len(), 0);
        }
    }

    #[test]
    fn every_element_of_a_parameter_has_exactly_one_owner_where_its_shard_says(
        shapes in shapes(), world in 1usize..9, alignment in 1usize..5,
    ) {
        let plan = Plan::with_alignment(model(&shapes), world, alignment).unwrap();
        for unit in plan.units() {
            let mut start = 0;
            for (index, param) in unit.params().iter().enumerate() {
                prop_assert_eq!(param.range().start, start, "parameters lie one after another");
                start = param.range().end;
                let mut next = 0;
                for rank in 0..world {
                    let Some(owned) = unit.owned(index, rank) else { continue };
                    prop_assert_eq!(owned.param.start, next);
                    prop_assert!(!owned.param.is_empty());
                    prop_assert_eq!(owned.param.len(), owned.shard.len());
                    prop_assert_eq!(
                        unit.shard(rank).start + owned.shard.start,
                        param.range().start + owned.param.start
                    );
                    next = owned.param.end;
                }
                prop_assert_eq!(next, param.elems());
            }
            prop_assert_eq!(start, unit.elems());
        }
    }

    #[test]
    fn equal_models_have_equal_plans_and_others_have_other_fingerprints(
        a in shapes(), b in shapes(), world in 1usize..9,
    ) {
        let plan = Plan::new(model(&a), world).unwrap();
        prop_assert_eq!(&plan, &Plan::new(plan.specs(), world).unwrap());
        prop_assert_eq!(plan.fingerprint(), Plan::new(model(&a), world).unwrap().fingerprint());
        let other = Plan::new(model(&b), world).unwrap();
        prop_assert_eq!(a == b, plan.fingerprint() == other.fingerprint());
        prop_assert_ne!(plan.fingerprint(), plan.resized(world + 1).unwrap().fingerprint());
    }
}

#[test]
fn names_that_stand_twice_are_refused_with_both_places() {
    let unit = |name: &str, param: &str| UnitSpec::new(name, [ParamSpec::new(param, [2])]);
    let tied = Plan::new(vec![unit("embed", "table"), unit("head", "table")], 2).unwrap_err();
    assert!(matches!(&tied, Error::DuplicateName { name, first, second, .. }
        if name == "table" && first == "embed" && second == "head"));
    let same = Plan::new(vec![unit("u", "a"), unit("u", "b")], 2).unwrap_err();
    assert!(matches!(same, Error::DuplicateName { what: "unit", .. }));
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    assert!(matches!(Plan::new(vec![], 0), Err(Error::InvalidPlan { world: 0, .. })));
    assert!(matches!(Plan::with_alignment(vec![], 1, 0), Err(Error::InvalidPlan { alignment: 0, .. })));
    for shape in [vec![usize::MAX, 2], vec![usize::MAX / 4, 1]] {
        let unit = UnitSpec::new("vast", [ParamSpec::new("w", shape)]);
        assert!(matches!(Plan::new(vec![unit], 3), Err(Error::TooLarge { unit }) if unit == "vast"));
    }
}

/// Shapes of Qwen2.5-7B: 339 parameters in 30 units.
fn seven_billion() -> Vec<UnitSpec> {
    let layer = |i: usize| {
        let name = |part: &str| format!("model.layers.{i}.{part}");
        let matrices = [
            ("self_attn.q_proj.weight", [3584, 3584]),
            ("self_attn.k_proj.weight", [512, 3584]),
            ("self_attn.v_proj.weight", [512, 3584]),
            ("self_attn.o_proj.weight", [3584, 3584]),
            ("mlp.gate_proj.weight", [18944, 3584]),
            ("mlp.up_proj.weight", [18944, 3584]),
            ("mlp.down_proj.weight", [3584, 18944]),
        ];
        let vectors = [
            ("self_attn.q_proj.bias", 3584),
            ("self_attn.k_proj.bias", 512),
            ("self_attn.v_proj.bias", 512),
            ("input_layernorm.weight", 3584),
            ("post_attention_layernorm.weight", 3584),
        ];
        let mut params: Vec<ParamSpec> =
            matrices.iter().map(|(part, shape)| ParamSpec::new(name(part), *shape)).collect();
        params.extend(vectors.iter().map(|(part, elems)| ParamSpec::new(name(part), [*elems])));
        UnitSpec::new(format!("model.layers.{i}"), params)
    };
    let mut units =
        vec![UnitSpec::new("embed", [ParamSpec::new("model.embed_tokens.weight", [152_064, 3584])])];
    units.extend((0..28).map(layer));
    let head =
        [ParamSpec::new("model.norm.weight", [3584]), ParamSpec::new("lm_head.weight", [152_064, 3584])];
    units.push(UnitSpec::new("head", head));
    units
}

#[test]
fn a_model_of_seven_billion_parameters_is_planned_for_512_ranks() {
    let plan = Plan::new(seven_billion(), 512).unwrap();
    assert_eq!(plan.units().iter().map(|unit| unit.params().len()).sum::<usize>(), 339);
    assert_eq!(plan.elems(), 7_615_616_512);
    // FSDP2 pads 9.7% of a model of 0.5 billion on as many ranks.
    assert!(plan.padding_elems() < 30 * 512);
}

#[test]
#[ignore = "measures time"]
fn the_plan_of_seven_billion_parameters_over_512_ranks_takes_less_than_5_ms() {
    let mut best = std::time::Duration::MAX;
    for _ in 0..20 {
        let units = seven_billion();
        let start = std::time::Instant::now();
        let plan = Plan::with_policy(units, 512, &Policy::default()).unwrap();
        let print = plan.fingerprint();
        best = best.min(start.elapsed());
        assert_ne!(print, 0);
    }
    println!("plan and fingerprint of 339 parameters over 512 ranks: {best:?}");
    assert!(best < std::time::Duration::from_millis(5));
}

#[test]
fn frozen_parameters_lie_after_all_that_learn_and_each_segment_is_cut_evenly() {
    let sizes = [("a", 5), ("lora.b", 3), ("c", 4), ("lora.d", 2)];
    let params: Vec<ParamSpec> = sizes.iter().map(|(name, elems)| ParamSpec::new(*name, [*elems])).collect();
    let policy =
        Policy { trainable: Trainable::OnlyContaining(vec!["lora".to_owned()]), ..Policy::default() };
    let plan = Plan::with_policy(vec![UnitSpec::new("u", params)], 2, &policy).unwrap();
    let unit = &plan.units()[0];
    let ranges: Vec<_> = unit.params().iter().map(|param| param.range()).collect();
    // Trainable: 3 + 2 and one of padding; frozen: 5 + 4 and one of padding.
    assert_eq!(ranges, [6..11, 0..3, 11..15, 3..5]);
    assert_eq!(
        (unit.trainable_elems(), unit.trainable_padded_elems(), unit.trainable_shard_elems()),
        (5, 6, 3)
    );
    assert_eq!((unit.elems(), unit.padded_elems(), unit.shard_elems()), (14, 16, 8));
    let owned =
        |rank| unit.owned_parts(rank).map(|(p, part)| (p, part.param, part.shard)).collect::<Vec<_>>();
    assert_eq!(owned(0), [(0, 0..5, 3..8), (1, 0..3, 0..3)]);
    assert_eq!(owned(1), [(2, 0..4, 3..7), (3, 0..2, 0..2)]);
    assert_eq!(plan.resized(1).unwrap().units()[0].params()[1].range(), 0..3, "what learns stays known");
    // A model that does not train tells nothing apart.
    let predicts = Policy { mode: Mode::Frozen, ..policy };
    let plan = Plan::with_policy(plan.specs(), 2, &predicts).unwrap();
    assert_eq!(plan.units()[0].params()[1].range(), 5..8);
}

#[test]
fn units_below_the_threshold_are_every_ranks_own() {
    let units = [("small", 9), ("large", 10)];
    let units =
        units.map(|(name, elems)| UnitSpec::new(name, [ParamSpec::new(format!("{name}.w"), [elems])]));
    let policy = Policy { persistence_threshold: 10, ..Policy::default() };
    let plan = Plan::with_policy(units.to_vec(), 4, &policy).unwrap();
    let [small, large] = plan.units() else { panic!("two units") };
    assert!(small.is_whole() && !large.is_whole());
    for rank in 0..4 {
        assert_eq!(small.owned(0, rank).unwrap().param, 0..9);
        assert_eq!(large.shard(rank).len(), 3);
    }
    assert_eq!((small.shard_elems(), small.padded_elems()), (9, 9));
}
