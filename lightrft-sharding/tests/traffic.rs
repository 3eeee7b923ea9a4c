//! How many collectives a step issues: what the plan says, none in a group of one rank, and no more than FSDP2.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod counted;
mod probe;
#[path = "../examples/tiny/mod.rs"]
mod tiny;

use std::sync::Arc;

use counted::{Call, Counted};
use lightrft_collectives::{Communicator, Dtype, Single, local::World};
use lightrft_sharding::{
    AdamW, AdamWConfig, Error, Overlap, Policy, Precision, ReshardAfterForward, ShardSize, ShardedModel,
    Stage, Trainable,
};
use probe::Probe;
use serde_json::Value;
use tiny::{Batch, Tiny};

const MODEL: Tiny = Tiny { vocab: 5, width: 3, layers: 2 };

/// Calls of: making the model, a pass, another, a step, an evaluation.
fn calls(inner: Arc<dyn Communicator>, policy: Policy) -> Result<[Vec<&'static str>; 5], Error> {
    let counted = Counted::new(inner);
    let mut model = ShardedModel::new(MODEL, Arc::clone(&counted.comm), policy)?;
    model.units_mut().load(tiny::start)?;
    let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
    let made = counted.take_ops();
    // Which tokens there are must make no difference.
    let token = counted.comm.rank() % MODEL.vocab;
    let batch = Batch { tokens: vec![token; token + 1], targets: vec![1; token + 1] };
    let mut pass = || {
        let (logits, tape) = model.forward(&batch)?;
        model.backward(tape, MODEL.loss(&logits, &batch, 3).1)?;
        Ok::<_, Error>(counted.take_ops())
    };
    let passes = [pass()?, pass()?];
    adamw.step(model.units_mut(), 0.1)?;
    let step = counted.take_ops();
    model.evaluate(&batch)?;
    let [first, second] = passes;
    Ok([made, first, second, step, counted.take_ops()])
}

fn on(world: usize, policy: &Policy) -> Vec<[Vec<&'static str>; 5]> {
    World::new(world).launch(|comm| calls(comm, policy.clone())).unwrap()
}

const G: &str = "gather";
const R: &str = "reduce";
const A: &str = "all_reduce";

#[test]
fn a_pass_gathers_each_unit_for_each_use_and_reduces_it_once() {
    for prefetch in [0, 1, 2] {
        let policy = Policy { prefetch, ..Policy::default() };
        for [made, pass, _, step, evaluate] in on(2, &policy) {
            assert_eq!(made, ["other"], "the ranks compare plans in one message");
            // Stages: embedding; two layers; head with the embedding, which stay for backward. Backward: the head is
            // reduced first, the embedding, whose gradient has two parts, last.
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [[G; 8].as_slice(), &[R; 4]].concat());
            if prefetch == 0 {
                assert_eq!(pass, [[G; 5].as_slice(), &[R, G, R, G, R, G, R]].concat());
            }
            assert_eq!(step, [A], "the norm");
            assert_eq!(evaluate, [G; 5]);
        }
    }
}

#[test]
fn a_pass_that_keeps_its_units_gathers_each_once() {
    let never = Policy { reshard_after_forward: ReshardAfterForward::Never, ..Policy::default() };
    for [_, pass, ..] in on(2, &never) {
        assert_eq!(pass, [G, G, G, G, R, R, R, R]);
    }
}

#[test]
fn stage_0_reduces_once_a_step_in_as_many_calls_as_buckets() {
    // Units of 15, 12, 12 and 8 elements.
    for (reduce_bucket_elems, reductions) in [(500, 1), (30, 2), (1, 4)] {
        let policy = Policy { stage: Stage::Zero0, reduce_bucket_elems, ..Policy::default() };
        for [_, first, second, step, evaluate] in on(3, &policy) {
            assert!([first, second, evaluate].concat().is_empty());
            assert_eq!(step, vec![A; reductions], "no norm: every rank has all gradients");
        }
    }
}

