//! Train on eight ranks, save the parts that each holds, go on with four: the loss continues as if nothing had happened.
//! `cargo run -p lightrft-sharding --example 3_resume_on_other_ranks`
//!
//! Parts are named ranges of flattened tensors, so that no reader needs to know how many ranks wrote them. Here they meet
//! in a map; `lightrft-ckpt` puts them into files.

mod tiny;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use lightrft_collectives::{Communicator, CommunicatorExt as _, ReduceOp, local::World};
use lightrft_sharding::{
    AdamW, AdamWConfig, AdamWCounters, Error, Policy, ShardedModel, StateKind, load_state, state_parts,
};
use tiny::{Batch, Tiny};

const MODEL: Tiny = Tiny { vocab: 24, width: 12, layers: 2 };
const BEFORE: usize = 20;
const AFTER: usize = 20;

/// What a checkpoint holds: whole tensors by kind and name, and the optimizer's counters.
#[derive(Default)]
struct Checkpoint {
    tensors: HashMap<(StateKind, String), Vec<f32>>,
    counters: AdamWCounters,
}

type Trained = (ShardedModel<Tiny>, AdamW);

fn prepare(comm: Arc<dyn Communicator>) -> Result<Trained, Error> {
    let mut model = ShardedModel::new(MODEL, comm, Policy::default())?;
    model.units_mut().load(tiny::start)?;
    let adamw = AdamW::new(AdamWConfig::default(), model.units())?;
    Ok((model, adamw))
}

/// Steps on this rank's share of the 24 tokens; the last step's loss, the mean over ranks.
fn train((model, adamw): &mut Trained, comm: &dyn Communicator, steps: usize) -> Result<f32, Error> {
    let share = MODEL.vocab / comm.world_size();
    let tokens: Vec<usize> = (0..share).map(|i| comm.rank() * share + i).collect();
    let targets = tokens.iter().map(|t| (5 * t + 1) % MODEL.vocab).collect();
    let batch = Batch { tokens, targets };
    let mut mean = [0.0];
    for _ in 0..steps {
        let (logits, tape) = model.forward(&batch)?;
        let (loss, grad) = MODEL.loss(&logits, &batch, MODEL.vocab);
        model.backward(tape, grad)?;
        adamw.step(model.units_mut(), 0.02)?;
        mean = [loss];
        comm.all_reduce(&mut mean, ReduceOp::Mean)?;
    }
    Ok(mean[0])
}

fn main() -> Result<(), Error> {
    let unbroken = World::new(8).launch(|comm| {
        let mut run = prepare(comm.clone())?;
        train(&mut run, &*comm, BEFORE + AFTER)
    })?[0];

    let saved = Mutex::new(Checkpoint::default());
    let half_way = World::new(8).launch(|comm| {
        let mut run = prepare(comm.clone())?;
        let loss = train(&mut run, &*comm, BEFORE)?;
        let (model, adamw) = &run;
        let mut saved = saved.lock().unwrap_or_else(PoisonError::into_inner);
        for part in state_parts(model.units(), Some(adamw)) {
            let whole = saved.tensors.entry((part.kind, part.param.name().to_owned())).or_default();
            whole.resize(part.param.elems(), 0.0);
            whole[part.range].copy_from_slice(part.values);
        }
        saved.counters = adamw.counters();
        Ok::<_, Error>(loss)
    })?[0];

    let saved = saved.into_inner().unwrap_or_else(PoisonError::into_inner);
    let resumed = World::new(4).launch(|comm| {
        let mut run = prepare(comm.clone())?;
        let (model, adamw) = &mut run;
        load_state(model.units_mut(), Some(adamw), |kind, param, range, out| {
            out.copy_from_slice(&saved.tensors[&(kind, param.name().to_owned())][range]);
            Ok::<_, Infallible>(())
        })?;
        adamw.set_counters(saved.counters);
        train(&mut run, &*comm, AFTER)
    })?[0];

    println!("eight ranks, {BEFORE} steps: loss {half_way:.6}");
    println!("eight ranks, {AFTER} more: loss {unbroken:.6}");
    println!("four ranks instead: loss {resumed:.6}");
    assert!(resumed < half_way / 2.0 && (resumed - unbroken).abs() < 1e-5);
    Ok(())
}
