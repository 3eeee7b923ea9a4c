//! What a checkpoint gives back, and what it refuses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{all_parameters, config, on_ranks, run_state, sequences, settings, write_folder};
use lightrft_collectives::CommunicatorExt as _;
use lightrft_strategy::model::Sequence;
use lightrft_strategy::{LoadOptions, Strategy, Which};

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
fn a_save_beside_training_holds_the_policy_as_it_was_when_it_was_called() {
    let folder = tempfile::tempdir().unwrap();
    let (model, dir) = (folder.path().join("model"), folder.path().join("checkpoints"));
    write_folder(&model, &config(serde_json::json!({})), 5);
    on_ranks(2, |world| {
        let strategy = Strategy::with_world(settings(12, 6), world)?;
        let mut actor = strategy.prepare_actor(&model)?;
        let rows = sequences(12);
        let mine: Vec<Sequence<'_>> = rows[strategy.rank() * 6..][..6]
            .iter()
            .map(|(prompt, answer)| Sequence { prompt, answer })
            .collect();
        let mut saver = strategy.actor_saver(&dir)?;
        assert!(saver.progress().is_none());
        let mut after = Vec::new();
        for step in 1..=3 {
            strategy.supervised_step(&mut actor, &mine, 1e-2)?;
            after.push(all_parameters(&mut actor)?);
            // The ranks' calls of training go on while those of the save do.
            let before = saver.save(&actor, &run_state(step))?;
            assert_eq!(before.map(|report| report.step), step.checked_sub(1).filter(|&step| step > 0));
        }
        strategy.supervised_step(&mut actor, &mine, 1e-2)?;
        let unbroken = all_parameters(&mut actor)?;
        assert_eq!(saver.finish()?.unwrap().tag, "global_step3");
        assert!(saver.finish()?.is_none(), "told once");
        // One saver has the directory, and readers may come.
        assert!(strategy.save_ckpt(&actor, &dir, &run_state(4)).is_err());

        let mut again = strategy.prepare_actor(&model)?;
        for (step, values) in (1..=3).zip(&after) {
            let tag = format!("global_step{step}");
            let options = LoadOptions { which: Which::Tag(&tag), ..LoadOptions::default() };
            let loaded = strategy.load_ckpt_with(&mut again, &dir, &options)?.unwrap();
            assert_eq!(loaded.state, run_state(step));
            assert!(all_parameters(&mut again)? == *values, "{tag}");
        }
        strategy.supervised_step(&mut again, &mine, 1e-2)?;
        assert!(all_parameters(&mut again)? == unbroken, "it goes on bit for bit");
        drop(saver);
        strategy.world().barrier()?;
        assert_eq!(strategy.save_ckpt(&actor, &dir, &run_state(4))?.step, 4);
        Ok(())
    });
}

#[test]
fn what_is_not_asked_for_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (model, dir) = (folder.path().join("model"), folder.path().join("checkpoints"));
    write_folder(&model, &config(serde_json::json!({})), 5);
    on_ranks(2, |world| {
        let strategy = Strategy::with_world(settings(12, 6), world)?;
        let rows = sequences(12);
        let mine: Vec<Sequence<'_>> =
            rows[..6].iter().map(|(prompt, answer)| Sequence { prompt, answer }).collect();
        let mut actor = strategy.prepare_actor(&model)?;
        for _ in 0..2 {
            strategy.supervised_step(&mut actor, &mine, 1e-2)?;
        }
        let saved = all_parameters(&mut actor)?;
        strategy.save_ckpt(&actor, &dir, &run_state(2))?;

        type Case = (LoadOptions<'static>, u64, u64);
        let all = LoadOptions::default();
        let cases: [Case; 4] = [
            (all, 2, 2),
            (LoadOptions { load_optimizer_states: false, ..all }, 1, 2),
            (LoadOptions { load_lr_scheduler_states: false, ..all }, 2, 0),
            (LoadOptions { load_module_only: true, ..all }, 1, 0),
        ];
        let mut thirds = Vec::new();
        for (options, optimizer_steps, updates) in cases {
            let mut again = strategy.prepare_actor(&model)?;
            strategy.supervised_step(&mut again, &mine, 1e-2)?;
            let loaded = strategy.load_ckpt_with(&mut again, &dir, &options)?.unwrap();
            assert!(all_parameters(&mut again)? == saved, "{options:?}");
            assert_eq!(again.optimizer.counters().steps, optimizer_steps, "{options:?}");
            assert_eq!(loaded.state.updates, updates, "{options:?}");
            assert!(loaded.missing.is_empty() && loaded.unexpected.is_empty());
            strategy.supervised_step(&mut again, &mine, 1e-2)?;
            thirds.push(all_parameters(&mut again)?);
        }
        strategy.supervised_step(&mut actor, &mine, 1e-2)?;
        let unbroken = all_parameters(&mut actor)?;
        // The moments are those of two steps where they were loaded, and of one where not.
        let exact: Vec<bool> = thirds.iter().map(|third| *third == unbroken).collect();
        assert_eq!(exact, [true, false, true, false]);
        let absent = LoadOptions { which: Which::Tag("global_step9"), ..all };
        let text = strategy.load_ckpt_with(&mut actor, &dir, &absent).unwrap_err().to_string();
        assert!(text.contains("global_step9") && text.contains("global_step2"), "{text}");
        Ok(())
    });
}