#[test]
fn stage_1_gathers_once_a_step_and_reduces_in_buckets_at_it() {
    for (reduce_bucket_elems, reductions) in [(500, 1), (28, 2), (1, 4)] {
        let policy = Policy { stage: Stage::Zero1, reduce_bucket_elems, ..Policy::default() };
        for [_, first, second, step, evaluate] in on(2, &policy) {
            assert_eq!(first, [G; 4]);
            assert!(second.is_empty());
            assert_eq!(step, [vec![R; reductions], vec![A]].concat());
            assert_eq!(evaluate, [G; 4], "the parameters have changed");
        }
    }
}

#[test]
fn stage_2_gathers_once_a_step_and_reduces_in_buckets_in_each_pass() {
    for (reduce_bucket_elems, reductions) in [(500, 1), (28, 2), (1, 4)] {
        for overlap in [Overlap::Off, Overlap::On] {
            let policy = Policy { stage: Stage::Zero2, reduce_bucket_elems, overlap, ..Policy::default() };
            for [_, first, second, step, _] in on(2, &policy) {
                assert_eq!(first, [vec![G; 4], vec![R; reductions]].concat());
                assert_eq!(second, vec![R; reductions]);
                assert_eq!(step, [A]);
            }
        }
    }
}

#[test]
fn replicas_sum_their_shards_once_a_step() {
    let policy = Policy { shard_size: ShardSize::Ranks(2), prefetch: 0, ..Policy::default() };
    for [_, first, second, step, _] in on(4, &policy) {
        assert_eq!(first, second);
        assert_eq!(first.iter().filter(|op| **op == A).count(), 0);
        assert_eq!(step, [A, A], "all units' shards, and the norm");
    }
}

#[test]
fn a_pass_that_is_announced_as_the_last_does_what_the_step_would() {
    let two = ShardSize::Ranks(2);
    // Reductions, and sums over replicas, of the pass; units of 15, 12, 12 and 8 elements.
    for (policy, alone, beside) in [
        (Policy { shard_size: two, ..Policy::default() }, [4, 1], [4, 4]),
        (Policy { stage: Stage::Zero2, shard_size: two, ..Policy::default() }, [1, 1], [1, 1]),
        (
            Policy { stage: Stage::Zero2, reduce_bucket_elems: 28, shard_size: two, ..Policy::default() },
            [2, 1],
            [2, 2],
        ),
        (Policy { stage: Stage::Zero1, reduce_bucket_elems: 28, ..Policy::default() }, [2, 0], [2, 0]),
        (Policy { stage: Stage::Zero0, reduce_bucket_elems: 30, ..Policy::default() }, [0, 2], [0, 2]),
        // The embedding alone is cut; what is whole is summed in one bucket, over all ranks.
        (Policy { persistence_threshold: 13, shard_size: two, ..Policy::default() }, [1, 2], [1, 2]),
    ] {
        for (overlap, expected) in [(Overlap::Off, alone), (Overlap::On, beside)] {
            let policy = Policy { overlap, ..policy.clone() };
            let ranks = World::new(4).launch(|comm| {
                let counted = Counted::new(comm);
                let mut model = ShardedModel::new(MODEL, Arc::clone(&counted.comm), policy.clone())?;
                model.units_mut().load(tiny::start)?;
                let batch = Batch { tokens: vec![1], targets: vec![2] };
                let mut count = |last: bool| {
                    counted.take();
                    let (logits, tape) = model.forward(&batch)?;
                    let grad = MODEL.loss(&logits, &batch, 4).1;
                    if last {
                        model.backward_last(tape, grad)?
                    } else {
                        model.backward(tape, grad)?
                    }
                    let ops = counted.take_ops();
                    Ok::<_, Error>([R, A].map(|wanted| ops.iter().filter(|op| **op == wanted).count()))
                };
                let counts = [count(false)?, count(true)?];
                model.units_mut().sync_gradients()?;
                assert_eq!(counted.take(), [], "nothing is left for the step: {policy:?}");
                Ok::<_, Error>(counts)
            });
            for [first, last] in ranks.unwrap() {
                let each_pass = if policy.stage >= Stage::Zero2 { expected[0] } else { 0 };
                assert_eq!(first, [each_pass, 0], "{policy:?}");
                assert_eq!(last, expected, "{policy:?}");
            }
        }
    }
}

