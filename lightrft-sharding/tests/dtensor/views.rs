//! Views of units: every parameter, gradient and state as a tensor that lies where the unit's cut left it.

use std::sync::{Arc, Mutex};

use lightrft_collectives::{Call, Communicator, CommunicatorExt as _, ReduceOp, local::World};
use lightrft_sharding::{
    AdamW, AdamWConfig, DTensor, DTensorView, Error, Mode, Offload as _, ParamSpec, ParamViews, Placement,
    Plan, Policy, ShardSize, ShardedUnits, Stage, Trainable, UnitSpec,
};
use proptest::prelude::*;

use crate::support::{bits, box_elements, elements, mesh, on_mesh, ranges};

fn plan(shapes: &[Vec<usize>], world: usize) -> Arc<Plan> {
    let params: Vec<ParamSpec> = shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| ParamSpec::new(format!("p{i}.weight"), shape.clone()))
        .collect();
    let (a, b) = params.split_at(shapes.len() / 2);
    Arc::new(Plan::new(vec![UnitSpec::new("a", a), UnitSpec::new("b", b)], world).unwrap())
}

/// Whole values of a unit, told apart by `seed`.
fn unit_values(plan: &Plan, unit: usize, seed: usize) -> Vec<f32> {
    (0..plan.units()[unit].elems()).map(|i| ((i * 31 + seed * 17 + unit) % 101) as f32 / 8.0 - 6.0).collect()
}

fn trained(plan: &Arc<Plan>, comm: Arc<dyn Communicator>) -> Result<(ShardedUnits, AdamW), Error> {
    let rank = comm.rank();
    let mut units = ShardedUnits::new(Arc::clone(plan), comm, Mode::Train)?;
    for unit in 0..2 {
        units.load_unit(unit, &unit_values(plan, unit, 1))?;
    }
    let mut adamw = AdamW::new(AdamWConfig { max_norm: 0.0, ..AdamWConfig::default() }, &units)?;
    let give = |units: &mut ShardedUnits, seed: usize| -> Result<(), Error> {
        for unit in 0..2 {
            let grad = unit_values(plan, unit, seed);
            units.reduce_gradient(unit, if rank == 0 { grad } else { vec![0.0; grad.len()] })?;
        }
        Ok(())
    };
    give(&mut units, 2)?;
    adamw.step(&mut units, 0.01)?;
    give(&mut units, 3)?;
    Ok((units, adamw))
}

type Four<'a> = [DTensorView<'a, f32>; 4];

fn four<'a>(views: &ParamViews<'a>, adamw: &'a AdamW, name: &str) -> Result<Four<'a>, Error> {
    let grad = views.grad(name)?.unwrap();
    Ok([views.param(name)?, grad, views.exp_avg(adamw, name)?, views.exp_avg_sq(adamw, name)?])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_step_on_shards_seen_as_tensors_is_the_step_on_the_whole_in_any_layout(
        shapes in prop::collection::vec(crate::support::shapes(), 2..6), world in 1usize..=8,
    ) {
        // One rank steps the whole.
        let alone = plan(&shapes, 1);
        let whole = World::new(1).launch(|comm| {
            let (units, adamw) = trained(&alone, comm)?;
            let views = ParamViews::new(&units)?;
            let all = |name: &str| four(&views, &adamw, name).map(|four| four.map(|view| view.to_local().to_vec()));
            views.names().map(all).collect::<Result<Vec<_>, _>>()
        }).unwrap().swap_remove(0);
        prop_assert_eq!(whole.len(), shapes.len());

        let plan = plan(&shapes, world);
        World::new(world).launch(|comm| {
            let rank = comm.rank();
            let (units, adamw) = trained(&plan, comm)?;
            let views = ParamViews::new(&units)?;
            for ((name, shape), whole) in views.names().zip(&shapes).zip(&whole) {
                for (view, whole) in four(&views, &adamw, name)?.iter().zip(whole) {
                    let layout = view.spec().layout();
                    let pick = |layout: &lightrft_sharding::Layout| -> Vec<u32> {
                        elements(layout, shape, rank).into_iter().map(|at| whole[at].to_bits()).collect()
                    };
                    assert_eq!(view.spec().shape(), shape);
                    assert_eq!(bits(view.to_local()), pick(layout));
                    assert_eq!(bits(&view.full_tensor()?), bits(whole));
                    for dim in 0..shape.len() {
                        let sharded = layout.placed([Placement::Shard { dim }])?;
                        let tensor = view.redistribute(&sharded)?;
                        assert_eq!(bits(tensor.to_local()), pick(&sharded));
                        assert_eq!(bits(tensor.redistribute(layout)?.to_local()), bits(view.to_local()));
                    }
                    for (region, values) in view.parts()? {
                        let at = box_elements(&ranges(&region), shape);
                        assert_eq!(at.iter().map(|&at| whole[at].to_bits()).collect::<Vec<_>>(), bits(values));
                    }
                }
            }
            Ok::<_, Error>(())
        }).unwrap();
    }

    #[test]
    fn the_norm_over_first_replicas_is_that_of_the_whole_and_so_is_what_it_clips(
        sizes in crate::support::meshes(), shape in crate::support::shapes(), picks: crate::support::Picks,
    ) {
        let mesh = mesh(&sizes);
        let layout = crate::support::layout(&mesh, &shape, picks);
        // Eighths: squares and their sums are exact in f64.
        let elems: usize = shape.iter().product();
        let full: Vec<f32> = (0..elems).map(|i| ((i * 37) % 29) as f32 / 8.0 - 1.5).collect();
        let square = |values: &[f32]| values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
        on_mesh(&mesh, |rank, groups, _| {
            let mut tensor = DTensor::from_full(groups, &layout, &shape, &full)?;
            let mut sum = [if tensor.spec().is_first_replica(rank) { square(tensor.to_local()) } else { 0.0 }];
            groups.world().all_reduce(&mut sum, ReduceOp::Sum)?;
            assert_eq!(sum[0], square(&full));
            let factor = (1.0 / (sum[0].sqrt() as f32 + 1e-6)).min(1.0);
            tensor.local_mut().iter_mut().for_each(|value| *value *= factor);
            let clipped: Vec<f32> = full.iter().map(|value| value * factor).collect();
            assert_eq!(bits(&tensor.full_tensor()?), bits(&clipped));
            Ok(())
        });
    }
}

