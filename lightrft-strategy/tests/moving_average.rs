//! The moving average of the policy: what it is, how it survives, how it leaves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{all_parameters, config, on_ranks, run_state, sequences, settings, write_folder};
use lightrft_strategy::model::Sequence;
use lightrft_strategy::{Actor, HfOptions, Result, Strategy, StrategyConfig};

const ROWS: usize = 12;

fn averaged(ranks: usize) -> StrategyConfig {
    StrategyConfig { enable_ema: true, ema_beta: 0.75, ..settings(ROWS, ROWS / ranks) }
}

fn step(strategy: &Strategy, actor: &mut Actor) -> Result<()> {
    let rows = sequences(ROWS);
    let share = ROWS / strategy.world_size();
    let mine: Vec<Sequence<'_>> = rows[strategy.rank() * share..][..share]
        .iter()
        .map(|(prompt, answer)| Sequence { prompt, answer })
        .collect();
    strategy.supervised_step(actor, &mine, 1e-2).map(drop)
}

/// The whole average. *Collective.*
fn average(strategy: &Strategy, actor: &mut Actor, scratch: &Path) -> Result<Vec<f32>> {
    strategy.save_ema_model(actor, scratch, &HfOptions::default())?;
    let mut exported = strategy.prepare_actor(scratch)?;
    all_parameters(&mut exported)
}

#[test]
fn it_is_the_exponential_average_of_what_learns_in_every_stage() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 3);
    for zero_stage in 0..=3 {
        for beta in [0.0, 0.75, 1.0] {
            on_ranks(2, |world| {
                let config = StrategyConfig {
                    zero_stage,
                    ema_beta: beta,
                    freeze_prefix: vec!["model.layers.1.".to_owned()],
                    ..averaged(2)
                };
                let strategy = Strategy::with_world(config, world)?;
                let mut actor = strategy.prepare_actor(folder.path())?;
                let mut expected = all_parameters(&mut actor)?;
                let start = expected.clone();
                for _ in 0..4 {
                    step(&strategy, &mut actor)?;
                    for (average, now) in expected.iter_mut().zip(all_parameters(&mut actor)?) {
                        *average = (beta * f64::from(*average) + (1.0 - beta) * f64::from(now)) as f32;
                    }
                }
                let before = all_parameters(&mut actor)?;
                let scratch = folder.path().join(format!("{zero_stage}-{beta}"));
                let found = average(&strategy, &mut actor, &scratch)?;
                let gap = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(gap < 1e-6, "stage {zero_stage}, beta {beta}: {gap}");
                assert_eq!(found == start, beta == 1.0);
                assert_eq!(found == before, beta == 0.0);
                assert!(all_parameters(&mut actor)? == before, "the export leaves the policy as it was");
                Ok(())
            });
        }
    }
}

#[test]
fn a_checkpoint_gives_it_back_on_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let (model, dir) = (folder.path().join("model"), folder.path().join("checkpoints"));
    write_folder(&model, &config(serde_json::json!({})), 5);
    // Saved by two ranks after two steps; then a third, of the run that saved or of one that loaded.
    let third = |ranks: usize, first: bool| {
        on_ranks(ranks, |world| {
            let strategy = Strategy::with_world(averaged(ranks), world)?;
            let mut actor = strategy.prepare_actor(&model)?;
            if first {
                step(&strategy, &mut actor)?;
                step(&strategy, &mut actor)?;
                strategy.save_ckpt(&actor, &dir, &run_state(2))?;
            } else {
                strategy.load_ckpt(&mut actor, &dir)?.unwrap();
                assert_eq!(actor.ema.as_ref().unwrap().counters().updates, 2);
            }
            step(&strategy, &mut actor)?;
            average(&strategy, &mut actor, &folder.path().join(format!("average-{ranks}-{first}")))
        })
        .remove(0)
    };
    let unbroken = third(2, true);
    assert!(unbroken == third(2, false), "the same world resumes bit for bit");
    for ranks in [1, 3] {
        let gap = unbroken.iter().zip(third(ranks, false)).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(gap < 1e-6, "{ranks} ranks: {gap}");
    }
}

#[test]
fn it_may_be_switched_on_and_off_at_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_folder(&model, &config(serde_json::json!({})), 5);
    for (saved_with, loaded_with) in [(true, false), (false, true)] {
        let dir = folder.path().join(format!("checkpoints-{saved_with}"));
        on_ranks(2, |world| {
            let of = |enable_ema| StrategyConfig { enable_ema, ..averaged(2) };
            let strategy = Strategy::with_world(of(saved_with), world)?;
            let mut actor = strategy.prepare_actor(&model)?;
            step(&strategy, &mut actor)?;
            strategy.save_ckpt(&actor, &dir, &run_state(1))?;
            let saved = all_parameters(&mut actor)?;

            let strategy = Strategy::with_world(of(loaded_with), strategy.world().clone())?;
            let mut actor = strategy.prepare_actor(&model)?;
            strategy.load_ckpt(&mut actor, &dir)?.unwrap();
            assert!(all_parameters(&mut actor)? == saved);
            let scratch = folder.path().join(format!("average-{saved_with}"));
            if loaded_with {
                // It begins at the parameters that were loaded.
                assert!(average(&strategy, &mut actor, &scratch)? == saved);
            } else {
                let text = strategy.save_ema_model(&mut actor, &scratch, &HfOptions::default());
                let text = text.unwrap_err().to_string();
                assert!(text.contains("enable_ema = false"), "{text}");
            }
            Ok(())
        });
    }
}