#[test]
fn small_units_are_whole_and_ask_for_nothing_before_the_step() {
    // All units are below the threshold but the embedding, of 15 elements.
    let policy = Policy { persistence_threshold: 13, ..Policy::default() };
    for [_, pass, _, step, _] in on(2, &policy) {
        assert_eq!(
            pass,
            [G, G, G, R],
            "for each of the embedding's two uses, the second of which lasts into backward"
        );
        assert_eq!(step, [A, A], "the three small ones in one bucket, and the norm");
    }
}

#[test]
fn one_rank_asks_nothing_of_its_group() {
    let stages = [Stage::Zero0, Stage::Zero1, Stage::Zero2, Stage::Zero3];
    for stage in stages {
        for reshard_after_forward in [ReshardAfterForward::Always, ReshardAfterForward::Never] {
            let policy = Policy { stage, reshard_after_forward, ..Policy::default() };
            assert_eq!(calls(Single::world(), policy).unwrap().concat(), Vec::<&str>::new());
        }
    }
}

/// Calls of one pass over a probe, and those of the exchange at the step, on rank 0.
fn probed(world: usize, probe: impl Fn() -> Probe + Sync, policy: &Policy) -> (Vec<Call>, Vec<Call>) {
    let ranks = World::new(world).launch(|comm| {
        let counted = Counted::new(comm);
        let rank = counted.comm.rank();
        let mut model = ShardedModel::new(probe(), Arc::clone(&counted.comm), policy.clone())?;
        model.units_mut().load(probe::start)?;
        counted.take();
        let batch = probe::Batch { round: 0, rank, pass: 0 };
        let (output, tape) = model.forward(&batch)?;
        model.backward(tape, output)?;
        let pass = counted.take();
        model.units_mut().sync_gradients()?;
        Ok::<_, Error>((pass, counted.take()))
    });
    ranks.unwrap().swap_remove(0)
}

#[test]
fn calls_carry_the_precision_of_the_policy() {
    let policy = Policy {
        param_dtype: Precision::Bf16,
        reduce_dtype: Precision::F16,
        shard_size: ShardSize::Ranks(2),
        ..Policy::default()
    };
    let (pass, step) = probed(4, || Probe::new(&[vec![vec![8]], vec![vec![4]]]), &policy);
    let dtypes = |op| pass.iter().filter(move |call: &&Call| call.op == op).map(|call| call.dtype);
    assert!(dtypes(G).all(|dtype| dtype == Dtype::BF16) && dtypes(G).count() > 2);
    assert!(dtypes(R).all(|dtype| dtype == Dtype::F16) && dtypes(R).count() == 2);
    assert!(!step.is_empty());
    assert!(step.iter().all(|call| call.op == A && call.dtype == Dtype::F16 && call.ranks == 2));
}

#[test]
fn what_is_frozen_is_gathered_and_never_reduced() {
    let trainable = Trainable::OnlyContaining(vec!["u0.p1".to_owned()]);
    let policy = Policy { trainable, ..Policy::default() };
    // A large matrix and an adapter in the first unit; the second has nothing that learns.
    let (pass, _) = probed(2, || Probe::new(&[vec![vec![10, 10], vec![3, 2]], vec![vec![5, 4]]]), &policy);
    let elems = |op| pass.iter().filter(|call| call.op == op).map(|call| call.elems).collect::<Vec<_>>();
    assert_eq!(elems(R), [6]);
    // A gather of the mixed unit is one of each segment: for its first stage, for the last, which backward begins with,
    // and for the first again.
    let mut gathers = elems(G);
    gathers.sort_unstable();
    assert_eq!(gathers, [3, 3, 3, 10, 50, 50, 50]);
}

#[test]
fn neighbours_gather_among_themselves_until_the_parameters_change() {
    let near = Policy { reshard_after_forward: ReshardAfterForward::ToGroup(2), ..Policy::default() };
    let ranks = World::new(4).launch(|comm| {
        let counted = Counted::new(comm);
        let rank = counted.comm.rank();
        let mut model = ShardedModel::new(
            Probe::new(&[vec![vec![8]], vec![vec![4]]]),
            Arc::clone(&counted.comm),
            near.clone(),
        )?;
        model.units_mut().load(probe::start)?;
        let sizes = |model: &mut ShardedModel<Probe>| {
            counted.take();
            let batch = probe::Batch { round: 0, rank, pass: 0 };
            let (output, tape) = model.forward(&batch)?;
            model.backward(tape, output)?;
            let calls = counted.take();
            Ok::<_, Error>(
                calls.iter().filter(|call| call.op == G).map(|call| call.ranks).collect::<Vec<_>>(),
            )
        };
        Ok::<_, Error>([sizes(&mut model)?, sizes(&mut model)?])
    });
    for [first, second] in ranks.unwrap() {
        assert_eq!(first, [4, 4, 2, 2], "each unit once over all, what follows over two");
        assert!(!second.is_empty() && second.iter().all(|ranks| *ranks == 2));
    }
}

