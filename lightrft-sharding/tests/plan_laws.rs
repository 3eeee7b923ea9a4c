//! Laws of the plan: pure functions of names, shapes and the number of ranks.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lightrft_sharding::{Error, ParamSpec, Plan, UnitSpec};
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

#[test]
fn a_model_of_seven_billion_parameters_is_planned_for_512_ranks() {
    let layer = |i: usize| {
        let sizes = [
            [3584, 3584],
            [3584, 512],
            [3584, 512],
            [3584, 3584],
            [3584, 18944],
            [3584, 18944],
            [18944, 3584],
        ];
        let mut params: Vec<ParamSpec> = sizes
            .iter()
            .enumerate()
            .map(|(p, &shape)| ParamSpec::new(format!("l{i}.{p}.weight"), shape))
            .collect();
        params.extend((0..5).map(|p| ParamSpec::new(format!("l{i}.{p}.bias"), [3584])));
        UnitSpec::new(format!("l{i}"), params)
    };
    let plan = Plan::new((0..28).map(layer).collect(), 512).unwrap();
    // FSDP2 pads 9.7% of a model of 0.5 billion on as many ranks.
    assert!(plan.elems() > 6_000_000_000 && plan.padding_elems() < 28 * 512);
}
