//! Gathers run ahead of computing, reduce-scatters beside it. Events prove it; an ignored test measures how much is hidden:
//! `cargo test -p lightrft-sharding --release --test overlap -- --ignored --nocapture`
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use lightrft_collectives::{
    Communicator, Dtype, Elements as _, GroupOptions, Operation, Result as GroupResult, local::World,
};
use lightrft_sharding::{
    Error, FlatUnit, Overlap, ParamSpec, Policy, ShardedModel, StageGrads, StageSpec, StagedModel, UnitSpec,
    UnitValues,
};

/// Far more than any machine needs; reached only where what is waited for never happens.
const DEADLINE: Duration = Duration::from_secs(20);

/// Numbers that rise, and can be waited for.
#[derive(Debug, Default)]
struct Events {
    counts: Mutex<[usize; 3]>,
    changed: Condvar,
}

const GATHERED: usize = 0;
const REDUCED: usize = 1;
const BACKWARD: usize = 2;

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

/// A group that calls a hook before and after its gathers and reduce-scatters.
struct Hooked {
    inner: Arc<dyn Communicator>,
    hook: Hook,
}

impl fmt::Debug for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Communicator for Hooked {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn ranks(&self) -> &[usize] {
        self.inner.ranks()
    }

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> GroupResult<()> {
        let [before, after] = match &operation {
            // The comparison of plans is of bytes.
            Operation::AllGather { input, .. } if input.dtype() != Dtype::U8 => ["gather", "gathered"],
            Operation::AllGatherInPlace { .. } => ["gather", "gathered"],
            Operation::ReduceScatterInPlace { .. } | Operation::ReduceScatter { .. } => ["reduce", "reduced"],
            _ => return self.inner.run_within(operation, timeout),
        };
        (self.hook)(before);
        self.inner.run_within(operation, timeout)?;
        (self.hook)(after);
        Ok(())
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> GroupResult<Option<Arc<dyn Communicator>>> {
        let group = self.inner.subgroup_with(ranks, options)?;
        let hooked = |inner| Arc::new(Self { inner, hook: Arc::clone(&self.hook) }) as Arc<dyn Communicator>;
        Ok(group.map(hooked))
    }
}

/// Stages of one unit each, whose computing is a hook.
struct Stages<F: Fn(&'static str, usize)> {
    count: usize,
    compute: F,
}

impl<F: Fn(&'static str, usize)> StagedModel for Stages<F> {
    type Batch = ();
    type Activation = ();
    type Params = UnitValues;
    type Saved = ();
    type Error = Error;

    fn units(&self) -> Vec<UnitSpec> {
        let unit = |i| UnitSpec::new(format!("u{i}"), [ParamSpec::new(format!("w{i}"), [64])]);
        (0..self.count).map(unit).collect()
    }

    fn stages(&self) -> Vec<StageSpec> {
        (0..self.count).map(|i| StageSpec::new(format!("s{i}"), [i])).collect()
    }

    fn bind(&self, _: &FlatUnit, values: UnitValues) -> Result<UnitValues, Error> {
        Ok(values)
    }

    fn unbind(&self, params: UnitValues) -> Option<UnitValues> {
        Some(params)
    }

    fn forward(&self, stage: usize, _: &[&UnitValues], (): &(), _: Option<&()>) -> Result<(), Error> {
        (self.compute)("forward", stage);
        Ok(())
    }

    fn backward(
        &self,
        stage: usize,
        _: &[&UnitValues],
        (): &(),
        _: Option<&()>,
        (): (),
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<()>, Error> {
        (self.compute)("backward", stage);
        grads.slice_mut(0, 0)?.fill(1.0);
        Ok(Some(()))
    }
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
            let model = Stages { count: STAGES, compute };
            let mut model = ShardedModel::new(model, Arc::new(Hooked { inner: comm, hook }), policy.clone())?;
            let ((), tape) = model.forward(&())?;
            model.backward(tape, ())?;
            Ok::<_, Error>(events.count(GATHERED))
        });
        assert_eq!(ranks.unwrap(), [2 * STAGES - 1; 2]);
    }
}

#[test]
fn a_reduce_scatter_runs_while_the_next_unit_computes_its_gradient() {
    let policy = Policy { overlap: Overlap::On, prefetch: 0, ..Policy::default() };
    let ranks = World::new(2).timeout(4 * DEADLINE).launch(|comm| {
        let events = Arc::new(Events::default());
        let counted = Arc::clone(&events);
        let hook: Hook = Arc::new(move |what| match what {
            // Held back until the next backward has begun; the last has none after it.
            "reduce" => {
                let next = (counted.count(REDUCED) + 2).min(STAGES);
                assert!(counted.reaches(BACKWARD, next), "the reduce-scatter is waited for");
            }
            "reduced" => counted.add(REDUCED),
            _ => {}
        });
        let compute = |pass: &'static str, _| {
            if pass == "backward" {
                events.add(BACKWARD);
            }
        };
        let model = Stages { count: STAGES, compute };
        let mut model = ShardedModel::new(model, Arc::new(Hooked { inner: comm, hook }), policy.clone())?;
        let ((), tape) = model.forward(&())?;
        model.backward(tape, ())?;
        for unit in 0..STAGES {
            assert_eq!(model.units().grad(unit)?.unwrap(), [2.0; 32]);
        }
        Ok::<_, Error>(events.count(REDUCED))
    });
    assert_eq!(ranks.unwrap(), [STAGES; 2]);
}

/// Seconds of one pass where a gather and a reduce-scatter each take `comm` and a stage `compute`, on the slower rank.
fn pass_seconds(policy: &Policy, comm: Duration, compute: Duration) -> f64 {
    let ranks = World::new(2).launch(|group| {
        let hook: Hook = Arc::new(move |what| {
            if matches!(what, "gather" | "reduce") {
                std::thread::sleep(comm);
            }
        });
        let model = Stages { count: 12, compute: |_, _| std::thread::sleep(compute) };
        let mut model = ShardedModel::new(model, Arc::new(Hooked { inner: group, hook }), policy.clone())?;
        let start = Instant::now();
        let ((), tape) = model.forward(&())?;
        model.backward(tape, ())?;
        Ok::<_, Error>(start.elapsed().as_secs_f64())
    });
    ranks.unwrap().into_iter().fold(0.0, f64::max)
}

#[test]
#[ignore = "measures time"]
fn at_least_80_percent_of_gathers_are_hidden_where_computing_takes_longer() {
    let (comm, compute) = (Duration::from_millis(20), Duration::from_millis(30));
    let waiting = pass_seconds(&Policy { prefetch: 0, ..Policy::default() }, comm, compute);
    let (units, passes) = (12.0, 2.0);
    let computing = units * passes * compute.as_secs_f64();
    for (name, policy, sent) in [
        ("gathers, one ahead", Policy::default(), 23.0),
        ("and reduce-scatters", Policy { overlap: Overlap::On, ..Policy::default() }, 23.0 + 12.0),
    ] {
        let seconds = pass_seconds(&policy, comm, compute);
        let hidden = (waiting - seconds) / (sent * comm.as_secs_f64());
        println!(
            "{name}: computing {computing:.3} s, with communication {waiting:.3} s, overlapped {seconds:.3} s: {:.1}% hidden",
            100.0 * hidden
        );
        assert!(hidden >= 0.8, "{name}: {hidden}");
    }
}
