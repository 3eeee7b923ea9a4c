//! Gathers run ahead of computing, reduce-scatters beside it. Events prove it; an ignored test measures how much is hidden:
//! `cargo test -p lightrft-sharding --release --test overlap -- --ignored --nocapture`
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod stages;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lightrft_collectives::testing::Intercepted;
use lightrft_collectives::{
    Communicator, Dtype, Elements as _, Error as GroupError, Operation, local::World,
};
use lightrft_sharding::{Error, Overlap, Policy, ShardSize, ShardedModel, Stage};
use stages::Stages;

/// Far more than any machine needs; reached only where what is waited for never happens.
const DEADLINE: Duration = Duration::from_secs(20);

/// Numbers that rise, and can be waited for.
#[derive(Debug, Default)]
struct Events {
    counts: Mutex<[usize; 3]>,
    changed: Condvar,
}

const GATHERED: usize = 0;
const BACKWARD: usize = 1;
const ENDED: usize = 2;

impl Events {
    fn add(&self, what: usize) {
        self.counts.lock().unwrap()[what] += 1;
        self.changed.notify_all();
    }

    /// Whether `what` has come to `count` before the deadline.
    fn reaches(&self, what: usize, count: usize) -> bool {
        let counts = self.counts.lock().unwrap();
        let waited = self.changed.wait_timeout_while(counts, DEADLINE, |counts| counts[what] < count);
        !waited.unwrap().1.timed_out()
    }

    fn count(&self, what: usize) -> usize {
        self.counts.lock().unwrap()[what]
    }
}

type Hook = Arc<dyn Fn(&'static str) + Send + Sync>;

/// A group that calls a hook before and after its gathers, reduce-scatters and all-reduces.
fn hooked(comm: Arc<dyn Communicator>, hook: Hook) -> Arc<dyn Communicator> {
    Arc::new(Intercepted::new(comm, move |comm, operation, timeout| {
        let [before, after] = match &operation {
            // The comparison of plans is of bytes.
            Operation::AllGather { input, .. } if input.dtype() != Dtype::U8 => ["gather", "gathered"],
            Operation::AllGatherInPlace { .. } => ["gather", "gathered"],
            Operation::ReduceScatterInPlace { .. } | Operation::ReduceScatter { .. } => ["reduce", "reduced"],
            Operation::AllReduce { .. } => ["sum", "summed"],
            _ => return comm.run_within(operation, timeout),
        };
        hook(before);
        comm.run_within(operation, timeout)?;
        hook(after);
        Ok(())
    }))
}

const STAGES: usize = 5;

#[test]
fn the_next_units_gather_ends_while_a_unit_computes_forward_and_backward() {
    for prefetch in [1, 2] {
        let policy = Policy { prefetch, ..Policy::default() };
        let ranks = World::new(2).timeout(4 * DEADLINE).launch(|comm| {
            let events = Arc::new(Events::default());
            let counted = Arc::clone(&events);
            let hook: Hook = Arc::new(move |what| {
                if what == "gathered" {
                    counted.add(GATHERED)
                }
            });
            let compute = |pass: &'static str, stage: usize| {
                // Gathers of all stages so far, and of as many more as are ahead, before this stage is done.
                let done = match pass {
                    "forward" => (stage + 1 + prefetch).min(STAGES),
                    // The last stage's unit stays for backward.
                    _ => (STAGES + (STAGES - 1 - stage) + prefetch).min(2 * STAGES - 1),
                };
                assert!(events.reaches(GATHERED, done), "{pass} of stage {stage}");
            };
            let model = Stages { count: STAGES, elems: 64, compute };
            let mut model = ShardedModel::new(model, hooked(comm, hook), policy.clone())?;
            let ((), tape) = model.forward(&())?;
            model.backward(tape, ())?;
            Ok::<_, Error>(events.count(GATHERED))
        });
        assert_eq!(ranks.unwrap(), [2 * STAGES - 1; 2]);
    }
}

/// What is said of a backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pass {
    Any,
    Last,
}

