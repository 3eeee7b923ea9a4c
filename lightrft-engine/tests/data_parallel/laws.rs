//! Laws over random calls, requests and deaths: the handle answers what one engine that never dies answers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use lightrft_engine::testing::ScriptedEngine;
use lightrft_engine::{
    Completion, DataParallel, Engine, EngineExt, Error, Level, Parts, ReplicaEvent, Request, Result,
    Sampling, Service, State, Version,
};
use proptest::prelude::*;

use super::faulty::failure;
use super::{at_once, boxed, give};

/// A call of a trainer.
#[derive(Clone, Debug)]
enum Op {
    Generate(Vec<Request>),
    Sleep(Level),
    Wake(Parts),
    Update,
    /// Begun and dropped.
    Abandon,
}

/// What becomes of a replica each time that it is made.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Lives,
    DiesAt(usize),
    NeverStarts,
    /// It is made, and cannot be given the weights.
    NoWeights,
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let request = (prop::collection::vec(0..32_u32, 1..30), 1..9_usize, 1..20_usize, 0..3_u64, 0..3_usize)
        .prop_map(|(prompt, samples, max_new_tokens, seed, kind)| {
            let temperature = if kind == 0 { 0.0 } else { 1.0 };
            let sampling = Sampling { temperature, max_new_tokens, seed, ..Sampling::default() };
            let request = Request::new(prompt, sampling).samples(samples);
            if kind == 1 { request.with_id(seed) } else { request }
        });
    prop::collection::vec(request, 0..12)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => requests().prop_map(Op::Generate),
        1 => prop_oneof![Just(Level::One), Just(Level::Two)].prop_map(Op::Sleep),
        2 => prop_oneof![Just(Parts::Weights), Just(Parts::Cache), Just(Parts::All)].prop_map(Op::Wake),
        2 => Just(Op::Update),
        1 => Just(Op::Abandon),
    ]
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        2 => Just(Fate::Lives),
        4 => (0..12_usize).prop_map(Fate::DiesAt),
        1 => Just(Fate::NeverStarts),
        1 => Just(Fate::NoWeights),
    ]
}

fn call(engine: &mut dyn Engine, op: &Op, version: u64) -> Result<Vec<Completion>> {
    match op {
        Op::Generate(requests) => return engine.complete(requests),
        Op::Sleep(level) => engine.sleep(*level)?,
        Op::Wake(parts) => engine.wake(*parts)?,
        Op::Update => give(engine, Version(version))?,
        Op::Abandon => drop(engine.begin_update(Version(version))?),
    }
    Ok(Vec::new())
}

/// By replica, whether its last restart came to nothing.
type InVain = Arc<Mutex<Vec<bool>>>;

/// Replicas whose fates are dealt as they are made, the first ones never failing to start.
fn engines(count: usize, fates: Vec<Vec<Fate>>, with_weights: bool) -> (DataParallel, InVain) {
    let fates = Arc::new(fates);
    let made: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
    let weightless = Arc::new(Mutex::new(Vec::<bool>::new()));
    let told = weightless.clone();
    let make = move |replica: usize| {
        let at = made[replica].fetch_add(1, Ordering::SeqCst);
        let fate = fates[replica].get(at).copied().unwrap_or(Fate::Lives);
        match fate {
            Fate::NeverStarts if at > 0 => return Err(failure()),
            Fate::NoWeights => told.lock().unwrap().push(true),
            _ => {}
        }
        let engine = ScriptedEngine::new(32);
        boxed(if let Fate::DiesAt(call) = fate { engine.dying_at(call) } else { engine })
    };
    let in_vain: InVain = Arc::new(Mutex::new(vec![false; count]));
    let heard = in_vain.clone();
    let listener = move |event: &ReplicaEvent<'_>| {
        let mut heard = heard.lock().unwrap();
        match event {
            ReplicaEvent::NotRestarted { replica, .. } => heard[*replica] = true,
            ReplicaEvent::Restarted { replica, error, .. } => heard[*replica] = error.is_some(),
            ReplicaEvent::Died { replica, .. } => heard[*replica] = false,
            _ => {}
        }
    };
    let engines = DataParallel::new(count, make).unwrap().with_restarts(at_once(u32::MAX)).telling(listener);
    if !with_weights {
        return (engines, in_vain);
    }
    let engines = engines.with_weights(move |engine, version| {
        if weightless.lock().unwrap().pop().is_some() { Err(failure()) } else { give(engine, version) }
    });
    (engines, in_vain)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_dies_whenever_answers_are_those_of_one_engine_that_lives(
        ops in prop::collection::vec(op(), 1..25),
        fates in prop::collection::vec(prop::collection::vec(fate(), 0..6), 4),
        count in 1..5_usize,
        with_weights in prop::bool::ANY,
    ) {
        let (mut engines, in_vain) = engines(count, fates, with_weights);
        let (mut one, mut updated) = (ScriptedEngine::new(32), false);
        for (step, op) in ops.iter().enumerate() {
            let version = step as u64 + 1;
            let (before, others) = (engines.state(), one.state());
            let allowed = call(&mut one, op, version);
            let got = call(&mut engines, op, version);
            updated |= matches!(op, Op::Update | Op::Abandon);
            let generates = matches!(op, Op::Generate(_));
            match got {
                Ok(found) => {
                    // Where the handle's weights were lost, or it was left behind, it does no more than the one.
                    if before == others {
                        prop_assert_eq!(found, allowed.unwrap(), "step {}: {:?}", step, op);
                    } else if let (Op::Generate(_), Ok(expected)) = (op, &allowed) {
                        prop_assert_eq!(&found, expected, "step {}", step);
                    }
                }
                Err(Error::Refused(refusal)) => {
                    prop_assert!(allowed.is_err() || refusal.state != others, "step {}: {}", step, refusal);
                }
                Err(Error::NoReplica { .. }) if generates => {
                    let can_give = with_weights || !updated;
                    for (at, replica) in engines.replicas().iter().enumerate() {
                        let tried = !can_give || in_vain.lock().unwrap()[at];
                        prop_assert!(
                            replica.service != Service::In && tried, "step {}, {}: {:?}", step, at, replica
                        );
                    }
                }
                Err(Error::NoReplica { .. }) if matches!(op, Op::Update | Op::Abandon) => {
                    let none_lives = engines.replicas().iter().all(|replica| replica.state == State::Dead);
                    prop_assert!(none_lives, "step {}: {:?}", step, engines);
                }
                Err(Error::Deadly { deaths: 3, .. }) if generates => {}
                Err(error) => prop_assert!(false, "step {}: {:?}: {}", step, op, error),
            }
            let state = engines.state();
            // Never more than the one has; its weights may have been lost with all that had them.
            prop_assert!(
                state == one.state() || !state.has_weights() || !one.state().has_weights(),
                "step {}: {} for {}", step, state, one.state()
            );
            if let (Some(version), true) = (engines.version(), one.version().is_some()) {
                prop_assert_eq!(Some(version), one.version(), "step {}", step);
            }
            if state != one.state() {
                // Bring both together again, as a trainer would.
                (one, updated) = (ScriptedEngine::new(32), true);
                let mended = (0..100).any(|_| {
                    engines.wake(Parts::All).ok();
                    give(&mut engines, Version(1000)).is_ok() && engines.state() == State::READY
                });
                prop_assert!(mended, "step {}: {:?}", step, engines);
                give(&mut one, Version(1000)).unwrap();
            }
        }
    }
}
