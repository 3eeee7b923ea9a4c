//! What a checkpoint gives back, and what it refuses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{all_parameters, config, on_ranks, run_state, sequences, settings, write_folder};
use lightrft_strategy::Strategy;
use lightrft_strategy::model::Sequence;

#[test]
fn parameters_moments_and_state_come_back_on_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let (model, dir) = (folder.path().join("model"), folder.path().join("checkpoints"));
    write_folder(&model, &config(serde_json::json!({})), 5);
    // Saved by two ranks after two steps; then a third step on one, two and three ranks, from the checkpoint.
    let third_step = |ranks: usize, first: bool| {
        let mut all = on_ranks(ranks, |world| {
            let strategy = Strategy::with_world(settings(12, 12 / ranks), world)?;
            let mut actor = strategy.prepare_actor(&model)?;
            let rows = sequences(12);
            let mine: Vec<Sequence<'_>> = rows[strategy.rank() * (12 / ranks)..][..12 / ranks]
                .iter()
                .map(|(prompt, answer)| Sequence { prompt, answer })
                .collect();
            if first {
                for _ in 0..2 {
                    strategy.supervised_step(&mut actor, &mine, 1e-2)?;
                }
                strategy.save_ckpt(&actor, &dir, &run_state(2))?;
            } else {
                let loaded = strategy.load_ckpt(&mut actor, &dir)?.unwrap();
                assert_eq!(loaded.state, run_state(2));
                assert_eq!(actor.optimizer.counters().steps, 2);
            }
            strategy.supervised_step(&mut actor, &mine, 1e-2)?;
            all_parameters(&mut actor)
        });
        all.swap_remove(0)
    };
    let unbroken = third_step(2, true);
    assert!(unbroken == third_step(2, false), "the same world resumes bit for bit");
    for ranks in [1, 3] {
        let other = third_step(ranks, false);
        let gap = unbroken.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(gap < 1e-6, "{ranks} ranks: {gap}");
    }
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_the_tensors_that_differ() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other, dir) =
        (folder.path().join("one"), folder.path().join("other"), folder.path().join("checkpoints"));
    write_folder(&one, &config(serde_json::json!({})), 5);
    write_folder(&other, &config(serde_json::json!({ "intermediate_size": 20 })), 5);
    on_ranks(1, |world| {
        let strategy = Strategy::with_world(settings(12, 6), world)?;
        let actor = strategy.prepare_actor(&one)?;
        strategy.save_ckpt(&actor, &dir, &run_state(2))?;
        let mut wrong = strategy.prepare_actor(&other)?;
        let before = wrong.model.units().param(0)?.to_vec();
        let text = strategy.load_ckpt(&mut wrong, &dir).unwrap_err().to_string();
        for part in ["model.layers.0.mlp.up_proj.weight", "[24, 16]", "[20, 16]"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
        assert_eq!(wrong.model.units().param(0)?, before, "nothing was loaded");
        Ok(())
    });
}

#[test]
fn no_checkpoint_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 5);
    on_ranks(2, |world| {
        let strategy = Strategy::with_world(settings(12, 6), world)?;
        let mut actor = strategy.prepare_actor(folder.path())?;
        assert!(strategy.load_ckpt(&mut actor, &folder.path().join("none"))?.is_none());
        Ok(())
    });
}

#[test]
fn a_model_folder_that_does_not_fit_its_config_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 5);
    let changed = config(serde_json::json!({ "num_hidden_layers": 3 })).to_json();
    std::fs::write(folder.path().join("config.json"), changed).unwrap();
    on_ranks(1, |world| {
        let strategy = Strategy::with_world(settings(12, 6), world)?;
        let text = strategy.prepare_actor(folder.path()).unwrap_err().to_string();
        assert!(text.contains("model.layers.2.input_layernorm.weight"), "{text}");
        Ok(())
    });
}
