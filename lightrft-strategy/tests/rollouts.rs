//! What the trainer and the engine owe each other: the same log-probabilities, and every rank its own completions.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{config, on_ranks, settings, write_folder};
use lightrft_engine::embedded::{EmbeddedEngine, Settings};
use lightrft_engine::{Completion, DataParallel, Engine, Request, Sampling, State, Version};
use lightrft_strategy::model::{Sequence, TokenBatch};
use lightrft_strategy::{Strategy, StrategyConfig};

fn requests(rank: usize) -> Vec<Request> {
    let sampling = Sampling {
        temperature: 0.8,
        top_p: 0.9,
        max_new_tokens: 8,
        stop_tokens: vec![1],
        ..Sampling::default()
    };
    (0..3)
        .map(|i| {
            // Prompts of different lengths, so that the engine pads.
            let prompt: Vec<u32> = (0..2 + i + rank).map(|k| (3 + k * 5 + i) as u32 % 16).collect();
            Request::new(prompt, sampling.clone()).samples(3).with_id((rank * 10 + i) as u64)
        })
        .collect()
}

#[test]
fn the_trainers_log_probs_agree_with_the_engines() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 11);
    let gaps = on_ranks(2, |world| {
        let strategy = Strategy::with_world(settings(12, 6), world)?;
        let mut actor = strategy.prepare_actor(folder.path())?;
        let decoder = actor.model.model().decoder().clone();
        let mut engine = EmbeddedEngine::without_weights(decoder.config().clone(), Settings::default())?;
        strategy.update_engine_weights(&mut actor, Some(&mut engine), Version(1))?;
        let asked = requests(strategy.rank());
        let completions = strategy.gather_and_generate(Some(&mut engine), &asked)?;
        let rows: Vec<Sequence<'_>> = completions
            .iter()
            .map(|c| Sequence { prompt: &asked[c.request].prompt, answer: &c.tokens })
            .collect();
        let batch = TokenBatch::new(&decoder, &rows)?;
        let trainer = strategy.policy_log_probs(&mut actor, &batch)?;
        let engines = batch.scatter(|row| &completions[row].log_probs);
        let gap = trainer.iter().zip(&engines).zip(batch.mask()).filter(|(_, keep)| **keep);
        Ok((gap.map(|((t, e), _)| (t - e).abs()).fold(0f32, f32::max), completions.len()))
    });
    for (gap, completions) in gaps {
        assert_eq!(completions, 9);
        assert!(gap < 1e-4, "log-probabilities differ by {gap}");
    }
}

#[test]
fn an_engine_shared_by_two_ranks_gives_each_what_its_own_engine_would() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 11);
    let run = |sharing: usize| {
        on_ranks(2, |world| {
            let config = StrategyConfig { engine_tp_size: sharing, ..settings(12, 6) };
            let strategy = Strategy::with_world(config, world)?;
            let mut actor = strategy.prepare_actor(folder.path())?;
            let decoder = actor.model.model().decoder().config().clone();
            let mut engine = strategy
                .holds_engine()
                .then(|| EmbeddedEngine::without_weights(decoder, Settings::default()))
                .transpose()?;
            let mut engine = engine.as_mut().map(|e| e as &mut dyn Engine);
            strategy.update_engine_weights(&mut actor, engine.as_deref_mut(), Version(4))?;
            strategy.gather_and_generate(engine, &requests(strategy.rank()))
        })
    };
    let key = |c: &Completion| (c.request, c.sample, c.tokens.clone(), c.version);
    let own: Vec<Vec<_>> = run(1).iter().map(|cs| cs.iter().map(key).collect()).collect();
    let shared: Vec<Vec<_>> = run(2).iter().map(|cs| cs.iter().map(key).collect()).collect();
    assert_eq!(own, shared);
    assert!(own.iter().flatten().all(|(_, _, _, version)| *version == Version(4)));
}

#[test]
fn replicas_behind_one_handle_give_each_rank_what_one_engine_would() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 11);
    let run = |replicas: usize| {
        on_ranks(2, |world| {
            let config = StrategyConfig { engine_tp_size: 2, ..settings(12, 6) };
            let strategy = Strategy::with_world(config, world)?;
            let mut actor = strategy.prepare_actor(folder.path())?;
            let decoder = actor.model.model().decoder().config().clone();
            let make = move |_| {
                let engine = EmbeddedEngine::without_weights(decoder.clone(), Settings::default())?;
                Ok(Box::new(engine) as Box<dyn Engine>)
            };
            let mut engine =
                strategy.holds_engine().then(|| DataParallel::new(replicas, make)).transpose()?;
            let mut engine = engine.as_mut().map(|e| e as &mut dyn Engine);
            strategy.update_engine_weights(&mut actor, engine.as_deref_mut(), Version(4))?;
            strategy.gather_and_generate(engine, &requests(strategy.rank()))
        })
    };
    let one = run(1);
    assert!(one.iter().flatten().all(|completion| completion.version == Version(4)));
    assert_eq!(run(3), one);
}

#[test]
fn an_engine_that_refuses_is_an_error_on_every_rank_of_its_group() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 11);
    let told = on_ranks(2, |world| {
        let config = StrategyConfig { engine_tp_size: 2, ..settings(12, 6) };
        let strategy = Strategy::with_world(config, world)?;
        let decoder = strategy.prepare_actor(folder.path())?.model.model().decoder().config().clone();
        // Never given weights.
        let mut engine = EmbeddedEngine::without_weights(decoder, Settings::default())?;
        let engine = strategy.holds_engine().then_some(&mut engine as &mut dyn Engine);
        Ok(strategy.gather_and_generate(engine, &requests(strategy.rank())).unwrap_err().to_string())
    });
    // Its holder gives the engine's own error, the other rank says whose it is.
    assert!(told[0].contains("stale"), "{}", told[0]);
    assert!(told[1].contains("stale") && told[1].contains("rank 0"), "{}", told[1]);
}

#[test]
fn sleep_between_rollouts_frees_the_weights_until_the_next_update() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 11);
    on_ranks(1, |world| {
        let config = StrategyConfig { enable_engine_sleep: true, ..settings(12, 6) };
        let strategy = Strategy::with_world(config, world)?;
        let mut actor = strategy.prepare_actor(folder.path())?;
        let decoder = actor.model.model().decoder().config().clone();
        let mut engine = EmbeddedEngine::without_weights(decoder, Settings::default())?;
        strategy.update_engine_weights(&mut actor, Some(&mut engine), Version(0))?;
        assert!(engine.memory_bytes().unwrap().weights > 0);
        strategy.gather_and_generate(Some(&mut engine), &requests(0))?;
        assert!(matches!(engine.state(), State::Asleep { .. }));
        let held = engine.memory_bytes().unwrap();
        assert_eq!((held.weights, held.cache, held.parked), (0, 0, 0));
        assert!(
            strategy.gather_and_generate(Some(&mut engine), &requests(0)).is_err(),
            "the weights are gone"
        );
        strategy.update_engine_weights(&mut actor, Some(&mut engine), Version(1))?;
        strategy.gather_and_generate(Some(&mut engine), &requests(0))?;
        Ok(())
    });
}