/// Runs a pass on four ranks whose calls `held` wait until as many more backwards than such calls have begun, and returns
/// how many ended in the pass and at the sum of gradients after it.
fn held_back(policy: &Policy, pass: Pass, held: [&'static str; 2], behind: usize) -> Vec<[usize; 2]> {
    let ranks = World::new(4).timeout(4 * DEADLINE).launch(|comm| {
        let events = Arc::new(Events::default());
        let counted = Arc::clone(&events);
        let hook: Hook = Arc::new(move |what| {
            if what == held[0] {
                let next = (counted.count(ENDED) + behind).min(STAGES);
                assert!(counted.reaches(BACKWARD, next), "{what} is waited for");
            } else if what == held[1] {
                counted.add(ENDED);
            }
        });
        let compute = |pass: &'static str, _| {
            if pass == "backward" {
                events.add(BACKWARD);
            }
        };
        let model = Stages { count: STAGES, elems: 64, compute };
        let mut model = ShardedModel::new(model, hooked(comm, hook), policy.clone())?;
        let ((), tape) = model.forward(&())?;
        match pass {
            Pass::Any => model.backward(tape, ())?,
            Pass::Last => model.backward_last(tape, ())?,
        }
        let in_pass = events.count(ENDED);
        model.units_mut().sync_gradients()?;
        for unit in 0..STAGES {
            assert!(model.units().grad(unit)?.unwrap().iter().all(|sum| *sum == 4.0));
        }
        Ok::<_, Error>([in_pass, events.count(ENDED)])
    });
    ranks.unwrap()
}

#[test]
fn a_reduce_scatter_runs_while_the_next_unit_computes_its_gradient() {
    let policy = Policy { overlap: Overlap::On, prefetch: 0, ..Policy::default() };
    assert_eq!(held_back(&policy, Pass::Any, ["reduce", "reduced"], 2), [[STAGES; 2]; 4]);
}

#[test]
fn in_the_last_pass_replicas_sum_a_unit_while_the_second_after_it_computes_its_gradient() {
    let hsdp = Policy { shard_size: ShardSize::Ranks(2), overlap: Overlap::On, ..Policy::default() };
    for prefetch in [0, 1] {
        let policy = Policy { prefetch, ..hsdp.clone() };
        assert_eq!(held_back(&policy, Pass::Last, ["sum", "summed"], 3), [[STAGES; 2]; 4]);
    }
    // In a pass that is like any, after it.
    assert_eq!(held_back(&hsdp, Pass::Any, ["sum", "summed"], 3), [[0, 1]; 4]);
    let stage_2 = Policy { stage: Stage::Zero2, reduce_bucket_elems: 1, ..hsdp };
    assert_eq!(held_back(&stage_2, Pass::Last, ["sum", "summed"], 3), [[STAGES; 2]; 4]);
}

#[test]
fn in_the_last_pass_stages_0_and_1_exchange_a_bucket_while_the_next_unit_computes_its_gradient() {
    let buckets = Policy { overlap: Overlap::On, reduce_bucket_elems: 1, ..Policy::default() };
    let policy = Policy { stage: Stage::Zero0, ..buckets.clone() };
    assert_eq!(held_back(&policy, Pass::Last, ["sum", "summed"], 2), [[STAGES; 2]; 4]);
    let policy = Policy { stage: Stage::Zero1, ..buckets };
    assert_eq!(held_back(&policy, Pass::Last, ["reduce", "reduced"], 2), [[STAGES; 2]; 4]);
    // With replicas, whose sums continue what the shard groups sum.
    let policy = Policy { shard_size: ShardSize::Ranks(2), ..policy };
    assert_eq!(held_back(&policy, Pass::Last, ["reduce", "reduced"], 2), [[STAGES; 2]; 4]);
    assert_eq!(held_back(&policy, Pass::Last, ["sum", "summed"], 3), [[STAGES; 2]; 4]);
}

