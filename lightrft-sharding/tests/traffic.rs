//! How many collectives a step issues: what the plan says, and none in a group of one rank.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/tiny/mod.rs"]
mod tiny;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lightrft_collectives::{
    Communicator, GroupOptions, Operation, Result as GroupResult, Single, local::World,
};
use lightrft_sharding::{AdamW, AdamWConfig, Error, Policy, ReshardAfterForward, ShardedModel};
use tiny::{Batch, Tiny};

/// A group that writes down what is asked of it.
#[derive(Debug)]
struct Counted {
    inner: Arc<dyn Communicator>,
    /// Shared with the groups that are made of it.
    calls: Arc<Mutex<Vec<&'static str>>>,
}

impl Counted {
    fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Communicator for Counted {
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
        self.calls.lock().unwrap().push(match operation {
            Operation::AllGatherInPlace { .. } => "gather",
            Operation::ReduceScatter { .. } => "reduce",
            Operation::AllReduce { .. } => "norm",
            _ => "other",
        });
        self.inner.run_within(operation, timeout)
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> GroupResult<Option<Arc<dyn Communicator>>> {
        let group = self.inner.subgroup_with(ranks, options)?;
        Ok(group.map(|inner| {
            Arc::new(Counted { inner, calls: Arc::clone(&self.calls) }) as Arc<dyn Communicator>
        }))
    }
}

const MODEL: Tiny = Tiny { vocab: 5, width: 3, layers: 2 };

/// Calls of: making the model, one pass, a step, an evaluation.
fn calls(
    inner: Arc<dyn Communicator>,
    reshard_after_forward: ReshardAfterForward,
) -> Result<[Vec<&'static str>; 4], Error> {
    let counted = Arc::new(Counted { inner, calls: Arc::default() });
    let options = Policy { reshard_after_forward, ..Policy::default() };
    let mut model = ShardedModel::new(MODEL, counted.clone(), options)?;
    model.units_mut().load(tiny::start)?;
    let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
    let made = counted.take();
    // Which tokens there are must make no difference.
    let token = counted.rank();
    let batch = Batch { tokens: vec![token; token + 1], targets: vec![1; token + 1] };
    let (logits, tape) = model.forward(&batch)?;
    model.backward(tape, MODEL.loss(&logits, &batch, 3).1)?;
    let pass = counted.take();
    adamw.step(model.units_mut(), 0.1)?;
    let step = counted.take();
    model.evaluate(&batch)?;
    Ok([made, pass, step, counted.take()])
}

#[test]
fn a_pass_gathers_each_unit_for_each_use_and_reduces_it_once() {
    let (g, r) = ("gather", "reduce");
    for [made, pass, step, evaluate] in
        World::new(2).launch(|comm| calls(comm, ReshardAfterForward::Always)).unwrap()
    {
        assert_eq!(made, ["other"], "the ranks compare plans in one message");
        // Stages: embedding; two layers; head with the embedding. Backward: the head is reduced first, the embedding,
        // whose gradient has two parts, last.
        assert_eq!(pass, [[g, g, g, g, g].as_slice(), &[g, g, r, g, r, g, r, g, r]].concat());
        assert_eq!(step, ["norm"]);
        assert_eq!(evaluate, [g; 5]);
    }
}

#[test]
fn a_pass_that_keeps_its_units_gathers_each_once() {
    for [_, pass, ..] in World::new(2).launch(|comm| calls(comm, ReshardAfterForward::Never)).unwrap() {
        assert_eq!(pass, ["gather", "gather", "gather", "gather", "reduce", "reduce", "reduce", "reduce"]);
    }
}

#[test]
fn one_rank_asks_nothing_of_its_group() {
    for reshard in [ReshardAfterForward::Always, ReshardAfterForward::Never] {
        assert_eq!(calls(Single::world(), reshard).unwrap().concat(), Vec::<&str>::new());
    }
}