#[test]
fn layers_that_a_checkpoint_has_not_keep_their_values_when_that_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write_folder(&path("two"), &config(serde_json::json!({})), 5);
    write_folder(&path("three"), &config(serde_json::json!({ "num_hidden_layers": 3 })), 6);
    on_ranks(2, |world| {
        let strategy = Strategy::with_world(settings(12, 6), world)?;
        let lenient = LoadOptions { load_module_strict: false, ..LoadOptions::default() };
        let (mut two, mut three) =
            (strategy.prepare_actor(&path("two"))?, strategy.prepare_actor(&path("three"))?);
        let (of_two, of_three) = (all_parameters(&mut two)?, all_parameters(&mut three)?);
        strategy.save_ckpt(&two, &path("of_two"), &run_state(1))?;
        strategy.save_ckpt(&three, &path("of_three"), &run_state(1))?;

        assert!(strategy.load_ckpt(&mut three, &path("of_two")).is_err(), "strictly it is another model's");
        assert!(all_parameters(&mut three)? == of_three);
        let loaded = strategy.load_ckpt_with(&mut three, &path("of_two"), &lenient)?.unwrap();
        assert!(loaded.unexpected.is_empty());
        // Nine tensors of a layer without biases, each with two moments.
        assert!(loaded.missing.len() % 3 == 0 && !loaded.missing.is_empty(), "{:?}", loaded.missing);
        assert!(loaded.missing.iter().all(|name| name.contains("layers.2.")), "{:?}", loaded.missing);
        let mixed = all_parameters(&mut three)?;
        let layer = (of_three.len() - of_two.len(), of_two.len());
        let kept = mixed.iter().zip(&of_three).filter(|(a, b)| a == b).count();
        assert!(kept >= layer.0 && mixed != of_three, "{kept} values kept of {layer:?}");

        let loaded = strategy.load_ckpt_with(&mut two, &path("of_three"), &lenient)?.unwrap();
        assert!(loaded.missing.is_empty());
        assert!(loaded.unexpected.iter().all(|name| name.contains("layers.2.")), "{:?}", loaded.unexpected);
        assert!(!loaded.unexpected.is_empty());
        Ok(())
    });
}

#[test]
fn a_model_folder_that_one_rank_cannot_read_is_an_error_on_all() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, cut) = (folder.path().join("whole"), folder.path().join("cut"));
    for path in [&whole, &cut] {
        write_folder(path, &config(serde_json::json!({})), 5);
    }
    let weights = cut.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 4]).unwrap();
    let texts = on_ranks(2, |world| {
        let strategy = Strategy::with_world(settings(12, 6), world)?;
        let mine = if strategy.rank() == 1 { &cut } else { &whole };
        Ok([
            strategy.prepare_actor(mine).map(drop).unwrap_err().to_string(),
            strategy.prepare_reference(mine).map(drop).unwrap_err().to_string(),
        ])
    });
    for text in texts.iter().flatten() {
        assert!(text.contains("model.safetensors"), "{text}");
    }
    assert!(texts[0][0].contains("rank 1"), "{texts:?}");
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