#[test]
fn a_last_pass_that_fails_leaves_gradients_that_can_be_zeroed_and_summed_anew() {
    let policy = Policy { shard_size: ShardSize::Ranks(2), overlap: Overlap::On, ..Policy::default() };
    // A reduce-scatter that fails while a sum over replicas is on its way, and such a sum itself; on all ranks alike.
    for failing in ["reduce", "sum"] {
        let ranks = World::new(4).timeout(4 * DEADLINE).launch(|comm| {
            let asked = Arc::new(AtomicUsize::new(0));
            let group = Intercepted::new(comm, move |comm, operation, timeout| {
                let is_failing = match &operation {
                    Operation::ReduceScatterInPlace { .. } => failing == "reduce",
                    Operation::AllReduce { .. } => failing == "sum",
                    _ => false,
                };
                if is_failing && asked.fetch_add(1, Ordering::Relaxed) == 2 {
                    return Err(GroupError::Panicked { rank: comm.rank(), message: "the test's".to_owned() });
                }
                comm.run_within(operation, timeout)
            });
            let model = Stages { count: STAGES, elems: 64, compute: |_, _| {} };
            let mut model = ShardedModel::new(model, Arc::new(group), policy.clone())?;
            let ((), tape) = model.forward(&())?;
            let failed = model.backward_last(tape, ()).unwrap_err();
            assert!(matches!(failed, Error::Collective { .. }), "{failed}");
            let ((), tape) = model.forward(&())?;
            let refused = model.backward_last(tape, ()).unwrap_err();
            assert!(matches!(refused, Error::IncompleteBackward), "{refused}");
            model.units_mut().zero_gradients();
            let ((), tape) = model.forward(&())?;
            model.backward_last(tape, ())?;
            for unit in 0..STAGES {
                assert_eq!(model.units().grad(unit)?.unwrap(), [4.0; 32], "{failing}");
            }
            Ok::<_, Error>(())
        });
        ranks.unwrap();
    }
}

/// Seconds of a forward pass, its backward and the sum of gradients on the slowest of `ranks`, where each collective takes
/// `comm` and a stage `compute`. The norm is not in it.
fn pass_seconds(ranks: usize, policy: &Policy, comm: Duration, compute: Duration) -> f64 {
    let ranks = World::new(ranks).launch(|group| {
        let hook: Hook = Arc::new(move |what| {
            if matches!(what, "gather" | "reduce" | "sum") {
                std::thread::sleep(comm);
            }
        });
        let model = Stages { count: 12, elems: 64, compute: |_, _| std::thread::sleep(compute) };
        let mut model = ShardedModel::new(model, hooked(group, hook), policy.clone())?;
        let start = Instant::now();
        let ((), tape) = model.forward(&())?;
        model.backward_last(tape, ())?;
        Ok::<_, Error>(start.elapsed().as_secs_f64())
    });
    ranks.unwrap().into_iter().fold(0.0, f64::max)
}

#[test]
#[ignore = "measures time"]
fn at_least_80_percent_of_what_is_sent_is_hidden_where_computing_takes_longer() {
    let (comm, compute) = (Duration::from_millis(20), Duration::from_millis(30));
    let (units, passes) = (12.0, 2.0);
    let computing = units * passes * compute.as_secs_f64();
    // One call for each unit also where nothing is overlapped.
    let flat = Policy { reduce_bucket_elems: 1, ..Policy::default() };
    let hsdp = Policy { shard_size: ShardSize::Ranks(2), ..flat.clone() };
    let stage_0 = Policy { stage: Stage::Zero0, ..flat.clone() };
    let on = |policy: &Policy| Policy { overlap: Overlap::On, ..policy.clone() };
    for (name, ranks, policy, sent) in [
        ("gathers, one ahead", 2, flat.clone(), 23.0),
        ("and reduce-scatters", 2, on(&flat), 23.0 + 12.0),
        ("HSDP: and all-reduces over replicas", 4, on(&hsdp), 23.0 + 12.0 + 12.0),
        ("stage 0: all-reduces", 2, on(&stage_0), 12.0),
    ] {
        let off = Policy { prefetch: 0, overlap: Overlap::Off, ..policy.clone() };
        let waiting = pass_seconds(ranks, &off, comm, compute);
        let seconds = pass_seconds(ranks, &policy, comm, compute);
        let hidden = (waiting - seconds) / (sent * comm.as_secs_f64());
        println!(
            "{name}: computing {computing:.3} s, with communication {waiting:.3} s, overlapped {seconds:.3} s: {:.1}% hidden",
            100.0 * hidden
        );
        assert!(hidden >= 0.8, "{name}: {hidden}");
    }
}