#[test]
fn a_neighbourhood_larger_than_the_shard_group_is_all_of_it() {
    let probe = || Probe::new(&[vec![vec![8]], vec![vec![4]]]);
    for (world, shard_size) in [(2, ShardSize::World), (4, ShardSize::Ranks(2))] {
        let of = |ranks| {
            let reshard_after_forward = ReshardAfterForward::ToGroup(ranks);
            probed(
                world,
                probe,
                &Policy { reshard_after_forward, shard_size, prefetch: 0, ..Policy::default() },
            )
        };
        let always = probed(world, probe, &Policy { shard_size, prefetch: 0, ..Policy::default() });
        assert_eq!(of(8), always);
        assert_eq!(of(3), always);
        assert_ne!(of(1), always);
    }
}

/// FSDP2's own runs: `tests/data/fsdp2_trace.json` says of which program.
#[test]
fn no_more_is_sent_than_fsdp2_sends_for_the_same_groups_of_the_same_model() {
    let trace: Value = serde_json::from_str(include_str!("data/fsdp2_trace.json")).unwrap();
    let layer = vec![vec![7, 5], vec![7], vec![5, 7]];
    let shapes =
        [vec![vec![11, 5]], layer.clone(), layer.clone(), layer, vec![vec![5], vec![5]], vec![vec![11, 5]]];
    let mut runs = 0;
    for run in trace["runs"].as_array().unwrap() {
        let number = |value: &Value| value.as_u64().unwrap() as usize;
        let mesh: Vec<usize> = run["mesh"].as_array().unwrap().iter().map(number).collect();
        let reshard_after_forward = match &run["reshard_after_forward"] {
            Value::Bool(false) => ReshardAfterForward::Never,
            Value::Number(ranks) => ReshardAfterForward::ToGroup(ranks.as_u64().unwrap() as usize),
            _ => ReshardAfterForward::Always,
        };
        let bf16 = run["mp"] == "bf16";
        let policy = Policy {
            shard_size: ShardSize::Ranks(*mesh.last().unwrap()),
            reshard_after_forward,
            param_dtype: if bf16 { Precision::Bf16 } else { Precision::F32 },
            ..Policy::default()
        };
        // The norm belongs to the root, which computes with the head's input.
        let probe = || Probe::with_stages(&shapes, vec![vec![0], vec![1], vec![2], vec![3], vec![4, 5]]);
        let (pass, step) = probed(number(&run["world"]), probe, &policy);
        let ours: Vec<Call> = [pass, step].concat();
        assert!(ours.iter().all(|call| call.ranks > 1));
        for (op, name) in [(G, "all_gather"), (R, "reduce_scatter"), (A, "all_reduce")] {
            let ours: Vec<&Call> = ours.iter().filter(|call| call.op == op).collect();
            let theirs = run["log"].as_array().unwrap().iter().filter(|call| {
                // Of several accumulating passes, one; and an all-reduce over one rank sends nothing.
                call[0].as_str().unwrap().ends_with('0') && call[1] == name && call[4] != 1
            });
            let theirs: Vec<usize> = theirs.map(|call| number(&call[2])).collect();
            let id = format!("{mesh:?} {name}: {ours:?} {theirs:?}");
            assert!(ours.len() <= theirs.len(), "{id}");
            assert!(ours.iter().map(|call| call.elems).sum::<usize>() <= theirs.iter().sum(), "{id}");
            assert!(!bf16 || op != G || ours.iter().all(|call| call.dtype == Dtype::BF16));
        }
        runs += 1;
    }
    assert_eq!(runs, 8);
}