#[test]
fn views_borrow_the_shard_and_making_them_sends_nothing() {
    let plan = plan(&[vec![3, 2], vec![], vec![5]], 3);
    on_mesh(&mesh(&[3]), |rank, groups, log| {
        let (units, adamw) = trained(&plan, Arc::clone(groups.world()))?;
        log.take();
        let views = ParamViews::new(&units)?;
        for name in views.names() {
            let (unit, param) = plan.find(name).unwrap();
            let all = four(&views, &adamw, name)?;
            if let Some(owned) = plan.units()[unit].owned(param, rank) {
                let shard = &units.param(unit)?[owned.shard];
                assert!(std::ptr::eq(all[0].to_local(), shard), "not a copy");
            }
        }
        assert_eq!(log.take(), []);
        views.param("p0.weight")?.full_tensor()?;
        assert_eq!(log.take(), [Call::AllGather], "two elements on each rank");
        Ok(())
    });
}

#[test]
fn views_of_every_policy_are_the_whole_tensors() {
    let frozen = Trainable::ExceptPrefixes(vec!["p0".to_owned(), "p3".to_owned()]);
    let policies = [
        Policy { stage: Stage::Zero0, ..Policy::default() },
        Policy { stage: Stage::Zero1, trainable: frozen.clone(), ..Policy::default() },
        Policy { shard_size: ShardSize::Ranks(2), trainable: frozen, ..Policy::default() },
        // The first unit, of six elements, stays whole.
        Policy { persistence_threshold: 7, ..Policy::default() },
    ];
    let shapes = [vec![2, 3], vec![5, 2], vec![], vec![3, 3]];
    for policy in policies {
        let specs = [
            UnitSpec::new("a", [spec(0, &shapes[0])]),
            UnitSpec::new("b", [1, 2, 3].map(|i| spec(i, &shapes[i]))),
        ];
        World::new(4)
            .launch(|comm| {
                let mut units = ShardedUnits::with_policy(specs.to_vec(), comm, &policy)?;
                let value =
                    |name: &str, at: usize| at as f32 + name.len() as f32 + f32::from(name.as_bytes()[1]);
                units.load(|param, range, out| {
                    out.iter_mut().zip(range).for_each(|(out, at)| *out = value(param.name(), at));
                    Ok::<_, std::convert::Infallible>(())
                })?;
                let adamw = AdamW::new(AdamWConfig::default(), &units)?;
                let views = ParamViews::new(&units)?;
                for (name, shape) in views.names().zip(&shapes) {
                    let view = views.param(name)?;
                    let full: Vec<f32> = (0..shape.iter().product()).map(|at| value(name, at)).collect();
                    assert_eq!(view.full_tensor()?, full);
                    let sum: usize = view.parts()?.iter().map(|(region, _)| region.elems()).sum();
                    assert_eq!(sum, view.to_local().len());
                    let learns = policy.trainable.includes(name);
                    assert_eq!(views.exp_avg(&adamw, name).is_ok(), learns, "{name}");
                    if learns {
                        assert_eq!(views.exp_avg_sq(&adamw, name)?.full_tensor()?, vec![0.0; full.len()]);
                        assert!(views.grad(name)?.is_none());
                    } else {
                        assert!(matches!(views.grad(name), Err(Error::FrozenParameter { .. })));
                    }
                }
                Ok::<_, Error>(())
            })
            .unwrap();
    }
}

fn spec(index: usize, shape: &[usize]) -> ParamSpec {
    ParamSpec::new(format!("p{index}.weight"), shape)
}

#[test]
fn a_gradient_that_never_came_has_no_view_and_a_frozen_model_none_at_all() {
    let plan = plan(&[vec![2], vec![3]], 1);
    let frozen = Mutex::new(0);
    World::new(1)
        .launch(|comm| {
            let mut units = ShardedUnits::new(Arc::clone(&plan), Arc::clone(&comm), Mode::Train)?;
            assert!(ParamViews::new(&units)?.grad("p0.weight")?.is_none());
            units.offload()?;
            assert!(matches!(ParamViews::new(&units)?.param("p0.weight"), Err(Error::Offloaded { .. })));
            let units = ShardedUnits::new(Arc::clone(&plan), comm, Mode::Frozen)?;
            let views = ParamViews::new(&units)?;
            assert!(matches!(views.grad("p0.weight"), Err(Error::Frozen { .. })));
            assert!(matches!(views.param("p9"), Err(Error::NoSuchParam { name }) if name == "p9"));
            *frozen.lock().unwrap() += 1;
            Ok::<_, Error>(())
        })
        .unwrap();
    assert_eq!(frozen.into_inner().unwrap(), 1);
}
